"""The service: `uvicorn api_controller.app:app`.

Everything that waits or computes runs in a small pool of threads, so the event loop stays free; when the pool's queue is full the
answer is 503 at once, not later.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path as FilePath
from typing import Annotated, Any, TypeVar

import psycopg
import torch
from fastapi import Body, Depends, FastAPI, HTTPException, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

import recommender as pipeline
from api_controller.limits import BodyLimit
from api_controller.schemas import (
    MAX_LIST,
    EventsAnswer,
    EvidenceBody,
    Health,
    ItemBody,
    NeighbourBody,
    ProductAnswer,
    ProductsAnswer,
    ProfileBody,
    ReasonBody,
    RecommendAnswer,
    RecommendBody,
)
from catalog import Event, Identifier, RawProduct, User
from lexicon import Lexicon
from readers import LexiconReader
from release import Release
from settings import Settings, UserError
from store import Filters, Store
from text_encoder import TextEncoder
from vocab import normalise

LEXICON = FilePath(__file__).parent.parent / "lexicon.json"
THREADS = 4
MAX_WAITING = 64  # requests in the pool's queue; beyond, 503 at once
REQUEST_SECONDS = 5.0
RETRY_SECONDS = 2.0  # between attempts to open what was missing at the start
log = logging.getLogger("styletower")

Result = TypeVar("Result")


class Service:
    """What the handlers share: the store, the pipeline, the threads, the counters. Parts may come late."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.pool = ThreadPoolExecutor(THREADS, thread_name_prefix="pipeline")
        self.waiting = 0
        self.store: Store | None = None
        self.recommender: pipeline.Recommender | None = None
        self.reader: LexiconReader | None = None
        self.problem = "starting"
        self.opening = threading.Lock()
        self.registry = CollectorRegistry()
        self.requests = Counter("styletower_requests", "Requests", ["route", "status"], registry=self.registry)
        self.seconds = Histogram("styletower_stage_seconds", "Seconds a stage", ["stage"], registry=self.registry)
        self.degraded = Counter("styletower_degraded", "Answers from the fallback", registry=self.registry)
        self.live = Gauge("styletower_live_release", "1 for the live release", ["release"], registry=self.registry)

    def open(self) -> None:
        """Everything a request needs. Raises UserError or UnavailableError while something is missing; call again."""
        with self.opening:  # two callers must not start two of anything
            if self.store is None:
                self.store = Store.open(self.settings, statement_seconds=REQUEST_SECONDS)
            if self.recommender is None:
                encoder = TextEncoder.load(self.settings)
                self.reader = LexiconReader(Lexicon.load(LEXICON))
                self.recommender = pipeline.Recommender(self.store, self.settings, encoder)
        self.recommender.live()

    def check(self) -> str:
        """Why nothing can be answered; empty when ready. Retries what was missing."""
        try:
            self.open()
            assert self.store is not None
            self.store.products.existing([])
        except (UserError, pipeline.UnavailableError) as error:
            return " ".join(str(error).split())
        except psycopg.Error as error:
            return f"the database does not answer: {' '.join(str(error).split()) or type(error).__name__}"
        return ""

    async def keep_trying(self) -> None:
        """What was missing at the start may come; nobody has to ask for it."""
        while self.recommender is None:
            await asyncio.sleep(RETRY_SECONDS)
            self.problem = await asyncio.get_running_loop().run_in_executor(self.pool, self.check)

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)
        if self.store is not None:
            self.store.close()

    async def run(self, work: Callable[[], Result]) -> Result:
        """Do blocking work in the pool. 503 when the queue is full, time is up, or the database is away."""
        if self.waiting >= MAX_WAITING:
            raise _unavailable("too many requests are waiting")
        self.waiting += 1
        try:
            future = asyncio.get_running_loop().run_in_executor(self.pool, work)
            return await asyncio.wait_for(future, REQUEST_SECONDS)
        except TimeoutError as error:
            raise _unavailable(f"no answer within {REQUEST_SECONDS:.0f} s") from error
        except pipeline.UnavailableError as error:
            raise _unavailable(str(error)) from error
        except (psycopg.OperationalError, psycopg.errors.QueryCanceled) as error:
            raise _unavailable("the database does not answer") from error
        finally:
            self.waiting -= 1

    def parts(self) -> tuple[Store, pipeline.Recommender]:
        """The store and the pipeline; 503 until they are there."""
        if self.store is None or self.recommender is None:
            raise _unavailable(self.problem)
        return self.store, self.recommender


