"""`POST /encode/{vae}`: what `diffusers.utils.remote_encode` speaks, served from the queue.

The protocol is that of diffusers 0.42 `utils/remote_utils.py` (`prepare_encode`, `postprocess_encode`). A picture comes
as a PNG without a word about it; a tensor as the bytes that `vae.encode` takes, its shape and dtype in the query. The
answer is the latents' bytes, with their shape and dtype in headers. Neither client nor documents say whether the
latents are the posterior's mean or a sample: they are the mean, with `seed` in the query a sample.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Final

from aiohttp import web
from multidict import MultiMapping

from broker_config.errors import BadRequest, InvalidOption
from broker_config.latent_geometry import LatentLayout, LatentState
from broker_config.vae_catalog import VaeEntry
from producer.gateway import jobs
from producer.gateway.context import Gateway
from producer.gateway.latents_input import Check, read_raw, shape_of
from producer.gateway.picture_input import bytes_to_read, kind_of, peek_picture, read_picture
from producer.gateway.query import options_of
from producer.gateway.remote_decode import answer, at_the_door, factors_of, with_retention
from producer.gateway.remote_replies import Reply
from producer.gateway.submit_bodies import most_bytes
from producer.gateway.uploads import Incoming, body_of, joined, length_of
from producer.pixel_input import NAME
from producer.tensor_input import TensorFile

#: What the protocol has besides options of a job, and the option that the path has.
_PROTOCOL: Final = ("shape", "dtype", "scaling_factor", "shift_factor", "vae")
#: Bytes that tell one format from another.
_MAGIC_BYTES: Final = 16


async def encode(request: web.Request) -> web.StreamResponse:
    """Encodes and answers as the remote-VAE service did."""
    gateway, identity = at_the_door(request)
    entry = gateway.client.catalog[request.match_info["vae"]]
    length = length_of(request, most=most_bytes(gateway))
    with contextlib.ExitStack() as stack:
        stack.enter_context(gateway.uploads.admitted(identity, length))
        if length == 0:
            raise BadRequest("the body is empty: it is a picture, or a tensor's bytes")
        incoming = body_of(request, gateway.own)
        options = with_retention(gateway, _options(request.query, entry)) | {"vae": entry.name}

        def room(size_bytes: int) -> None:
            stack.enter_context(gateway.uploads.enlarged(identity, size_bytes))

        read = _reader(gateway, request.query, incoming, length=length, room=room)
        job, _ = await jobs.submit(gateway, identity, read, options, begin=gateway.client.blocking.encode_attempt)
    return await answer(gateway, identity, request, job, reply=Reply(form="tensor"), vae=entry.name, hop=0)


def _options(query: MultiMapping[str], entry: VaeEntry) -> dict[str, Any]:
    """Options of the job. Latents are as the VAE makes them, never packed, unless the query has a layout."""
    options = options_of(query, besides=_PROTOCOL, ignore_unknown=True)
    if "layout" not in options and {LatentLayout.UNPACKED, LatentLayout.PACKED} & set(entry.layouts):
        options["layout"] = str(LatentLayout.UNPACKED)
    return options | _scaling(query, entry)


def _scaling(query: MultiMapping[str], entry: VaeEntry) -> dict[str, Any]:
    """Factors and state of the job: `(z - shift_factor) · scaling_factor` with those given; with none of them nothing.

    A `state` in the query stands for the VAE's own normalisation, with its own factors or those given.
    """
    given = factors_of(query)
    if "state" in query:
        return dict(given)
    if not given:
        return {"state": str(LatentState.DENORMALISED)}
    own = entry.state_of(LatentLayout(entry.layouts[0]))
    if not own.takes_factors:
        name = next(iter(given))
        raise InvalidOption(
            f"{name} is given, but {entry.name}'s latents are {own}: leave the factors out for latents as the VAE "
            "makes them, or give `state` for those that its pipeline works on",
            field=name,
        )
    # The other scaled states know no shift.
    return {"state": str(LatentState.SCALED), "scaling_factor": 1.0, "shift_factor": 0.0} | given


def _reader(
    gateway: Gateway, query: MultiMapping[str], incoming: Incoming, *, length: int, room: Callable[[int], None]
) -> jobs.ReadLatents:
    if "shape" not in query and "dtype" not in query:
        return _picture_reader(gateway, incoming, length=length, room=room)
    for name in ("shape", "dtype"):
        if name not in query or (name == "dtype" and len(query.getall(name)) > 1):
            raise InvalidOption(f"Expected `{name}` in query params, since the body is a tensor.", field=name)
    shape, dtype = shape_of(query.getall("shape")), query["dtype"]
    most = gateway.settings.max_latents_bytes

    async def read(check: Check) -> TensorFile:
        return await read_raw(incoming, dtype=dtype, shape=shape, length=length, max_bytes=most, check=check, name=NAME)

    return read


def _picture_reader(
    gateway: Gateway, incoming: Incoming, *, length: int, room: Callable[[int], None]
) -> jobs.ReadLatents:
    async def read(check: Check) -> TensorFile:
        head = await incoming.exactly(min(length, _MAGIC_BYTES))
        kind = kind_of(head)
        pieces = [head, *await incoming.pieces(length - len(head))]
        data = await gateway.client.transfer(joined, pieces)
        announced = await gateway.client.transfer(peek_picture, data, kind=kind)
        check(announced)
        room(bytes_to_read(announced, kind=kind))
        return await gateway.client.transfer(read_picture, data, kind=kind)

    return read
