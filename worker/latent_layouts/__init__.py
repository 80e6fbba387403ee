"""Latent layouts as pure functions: what a pipeline hands out → what its VAE's `decode` takes, and what it returns.

Each function follows the lines of the diffusers pipeline it names, in the same order of operations, so that
float32 results are equal bit for bit. `normalisation` undoes what latents were multiplied by, `tokens` unpacks
sequences, `frames` moves frames and channels about, `plan` says what a decode needs to know, `table` puts them
together.

Shapes: B batch, C latent channels, F frames, f latent frames, h × w latent size, p patch size, H × W pixels.
"""

from worker.latent_layouts.normalisation import Scaling, denormalise, scaling_of
from worker.latent_layouts.plan import Plan
from worker.latent_layouts.table import finish, to_vae_input

__all__ = ["Plan", "Scaling", "denormalise", "finish", "scaling_of", "to_vae_input"]
