"""Settings that only a worker needs."""

from __future__ import annotations

import os
import re
import secrets
import socket
from pathlib import Path
from typing import Annotated, Literal

import platformdirs
from pydantic import AfterValidator, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from broker_config import settings_loading
from broker_config.messages import Mode
from broker_config.settings_loading import Names

__all__ = ["WorkerSettings", "load_worker_settings"]


def _own_name() -> str:
    """A name nobody had before: after a SIGKILL, RQ refuses the old one until its hash expires."""
    host = "".join(c if c.isalnum() else "-" for c in socket.gethostname())[:32]
    return f"{host}-{os.getpid()}-{secrets.token_hex(3)}"


def _checked_sizes(sizes: tuple[str, ...]) -> tuple[str, ...]:
    for size in sizes:
        if re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}", size) is None:
            raise ValueError(f"{size!r} is not WIDTHxHEIGHT, as in 1024x1024")
    return sizes


class WorkerSettings(BaseSettings):
    """Settings of one worker process."""

    model_config = SettingsConfigDict(
        env_prefix="LATENTQ_WORKER_", env_file=".env", env_ignore_empty=True, extra="ignore", frozen=True
    )

    name: str = Field(
        default_factory=_own_name, pattern=r"^[A-Za-z0-9_.-]{1,64}$", description="Unique name of the worker."
    )
    vaes: Names = Field((), description="Catalogue entries to serve, separated by commas or as a JSON list.")
    device: str = Field("auto", description="`cuda:0`, `cpu`, …; auto: the first CUDA device, else the CPU.")
    dtype: str | None = Field(
        None,
        pattern="^(float32|float16|bfloat16)$",
        description="Overrides the catalogue's dtype, e.g. bfloat16 on a CPU that has it.",
    )
    mode: Mode | None = Field(None, description="Default mode of jobs that name none: exact on a CPU, fast on CUDA.")
    threads: int | None = Field(None, gt=0, description="torch threads on a CPU; unset: torch's own choice.")
    encode_threads: int = Field(
        default_factory=lambda: min(4, os.cpu_count() or 1), gt=0, description="Threads that encode images."
    )
    max_batch_jobs: int = Field(16, gt=0, description="Jobs in one batch in mode fast.")
    max_batch_px: int | None = Field(
        None,
        gt=0,
        description="Decoded pixels of one batch in mode fast; unset: measured for each VAE when it is loaded, as the "
        "size from which a larger call is hardly faster for each pixel.",
    )
    fast_path: Literal["auto", "off"] = Field(
        "auto", description="Whether mode fast may decode by another memory format and with fused norms."
    )
    memory_format: Literal["auto", "contiguous", "channels_last"] = Field(
        "auto", description="Of activations in mode fast; auto: as is known of the family (latentq vaes NAME --plan)."
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="torch.compile in mode fast. auto: on CUDA, families measured to gain; on: every family that can "
        "be compiled, on a CPU too.",
    )
    compile_sizes: Annotated[Names, AfterValidator(_checked_sizes)] = Field(
        default_factory=lambda: ("1024x1024",),
        max_length=8,
        description="Pictures to compile for when a VAE is loaded, WIDTHxHEIGHT in pixels; the others share one graph, "
        "or are not compiled.",
    )
    compile_cache: Path = Field(
        default_factory=lambda: platformdirs.user_cache_path("latentq") / "compiled",
        description="Folder where compiled graphs and kernels stay for the next start.",
    )
    pool_bytes: int | None = Field(None, gt=0, description="Memory for loaded VAEs; unset: all of them stay loaded.")
    grace_s: float = Field(90.0, gt=0, description="Time to finish what the device holds after SIGTERM.")

    @property
    def compile_sizes_px(self) -> tuple[tuple[int, int], ...]:
        """`compile_sizes` as (width, height)."""
        pairs = (size.split("x") for size in self.compile_sizes)
        return tuple((int(width), int(height)) for width, height in pairs)


def load_worker_settings(**overrides: object) -> WorkerSettings:
    """Settings from the environment, with `overrides` on top.

    Raises:
        ConfigurationError: a value is not allowed; the message names each variable.
    """
    return settings_loading.load(WorkerSettings, "worker settings", overrides)
