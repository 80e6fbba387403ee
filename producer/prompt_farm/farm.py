"""`Farm`: a pipeline and a queue as an iterator over pictures; `AsyncFarm`, its asyncio twin.

The next prompt is denoised while the last ones are decoded elsewhere: in a thread of this process. A thread is enough,
since the device does the work; `latentq generate` uses processes for several devices.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections.abc import AsyncIterator, Iterable, Mapping
from collections.abc import Generator as Generated
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from producer.async_client import AsyncDecodeClient
from producer.client import DecodeClient
from producer.pipelines import config_of
from producer.prompt_farm.denoiser import Denoiser
from producer.prompt_farm.destination import Destination, open_destination
from producer.prompt_farm.events import Ended, GivenUp
from producer.prompt_farm.facts import DENOISERS, check_output, check_tasks
from producer.prompt_farm.generator import DeviceLost, Generator
from producer.prompt_farm.manifest import Manifest
from producer.prompt_farm.options import FarmOptions
from producer.prompt_farm.plan import plan
from producer.prompt_farm.results import FarmResult
from producer.prompt_farm.rows import PromptRow, rows_of
from producer.prompt_farm.run import Run, settled
from producer.prompt_farm.tally import Tally

Prompts = Iterable[str | PromptRow | Mapping[str, Any]]


class Farm:
    """Makes a picture of each prompt. Iterate over it once: results come as they finish."""

    def __init__(
        self,
        pipeline: Any,
        client: DecodeClient,
        prompts: Prompts,
        *,
        out: str | Path | None = None,
        name: str | None = None,
        **options: Any,
    ) -> None:
        """Checks everything that can be checked before the first prompt is denoised.

        Args:
            pipeline: a diffusers pipeline, best loaded with `vae=None`.
            client: takes the latents.
            prompts: texts, or mappings with the fields of a row (docs/prompt-farm.md).
            out: folder or `s3://bucket/prefix` for files and manifest; None: results carry their bytes, and only
                what the broker still has is not made again.
            name: says which weights the pipeline has, the same in every run; None: made of its classes and configs and
                of where it was loaded from.
            options: fields of `FarmOptions`.

        Raises:
            InvalidJob: one of its subclasses: a row, an option, or the pipeline.
            ConfigurationError: `out` cannot be written.
        """
        self._client = client
        self._options = FarmOptions(**options)
        self._options.check(client.settings)
        rows = rows_of(prompts)
        denoiser = Denoiser(pipeline, catalog=client.catalog, vae=self._options.vae)
        output = check_output(self._options.output, denoiser.facts)
        recipe = settled(self._options, pipeline=name or _identity(pipeline), vae=denoiser.facts.vae, output=output)
        tasks = plan(rows, recipe)
        check_tasks(tasks, denoiser.facts, catalog=client.catalog, settings=client.settings)
        self._destination: Destination | None = None
        self._manifest: Manifest | None = None
        if out is not None:
            self._destination = open_destination(str(out), client.settings)
            self._destination.check()
            self._manifest = Manifest(self._destination.manifest, copy=self._destination.read_copy())
        self._generator = ThreadGenerator(denoiser, client, options=self._options.of_submits(output))
        self._run = Run(
            tasks,
            client=client,
            recipe=recipe,
            options=self._options,
            generators=[self._generator],
            destination=self._destination,
            manifest=self._manifest,
        )

    def __iter__(self) -> Generated[FarmResult, None, None]:
        """Results as they finish, failed ones with their `error`."""
        try:
            yield from self._run.results()
        finally:
            if self._manifest is not None:
                self._manifest.close()

    @property
    def tally(self) -> Tally:
        """Counts and times so far, overlap included."""
        return self._run.tally

    def stop(self) -> None:
        """Denoises no further prompt. Callable from any thread, and from a signal handler."""
        self._run.stop()


class AsyncFarm:
    """The asyncio twin of `Farm`: same arguments, `async for`."""

    def __init__(self, pipeline: Any, client: AsyncDecodeClient, prompts: Prompts, **options: Any) -> None:
        """As `Farm`."""
        self._farm = Farm(pipeline, client.blocking, prompts, **options)

    async def __aiter__(self) -> AsyncIterator[FarmResult]:
        """Results as they finish; the loop goes on meanwhile."""
        results = self._farm.__iter__()
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, thread_name_prefix="farm-results") as thread:
            try:
                while (result := await loop.run_in_executor(thread, next, results, None)) is not None:
                    yield result
            finally:
                self._farm.stop()
                await asyncio.shield(loop.run_in_executor(thread, results.close))  # behind a `next` that is under way

    @property
    def tally(self) -> Tally:
        """As `Farm.tally`."""
        return self._farm.tally

    def stop(self) -> None:
        """As `Farm.stop`."""
        self._farm.stop()


class ThreadGenerator:
    """A generator in a thread of this process."""

    device = "this process"

    def __init__(self, denoiser: Denoiser, client: DecodeClient, *, options: Mapping[str, Any]) -> None:
        self._denoiser = denoiser
        self._client = client
        self._options = options
        self._thread: threading.Thread | None = None

    def start(self, run: Run) -> None:
        """Begins to work the run's backlog off."""
        self._thread = threading.Thread(target=self._work, args=(run,), name="farm-denoise", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Nothing: the backlog hands nothing out any more."""

    def join(self) -> None:
        """Returns when the last latents are handed over."""
        if self._thread is not None:
            self._thread.join()

    def _work(self, run: Run) -> None:
        generator = Generator(
            self._denoiser,
            self._client,
            device=self.device,
            options=self._options,
            emit=run.emit,
            stopping=run.stopping,
        )
        try:
            generator.run(run.backlog.batches(self.device))
        except DeviceLost as error:
            run.emit(GivenUp(device=self.device, message=str(error)))
        finally:
            run.emit(Ended(device=self.device))


def _identity(pipeline: Any) -> str:
    """What says which weights a pipeline has, as far as an object tells."""
    facts = {part: dict(config_of(pipeline, part)) for part in (*DENOISERS, "scheduler", "text_encoder")}
    facts["config"] = dict(getattr(pipeline, "config", None) or {})
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    return f"{type(pipeline).__name__}:{digest[:16]}"
