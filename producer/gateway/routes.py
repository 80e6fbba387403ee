"""Every route, as a table: what is served, who handles it, and what the OpenAPI document says of it."""

from __future__ import annotations

from typing import Any, Final

from aiohttp import web

from broker_config.job_document import Job
from producer.gateway import (
    decodes,
    events,
    health,
    outputs,
    overview,
    pages,
    parameters,
    remote_decode,
    remote_encode,
    schemas,
    session_routes,
    webhooks,
)
from producer.gateway.middlewares import LINKED, OPEN
from producer.gateway.route import Handler, Route

_SUBMIT: Final = {
    "answers": {200: Job, 201: Job, 202: Job},
    "options": "all",
    "headers": parameters.PREFER,
    "body": "submit",
}
_ON_SUBMIT: Final = (409, 411, 413, 415, 422)
#: Of whatever has a body, unless it says otherwise.
_OF_A_BODY: Final = (411, 413, 422)
_ANY: Final = "*/*"
_OUTPUT: Final = {
    "answers": {200: _ANY, 206: _ANY, 304: None},
    "headers": parameters.RANGE,
    "query": parameters.LINK,
    "linked": True,
    "problems": (409, 410, 416, 422, 502),
}
_REMOTE: Final = {
    "answers": {200: _ANY, 303: None},
    "query": parameters.REMOTE,
    "options": "remote",
    "body": "remote",
    "problems": (*_ON_SUBMIT, 410, 502),
}
_PAGE: Final = {"open": True, "hidden": True, "problems": ()}


def _route(at: str, handler: Handler, summary: str, *answer: Any, **more: Any) -> Route:
    """A row. `at`: method and path; `answer`: of status 200, where `answers` does not say all of them."""
    method, path = at.split()
    answers = {"answers": {200: answer[0]}} if answer else {}
    problems = _OF_A_BODY if "body" in more else (422,)
    return Route(method=method, path=path, handler=handler, summary=summary, **{"problems": problems} | answers | more)


