"""Low-memory decode of the VAEs whose norms are per pixel: clips and pictures of (B, C, f, h, w)."""

from worker.lowmem_decode.pixel_norm.clip_decode import decode, largest_bytes, stream, working_bytes
from worker.lowmem_decode.pixel_norm.structure import knows, read

__all__ = ["decode", "knows", "largest_bytes", "read", "stream", "working_bytes"]
