"""A residual block, strip by strip.

Two passes, since the second norm needs all of the hidden activation: one makes it (or, to save its memory, only its
statistics), the other goes over it, or makes it again, and writes the result. The result takes the place of the input
where that lies in memory and keeps its channels, else of the hidden activation: rows are overwritten only after every
convolution that needs them has its own copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from worker.lowmem_decode.activation import Activation, RowQueue, Stored, convolved
from worker.lowmem_decode.group_norm import GroupStatistics
from worker.lowmem_decode.row_conv import Kernel
from worker.lowmem_decode.steps import Resnet

#: Begins a pass over an activation: what it gives writes the normalised rows of a strip, and SiLU of them, to a room.
Norm = Callable[[], Callable[[torch.Tensor, torch.Tensor], None]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ResnetRun:
    """How a residual block is run."""

    block: Resnet
    #: The first norm, with the statistics of the input.
    first: Norm
    #: Statistics for a norm, yet to be filled.
    gather: Callable[[Any], GroupStatistics]
    #: A norm, with the statistics of an activation.
    norm: Callable[[Any, GroupStatistics, Activation], Norm]
    #: What runs a convolution.
    kernel: Callable[[Any], Kernel]
    #: Rows of a strip.
    rows: int
    #: Whether the hidden activation is stored, or made twice.
    keep_hidden: bool
    #: Told how many rows of a pass are done.
    tick: Callable[[int], None]

    def __call__(self, source: Activation, *, after: GroupStatistics | None) -> Stored:
        """Runs the block.

        Args:
            source: the input; overwritten if it is stored and has the output's channels.
            after: takes in the output, if a norm follows.
        """
        statistics = self.gather(self.block.norm2)
        hidden: torch.Tensor | None = None
        done = 0
        for strip in self._hidden(source, seen=None):
            if self.keep_hidden and hidden is None:
                hidden = strip.new_empty(source.height, *source.inner, self.block.hidden_channels)
            if hidden is not None:
                hidden[done : done + len(strip)] = strip
            statistics.add(strip)
            done += len(strip)
            self.tick(len(strip))
        return self._second_pass(source, hidden, statistics, after)

    def _hidden(self, source: Activation, *, seen: Callable[[torch.Tensor], None] | None) -> Iterator[torch.Tensor]:
        normalise = self.first()

        def write(strip: torch.Tensor, room: torch.Tensor) -> None:
            if seen is not None:
                seen(strip)
            normalise(strip, room)

        return convolved(self.kernel(self.block.conv1), source, self.rows, write=write)

    def _second_pass(
        self,
        source: Activation,
        hidden: torch.Tensor | None,
        statistics: GroupStatistics,
        after: GroupStatistics | None,
    ) -> Stored:
        stored = source.tensor if isinstance(source, Stored) else None
        if hidden is not None:
            middle: Activation = Stored(hidden)
            waiting = RowQueue(source.strips(self.rows) if stored is None else None)
        else:
            waiting = RowQueue()
            seen = waiting.put if stored is None else None
            middle = _Again(source, self.block.hidden_channels, lambda: self._hidden(source, seen=seen))
        target = stored if stored is not None and self.block.shortcut is None else hidden
        made = convolved(
            self.kernel(self.block.conv2),
            middle,
            self.rows,
            write=self.norm(self.block.norm2, statistics, middle)(),
        )
        top = 0
        for strip in made:
            count = len(strip)
            if target is None or target.shape[-1] != self.block.channels:
                target = strip.new_empty(source.height, *source.inner, self.block.channels)
            kept = waiting.take(count) if stored is None else stored[top : top + count]
            out = target[top : top + count]
            torch.add(self._shortcut(kept), strip, out=out)
            if self.block.scale != 1.0:
                out.div_(self.block.scale)
            if after is not None:
                after.add(out)
            top += count
            self.tick(count)
        assert target is not None
        return Stored(target)

    def _shortcut(self, rows: torch.Tensor) -> torch.Tensor:
        conv = self.block.shortcut
        return rows if conv is None else F.linear(rows, conv.weight.flatten(1), conv.bias)


class _Again:
    """The hidden activation, made once more."""

    def __init__(self, source: Activation, channels: int, make: Callable[[], Iterator[torch.Tensor]]) -> None:
        self.height, self.inner, self.channels = source.height, source.inner, channels
        self._source = source
        self._make = make

    def strips(self, rows: int) -> Iterator[torch.Tensor]:
        return self._make()

    def most_rows(self, rows: int) -> int:
        return self._source.most_rows(rows) + 1  # the last strip also brings the row that waited for it
