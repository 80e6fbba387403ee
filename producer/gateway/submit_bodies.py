"""Bodies of submits: what of a request is options, and where its latents are.

- `application/vnd.safetensors`: a safetensors file; options in the query.
- `application/octet-stream`: raw elements, with `shape` and `dtype` in the query; without them a safetensors file.
- `multipart/form-data`: a part `options` (JSON: options of the job, and `shape` and `dtype` where the latents are raw),
  then a part `latents`. A batch has a part `jobs` (a JSON list of such options), then one part of latents for each.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any, Final

from aiohttp import BodyPartReader, MultipartReader, web

from broker_config.errors import BadRequest, BodyTooLarge, InvalidOption, MediaTypeUnsupported
from broker_config.tensor_header import MAX_HEADER_BYTES
from producer.gateway.context import Gateway
from producer.gateway.jobs import ReadLatents
from producer.gateway.latents_input import Check, read_raw, read_safetensors, shape_of
from producer.gateway.query import options_of, options_of_json
from producer.gateway.uploads import Incoming, Pace, body_of, length_of, part_of
from producer.tensor_input import TensorFile

SAFETENSORS: Final = "application/vnd.safetensors"
RAW: Final = "application/octet-stream"
MULTIPART: Final = "multipart/form-data"
#: Query parameters and members of `options` that say what raw elements are.
_TENSOR: Final = ("shape", "dtype")
#: Boundaries and headers of the parts of one job.
_PART_OVERHEAD: Final = 4096
#: Some clients begin with an empty line. A preamble (RFC 2046, 5.1.1) is for people, who read no latents.
_PREAMBLE_LINES: Final = 2


def most_bytes(gateway: Gateway, *, jobs: int = 1) -> int:
    """The longest body that `jobs` jobs can have."""
    one = gateway.settings.max_latents_bytes + MAX_HEADER_BYTES + 8 + _PART_OVERHEAD
    return jobs * one + gateway.own.max_form_bytes


class SubmitBody:
    """The body of one submit: options first, then latents."""

    def __init__(self, gateway: Gateway, request: web.Request) -> None:
        self._gateway = gateway
        self._request = request
        self._length = length_of(request, most=most_bytes(gateway))

    @property
    def length(self) -> int:
        """How long the body says it is."""
        return self._length

    async def read(self, *, besides: tuple[str, ...] = ()) -> tuple[dict[str, Any], ReadLatents]:
        """Options of the job, and what reads its latents.

        Raises:
            MediaTypeUnsupported: a body of another kind.
            InvalidOption, BadRequest: unreadable options.
        """
        request = self._request
        kind = request.content_type if "Content-Type" in request.headers else ""
        if kind == MULTIPART:
            return await self._multipart(besides)
        if kind not in (SAFETENSORS, RAW):
            raise MediaTypeUnsupported(
                f"the body is {kind or 'of no type'}; {SAFETENSORS}, {RAW} and {MULTIPART} are taken: set Content-Type"
            )
        options = options_of(request.query, besides=(*_TENSOR, *besides))
        tensor = {name: request.query.getall(name) for name in _TENSOR if name in request.query}
        if kind == SAFETENSORS and tensor:
            raise InvalidOption(f"a safetensors file has its own {next(iter(tensor))}: leave it out", field="shape")
        incoming = body_of(request, self._gateway.own)
        if not tensor:
            return options, self._safetensors(incoming, length=self._length)
        if len(tensor) < 2 or len(tensor["dtype"]) > 1:
            raise InvalidOption(
                "raw latents need shape and dtype, once each", field="shape" if "dtype" in tensor else "dtype"
            )
        return options, self._raw(
            incoming, dtype=tensor["dtype"][0], shape=shape_of(tensor["shape"]), length=self._length
        )

    async def _multipart(self, besides: tuple[str, ...]) -> tuple[dict[str, Any], ReadLatents]:
        asked = options_of(self._request.query, besides=besides)
        parts = Parts(self._request, self._gateway)
        part = await parts.next()
        form: dict[str, Any] = {}
        if part is not None and part.name == "options":
            form = _form(await parts.json(part))
            part = await parts.next()
        if part is None or part.name != "latents":
            raise BadRequest("a multipart body has a part `options` (JSON; may be left out), then a part `latents`")
        return asked | options_of_json(form, besides=_TENSOR), parts.latents(part, form)

    def _safetensors(self, incoming: Incoming, *, length: int | None) -> ReadLatents:
        most = self._gateway.settings.max_latents_bytes

        async def read(check: Check) -> TensorFile:
            return await read_safetensors(incoming, length=length, max_bytes=most, check=check)

        return read

    def _raw(self, incoming: Incoming, *, dtype: str, shape: tuple[int, ...], length: int | None) -> ReadLatents:
        most = self._gateway.settings.max_latents_bytes

        async def read(check: Check) -> TensorFile:
            return await read_raw(incoming, dtype=dtype, shape=shape, length=length, max_bytes=most, check=check)

        return read


class _Reader(MultipartReader):
    """aiohttp looks for the first boundary a line at a time, and two million empty lines keep the loop for a second."""

    async def _read_until_first_boundary(self) -> None:
        for _ in range(_PREAMBLE_LINES):
            line = (await self._readline()).rstrip()
            if line in (self._boundary, self._boundary + b"--"):
                self._at_eof = line != self._boundary
                return
        raise ValueError("the body does not begin with its boundary")


class Parts:
    """The parts of a multipart body, in order."""

    def __init__(self, request: web.Request, gateway: Gateway) -> None:
        self._gateway = gateway
        self._pace = Pace(gateway.own)
        try:
            self._reader: AsyncIterator[Any] = _Reader(request.headers, request.content).__aiter__()
        except (ValueError, AssertionError):
            raise BadRequest("the Content-Type has no usable boundary") from None

    async def next(self) -> BodyPartReader | None:
        """The next part; None: there is no more."""
        try:
            part = await self._pace.wait(anext(self._reader))
        except StopAsyncIteration:
            return None
        if not isinstance(part, BodyPartReader):
            raise BadRequest("a part of the body has parts of its own")
        return part

    async def skip(self, part: BodyPartReader) -> None:
        """Reads what is left of a part, to the void."""
        await part_of(part, self._pace).drop()

    async def json(self, part: BodyPartReader) -> object:
        """A part of JSON."""
        most = self._gateway.own.max_form_bytes
        text = await part_of(part, self._pace).exactly(most + 1)
        if len(text) > most:
            raise BodyTooLarge(f"the part `{part.name}` is longer than {most} bytes")
        try:
            return json.loads(text.decode())
        except (ValueError, RecursionError):
            raise BadRequest(f"the part `{part.name}` is not JSON") from None

    def latents(self, part: BodyPartReader, form: dict[str, Any]) -> ReadLatents:
        """What reads a part of latents, which are raw if `form` has their shape."""
        incoming = part_of(part, self._pace)
        most = self._gateway.settings.max_latents_bytes
        raw = _tensor_of(form)

        async def read(check: Check) -> TensorFile:
            if raw is None:
                return await read_safetensors(incoming, length=None, max_bytes=most, check=check)
            dtype, shape = raw
            return await read_raw(incoming, dtype=dtype, shape=shape, length=None, max_bytes=most, check=check)

        return read


def _form(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRequest("the part `options` is not a JSON object")
    return value


def _tensor_of(form: dict[str, Any]) -> tuple[str, tuple[int, ...]] | None:
    if not any(name in form for name in _TENSOR):
        return None
    shape, dtype = form.get("shape"), form.get("dtype")
    if not isinstance(shape, list) or not all(type(size) is int for size in shape) or not isinstance(dtype, str):
        raise InvalidOption("raw latents need shape, a list of sizes, and dtype", field="shape")
    return dtype, shape_of([str(size) for size in shape] or [""])
