"""Clips of a VAE that is causal in time come off the device group by group: the same bits, in memory that stays."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from broker_config.latent_geometry import LatentLayout
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


#: Frames of each group for 1, 2 and 5 latent frames.
GROUPS = {
    "wan": ([1], [1, 4], [1, 4, 4, 4, 4]),
    "wan22-5b": ([1], [1, 4], [1, 4, 4, 4, 4]),
    "cogvideox-2b": ([1], [8], [9, 8]),
    "easyanimate": ([1], [1, 4], [1, 4, 4, 4, 4]),
    "hunyuanvideo": ([1], [5], [13, 4]),
}


@pytest.mark.parametrize(
    ("name", "sizes"), [(name, sizes) for name, every in GROUPS.items() for sizes in zip((1, 2, 5), every, strict=True)]
)
def test_groups_of_frames_are_bit_for_bit_the_pipelines_clip(name: str, sizes: tuple[int, list[int]]) -> None:
    frames, expected_groups = sizes
    vae, channels = wan(name)
    latents = latents_of(channels, frames=frames)
    with torch.inference_mode():
        expected = vae.decode(latents, return_dict=False)[0]
        groups = list(stream_frames(vae, latents))
        again = vae.decode(latents, return_dict=False)[0]
    assert [group.shape[2] for group in groups] == expected_groups
    assert torch.equal(torch.cat(groups, dim=2), expected)
    assert torch.equal(again, expected)  # nothing of ours is left on the module


@pytest.mark.parametrize("name", ["wan", "cogvideox-2b", "easyanimate"])
def test_a_stream_that_is_given_up_leaves_nothing_on_the_module(name: str) -> None:
    vae, channels = wan(name)
    latents = latents_of(channels)
    with torch.inference_mode():
        expected = vae.decode(latents, return_dict=False)[0]
        stream = stream_frames(vae, latents * 2)
        next(stream)
        next(stream)
        stream.close()
        assert torch.equal(vae.decode(latents, return_dict=False)[0], expected)


def test_a_decode_that_failed_half_way_leaves_no_trace_in_the_next() -> None:
    vae, channels = wan("easyanimate")
    latents, plan = latents_of(channels), plan_of(vae, batch=1, frames=4)
    (expected,) = decode_chunks(vae, latents, plan)
    calls = []

    def fail_at_the_second(*_: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")

    hook = vae.decoder.conv_in.register_forward_hook(fail_at_the_second)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(decode_chunks(vae, latents * 3, plan))
    hook.remove()
    (again,) = decode_chunks(vae, latents, plan)
    assert torch.equal(again, expected)


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


def live_bytes() -> int:
    """Bytes of all tensors that Python holds."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if type(item) in (torch.Tensor, torch.nn.Parameter):  # isinstance would wake deprecated proxies
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_what_is_held_does_not_grow_with_the_clip() -> None:
    vae, channels = wan("wan")
    latents = latents_of(channels, frames=10)
    held = []
    with torch.inference_mode():
        for group in stream_frames(vae, latents):
            held.append(live_bytes())
            assert group.shape[2] in (1, 4)
            del group
    # the state of the convolutions is whole once they have seen two groups
    assert len(set(held[2:])) == 1
    assert len(held) == 10
