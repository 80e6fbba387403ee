"""What a tensor of latents is and decodes to, by names and arithmetic alone: no torch, nothing allocated.

`layouts` names how pipelines hand latents out and how their numbers were normalised, `facts` holds what of a job is
not in the VAE's config, `sizes` works out shapes (`clips` those of clips, in the terms of `measured`). What must happen
to the numbers is the worker's business (`worker/latent_layouts`).
"""

from broker_config.latent_geometry.facts import FACTS, LatentFacts, checked_facts
from broker_config.latent_geometry.layouts import LAYOUTS, FrameRule, LatentLayout, LatentState, LayoutForm
from broker_config.latent_geometry.measured import Compression, Geometry
from broker_config.latent_geometry.sizes import measure

__all__ = [
    # names
    "FrameRule",
    "LatentLayout",
    "LatentState",
    # what is known of each
    "FACTS",
    "LAYOUTS",
    "LatentFacts",
    "LayoutForm",
    "checked_facts",
    # sizes
    "Compression",
    "Geometry",
    "measure",
]
