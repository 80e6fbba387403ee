"""One real worker for the tests that look at what it makes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.serving import Serving, serving


@pytest.fixture(scope="module")
def served(tiny_catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("outputs-broker")
    with serving(folder, catalog=tiny_catalog, vaes=("sd", "hunyuanvideo")) as started:
        yield started
