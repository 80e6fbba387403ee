"""One broker and one worker process for all parity tests, and the rule that references use one thread, as it does."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.serving import Serving, serving
from tests.support.tiny_families import catalogue, make

#: Where the VAEs of every case lie: the worker loads these folders, and so does the reference.
VAES = ("sd", "sdxl", "sdxl-statistics", "flux", "hunyuanvideo")


@pytest.fixture(scope="session")
def parity_catalog(tiny_catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny VAEs, and SDXL's once more with per-channel statistics in its config, as Playground 2.5 has them."""
    folder = tmp_path_factory.mktemp("parity-vaes")
    for name in set(VAES) - {"sdxl-statistics"}:
        (folder / name).symlink_to(tiny_catalog.parent / name)
    own = folder / "sdxl-statistics"
    shutil.copytree(tiny_catalog.parent / "sdxl", own)
    config = json.loads((own / "config.json").read_text())
    config |= {  # the scaling factor stays SDXL's: Playground's own, 0.5, would hide in which order it is applied
        "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
        "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
    }
    (own / "config.json").write_text(json.dumps(config))
    catalog = folder / "catalog.toml"
    catalog.write_text(
        f"{tiny_catalog.read_text()}\n[sdxl-statistics]\n"
        f'title = "tiny random sdxl with statistics"\nweights = "{own}"\nvae_class = "AutoencoderKL"\n'
        'channels = 4\nspatial = 8\nlayouts = ["unpacked"]\n'
    )
    return catalog


@pytest.fixture(scope="package")
def parity(parity_catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A client whose jobs a separate worker process decodes, in float32 on the CPU, with OMP_NUM_THREADS=1."""
    with serving(tmp_path_factory.mktemp("parity-broker"), catalog=parity_catalog, vaes=VAES) as started:
        yield started


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """The number of threads changes how sums are split, and so last bits: references use as many as the worker."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def pipelines_importable() -> None:
    """diffusers has its pipelines only where transformers is; without it the test is skipped, and fails in CI."""
    if importlib.util.find_spec("transformers") is None:
        reason = "transformers is not installed: diffusers' pipelines need it (`pip install latentq[farm]`)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="module")
def vaes() -> Callable[[str], Any]:
    """The tiny VAE of a catalogue entry, made once."""
    return functools.cache(lambda name: make(name, catalogue()[name]))
