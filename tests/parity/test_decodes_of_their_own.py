"""Decodes that are neither a pipeline's last lines nor those of a whole tiny one: loops, padding, all of its items."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.parity.our_way import our_way
from tests.parity.tail_cases import COLUMNS, FRAMES, ROWS, Tail, tail_of

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


def test_a_clip_of_one_chunk_of_cosmos_transfer(vaes: Callable[[str], Any]) -> None:
    vae, name = vaes("cosmos25"), "Cosmos2_5_TransferPipeline"
    statistics = [
        torch.tensor(values).view(1, 16, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    ]
    known = tails.run_lines(
        name,
        "latents_mean = self.latents_mean.to(dtype=vae_dtype",
        "return video",
        self=SimpleNamespace(vae=vae, latents_mean=statistics[0], latents_std=statistics[1]),
        vae_dtype=torch.float32,
        device="cpu",
    )
    latents = torch.randn((2, 16, FRAMES, ROWS, COLUMNS), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = known["decode_latents"](latents)
    made, _ = our_way(name, vae, latents, Tail(shape=()))
    assert torch.equal(made, expected)


def test_helios_pyramid_decodes_each_chunk_afresh(vaes: Callable[[str], Any]) -> None:
    vae, name, each = vaes("helios"), "HeliosPyramidPipeline", 2
    latents = torch.randn((2, 16, 3 * each, ROWS, COLUMNS), generator=torch.Generator().manual_seed(5))
    shape = (1, 16, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(shape)
    history: Any = None
    for end in range(each, 3 * each + 1, each):
        after = tails.run_lines(
            name,
            "current_latents = (",
            "history_video = torch.cat([history_video, current_video], dim=2)",
            self=SimpleNamespace(vae=vae),
            real_history_latents=latents[:, :, :end],
            num_latent_frames_per_chunk=each,
            vae_dtype=torch.float32,
            latents_mean=mean,
            latents_std=1.0 / torch.tensor(vae.config.latents_std).view(shape),
            history_video=history,
        )
        history = after["history_video"]
    made, _ = our_way(name, vae, latents, Tail(shape=(), given={"frames_per_call": each}))
    generated = (history.shape[2] - 1) // 4 * 4 + 1  # pipeline_helios.py __call__
    assert torch.equal(made, history[:, :, :generated])
