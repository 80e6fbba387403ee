"""What a decode needs to know beside the latents and the VAE."""

from __future__ import annotations

from dataclasses import dataclass, field

from broker_config.latent_geometry import LAYOUTS, FrameRule, LatentFacts, LatentLayout, LatentState
from worker.latent_layouts.normalisation import Scaling


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How latents of one shape are decoded."""

    layout: LatentLayout
    scaling: Scaling
    #: Pictures or clips.
    batch: int
    #: Frames of each clip; 1 for pictures.
    num_frames: int
    #: Pixels.
    height: int
    width: int
    #: Pixels per latent pixel.
    spatial: int
    is_video: bool
    #: Which normalisation the latents carry; None: the layout's own.
    state: LatentState | None = None
    facts: LatentFacts = field(default_factory=LatentFacts)
    #: Side of the patches of packed latents.
    patch_size: int = 2
    #: Frames per latent frame.
    temporal: int = 1
    frames: FrameRule = FrameRule.FIRST_ALONE
    #: Whether pictures are resized to height and width.
    resizes: bool = False
    #: Whether the VAE returns pixels normalised as ImageNet's.
    imagenet: bool = False
    #: Whether pixels are cut to whole values instead of rounded, as a pipeline with a guardrail leaves them.
    cut: bool = False
    #: Whether pixels are ARRI LogC3, and become linear light.
    logc3: bool = False

    @property
    def latent_state(self) -> LatentState:
        """Which normalisation the latents carry."""
        return LAYOUTS[self.layout].state if self.state is None else self.state
