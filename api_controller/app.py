"""The service: `uvicorn api_controller.app:app`.

Everything that waits or computes runs in a small pool of threads, so the event loop stays free; when the pool's queue is full the
answer is 503 at once, not later.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

gc.disable()  # what is imported stays: to go through it over and over meanwhile takes a good part of the start
# ruff: noqa: E402

import torch
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from fastapi.routing import iter_route_contexts
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api_controller import experiments, goods, impressions, lists, releases, rules, shoppers
from api_controller.access import ADMIN, OPEN, told_to_listen
from api_controller.limits import BodyLimit
from api_controller.metrics import exposition, make_folder
from api_controller.refusals import ANY, invalid
from api_controller.schemas import Health
from api_controller.service import Service, ServiceDep
from catalog import Event, RawProduct
from release import Release
from settings import ServiceSettings

gc.freeze()
gc.enable()

log = logging.getLogger("styletower")
settings = ServiceSettings()
make_folder()


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    torch.set_num_threads(1)  # two threads beside another busy process make a 1.5 ms forward take 10 to 48
    service = Service(settings)
    app.state.service = service
    service.access.notice([told_to_listen(sys.argv, os.environ)])
    gc.disable()  # likewise
    list(iter_route_contexts(app.routes))  # FastAPI would put each part of the API together when it is first asked
    service.problem = service.check()  # before the first request: whatever it waits for, nobody waits behind it
    gc.enable()
    if service.problem:
        log.warning("not ready: %s", service.problem)
    service.access.refresh(service.store)
    tasks = [asyncio.create_task(task) for task in (service.keep_current(), service.watch_keys(), service.tidy())]
    yield
    for task in tasks:
        task.cancel()
    service.close()


class DescribedApi(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """FastAPI's description, and the rows that rows.py reads one by one, of which FastAPI does not know."""
        described = super().openapi()
        described["components"]["schemas"] |= {
            model.__name__: model.model_json_schema() for model in (Event, RawProduct)
        }
        return described


# A model has one form here, read or written: with two of each name, generators of clients give up on both.
app = DescribedApi(title="StyleTower", version="0.1.0", lifespan=lifespan, separate_input_output_schemas=False)
app.add_middleware(BodyLimit)


class Account:
    """ASGI middleware that counts and logs each request; an unexpected error is a 500 with an id to look for in the log, never a
    trace."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        service: Service = scope["app"].state.service
        request_id = request.headers.get("x-request-id", "")[:64] or uuid.uuid4().hex[:12]
        started = time.perf_counter()
        service.access.notice_request(scope)
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, answer)
        except Exception:
            log.exception("request %s failed", request_id)
            if not status:  # nothing was sent yet
                refusal = JSONResponse({"detail": "internal error", "request_id": request_id}, status_code=500)
                await refusal(scope, receive, answer)
        route = getattr(scope.get("route"), "path", "unknown")
        service.requests.labels(route, status).inc()
        milliseconds = 1000 * (time.perf_counter() - started)
        log.info("%s %s %d %.1f ms %s", request.method, request.url.path, status, milliseconds, request_id)


app.add_middleware(Account)
# Outermost, so that refusals reach the page as what they are.
app.add_middleware(
    CORSMiddleware,
    allow_origins=[origin.strip() for origin in settings.cors_origins.split(",") if origin.strip()],
    allow_methods=["*"],
    allow_headers=["*"],
    expose_headers=["X-Request-ID", "Retry-After"],
)


@app.exception_handler(RequestValidationError)
async def invalid_request(request: Request, error: Exception) -> JSONResponse:
    """422 with the field and the reason. The bad value itself is left out: NaN is no JSON."""
    assert isinstance(error, RequestValidationError)
    detail = [{"loc": list(part["loc"]), "msg": _reason(part), "type": part["type"]} for part in error.errors()]
    return JSONResponse({"detail": detail}, status_code=422)


def _reason(part: dict[str, Any]) -> str:
    """FastAPI keeps to itself what is wrong with JSON."""
    if part["type"] == "json_invalid" and "ctx" in part:
        return f"not valid JSON: {part['ctx']['error']}"
    return str(part["msg"])


@app.exception_handler(400)
async def unreadable(request: Request, error: Exception) -> JSONResponse:
    """FastAPI's word for a body that it cannot take apart; it does not say why."""
    reasons = {UnicodeDecodeError: "it is not UTF-8", RecursionError: "it is nested too deeply"}
    reason = reasons.get(type(error.__cause__), "it cannot be read")
    refusal = invalid((["body"], f"not valid JSON: {reason}"), kind="json_invalid")
    return JSONResponse({"detail": refusal.detail}, refusal.status_code)


@app.get("/", dependencies=[OPEN])
async def root(service: ServiceDep) -> dict[str, str | None]:
    return {"name": "StyleTower", "release": Release.current(service.settings.models_dir), "docs": "/docs"}


@app.get("/health", dependencies=[OPEN])
async def health() -> Health:
    """The process lives."""
    return Health(status="ok")


@app.get("/ready", dependencies=[OPEN], responses={503: {"model": Health}})
async def ready(service: ServiceDep, response: Response) -> Health:
    """Requests can be answered: database there, release loaded and warm."""
    service.problem = await service.run(service.check, pool=service.checks)
    warnings = [service.access.warning] if service.access.warning else []
    if service.problem:
        response.status_code = 503
        return Health(status="not ready", reason=service.problem, warnings=warnings)
    return Health(status="ready", release=Release.current(service.settings.models_dir), warnings=warnings)


@app.get(
    "/metrics", dependencies=[ADMIN], response_class=Response, responses=ANY | {200: {"content": {"text/plain": {}}}}
)
async def metrics(service: ServiceDep) -> Response:
    """Prometheus: of this worker, or of all if they were given a folder to count in (docs/deploy.md)."""
    said = exposition(service.registry, service.settings.models_dir, bool(service.access.warning))
    return Response(said, media_type=CONTENT_TYPE_LATEST)


for routes in (lists, goods, shoppers, rules, impressions, experiments, releases):
    app.include_router(routes.router, responses=ANY)
