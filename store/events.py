"""The event log: who did what with which product, and when."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from psycopg import Connection
from psycopg_pool import ConnectionPool

from catalog import SESSION, Event
from store.sessions import lock_shoppers

READ_ROWS = 100_000  # held at once as Python objects
DELETE_ROWS = 20_000  # of one transaction of `delete_before`

# What a session does after it was merged is the user's.
_PUT = """
    WITH given AS MATERIALIZED (
        SELECT event_id, coalesce(merged_sessions.user_id, rows.user_id) AS user_id, product_id, kind, at, context,
            list_id, EXISTS (SELECT FROM products WHERE products.product_id = rows.product_id) AS known
        FROM unnest(%b::text[], %b::text[], %b::text[], %b::text[], %b::timestamptz[], %b::text[],
            %b::text[])
            AS rows(event_id, user_id, product_id, kind, at, context, list_id)
            LEFT JOIN merged_sessions ON session_id = rows.user_id
    ), stored AS (
        INSERT INTO events (event_id, user_id, product_id, kind, at, context, list_id)
        SELECT event_id, user_id, product_id, kind, at, context, list_id FROM given WHERE known ORDER BY event_id
        ON CONFLICT (event_id) DO NOTHING RETURNING 1
    )
    SELECT (SELECT count(*) FROM stored), (SELECT count(*) FROM given WHERE known),
        ARRAY(SELECT DISTINCT product_id FROM given WHERE NOT known ORDER BY product_id)
"""

# A shopper counts once for a product, by the act that weighs most now: nobody makes a trend alone. Exponents are bounded, since
# PostgreSQL takes an underflow for an error.
_TRENDING = """
    SELECT product_id, sum(strongest) FROM (
        SELECT product_id, max(weight * power(2, greatest(-1000, (extract(epoch FROM at)::float8 - %(as_of)s) / %(half_life)s)))
            AS strongest
        FROM (
            SELECT product_id, user_id, at, coalesce(weight, %(other_weight)s) AS weight
            FROM (
                SELECT product_id, user_id, kind, at FROM events
                WHERE (%(since)s::timestamptz IS NULL OR at > %(since)s) AND at <= %(until)s ORDER BY at DESC LIMIT %(limit)s
            ) AS latest LEFT JOIN unnest(%(kinds)s::text[], %(weights)s::float8[]) AS known(kind, weight) USING (kind)
        ) AS weighed
        WHERE weight > 0 GROUP BY product_id, user_id
    ) AS of_shoppers GROUP BY product_id
"""

# One product bought on several days. What was bought twice in a day was one order.
_PURCHASES = """
    SELECT product_id, count(DISTINCT (at AT TIME ZONE 'UTC')::date), extract(epoch FROM min(at))::float8,
        extract(epoch FROM max(at))::float8,
        coalesce((SELECT std -> %(field)s FROM products WHERE product_id = events.product_id), '[]')
    FROM events WHERE user_id = %(user_id)s AND kind = 'purchase'
    GROUP BY product_id ORDER BY max(at) DESC, product_id LIMIT %(limit)s
"""

_INTERVALS = """
    WITH latest AS MATERIALIZED (
        SELECT user_id, product_id, at FROM events WHERE kind = 'purchase' ORDER BY at DESC LIMIT %(limit)s
    ), gaps AS (
        SELECT product_id,
            extract(epoch FROM at - lag(at) OVER (PARTITION BY user_id, product_id ORDER BY at))::float8 / 86400 AS days
        FROM latest
    )
    SELECT CASE WHEN grouping(category) = 0 THEN category END, percentile_cont(0.5) WITHIN GROUP (ORDER BY days)
    FROM gaps JOIN products USING (product_id)
        LEFT JOIN jsonb_array_elements_text(coalesce(std -> %(field)s, '[]')) AS values(category) ON true
    WHERE days >= 1
    GROUP BY GROUPING SETS ((category), ()) HAVING category IS NOT NULL OR grouping(category) = 1
