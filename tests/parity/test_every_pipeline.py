"""Every pipeline class of the pinned diffusers that offers latents is taken and called whole, or excepted by name.

The whole pipelines are in `test_families.py`, `test_remote_vae_families.py` and `test_other_classes.py`. Here latents
of odd sizes, which not every denoiser makes, are held against the last lines of a family's own `__call__`, cut out of
diffusers' source (`pipeline_tails.py`). Our side starts where a caller starts, with the pipeline object and its
latents, and ends with the tensor and the pixels a worker makes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from broker_config.vae_catalog import VaeCatalog
from producer.pipeline_table import EXCEPTED, PIPELINES
from tests.parity.families import CASES, OTHERS
from tests.parity.our_way import our_way
from tests.parity.tail_cases import entry_name, tail_of
from tests.parity.whole_pipelines import REMOTE_VAE_PIPELINES

tails = pytest.importorskip("tests.parity.pipeline_tails", reason="diffusers' pipelines need transformers")

#: Classes with a whole pipeline.
WHOLE = {case.pipeline.rpartition(".")[2] for case in (*CASES.values(), *OTHERS.values())} | set(REMOTE_VAE_PIPELINES)


def test_every_class_that_offers_latents_is_taken_or_excepted_by_name_with_a_reason() -> None:
    offered = set(tails.classes_with_latents())
    assert len(offered) > 200
    assert offered == set(PIPELINES) | set(EXCEPTED)
    assert not set(PIPELINES) & set(EXCEPTED)
    assert all(len(reason) > 20 for reason in EXCEPTED.values())


def test_what_the_catalogue_was_read_from_is_in_the_pinned_diffusers() -> None:
    folder, cited = tails.PIPELINES_FOLDER.parent, 0
    for name, entry in VaeCatalog.load().items():
        for path, rest in re.findall(r"((?:pipelines|models|modular_pipelines)/[\w/]+\.py)([^;]*)", entry.source):
            text = (folder / path).read_text(encoding="utf-8")
            unknown = [word for word in re.findall(r"\w*_\w+|decode", rest) if word not in text]
            assert not unknown, f"{name}: {path} has no {unknown}"
            cited += 1
    assert cited > 80


def test_every_class_is_called_whole() -> None:
    assert set(PIPELINES) == WHOLE


@pytest.mark.parametrize(
    "name",
    [
        "StableDiffusionPipeline",
        "StableDiffusion3Pipeline",
        "SanaPipeline",
        "Flux2KleinPipeline",
        "WanPipeline",
        "HunyuanVideoPipeline",
        "CogVideoXPipeline",
        "MochiPipeline",
        "LTXConditionPipeline",
        "EasyAnimatePipeline",
        "StableVideoDiffusionPipeline",
        "Kandinsky5T2IPipeline",
    ],
)
def test_latents_of_odd_sizes(name: str, vaes: Callable[[str], Any]) -> None:
    vae = vaes(entry_name(name))
    tail = tail_of(name, vae, rows=5, columns=7)
    latents = torch.randn(tail.shape, generator=torch.Generator().manual_seed(5))
    expected, pixels = tails.run_tail(tails.load(name), vae, latents, **tail.known)
    made, made_pixels = our_way(name, vae, latents, tail)
    assert torch.equal(made, expected)
    assert np.array_equal(made_pixels, pixels)
