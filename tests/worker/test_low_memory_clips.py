"""Clips on the rung of the low-memory decoder: the pictures of plain decode, handed out in groups of frames."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.counted_memory import LiveBytes
from broker_config.latent_geometry import LatentLayout
from tests.support.pixel_norm_vaes import latents_of, pixel_norm_family
from worker import lowmem_decode
from worker.batch_decode import on_rung
from worker.decode import clip_frames, decode_chunks, to_pixels
from worker.frame_stream import can_stream
from worker.latent_layouts import Plan, Scaling
from worker.memory_ladder import Rung, rungs


def plan_of(vae: Any, *, frames: int, height: int, width: int) -> Plan:
    temporal, spatial = 4, 8
    return Plan(
        layout=LatentLayout.VIDEO,
        scaling=Scaling(scaling_factor=1.0, shift_factor=None),
        batch=1,
        num_frames=(frames - 1) * temporal + 1,
        height=height * spatial,
        width=width * spatial,
        spatial=spatial,
        is_video=True,
        temporal=temporal,
    )


def test_pixels_of_a_long_clip_are_made_a_few_frames_at_a_time() -> None:
    clip = torch.randn(1, 3, 96, 256, 320)
    plan = plan_of(None, frames=24, height=32, width=40)
    with LiveBytes() as live:
        pixels = to_pixels(clip_frames(clip, plan), plan)
    part = 4 << 23  # bytes; operators leave three results at once
    assert live.peak < pixels.nbytes + 4 * part < 2 * clip.nbytes
    alone = [to_pixels(clip[:, :, frame], plan) for frame in range(96)]
    assert torch.equal(pixels, torch.cat(alone))


@pytest.mark.parametrize("rung", [Rung.LOW_MEMORY, Rung.LEAN])
@pytest.mark.parametrize("name", ["wan", "qwen_image"])
def test_a_clip_on_a_low_memory_rung_is_plain_decodes(name: str, rung: Rung) -> None:
    vae = pixel_norm_family(name)
    offered = rungs(items=1, first=0, low_memory=lowmem_decode.supports(vae) is None, tiling_allowed=False)
    assert rung in [how.rung for how in offered]
    latents = latents_of(vae, 3, 3, 4)
    plan = plan_of(vae, frames=3, height=3, width=4)
    (expected,) = decode_chunks(vae, latents, plan)
    module = on_rung(vae, rung)
    assert can_stream(module)
    groups = list(decode_chunks(module, latents, plan, items_per_call=1, by_frames=True))
    assert [group.shape[2] for group in groups] == [1, 4, 4]
    torch.testing.assert_close(torch.cat(groups, dim=2), expected, atol=1e-4, rtol=0)