"""


@dataclass(frozen=True)
class PutEvents:
    stored: int
    duplicates: int  # the event id was there already
    unknown_products: list[str]  # ids that are no product: their events were not stored


@dataclass(frozen=True)
class Purchases:
    """What one shopper did with one product."""

    product_id: str
    days: int  # on which it was bought
    first: float  # epoch seconds
    last: float
    categories: list[str]


@dataclass(frozen=True)
class EventLog:
    """N events, ordered by time, then user, then product. The word columns are numbers into lists of distinct words."""

    user_ids: list[str]  # distinct, sorted
    product_ids: list[str]  # distinct, sorted
    kinds: list[str]  # distinct, sorted
    contexts: list[str]  # distinct, sorted
    user: np.ndarray  # int32 [N]
    product: np.ndarray  # int32 [N]
    kind: np.ndarray  # int32 [N]
    at: np.ndarray  # float64 [N], epoch seconds
    context: np.ndarray  # int32 [N]


class Events:
    def __init__(self, pool: ConnectionPool[Connection[Any]]) -> None:
        self._pool = pool

    def put(self, events: Sequence[Event]) -> PutEvents:
        """Store events; one whose id is there changes nothing, one on an unknown product is not stored.

        All or none, and on disk when this returns.
        """
        rows = [(e.event_id, e.user_id, e.product_id, e.kind, e.at, e.context, e.list_id) for e in events]
        columns = list(zip(*rows, strict=True)) or [()] * 7
        sessions = {event.user_id for event in events if event.user_id.startswith(SESSION)}
        with self._pool.connection() as connection, connection.transaction():
            lock_shoppers(connection, sessions, shared=True)
            row = connection.execute(_PUT, [list(column) for column in columns]).fetchone()
        assert row is not None
        stored, known, unknown_products = row
        return PutEvents(stored, known - stored, unknown_products)

    def delete_before(self, moment: datetime) -> Iterator[int]:
        """Remove events from before that moment, DELETE_ROWS at a time: how many each time. Stopped anywhere and run again it
        goes on where it was. Those that somebody is moving or removing just now are left to the next run: who waits for them
        could be waited for."""
        deleted = -1
        while deleted:
            with self._pool.connection() as connection:
                deleted = connection.execute(
                    "DELETE FROM events WHERE ctid = ANY(ARRAY("
                    "SELECT ctid FROM events WHERE at < %s LIMIT %s FOR UPDATE SKIP LOCKED))",
                    (moment, DELETE_ROWS),
                ).rowcount
            yield deleted

    def read(self, before: datetime | None = None) -> EventLog:
        """Every event, or those earlier than `before`."""
        query = (
            "SELECT user_id, product_id, kind, extract(epoch FROM at)::float8, context FROM events"
            " WHERE %(before)s::timestamptz IS NULL OR at < %(before)s"
        )
        import polars as pl  # who learns from events waits for it, a server does not

        words_and_times = {
            "user_id": pl.String(), "product_id": pl.String(), "kind": pl.String(), "at": pl.Float64(), "context": pl.String(),
        }  # fmt: skip
        parts = [pl.DataFrame(schema=words_and_times)]
        with (
            self._pool.connection() as connection,
            connection.transaction(),
            connection.cursor("event_log", binary=True) as cursor,
        ):
            cursor.execute(query, {"before": before})
            while rows := cursor.fetchmany(READ_ROWS):
                columns = zip(*rows, strict=True)  # polars takes columns many times faster than rows
                parts.append(pl.DataFrame(dict(zip(words_and_times, columns, strict=True)), schema=words_and_times))
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
            numbers["kind"].to_numpy().astype(np.int32),
            numbers["at"].to_numpy(),
            numbers["context"].to_numpy().astype(np.int32),
        )

    def trending(
        self, as_of: float, half_life: float, weights: Mapping[str, float], other_weight: float, since: float | None,
        until: float, limit: int,
    ) -> dict[str, float]:  # fmt: skip
        """How much shoppers want each product, every act halved by each `half_life` seconds between it and `as_of`: the sum over
        shoppers of the act that counts most. Read are the latest `limit` events after `since` up to `until` (epoch seconds)."""
        parameters = {
            "as_of": as_of, "half_life": half_life, "kinds": list(weights), "weights": list(weights.values()),
            "other_weight": other_weight, "since": None if since is None else _moment(since), "until": _moment(until),
            "limit": limit,
        }  # fmt: skip
        with self._pool.connection() as connection:
            return dict(connection.execute(_TRENDING, parameters, prepare=False).fetchall())

    def purchases(self, user_id: str, category_field: str, limit: int) -> list[Purchases]:
        """The products that a shopper bought, the latest `limit` of them, with their values of `category_field`."""
        parameters = {"user_id": user_id, "field": category_field, "limit": limit}
        with self._pool.connection() as connection:
            return [Purchases(*row) for row in connection.execute(_PURCHASES, parameters).fetchall()]

    def repeat_intervals(self, category_field: str, limit: int) -> dict[str | None, float]:
        """Median days until a shopper buys the same product again, by category and (None) of all, among the latest `limit`
        purchases; empty when nothing was ever bought again."""
        with self._pool.connection() as connection:
            rows = connection.execute(_INTERVALS, {"field": category_field, "limit": limit}).fetchall()
        return {category: days for category, days in rows if days is not None}


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
