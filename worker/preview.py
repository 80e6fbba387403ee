"""Previews: a small VAE shows a job's latents before its own VAE decodes them.

A preview is a JPEG of the job's first picture (of a clip: its first frame). It is a favour: whatever goes wrong with it
is recorded in the result and logged, and the job goes on. A worker shows previews of the small VAEs it serves.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection

import torch

from broker_config.job_store import JobStore
from broker_config.latent_geometry import LatentLayout
from broker_config.messages import DecodeRequest, Output
from worker.batch_decode import plan_of
from worker.decode import decode_chunks, to_pixels
from worker.image_encoding import encode_image
from worker.stages import Work, classify
from worker.vae_pool import VaePool

logger = logging.getLogger(__name__)


class Previewer:
    """Shows previews of one worker's jobs. For the device's thread."""

    def __init__(self, pool: VaePool, store: JobStore, *, served: Callable[[], Collection[str]]) -> None:
        """Args:
        pool: has the small VAEs.
        store: where previews are shown.
        served: VAEs this worker serves; no other is loaded for a preview.
        """
        self._pool = pool
        self._store = store
        self._served = served

    def show(self, work: Work) -> None:
        """Shows the job's preview, if it asks for one; `work.preview` says what came of it."""
        name = work.request.preview
        if name is None:
            return
        about = {"job_id": work.claim.job_id, "vae": name}
        if name not in self._served():
            work.preview = f"skipped: this worker does not serve {name}"
            logger.info("no preview: this worker does not serve %s", name, extra={"action": "preview_skipped", **about})
            return
        try:
            self._store.show_preview(work.claim.job_id, self._picture(work, name))
            work.preview = f"shown by {name}"
        except Exception as error:
            known = classify(error)
            work.preview = f"failed: {known.code}"
            logger.warning("no preview: %s", known.message, extra={"action": "preview_failed", **about})

    def _picture(self, work: Work, name: str) -> bytes:
        vae = self._pool.get(name)
        latents, request = first_picture(work.latents, work.request)
        with vae.lock:
            plan = plan_of(request, vae, batch=1)
            [decoded] = decode_chunks(vae.module, latents, plan)
            pixels = to_pixels(decoded, plan).cpu().numpy()
        return encode_image(pixels[0], output=str(Output.JPG), metadata={}, provenance=None).data


def first_picture(latents: torch.Tensor, request: DecodeRequest) -> tuple[torch.Tensor, DecodeRequest]:
    """Latents of a job's first picture, or of the first frame of its first clip, and the job of these alone, without
    what belongs to its own VAE.
    """
    latents = latents[:1]
    if request.layout == LatentLayout.VIDEO_2D:
        latents = latents[:, :, :1]  # B, C, F, h, w
    own = dataclasses.replace(request, vae_class=None, vae_config=None, vae_revision=None)
    own = dataclasses.replace(own, scaling_factor=None, shift_factor=None)
    return latents, dataclasses.replace(own, shape=tuple(latents.shape), batch=1, num_frames=1)
