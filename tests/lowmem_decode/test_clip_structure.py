"""A VAE of clips that is not understood is refused before anything is decoded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.clip_vaes import CLIP_FAMILIES, clip_family, cogvideox, hunyuan_video, mochi
from worker import lowmem_decode


@pytest.mark.parametrize("name", CLIP_FAMILIES)
def test_the_families_are_supported(name: str) -> None:
    assert lowmem_decode.supports(clip_family(name)) is None


def other_padding(vae: Any) -> Any:
    vae.decoder.conv_in.pad_mode = "constant"
    return vae


def other_upsample(vae: Any) -> Any:
    vae.decoder.up_blocks[1].upsamplers[0].upsample_factor = (2, 1, 1)
    return vae


def hooked(vae: Any) -> Any:
    vae.decoder.up_blocks[0].resnets[0].conv1.conv.register_forward_hook(lambda module, args, out: out * 2)
    return vae


def own_layer(vae: Any) -> Any:
    class Doubling(nn.Conv3d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    vae.decoder.conv_out.conv.__class__ = Doubling
    return vae


def further_layer(vae: Any) -> Any:
    vae.decoder.refiner = nn.Conv3d(3, 3, 3)
    return vae


def by_groups(vae: Any) -> Any:
    vae._enable_framewise_decoding()
    return vae


def other_expansion(vae: Any) -> Any:
    vae.decoder.up_blocks[0].spatial_expansion = 4
    return vae


def other_activation(vae: Any) -> Any:
    vae.decoder.nonlinearity = nn.GELU()
    return vae


def plain_norm(vae: Any) -> Any:
    vae.decoder.norm_out = nn.GroupNorm(4, 8)
    return vae


def repeated_edges(vae: Any) -> Any:
    vae.decoder.mid_block.resnets[0].conv1.pad_mode = "replicate"
    return vae


def quantised_before(vae: Any) -> Any:
    vae.post_quant_conv = nn.Conv3d(4, 4, 1)
    return vae


@pytest.mark.parametrize(
    ("make", "edit"),
    [
        (hunyuan_video, other_padding),
        (hunyuan_video, other_upsample),
        (hunyuan_video, hooked),
        (hunyuan_video, own_layer),
        (hunyuan_video, further_layer),
        (mochi, by_groups),
        (mochi, other_expansion),
        (mochi, other_activation),
        (mochi, further_layer),
        (cogvideox, plain_norm),
        (cogvideox, repeated_edges),
        (cogvideox, quantised_before),
        (cogvideox, own_layer),
    ],
)
def test_what_was_changed_is_refused(make: Callable[[], Any], edit: Callable[[Any], Any]) -> None:
    vae = edit(make().eval())
    assert lowmem_decode.supports(vae)
    with pytest.raises(lowmem_decode.UnsupportedStructure):
        lowmem_decode.decode(vae, torch.zeros(1, 4, 1, 2, 2))


@pytest.mark.parametrize("shape", [(1, 4, 2, 2), (1, 5, 1, 2, 2), (1, 4, 0, 2, 2)])
def test_latents_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="are not"):
        lowmem_decode.decode(hunyuan_video().eval(), torch.zeros(shape))
