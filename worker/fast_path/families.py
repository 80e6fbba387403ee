"""What is known of each VAE class's fast way, as `families.toml` has it, and what the user says instead."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, Final

import torch

#: Names of memory formats, as families.toml and the settings have them.
FORMATS: Final[Mapping[str, torch.memory_format]] = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One class of VAE. Fields: the head of families.toml."""

    cuda: str
    cpu: str
    compile: str
    dynamic: bool = False
    evidence: str


@dataclass(frozen=True, kw_only=True, slots=True)
class FastOptions:
    """What the user says about the fast way; `auto`: as measured."""

    #: `auto` or `off`.
    use: str = "auto"
    #: `auto`, `contiguous` or `channels_last` (channels_last_3d for a VAE of clips).
    memory_format: str = "auto"
    #: `auto`, `on` (whatever the family's evidence, and on a CPU too) or `off`.
    compile: str = "auto"
    #: Whether weights may be bfloat16 on a CPU that multiplies in it.
    native_bfloat16: bool = True


@functools.cache
def families() -> Mapping[str, Family]:
    """By class name."""
    text = (resources.files("worker.fast_path") / "families.toml").read_text(encoding="utf-8")
    return {name: Family(**table) for name, table in tomllib.loads(text).items()}


def family_of(module: Any) -> Family | None:
    """What is known of this VAE's class; None: nothing."""
    return families().get(type(module).__name__)


def memory_format_of(family: Family, options: FastOptions, *, device: torch.device, clips: bool) -> str:
    """Name of the memory format wanted on a device.

    Args:
        family: of the VAE.
        options: the user's.
        device: where it decodes.
        clips: whether its convolutions are over frames too.
    """
    if options.memory_format == "channels_last":
        return "channels_last_3d" if clips else "channels_last"
    if options.memory_format != "auto":
        return options.memory_format
    return family.cuda if device.type == "cuda" else family.cpu if device.type == "cpu" else "contiguous"


def why_not_compiled(family: Family, options: FastOptions, device: torch.device) -> str | None:
    """Why the VAE is not to be compiled; None if it is."""
    if options.compile == "off":
        return "compiling is off"
    if options.compile == "on":
        return None
    if device.type != "cuda":
        return "compiled on CUDA only, unless forced"
    if family.compile == "allow":
        return None
    return {"deny": "measured to be slower compiled", "unmeasured": "not measured compiled"}[family.compile]
