"""What the fast way of a VAE is on a device, by families and options: no decode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.kl_vaes import family
from worker.fast_path import FastOptions, FastVaes, native_bfloat16
from worker.fast_path.families import families, memory_format_of, why_not_compiled
from worker.fast_path.native_bfloat16 import fast_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("name", "device", "asked", "clips", "expected"),
    [
        ("AutoencoderKL", CUDA, "auto", False, "channels_last"),
        ("AutoencoderKL", CPU, "auto", False, "channels_last"),
        ("AutoencoderKL", CPU, "contiguous", False, "contiguous"),
        ("AutoencoderKL", CUDA, "contiguous", False, "contiguous"),
        ("AutoencoderKLWan", CUDA, "auto", True, "channels_last_3d"),
        ("AutoencoderKLWan", CPU, "channels_last", True, "channels_last_3d"),
        ("AutoencoderKLHunyuanVideo", CUDA, "auto", True, "contiguous"),
    ],
)
def test_the_memory_format_is_the_familys_unless_the_user_says_otherwise(
    name: str, device: torch.device, asked: str, clips: bool, expected: str
) -> None:
    options = FastOptions(memory_format=asked)
    assert memory_format_of(families()[name], options, device=device, clips=clips) == expected


@pytest.mark.parametrize(
    ("name", "device", "asked", "reason"),
    [
        ("AutoencoderKL", CUDA, "auto", None),
        ("AutoencoderKL", CPU, "auto", "CUDA only"),
        ("AutoencoderKL", CPU, "on", None),
        ("AutoencoderKL", CUDA, "off", "off"),
        ("AutoencoderKLQwenImage", CUDA, "auto", "slower"),
        ("AutoencoderKLQwenImage", CUDA, "on", None),
        ("AutoencoderKLHunyuanImage", CUDA, "auto", "not measured"),
    ],
)
def test_families_are_compiled_by_what_was_measured(
    name: str, device: torch.device, asked: str, reason: str | None
) -> None:
    found = why_not_compiled(families()[name], FastOptions(compile=asked), device)
    assert (found is None) if reason is None else (reason in str(found))


#: Lines as /proc/cpuinfo has them: an AMD EPYC of Zen 3, a Xeon of Sapphire Rapids, a Neoverse V1.
_AVX2 = "model name\t: AMD EPYC\nflags\t\t: fpu sse2 avx avx2 fma\n"
_AMX = "model name\t: Xeon\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_tile amx_bf16\n"
_ARM = "processor\t: 0\nFeatures\t: fp asimd sve i8mm bf16\n"


@pytest.mark.parametrize(
    ("cpuinfo", "expected"), [(_AVX2, None), (_AMX, "amx_bf16"), (_ARM, "bf16"), ("no flags here", None)]
)
def test_a_cpu_says_whether_it_multiplies_bfloat16(tmp_path: Path, cpuinfo: str, expected: str | None) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(cpuinfo)
    assert native_bfloat16(file) == expected


def test_a_system_that_does_not_say_has_none(tmp_path: Path) -> None:
    assert native_bfloat16(tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("loaded", "device", "half_suits", "instructions", "expected"),
    [
        (torch.float32, CPU, True, "amx_bf16", torch.bfloat16),
        (torch.float32, CPU, True, None, torch.float32),
        (torch.float32, CPU, False, "amx_bf16", torch.float32),
        (torch.float32, CUDA, True, "amx_bf16", torch.float32),
        (torch.float16, CUDA, True, None, torch.float16),
    ],
)
def test_bfloat16_is_taken_only_where_a_cpu_has_it_and_the_family_stands_it(
    loaded: torch.dtype, device: torch.device, half_suits: bool, instructions: str | None, expected: torch.dtype
) -> None:
    assert fast_dtype(loaded, device=device, half_suits=half_suits, instructions=instructions) == expected


def test_a_vae_on_such_a_cpu_has_a_view_in_bfloat16_and_stays_in_float32() -> None:
    vae = family("one_level")
    with_it = FastVaes(instructions=lambda: "avx512_bf16").of(vae)
    assert with_it is not None
    assert (with_it.dtype, with_it.view.dtype, vae.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    for ways in (
        FastVaes(instructions=lambda: None),
        FastVaes(FastOptions(native_bfloat16=False), instructions=lambda: "avx512_bf16"),
    ):
        without = ways.of(vae)
        assert without is not None
        assert without.dtype == torch.float32
