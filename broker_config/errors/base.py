"""The root of the tree: what every error carries."""

from __future__ import annotations

from typing import Any, ClassVar


class LatentqError(Exception):
    """latentq failed."""

    #: Stable identifier, also used on the wire.
    code: ClassVar[str] = "error"
    #: Whether the same call can succeed later without being changed.
    retryable: ClassVar[bool] = False

    def __init_subclass__(cls, *, code: str, retryable: bool | None = None) -> None:
        """`class NewError(ParentError, code="new_error", retryable=True)`; retryable as its parent unless said."""
        super().__init_subclass__()
        cls.code = code
        if retryable is not None:
            cls.retryable = retryable

    def __init__(self, message: str | None = None, /, *, field: str | None = None, job_id: str | None = None):
        super().__init__(message or (type(self).__doc__ or "").strip().splitlines()[0])
        #: The option or argument at fault, where there is one.
        self.field = field
        #: The job concerned, where there is one.
        self.job_id = job_id

    @property
    def message(self) -> str:
        """The sentence a person reads."""
        return str(self.args[0])

    def to_wire(self) -> dict[str, Any]:
        """`{"code", "message", "retryable", "field"?, "job_id"?}` as stored with a job and sent over HTTP."""
        wire: dict[str, Any] = {"code": self.code, "message": self.message, "retryable": self.retryable}
        if self.field:
            wire["field"] = self.field
        if self.job_id:
            wire["job_id"] = self.job_id
        return wire
