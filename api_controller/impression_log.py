"""What was shown, on its way to the database: written behind the answers, so that no shopper waits for it.

A list waits in memory for FLUSH_SECONDS at most, or up to `store.LONGEST_WAIT` while the database is away; a process that is killed
loses what waits. Whoever is forgotten meanwhile stays so: their lists are not written.
One that is asked to stop writes it first. Events are never treated so: they are stored before they are acknowledged.
"""

from __future__ import annotations

import logging
import threading
import time
from datetime import UTC, datetime, timedelta

import psycopg
from prometheus_client import CollectorRegistry, Counter

from store import LONGEST_WAIT, Impression, Store

FLUSH_SECONDS = 0.5
MAX_WAITING = 20_000  # lists; about 20 MB. Beyond, they are dropped and counted
BATCH = 500  # lists a transaction
STOP_SECONDS = 5.0  # for writing the rest at the end
FORGET_SECONDS = 3600.0  # between looks for lists past their retention

log = logging.getLogger("styletower")


class ImpressionLog:
    """A bounded queue and the thread that empties it. Safe to add to from any thread; adding never waits."""

    def __init__(self, store: Store, retention_days: int, registry: CollectorRegistry) -> None:
        self._store, self._retention_days = store, retention_days
        self._waiting: list[Impression] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._forget_at = 0.0  # of time.monotonic()
        self.lists = Counter(
            "styletower_impressions", "Lists shown, by what became of them", ["outcome"], registry=registry
        )
        for outcome in ("written", "dropped", "skipped"):
            self.lists.labels(outcome)  # a counter at 0 says more than none
        self._thread = threading.Thread(target=self._run, name="impressions", daemon=True)
        self._thread.start()

    def add(self, impression: Impression) -> None:
        with self._changed:
            if len(self._waiting) < MAX_WAITING:
                self._waiting.append(impression)
                return
        self.lists.labels("dropped").inc()

    def close(self) -> None:
        """Write what waits, then end; what cannot be written in time is dropped and counted."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(STOP_SECONDS)

    def _run(self) -> None:
        while not self._stopping:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping, FLUSH_SECONDS)
            self._flush()
            if self._retention_days and time.monotonic() >= self._forget_at:
                self._forget()
        self._flush()
        with self._changed:
            self.lists.labels("dropped").inc(len(self._waiting))

    def _flush(self) -> None:
        """Write what waits, oldest first, until all is written or the database is away."""
        while True:
            with self._changed:
                batch = self._waiting[:BATCH]
            if not batch:
                return
            # Beyond that wait, a shopper's tombstone may be gone.
            fresh = [one for one in batch if one.at > datetime.now(UTC) - LONGEST_WAIT]
            try:
                written = self._store.impressions.put(fresh)
            except psycopg.OperationalError:
                return  # later
            except Exception:
                # Whatever is wrong with them must not keep all that come after from being written.
                log.exception("%d impressions could not be written", len(fresh))
                self.lists.labels("dropped").inc(len(batch))
            else:
                self.lists.labels("written").inc(written)
                self.lists.labels("skipped").inc(len(fresh) - written)
                self.lists.labels("dropped").inc(len(batch) - len(fresh))
            with self._changed:
                del self._waiting[: len(batch)]

    def _forget(self) -> None:
        self._forget_at = time.monotonic() + FORGET_SECONDS
        try:
            for _ in self._store.impressions.forget(datetime.now(UTC) - timedelta(days=self._retention_days)):
                # After a long time without retention this takes hours, which what was shown meanwhile must not wait for.
                self._flush()
                if self._stopping:
                    return
        except psycopg.Error:
            log.exception("old impressions could not be deleted; tried again in an hour")