def _unavailable(reason: str) -> HTTPException:
    return HTTPException(503, reason, headers={"Retry-After": "2"})


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    torch.set_num_threads(1)  # two threads beside another busy process make a 1.5 ms forward take 10 to 48
    service = Service(Settings())
    app.state.service = service
    service.problem = service.check()  # before the first request: whatever it waits for, nobody waits behind it
    if service.problem:
        log.warning("not ready: %s", service.problem)
    trying = asyncio.create_task(service.keep_trying())
    yield
    trying.cancel()
    service.close()


app = FastAPI(title="StyleTower", version="0.1.0", lifespan=lifespan)
app.add_middleware(BodyLimit)


def get_service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceDep = Annotated[Service, Depends(get_service)]
ProductId = Annotated[Identifier, Path(description="the shop's own product id")]


@app.middleware("http")
async def account(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    """Count and log each request; an unexpected error is a 500 with an id to look for in the log, never a trace."""
    request_id = request.headers.get("x-request-id", "")[:64] or uuid.uuid4().hex[:12]
    started = time.perf_counter()
    try:
        response = await call_next(request)
    except Exception:
        log.exception("request %s failed", request_id)
        response = JSONResponse({"detail": "internal error", "request_id": request_id}, status_code=500)
    route = getattr(request.scope.get("route"), "path", "unknown")
    get_service(request).requests.labels(route, response.status_code).inc()
    response.headers["X-Request-ID"] = request_id
    milliseconds = 1000 * (time.perf_counter() - started)
    log.info("%s %s %d %.1f ms %s", request.method, request.url.path, response.status_code, milliseconds, request_id)
    return response


@app.exception_handler(RequestValidationError)
async def invalid(request: Request, error: Exception) -> JSONResponse:
    """422 with the field and the reason. The bad value itself is left out: NaN is no JSON."""
    assert isinstance(error, RequestValidationError)
    detail = [{"loc": list(part["loc"]), "msg": part["msg"], "type": part["type"]} for part in error.errors()]
    return JSONResponse({"detail": detail}, status_code=422)


@app.get("/")
async def root(service: ServiceDep) -> dict[str, str | None]:
    return {"name": "StyleTower", "release": Release.current(service.settings.models_dir), "docs": "/docs"}


@app.get("/health")
async def health() -> Health:
    """The process lives."""
    return Health(status="ok")


@app.get("/ready", responses={503: {"model": Health}})
async def ready(service: ServiceDep, response: Response) -> Health:
    """Requests can be answered: database there, release loaded and warm."""
    service.problem = await service.run(service.check)
    if service.problem:
        response.status_code = 503
        return Health(status="not ready", reason=service.problem)
    return Health(status="ready", release=Release.current(service.settings.models_dir))


@app.get("/metrics")
async def metrics(service: ServiceDep) -> Response:
    """Prometheus."""
    service.live.clear()
    name = Release.current(service.settings.models_dir)
    if name:
        service.live.labels(name).set(1)
    return Response(generate_latest(service.registry), media_type=CONTENT_TYPE_LATEST)


@app.post("/recommend")
async def recommend(body: RecommendBody, service: ServiceDep) -> RecommendAnswer:
    """A ranked list for a shopper, a context, a body, or nobody at all."""
    _, recommender = service.parts()

    def work() -> pipeline.Answer:
        filters = Filters(_known_values(recommender, body.filters.std), *_bounds(body))
        return recommender.recommend(
            pipeline.Request(
                body.user_id,
                body.history,
                body.context,
                body.profile,
                filters,
                body.exclude,
                body.exclude_history,
                body.k,
            )
        )

    answer = await service.run(work)
    for stage, milliseconds in answer.milliseconds.items():
        service.seconds.labels(stage).observe(milliseconds / 1000)
    if answer.degraded:
        service.degraded.inc()
    items = [
        ItemBody.model_construct(**{**vars(item), "reasons": [ReasonBody(**vars(reason)) for reason in item.reasons]})
        for item in answer.items
    ]
    return RecommendAnswer.model_construct(**{**vars(answer), "items": items})


def _bounds(body: RecommendBody) -> tuple[float | None, float | None, bool | None]:
    return body.filters.min_price, body.filters.max_price, body.filters.in_stock


def _known_values(recommender: pipeline.Recommender, std: dict[str, list[str]]) -> dict[str, list[str]]:
    """The filter in the schema's own spelling; 422 on a field or value that the shop does not have."""
    allowed = recommender.allowed_values()
    found: dict[str, list[str]] = {}
    for field, values in std.items():
        place = ["body", "filters", "std", field]
        if field not in allowed:
            raise HTTPException(422, [{"loc": place, "msg": f"no such field; there are {sorted(allowed)}"}])
        unknown = [value for value in values if normalise(value) not in allowed[field]]
        if unknown:
            raise HTTPException(422, [{"loc": place, "msg": f"{unknown[0]!r} is no value of {field}"}])
        found[field] = [allowed[field][normalise(value)] for value in values]
    return found


@app.get("/items/{product_id}")
async def item(product_id: ProductId, service: ServiceDep) -> ProductAnswer:
    store, _ = service.parts()
    stored = await service.run(lambda: store.products.get(product_id))
    if stored is None:
        raise HTTPException(404, f"no product {product_id!r}")
    raw, product = stored.raw, stored.product
    return ProductAnswer(
        product_id=raw.product_id, title=raw.title, description=raw.description, attributes=raw.attributes, price=raw.price,
        in_stock=raw.in_stock, group_id=raw.group_id, std=product.std if product else None, re=product.re if product else None,
        evidence={name: [EvidenceBody(**one) for one in said] for name, said in stored.evidence.items()},
    )  # fmt: skip


@app.get("/items/{product_id}/similar")
async def similar(
    product_id: ProductId, service: ServiceDep, k: Annotated[int, Query(ge=1, le=100)] = 20
) -> list[NeighbourBody]:
    """The items most like one, by cosine of their vectors."""
    _, recommender = service.parts()
    try:
        found = await service.run(lambda: recommender.similar(product_id, k))
    except LookupError as error:
        raise HTTPException(404, f"no product {product_id!r} in the live release") from error
    return [NeighbourBody(**vars(neighbour)) for neighbour in found]


EVENT_EXAMPLE: list[Any] = [
    {"user_id": "shopper-1", "product_id": "product-17", "kind": "view", "at": "2026-06-30T10:00:00Z"}
]
PRODUCT_EXAMPLE: list[Any] = [
    {"product_id": "new-1", "title": "Women's linen wrap dress", "attributes": {"category": "dress"}, "price": 59000}
]


@app.post("/events")
async def events(
    body: Annotated[Event | list[Event], Body(examples=EVENT_EXAMPLE)], service: ServiceDep
) -> EventsAnswer:
    """One event or up to 1,000. The next /recommend sees them. The same event twice counts once."""
    store, _ = service.parts()
    given = _listed(body)
    put = await service.run(lambda: store.events.put(given))
    return EventsAnswer(stored=put.stored, duplicates=put.duplicates, unknown_products=put.unknown_products)


@app.put("/products")
async def products(
    body: Annotated[RawProduct | list[RawProduct], Body(examples=PRODUCT_EXAMPLE)], service: ServiceDep
) -> ProductsAnswer:
    """Add or replace products: read, embedded and searchable when this returns."""
    _, recommender = service.parts()
    reader = service.reader
    assert reader is not None
    given = _listed(body)
    refused = await service.run(lambda: recommender.put_products(given, reader))
    return ProductsAnswer(stored=len(given), refused=[f"{row.file} {row.reason}: {row.raw}" for row in refused])


@app.put("/users/{user_id}")
async def user(user_id: Annotated[Identifier, Path()], body: ProfileBody, service: ServiceDep) -> User:
    """Set a shopper's profile; what was there before is replaced."""
    store, _ = service.parts()
    stored = User(user_id=user_id, profile=body.profile)
    await service.run(lambda: store.users.put([stored]))
    return stored


def _listed(body: Result | list[Result]) -> list[Result]:
    given = body if isinstance(body, list) else [body]
    if len(given) > MAX_LIST:
        raise HTTPException(422, [{"loc": ["body"], "msg": f"{len(given)} rows; at most {MAX_LIST} at once"}])
    return given
