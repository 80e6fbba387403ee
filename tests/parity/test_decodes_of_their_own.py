"""Decodes beside those of whole tiny pipelines: what is padded, tiles of any number, all items of a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.parity.our_way import our_way
from tests.parity.tail_cases import COLUMNS, ROWS, Tail, tail_of
from worker.blended_tiles import decode_in_tiles

tails = pytest.importorskip("tests.parity.pipeline_tails", reason="diffusers' pipelines need transformers")


def test_all_items_of_joyimage_as_a_callback_sees_them(vaes: Callable[[str], Any]) -> None:
    vae, name = vaes("joyimage"), "JoyImageEditPipeline"
    latents = torch.randn((2, 2, 16, 1, ROWS, COLUMNS), generator=torch.Generator().manual_seed(5))
    tail = Tail(shape=latents.shape, known={"enable_denormalization": True}, given={"layout": "items"})
    expected, pixels = tails.run_tail(tails.load(name), vae, latents, **tail.known)
    made, made_pixels = our_way(name, vae, latents, tail)
    assert torch.equal(made, expected)
    assert np.array_equal(made_pixels, pixels)


@pytest.mark.parametrize("frames", [2, 3, 4, 5])
def test_cogvideox_leaves_out_the_frames_it_padded(frames: int, vaes: Callable[[str], Any]) -> None:
    vae, name = vaes("cogvideox-5b"), "CogVideoXPipeline"
    tail = tail_of(name, vae)
    tail = replace(tail, known=tail.known | {"additional_frames": 1}, given={"additional_frames": 1})
    latents = torch.randn((2, frames, 16, ROWS, COLUMNS), generator=torch.Generator().manual_seed(5))
    expected, pixels = tails.run_tail(tails.load(name), vae, latents, **tail.known)
    made, made_pixels = our_way(name, vae, latents, tail)
    assert torch.equal(made, expected)
    assert np.array_equal(made_pixels, pixels)


class Enlarging:
    """A VAE that repeats its latents: 4 × 4 pixels and 8 frames to each, but of the first frame one."""

    dtype = torch.float32
    config = SimpleNamespace(timestep_conditioning=False)

    def decode(self, latents: torch.Tensor, temb: Any = None, *, return_dict: bool) -> tuple[torch.Tensor]:
        pictures = latents.repeat_interleave(4, dim=3).repeat_interleave(4, dim=4)
        return (torch.cat([pictures[:, :, :1], pictures[:, :, 1:].repeat_interleave(8, dim=2)], dim=2),)


@pytest.mark.parametrize("tiles", [(4, 4, 3), (4, 3, 5), (2, 3, 1), (3, 2, 0), (1, 1, 3)])
def test_tiles_of_any_number_are_blended_as_the_pipeline_does(tiles: tuple[int, int, int]) -> None:
    rows, columns, overlap = tiles
    vae: Any = Enlarging()
    latents = torch.randn((2, 3, 2, 16, 22), generator=torch.Generator().manual_seed(5))
    pipeline = SimpleNamespace(
        vae=vae, _execution_device="cpu", vae_temporal_compression_ratio=8, vae_spatial_compression_ratio=4
    )
    expected = tails.load("LTXI2VLongMultiPromptPipeline").vae_decode_tiled(
        pipeline,
        latents,
        vertical_tiles=rows,
        horizontal_tiles=columns,
        overlap=overlap,
        last_frame_fix=False,
        auto_denormalize=False,
    )
    made = decode_in_tiles(latents, tiles=tiles, spatial=4, decode=lambda tile: vae.decode(tile, return_dict=False)[0])
    assert torch.equal(made, expected)
