"""The fast way and the memory targets on a CUDA device: kernels, memory formats, compiled decodes, peaks.

Times are measured by `python -m benchmarks.fast_path`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm
from torch import nn

from tests.support import tiny_families
from tests.support.clip_vaes import CLIP_FAMILIES, clip_family
from tests.support.kl_vaes import family
from worker import lowmem_decode
from worker.bench_vaes import random_vae
from worker.decode_meter import decoder_of, measure
from worker.decode_planner import DecodeMode
from worker.fast_path import FastOptions, FastVaes, view_of
from worker.fast_path.norm_silu import GroupNormSiLU, RmsNormSiLU, triton_kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),  # triton and the compiler warn of their own plans
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = torch.device("cuda", 0)
#: Dtype → how far a fused norm may be from float64, over numbers of up to 16: half a unit in the last place, and a bit.
APART = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.07}


@pytest.fixture(autouse=True)
def float32_is_float32() -> Iterator[None]:
    """TF32 has 10 bits of mantissa, which hides what is compared here."""
    before = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def decode(vae: Any, z: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        decoded: torch.Tensor = vae.decode(z, return_dict=False)[0]
        return decoded.float()


def decibels(found: torch.Tensor, expected: torch.Tensor) -> float:
    error = (found - expected).square().mean()
    return float(10 * torch.log10((expected.max() - expected.min()).square() / error))


def test_the_kernels_run_here() -> None:
    assert triton_kernels(GPU) is not None


@pytest.mark.parametrize("dtype", list(APART))
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((2, 128, 65, 33), 32), ((1, 256, 512, 512), 32), ((1, 48, 3, 17, 9), 8), ((3, 512, 8, 8), 32)],
)
def test_fused_norms_are_those_of_float64(shape: tuple[int, ...], groups: int, last: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(shape, device=GPU) * 3 + 10).to(dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    group, rms = nn.GroupNorm(groups, shape[1], eps=1e-6), WanRMS_norm(shape[1], images=len(shape) == 4)
    for parameter in (*group.parameters(), *rms.parameters()):
        nn.init.normal_(parameter, mean=1.0, std=0.3)
    group, rms = group.to(GPU, dtype), rms.to(GPU, dtype)
    with torch.inference_mode():
        for fused, norm in ((GroupNormSiLU(group), group), (RmsNormSiLU(rms), rms)):
            found = fused(x)
            assert found.stride() == x.stride()
            wanted = F.silu(norm.double()(x.double()))
            assert float((found.double() - wanted).abs().max()) <= APART[dtype] * max(
                1.0, float(wanted.abs().max()) / 16
            )
            norm.to(dtype)


@pytest.mark.parametrize("name", ["sd", "flux", "flux2", "hunyuan_image"])
def test_channels_last_decodes_as_plain(name: str) -> None:
    vae = family(name).to(GPU)
    z = torch.randn(2, vae.config.latent_channels, 24, 16, device=GPU)
    expected = decode(vae, z)
    for memory_format in ("contiguous", "channels_last"):
        view = view_of(vae, memory_format=memory_format, dtype=torch.float32)
        assert float((decode(view, z) - expected).abs().max()) <= 1e-4
    assert torch.equal(decode(vae, z), expected)


@pytest.mark.parametrize("name", ["wan", "qwen-image", "ltx2"])
def test_channels_last_3d_decodes_as_plain(name: str) -> None:
    table = tiny_families.catalogue()[name]
    vae = tiny_families.make(name, table).to(GPU)
    z = torch.randn(1, table["channels"], 2, 6, 4, device=GPU)
    expected = decode(vae, z)
    view = view_of(vae, memory_format="channels_last_3d", dtype=torch.float32)
    assert float((decode(view, z) - expected).abs().max()) <= 1e-4


def test_a_family_with_group_norms_is_channels_last_here() -> None:
    fast = FastVaes().of(family("flux").to(GPU))
    assert fast is not None
    assert (fast.memory_format, fast.norms_by, fast.why_not_compiled) == ("channels_last", "triton", None)


@pytest.mark.slow
def test_a_compiled_decode_is_near_the_plain_one() -> None:
    vae = random_vae("flux", device=GPU, dtype=torch.bfloat16)
    ways = FastVaes(FastOptions())
    fast = ways.of(vae)
    assert fast is not None
    assert ways.prepare(vae, fast, sides=[(64, 64)]) == 2
    wide = random_vae("flux", device=GPU, dtype=torch.float32)
    for height, width in ((64, 64), (48, 72)):
        assert fast.compiles(height, width)
        z = torch.randn(1, 16, height, width, device=GPU).bfloat16()
        expected = decode(wide, z.float())
        plain = decibels(decode(vae, z), expected)
        for compiled in (False, True):
            assert decibels(decode(fast.module(compiled=compiled), z), expected) >= plain - 1.0


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("name", CLIP_FAMILIES)
def test_a_clip_in_low_memory_is_the_plain_one(name: str, lean: bool) -> None:
    """Lean ones remember frames in host memory."""
    vae = clip_family(name).to(GPU)
    z = torch.randn(1, vae.config.latent_channels, 7, 12, 10, device=GPU)
    expected = decode(vae, z)
    for _ in range(3):  # what is remembered is written over while the device still works
        assert float((lowmem_decode.decode(vae, z, lean=lean).float() - expected).abs().max()) <= 1e-4


def test_a_lean_clip_of_groups_takes_less_than_the_largest_activation() -> None:
    vae = random_vae("cogvideox", device=GPU, dtype=torch.bfloat16)
    z = torch.randn(1, vae.config.latent_channels, 5, 60, 90, device=GPU).bfloat16()
    largest = lowmem_decode.largest_bytes(vae, z.shape, z.dtype)
    lean = decoder_of(vae, DecodeMode.LEAN)
    measure(lean, z[..., :8, :8])  # workspaces and code
    picture = 3 * 17 * 480 * 720 * 2
    assert measure(lean, z).peak_bytes <= 1.1 * largest + 2 * picture


@pytest.mark.parametrize(
    ("name", "side", "dtype", "gigabytes"),
    [("sdxl", 1024, torch.float16, 0.9), ("flux", 2048, torch.bfloat16, 3.5)],
)
def test_the_low_memory_decoder_keeps_its_memory_targets(
    name: str, side: int, dtype: torch.dtype, gigabytes: float
) -> None:
    vae = random_vae(name, device=GPU, dtype=dtype)
    z = torch.randn(1, vae.config.latent_channels, side // 8, side // 8, device=GPU).to(dtype)
    low = decoder_of(vae, DecodeMode.LOW_MEMORY)
    measure(low, z[..., :16, :16])  # workspaces and code
    assert measure(low, z).peak_bytes <= gigabytes * 1e9
