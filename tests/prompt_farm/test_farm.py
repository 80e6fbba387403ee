"""`Farm`: the pipeline's own pictures, in the order in which they finish, whatever happens to one of them."""

from __future__ import annotations

import asyncio
import inspect
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from broker_config.connection import connect_url
from broker_config.errors import ConfigurationError, InvalidOption, InvalidRow, UnknownPipeline, UnknownVae
from broker_config.job_status import JobStatus
from broker_config.settings import Settings
from producer import AsyncDecodeClient, DecodeClient
from producer.prompt_farm import AsyncFarm, Farm, FarmResult, collector
from producer.prompt_farm.denoiser import Denoiser
from tests.support.demo_pictures import in_process
from tests.support.sick_denoiser import LOST
from tests.support.thread_worker import ThreadWorker
from tests.support.tiny_pipelines import tiny_pipeline
from tests.support.wait import wait_until

PROMPTS = ["a fox", "an old map", "a door"]
CALL: dict[str, Any] = {"vae": "demo", "defaults": {"steps": 2}}


@contextmanager
def denoising(pipeline: Any) -> Iterator[list[list[str]]]:
    """Notes the prompts of every call of the pipeline's denoiser."""
    calls: list[list[str]] = []
    kind = type(pipeline)
    call = kind.__call__

    def noted(self: Any, *arguments: Any, **options: Any) -> Any:
        prompt = options["prompt"]
        calls.append(prompt if isinstance(prompt, list) else [prompt])
        return call(self, *arguments, **options)

    noted.__signature__ = inspect.signature(call)  # type: ignore[attr-defined]
    kind.__call__ = noted
    try:
        yield calls
    finally:
        kind.__call__ = call


