"""The low-memory decode gives the picture diffusers gives, whatever the shape and however it is cut."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.kl_vaes import FAMILIES, family
from tests.support.last_bits import psnr_db
from worker import lowmem_decode
from worker.vae_pool import _OWN_WEIGHTS

#: What issue and docs promise in float32.
TOLERANCE = 1e-4
#: What they promise in bfloat16.
PSNR_DB = 55.0


@functools.cache
def cached(name: str) -> Any:
    return family(name)


def plain(vae: Any, z: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        decoded: torch.Tensor = vae.decode(z).sample
    return decoded


def latents(vae: Any, *, height: int, width: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, vae.config.latent_channels, height, width, generator=generator).to(vae.dtype)


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_decodes_as_diffusers_does(name: str, lean: bool) -> None:
    vae = cached(name)
    z = latents(vae, height=11, width=14, batch=2)
    expected = plain(vae, z)
    got = lowmem_decode.decode(vae, z, lean=lean)
    assert got.shape == expected.shape
    assert got.is_contiguous()
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(sorted(FAMILIES)),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    strip_rows=st.one_of(st.none(), st.integers(1, 40)),
    lean=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_in_any_strips(
    name: str, height: int, width: int, strip_rows: int | None, lean: bool, seed: int
) -> None:
    vae = cached(name)
    z = latents(vae, height=height, width=width, seed=seed)
    got = lowmem_decode.decode(vae, z, strip_rows=strip_rows, lean=lean)
    torch.testing.assert_close(got, plain(vae, z), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("lean", [False, True])
def test_strips_leave_no_seam(lean: bool) -> None:
    """What differs from the plain decode differs no more at the borders of strips than between them."""
    vae = cached("sd")
    z = latents(vae, height=16, width=16)
    rows = 8
    difference = (lowmem_decode.decode(vae, z, lean=lean, strip_rows=rows) - plain(vae, z)).abs().mean((0, 1, 3))
    at_borders = torch.zeros(len(difference), dtype=torch.bool)
    for border in range(rows, len(difference), rows):
        at_borders[border - 2 : border + 2] = True
    assert difference[at_borders].mean() <= 1.5 * difference[~at_borders].mean() + 1e-7


def test_the_way_it_is_cut_hardly_shows() -> None:
    vae = cached("sd")
    z = latents(vae, height=9, width=8)
    whole = lowmem_decode.decode(vae, z, strip_rows=1000)
    for strip_rows in (1, 2, 5):
        torch.testing.assert_close(lowmem_decode.decode(vae, z, strip_rows=strip_rows), whole, atol=2e-5, rtol=0)


def test_items_of_a_batch_do_not_see_each_other() -> None:
    """Bit-equal: each is decoded by itself."""
    vae = cached("sd")
    z = latents(vae, height=6, width=7, batch=3)
    together = lowmem_decode.decode(vae, z)
    for number in range(3):
        assert torch.equal(together[number : number + 1], lowmem_decode.decode(vae, z[number : number + 1]))


def test_latents_and_weights_stay_as_they_were() -> None:
    vae = cached("sd")
    z = latents(vae, height=5, width=5)
    before = (z.clone(), {name: value.clone() for name, value in vae.state_dict().items()})
    lowmem_decode.decode(vae, z)
    lowmem_decode.decode(vae, z, lean=True)
    assert torch.equal(z, before[0])
    assert all(torch.equal(value, before[1][name]) for name, value in vae.state_dict().items())


def test_large_activations_far_from_zero_keep_their_variance() -> None:
    """Mean 1000, deviation 1: a sum of squares in float32 would have no digits left."""
    vae = family("sd")
    with torch.no_grad():
        vae.decoder.conv_in.bias += 1000.0
        vae.decoder.mid_block.resnets[0].conv2.bias -= 1000.0
    z = latents(vae, height=8, width=8)
    torch.testing.assert_close(lowmem_decode.decode(vae, z, strip_rows=2), plain(vae, z), atol=2e-3, rtol=0)


def test_attention_over_chunks_of_queries_is_attention() -> None:
    from worker.lowmem_decode import attention

    vae = cached("sd")
    block = vae.decoder.mid_block.attentions[0]
    rows = torch.randn(9, 7, 64)
    with torch.inference_mode():
        expected = block(rows.permute(2, 0, 1)[None])[0].permute(1, 2, 0)
        original, attention.query_chunk = attention.query_chunk, lambda tokens, *, device, score_bytes: 5
        try:
            got = lowmem_decode_attention(block, rows)
        finally:
            attention.query_chunk = original
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def lowmem_decode_attention(block: Any, rows: torch.Tensor) -> torch.Tensor:
    from worker.lowmem_decode.attention import run_attention
    from worker.lowmem_decode.group_norm import GroupStatistics
    from worker.lowmem_decode.structure_checks import self_attention

    step = self_attention(block, "attention")
    assert step.norm is not None
    statistics = GroupStatistics(step.norm.num_groups)
    statistics.add(rows)
    return run_attention(step, rows.clone(), affine=statistics.affine(step.norm), score_bytes=1)


# bfloat16 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lean", [False, True])
def test_bfloat16_differs_from_the_plain_decode_by_rounding_only(lean: bool) -> None:
    """On trained weights and a picture's latents; against plain bfloat16, and no further from float32 than it is."""
    autoencoder: Any = AutoencoderKL
    vae = autoencoder.from_pretrained(_OWN_WEIGHTS["latentq:demo"], low_cpu_mem_usage=False).eval()
    axis = torch.linspace(-1, 1, 192)
    disc = torch.where(axis[None] ** 2 + axis[:, None] ** 2 < 0.5, 1.0, -1.0)
    image = torch.stack([axis[None] * axis[:, None], (3 * axis[None] + axis[:, None]).sin(), disc])[None]
    with torch.inference_mode():
        z = vae.encode(image).latent_dist.mode()
    exact = plain(vae, z)
    low_precision = vae.to(torch.bfloat16)
    z = z.to(torch.bfloat16)
    pipeline, ours = plain(low_precision, z), lowmem_decode.decode(low_precision, z, lean=lean)
    assert ours.dtype == torch.bfloat16
    assert psnr_db(ours, pipeline) >= PSNR_DB
    assert psnr_db(ours, exact) >= psnr_db(pipeline, exact) - 0.5
