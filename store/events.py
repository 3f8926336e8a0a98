"""The event log: who did what with which product, and when."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import polars as pl
from psycopg import Connection
from psycopg_pool import ConnectionPool

from catalog import Event

READ_ROWS = 100_000  # held at once as Python objects

_PUT = """
    WITH given AS MATERIALIZED (
        SELECT *, EXISTS (SELECT FROM products WHERE products.product_id = rows.product_id) AS known
        FROM unnest(%s::text[], %s::text[], %s::text[], %s::text[], %s::timestamptz[], %s::text[])
            AS rows(event_id, user_id, product_id, kind, at, context)
    ), stored AS (
        INSERT INTO events (event_id, user_id, product_id, kind, at, context)
        SELECT event_id, user_id, product_id, kind, at, context FROM given WHERE known ORDER BY event_id
        ON CONFLICT (event_id) DO NOTHING RETURNING 1
    )
    SELECT (SELECT count(*) FROM stored), (SELECT count(*) FROM given WHERE known),
        ARRAY(SELECT DISTINCT product_id FROM given WHERE NOT known ORDER BY product_id)
"""

_LOG_COLUMNS = {
    "user_id": pl.String(),
    "product_id": pl.String(),
    "kind": pl.String(),
    "at": pl.Float64(),
    "context": pl.String(),
}


@dataclass(frozen=True)
class PutEvents:
    stored: int
    duplicates: int  # the event id was there already
    unknown_products: list[str]  # ids that are no product: their events were not stored


@dataclass(frozen=True)
class EventLog:
    """N events, ordered by time, then user, then product. The word columns are numbers into lists of distinct words."""

    user_ids: list[str]  # distinct, sorted
    product_ids: list[str]  # distinct, sorted
    kinds: list[str]  # distinct, sorted
    contexts: list[str]  # distinct, sorted
    user: np.ndarray  # int32 [N]
    product: np.ndarray  # int32 [N]
    kind: np.ndarray  # int8 [N]
    at: np.ndarray  # float64 [N], epoch seconds
    context: np.ndarray  # int32 [N]


class Events:
    def __init__(self, pool: ConnectionPool[Connection[Any]]) -> None:
        self._pool = pool

    def put(self, events: list[Event]) -> PutEvents:
        """Store events; one whose id is there changes nothing, one on an unknown product is not stored."""
        rows = [(e.event_id, e.user_id, e.product_id, e.kind, e.at, e.context) for e in events]
        columns = list(zip(*rows, strict=True)) or [()] * 6
        with self._pool.connection() as connection:
            row = connection.execute(_PUT, [list(column) for column in columns]).fetchone()
        assert row is not None
        stored, known, unknown_products = row
        return PutEvents(stored, known - stored, unknown_products)

    def read(self, before: datetime | None = None) -> EventLog:
        """Every event, or those earlier than `before`."""
        query = (
            "SELECT user_id, product_id, kind, extract(epoch FROM at)::float8, context FROM events"
            " WHERE %(before)s::timestamptz IS NULL OR at < %(before)s"
        )
        parts = [pl.DataFrame(schema=_LOG_COLUMNS)]
        with (
            self._pool.connection() as connection,
            connection.transaction(),
            connection.cursor("event_log", binary=True) as cursor,
        ):
            cursor.execute(query, {"before": before})
            while rows := cursor.fetchmany(READ_ROWS):
                columns = zip(*rows, strict=True)  # polars takes columns many times faster than rows
                parts.append(pl.DataFrame(dict(zip(_LOG_COLUMNS, columns, strict=True)), schema=_LOG_COLUMNS))
        log = pl.concat(parts)
        words = {name: log[name].unique().sort() for name in ("user_id", "product_id", "kind", "context")}
        numbers = log.select(
            "at", *(pl.col(name).cast(pl.Enum(distinct)).to_physical() for name, distinct in words.items())
        ).sort("at", "user_id", "product_id", "kind", "context")
        return EventLog(
            words["user_id"].to_list(),
            words["product_id"].to_list(),
            words["kind"].to_list(),
            words["context"].to_list(),
            numbers["user_id"].to_numpy().astype(np.int32),
            numbers["product_id"].to_numpy().astype(np.int32),
            numbers["kind"].to_numpy().astype(np.int8),
            numbers["at"].to_numpy(),
            numbers["context"].to_numpy().astype(np.int32),
        )
