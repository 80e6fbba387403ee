"""What convolutions remember from one group of a clip's frames to the next: the last two frames of their input."""

from __future__ import annotations

from typing import Any

import torch


class Past:
    """The frames one convolution remembers. Run again over the same group, it sees the same frames again."""

    def __init__(self) -> None:
        self.frames: torch.Tensor | None = None
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
            self._next = rows.new_empty(self._height, *rows.shape[1:])
        self._next[top : top + len(rows)] = rows

    def step(self) -> None:
        """From now on what was noted is the past."""
        self.frames, self._next = self._next, None


class FrameCaches:
    """The pasts of a decoder's convolutions."""

    def __init__(self) -> None:
        self._pasts: dict[int, Past] = {}
        self._used: list[Past] = []
        #: Whether a further group follows.
        self.keeps = True

    def of(self, conv: Any, *, height: int) -> Past:
        """The past of a convolution, which is about to be run over so many rows."""
        past = self._pasts.setdefault(id(conv), Past())
        past.expect(height, keeps=self.keeps)
        self._used.append(past)
        return past

    def step(self) -> None:
        """The convolutions that ran since the last step are done with this group."""
        for past in {id(past): past for past in self._used}.values():
            past.step()
        self._used.clear()
