"""What was shown: lists with the products in them, which places were seen, and what shoppers then took out of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from psycopg import Connection
from psycopg_pool import ConnectionPool

from store.sessions import lock_shoppers
from store.tombstones import FORGOTTEN

ATTRIBUTION_HOURS = 24  # an event that names no list belongs to the latest that showed its product so shortly before
FORGET_ROWS = 10_000  # deleted at once
FORGET_LOCK = 0x5354_0005  # key of the advisory lock that lets one process delete at a time

# A list that was shown to somebody who was forgotten since is not written.
_PUT = f"""
    INSERT INTO impressions (
        list_id, user_id, kind, context, release, rules, rules_version, experiment, experiment_version, arm, at, product_ids,
        scores, retrieval_ranks
    )
    SELECT %(list_id)s, coalesce((SELECT user_id FROM merged_sessions WHERE session_id = %(user_id)s), %(user_id)s), %(kind)s,
        %(context)s, %(release)s, %(rules)s, %(rules_version)s, %(experiment)s, %(experiment_version)s, %(arm)s, %(at)s,
        %(product_ids)s::text[], %(scores)s::real[], %(retrieval_ranks)s::integer[]
    WHERE NOT {FORGOTTEN.format(key="%(user_id)s", at="%(at)s")}
    ON CONFLICT (list_id) DO NOTHING
"""

_SEE = """
    INSERT INTO impression_views AS known (list_id, positions)
    SELECT list_id, array_agg(DISTINCT position ORDER BY position)
    FROM unnest(%s::text[], %s::smallint[]) AS seen(list_id, position) GROUP BY list_id ORDER BY list_id
    ON CONFLICT (list_id) DO UPDATE
    SET positions = ARRAY(SELECT DISTINCT unnest(known.positions || excluded.positions) ORDER BY 1)
"""

# The events that belong to the lists `chosen` (a subquery's FROM and WHERE): each event to one list at most. An event that names
# its list belongs there; one that does not, to the latest list of its shopper that showed the product, chosen or not.
ATTRIBUTED = """
    WITH chosen AS MATERIALIZED (SELECT list_id, user_id, at, product_ids FROM impressions WHERE {chosen}),
    named AS (
        SELECT chosen.list_id, events.product_id, events.kind
        FROM events JOIN chosen USING (list_id)
        WHERE events.list_id <> '' AND events.product_id = ANY(chosen.product_ids)
    ), unnamed AS (
        SELECT DISTINCT ON (events.event_id) shown.list_id, events.product_id, events.kind
        FROM (SELECT user_id, min(at) AS since, max(at) AS until FROM chosen GROUP BY user_id) AS shopper
        JOIN events ON events.user_id = shopper.user_id AND events.list_id = '' AND events.at >= shopper.since
            AND events.at < shopper.until + %(window)s * interval '1 hour'
        JOIN impressions AS shown ON shown.user_id = events.user_id AND shown.at <= events.at
            AND shown.at > events.at - %(window)s * interval '1 hour' AND events.product_id = ANY(shown.product_ids)
        ORDER BY events.event_id, shown.at DESC, shown.list_id
    ), attributed AS (
        SELECT * FROM named UNION ALL SELECT unnamed.* FROM unnamed JOIN chosen USING (list_id)
    )
"""

_READ = """
    SELECT user_id, context, extract(epoch FROM impressions.at)::float8, product_ids, views.positions, taken.products
    FROM impressions
    JOIN (
        SELECT list_id, array_agg(DISTINCT product_id) AS products FROM attributed WHERE kind <> ALL(%(ignored)s::text[])
        GROUP BY list_id
    ) AS taken USING (list_id)
    LEFT JOIN impression_views AS views USING (list_id)
    ORDER BY impressions.at, list_id
"""

_FORGET = """
    DELETE FROM {table} WHERE list_id = ANY(ARRAY(
        SELECT list_id FROM {table} WHERE at < %(before)s ORDER BY at LIMIT %(rows)s FOR UPDATE SKIP LOCKED
    ))
"""


@dataclass(frozen=True)
class Impression:
    """One list as it was shown, best first. The arm is there only if the list counts for an experiment."""

    list_id: str
    user_id: str | None
    kind: str  # of list
    context: str
    release: str
    rules: str
    rules_version: int | None
    experiment: str | None
    experiment_version: int | None
    arm: str | None
    at: datetime
    product_ids: Sequence[str]
    scores: Sequence[float]
    retrieval_ranks: Sequence[int]


@dataclass(frozen=True)
class ShownList:
    """A list out of which its shopper took something."""

    user_id: str
    context: str
    at: float  # epoch seconds
    product_ids: list[str]  # by place
    seen: list[int] | None  # places, from 1; None where the shop's pages do not say
    taken: list[str]


class Impressions:
    def __init__(self, pool: ConnectionPool[Connection[Any]]) -> None:
        self._pool = pool

    def put(self, impressions: Sequence[Impression]) -> int:
        """Write lists, all or none: how many. One that is there stays as it is, and one of somebody who was forgotten since it was
        shown is not written. What was shown to a session that was merged is the user's, as what it does is: else nobody would know
        out of which list it was taken."""
        rows = [
            {
                **vars(one), "product_ids": list(one.product_ids), "scores": list(one.scores),
                "retrieval_ranks": list(one.retrieval_ranks),
            }
            for one in impressions
        ]  # fmt: skip
        shoppers = {one.user_id for one in impressions if one.user_id is not None}
        with self._pool.connection() as connection, connection.transaction(), connection.cursor() as cursor:
            lock_shoppers(connection, shoppers, shared=True)
            cursor.executemany(_PUT, rows)
            return cursor.rowcount

    def see(self, positions: Sequence[tuple[str, Sequence[int]]]) -> None:
        """Note which places (from 1) of lists were seen. Said again, nothing changes; more of a list is added."""
        pairs = [(list_id, position) for list_id, seen in positions for position in seen]
        with self._pool.connection() as connection:
            connection.execute(_SEE, ([list_id for list_id, _ in pairs], [position for _, position in pairs]))

    def read_taken(self, since: float, ignored_kinds: Sequence[str]) -> list[ShownList]:
        """The lists "for you" shown to known shoppers since that moment (epoch seconds) out of which something was taken, by time.

        Events of `ignored_kinds` do not count as taking.
        """
        query = (
            ATTRIBUTED.format(chosen="user_id IS NOT NULL AND kind = 'for_you' AND at >= to_timestamp(%(since)s)")
            + _READ
        )
        parameters: Mapping[str, Any] = {
            "since": since, "window": ATTRIBUTION_HOURS, "ignored": list(ignored_kinds),
        }  # fmt: skip
        with self._pool.connection() as connection:
            return [ShownList(*row) for row in connection.execute(query, parameters)]

    def forget(self, before: datetime) -> Iterator[int]:
        """Delete lists shown before that moment, and what was seen of them, FORGET_ROWS at a time: how many lists each time.
        Another process that is at it is left to do it, and rows that somebody is moving or removing just now to the next run."""
        for table in ("impression_views", "impressions"):
            statement, rows = _FORGET.format(table=table), FORGET_ROWS
            while rows == FORGET_ROWS:
                with self._pool.connection() as connection, connection.transaction():
                    row = connection.execute("SELECT pg_try_advisory_xact_lock(%s)", (FORGET_LOCK,)).fetchone()
                    assert row is not None
                    if not row[0]:
                        return
                    rows = connection.execute(statement, {"before": before, "rows": FORGET_ROWS}).rowcount
                yield rows if table == "impressions" else 0
