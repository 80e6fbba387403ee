"""Where the rows of an activation come from: memory, or a convolution run again.

Each can be read more than once, always from the top to the bottom. Rows that were read may be overwritten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, Protocol

import torch

from worker.lowmem_decode.host_memory import Growth
from worker.lowmem_decode.row_conv import Kernel, RowConv

#: A process may grow by so many strips, or by so many bytes, before free memory of its heap goes back.
_GROWN_STRIPS: Final = 4
_GROWN_BYTES: Final = 16 << 20


class Activation(Protocol):
    """An activation of one item, (H, W, C), or (H, T, W, C) of a clip."""

    height: int
    #: A row, without channels: (W,) or (T, W).
    inner: tuple[int, ...]
    channels: int

    def strips(self, rows: int) -> Iterator[torch.Tensor]:
        """Strips from the top to the bottom, of about `rows` rows; at most `most_rows(rows)`."""
        ...

    def most_rows(self, rows: int) -> int:
        """Most rows a strip has when `rows` were asked for."""
        ...


class Stored:
    """An activation in memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.height, *inner, self.channels = tensor.shape
        self.inner = tuple(inner)

    def strips(self, rows: int) -> Iterator[torch.Tensor]:
        yield from torch.split(self.tensor, rows)

    def most_rows(self, rows: int) -> int:
        return min(rows, self.height)


class Recomputed:
    """The upsample of a stored activation, computed each time it is read."""

    def __init__(self, low: Stored, kernel: Kernel, *, inner: tuple[int, ...]) -> None:
        self.low = low
        self._kernel = kernel
        self.height = low.height * kernel.factor
        self.inner = inner
        self.channels = kernel.out_channels

    def strips(self, rows: int) -> Iterator[torch.Tensor]:
        step = max(1, rows // self._kernel.factor)
        return convolved(self._kernel, self.low, step, write=lambda strip, room: room.copy_(strip))

    def most_rows(self, rows: int) -> int:
        step = self.low.most_rows(max(1, rows // self._kernel.factor))
        return (step + 1) * self._kernel.factor  # the last strip also brings the row that waited for it


class RowQueue:
    """Rows of an activation, taken in other numbers than its strips have."""

    def __init__(self, more: Iterator[torch.Tensor] | None = None) -> None:
        """Args:
        more: read when too few rows wait; None: all are put.
        """
        self._more = more
        self._waiting: list[torch.Tensor] = []

    def put(self, rows: torch.Tensor) -> None:
        """Adds rows below those that wait."""
        self._waiting.append(rows)

    def take(self, count: int) -> torch.Tensor:
        """The next `count` rows."""
        taken: list[torch.Tensor] = []
        while count:
            if not self._waiting and self._more is not None:
                self.put(next(self._more))
            rows = self._waiting.pop(0)
            if len(rows) > count:
                self._waiting.insert(0, rows[count:])
                rows = rows[:count]
            taken.append(rows)
            count -= len(rows)
        return taken[0] if len(taken) == 1 else torch.cat(taken)


def convolved(
    kernel: Kernel, source: Activation, rows: int, *, write: Callable[[torch.Tensor, torch.Tensor], object]
) -> Iterator[torch.Tensor]:
    """The strips of a convolution over an activation.

    Args:
        kernel: the convolution.
        source: read once.
        rows: of a strip.
        write: copies a strip to where the convolution reads it (strip, room), and may change it on the way.
    """
    conv: RowConv | None = None
    growth: Growth | None = None
    seen = 0
    for strip in source.strips(rows):
        if conv is None:
            conv = RowConv(kernel, strip, inner=source.inner, most_rows=source.most_rows(rows))
            growth = Growth(min(_GROWN_BYTES, _GROWN_STRIPS * strip.nbytes)) if strip.device.type == "cpu" else None
        count = len(strip)
        write(strip, conv.room(count))
        del strip  # a recomputed one would live on while the next is made
        seen += count
        if growth is not None:
            growth.give_back()
        out = conv.push(count, last=seen == source.height)
        if out is not None:
            yield out
            del out
