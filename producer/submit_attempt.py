"""One submit, step by step, for clients that wait in different ways between two tries."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final

from broker_config.errors import BlobMissing, LatentqError, ResultExpired
from broker_config.job_store import JobStore
from broker_config.messages import DecodeRequest
from broker_config.tiered_blob_store import TieredBlobStore
from producer.tensor_input import TensorFile

#: A submit whose latents expired before they were accepted stores them again, this often.
_STORE_TRIES: Final = 3
#: Longest pause between two tries while the queue is full.
LONGEST_PAUSE_S: Final = 0.5


class SubmitAttempt:
    """Latents on their way in. `once` may be called again after `QueueFull`; it stores nothing twice."""

    def __init__(
        self,
        request: DecodeRequest,
        tensor: TensorFile,
        *,
        store: JobStore,
        blobs: TieredBlobStore,
        secrets: Sequence[str] = (),
    ) -> None:
        """Args:
        request: its `latents` are a draft.
        tensor: the latents' file.
        store: accepts the job.
        blobs: takes the latents.
        secrets: sign the job's webhook; none: its key's, or the default ones.
        """
        #: The job; its `latents` are a draft.
        self.request = request
        #: The latents' file.
        self.tensor = tensor
        #: What signs its webhook.
        self.secrets = tuple(secrets)
        self._store = store
        self._blobs = blobs
        self.job_id = request.job_id

    def once(self) -> bool:
        """Stores the latents unless they are, and hands the job over. True: new; False: accepted before.

        Raises:
            QueueFull: a limit is reached; call again later.
            JobConflict: the id was used for something else.
            BlobMissing: the latents expired again and again before they were accepted.
            BrokerError: with the job's id; the same call cannot make a second job.
        """
        try:
            for _ in range(_STORE_TRIES - 1):
                try:
                    return self._accept()
                except BlobMissing:  # slower than the provisional lifetime
                    continue
            return self._accept()
        except LatentqError as error:
            error.job_id = self.job_id
            raise

    def _accept(self) -> bool:
        """Latents that lie in the broker go with the job, in one script; others come first, once there is room."""
        size = self.request.latents.size_bytes
        if self._blobs.is_inline(size):
            return self._store.submit(self.request, self.tensor.data, secrets=self.secrets)
        if not self._store.admit(self.request, in_broker=self._blobs.lies_in_broker(size)):
            return False
        latents = self._blobs.put(self.request.latents.name, self.tensor.data)
        return self._store.submit(dataclasses.replace(self.request, latents=latents), secrets=self.secrets)


class RedecodeAttempt:
    """A new job for latents that are stored already. `once` may be called again after `QueueFull`."""

    def __init__(self, request: DecodeRequest, *, store: JobStore, secrets: Sequence[str] = ()) -> None:
        self._request = request
        self._secrets = tuple(secrets)
        self._store = store
        self.job_id = request.job_id

    def once(self) -> bool:
        """Hands the job over. True: new; False: accepted before.

        Raises:
            QueueFull: a limit is reached; call again later.
            JobConflict: the id was used for something else.
            ResultExpired: the latents are gone.
        """
        try:
            return self._store.submit(self._request, secrets=self._secrets)
        except BlobMissing:
            raise latents_gone(str(self._request.source_job_id)) from None


def latents_gone(job_id: str) -> ResultExpired:
    """What is said of a job whose latents cannot be decoded again."""
    return ResultExpired(
        f"the latents of job {job_id} are gone: their retention has ended; submit them again", job_id=job_id
    )