def manifest(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def with_spool(client: DecodeClient, settings: Settings, folder: Path) -> DecodeClient:
    """Another client of the same broker."""
    return DecodeClient(client.store.connections, settings=settings, catalog=client.catalog, spool=folder / "spool")


def test_each_picture_is_the_one_that_the_pipeline_would_have_made(
    client: DecodeClient, pipeline: Any, worker: ThreadWorker, tmp_path: Path
) -> None:
    farm = Farm(pipeline, client, PROMPTS, out=tmp_path, mode="exact", **CALL)
    results = list(farm)
    assert sorted(result.prompt for result in results) == sorted(PROMPTS)
    for result in results:
        assert result.error is None
        assert result.file is not None
        expected = in_process(pipeline, result.prompt, seed=result.task.seed, num_inference_steps=2)
        assert np.array_equal(np.asarray(Image.open(tmp_path / result.file)), expected)
    rows = {row["prompt"]: row for row in manifest(tmp_path)}
    assert len(rows) == len(PROMPTS) == len(list(tmp_path.glob("*.png")))
    for result in results:
        row = rows[result.prompt]
        assert (row["file"], row["seed"], row["job_id"]) == (result.file, result.task.seed, result.task.job_id)
        assert row["settings"]["steps"] == 2
        assert row["settings"]["vae"] == "demo"
        assert row["bytes"] == (tmp_path / row["file"]).stat().st_size
        assert row["timings_s"]["denoise"] > 0
        assert row["timings_s"]["decode"] > 0
    picture = Image.open(tmp_path / rows["a fox"]["file"])
    assert picture.text["prompt"] == "a fox"  # type: ignore[attr-defined]
    overlap = farm.tally.overlap
    assert overlap is not None
    assert overlap.denoise_s == pytest.approx(sum(row["timings_s"]["denoise"] for row in rows.values()), abs=0.01)


def test_results_carry_their_bytes_where_no_files_are_written(
    client: DecodeClient, pipeline: Any, worker: ThreadWorker
) -> None:
    (result,) = Farm(pipeline, client, [{"prompt": "a fox", "seed": 3}], **CALL)
    expected = in_process(pipeline, "a fox", seed=3, num_inference_steps=2)
    assert np.array_equal(np.asarray(result.image()), expected)
    # It was freed once it was here: the broker is not the place where thousands of pictures stay.
    assert client.job(result.job_id).status() is JobStatus.EXPIRED


def test_a_second_run_denoises_only_what_was_added(
    client: DecodeClient, pipeline: Any, worker: ThreadWorker, tmp_path: Path
) -> None:
    list(Farm(pipeline, client, PROMPTS, out=tmp_path, **CALL))
    with denoising(pipeline) as calls:
        results = list(Farm(pipeline, client, ["a lion", "a door", "a fox", "a fox"], out=tmp_path, **CALL))
    assert calls == [["a lion"], ["a fox"]]
    assert [(result.prompt, result.task.occurrence) for result in results] == [("a lion", 0), ("a fox", 1)]
    assert len(manifest(tmp_path)) == len(list(tmp_path.glob("*.png"))) == 5


def test_a_job_that_is_there_is_adopted_before_anything_is_denoised(
    client: DecodeClient, pipeline: Any, worker: ThreadWorker, tmp_path: Path
) -> None:
    worker.gate.close()
    stopped = Farm(pipeline, client, PROMPTS, out=tmp_path, **CALL)

    def stop() -> None:
        wait_until(lambda: stopped.tally.denoised == 3)
        stopped.stop()

    stopping = threading.Thread(target=stop)
    stopping.start()
    assert list(stopped) == []
    stopping.join()
    worker.gate.open()
    with denoising(pipeline) as calls:
        farm = Farm(pipeline, client, PROMPTS, out=tmp_path, **CALL)
        assert sorted(result.prompt for result in farm) == sorted(PROMPTS)
    assert calls == []
    assert farm.tally.adopted == 3
    assert farm.tally.overlap is None


def test_latents_of_a_job_that_failed_are_decoded_again_by_the_next_run(
    client: DecodeClient, pipeline: Any, worker: ThreadWorker, tmp_path: Path
) -> None:
    def broken(latents: torch.Tensor) -> None:
        raise RuntimeError("a fault of the device")

    usual, worker.gate.on_call = worker.gate.on_call, broken
    (result,) = Farm(pipeline, client, ["a fox"], out=tmp_path, **CALL)
    assert result.error is not None
    assert (result.error.stage, result.error.code) == ("decode", "job_failed")
    assert "a fault of the device" in result.error.message
    assert not list(tmp_path.glob("*.png"))
    worker.gate.on_call = usual
    with denoising(pipeline) as calls:
        (again,) = Farm(pipeline, client, ["a fox"], out=tmp_path, **CALL)
    assert calls == []
    assert again.error is None
    assert again.job_id == f"{result.job_id}-r1"
    (row,) = manifest(tmp_path)
    assert (row["job_id"], row["decoded_by_job"]) == (result.job_id, again.job_id)


def test_a_lost_file_whose_latents_are_gone_is_denoised_again(
    client: DecodeClient, pipeline: Any, worker: ThreadWorker, tmp_path: Path
) -> None:
    (first,) = Farm(pipeline, client, ["a fox"], out=tmp_path, **CALL)
    assert first.file is not None
    before = (tmp_path / first.file).read_bytes()
    (tmp_path / first.file).unlink()
    with denoising(pipeline) as calls:
        (again,) = Farm(pipeline, client, ["a fox"], out=tmp_path, **CALL)
    assert calls == [["a fox"]]
    assert again.file == first.file
    picture = np.asarray(Image.open(tmp_path / first.file))
    (tmp_path / "before.png").write_bytes(before)
    assert np.array_equal(picture, np.asarray(Image.open(tmp_path / "before.png")))


def test_an_error_of_one_row_does_not_end_the_farm(
    client: DecodeClient, pipeline: Any, worker: ThreadWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = type(pipeline).encode_prompt

    def picky(self: Any, prompt: Any, *arguments: Any, **options: Any) -> Any:
        if "an old map" in (prompt if isinstance(prompt, list) else [prompt]):
            raise ValueError("no maps")
        return encode(self, prompt, *arguments, **options)

    monkeypatch.setattr(type(pipeline), "encode_prompt", picky)
    results = {item.prompt: item for item in Farm(pipeline, client, PROMPTS, out=tmp_path, batch_size=3, **CALL)}
    error = results["an old map"].error
    assert error is not None
    assert (error.stage, error.code) == ("denoise", "denoise_failed")
    assert "ValueError: no maps" in error.message
    assert results["a fox"].error is None
    assert results["a door"].error is None


def test_a_lost_device_ends_the_farm_with_the_reason(
    client: DecodeClient, pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(self: Denoiser) -> None:
        raise RuntimeError(LOST)

    monkeypatch.setattr(Denoiser, "wait", lose)
    with denoising(pipeline) as calls:
        results = list(Farm(pipeline, client, PROMPTS, **CALL))
    assert calls == [["a fox"]]
    messages = {result.prompt: result.error.message for result in results if result.error is not None}
    why = f"this process was given up: the device is lost since RuntimeError: {LOST}"
    assert messages == dict.fromkeys(PROMPTS, f"every generator has ended before this prompt was denoised; {why}")


def test_latents_that_are_not_numbers_are_that_rows_error(
    client: DecodeClient, worker: ThreadWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = tiny_pipeline()
    with torch.no_grad():
        pipeline.unet.conv_out.bias.fill_(float("nan"))
    (result,) = Farm(pipeline, client, ["a fox"], **CALL)
    assert result.error is not None
    assert (result.error.stage, result.error.code) == ("submit", "latents_not_finite")


def test_denoising_waits_while_decoding_is_behind(client: DecodeClient, pipeline: Any, worker: ThreadWorker) -> None:
    worker.gate.close()
    farm = Farm(pipeline, client, [f"number {n}" for n in range(12)], max_ahead=3, **CALL)
    got: list[FarmResult] = []
    reading = threading.Thread(target=lambda: got.extend(farm))
    with denoising(pipeline) as calls:
        reading.start()
        worker.gate.reached.wait(30)
        # Three are under way, one is denoised and not yet counted at most.
        wait_until(lambda: len(calls) >= 3)
        assert len(calls) <= 4
        worker.gate.open()
        reading.join(60)
    assert len(got) == 12
    assert all(result.error is None for result in got)


def test_a_full_queue_delays_and_loses_nothing(
    settings: Settings, pipeline: Any, worker: ThreadWorker, client: DecodeClient
) -> None:
    narrow = DecodeClient(
        client.store.connections, settings=settings.model_copy(update={"max_pending_jobs": 1}), catalog=client.catalog
    )
    results = list(Farm(pipeline, narrow, [f"number {n}" for n in range(6)], block_s=0.01, **CALL))
    assert sorted(result.prompt for result in results) == [f"number {n}" for n in range(6)]
    assert all(result.error is None for result in results)


def test_what_the_queue_does_not_take_goes_to_the_spool_and_comes_home_all_the_same(
    settings: Settings,
    pipeline: Any,
    worker: ThreadWorker,
    client: DecodeClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker.gate.close()
    narrow = with_spool(client, settings.model_copy(update={"max_pending_jobs": 1}), tmp_path)
    assert narrow.spool is not None
    # What is in the spool does not count as ahead: denoising goes on.
    stopped = Farm(pipeline, narrow, PROMPTS, block_s=0.01, max_ahead=2, **CALL)
    got: list[FarmResult] = []
    reading = threading.Thread(target=lambda: got.extend(stopped))
    reading.start()
    wait_until(lambda: len(narrow.spool.spool.entries()) == 2)  # type: ignore[union-attr]
    stopped.stop()
    reading.join(60)
    assert got == []
    narrow.spool.close()
    # Another process, later: nothing is denoised again, and what waits is handed over.
    again = with_spool(client, settings, tmp_path)
    assert again.spool is not None
    with monkeypatch.context() as patch:
        added: list[bool] = []
        add = collector.Collector.add

        def watched(self: collector.Collector, task: Any, *, spooled: bool = False) -> None:
            added.append(spooled)
            add(self, task, spooled=spooled)

        patch.setattr(collector.Collector, "add", watched)
        again.spool.close()  # or its thread might have handed them over by now
        worker.gate.open()
        with denoising(pipeline) as calls:
            results = list(Farm(pipeline, again, PROMPTS, **CALL))
    assert sorted(added) == [False, True, True], "what waits in the spool fills no queue, in a later run either"
    assert calls == []
    assert sorted(result.prompt for result in results) == sorted(PROMPTS)
    assert again.spool.spool.is_empty()


def test_a_job_that_is_nowhere_any_more_fails_instead_of_being_waited_for(
    settings: Settings,
    pipeline: Any,
    client: DecodeClient,
    worker: ThreadWorker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its file in the spool was set aside, or the broker came back empty: nobody would ever tell of it."""
    monkeypatch.setattr(collector, "_LOOK_S", 0.05)
    worker.gate.close()
    narrow = with_spool(client, settings.model_copy(update={"max_pending_jobs": 1}), tmp_path)
    assert narrow.spool is not None
    spool = narrow.spool.spool
    farm = Farm(pipeline, narrow, PROMPTS, block_s=0.01, **CALL)
    results: list[FarmResult] = []
    reading = threading.Thread(target=lambda: results.extend(farm))
    reading.start()
    wait_until(lambda: len(spool.entries()) == 2)
    for entry in spool.entries():
        spool.set_aside(entry, "as a flush does it with what the broker refuses for good")
    worker.gate.open()
    reading.join(60)
    assert not reading.is_alive()
    narrow.spool.close()
    assert sorted(result.error.code if result.error else "" for result in results) == ["", *["job_not_found"] * 2]
    assert "spool list" in "".join(result.error.message for result in results if result.error)


def test_a_spool_that_cannot_be_read_delays_and_does_not_end_the_farm(
    settings: Settings, pipeline: Any, client: DecodeClient, worker: ThreadWorker, tmp_path: Path
) -> None:
    own = with_spool(client, settings, tmp_path)
    assert own.spool is not None
    is_empty, tries = own.spool.spool.is_empty, iter((OSError(5, "Input/output error"),))

    def broken() -> bool:
        for error in tries:
            raise error
        return is_empty()

    own.spool.spool.is_empty = broken  # type: ignore[method-assign]
    assert sorted(result.prompt for result in Farm(pipeline, own, PROMPTS, **CALL)) == sorted(PROMPTS)
    own.spool.close()


def test_a_result_that_nobody_took_is_there_for_the_next_run(
    client: DecodeClient, pipeline: Any, worker: ThreadWorker
) -> None:
    for result in Farm(pipeline, client, PROMPTS, **CALL):
        first = result
        break
    assert client.job(first.job_id).status() is JobStatus.SUCCEEDED
    with denoising(pipeline) as calls:
        results = list(Farm(pipeline, client, PROMPTS, **CALL))
    assert sorted(result.prompt for result in results) == sorted(PROMPTS)
    assert sum(map(len, calls)) < len(PROMPTS)
    assert [result.prompt for result in results].count(first.prompt) == 1
    assert first.prompt not in [prompt for call in calls for prompt in call]


def test_pictures_of_one_prompt_in_one_batch_are_those_of_their_seeds(
    client: DecodeClient, pipeline: Any, worker: ThreadWorker
) -> None:
    farm = Farm(
        pipeline, client, [{"prompt": "a fox", "seed": 40}], images_per_prompt=2, batch_size=2, mode="exact", **CALL
    )
    with denoising(pipeline) as calls:
        results = sorted(farm, key=lambda result: result.task.image)
    assert calls == [["a fox", "a fox"]]
    for result, seed in zip(results, (40, 41), strict=True):
        expected = in_process(pipeline, "a fox", seed=seed, num_inference_steps=2).astype(int)
        # A batch changes last bits of what is denoised, in diffusers as here.
        assert np.abs(np.asarray(result.image()).astype(int) - expected).max() <= 1


async def _gather(farm: AsyncFarm) -> list[FarmResult]:
    return [result async for result in farm]


def test_the_asynchronous_twin_gives_the_same_while_the_loop_goes_on(
    settings: Settings, pipeline: Any, worker: ThreadWorker
) -> None:
    async def main() -> tuple[list[FarmResult], int]:
        assert settings.redis_url is not None
        connections = connect_url(settings.redis_url.get_secret_value(), name="async-farm")
        async with AsyncDecodeClient(connections, settings=settings) as client:
            turns = 0
            gathering = asyncio.create_task(_gather(AsyncFarm(pipeline, client, PROMPTS, **CALL)))
            while not gathering.done():
                turns += 1
                await asyncio.sleep(0.005)
            return await gathering, turns

    results, turns = asyncio.run(main())
    assert sorted(result.prompt for result in results) == sorted(PROMPTS)
    assert turns > 3


# Refused before the first prompt -------------------------------------------------------------------------


class NoLatents:
    """A pipeline whose call has no output_type."""

    def __call__(self, prompt: str) -> None:
        raise AssertionError("nothing may be denoised")


class HomemadePipeline:
    """Not in the table."""

    def __call__(self, prompt: str, output_type: str = "pil") -> None:
        raise AssertionError("nothing may be denoised")


@pytest.mark.parametrize(
    ("make", "options", "kind", "words"),
    [
        (NoLatents, {"vae": "demo"}, InvalidOption, "cannot hand out latents"),
        (HomemadePipeline, {}, UnknownPipeline, "no pipeline class 'HomemadePipeline'"),
        (tiny_pipeline, {}, InvalidOption, "have 16 channels, and VAE sd decodes 4"),
        (tiny_pipeline, {"vae": "demos"}, UnknownVae, "near it are demo"),
        (tiny_pipeline, {"vae": "demo", "output": "mp4"}, InvalidOption, "makes pictures: choose png"),
        (tiny_pipeline, {"vae": "demo", "output": "gif"}, InvalidOption, "format is 'gif'"),
        (tiny_pipeline, {"vae": "demo", "mode": "quick"}, InvalidOption, "mode is 'quick'"),
        (tiny_pipeline, {"vae": "demo", "batch_size": 0}, InvalidOption, "batch_size is 0"),
        (tiny_pipeline, {"vae": "demo", "out": "s3://b/../c"}, ConfigurationError, "cannot be used"),
    ],
)
def test_what_cannot_work_is_refused_before_a_prompt_is_denoised(
    client: DecodeClient, make: Any, options: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words.replace("(", r"\(")):
        Farm(make(), client, ["a fox"], **options)


@pytest.mark.parametrize(
    ("fields", "line", "field", "words"),
    [
        ({"height": 60}, 2, "height", "expected a multiple of 8: 56 or 64"),
        ({"num_frames": 9}, 2, "num_frames", "StableDiffusionPipeline takes no num_frames"),
        ({"height": 65_536, "width": 65_536}, 2, "height", "exceed the limit"),
        ({"prompt": "a" * 20_000}, 2, "prompt", "LATENTQ_MAX_METADATA_BYTES"),
    ],
)
def test_a_row_that_the_pipeline_cannot_do_is_refused_with_its_line(
    client: DecodeClient, pipeline: Any, fields: dict[str, Any], line: int, field: str, words: str
) -> None:
    with pytest.raises(InvalidRow) as refused:
        Farm(pipeline, client, ["a fox", {"prompt": "a door", **fields}], vae="demo")
    assert (refused.value.line, refused.value.field) == (line, field)
    assert words in refused.value.message


def test_a_folder_that_cannot_be_written_is_refused(client: DecodeClient, pipeline: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        Farm(pipeline, client, ["a fox"], vae="demo", out=tmp_path / "file")
