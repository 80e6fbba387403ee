"""Whole pipelines of the families' other classes, through the queue: from a picture, with a control net, and so on.

A class of its own may end its call in its own way: `test_families.py` has one of each family, these are the others
that run without libraries of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from producer.pipeline_table import PIPELINES
from tests.parity.families import CASES, OTHERS, reference_in
from tests.parity.through_the_queue import assert_a_worker_makes_the_same
from tests.support.serving import Serving, serving
from tests.support.tiny_families import write_family_catalog

pytestmark = pytest.mark.usefixtures("pipelines_importable")

VAES = tuple(sorted({case.vae for case in OTHERS.values()}))


@pytest.fixture(scope="module")
def vae_catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family_catalog(tmp_path_factory.mktemp("others"), VAES)


@pytest.fixture(scope="module")
def served(vae_catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A client whose jobs a worker process decodes, in float32 on the CPU."""
    with serving(tmp_path_factory.mktemp("others-broker"), catalog=vae_catalog, vaes=VAES) as started:
        yield started


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # schedulers, with numpy 2
@pytest.mark.filterwarnings("ignore::FutureWarning")  # the oldest pipelines, of themselves and what they call
@pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning", "ignore:Default grid_sample:UserWarning")  # the same
@pytest.mark.parametrize("name", OTHERS)
def test_a_worker_sends_back_what_the_pipeline_would_have_returned(
    name: str, vae_catalog: Path, served: Serving
) -> None:
    case = OTHERS[name]
    assert_a_worker_makes_the_same(served, case, reference_in(vae_catalog.parent, case))


def test_none_of_them_is_in_a_family_by_accident() -> None:
    """Each case is named for its class, and no class is here that a family has already."""
    classes = {name: case.pipeline.rpartition(".")[2] for name, case in OTHERS.items()}
    assert all(name.partition(",")[0] == kind.replace("Pipeline", "") for name, kind in classes.items())
    assert set(classes.values()) <= set(PIPELINES)
    assert not set(classes.values()) & {case.pipeline.rpartition(".")[2] for case in CASES.values()}
