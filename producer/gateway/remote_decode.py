"""`POST /decode/{vae}`: what `diffusers.utils.remote_decode` speaks, served from the queue.

The protocol is that of diffusers 0.42 `utils/remote_utils.py` (`prepare_decode`, `postprocess_decode`), checked with
the unmodified client: everything about the latents is in the query, the body is their bytes, and the form of the
answer follows from `output_type` and Accept. The looser requests of SD.Next (`modules/vae/sd_vae_remote.py`) and
ComfyUI-HFRemoteVae (`nodes.py`) are taken, too. A job is made of each request. The answer waits for it; past a bound
it is 303 to a URL that waits on, which the client follows, up to 30 times.
"""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import urlencode

from aiohttp import web
from multidict import MultiMapping

from broker_config.errors import BadRequest, InvalidOption, MediaTypeUnsupported, WaitTimeout
from broker_config.job_record import JobSnapshot
from broker_config.latent_geometry import LatentState
from producer.gateway import jobs
from producer.gateway.api_keys import Scope
from producer.gateway.context import Gateway
from producer.gateway.decodes import waited
from producer.gateway.identity import Identity
from producer.gateway.latents_input import Check, read_base64, read_raw, shape_of
from producer.gateway.query import OPTIONS, options_of, read, whole
from producer.gateway.remote_replies import REPLIES, Reply, make_reply
from producer.gateway.streams import send_bytes
from producer.gateway.submit_bodies import most_bytes
from producer.gateway.uploads import Incoming, body_of, length_of
from producer.job_handle import finished_result
from producer.tensor_input import TensorFile

BINARY: Final = "tensor/binary"
BASE64: Final = "tensor/base64"
#: requests gives up after 30 redirects; the last of ours is an answer it can show.
_MOST_HOPS: Final = 28
#: What the protocol has besides options of a job. `do_scaling` and the factors are read here.
_PROTOCOL: Final = (
    "image_format", "output_type", "partial_postprocess", "shape", "dtype", "do_scaling", "input_tensor_type",
    "output_tensor_type", "height", "width", "scaling_factor", "shift_factor", "frames",
)  # fmt: skip
#: Options that follow from the request and cannot be given besides.
_OURS: Final = ("vae", "output")


