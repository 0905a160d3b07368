"""`/v1/process`: what one process says of itself alone, to the others of its router and to operators. A thin shell."""

from fastapi import FastAPI
from starlette.responses import Response

from kvcore.telemetry import METRICS_CONTENT_TYPE
from router.api import openapi
from router.api.responses import JsonReply
from router.processes.reports import OWN
from router.processes.view import RouterView


def add_own(app: FastAPI, view: RouterView) -> None:
    """The routes, to a router's application."""

    @app.get(OWN, **openapi.plain("Requests and cache of the process that is asked"))
    async def own() -> Response:
        return JsonReply(view.own())

    @app.get(f"{OWN}/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(view.own_metrics(), media_type=METRICS_CONTENT_TYPE)

    @app.get(f"{OWN}/requests", **openapi.plain("The last requests of the process that is asked"))
    async def requests() -> Response:
        return JsonReply(view.own_records())

    @app.get(f"{OWN}/requests/{{request_id}}", **openapi.plain("One request, if this process had it"))
    async def one(request_id: str) -> Response:
        return JsonReply(view.own_records(request_id))
