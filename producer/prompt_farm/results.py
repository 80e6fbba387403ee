"""What becomes of a finished job: its file, its line in the manifest, and the record the caller gets.

The order is what makes a run restartable: file, manifest, then the broker may forget the result. A run that is killed
in between does the last steps again.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import io
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from broker_config.errors import BlobStoreUnavailable, BrokerError, JobError, WrongOutput
from broker_config.job_record import JobSnapshot
from producer.client import DecodeClient
from producer.job_handle import finished_result
from producer.prompt_farm.destination import Destination
from producer.prompt_farm.events import Failed
from producer.prompt_farm.manifest import Manifest
from producer.prompt_farm.plan import Recipe, Task


@dataclass(frozen=True, kw_only=True, slots=True)
class FarmResult:
    """One task of a run, once nothing more will happen to it."""

    task: Task
    #: Name of its file in the folder or bucket; None: it failed, or the run writes none.
    file: str | None = None
    #: Bytes of the file, where the run writes none.
    data: bytes | None = None
    #: Seconds: denoise (None: an earlier run did that), wait, fetch, decode, encode, store.
    timings_s: Mapping[str, float | None]
    #: Which worker decoded it.
    worker: str | None = None
    #: Why there is no result; None: there is.
    error: Failed | None = None

    @property
    def job_id(self) -> str:
        """The job that decoded it."""
        return self.task.submit_id

    @property
    def prompt(self) -> str:
        """What it shows."""
        return self.task.row.prompt

    def image(self) -> Image.Image:
        """The picture, of a run that writes no files.

        Raises:
            WrongOutput: there are no bytes here, or they are not a picture.
        """
        if self.data is None:
            raise WrongOutput("this result has no bytes: it failed, or its file has them", job_id=self.job_id)
        try:
            picture = Image.open(io.BytesIO(self.data))
            picture.load()
        except OSError as error:
            raise WrongOutput(f"the result is not a picture: {error}", job_id=self.job_id) from None
        return picture


class ResultKeeper:
    """Takes results out of the queue, to where they belong. Thread-safe."""

    def __init__(
        self,
        client: DecodeClient,
        *,
        recipe: Recipe,
        destination: Destination | None,
        manifest: Manifest | None,
        names: Mapping[str, str],
        free: bool,
        deliver: Callable[[FarmResult], None],
    ) -> None:
        """Args:
        client: where the results are.
        recipe: settings, for the manifest.
        destination: where files go; None: results carry their bytes.
        manifest: noted in when a file is safe.
        names: name of each task's file, without extension.
        free: whether the broker may forget a result once it is safe here.
        deliver: told of each result.
        """
        self._client = client
        self._recipe = recipe
        self._destination = destination
        self._manifest = manifest
        self._names = names
        self._free = free
        self._deliver = deliver
        self._lock = threading.Lock()
        self._denoised: dict[str, float] = {}

    def note_denoised(self, task: str, seconds: float) -> None:
        """Remembers how long a task took to denoise."""
        with self._lock:
            self._denoised[task] = seconds

    def take(self, task: Task, snapshot: JobSnapshot) -> None:
        """Stores what a job became.

        Raises:
            JobFailed, JobCanceled, ResultExpired, BlobError: it became nothing.
            BrokerError: broker or destination are away; call again.
        """
        result = finished_result(snapshot)
        (artifact,) = result.artifacts
        data = self._client.blobs.get(artifact.blob)
        timings: dict[str, float | None] = {"denoise": self._denoised.get(task.job_id)}
        timings["wait"] = (snapshot.started_ms - snapshot.submitted_ms) / 1000
        timings |= dict(result.timings_s)
        # A batch of several jobs is one decode, and each of them says how long it took.
        timings["decode"] = result.timings_s.get("decode", 0.0) / max(1, int(result.decoded_by.get("batch_jobs", 1)))
        file = None
        if self._destination is not None:
            file = f"{self._names[task.job_id]}.{artifact.extension}"
            self._destination.write(file, data)
            self._note(task, file, data, timings)
        if file is not None:
            self.free(task)
        self._deliver(
            FarmResult(
                task=task,
                file=file,
                data=data if file is None else None,
                timings_s=timings,
                worker=snapshot.worker,
            )
        )

    def free(self, task: Task) -> None:
        """Says that a result is safe here. One that the broker keeps for want of this word goes with its retention."""
        if self._free:
            with contextlib.suppress(BrokerError, JobError):
                self._client.job(task.submit_id).ack()

    def _note(self, task: Task, file: str, data: bytes, timings: Mapping[str, float | None]) -> None:
        if self._manifest is None:
            return
        row = {
            "job_id": task.job_id,
            "decoded_by_job": task.submit_id,
            "prompt": task.row.prompt,
            "seed": task.seed,
            "image": task.image,
            "occurrence": task.occurrence,
            "settings": self._settings_of(task),
            "file": file,
            "sha256": hashlib.sha256(data).hexdigest(),
            "bytes": len(data),
            "timings_s": {name: value if value is None else round(value, 4) for name, value in timings.items()},
            "finished_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        }
        try:
            self._manifest.append(row)
        except OSError as error:
            raise BlobStoreUnavailable(f"the manifest cannot be written: {error}") from error

    def _settings_of(self, task: Task) -> dict[str, Any]:
        asked = {name: value for name, value in task.row.asked().items() if name not in ("prompt", "seed")}
        return {name: value for name, value in (self._recipe.settings() | asked).items() if value is not None}
