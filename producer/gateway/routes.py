"""Every route, as a table: what is served, who handles it, and what the OpenAPI document says of it."""

from __future__ import annotations

from typing import Final

from aiohttp import web

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
)
from producer.gateway.middlewares import OPEN
from producer.gateway.route import Route

_SUBMITTED: Final = {200: schemas.Job, 201: schemas.Job, 202: schemas.Job}
_ON_SUBMIT: Final = (409, 411, 413, 415, 422)
_ANY: Final = "*/*"


def _table() -> tuple[Route, ...]:
    one = "/v1/decodes/{id}"
    return (
        Route(
            method="POST",
            path="/v1/decodes",
            handler=decodes.create,
            summary="Submit latents",
            answers=_SUBMITTED,
            options="all",
            headers=parameters.PREFER,
            body="submit",
            problems=_ON_SUBMIT,
        ),
        Route(
            method="GET",
            path="/v1/decodes",
            handler=decodes.list_jobs,
            summary="List jobs, newest first",
            answers={200: schemas.JobPage},
            query=parameters.LIST,
            problems=(422,),
        ),
        Route(
            method="POST",
            path="/v1/decodes/batch",
            handler=decodes.create_batch,
            summary="Submit several jobs; each is accepted or refused by itself",
            answers={200: schemas.Batch},
            body="batch",
            problems=_ON_SUBMIT,
        ),
        Route(
            method="PUT",
            path=one,
            handler=decodes.put,
            summary="Submit latents under your own id; the same again is the same job",
            answers=_SUBMITTED,
            options="all",
            headers=parameters.PREFER,
            body="submit",
            problems=_ON_SUBMIT,
        ),
        Route(
            method="GET",
            path=one,
            handler=decodes.show,
            summary="Show a job; with `wait`, as soon as it ended",
            answers={200: schemas.Job},
            query=parameters.WAIT,
            problems=(422,),
        ),
        Route(
            method="DELETE",
            path=one,
            handler=decodes.delete,
            summary="Free latents and outputs of a job that ended",
            answers={204: None},
            problems=(409, 422),
        ),
        Route(
            method="POST",
            path=one + "/cancel",
            handler=decodes.cancel,
            summary="Cancel a job: at once while it waits, between two stages while it runs",
            answers={200: schemas.Job, 202: schemas.Job},
            problems=(422,),
        ),
        Route(
            method="POST",
            path=one + "/redecode",
            handler=decodes.redecode,
            summary="Decode the same latents again, as a new job with other options",
            answers={200: schemas.Job, 202: schemas.Job},
            options="again",
            body="redecode",
            problems=(409, 410, 411, 413, 422),
        ),
        Route(
            method="GET",
            path=one + "/events",
            handler=events.events,
            summary="Watch a job: server-sent events, the last one its end",
            answers={200: "text/event-stream"},
            problems=(422,),
        ),
        Route(
            method="GET",
            path=one + "/output",
            handler=outputs.output,
            summary="The first output",
            answers={200: _ANY, 206: _ANY, 304: None},
            headers=parameters.RANGE,
            problems=(409, 410, 416, 422, 502),
        ),
        Route(
            method="GET",
            path=one + "/output/{number}",
            handler=outputs.output,
            summary="An output: one for each item of the batch",
            answers={200: _ANY, 206: _ANY, 304: None},
            headers=parameters.RANGE,
            problems=(409, 410, 416, 422, 502),
        ),
        Route(
            method="GET",
            path="/v1/vaes",
            handler=overview.vaes,
            summary="The VAEs that jobs may name",
            answers={200: schemas.Vaes},
            problems=(422,),
        ),
        Route(
            method="GET",
            path="/v1/queues",
            handler=overview.queues,
            summary="The queues: how much waits, and for how long",
            answers={200: schemas.Queues},
            problems=(422,),
        ),
        Route(
            method="GET",
            path="/v1/workers",
            handler=overview.workers,
            summary="The live workers",
            answers={200: schemas.Workers},
            problems=(422,),
        ),
        Route(
            method="GET",
            path="/v1/overview",
            handler=overview.overview,
            summary="What the status page shows",
            answers={200: schemas.Overview},
            problems=(422,),
        ),
        Route(
            method="GET",
            path="/v1/overview/events",
            handler=overview.overview_events,
            summary="The same, as server-sent events",
            answers={200: "text/event-stream"},
            problems=(422,),
        ),
        Route(
            method="POST",
            path="/decode/{vae}",
            handler=remote_decode.decode,
            summary="Decode as diffusers' remote VAE does",
            answers={200: _ANY, 303: None},
            query=parameters.REMOTE,
            options="remote",
            body="remote",
            problems=(*_ON_SUBMIT, 410, 502),
        ),
        Route(
            method="GET",
            path="/decode/{vae}/jobs/{id}",
            handler=remote_decode.wait_on,
            summary="Where a decode, or an encode, that takes longer is waited for",
            answers={200: _ANY, 303: None},
            query=parameters.WAIT_ON,
            problems=(409, 410, 422, 502),
        ),
        Route(
            method="POST",
            path="/encode/{vae}",
            handler=remote_encode.encode,
            summary="Encode as diffusers' remote VAE does",
            answers={200: _ANY, 303: None},
            query=parameters.REMOTE_ENCODE,
            options="encode",
            body="picture",
            problems=(*_ON_SUBMIT, 410, 502),
        ),
        Route(
            method="POST",
            path="/",
            handler=remote_decode.decode,
            summary="The same, with the VAE of LATENTQ_GATEWAY_DEFAULT_VAE",
            answers={200: _ANY, 303: None},
            query=parameters.REMOTE,
            options="remote",
            body="remote",
            problems=(*_ON_SUBMIT, 410, 502),
        ),
        Route(
            method="GET",
            path="/session",
            handler=session_routes.show,
            summary="Who asks, and the CSRF token of a session",
            answers={200: schemas.Session},
            problems=(422,),
        ),
        Route(
            method="POST",
            path="/session",
            handler=session_routes.begin,
            summary="Log a browser in",
            open=True,
            answers={200: schemas.Session},
            body="token",
            problems=(411, 413, 422),
        ),
        Route(
            method="DELETE",
            path="/session",
            handler=session_routes.end,
            summary="Log a browser out",
            answers={204: None},
            problems=(422,),
        ),
        Route(
            method="GET",
            path="/livez",
            handler=health.livez,
            summary="Whether the gateway runs",
            open=True,
            answers={200: "text/plain"},
        ),
        Route(
            method="GET",
            path="/readyz",
            handler=health.readyz,
            summary="Whether a submit would be taken",
            open=True,
            answers={200: schemas.Readiness, 503: schemas.Readiness},
        ),
        Route(
            method="GET",
            path="/metrics",
            handler=health.metrics,
            summary="Figures for Prometheus",
            answers={200: "text/plain"},
        ),
        Route(
            method="GET",
            path="/openapi.json",
            handler=pages.openapi,
            summary="This document",
            open=True,
            answers={200: "application/json"},
        ),
        Route(method="GET", path="/", handler=pages.status, summary="The status page", open=True, hidden=True),
        Route(method="GET", path="/docs", handler=pages.docs, summary="The API, for people", open=True, hidden=True),
        Route(
            method="GET",
            path="/static/{name}",
            handler=pages.static,
            summary="Files of the pages",
            open=True,
            hidden=True,
        ),
    )


ROUTES: Final = _table()


def add_routes(app: web.Application) -> None:
    """Serves the table."""
    for route in ROUTES:
        if route.open:
            setattr(route.handler, OPEN, True)
        app.router.add_route(route.method, route.path, route.handler)
        if route.method == "GET" and route.answers.get(200) != "text/event-stream":
            app.router.add_route("HEAD", route.path, route.handler)
