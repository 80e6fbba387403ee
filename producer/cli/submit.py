"""`latentq submit`: every option of a job, under one name each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from producer.cli.job_options import (
    OptFps,
    OptId,
    OptMetadata,
    OptMode,
    OptOutput,
    OptPriority,
    OptProvenance,
    OptRetention,
    OptScalingFactor,
    OptShiftFactor,
    OptStartWithin,
    OptTimeout,
    OptWait,
    OptWebhook,
    OptWebhookEvents,
    OptWebhookInline,
    OptWebhookSecret,
    after_submit,
    named_options,
)
from producer.client import DecodeClient


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""
    app.command()(submit)


def submit(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="safetensors file with one tensor of latents.")],
    vae: Annotated[str | None, typer.Option(help="Catalogue entry; `latentq vaes` lists them.")] = None,
    pipeline: Annotated[
        str | None,
        typer.Option(metavar="CLASS", help="diffusers pipeline they are of: tells VAE and layout."),
    ] = None,
    layout: Annotated[str | None, typer.Option(help="Latent layout, where the VAE takes several.")] = None,
    state: Annotated[str | None, typer.Option(help="Normalisation the latents carry, if not the VAE's usual.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; needed for packed latents.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; needed for packed latents.")] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames of each clip.")] = None,
    scaling_factor: OptScalingFactor = None,
    shift_factor: OptShiftFactor = None,
    patch_size: Annotated[int | None, typer.Option(help="Side of the patches of packed latents.")] = None,
    layers: Annotated[int | None, typer.Option(help="Pictures of the `layers` layout.")] = None,
    additional_frames: Annotated[int | None, typer.Option(help="Leading latent frames to leave out.")] = None,
    frames_per_call: Annotated[int | None, typer.Option(help="Frames the VAE decodes at a time.")] = None,
    blended_tiles: Annotated[str | None, typer.Option(help="Tiles of long LTX-Video clips, as 4x4+3.")] = None,
    sigma_data: Annotated[float | None, typer.Option(help="The scheduler's (Cosmos).")] = None,
    decode_timestep: Annotated[float | None, typer.Option(help="Timestep of the decode (LTX-Video).")] = None,
    decode_noise_scale: Annotated[float | None, typer.Option(help="Share of noise mixed in (LTX-Video).")] = None,
    seed: Annotated[int | None, typer.Option(help="Of that noise.")] = None,
    noise_state: Annotated[str | None, typer.Option(help="Generator of that noise, instead of a seed.")] = None,
    vae_class: Annotated[str | None, typer.Option(help="Class the worker's VAE must have.")] = None,
    vae_config: Annotated[str | None, typer.Option(help="Digest its config must have.")] = None,
    vae_revision: Annotated[str | None, typer.Option(help="Commit its weights must be of.")] = None,
    output: OptOutput = None,
    fps: OptFps = None,
    mode: OptMode = None,
    priority: OptPriority = "normal",
    timeout_s: OptTimeout = None,
    start_within_s: OptStartWithin = None,
    retention_s: OptRetention = None,
    metadata: OptMetadata = None,
    provenance: OptProvenance = True,
    preview: Annotated[bool, typer.Option("--preview", help="Show a preview by a small VAE first.")] = False,
    allow_tiling: Annotated[bool, typer.Option("--allow-tiling", help="Tile when memory is short; not exact.")] = False,
    webhook: OptWebhook = None,
    webhook_events: OptWebhookEvents = None,
    webhook_inline: OptWebhookInline = False,
    webhook_secret: OptWebhookSecret = None,
    job_id: OptId = None,
    wait: OptWait = False,
) -> None:
    """Hand latents over; prints the job's id."""
    with DecodeClient.from_env() as client:
        after_submit(client.submit_file(file, pipeline=pipeline, **named_options(ctx)), wait=wait)
