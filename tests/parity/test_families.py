"""A whole pipeline of every family, through the queue: a worker sends back what it would have returned.

Given a diffusers pipeline of tiny random parts; when it is called once for latents and once more, with the same seed,
for pictures; and the latents are submitted with `pipeline=`; then tensor and pixels that come back are the second
call's. Nothing of the reference is ours.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from broker_config.vae_catalog import VaeCatalog
from producer.pipeline_table import PIPELINES
from producer.pipelines import served_by
from tests.parity.families import CASES, Reference, reference_in
from tests.parity.through_the_queue import assert_a_worker_makes_the_same
from tests.parity.whole_pipelines import REMOTE_VAE_PIPELINES
from tests.support.serving import Serving, serving
from tests.support.tiny_families import write_family_catalog

pytestmark = pytest.mark.usefixtures("pipelines_importable")

VAES = tuple(sorted({case.vae for case in CASES.values()}))


@pytest.fixture(scope="module")
def family_catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family_catalog(tmp_path_factory.mktemp("families"), VAES)


@pytest.fixture(scope="module")
def families(family_catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A client whose jobs a worker process decodes, in float32 on the CPU."""
    with serving(tmp_path_factory.mktemp("families-broker"), catalog=family_catalog, vaes=VAES) as started:
        yield started


@pytest.fixture(scope="module")
def references(family_catalog: Path, pipelines_importable: None) -> Iterator[Callable[[str], Reference]]:
    """The reference of a case, made once."""

    made = functools.cache(lambda name: reference_in(family_catalog.parent, CASES[name]))
    yield made
    made.cache_clear()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # schedulers, with numpy 2
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")  # the oldest pipelines, of themselves
@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")  # Mochi's transformer, in float32
@pytest.mark.parametrize("name", CASES)
def test_a_worker_sends_back_what_the_pipeline_would_have_returned(
    name: str, references: Callable[[str], Reference], families: Serving
) -> None:
    assert_a_worker_makes_the_same(families, CASES[name], references(name))


def test_every_family_has_a_whole_pipeline() -> None:
    ours = {name for name in VaeCatalog.load() if served_by(name)}
    held = {case.vae for case in CASES.values()} | set(REMOTE_VAE_PIPELINES.values())
    assert len(ours) > 70
    assert ours <= held


def test_more_than_forty_pairs_of_class_and_layout_with_its_state_are_held_by_whole_pipelines() -> None:
    catalog, pairs = VaeCatalog.load(), set()
    for case in CASES.values():
        entry, pipeline = catalog[case.vae], PIPELINES[case.pipeline.rpartition(".")[2]]
        layout = entry.layout(case.given.get("layout", pipeline.layout))
        pairs.add((entry.vae_class, layout, entry.state_of(layout, pipeline.state)))
    assert len(pairs) > 40, sorted(pairs)


def test_rgba_is_in_the_png_and_in_the_webp(references: Callable[[str], Reference], families: Serving) -> None:
    name = "qwen-image-21, RGBA"
    expected = references(name)
    assert expected.pixels.shape[-1] == 4
    given = {"pipeline": expected.pipeline, **CASES[name].given}
    pictures = families.decode(expected.latents, output="png", **given).images()
    assert {picture.mode for picture in pictures} == {"RGBA"}
    assert np.array_equal(np.stack([np.asarray(picture) for picture in pictures]), expected.pixels)
    assert {item.mode for item in families.decode(expected.latents, output="webp", **given).images()} == {"RGBA"}


def test_latents_that_are_not_contiguous_are_among_these(references: Callable[[str], Reference]) -> None:
    names = ("kandinsky6", "helios", "ltx", "flux2", "bria-fibo", "text-to-video")
    assert not any(references(name).latents.is_contiguous() for name in names)


def test_references_know_nothing_of_ours() -> None:
    parity = Path(__file__).parent
    names = ("whole_pipelines", "pipeline_tails", "variants", "families", "families_of_*", "others_of_*", "tiny_clip")
    files = [path for name in names for path in sorted(parity.glob(f"{name}.py"))]
    assert len(files) > 10
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            found = [item.name for item in node.names] if isinstance(node, ast.Import) else []
            found += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            ours = [name for name in found if name.partition(".")[0] in ("worker", "producer", "broker_config")]
            assert not ours, f"{path.name} imports {ours}"


def test_the_catalogue_of_this_test_is_ours_with_other_weights(family_catalog: Path) -> None:
    ours, tiny = VaeCatalog.load(), VaeCatalog.load(family_catalog)
    for name in VAES:
        changed = {"weights", "subfolder", "revision", "source"}
        assert tiny[name].model_dump(exclude=changed) == ours[name].model_dump(exclude=changed)
