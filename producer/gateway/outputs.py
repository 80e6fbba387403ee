"""`/v1/decodes/{id}/output/{n}`: the encoded pictures, clips and tensors of a job, whole or in ranges."""

from __future__ import annotations

from aiohttp import web

from broker_config.errors import JobNotFound, RangeNotSatisfiable
from broker_config.link_signing import EXPIRES, SIGNATURE
from producer.gateway import jobs
from producer.gateway.byte_ranges import byte_range
from producer.gateway.error_responses import problem_response
from producer.gateway.query import only
from producer.gateway.streams import send_bytes, send_head
from producer.job_handle import finished_result


async def output(request: web.Request) -> web.StreamResponse:
    """The bytes of one output. Its ETag is the digest that they are checked against, unless a range of them is read."""
    gateway, identity = jobs.context(request)
    linked = identity.via == "link"
    only(request.query, *((EXPIRES, SIGNATURE) if linked else ()))
    name = request.match_info["id"]
    number = request.match_info.get("number", "0")
    job = await jobs.find(gateway, identity, name)
    artifacts = finished_result(job).artifacts
    if not (number.isascii() and number.isdigit() and len(number) < 7 and int(number) < len(artifacts)):
        raise JobNotFound(f"job {name} has {len(artifacts)} outputs, no output {number[:20]!r}", job_id=name)
    artifact = artifacts[int(number)]
    etag = f'"{artifact.blob.sha256}"'
    headers = {
        "Content-Type": artifact.content_type,
        "ETag": etag,
        "Accept-Ranges": "bytes",
        # Two keys may have two pictures under one URL, in one browser: it asks again, which costs a 304.
        "Cache-Control": "private, no-cache",
        "Vary": "Authorization, Cookie",
        "Content-Disposition": f'inline; filename="{identity.shown(job.job_id)}-{number}.{artifact.extension}"',
        "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; media-src 'self'; sandbox",
    }
    if linked:
        headers["Cross-Origin-Resource-Policy"] = "cross-origin"
    if _matches(request.headers.get("If-None-Match"), etag):
        return web.Response(status=304, headers={name: headers[name] for name in ("ETag", "Cache-Control", "Vary")})
    size = artifact.blob.size_bytes
    if request.method == "HEAD":
        return await send_head(request, size, headers=headers)
    wanted = None
    if request.headers.get("If-Range", etag) == etag:
        try:
            wanted = byte_range(request.headers.get("Range"), size)
        except RangeNotSatisfiable as error:
            refusal = problem_response(error, request)
            refusal.headers["Content-Range"] = f"bytes */{size}"
            return refusal
    blobs, patience_s = gateway.client.blobs, gateway.own.patience_s
    first, end = wanted or (0, size)
    with gateway.downloads.admitted(identity, end - first):
        if wanted is None:
            data = await gateway.client.transfer(blobs.get, artifact.blob)
            return await send_bytes(request, data, headers=headers, patience_s=patience_s)
        data = await gateway.client.transfer(blobs.get_span, artifact.blob, wanted)
        headers["Content-Range"] = f"bytes {first}-{end - 1}/{size}"
        return await send_bytes(request, data, headers=headers, patience_s=patience_s, status=206)


def _matches(header: str | None, etag: str) -> bool:
    if header is None:
        return False
    return header.strip() == "*" or etag in (item.strip().removeprefix("W/") for item in header.split(","))
