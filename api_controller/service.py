"""What the routes share: the store, the pipeline, the threads, the counters."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from typing import Annotated, TypeVar

import psycopg
from fastapi import Depends, Request
from prometheus_client import CollectorRegistry, Counter, Histogram

import recommender as pipeline
from api_controller.access import KEY_SECONDS, Access
from api_controller.impression_log import ImpressionLog
from api_controller.refusals import invalid, unavailable
from api_controller.schemas import MAX_LIST
from experiments import Experiment
from lexicon import LEXICON, Lexicon
from loaded_release import UnavailableError
from readers import LexiconReader
from rules import Effect
from settings import ServiceSettings, UserError
from store import Store
from text_encoder import TextEncoder

log = logging.getLogger("styletower")
THREADS = 4
REHEARSALS = 2  # on each of THREADS connections, which are taken in turn: the first prepares the statements
MAX_WAITING = 64  # requests in the pool's queue; beyond, 503 at once
REQUEST_SECONDS = 5.0
RETRY_SECONDS = 2.0  # between attempts to open what was missing at the start
CATCH_UP_SECONDS = 10.0  # between attempts to index what a release does not know yet
LEFT_SECONDS = 300.0  # after the start: what was to be indexed when the last process ended waits so long
EXPERIMENT_SECONDS = 0.5  # for so long a worker may not know of an experiment's start or stop
TIDY_SECONDS = 3600.0  # between looks for what has grown too old to be kept
FALLBACK_SECONDS = 60.0  # the popular items that answer while the database is away are no older

Result = TypeVar("Result")


class Service:
    """What the handlers share: the store, the pipeline, the threads, the counters. Parts may come late."""

    def __init__(self, settings: ServiceSettings) -> None:
        self.settings = settings
        self.pool = ThreadPoolExecutor(THREADS, thread_name_prefix="pipeline")
        self.reports = ThreadPoolExecutor(1, thread_name_prefix="reports")  # shoppers do not wait behind them
        self.checks = ThreadPoolExecutor(1, thread_name_prefix="checks")  # which may wait for the pool
        self.waiting = 0
        self.store: Store | None = None
        self.encoder: TextEncoder | None = None
        self.recommender: pipeline.Recommender | None = None
        self.reader: LexiconReader | None = None
        self.impressions: ImpressionLog | None = None
        self._contexts_asked = (0, 0)
        self._experiment: tuple[float, Experiment | None] = (0.0, None)  # good until, of time.monotonic()
        self.rehearsed = False
        self.problem = "starting"
        self.opening = threading.Lock()
        self.closing = threading.Event()
        self.registry = CollectorRegistry()
        self.requests = Counter("styletower_requests", "Requests", ["route", "status"], registry=self.registry)
        self.seconds = Histogram("styletower_stage_seconds", "Seconds a stage", ["stage"], registry=self.registry)
        self.lists = Counter("styletower_lists", "Lists answered", ["kind"], registry=self.registry)
        self.degraded = Counter("styletower_degraded", "Answers from the fallback", registry=self.registry)
        self.rows = Counter(
            "styletower_rows", "Rows given and what became of them", ["what", "outcome"], registry=self.registry
        )
        self.rule_removals = Counter(
            "styletower_rule_removals", "Candidates that live rules kept out", ["kind"], registry=self.registry
        )
        self.rule_moves = Counter(
            "styletower_rule_moves", "Items that live rules moved", ["kind"], registry=self.registry
        )
        self.unread_rules = Counter(
            "styletower_unread_rules", "Lists made without rules that cannot be read", ["name"], registry=self.registry
        )
        self.exposures = Counter(
            "styletower_exposures", "Lists shown that count for an arm", ["experiment", "arm"], registry=self.registry
        )
        self.missed = Counter(
            "styletower_missed_exposures", "Lists of an arm's shoppers that its release did not answer",
            ["experiment", "arm"], registry=self.registry,
        )  # fmt: skip
        self.contexts = Counter(
            "styletower_context_texts", f"Texts of contexts; cached are those of which a worker still knew the vector, of "
            f"{pipeline.CONTEXT_CACHE} at most", ["outcome"], registry=self.registry,
        )  # fmt: skip
        self.promotions = Counter("styletower_promotions", "Releases made live over HTTP", registry=self.registry)
        self.access = Access(
            self.registry, settings.rate_limit, settings.rate_burst, settings.shopper_secret.get_secret_value()
        )

    def open(self) -> None:
        """Everything a request needs. Raises UserError or UnavailableError while something is missing; call again, but not in the
        pool, whose threads it waits for."""
        with self.opening:  # two callers must not start two of anything
            if not self.rehearsed:
                self._start()
            assert self.recommender is not None
            self.recommender.live()
            self.running_experiment()  # known before the first request

    def _start(self) -> None:
        encoder = self.pool.submit(self._text_encoder)  # read while the database starts
        if self.store is None:
            self.store = Store.open(self.settings, statement_seconds=REQUEST_SECONDS)
            self.impressions = ImpressionLog(self.store, self.settings.impression_retention_days, self.registry)
        if self.recommender is None:
            self.reader = LexiconReader(Lexicon.load(LEXICON))
            self.recommender = pipeline.Recommender(self.store, self.settings, encoder.result())
        self.recommender.live()
        trends = self.pool.submit(self.recommender.refresh_lists)  # the database's work, for the most part
        # In the threads of requests, of which each sets up PyTorch for itself.
        list(self.pool.map(lambda _: self._rehearse(), range(THREADS * REHEARSALS)))
        trends.result()
        # What is there now stays. Looking through all of it for garbage stops every thread for a third of a second.
        gc.collect()
        gc.freeze()
        self.rehearsed = True
        self.catch_up(LEFT_SECONDS)

    def _text_encoder(self) -> TextEncoder:
        if self.encoder is None:
            self.encoder = TextEncoder.load(self.settings)
        return self.encoder

    def _rehearse(self) -> None:
        assert self.recommender is not None
        self.recommender.rehearse()

    def check(self) -> str:
        """Why nothing can be answered; empty when ready. Retries what was missing."""
        try:
            self.open()
            assert self.store is not None
            self.store.products.existing([])
        except (UserError, UnavailableError) as error:
            return " ".join(str(error).split())
        except psycopg.Error as error:
            return f"the database does not answer: {' '.join(str(error).split()) or type(error).__name__}"
        return ""

    async def keep_current(self) -> None:
        """What was missing at the start may come, and what is popular changes; nobody has to ask for it."""
        loop = asyncio.get_running_loop()
        seconds = RETRY_SECONDS  # soon after the start: contexts are then read before most of them come, and no start waits for it
        while True:
            await asyncio.sleep(seconds)
            try:
                if self.recommender is None:
                    self.problem = await loop.run_in_executor(self.checks, self.check)
                else:
                    await loop.run_in_executor(self.pool, self.recommender.refresh)
            except Exception:  # nobody awaits this task: once ended, it would be missed by nobody either
                log.exception("what is kept in memory is as it was; tried again soon")
            seconds = RETRY_SECONDS if self.recommender is None else FALLBACK_SECONDS

    def catch_up(self, after: float = 2 * EXPERIMENT_SECONDS) -> None:
        """Have those products indexed that a release which answers does not know yet, or not as they are. Nobody waits for it: it
        takes long, and is tried again until it is done. Not at once: a worker that does not know of an experiment yet puts into
        the live release alone."""
        threading.Thread(target=self._catch_up, args=(after,), name="catch-up", daemon=True).start()

    def _catch_up(self, seconds: float) -> None:
        assert self.recommender is not None
        while not self.closing.wait(seconds):
            try:
                if made := self.recommender.catch_up(self.answering_releases()):
                    log.info("%d products that came or changed while a release stood aside are indexed", made)
                return
            except (UnavailableError, psycopg.Error) as error:
                log.warning(
                    "products that came or changed while a release stood aside are not all indexed yet; tried again in %.0f s: %s",
                    CATCH_UP_SECONDS, " ".join(str(error).split()),
                )  # fmt: skip
            seconds = CATCH_UP_SECONDS

    def count_contexts(self, recommender: pipeline.Recommender) -> None:
        """Add what was asked since the last time. Call it in the event loop: two at once would add it twice."""
        asked = recommender.contexts_asked()
        for outcome, now, before in zip(("cached", "new"), asked, self._contexts_asked, strict=True):
            self.contexts.labels(outcome).inc(now - before)
        self._contexts_asked = asked

    def count_effects(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            self.rule_removals.labels(effect.kind).inc(effect.removed)
            self.rule_moves.labels(effect.kind).inc(effect.moved)

    async def watch_keys(self) -> None:
        """In a thread of its own: a busy pipeline must not keep a revoked key in force."""
        while True:
            try:
                await asyncio.to_thread(self.access.refresh, self.store)
            except Exception:  # were this to end, a revoked key would be in force for ever
                log.exception("the API keys could not be read; those known last go on")
            await asyncio.sleep(KEY_SECONDS)

    async def tidy(self) -> None:
        """Let go of what nobody needs any more: sessions that are over, tombstones that nothing waits for."""
        while True:
            try:
                if self.store is not None:
                    await asyncio.to_thread(self._tidy, self.store)
            except Exception:  # were this to end, they would grow for ever
                log.exception("old sessions and tombstones could not be removed; tried again in an hour")
            await asyncio.sleep(RETRY_SECONDS if self.store is None else TIDY_SECONDS)

    def _tidy(self, store: Store) -> None:
        store.tombstones.delete_old()
        if self.settings.session_retention_days:
            store.sessions.delete_before(timedelta(days=self.settings.session_retention_days))

    def close(self) -> None:
        self.closing.set()
        self.reports.shutdown(wait=False, cancel_futures=True)
        self.checks.shutdown(wait=True, cancel_futures=True)
        self.pool.shutdown(wait=True, cancel_futures=True)
        if self.impressions is not None:
            self.impressions.close()
        if self.store is not None:
            self.store.close()

    async def run(
        self, work: Callable[[], Result], seconds: float = REQUEST_SECONDS, pool: ThreadPoolExecutor | None = None
    ) -> Result:
        """Do blocking work in the pool of requests, or in another. 503 when the queue is full, `seconds` are up, or the database is
        away. Work that has begun goes on, and is done, though nobody waits for it any more."""
        if self.waiting >= MAX_WAITING:
            raise unavailable("too many requests are waiting")
        self.waiting += 1
        try:
            future = asyncio.get_running_loop().run_in_executor(pool or self.pool, work)
            return await asyncio.wait_for(future, seconds)
        except TimeoutError as error:
            raise unavailable(f"no answer within {seconds:.0f} s") from error
        except UnavailableError as error:
            raise unavailable(str(error)) from error
        except (psycopg.OperationalError, psycopg.errors.QueryCanceled) as error:
            raise unavailable("the database does not answer") from error
        finally:
            self.waiting -= 1

    def running_experiment(self) -> Experiment | None:
        """As of EXPERIMENT_SECONDS ago at most. Asks the database: call it in the pool. While that is away, the last one known."""
        assert self.store is not None
        until, experiment = self._experiment
        if time.monotonic() >= until:
            # Whoever asks meanwhile makes do with what is known: one thread asks the database, and one alone waits for it.
            self._experiment = time.monotonic() + EXPERIMENT_SECONDS, experiment
            with suppress(psycopg.Error):
                experiment = self.store.experiments.running()
                self._experiment = time.monotonic() + EXPERIMENT_SECONDS, experiment
        return experiment

    def answering_releases(self) -> list[str]:
        """Releases that the experiment in progress names. Call it in the pool."""
        experiment = self.running_experiment()
        return [arm.release for arm in experiment.arms if arm.release is not None] if experiment else []

    def parts(self) -> tuple[Store, pipeline.Recommender]:
        """The store and the pipeline; 503 until they are there."""
        if self.store is None or self.recommender is None:
            raise unavailable(self.problem)
        return self.store, self.recommender


async def get_service(request: Request) -> Service:  # a plain function would be called in a thread of its own
    service: Service = request.app.state.service
    return service


ServiceDep = Annotated[Service, Depends(get_service)]


def listed(body: Result | list[Result]) -> list[Result]:
    given = body if isinstance(body, list) else [body]
    if len(given) > MAX_LIST:
        raise invalid((["body"], f"{len(given)} rows; at most {MAX_LIST} at once"), kind="too_long")
    return given
