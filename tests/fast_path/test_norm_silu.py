"""A norm and SiLU as one: torch's operators everywhere, Triton's kernels in its interpreter where triton is."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm
from torch import nn

from tests.support.processes import ROOT
from worker.fast_path.norm_silu import GroupNormSiLU, RmsNormSiLU, triton_kernels


def drawn(norm: Any) -> Any:
    for parameter in norm.parameters():
        nn.init.normal_(parameter, mean=1.0, std=0.3)
    return norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True])
def test_group_norm_and_silu_are_those_of_torch(last: bool, dtype: torch.dtype) -> None:
    norm = drawn(nn.GroupNorm(4, 16, eps=1e-6)).to(dtype)
    x = (torch.randn(2, 16, 9, 7) * 3 + 5).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    kept = x.clone()
    with torch.inference_mode():
        found = GroupNormSiLU(norm)(x)
        assert torch.equal(found, F.silu(norm(x)))
    assert torch.equal(x, kept)  # in place is only what the norm made
    assert found.stride() == x.stride()


def test_rms_norm_and_silu_are_those_of_diffusers() -> None:
    norm = drawn(WanRMS_norm(12, images=False, bias=True))
    x = torch.randn(1, 12, 2, 5, 3)
    with torch.inference_mode():
        assert torch.equal(RmsNormSiLU(norm)(x), F.silu(norm(x)))


def test_there_are_no_kernels_on_a_cpu() -> None:
    assert triton_kernels(torch.device("cpu")) is None


#: Prints how far the kernels are from float64, for each layout: group norm, RMS norm.
_INTERPRETED = """
import torch
import torch.nn.functional as F
from worker.fast_path import triton_norms as kernels
torch.manual_seed(0)
for shape, groups in (((2, 12, 7, 5), 3), ((1, 32, 33, 65), 8), ((1, 96, 2, 5, 3), 32)):
    for last in (False, True):
        x = torch.randn(shape) * 3 + 20
        if last:
            x = x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
        assert kernels.takes(x) and not kernels.takes(x[..., ::2])
        w, b = torch.randn(shape[1]), torch.randn(shape[1])
        wide = [t.double().view(-1, *(1,) * (x.ndim - 2)) for t in (w, b)]
        found = kernels.group_norm_silu(x, w, b, groups=groups, eps=1e-6)
        assert found.stride() == x.stride()
        apart = (found - F.silu(F.group_norm(x.double(), groups, w.double(), b.double(), 1e-6))).abs().max()
        found = kernels.rms_norm_silu(x, w, b, scale=shape[1] ** 0.5, eps=1e-12)
        assert found.stride() == x.stride()
        wanted = F.silu(F.normalize(x.double(), dim=1) * shape[1] ** 0.5 * wide[0] + wide[1])
        print(float(apart), float((found - wanted).abs().max()))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed; CUDA builds bring it")
def test_the_kernels_give_the_numbers_of_float64_in_tritons_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _INTERPRETED],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 6
    assert all(float(number) < 2e-5 for line in lines for number in line.split())
