"""The figures of a run are those of what it denoised and decoded itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from producer.prompt_farm.events import Denoised
from producer.prompt_farm.tally import Tally


def saved(denoise: float | None = 1.0) -> Any:
    return SimpleNamespace(timings_s={"denoise": denoise, "decode": 0.5, "encode": 0.1}, worker="w")


def run(*, adopted: int) -> Tally:
    tally = Tally(total=2 + adopted, finished=0, adopted=adopted)
    for began in (0.0, 1.0):
        tally.denoise(Denoised(device="cpu", tasks=("a",), began_s=began, seconds=1.0))
    for _ in range(2):
        tally.save(saved())
    for _ in range(adopted):
        tally.save(saved(None))
    return tally


def test_a_run_of_its_own_says_how_much_overlapped() -> None:
    overlap = run(adopted=0).overlap
    assert overlap is not None
    assert (overlap.denoise_s, overlap.decode_s) == (2.0, 1.2)


def test_a_run_that_went_on_with_an_earlier_ones_jobs_says_nothing_of_overlap() -> None:
    """Its wall time has their decodes in it: 256 of them and ten new rows would give a ratio of -23."""
    tally = run(adopted=3)
    assert tally.overlap is None
    assert (tally.denoised, tally.saved, tally.left) == (2, 5, 0)
