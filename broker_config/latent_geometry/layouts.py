"""The names: how pipelines lay latents out, and which normalisation their numbers still carry.

The two are independent: FLUX.2 hands out packed latents that are normalised, FLUX.2 klein unpacked ones that no longer
are, and both go to the same class of VAE. Never infer the one from the other, nor either from the VAE.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class LatentLayout(StrEnum):
    """How latents are laid out. B batch, C latent channels, f latent frames, F frames, h × w latent size, p patch."""

    #: (B, C, h, w) of an image VAE.
    UNPACKED = "unpacked"
    #: (B, (h/p)·(w/p), p²·C): patches in raster order, as FLUX.1 works on them; needs height and width.
    PACKED = "packed"
    #: (B, C, f, h, w) of a video VAE.
    VIDEO = "video"
    #: The same, which the pipeline holds with channels innermost, so that its VAE runs other kernels (Kandinsky 6).
    VIDEO_CHANNELS_LAST = "video_channels_last"
    #: (B, C, F, h, w) whose frames an image VAE decodes one by one (AnimateDiff).
    VIDEO_2D = "video_2d"
    #: (B, F, C, h, w) whose frames a VAE of single frames decodes in groups (Stable Video Diffusion).
    FRAMES_2D = "frames_2d"
    #: (B, f, C, h, w) of a video VAE (CogVideoX).
    FRAMES_FIRST = "frames_first"
    #: (B, f, h, w, C) of a video VAE (Kandinsky 5).
    CHANNELS_LAST = "channels_last"
    #: (B, 1, h, w, C) of an image VAE (Kandinsky 5 pictures).
    CHANNELS_LAST_IMAGE = "channels_last_image"
    #: (B, C, 1, h, w): a picture, from a video VAE (Anima).
    FRAME = "frame"
    #: (B, C, h, w): a picture, from a video VAE (Cosmos 2 text to image, JoyImage edit).
    UNPACKED_FRAME = "unpacked_frame"
    #: As `packed`, from a video VAE (Qwen-Image).
    PACKED_FRAME = "packed_frame"
    #: (B, (n+1)·(h/2)·(w/2), 4·C): a picture that is left out, then n layers, a picture each (Qwen-Image-Layered).
    LAYERS = "layers"
    #: (B, f·(h/p)·(w/p), p²·C) of a video VAE (LTX-Video); needs height, width and num_frames.
    PACKED_VIDEO = "packed_video"
    #: (B, 4·C, h/2, w/2): 2×2 patches as channels (ERNIE-Image).
    PATCHED = "patched"
    #: (B, (h/2)·(w/2), 4·C): the same as tokens in raster order (FLUX.2).
    PACKED_PATCHED = "packed_patched"
    #: As `packed_patched`, with the channel innermost in each token (Ideogram 4).
    PACKED_PATCHED_LAST = "packed_patched_last"
    #: (B, 2·C, f, h, w): pairs of frames as channels, of which the last frame is the picture (HunyuanImage refiner).
    FRAME_PAIRS = "frame_pairs"
    #: (B, n, C, 1, h, w): pictures of which the last is the result (JoyImage edit, as a callback sees them).
    ITEMS = "items"
    #: (B, N, C, 1, p, p): patches of the result, then those of its references (JoyImage edit plus).
    ITEM_PATCHES = "item_patches"
    #: (B, C, f, h, w), decoded in two parts: the reasoning, and the edited picture (ChronoEdit).
    VIDEO_REASONED = "video_reasoned"
    #: (B, C, f, h, w), decoded a few latent frames at a time, each part afresh (Helios).
    VIDEO_CHUNKS = "video_chunks"
    #: (B, C, f, h, w) with frames at the end that were not asked for; needs num_frames (LTX-2 DFR).
    VIDEO_CANVAS = "video_canvas"
    #: (B, C, f, h, w), decoded in sections that overlap and are blended, the last first (HunyuanVideo Framepack).
    VIDEO_SECTIONS = "video_sections"
    #: (B, C, f, h, w), decoded in tiles that overlap and are blended (LTX-Video, long clips).
    VIDEO_BLENDED = "video_blended"


class LatentState(StrEnum):
    """Which normalisation latents carry, written as what undoes it; z the latents, sf the scaling factor.

    Two states may be one formula to a mathematician and two to a computer: `z / (1/std)` and `z · std` differ in last
    bits, and pipelines do the one or the other.
    """

    #: z / sf + shift; where the VAE's config has statistics: z · std / sf + mean.
    SCALED = "scaled"
    #: (1 / sf) · z.
    RECIPROCAL = "reciprocal"
    #: z / sf · std + mean.
    SCALED_FIRST = "scaled_first"
    #: z · std + mean.
    STANDARDISED = "standardised"
    #: z / (1 / std) + mean.
    STANDARDISED_INVERSE = "standardised_inverse"
    #: z · std / sigma_data + mean; sigma_data is the scheduler's.
    SIGMA = "sigma"
    #: z / (1 / std) / sigma_data + mean.
    SIGMA_INVERSE = "sigma_inverse"
    #: Of 2×2 patches: z · sqrt(var + eps) + mean, by the VAE's batch norm.
    BATCH_NORM = "batch_norm"
    #: The same with an eps of 1e-5, whatever the VAE's config says.
    BATCH_NORM_1E5 = "batch_norm_1e5"
    #: z / (1 / sqrt(var + eps)) + mean.
    BATCH_NORM_INVERSE = "batch_norm_inverse"
    #: None: the pipeline has undone it.
    DENORMALISED = "denormalised"
    #: No latents yet but what they are drawn from: mean and log variance as 2·C channels. Of encodes only.
    POSTERIOR = "posterior"

    @property
    def takes_factors(self) -> bool:
        """Whether a caller's scaling_factor and shift_factor have a meaning."""
        return self in (LatentState.SCALED, LatentState.RECIPROCAL)

    @property
    def is_batch_norm(self) -> bool:
        """Whether the numbers belong to 2×2 patches."""
        return self in (LatentState.BATCH_NORM, LatentState.BATCH_NORM_1E5, LatentState.BATCH_NORM_INVERSE)

    @property
    def needs_sigma_data(self) -> bool:
        """Whether the scheduler's sigma_data must come with the job."""
        return self in (LatentState.SIGMA, LatentState.SIGMA_INVERSE)


