"""The part of `latentq demo` that starts from prompts: the demo pipeline denoises while the worker decodes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from rich.console import Console

from producer.client import DecodeClient
from producer.prompt_farm.destination import MANIFEST_NAME
from producer.prompt_farm.generate import DEMO_PIPELINE, GenerateRequest, generate
from producer.prompt_farm.options import FarmOptions

_PROMPTS: Final = (
    "a cup of coffee on a wooden table",
    "chelsea, a tabby cat with green eyes, close up",
    "a rocket on its launch pad at dusk",
    "a portrait of an astronaut in an orange space suit",
)
#: Of each prompt, so that there is something to overlap.
_PICTURES: Final = 3
#: What producer/demo_pipeline/README.md says of good pictures.
_DEFAULTS: Final = {"steps": 4, "guidance": 2.0}
#: What the extra `farm` brings beside the worker's own.
_NEEDED: Final = ("torch", "diffusers", "transformers")


def run_prompts(out: Path, client: DecodeClient, *, environment: Mapping[str, str], console: Console) -> int:
    """Makes pictures of prompts in `out`. Returns the exit status.

    Args:
        out: folder of its own; what an earlier demo left there is removed.
        client: of the demo's broker.
        environment: tells the generator process which broker that is.
        console: where to draw.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        console.print(f"prompts in, pictures out: left out, it needs {missing[0]} (pip install 'latentq[farm]')")
        return 0
    if (out / MANIFEST_NAME).exists():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    prompts = out / "prompts.txt"
    prompts.write_text("".join(f"{prompt}\n" for prompt in _PROMPTS), encoding="utf-8")
    console.print("\n[bold]prompts in, pictures out[/bold]  latentq generate --pipeline latentq:demo", highlight=False)
    asked = GenerateRequest(
        pipeline=DEMO_PIPELINE,
        prompts=str(prompts),
        out=str(out),
        options=FarmOptions(images_per_prompt=_PICTURES, name_template="{slug}-{image}", defaults=_DEFAULTS),
    )
    return generate(asked, client, console=console, environment={**os.environ, **environment})
