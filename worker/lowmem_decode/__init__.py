"""Exact decode in a fraction of the memory: in strips of rows, on the modules diffusers loads."""

from worker.lowmem_decode.by_class import decode, largest_bytes, stream, supports, working_bytes
from worker.lowmem_decode.low_memory_vae import LowMemoryVae
from worker.lowmem_decode.structure_checks import UnsupportedStructure

__all__ = [
    # decoding
    "LowMemoryVae",
    "decode",
    "stream",
    "supports",
    # arithmetic beforehand
    "largest_bytes",
    "working_bytes",
    # errors
    "UnsupportedStructure",
]
