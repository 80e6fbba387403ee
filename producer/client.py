"""`DecodeClient`: puts latents into the queue and takes results out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from broker_config import keys
from broker_config.connection import MAX_BLOCK_S, Connections, broker_errors, connect, connect_url
from broker_config.errors import InvalidOption, QueueFull
from broker_config.job_store import JobStore
from broker_config.latent_geometry import FACTS, Geometry, LatentLayout
from broker_config.messages import DecodeRequest, Kind
from broker_config.settings import Settings, load_settings
from broker_config.tiered_blob_store import TieredBlobStore
from broker_config.vae_catalog import VaeCatalog
from producer.job_handle import JobHandle
from producer.pipelines import options_of
from producer.pixel_input import ENCODE_OPTIONS, Pictures, build_encode_request, encode_options
from producer.submission import DecodeOptions, build_request, checked_options, checked_state, new_job_id
from producer.submit_attempt import LONGEST_PAUSE_S, RedecodeAttempt, SubmitAttempt, latents_gone
from producer.tensor_input import Latents, TensorFile, read_tensor_file, to_tensor_file

#: Streams one blocking read watches; Redis looks at each of them when any wakes us.
_WATCH_CHUNK: Final = 512


class DecodeClient:
    """A producer's connection to the queue. Thread-safe; one for each process is enough.

    Starts without torch: torch tensors are taken when the caller has torch.
    """

    def __init__(self, connections: Connections, *, settings: Settings, catalog: VaeCatalog | None = None) -> None:
        self._connections = connections
        self._settings = settings
        #: The VAEs that jobs may name.
        self.catalog = catalog or VaeCatalog.load(settings.catalog)
        self.store = JobStore(connections, settings)
        self.blobs = TieredBlobStore(connections, settings)

    @classmethod
    def from_env(cls, **overrides: Any) -> Self:
        """A client configured by the environment (`LATENTQ_…`), with `overrides` on top.

        Raises:
            BrokerNotRunning: no URL is set and no embedded broker runs.
            ConfigurationError: a setting is not usable.
        """
        settings = load_settings(**overrides)
        return cls(connect(settings, name="latentq-client"), settings=settings)

    @classmethod
    def from_url(cls, url: str, **overrides: Any) -> Self:
        """A client of the broker at `url`."""
        settings = load_settings(redis_url=url, **overrides)
        return cls(connect_url(url, name="latentq-client"), settings=settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self.blobs.close()
        self._connections.close()

    def ping(self) -> None:
        """Asks the broker whether it answers.

        Raises:
            BrokerUnreachable: it does not.
        """
        with broker_errors(self._connections.url):
            self._connections.commands.ping()

    def submit(self, latents: Latents, *, pipeline: Any = None, block_s: float = 0.0, **options: Any) -> JobHandle:
        """Hands latents over; when this returns, they cannot be lost.

        Args:
            latents: torch tensor (float16, bfloat16, float32; any device, any strides) or numpy array (float16,
                float32), laid out as the pipeline returned them.
            pipeline: the diffusers pipeline that made them, with or without its VAE, or the name of its class: tells
                vae, layout, state and the facts that go with them (`producer/pipelines.py`). Options named beside it
                win.
            block_s: while the queue is full, how long to try again.
            options: fields of `DecodeOptions`: vae, layout, height, width, num_frames, fps, output, mode, priority,
                timeout_s, start_within_s, retention_s, scaling_factor, shift_factor, metadata, provenance, job_id.

        Raises:
            InvalidJob: one of its subclasses; nothing was stored. Its `job_id` is the id it would have had.
            JobConflict: the id was used for something else.
            QueueFull: a limit is reached; nothing was stored.
            BrokerUnreachable: not known whether it was accepted: submit again with `job_id=error.job_id`, which
                cannot make a second job.
            BlobStoreUnavailable: the store of large blobs did not take the latents; nothing was accepted.
        """
        return self._accepted(self.attempt(self.taken(latents), pipeline=pipeline, **options), block_s=block_s)

    def submit_file(self, path: Path | str, *, pipeline: Any = None, block_s: float = 0.0, **options: Any) -> JobHandle:
        """Hands over the latents in a safetensors file with one tensor. Arguments and errors as `submit`.

        Raises:
            InvalidTensorFile: cannot be read, truncated, oversized, or not safetensors.
        """
        return self._accepted(self.attempt(self.read(path), pipeline=pipeline, **options), block_s=block_s)

    def submit_tensor_file(
        self, tensor: TensorFile, *, pipeline: Any = None, block_s: float = 0.0, **options: Any
    ) -> JobHandle:
        """Hands over latents that are a safetensors file in memory already. Arguments and errors as `submit`."""
        return self._accepted(self.attempt(lambda: tensor, pipeline=pipeline, **options), block_s=block_s)

    def encode(self, pictures: Pictures, *, pipeline: Any = None, block_s: float = 0.0, **options: Any) -> JobHandle:
        """Hands pictures over to be made into latents, normalised as the pipeline wants them; `.tensor()` has them.

        Args:
            pictures: PIL images of one size, or numpy uint8: (H, W, 3), (B, H, W, 3); of a video VAE the frames of one
                clip, or (F, H, W, 3), (B, F, H, W, 3). Or what `vae.encode` itself takes, as a torch tensor (float16,
                bfloat16, float32) or numpy array (float16, float32), usually in [-1, 1]: (B, 3, H, W), of a video VAE
                (B, 3, F, H, W). Height and width must be multiples of the VAE's compression.
            pipeline: a diffusers pipeline: tells vae, layout and state, as for `submit`.
            block_s: while the queue is full, how long to try again.
            options: vae, layout, state, seed (a sample of the posterior; without it, its mean), scaling_factor,
                shift_factor, mode, priority, timeout_s, start_within_s, retention_s, metadata, allow_tiling, job_id.

        Raises:
            InvalidJob: one of its subclasses; nothing was stored.
            JobConflict, QueueFull, BrokerUnreachable, BlobStoreUnavailable: as `submit`.
        """
        return self._accepted(self.encode_attempt(pictures, pipeline=pipeline, **options), block_s=block_s)

    def redecode(self, job_id: str, /, *, block_s: float = 0.0, **options: Any) -> JobHandle:
        """Decodes the retained latents of a job again, as a new job with other options.

        Args:
            job_id: a job whose latents are still retained, in whatever state.
            block_s: while the queue is full, how long to try again.
            options: what is to differ: output, mode, priority, fps, timeout_s, start_within_s, retention_s, metadata,
                provenance, scaling_factor, shift_factor, job_id.

        Raises:
            JobNotFound: no such job.
            ResultExpired: its latents are gone.
            InvalidOption: an option that would change what the latents are.
        """
        return self._accepted(self.redecode_attempt(job_id, **options), block_s=block_s)

    def job(self, job_id: str) -> JobHandle:
        """The handle of a job that was submitted before, here or elsewhere."""
        return JobHandle(self, job_id)

    def as_completed(self, jobs: Iterable[JobHandle], *, timeout: float | None = None) -> Iterator[JobHandle]:
        """Jobs as they end, however they end; stops early when `timeout` seconds have passed.

        Blocks on the broker's own streams: a job that ends wakes its waiters, nothing is polled.

        Raises:
            JobNotFound: one of them does not exist.
        """
        waiting = {job.id: job for job in jobs}
        deadline = None if timeout is None else time.monotonic() + timeout
        # What ended before we looked, and ids that do not exist, come first.
        ids = list(waiting)
        for start in range(0, len(ids), _WATCH_CHUNK):
            for snapshot in self.store.snapshots(ids[start : start + _WATCH_CHUNK]):
                if snapshot.status.is_terminal:
                    yield waiting.pop(snapshot.job_id)
        while waiting:
            left = MAX_BLOCK_S if deadline is None else min(MAX_BLOCK_S, deadline - time.monotonic())
            if left <= 0:
                return
            for job_id in self._next_ended(list(waiting), block_s=left):
                yield waiting.pop(job_id)

    def _next_ended(self, job_ids: list[str], *, block_s: float) -> list[str]:
        """Those of `job_ids` that ended; waits up to `block_s` for the first."""
        if len(job_ids) > _WATCH_CHUNK:
            block_s = min(block_s, 0.05)  # the others wait for their turn
        ended: list[str] = []
        for start in range(0, len(job_ids), _WATCH_CHUNK):
            streams = {keys.rq_results(job_id): "0-0" for job_id in job_ids[start : start + _WATCH_CHUNK]}
            prefix = len(keys.rq_results(""))
            with broker_errors(self._connections.url):
                answer = self._connections.blocking.xread(
                    streams,  # type: ignore[arg-type]
                    block=max(1, round(block_s * 1000)),
                )
            ended += [_stream_name(name)[prefix:] for name in _stream_names(answer)]
        if not ended:  # a result may have been retired between two looks, and its stream with it
            ended = [item.job_id for item in self.store.snapshots(job_ids[:_WATCH_CHUNK]) if item.status.is_terminal]
        return ended

    # Steps shared with the asynchronous client, which waits in another way between two tries ---------------

    def attempt(self, latents: Callable[[], TensorFile], *, pipeline: Any = None, **options: Any) -> SubmitAttempt:
        """A submit that has been checked and not begun. Options and errors as `submit`."""
        if pipeline is not None:
            options = options_of(pipeline, options, catalog=self.catalog)
        asked = _options(options)
        tensor = latents()
        request = build_request(tensor, asked, catalog=self.catalog, settings=self._settings)
        return SubmitAttempt(request, tensor, store=self.store, blobs=self.blobs)

    def encode_attempt(self, pictures: Pictures, *, pipeline: Any = None, **options: Any) -> SubmitAttempt:
        """An encode that has been checked and not begun. Arguments and errors as `encode`."""
        if pipeline is not None:
            told = options_of(pipeline, options, catalog=self.catalog)
            options = {name: value for name, value in told.items() if name in ENCODE_OPTIONS or name in options}
        asked = _options(encode_options(options))
        request, file = build_encode_request(pictures, asked, catalog=self.catalog, settings=self._settings)
        return SubmitAttempt(request, file, store=self.store, blobs=self.blobs)

    def redecode_attempt(self, job_id: str, /, **options: Any) -> RedecodeAttempt:
        """A redecode that has been checked and not begun. Arguments and errors as `redecode`."""
        source = self.store.snapshot(job_id).request
        if source is None:
            raise latents_gone(job_id)
        if source.kind is not Kind.DECODE:
            raise InvalidOption(f"job {job_id} encodes pictures: there is nothing to decode again", field="job_id")
        return RedecodeAttempt(self._again(source, options), store=self.store)

    def taken(self, latents: Latents) -> Callable[[], TensorFile]:
        """Makes a file of a tensor."""
        return lambda: to_tensor_file(latents, max_bytes=self._settings.max_latents_bytes)

    def read(self, path: Path | str) -> Callable[[], TensorFile]:
        """Reads a file."""
        return lambda: read_tensor_file(Path(path), max_bytes=self._settings.max_latents_bytes)

    def _accepted(self, attempt: SubmitAttempt | RedecodeAttempt, *, block_s: float) -> JobHandle:
        deadline = time.monotonic() + block_s
        while True:
            try:
                attempt.once()
                return JobHandle(self, attempt.job_id)
            except QueueFull as error:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise
                time.sleep(min(left, error.retry_after_s, LONGEST_PAUSE_S))

    def _again(self, source: DecodeRequest, options: dict[str, Any]) -> DecodeRequest:
        entry = self.catalog[source.vae]
        geometry = Geometry(
            batch=source.batch,
            num_frames=source.num_frames,
            height=source.height,
            width=source.width,
            is_video=source.is_video,
        )
        known = {item.name for item in dataclasses.fields(DecodeOptions)}
        kept = {
            name: getattr(source, name)
            for name in known & {item.name for item in dataclasses.fields(source)}
            if name not in ("job_id", "timeout_s", "height", "width", "num_frames")
        }
        fixed = {"vae", "layout", "height", "width", "num_frames", "state", *FACTS} & set(options)
        if fixed:
            name = sorted(fixed)[0]
            raise _not_changeable(name)
        asked = _options(kept | options)
        checked_state(asked, entry, LatentLayout(source.layout))
        checked = checked_options(asked, entry=entry, geometry=geometry, settings=self._settings)
        job_id = asked.job_id or new_job_id()
        return dataclasses.replace(source, job_id=job_id, source_job_id=source.job_id, **checked)


def _options(options: dict[str, Any]) -> DecodeOptions:
    known = {item.name for item in dataclasses.fields(DecodeOptions)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise InvalidOption(f"{unknown[0]} is not an option; there are {', '.join(sorted(known))}", field=unknown[0])
    if "vae" not in options:
        raise InvalidOption("vae is missing: name one, `latentq vaes` lists them", field="vae")
    return DecodeOptions(**options)


def _not_changeable(name: str) -> InvalidOption:
    return InvalidOption(f"{name} belongs to the latents and cannot change when they are decoded again", field=name)


def _stream_names(answer: Any) -> list[Any]:
    """RESP3 answers with a map, RESP2 with pairs."""
    return list(answer) if isinstance(answer, dict) else [pair[0] for pair in answer or []]


def _stream_name(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)
