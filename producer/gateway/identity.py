"""Who asks: everyone on loopback, a key, or a browser with a session; and which jobs that one may see.

Ids are scoped by key: what a key calls `cat` is `k_<key id>_cat` in the broker, so two keys can use one id and
neither can tell that the other did. The broker's id is a function of key and name alone, so a repeated PUT is the
same job at every gateway, and a tombstone still says whose it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from broker_config.errors import InvalidOption, JobNotFound, NotAllowed
from broker_config.messages import check_job_id
from broker_config.scoped_ids import key_of, scoped, shown_to
from producer.gateway.api_keys import ApiKey, Scope

#: Longest name that fits behind `k_<key id>_` in a job id of 64 characters.
_LONGEST: Final = 53


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """Who sent a request."""

    #: None: everyone on this machine, who may do everything.
    key: ApiKey | None
    #: `none`, `bearer`, `basic`, `session` or `link`.
    via: str
    #: Must accompany what changes something, from a session.
    csrf: str | None = None

    @property
    def granted(self) -> frozenset[Scope]:
        """What it may do."""
        if self.via == "link":
            return frozenset({Scope.READ})
        return frozenset(Scope) if self.key is None else self.key.granted

    @property
    def name(self) -> str:
        """What limits and logs call it."""
        return "local" if self.key is None else self.key.id

    def require(self, scope: Scope) -> None:
        """Raises `NotAllowed` unless it has this scope."""
        if scope not in self.granted:
            raise NotAllowed(f"this key has no scope {scope!r}; it has {', '.join(sorted(self.granted)) or 'none'}")

    @property
    def sees_all(self) -> bool:
        """Whether it sees everyone's jobs."""
        return Scope.READ_ALL in self.granted

    def new_id(self, name: str) -> str:
        """The broker's id of a job that this one submits as `name`.

        Raises:
            InvalidOption: not an id, or one that looks like another key's.
        """
        if key_of(check_job_id(name)) is not None:
            raise InvalidOption(
                "ids that begin with k_ and a key's id are the gateway's own: choose another", field="job_id"
            )
        return name if self.key is None else scoped(self.key.id, _short(name))

    def candidates(self, name: str) -> Sequence[str]:
        """The broker's ids that `name` may mean to this one, the likeliest first.

        Raises:
            JobNotFound: not an id at all.
        """
        try:
            check_job_id(name)
        except InvalidOption:
            raise JobNotFound(f"no job {name[:80]!r}: that is not an id") from None
        if self.key is None:
            return [name]
        own = scoped(self.key.id, _short(name))
        if not self.sees_all:
            return [own]
        return [own, name] if key_of(name) is None else [name]

    def may_change(self, job_id: str) -> bool:
        """Whether it may cancel, delete and decode again the job with this broker's id."""
        return Scope.ADMIN in self.granted or (Scope.SUBMIT in self.granted and self.owns(job_id))

    def owns(self, job_id: str) -> bool:
        """Whether the job with this broker's id is its own."""
        if self.key is None:
            return True
        return key_of(job_id) == self.key.id

    def sees(self, job_id: str) -> bool:
        """Whether it may know that there is this job."""
        return self.sees_all or (Scope.READ in self.granted and self.owns(job_id))

    def shown(self, job_id: str) -> str:
        """What it calls the job with this broker's id."""
        return shown_to(None if self.key is None else self.key.id, job_id)


def _short(name: str) -> str:
    """`name`, or a digest of it where it would not fit."""
    return name if len(name) <= _LONGEST else f"h-{hashlib.sha256(name.encode()).hexdigest()[:48]}"


LOCAL: Final = Identity(key=None, via="none")
#: Whoever has a signed link. Its path is signed with the broker's id in it, so ids mean what they are.
LINK: Final = Identity(key=None, via="link")
