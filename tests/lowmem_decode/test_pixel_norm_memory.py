"""Memory of decodes of VAEs with norms per pixel, as the peak of the resident set of a process of its own."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import pytest

from tests.support.processes import ROOT

_MEASURED = """
import json, sys, torch
from tests.support.pixel_norm_vaes import latents_of, ltx, wan
from worker import lowmem_decode
from worker.decode_meter import measure
torch.set_num_threads(1)
name, *sizes = sys.argv[1:]
frames, height, width = (int(word) for word in sizes)
if name == "wan":
    vae = wan(base_dim=32, num_res_blocks=0).eval()
else:  # the widths of the real one
    widths = (128, 256, 512, 512)
    vae = ltx(latent_channels=128, decoder_block_out_channels=widths).eval()
del vae.encoder

def decode(z):
    for group in lowmem_decode.stream(vae, z):
        del group

decode(latents_of(vae, 2, 4, 4))
z = latents_of(vae, frames, height, width)
largest = lowmem_decode.largest_bytes(vae, z.shape, torch.float32)
expected = lowmem_decode.working_bytes(vae, z.shape, torch.float32)
print(json.dumps([measure(decode, z).peak_bytes, largest, expected]))
"""


def peak_and_largest(frames: int, height: int, width: int) -> tuple[int, int]:
    peak, largest, _ = measured("wan", frames, height, width)
    return peak, largest


@functools.cache
def measured(name: str, frames: int, height: int, width: int) -> tuple[int, int, int]:
    """The peak, the largest activation, and what arithmetic says the peak is, in bytes."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, name, str(frames), str(height), str(width)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    peak, largest, expected = json.loads(done.stdout.splitlines()[-1])
    if peak == 0:
        pytest.skip("the kernel does not let a process reset its peak")
    return peak, largest, expected


def test_a_picture_takes_less_than_its_largest_activation() -> None:
    peak, largest = peak_and_largest(1, 48, 48)
    assert peak <= 1.0 * largest


def test_a_short_clip_takes_at_most_1_6_of_the_largest_activation() -> None:
    peak, largest = peak_and_largest(3, 20, 20)
    assert peak <= 1.6 * largest


def test_the_peak_does_not_grow_with_the_clip() -> None:
    """From a length on at which frames go through one after the other."""
    longer, _ = peak_and_largest(14, 2, 32)
    shorter, _ = peak_and_largest(8, 2, 32)
    assert longer <= 1.15 * shorter + (4 << 20)


def test_wide_convolutions_are_not_there_twice() -> None:
    """The largest has weights of 216 MiB, several times what a small picture takes besides; arithmetic counts them."""
    peak, _, expected = measured("ltx", 1, 4, 4)
    assert peak <= 1.2 * expected + (16 << 20)
    assert expected <= 128 << 20
