"""`latentq generate`: pictures of prompts."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from broker_config.logs import configure_logging
from broker_config.settings import load_settings
from producer.client import DecodeClient

_ROWS = "For rows that say nothing themselves"


def register(app: typer.Typer) -> None:
    """Adds this command to `app`."""
    app.command()(generate)


def generate(
    pipeline: Annotated[str, typer.Option(metavar="REPO_OR_FOLDER", help="diffusers pipeline; loaded without VAE.")],
    prompts: Annotated[str, typer.Option(metavar="FILE", help="Text, JSONL or CSV; - is standard input.")],
    out: Annotated[str, typer.Option(metavar="DIR_OR_S3", help="Folder or s3://bucket/prefix.")],
    vae: Annotated[str | None, typer.Option(help="Catalogue entry to decode with, if not the pipeline's.")] = None,
    images_per_prompt: Annotated[int, typer.Option(help="Pictures of each prompt.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Prompts in one call of the pipeline.")] = 1,
    devices: Annotated[
        str, typer.Option(help="A generator process each: cuda:0,cuda:1 or cpu. auto: one device.")
    ] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; by itself bfloat16 on CUDA, float32 on a CPU.")
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile what denoises.")] = False,
    revision: Annotated[str | None, typer.Option(help="Of a repo.")] = None,
    output: Annotated[str | None, typer.Option("--format", help="png, jpg, webp, mp4, tensor or uint8.")] = None,
    mode: Annotated[str | None, typer.Option(help="exact or fast.")] = None,
    priority: Annotated[str, typer.Option(help="high, normal or low.")] = "normal",
    webhook: Annotated[str | None, typer.Option(metavar="URL", help="Called when a job ended.")] = None,
    name_template: Annotated[
        str, typer.Option(help="Names of files: {slug} {id} {seed} {line} {image} {occurrence} {height} {width} …")
    ] = "{slug}-{id}",
    seed: Annotated[int, typer.Option(help="Seeds of rows without one are made of it.")] = 0,
    negative_prompt: Annotated[str | None, typer.Option(help=f"{_ROWS}.")] = None,
    height: Annotated[int | None, typer.Option(help=f"{_ROWS}; pixels.")] = None,
    width: Annotated[int | None, typer.Option(help=f"{_ROWS}; pixels.")] = None,
    steps: Annotated[int | None, typer.Option(help=f"{_ROWS}.")] = None,
    guidance: Annotated[float | None, typer.Option(help=f"{_ROWS}.")] = None,
    num_frames: Annotated[int | None, typer.Option(help=f"{_ROWS}; of clips.")] = None,
    max_ahead: Annotated[int, typer.Option(help="Results under way before denoising waits for decoding.")] = 256,
    keep: Annotated[bool, typer.Option("--keep", help="Leave results in the queue, too.")] = False,
) -> None:
    """Make a picture of every prompt: denoise here, decode in the workers, at the same time. Restartable."""
    from producer.prompt_farm.generate import GenerateRequest
    from producer.prompt_farm.generate import generate as run
    from producer.prompt_farm.options import FarmOptions

    configure_logging(load_settings())
    defaults: dict[str, Any] = {
        "negative_prompt": negative_prompt,
        "height": height,
        "width": width,
        "steps": steps,
        "guidance": guidance,
        "num_frames": num_frames,
    }
    options = FarmOptions(
        vae=vae,
        output=output,
        mode=mode,
        priority=priority,
        webhook=webhook,
        images_per_prompt=images_per_prompt,
        batch_size=batch_size,
        seed=seed,
        name_template=name_template,
        defaults={name: value for name, value in defaults.items() if value is not None},
        max_ahead=max_ahead,
        keep=keep,
    )
    asked = GenerateRequest(
        pipeline=pipeline,
        prompts=prompts,
        out=out,
        options=options,
        revision=revision,
        devices=tuple(part.strip() for part in devices.split(",") if part.strip()) or ("auto",),
        dtype=dtype,
        compiled=compiled,
    )
    with DecodeClient.from_env() as client:
        raise typer.Exit(run(asked, client, console=Console()))
