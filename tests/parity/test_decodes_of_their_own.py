"""Decodes that are neither a pipeline's last lines nor those of a whole tiny one: padding, all of its items."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.parity.our_way import our_way
from tests.parity.tail_cases import COLUMNS, ROWS, Tail, tail_of

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
