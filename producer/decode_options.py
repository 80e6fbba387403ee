"""Options of a job, as the caller gave them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from broker_config.keys import Priority


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeOptions:
    """Options of a job, as the caller gave them. One vocabulary for Python, CLI and HTTP; see docs/options.md."""

    #: Name in the catalogue.
    vae: str
    #: None: the one that fits the latents' rank.
    layout: str | None = None
    #: Pixels; needed for packed latents.
    height: int | None = None
    #: Pixels; needed for packed latents.
    width: int | None = None
    #: Frames of each clip; None: what the latents decode to.
    num_frames: int | None = None
    #: Frames per second of an mp4; None: the catalogue's.
    fps: float | None = None
    #: png, jpg, webp, mp4, tensor, uint8; None: png for pictures, mp4 for clips.
    output: str | None = None
    #: exact or fast; None: the worker's default.
    mode: str | None = None
    #: high, normal or low.
    priority: str = Priority.NORMAL
    #: Longest attempt, seconds; None: ten times the estimate, at least a minute.
    timeout_s: float | None = None
    #: Longest wait for a worker, seconds; None: any.
    start_within_s: float | None = None
    #: How long latents and artifacts stay after the end, seconds; None: the setting.
    retention_s: float | None = None
    #: None: the VAE's config.
    scaling_factor: float | None = None
    #: None: the VAE's config.
    shift_factor: float | None = None
    #: Which normalisation the latents carry; None: the catalogue's (docs/vaes.md).
    state: str | None = None
    #: Side of the square patches of packed latents; None: the catalogue's.
    patch_size: int | None = None
    #: Pictures of the `layers` layout.
    layers: int | None = None
    #: Leading latent frames that are not decoded.
    additional_frames: int | None = None
    #: Frames, or latent frames of `video_chunks`, in one call of the VAE; None: the layout's.
    frames_per_call: int | None = None
    #: Tiles of `video_blended`: rows x columns + latent pixels of overlap; None: the pipeline's 4x4+3.
    blended_tiles: str | None = None
    #: The scheduler's.
    sigma_data: float | None = None
    #: Timestep at which a VAE with timestep conditioning decodes.
    decode_timestep: float | None = None
    #: Share of noise mixed in before; None: as `decode_timestep`.
    decode_noise_scale: float | None = None
    #: Seed of the generator that noise is drawn from, if it has drawn nothing yet.
    seed: int | None = None
    #: State of that generator otherwise; `generator` of a submit becomes it.
    noise_state: str | None = None
    #: Class the worker's VAE must have; None: the catalogue's.
    vae_class: str | None = None
    #: Digest its config must have; None: any.
    vae_config: str | None = None
    #: Commit its weights must be of; None: any.
    vae_revision: str | None = None
    #: URL that is told how the job goes; None: none is.
    webhook: str | None = None
    #: Of queued, processing, progress, succeeded, failed, canceled; None: the last three.
    webhook_events: Sequence[str] | None = None
    #: Whether artifacts that are small enough travel in the message.
    webhook_inline: bool = False
    #: Signs the messages (`whsec_…`; several, separated by commas, while they change); None: the key's, or the default.
    webhook_secret: str | None = field(default=None, repr=False)
    #: Written into the artifacts.
    metadata: Mapping[str, str] = field(default_factory=dict)
    #: Whether artifacts carry our provenance record.
    provenance: bool = True
    #: Whether the decode may be tiled, which is not exact and can leave seams, when memory is short.
    allow_tiling: bool = False
    #: Whether a small VAE that takes the same latents shows a preview first.
    preview: bool = False
    #: None: a new UUIDv7.
    job_id: str | None = None
