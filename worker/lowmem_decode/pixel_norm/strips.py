"""Strips of rows on their way through a decoder, and the windows that convolutions see of them.

A strip is (frames, rows, W, C). What hands strips on is an iterator that forgets each as it hands it on: in a chain of
forty convolutions every strip held on to would count. A convolution keeps the last two rows of its input for the next
strip, so that no row is computed twice; and, where further frames follow, the last two frames of its input (`Past`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

#: What stands around an activation.
Edge = Literal["zeros", "replicate", "reflect"]


class Strips(Protocol):
    """Strips of an activation, from the top to the bottom."""

    #: Rows of the activation.
    height: int

    def __iter__(self) -> Iterator[torch.Tensor]: ...

    def __next__(self) -> torch.Tensor: ...


class Whole:
    """An activation in memory, as one strip."""

    def __init__(self, frames: torch.Tensor) -> None:
        """Args:
        frames: (F, H, W, C); forgotten when it is handed on.
        """
        self.height = frames.shape[1]
        self._frames: list[torch.Tensor] = [frames]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        if not self._frames:
            raise StopIteration
        return self._frames.pop()


class Mapped:
    """Each strip, changed by a function."""

    def __init__(self, source: Strips, change: Callable[[torch.Tensor], torch.Tensor], *, factor: int = 1) -> None:
        self.height = source.height * factor
        self._strips = map(change, source)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        return next(self._strips)


class Cut:
    """The same rows in strips of about as many bytes as are wanted."""

    def __init__(self, source: Strips, rows: Callable[[torch.Tensor], int]) -> None:
        """Args:
        source: the strips.
        rows: most rows of a part of this strip.
        """
        self.height = source.height
        self._source = source
        self._rows = rows
        self._parts: list[torch.Tensor] = []

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        if not self._parts:
            strip = next(self._source)
            self._parts = list(torch.split(strip, self._rows(strip), dim=1))[::-1]
        return self._parts.pop()


class RowQueue:
    """Rows that wait for what is added to them."""

    def __init__(self) -> None:
        self._waiting: list[torch.Tensor] = []

    def put(self, strip: torch.Tensor) -> None:
        """Adds rows below those that wait."""
        self._waiting.append(strip)

    def take(self, count: int) -> torch.Tensor:
        """The next `count` rows, which must have been put."""
        taken: list[torch.Tensor] = []
        while count:
            rows = self._waiting.pop(0)
            if rows.shape[1] > count:
                # a copy: a view would keep the rows taken as well
                self._waiting.insert(0, rows[:, count:].clone())
                rows = rows[:, :count]
            taken.append(rows)
            count -= rows.shape[1]
        return taken[0] if len(taken) == 1 else torch.cat(taken, dim=1)


class Past:
    """The last two frames of a convolution's input, (2, H, W, C), read and replaced strip by strip."""

    def __init__(self) -> None:
        self.frames: torch.Tensor | None = None

    def replace(self, top: int, height: int, strip: torch.Tensor) -> None:
        """Stores the last two frames of these rows; a frame there never was is zeros."""
        if self.frames is None:
            self.frames = strip.new_zeros(2, height, *strip.shape[2:])
        known = min(2, len(strip))
        self.frames[2 - known :, top : top + strip.shape[1]] = strip[-known:]


@dataclass(kw_only=True, slots=True)
class Beside:
    """The frames that a convolution over three sees beside those of a strip."""

    #: What stands before the first frame: zeros, or the first frame again.
    edge: Edge = "zeros"
    #: Whether both of them come before; otherwise one before and one behind.
    causal: bool = True
    #: Of the group of frames before; None: nothing is to be remembered, as no group follows.
    past: Past | None = None
    #: Whether the frames are the first of the clip.
    first: bool = True
    _seen: int = field(default=0, init=False)

    def around(self, strip: torch.Tensor, *, height: int) -> torch.Tensor:
        """The strip with those frames; a single frame alone if only zeros were before it."""
        if self.first:
            out = self._first(strip)
        else:
            assert self.past is not None
            assert self.past.frames is not None
            out = torch.cat([self.past.frames[:, self._seen : self._seen + strip.shape[1]], strip])
        if self.past is not None:
            self.past.replace(self._seen, height, out)
        self._seen += strip.shape[1]
        return out

    def _first(self, strip: torch.Tensor) -> torch.Tensor:
        if self.edge == "zeros":
            assert self.causal
            if len(strip) == 1:
                return strip
            return torch.cat([strip.new_zeros(2, *strip.shape[1:]), strip])
        before = [strip[:1]] * (2 if self.causal else 1)
        return torch.cat([*before, strip, *([] if self.causal else [strip[-1:]])])


class Windows:
    """Strips with the row above and the row below, and columns where those are not zeros."""

    def __init__(self, source: Strips, *, edge: Edge) -> None:
        self.height = source.height
        self._source = source
        self._edge = edge
        self._kept: torch.Tensor | None = None
        self._begun = False
        self._seen = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        while True:
            window = self._window(next(self._source))
            if window is not None:
                return window

    def _window(self, strip: torch.Tensor) -> torch.Tensor | None:
        """The rows known now whose neighbours are known too, with these; None if there are none."""
        self._seen += strip.shape[1]
        parts = [self._columns(strip)]
        if self._kept is not None:
            parts.insert(0, self._kept)
        if not self._begun:
            top = self._above(parts)
            if top is None:
                self._kept = parts[0]
                return None
            parts.insert(0, top)
            self._begun = True
        if self._seen == self.height:
            parts.append(self._below(parts))
        window = torch.cat(parts, dim=1)
        self._kept = None if self._seen == self.height else window[:, -2:].clone()
        return window if window.shape[1] > 2 else None

    def _above(self, parts: list[torch.Tensor]) -> torch.Tensor | None:
        """The row above the first; None if it is not known yet."""
        if self._edge == "zeros":
            return torch.zeros_like(parts[0][:, :1])
        if self._edge == "replicate":
            return parts[0][:, :1]
        rows = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return rows[:, 1:2] if rows.shape[1] > 1 else None

    def _below(self, parts: list[torch.Tensor]) -> torch.Tensor:
        last = parts[-1]
        if self._edge == "zeros":
            return torch.zeros_like(last[:, :1])
        if self._edge == "replicate":
            return last[:, -1:]
        return last[:, -2:-1] if last.shape[1] > 1 else parts[-2][:, -1:]

    def _columns(self, strip: torch.Tensor) -> torch.Tensor:
        if self._edge == "zeros":
            return strip
        inner = 0 if self._edge == "replicate" else 1
        width = strip.shape[2]
        return torch.cat([strip[:, :, inner : inner + 1], strip, strip[:, :, width - 1 - inner : width - inner]], dim=2)
