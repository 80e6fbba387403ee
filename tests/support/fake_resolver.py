"""A resolver for aiohttp that says what a test wants, and another thing the next time."""

from __future__ import annotations

import socket
from collections import defaultdict
from collections.abc import Mapping, Sequence

from aiohttp.abc import AbstractResolver, ResolveResult


class FakeResolver(AbstractResolver):
    """Answers from a table; a name that it does not have does not exist."""

    def __init__(self, answers: Mapping[str, Sequence[Sequence[str]]]) -> None:
        """Args:
        answers: for each name what it resolves to, time after time; the last answer stays.
        """
        self._answers = {name: list(rounds) for name, rounds in answers.items()}
        #: How often each name was asked for.
        self.asked: defaultdict[str, int] = defaultdict(int)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """What aiohttp asks."""
        self.asked[host] += 1
        rounds = self._answers.get(host)
        if not rounds:
            raise OSError(socket.EAI_NONAME, "no such name")
        addresses = rounds.pop(0) if len(rounds) > 1 else rounds[0]
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=0,
            )
            for address in addresses
        ]

    async def close(self) -> None:
        """Nothing is open."""
