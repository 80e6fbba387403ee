"""What convolutions remember from one group of a clip's frames to the next: the last two frames of their input.

It lies on the decode's device, or in host memory. That is ordinary memory, not pinned: torch rounds pinned blocks up to
powers of two and keeps them for good, and a worker's host has other uses for several GB.
"""

from __future__ import annotations

from typing import Any

import torch

#: Host memory that is free to be written to, by shape.
_Spare = dict[tuple[int, ...], list[torch.Tensor]]


class Past:
    """The frames one convolution remembers. Run again over the same group, it sees the same frames again."""

    def __init__(self, *, spare: _Spare | None = None) -> None:
        """Args:
        spare: frames lie in host memory, and here is what others have no more use for; None: on the device.
        """
        self._spare = spare
        self._frames: torch.Tensor | None = None
        #: Whether a further group follows.
        self.keeps = True
        self._height = 0
        self._next: torch.Tensor | None = None

    def expect(self, height: int, *, keeps: bool) -> None:
        """The convolution is about to be run over so many rows."""
        self._height = height
        self.keeps = keeps

    def note(self, rows: torch.Tensor, *, top: int) -> None:
        """Takes the frames to be remembered of some rows: (h, 2, W, C) from row `top` on."""
        if self._next is None:
            self._next = self._room((self._height, *rows.shape[1:]), rows)
        self._next[top : top + len(rows)] = rows

    def recall(self, room: torch.Tensor, *, top: int) -> bool:
        """Writes the remembered frames of some rows, from row `top` on, to (h, 2, W, C). False: there are none."""
        if self._frames is None:
            return False
        room.copy_(self._frames[top : top + len(room)])
        return True

    def step(self) -> None:
        """From now on what was noted is the past."""
        if self._spare is not None and self._frames is not None:
            self._spare.setdefault(tuple(self._frames.shape), []).append(self._frames)
        self._frames, self._next = self._next, None

    def _room(self, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        if self._spare is None:
            return like.new_empty(shape)
        there = self._spare.get(shape)
        return there.pop() if there else torch.empty(shape, dtype=like.dtype)


class FrameCaches:
    """The pasts of a decoder's convolutions."""

    def __init__(self, *, on_host: bool = False) -> None:
        """Args:
        on_host: remembered in host memory.
        """
        self._spare: _Spare | None = {} if on_host else None
        self._pasts: dict[int, Past] = {}
        self._used: list[Past] = []
        #: Whether a further group follows.
        self.keeps = True

    def of(self, conv: Any, *, height: int) -> Past:
        """The past of a convolution, which is about to be run over so many rows."""
        past = self._pasts.setdefault(id(conv), Past(spare=self._spare))
        past.expect(height, keeps=self.keeps)
        self._used.append(past)
        return past

    def step(self) -> None:
        """The convolutions that ran since the last step are done with this group."""
        for past in {id(past): past for past in self._used}.values():
            past.step()
        self._used.clear()
