"""What is asked of a module before it is believed to be what its class says."""

from __future__ import annotations

from typing import Any

from worker.lowmem_decode.structure_checks import UnsupportedStructure, drops, exactly, require, untouched

__all__ = ["UnsupportedStructure", "drops", "exactly", "require", "sized", "untouched"]


def sized(conv: Any, size: tuple[int, ...], padding: tuple[int, ...], where: str, *, mode: str = "zeros") -> None:
    """Refuses a convolution with a stride, a dilation, groups, or other sizes than these."""
    found = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    ones = (1,) * len(size)
    wanted = (size, ones, padding, ones, 1, mode)
    require(found == wanted, f"{where} is not a plain {'×'.join(str(extent) for extent in size)} convolution")
