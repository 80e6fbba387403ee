"""`/v1/decodes/{id}/output/{n}`: the encoded pictures, clips and tensors of a job, whole or in ranges."""

from __future__ import annotations

from aiohttp import web

from broker_config.errors import JobNotFound, RangeNotSatisfiable
from producer.gateway import jobs
from producer.gateway.byte_ranges import byte_range
from producer.gateway.error_responses import problem_response
from producer.gateway.query import only
from producer.gateway.streams import send_bytes, send_head
from producer.job_handle import finished_result


async def output(request: web.Request) -> web.StreamResponse:
    """The bytes of one output. Its ETag is the digest that every read checks them against, so it never changes."""
    gateway, identity = jobs.context(request)
    only(request.query)
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
        "Cache-Control": "private, max-age=3600, immutable",
        "Content-Disposition": f'inline; filename="{identity.shown(job.job_id)}-{number}.{artifact.extension}"',
        "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; media-src 'self'; sandbox",
    }
    if _matches(request.headers.get("If-None-Match"), etag):
        return web.Response(status=304, headers={"ETag": etag, "Cache-Control": headers["Cache-Control"]})
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
    data = await gateway.client.transfer(gateway.client.blobs.get, artifact.blob)
    patience_s = gateway.own.patience_s
    if wanted is None:
        return await send_bytes(request, data, headers=headers, patience_s=patience_s)
    first, end = wanted
    headers["Content-Range"] = f"bytes {first}-{end - 1}/{size}"
    return await send_bytes(request, memoryview(data)[first:end], headers=headers, patience_s=patience_s, status=206)


def _matches(header: str | None, etag: str) -> bool:
    if header is None:
        return False
    return header.strip() == "*" or etag in (item.strip().removeprefix("W/") for item in header.split(","))