ROUTES: Final = (
    _route("POST /v1/decodes", decodes.create, "Submit latents", **_SUBMIT, problems=_ON_SUBMIT),
    _route("GET /v1/decodes", decodes.list_jobs, "List jobs, newest first", schemas.JobPage, query=parameters.LIST),
    _route(
        "POST /v1/decodes/batch",
        decodes.create_batch,
        "Submit several jobs; each is accepted or refused by itself",
        schemas.Batch,
        body="batch",
        problems=_ON_SUBMIT,
    ),
    _route(
        "PUT /v1/decodes/{id}",
        decodes.put,
        "Submit latents under your own id; the same again is the same job",
        **_SUBMIT,
        problems=_ON_SUBMIT,
    ),
    _route(
        "GET /v1/decodes/{id}",
        decodes.show,
        "Show a job; with `wait`, as soon as it ended",
        Job,
        query=parameters.WAIT,
    ),
    _route(
        "DELETE /v1/decodes/{id}",
        decodes.delete,
        "Free latents and outputs of a job that ended",
        answers={204: None},
        problems=(409, 422),
    ),
    _route(
        "POST /v1/decodes/{id}/cancel",
        decodes.cancel,
        "Cancel a job: at once while it waits, between two stages while it runs",
        answers={200: Job, 202: Job},
    ),
    _route(
        "POST /v1/decodes/{id}/redecode",
        decodes.redecode,
        "Decode the same latents again, as a new job with other options",
        answers={200: Job, 202: Job},
        options="again",
        body="redecode",
        problems=(409, 410, *_OF_A_BODY),
    ),
    _route(
        "GET /v1/decodes/{id}/events",
        events.events,
        "Watch a job: server-sent events, the last one its end",
        parameters.EVENTS,
    ),
    _route("GET /v1/decodes/{id}/output", outputs.output, "The first output", **_OUTPUT),
    _route(
        "GET /v1/decodes/{id}/output/{number}",
        outputs.output,
        "An output: one for each item of the batch",
        **_OUTPUT,
    ),
    _route("GET /v1/vaes", overview.vaes, "The VAEs that jobs may name", schemas.Vaes),
    _route("GET /v1/queues", overview.queues, "The queues: how much waits, and for how long", schemas.Queues),
    _route("GET /v1/workers", overview.workers, "The live workers", schemas.Workers),
    _route("GET /v1/overview", overview.overview, "What the status page shows", schemas.Overview),
    _route("GET /v1/overview/events", overview.overview_events, "The same, as server-sent events", parameters.EVENTS),
    _route(
        "GET /v1/webhooks",
        webhooks.list_deliveries,
        "List webhooks that were given up, the last one first, or those on their way",
        schemas.DeliveryPage,
        query=parameters.DELIVERIES,
    ),
    _route("GET /v1/webhooks/{delivery}", webhooks.show, "Show a webhook, with every attempt", schemas.Delivery),
    _route(
        "POST /v1/webhooks/{delivery}/redeliver",
        webhooks.redeliver,
        "Send a webhook again, at once, under its id",
        answers={200: schemas.Delivery, 202: schemas.Delivery},
    ),
    _route(
        "POST /v1/webhooks/{delivery}/enable",
        webhooks.enable,
        "Let webhooks go to its endpoint again, which answered 410",
        schemas.Delivery,
    ),
    _route(
        "POST /v1/webhooks/ping",
        webhooks.ping,
        "Send a message of type `ping` to a URL, once",
        answers={202: schemas.Delivery},
        body="ping",
    ),
    _route(
        "GET /v1/webhook-secrets",
        webhooks.list_secrets,
        "List the secrets that sign your webhooks, without the secrets",
        schemas.WebhookSecrets,
    ),
    _route(
        "POST /v1/webhook-secrets",
        webhooks.add_secret,
        "Add a secret of yours; those before it go on signing for a while",
        answers={201: schemas.WebhookSecret},
        body="secret",
    ),
    _route(
        "DELETE /v1/webhook-secrets/{secret}",
        webhooks.remove_secret,
        "End a secret at once",
        answers={204: None},
    ),
    _route("POST /decode/{vae}", remote_decode.decode, "Decode as diffusers' remote VAE does", **_REMOTE),
    _route(
        "GET /decode/{vae}/jobs/{id}",
        remote_decode.wait_on,
        "Where a decode, or an encode, that takes longer is waited for",
        answers={200: _ANY, 303: None},
        query=parameters.WAIT_ON,
        problems=(409, 410, 422, 502),
    ),
    _route(
        "POST /encode/{vae}",
        remote_encode.encode,
        "Encode as diffusers' remote VAE does",
        **_REMOTE | {"query": parameters.REMOTE_ENCODE, "options": "encode", "body": "picture"},
    ),
    _route("POST /", remote_decode.decode, "The same, with the VAE of LATENTQ_GATEWAY_DEFAULT_VAE", **_REMOTE),
    _route("GET /session", session_routes.show, "Who asks, and the CSRF token of a session", schemas.Session),
    _route(
        "POST /session",
        session_routes.begin,
        "Log a browser in",
        schemas.Session,
        open=True,
        body="token",
    ),
    _route("DELETE /session", session_routes.end, "Log a browser out", answers={204: None}),
    _route("GET /livez", health.livez, "Whether the gateway runs", "text/plain", open=True, problems=()),
    _route(
        "GET /readyz",
        health.readyz,
        "Whether a submit would be taken",
        answers={200: schemas.Readiness, 503: schemas.Readiness},
        open=True,
        problems=(),
    ),
    _route("GET /metrics", health.metrics, "Figures for Prometheus", "text/plain", problems=()),
    _route("GET /openapi.json", pages.openapi, "This document", "application/json", open=True, problems=()),
    _route("GET /", pages.status, "The status page", **_PAGE),
    _route("GET /docs", pages.docs, "The API, for people", **_PAGE),
    _route("GET /static/{name}", pages.static, "Files of the pages", **_PAGE),
)


def add_routes(app: web.Application) -> None:
    """Serves the table."""
    for route in ROUTES:
        for flag, is_set in ((OPEN, route.open), (LINKED, route.linked)):
            if is_set:
                setattr(route.handler, flag, True)
        app.router.add_route(route.method, route.path, route.handler)
        if route.method == "GET" and route.answers.get(200) != parameters.EVENTS:
            app.router.add_route("HEAD", route.path, route.handler)
