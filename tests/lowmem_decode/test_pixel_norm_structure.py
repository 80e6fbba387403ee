"""VAEs with norms per pixel that are not understood are refused before anything is decoded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.pixel_norm_vaes import (
    PIXEL_NORM_FAMILIES,
    hunyuan_video15,
    latents_of,
    ltx,
    ltx095,
    ltx2,
    pixel_norm_family,
    qwen_image,
    wan,
)
from worker import lowmem_decode


@pytest.mark.parametrize("name", PIXEL_NORM_FAMILIES)
def test_the_families_are_supported(name: str) -> None:
    assert lowmem_decode.supports(pixel_norm_family(name)) is None


def other_activation(vae: Any) -> Any:
    vae.decoder.mid_block.resnets[0].nonlinearity = nn.GELU()
    return vae


def further_layer(vae: Any) -> Any:
    vae.decoder.refiner = nn.Conv3d(3, 3, 3, padding=1)
    return vae


def hooked(vae: Any) -> Any:
    vae.decoder.mid_block.register_forward_hook(lambda module, args, out: out * 2)
    return vae


def replaced_decode(vae: Any) -> Any:
    vae._decode = lambda z: z
    return vae


def in_tiles(vae: Any) -> Any:
    vae.enable_tiling()
    return vae


def two_dtypes(vae: Any) -> Any:
    vae.decoder.conv_out.to(torch.float64)
    return vae


def on_meta(vae: Any) -> Any:
    return vae.to("meta")


def strided(vae: Any) -> Any:
    conv = vae.decoder.conv_out
    getattr(conv, "conv", conv).stride = (1, 2, 1)
    return vae


@pytest.mark.parametrize(
    "edit", [other_activation, further_layer, hooked, replaced_decode, in_tiles, two_dtypes, on_meta, strided]
)
@pytest.mark.parametrize("make", [wan, qwen_image, hunyuan_video15, ltx, ltx2])
def test_what_was_changed_is_refused(make: Callable[[], Any], edit: Callable[[Any], Any]) -> None:
    vae = edit(make().eval())
    assert lowmem_decode.supports(vae)
    with pytest.raises(lowmem_decode.UnsupportedStructure):
        lowmem_decode.decode(vae, torch.zeros(1, 4, 1, 4, 4))


def test_noise_that_is_mixed_in_is_refused_by_name() -> None:
    vae = ltx(decoder_inject_noise=(True, False, False, False, False)).eval()
    assert "mixes noise" in str(lowmem_decode.supports(vae))


def test_a_timestep_that_is_missing_is_asked_for() -> None:
    vae = ltx095().eval()
    with pytest.raises(ValueError, match="temb is missing"):
        lowmem_decode.decode(vae, latents_of(vae, 1, 2, 2))


@pytest.mark.parametrize(
    ("z", "message"),
    [
        (torch.zeros(1, 5, 1, 4, 4), "are not"),
        (torch.zeros(1, 4, 4, 4), "are not"),
        (torch.zeros(0, 4, 1, 4, 4), "are not"),
        (torch.zeros(1, 4, 1, 4, 4, dtype=torch.float64), "float64"),
    ],
)
def test_latents_that_do_not_fit_are_refused(z: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lowmem_decode.decode(wan().eval(), z)


def test_strips_have_rows_and_reflected_edges_two() -> None:
    with pytest.raises(ValueError, match="strip_rows"):
        lowmem_decode.decode(wan().eval(), torch.zeros(1, 4, 1, 4, 4), strip_rows=0)
    with pytest.raises(ValueError, match="two rows"):
        lowmem_decode.decode(ltx2().eval(), torch.zeros(1, 8, 1, 1, 4))


def test_progress_rises_to_the_end() -> None:
    told: list[float] = []
    vae = wan().eval()
    lowmem_decode.decode(vae, latents_of(vae, 2, 3, 3, batch=2), strip_rows=2, on_progress=told.append)
    assert len(told) > 10
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1.0)