async def decode(request: web.Request) -> web.StreamResponse:
    """Decodes and answers as the remote-VAE service did."""
    gateway, identity = at_the_door(request)
    vae = _vae(gateway, request)
    query = request.query
    reply = _reply(request)
    length = length_of(request, most=most_bytes(gateway) * 4 // 3)
    with gateway.uploads.admitted(identity, length):
        incoming = body_of(request, gateway.own)
        if "shape" not in query:
            raise InvalidOption("Expected `shape` in query params.", field="shape")
        if len(query.getall("dtype", ())) != 1:
            raise InvalidOption("Expected `dtype` in query params.", field="dtype")
        shape, dtype = shape_of(query.getall("shape")), query["dtype"]
        options = with_retention(gateway, _options(query, rank=len(shape))) | {
            "vae": vae,
            "output": reply.output(len(shape)),
        }
        read_latents = _reader(gateway, request, incoming, dtype=dtype, shape=shape, length=length)
        job, _ = await jobs.submit(gateway, identity, read_latents, options)
    return await answer(gateway, identity, request, job, reply=reply, vae=vae, hop=0)


def at_the_door(request: web.Request) -> tuple[Gateway, Identity]:
    """What a handler of the protocol works with: someone who may submit, and see what becomes of it.

    Raises:
        NotAllowed: one of both is missing; nothing was read.
    """
    gateway, identity = jobs.context(request)
    for scope in (Scope.SUBMIT, Scope.READ):
        identity.require(scope)
    return gateway, identity


async def wait_on(request: web.Request) -> web.StreamResponse:
    """Where a decode, or an encode, that takes longer is waited for."""
    gateway, identity = jobs.context(request)
    form = request.query.get("form", "image")
    if form not in REPLIES:
        raise InvalidOption(f"form is {form[:40]!r}, expected one of {', '.join(REPLIES)}", field="form")
    hop = read("hop", request.query.get("hop", "1"), whole, "a whole number")
    reply = Reply(form=form, base64=request.query.get("base64") == "1", image=request.query.get("image", "png"))
    job = await jobs.find(gateway, identity, request.match_info["id"])
    if job.request is not None and not reply.is_of(job.request.output):
        raise InvalidOption(f"form is {form!r}, but the job makes {job.request.output}", field="form")
    return await answer(gateway, identity, request, job, reply=reply, vae=job.vae, hop=hop)


async def answer(
    gateway: Gateway,
    identity: Identity,
    request: web.Request,
    job: JobSnapshot,
    *,
    reply: Reply,
    vae: str,
    hop: int,
) -> web.StreamResponse:
    """What a job has become, or where to wait on."""
    if not job.status.is_terminal:
        job = await waited(request, job, gateway.own.wait_s)
    name = identity.shown(job.job_id)
    if not job.status.is_terminal:
        if hop >= _MOST_HOPS:
            raise WaitTimeout(f"job {name} did not finish in time; it goes on: GET /v1/decodes/{name}", job_id=name)
        query = {"form": reply.form, "image": reply.image, "base64": int(reply.base64), "hop": hop + 1}
        url = f"/decode/{vae}/jobs/{name}?{urlencode(query)}"
        return web.Response(status=303, headers={"Location": url, "Cache-Control": "no-store"})
    result = finished_result(job)
    with gateway.downloads.admitted(identity, reply.held_bytes(result)):
        made = await gateway.client.transfer(make_reply, reply, result, gateway.client.blobs, is_clip=_is_clip(job))
        headers = {"Cache-Control": "no-store", "X-Latentq-Job": name, **made.headers}
        return await send_bytes(request, made.body, headers=headers, patience_s=gateway.own.patience_s)


def _is_clip(job: JobSnapshot) -> bool:
    return job.request is not None and len(job.request.shape) == 5


def _vae(gateway: Gateway, request: web.Request) -> str:
    vae = request.match_info.get("vae") or gateway.own.default_vae
    if vae is None:
        raise InvalidOption("POST / needs LATENTQ_GATEWAY_DEFAULT_VAE; POST /decode/VAE does not", field="vae")
    return gateway.client.catalog[vae].name


def _reply(request: web.Request) -> Reply:
    """The form of the answer (`prepare_decode`: Accept says what `output_type` alone does not)."""
    query = request.query
    output_type = query.get("output_type", "pil")
    accept = request.headers.get("Accept", "*/*").partition(";")[0].partition(",")[0].strip().lower()
    partial = "partial_postprocess" in query and _said("partial_postprocess", query["partial_postprocess"])
    image = {"image/jpeg": "jpg", "image/png": "png", "image/webp": "webp"}.get(accept)
    if image is None:
        image = query.get("image_format", "jpg")
        if image not in ("jpg", "jpeg", "png", "webp"):
            raise InvalidOption(f"image_format is {image[:40]!r}, expected jpg or png", field="image_format")
        image = "jpg" if image == "jpeg" else image
    encoded = accept == BASE64 or query.get("output_tensor_type") == "base64"
    if output_type == "mp4":
        form = "mp4"
    elif output_type == "pt":
        form = "pixels" if partial else "tensor"
    elif output_type == "pil":
        form = "unit" if accept in (BINARY, BASE64) else "image"
    else:
        raise InvalidOption(f"output_type is {output_type[:40]!r}, expected pil, pt or mp4", field="output_type")
    return Reply(form=form, base64=encoded and form in ("unit", "tensor", "pixels"), image=image)


def _options(query: MultiMapping[str], *, rank: int) -> dict[str, Any]:
    """Options of the job. Only packed latents need their size; others say it, and clients send it all the same."""
    options = options_of(query, besides=(*_PROTOCOL, *_OURS), ignore_unknown=True)
    numbers = ("height", "width") if rank == 3 else ()
    for name in numbers:
        if name in query:
            options[name] = read(name, query[name], whole, "a whole number")
    if "frames" in query:
        options["num_frames"] = read("frames", query["frames"], whole, "a whole number")
    return options | _scaling(query)


def _scaling(query: MultiMapping[str]) -> dict[str, Any]:
    """Factors of the job; none of them: the VAE's own.

    The service's rule: a scaling factor that is given divides, a shift factor that is given is added, `do_scaling=True`
    stands for the VAE's own, and nothing at all for latents that are scaled already. SD.Next, which never sends
    `do_scaling` and has factors only while a VAE is loaded there, means the VAE's own; it is known by a parameter that
    diffusers does not send. Nothing is undone of statistics either, but where a VAE mixes noise in: it does so before.
    """
    given = factors_of(query)
    says = "do_scaling" in query and _said("do_scaling", query["do_scaling"])
    sd_next = "do_scaling" not in query and "input_tensor_type" in query
    if "scaling_factor" not in given and (says or (sd_next and not given)):
        return given
    if not given and "state" in query:
        return {}
    if not given and "decode_timestep" not in query:
        return {"state": str(LatentState.DENORMALISED)}
    return {"scaling_factor": given.get("scaling_factor", 1.0), "shift_factor": given.get("shift_factor", 0.0)}


def with_retention(gateway: Gateway, options: dict[str, Any]) -> dict[str, Any]:
    """Options of the job, and how long it stays: shortly, unless a webhook says that it is fetched later."""
    return options if "webhook" in options else options | {"retention_s": gateway.own.remote_retention_s}


def factors_of(query: MultiMapping[str]) -> dict[str, float]:
    """The factors that are given."""
    names = [name for name in ("scaling_factor", "shift_factor") if name in query]
    return {name: read(name, query[name], float, "a number") for name in names}


def _said(name: str, text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "none"):
        raise InvalidOption(f"{name} is {text[:40]!r}, expected True or False", field=name)
    return text.lower() in ("true", "1")


def _reader(
    gateway: Gateway, request: web.Request, incoming: Incoming, *, dtype: str, shape: tuple[int, ...], length: int
) -> jobs.ReadLatents:
    kind = request.headers.get("Content-Type", BINARY).partition(";")[0].strip().lower()
    if kind not in (BINARY, BASE64, "application/octet-stream"):
        raise MediaTypeUnsupported(f"the body is {kind[:80]!r}; {BINARY} and {BASE64} are taken")
    if length == 0:
        raise BadRequest("the body is empty: it is the latents' bytes")
    most = gateway.settings.max_latents_bytes
    how = read_base64 if kind == BASE64 else read_raw

    async def read_latents(check: Check) -> TensorFile:
        return await how(incoming, dtype=dtype, shape=shape, length=length, max_bytes=most, check=check)

    return read_latents


assert set(_OURS) <= set(OPTIONS)
