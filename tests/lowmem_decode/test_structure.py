"""A module that is not understood is refused before anything is decoded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder, AutoencoderTiny
from torch import nn

from tests.support.kl_vaes import FAMILIES, family, kl
from worker import lowmem_decode


@pytest.mark.parametrize("name", FAMILIES)
def test_the_families_are_supported(name: str) -> None:
    assert lowmem_decode.supports(family(name)) is None


@pytest.mark.parametrize("kind", [AutoencoderTiny, AutoencoderKLTemporalDecoder])
def test_other_classes_are_not(kind: Any) -> None:
    vae = kind()
    assert kind.__name__ in str(lowmem_decode.supports(vae))
    with pytest.raises(lowmem_decode.UnsupportedStructure, match=kind.__name__):
        lowmem_decode.decode(vae, torch.zeros(1, 4, 8, 8))


def set_to_tiles(vae: Any) -> Any:
    vae.enable_tiling()
    return vae


def subclassed(vae: Any) -> Any:
    class Edited(AutoencoderKL):
        pass

    vae.__class__ = Edited
    return vae


def replaced_forward(vae: Any) -> Any:
    vae.decoder.mid_block.forward = lambda *a: a[0]
    return vae


def replaced_decode(vae: Any) -> Any:
    vae.decode = lambda z: z
    return vae


def hooked(vae: Any) -> Any:
    vae.decoder.up_blocks[1].register_forward_hook(lambda module, args, out: out * 2)
    return vae


def other_activation(vae: Any) -> Any:
    vae.decoder.up_blocks[0].resnets[1].nonlinearity = nn.GELU()
    return vae


def strided(vae: Any) -> Any:
    vae.decoder.conv_out = nn.Conv2d(16, 3, 3, padding=2, dilation=2)
    return vae


def parametrised(vae: Any) -> Any:
    nn.utils.parametrizations.weight_norm(vae.decoder.conv_in)
    return vae


def own_layer(vae: Any) -> Any:
    class Doubling(nn.Conv2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    vae.decoder.up_blocks[2].resnets[0].conv1.__class__ = Doubling
    return vae


def further_layer(vae: Any) -> Any:
    vae.decoder.refiner = nn.Conv2d(3, 3, 3, padding=1)
    return vae


def own_processor(vae: Any) -> Any:
    class Processor:
        def __call__(self, attn: Any, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
            return hidden_states

    vae.decoder.mid_block.attentions[0].processor = Processor()
    return vae


def two_dtypes(vae: Any) -> Any:
    vae.decoder.up_blocks[0].to(torch.float64)
    return vae


def on_meta(vae: Any) -> Any:
    return vae.to("meta")


def spatial_norm(vae: Any) -> Any:
    from diffusers.models.attention_processor import SpatialNorm

    vae.decoder.mid_block.attentions[0].spatial_norm = SpatialNorm(64, 64)
    return vae


@pytest.mark.parametrize(
    "edit",
    [
        set_to_tiles,
        subclassed,
        replaced_forward,
        replaced_decode,
        hooked,
        other_activation,
        strided,
        parametrised,
        own_layer,
        further_layer,
        own_processor,
        two_dtypes,
        on_meta,
        spatial_norm,
    ],
)
def test_what_was_changed_is_refused(edit: Callable[[Any], Any]) -> None:
    vae = edit(kl().eval())
    assert lowmem_decode.supports(vae)
    with pytest.raises(lowmem_decode.UnsupportedStructure):
        lowmem_decode.decode(vae, torch.zeros(1, 4, 4, 4))


@pytest.mark.parametrize(
    ("z", "message"),
    [
        (torch.zeros(1, 5, 4, 4), "are not"),
        (torch.zeros(4, 4, 4), "are not"),
        (torch.zeros(0, 4, 4, 4), "are not"),
        (torch.zeros(1, 4, 4, 4, dtype=torch.float64), "float64"),
    ],
)
def test_latents_that_do_not_fit_are_refused(z: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lowmem_decode.decode(kl().eval(), z)


def test_strips_have_rows() -> None:
    with pytest.raises(ValueError, match="strip_rows"):
        lowmem_decode.decode(kl().eval(), torch.zeros(1, 4, 4, 4), strip_rows=0)


@pytest.mark.parametrize("lean", [False, True])
def test_progress_rises_to_the_end(lean: bool) -> None:
    told: list[float] = []
    lowmem_decode.decode(family("sd"), torch.zeros(2, 4, 4, 4), lean=lean, strip_rows=4, on_progress=told.append)
    assert len(told) > 50
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1.0)
