"""Clips of a VAE that is causal in time come off the device group by group: the same bits, in memory that stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from broker_config.latent_geometry import LatentLayout
from tests.support.processes import ROOT
from tests.support.tiny_families import catalogue, make
from worker.decode import decode_chunks
from worker.frame_stream import can_stream, stream_frames
from worker.latent_layouts import Plan, Scaling


def wan(name: str) -> tuple[Any, int]:
    """A tiny VAE of the entry, and its latent channels."""
    table = catalogue()[name]
    return make(name, table), table["channels"]


def latents_of(channels: int, *, batch: int = 1, frames: int = 4) -> torch.Tensor:
    return torch.randn(batch, channels, frames, 6, 5, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", ["wan", "wan22-5b"])
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_groups_of_frames_are_bit_for_bit_the_pipelines_clip(name: str, frames: int) -> None:
    vae, channels = wan(name)
    latents = latents_of(channels, frames=frames)
    with torch.inference_mode():
        expected = vae.decode(latents, return_dict=False)[0]
        groups = list(stream_frames(vae, latents))
        again = vae.decode(latents, return_dict=False)[0]
    assert [group.shape[2] for group in groups] == [1] + [4] * (frames - 1)
    assert torch.equal(torch.cat(groups, dim=2), expected)
    assert torch.equal(again, expected)  # nothing of ours is left on the module


def test_a_stream_that_is_given_up_leaves_nothing_on_the_module() -> None:
    vae, channels = wan("wan")
    latents = latents_of(channels)
    with torch.inference_mode():
        expected = vae.decode(latents, return_dict=False)[0]
        stream = stream_frames(vae, latents * 2)
        next(stream)
        next(stream)
        stream.close()
        assert torch.equal(vae.decode(latents, return_dict=False)[0], expected)


def test_a_vae_that_tiles_and_one_that_is_not_causal_are_left_alone() -> None:
    vae, _ = wan("wan")
    assert can_stream(vae)
    vae.enable_tiling()
    assert not can_stream(vae)
    assert not can_stream(make("sd", catalogue()["sd"]))


def plan_of(vae: Any, *, batch: int, frames: int) -> Plan:
    return Plan(
        layout=LatentLayout.VIDEO,
        scaling=Scaling(scaling_factor=1.0, shift_factor=None),
        batch=batch,
        num_frames=1 + 4 * (frames - 1),
        height=48,
        width=40,
        spatial=8,
        is_video=True,
        temporal=4,
    )


@pytest.mark.parametrize("first", [0, 1, 3])
def test_clips_come_one_after_the_other_and_pieces_that_are_known_are_left_out(first: int) -> None:
    vae, channels = wan("wan")
    latents = latents_of(channels, batch=2, frames=2)
    plan = plan_of(vae, batch=2, frames=2)
    whole = torch.cat(list(decode_chunks(vae, latents, plan, items_per_call=1)))
    pieces = list(decode_chunks(vae, latents, plan, items_per_call=1, by_frames=True, first=first))
    expected = [whole[:1, :, :1], whole[:1, :, 1:], whole[1:, :, :1], whole[1:, :, 1:]]
    assert len(pieces) == 4 - first
    assert all(torch.equal(piece, wanted) for piece, wanted in zip(pieces, expected[first:], strict=True))


#: Decodes a clip under a limit of address space: argv: by_frames, latent frames, bytes.
_CAPPED = """
import json, os, resource, sys
import torch
from tests.support.tiny_families import catalogue, make
from tests.worker.test_frame_stream import plan_of
from worker.decode import decode_chunks

by_frames, frames, headroom = sys.argv[1] == "yes", int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
table = catalogue()["wan"]
vae = make("wan", table)
latents = torch.randn(1, table["channels"], frames, 16, 16)
plan = plan_of(vae, batch=1, frames=frames)
for _ in decode_chunks(vae, latents[:, :, :2], plan, by_frames=True):
    pass
used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (used + headroom, used + headroom))
try:
    seen = sum(chunk.shape[2] for chunk in decode_chunks(vae, latents, plan, by_frames=by_frames))
except RuntimeError as error:
    assert "allocate" in str(error) or "memory" in str(error), error
    seen = 0
print(json.dumps(seen))
"""


def frames_decoded(*, by_frames: bool, latent_frames: int, headroom_mb: int) -> int:
    done = subprocess.run(
        [sys.executable, "-c", _CAPPED, "yes" if by_frames else "no", str(latent_frames), str(headroom_mb << 20)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout.splitlines()[-1]))


def test_memory_does_not_grow_with_the_clip() -> None:
    # 161 frames of 128² are 32 MB, which plain decode holds twice while it appends to them, and a third time clamped;
    # convolutions of four frames take some 100 MB either way.
    assert frames_decoded(by_frames=False, latent_frames=41, headroom_mb=150) == 0
    assert frames_decoded(by_frames=True, latent_frames=41, headroom_mb=150) == 161
