"""`DecodeClient`: puts latents into the queue and takes results out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from broker_config.connection import Connections, broker_errors, connect, connect_url
from broker_config.errors import InvalidOption, QueueFull
from broker_config.job_store import JobStore
from broker_config.latent_geometry import FACTS, Geometry, LatentLayout
from broker_config.messages import DecodeRequest, Kind
from broker_config.settings import Settings, load_settings
from broker_config.tiered_blob_store import TieredBlobStore
from broker_config.vae_catalog import VaeCatalog
from producer.decode_options import DecodeOptions
from producer.ended_jobs import ended_jobs
from producer.job_handle import JobHandle
from producer.option_checks import check_result_size, checked_options, checked_state
from producer.pipelines import noise_state, options_of
from producer.pixel_input import OF_PIPELINE, Pictures, build_encode_request, encode_options
from producer.preview_option import preview_of
from producer.spool import Spool
from producer.spool_flush import SpoolingSubmits
from producer.submission import build_request, new_job_id
from producer.submit_attempt import LONGEST_PAUSE_S, RedecodeAttempt, SubmitAttempt, latents_gone
from producer.tensor_input import Latents, TensorFile, read_tensor_file, to_tensor_file
from producer.webhook_option import own_secrets


class DecodeClient:
    """A producer's connection to the queue. Thread-safe; one for each process is enough.

    Starts without torch: torch tensors are taken when the caller has torch.
    """

    def __init__(
        self,
        connections: Connections,
        *,
        settings: Settings,
        catalog: VaeCatalog | None = None,
        spool: Path | str | None = None,
    ) -> None:
        """Args:
        connections: closed with the client.
        settings: limits and defaults.
        catalog: None: the one the settings name.
        spool: folder for submits that the broker does not take; None: these are errors (`producer/spool.py`).
        """
        self._connections = connections
        self._settings = settings
        #: The VAEs that jobs may name.
        self.catalog = catalog or VaeCatalog.load(settings.catalog)
        self.store = JobStore(connections, settings)
        self.blobs = TieredBlobStore(connections, settings)
        #: Submits that wait for the broker; None: there is no spool.
        self.spool = SpoolingSubmits(Spool(spool), store=self.store, blobs=self.blobs) if spool is not None else None

    @classmethod
    def from_env(cls, **overrides: Any) -> Self:
        """A client configured by the environment (`LATENTQ_…`), with `overrides` on top.

        Raises:
            BrokerNotRunning: no URL is set and no embedded broker runs.
            ConfigurationError: a setting is not usable.
        """
        settings = load_settings(**overrides)
        return cls(connect(settings, name="latentq-client"), settings=settings, spool=settings.spool_dir)

    @classmethod
    def from_url(cls, url: str, **overrides: Any) -> Self:
        """A client of the broker at `url`."""
        settings = load_settings(redis_url=url, **overrides)
        return cls(connect_url(url, name="latentq-client"), settings=settings, spool=settings.spool_dir)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections. What waits in the spool stays there."""
        if self.spool is not None:
            self.spool.close()
        self.blobs.close()
        self._connections.close()

    @property
    def settings(self) -> Settings:
        """What it was made with."""
        return self._settings

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
            latents: torch tensor (float16, bfloat16, float32; any device) or numpy array (float16, float32), with any
                strides, laid out as the pipeline returned them.
            pipeline: the diffusers pipeline that made them, with or without its VAE, or the name of its class: tells
                vae, layout, state and the facts that go with them (`producer/pipelines.py`). Options named beside it
                win.
            block_s: while the queue is full, how long to try again.
            options: `generator`, the pipeline's torch generator on the CPU as the call left it, where the VAE draws
                noise (LTX-Video); and fields of `DecodeOptions`: vae, layout, height, width, num_frames, fps, output,
                mode, priority, timeout_s, start_within_s, retention_s, scaling_factor, shift_factor, metadata,
                provenance, webhook, webhook_events, webhook_inline, webhook_secret, job_id.

        Raises:
            InvalidJob: one of its subclasses; nothing was stored. Its `job_id` is the id it would have had.
            JobConflict: the id was used for something else.
            QueueFull: a limit is reached; nothing was stored.
            BrokerUnreachable: not known whether it was accepted: submit again with `job_id=error.job_id`, which
                cannot make a second job.
            BlobStoreUnavailable: the store of large blobs did not take the latents; nothing was accepted.
            SpoolUnavailable: of a client with a spool, in place of the last three: nor did the spool take them.
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
                provenance, scaling_factor, shift_factor, webhook and what belongs to it (a webhook is not taken over),
                job_id.

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
        handles = {job.id: job for job in jobs}
        spool = self.spool.spool if self.spool is not None else None
        for job_id in ended_jobs(handles, store=self.store, spool=spool, timeout=timeout):
            yield handles[job_id]

    # Steps shared with the asynchronous client, which waits in another way between two tries ---------------

    def attempt(self, latents: Callable[[], TensorFile], *, pipeline: Any = None, **options: Any) -> SubmitAttempt:
        """A submit that has been checked and not begun. Options and errors as `submit`."""
        if "generator" in options:
            options = {**options, "noise_state": noise_state(options["generator"])}
            del options["generator"]
        if pipeline is not None:
            options = options_of(pipeline, options, catalog=self.catalog)
        asked = _options(options)
        tensor = latents()
        request = build_request(tensor, asked, catalog=self.catalog, settings=self._settings)
        return SubmitAttempt(request, tensor, store=self.store, blobs=self.blobs, secrets=own_secrets(asked))

    def encode_attempt(self, pictures: Pictures, *, pipeline: Any = None, **options: Any) -> SubmitAttempt:
        """An encode that has been checked and not begun. Arguments and errors as `encode`."""
        if pipeline is not None:
            told = options_of(pipeline, options, catalog=self.catalog)
            options = {name: value for name, value in told.items() if name in OF_PIPELINE or name in options}
        asked = _options(encode_options(options))
        request, file = build_encode_request(pictures, asked, catalog=self.catalog, settings=self._settings)
        return SubmitAttempt(request, file, store=self.store, blobs=self.blobs, secrets=own_secrets(asked))

    def redecode_attempt(self, job_id: str, /, **options: Any) -> RedecodeAttempt:
        """A redecode that has been checked and not begun. Arguments and errors as `redecode`."""
        source = self.store.snapshot(job_id).request
        if source is None:
            raise latents_gone(job_id)
        if source.kind is not Kind.DECODE:
            raise InvalidOption(f"job {job_id} encodes pictures: there is nothing to decode again", field="job_id")
        request, secrets = self._again(source, options)
        return RedecodeAttempt(request, store=self.store, secrets=secrets)

    def taken(self, latents: Latents) -> Callable[[], TensorFile]:
        """Makes a file of a tensor."""
        return lambda: to_tensor_file(latents, max_bytes=self._settings.max_latents_bytes)

    def read(self, path: Path | str) -> Callable[[], TensorFile]:
        """Reads a file."""
        return lambda: read_tensor_file(Path(path), max_bytes=self._settings.max_latents_bytes)

    def _accepted(self, attempt: SubmitAttempt | RedecodeAttempt, *, block_s: float) -> JobHandle:
        if self.spool is not None and isinstance(attempt, SubmitAttempt):
            self.spool.submit(attempt, lambda: self._hand_over(attempt, block_s=block_s))
        else:
            self._hand_over(attempt, block_s=block_s)
        return JobHandle(self, attempt.job_id)

    def _hand_over(self, attempt: SubmitAttempt | RedecodeAttempt, *, block_s: float) -> None:
        deadline = time.monotonic() + block_s
        while True:
            try:
                attempt.once()
                return
            except QueueFull as error:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise
                time.sleep(min(left, error.retry_after_s, LONGEST_PAUSE_S))

    def _again(self, source: DecodeRequest, options: dict[str, Any]) -> tuple[DecodeRequest, tuple[str, ...]]:
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
            if name not in ("job_id", "timeout_s", "height", "width", "num_frames", "webhook", "preview")
        }
        if source.webhook is not None or "webhook" in options:
            kept["retention_s"] = None  # a webhook decides how long that is at least, and does not come along
        fixed = {"vae", "layout", "height", "width", "num_frames", "state", *FACTS} & set(options)
        if fixed:
            name = sorted(fixed)[0]
            raise _not_changeable(name)
        asked = _options(kept | options)
        layout = LatentLayout(source.layout)
        checked_state(asked, entry, layout)
        shown_by = preview_of(asked.preview, entry, layout=layout, state=source.latent_state, catalog=self.catalog)
        checked = checked_options(asked, entry=entry, geometry=geometry, settings=self._settings)
        check_result_size(checked["output"], geometry, entry, self._settings)
        job_id = asked.job_id or new_job_id()
        request = dataclasses.replace(source, job_id=job_id, source_job_id=source.job_id, preview=shown_by, **checked)
        return request, own_secrets(asked)


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
