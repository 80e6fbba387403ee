"""Decode in less time: memory format, fused norms, compiled graphs, bfloat16 where a CPU multiplies in it.

Takes a VAE as diffusers loaded it, leaves it as it is, and gives another one to call. Knows nothing of queues.
"""

from worker.fast_path.compiling import CompiledDecoder, keep_compiled_in
from worker.fast_path.families import FastOptions, family_of
from worker.fast_path.fast_vaes import FastVae, FastVaes, describe
from worker.fast_path.native_bfloat16 import native_bfloat16
from worker.fast_path.view import refusal, view_of

__all__ = [
    # fast ways
    "FastOptions",
    "FastVae",
    "FastVaes",
    "describe",
    "family_of",
    "refusal",
    "view_of",
    # what they rest on
    "CompiledDecoder",
    "keep_compiled_in",
    "native_bfloat16",
]
