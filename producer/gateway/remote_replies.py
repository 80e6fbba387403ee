"""Answers of the remote-VAE protocol, made of a job's artifacts. Pure, and slow for large tensors: call it in a thread.

| form | job's output | answer (diffusers `utils/remote_utils.py`, `postprocess_decode`) |
|---|---|---|
| image | jpg, png, webp | the first picture, encoded |
| mp4 | mp4 | the first clip |
| tensor | tensor | the VAE's own output, (B, 3, H, W) or (B, 3, F, H, W) |
| pixels | uint8 | (B, H, W, 3); of clips the first, (F, H, W, 3) |
| unit | uint8 | (B, 3, H, W), of clips the first as (F, 3, H, W), float16 in [0, 1] |
"""

from __future__ import annotations

import binascii
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from broker_config.decode_result import Artifact, DecodeResult
from broker_config.tensor_header import TensorHeader, read_header
from broker_config.tiered_blob_store import TieredBlobStore

#: The job's `output` for each form; None: the picture's own format.
REPLIES: Final[Mapping[str, str | None]] = {
    "image": None,
    "mp4": "mp4",
    "tensor": "tensor",
    "pixels": "uint8",
    "unit": "uint8",
}

_PICTURES: Final = ("png", "jpg", "webp")
#: Encoded in a millisecond, during which no other thread runs; three bytes are four characters.
_BASE64_PIECE_BYTES: Final = 3 << 18


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What a client wants back."""

    #: One of `REPLIES`.
    form: str
    #: Whether tensors come in JSON.
    base64: bool = False
    #: Format of a picture.
    image: str = "png"

    def output(self, rank: int) -> str:
        """`output` of the job. `rank`: dimensions of its latents."""
        return REPLIES[self.form] or self.image

    def is_of(self, output: str) -> bool:
        """Whether it can be made of what a job with this `output` leaves."""
        return output in _PICTURES if REPLIES[self.form] is None else output == REPLIES[self.form]

    def held_bytes(self, result: DecodeResult) -> int:
        """How much memory making it takes, about: what is read, and what is made of it."""
        sizes = [item.blob.size_bytes for item in result.artifacts]
        if self.form in ("image", "mp4"):
            return sizes[0]
        return sum(sizes) * (4 if self.base64 or self.form == "unit" else 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """An answer."""

    headers: Mapping[str, str]
    body: bytes | memoryview


def make_reply(reply: Reply, result: DecodeResult, blobs: TieredBlobStore, *, is_clip: bool) -> Made:
    """The answer for a job that succeeded.

    Raises:
        BlobMissing, BlobCorrupt: an artifact is gone or damaged.
    """
    first = result.artifacts[0]
    if reply.form in ("image", "mp4") or first.extension != "safetensors":
        return Made(headers={"Content-Type": first.content_type}, body=blobs.get(first.blob))
    several = reply.form == "tensor" or not is_clip
    files = [_load(item, blobs) for item in (result.artifacts if several else (first,))]
    header = files[0][0]
    # pictures: one (H, W, C) or (C, H, W) for each item of the batch, stacked; a clip of pixels is (F, H, W, C) already
    shape = (len(files), *header.shape) if several else header.shape
    if reply.form == "unit":
        return _tensor(
            reply, "float16", (shape[0], shape[3], shape[1], shape[2]), _to_unit([raw for _, raw in files], shape)
        )
    raws = [np.frombuffer(raw, dtype=np.uint8) for _, raw in files]
    body = files[0][1] if len(files) == 1 else np.concatenate(raws).data  # which lets the loop run meanwhile
    return _tensor(reply, header.dtype, shape, body)


def _load(artifact: Artifact, blobs: TieredBlobStore) -> tuple[TensorHeader, memoryview]:
    data = blobs.get(artifact.blob)
    header = read_header(data)
    return header, memoryview(data)[header.data_start :]


def _to_unit(raws: list[memoryview], shape: tuple[int, ...]) -> memoryview:
    """uint8 (N, H, W, 3) as float16 (N, 3, H, W) in [0, 1]. The client multiplies by 255 and rounds: k/255 in float16
    is off by at most 2^-12, times 255 that is 0.06, so each value comes back as k.
    """
    count, height, width, channels = shape
    levels = (np.arange(256, dtype=np.float32) / 255).astype(np.float16)
    unit = np.empty((count, channels, height, width), dtype=np.float16)
    flat = np.concatenate([np.frombuffer(raw, dtype=np.uint8) for raw in raws]) if len(raws) > 1 else raws[0]
    pixels = np.frombuffer(flat, dtype=np.uint8).reshape(shape)
    for number in range(count):  # a frame at a time: a clip as numbers is large enough once
        unit[number] = levels[pixels[number]].transpose(2, 0, 1)
    return unit.reshape(-1).view(np.uint8).data


def _tensor(reply: Reply, dtype: str, shape: tuple[int, ...], body: memoryview) -> Made:
    assert math.prod(shape) > 0
    if reply.base64:
        parameters = json.dumps({"shape": list(shape), "dtype": dtype}).encode()
        starts = range(0, len(body), _BASE64_PIECE_BYTES)
        pieces = [binascii.b2a_base64(body[at : at + _BASE64_PIECE_BYTES], newline=False) for at in starts]
        text = b"".join((b'{"inputs": "', *pieces, b'", "parameters": ', parameters, b"}"))
        return Made(headers={"Content-Type": "tensor/base64"}, body=text)
    headers = {"Content-Type": "tensor/binary", "shape": json.dumps(list(shape)), "dtype": dtype}
    return Made(headers=headers, body=body)
