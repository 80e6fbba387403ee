"""The message of a delivery: `{type, timestamp, data}` with the job's object, under 20 kB whatever the job is.

`data` is the object that `GET /v1/decodes/ID` answers, with `status` as of the event, absolute URLs, and links to the
outputs that need no key. What makes it too long is left out, the least useful first, and `data.left_out` says so.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from broker_config.job_document import job_document, moment_text
from broker_config.job_record import JobSnapshot
from broker_config.scoped_ids import key_of, shown_to
from broker_config.webhook_outbox import DueDelivery
from broker_config.webhooks import WebhookEvent

#: What Standard Webhooks asks to stay below, with room for what a proxy may add.
MAX_BYTES: Final = 20_000
#: Fields of the job's object that can be left out when it is too long, in this order.
_EXPENDABLE: Final = ("decoded_by", "metadata", "errors", "timings_s")


def message_of(
    due: DueDelivery,
    job: JobSnapshot | None,
    *,
    public_url: str,
    links: Sequence[str] = (),
    read: Callable[[int], bytes | None] = lambda number: None,
) -> str:
    """The body of a delivery.

    Args:
        due: which event.
        job: as it stands; None: it is forgotten, or there was none (`ping`).
        public_url: where the gateway is reached.
        links: one for each output.
        read: bytes of an output, by number; None: they cannot be had now. Asked only for what may travel along.
    """
    if due.event is WebhookEvent.PING:
        return _written(due, {"id": due.id})
    data = _job(due, job, public_url=public_url, links=links)
    left_out: list[str] = []
    for field in _EXPENDABLE:
        if len(_written(due, data).encode()) < MAX_BYTES:
            break
        if data.get(field):
            data[field] = type(data[field])()
            left_out.append(field)
            data["left_out"] = left_out
    if len(_written(due, data).encode()) >= MAX_BYTES:
        _shorten_outputs(due, data, [*left_out, "outputs"])
    if due.inline and job is not None and job.result is not None:
        sizes = [artifact.blob.size_bytes for artifact in job.result.artifacts]
        _add_inline(due, data["outputs"], sizes, read, written=lambda: _written(due, data))
    return _written(due, data)


def _written(due: DueDelivery, data: Mapping[str, Any]) -> str:
    at = moment_text(datetime.fromtimestamp(due.at_ms / 1000, UTC))
    return json.dumps(
        {"type": due.event.message_type, "timestamp": at, "data": data}, separators=(",", ":"), ensure_ascii=False
    )


def _job(due: DueDelivery, job: JobSnapshot | None, *, public_url: str, links: Sequence[str]) -> dict[str, Any]:
    key_id = key_of(due.job_id)
    if job is None:
        return {"id": shown_to(key_id, due.job_id), "status": _status(due.event), "outputs": []}
    base = public_url.rstrip("/")
    data = job_document(job, shown=lambda job_id: shown_to(key_id, job_id)).model_dump(mode="json")
    data["status"] = _status(due.event)
    data["urls"] = {name: base + path for name, path in data["urls"].items()}
    for output, link in zip(data["outputs"], links, strict=True):
        output["url"] = link
    if due.event is WebhookEvent.PROGRESS:
        data["progress"] = {"done": due.progress_done, "total": due.progress_total}
    return data


def _status(event: WebhookEvent) -> str:
    """The state that an event is of: the job may be further on when it is delivered."""
    return str(WebhookEvent.PROCESSING if event is WebhookEvent.PROGRESS else event)


def _shorten_outputs(due: DueDelivery, data: dict[str, Any], left_out: list[str]) -> None:
    """Keeps as many outputs as fit; `urls.self` has them all."""
    outputs = data["outputs"]
    data["left_out"] = left_out
    fits, too_many = 0, len(outputs)
    while fits + 1 < too_many:
        middle = (fits + too_many) // 2
        data["outputs"] = outputs[:middle]
        if len(_written(due, data).encode()) < MAX_BYTES:
            fits = middle
        else:
            too_many = middle
    data["outputs"] = outputs[:fits]


def _add_inline(
    due: DueDelivery,
    outputs: list[dict[str, Any]],
    sizes: Sequence[int],
    read: Callable[[int], bytes | None],
    *,
    written: Callable[[], str],
) -> None:
    """Puts bytes of outputs into the message, as long as they fit."""
    room = MAX_BYTES - len(written().encode())
    for number, (output, size) in enumerate(zip(outputs, sizes, strict=False)):
        needed = 4 * ((size + 2) // 3) + len(',"inline":""')
        if needed >= room:
            continue
        content = read(number)
        if content is not None:
            output["inline"] = base64.b64encode(content).decode()
            room -= needed