class FrameRule(StrEnum):
    """How many frames f latent frames become, with t frames to a latent frame."""

    #: (f-1)·t + 1.
    FIRST_ALONE = "first_alone"
    #: f·t; the pipeline cuts off what was not asked for (Allegro).
    EVEN = "even"
    #: (f-1)·t + 1 for an odd f, f·t for an even one (CogVideoX decodes two latent frames at a time).
    PAIRS = "pairs"
    #: Clips of 5 latent frames, (f-1)·t + 1 each, at least 3 latent frames in all (MiniMax-H3).
    CLIPS = "clips"


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutForm:
    """What is fixed for a layout."""

    #: Its dimensions, for people.
    form: str
    #: Whether it makes clips.
    is_video: bool = False
    #: Normalisation that goes with it unless catalogue or job say otherwise.
    state: LatentState = LatentState.SCALED
    #: Facts without which its size is unknown.
    needs: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return self.form.count(",") + 1


_SIZE: Final = ("height", "width")

#: Every layout's form.
LAYOUTS: Final[Mapping[LatentLayout, LayoutForm]] = {
    LatentLayout.UNPACKED: LayoutForm(form="(batch, channels, h, w)"),
    LatentLayout.PACKED: LayoutForm(form="(batch, length, patch²*channels)", needs=_SIZE),
    LatentLayout.VIDEO: LayoutForm(form="(batch, channels, frames, h, w)", is_video=True),
    LatentLayout.VIDEO_CHANNELS_LAST: LayoutForm(form="(batch, channels, frames, h, w)", is_video=True),
    LatentLayout.VIDEO_2D: LayoutForm(
        form="(batch, channels, frames, h, w)", is_video=True, state=LatentState.RECIPROCAL
    ),
    LatentLayout.FRAMES_2D: LayoutForm(
        form="(batch, frames, channels, h, w)", is_video=True, state=LatentState.RECIPROCAL
    ),
    LatentLayout.FRAMES_FIRST: LayoutForm(
        form="(batch, frames, channels, h, w)", is_video=True, state=LatentState.RECIPROCAL
    ),
    LatentLayout.CHANNELS_LAST: LayoutForm(form="(batch, frames, h, w, channels)", is_video=True),
    LatentLayout.CHANNELS_LAST_IMAGE: LayoutForm(form="(batch, 1, h, w, channels)"),
    LatentLayout.FRAME: LayoutForm(form="(batch, channels, 1, h, w)", state=LatentState.STANDARDISED_INVERSE),
    LatentLayout.UNPACKED_FRAME: LayoutForm(form="(batch, channels, h, w)", state=LatentState.STANDARDISED_INVERSE),
    LatentLayout.PACKED_FRAME: LayoutForm(
        form="(batch, length, patch²*channels)", state=LatentState.STANDARDISED_INVERSE, needs=_SIZE
    ),
    LatentLayout.LAYERS: LayoutForm(
        form="(batch, length, 4*channels)", state=LatentState.STANDARDISED_INVERSE, needs=(*_SIZE, "layers")
    ),
    LatentLayout.PACKED_VIDEO: LayoutForm(
        form="(batch, length, patch²*channels)", is_video=True, needs=(*_SIZE, "num_frames")
    ),
    LatentLayout.PATCHED: LayoutForm(form="(batch, 4*channels, h/2, w/2)", state=LatentState.BATCH_NORM),
    LatentLayout.PACKED_PATCHED: LayoutForm(
        form="(batch, length, 4*channels)", state=LatentState.BATCH_NORM, needs=_SIZE
    ),
    LatentLayout.PACKED_PATCHED_LAST: LayoutForm(
        form="(batch, length, 4*channels)", state=LatentState.BATCH_NORM, needs=_SIZE
    ),
    LatentLayout.FRAME_PAIRS: LayoutForm(form="(batch, 2*channels, frames, h, w)"),
    LatentLayout.ITEMS: LayoutForm(form="(batch, items, channels, 1, h, w)", state=LatentState.STANDARDISED),
    LatentLayout.ITEM_PATCHES: LayoutForm(
        form="(batch, patches, channels, 1, patch, patch)", state=LatentState.STANDARDISED, needs=_SIZE
    ),
    LatentLayout.VIDEO_REASONED: LayoutForm(
        form="(batch, channels, frames, h, w)", is_video=True, state=LatentState.STANDARDISED_INVERSE
    ),
    LatentLayout.VIDEO_CANVAS: LayoutForm(form="(batch, channels, frames, h, w)", is_video=True, needs=("num_frames",)),
    LatentLayout.VIDEO_SECTIONS: LayoutForm(
        form="(batch, channels, frames, h, w)", is_video=True, needs=("frames_per_call",)
    ),
    LatentLayout.VIDEO_BLENDED: LayoutForm(form="(batch, channels, frames, h, w)", is_video=True),
    LatentLayout.VIDEO_CHUNKS: LayoutForm(
        form="(batch, channels, frames, h, w)",
        is_video=True,
        state=LatentState.STANDARDISED_INVERSE,
        needs=("frames_per_call",),
    ),
}
