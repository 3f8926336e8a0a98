"""Shoppers: what is known of their bodies, and what they did last."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

import numpy as np
import orjson
from psycopg import Connection, sql
from psycopg_pool import ConnectionPool

from catalog import SESSION, User
from store import quarantine, tombstones
from store.sessions import SessionTakenError, lock_shoppers, owner_of
from store.vectors import BINARY, ItemRows, stack_ids, stack_vectors, table_of

# `{rows}` gives user_id, profile. Ordered, so that two writers cannot deadlock.
UPSERT = """
    INSERT INTO users (user_id, profile) SELECT user_id, profile FROM {rows} ORDER BY user_id
    ON CONFLICT (user_id) DO UPDATE SET profile = excluded.profile WHERE users.profile <> excluded.profile
"""

# One row at least: the outer join keeps the profile of a shopper without events. "Known" is asked of the event table
# itself, since events on items without a vector are not in `latest`.
_STATE = sql.SQL("""
    SELECT shopper.profile::text,
        shopper.profile IS NOT NULL OR EXISTS (SELECT FROM events WHERE user_id = %(user_id)s),
        latest.*
    FROM (SELECT (SELECT profile FROM users WHERE user_id = %(user_id)s) AS profile) AS shopper
    LEFT JOIN (
        SELECT product_id, kind, extract(epoch FROM at)::float8 AS at, {binary}, price
        FROM events JOIN {vectors} USING (product_id) LEFT JOIN products USING (product_id)
        WHERE user_id = %(user_id)s ORDER BY events.at DESC, product_id DESC LIMIT %(limit)s
    ) AS latest ON true
    ORDER BY latest.at, latest.product_id
""")


# Whatever table says of whom a row is does so in a column of this name: then it is forgotten with the rest.
_TABLES_OF_USERS = """
    SELECT columns.table_name FROM information_schema.columns JOIN information_schema.tables USING (table_schema, table_name)
    WHERE table_schema = current_schema() AND column_name = 'user_id' AND table_type = 'BASE TABLE' ORDER BY 1
"""


@dataclass(frozen=True)
class UserSummary:
    """What the shop knows of a user."""

    profile: dict[str, float]
    events: dict[str, int]  # by kind
    last_seen: datetime | None  # the newest event


@dataclass(frozen=True)
class UserState:
    """All that a request needs to know of a shopper. T events, oldest first; D, S and R as in `ItemRows`."""

    known: bool  # has a profile or any event
    profile: dict[str, float]
    product_ids: list[str]
    kinds: list[str]
    at: np.ndarray  # float64 [T], epoch seconds
    vectors: np.ndarray  # float32 [T, D]
    std_ids: np.ndarray  # int32 [T, S]
    re_ids: np.ndarray  # int32 [T, R]
    price: np.ndarray  # float64 [T], nan if unknown

    @classmethod
    def empty(cls, row_width: int) -> UserState:
        """A shopper of whom nothing is known; D is `row_width`."""
        no_ids = stack_ids([])
        vectors = np.empty((0, row_width), dtype=np.float32)
        return cls(False, {}, [], [], np.empty(0), vectors, no_ids, no_ids, np.empty(0))

    def extended(self, rows: ItemRows, kind: str, at: float, limit: int) -> UserState:
        """With `rows` met at the moment `at` (epoch seconds) behind what is there; the latest `limit` events stay."""
        count = len(rows.product_ids)
        start = max(0, len(self.product_ids) + count - limit)
        return UserState(
            self.known,
            self.profile,
            [*self.product_ids, *rows.product_ids][start:],
            [*self.kinds, *[kind] * count][start:],
            np.append(self.at, np.full(count, at))[start:],
            _joined(self.vectors, rows.vectors)[start:],
            _joined(self.std_ids, rows.std_ids)[start:],
            _joined(self.re_ids, rows.re_ids)[start:],
            np.append(self.price, np.full(count, np.nan))[start:],
        )


class Users:
    def __init__(self, pool: ConnectionPool[Connection[Any]]) -> None:
        self._pool = pool

    def put(self, users: list[User]) -> None:
        """Add or replace profiles; of one id given twice the last counts."""
        latest = {user.user_id: user.profile for user in users}
        with self._pool.connection() as connection:
            connection.execute(
                UPSERT.format(rows="unnest(%s::text[], %s::jsonb[]) AS given(user_id, profile)"),
                (list(latest), [orjson.dumps(profile).decode() for profile in latest.values()]),
            )

    def get(self, user_id: str) -> User | None:
        with self._pool.connection() as connection:
            row = connection.execute("SELECT profile FROM users WHERE user_id = %s", (user_id,)).fetchone()
        return None if row is None else User(user_id=user_id, profile=row[0])

    def read_ids(self) -> list[str]:
        """Every user who has a profile or an event, in the order of ids; no sessions."""
        with self._pool.connection() as connection:
            rows = connection.execute(
                "SELECT user_id FROM (SELECT user_id FROM users UNION SELECT user_id FROM events) AS everybody"
                " WHERE NOT starts_with(user_id, %s) ORDER BY user_id",
                (SESSION,),
            ).fetchall()
        return [user_id for (user_id,) in rows]

    def summary(self, user_id: str) -> UserSummary | None:
        """None for a user with neither profile nor events."""
        with self._pool.connection() as connection:
            row = connection.execute(
                "SELECT (SELECT profile FROM users WHERE user_id = %(user_id)s), coalesce(jsonb_object_agg(kind, of_kind)"
                " FILTER (WHERE kind IS NOT NULL), '{}'), max(latest)"
                " FROM (SELECT kind, count(*) AS of_kind, max(at) AS latest FROM events WHERE user_id = %(user_id)s"
                " GROUP BY kind) AS kinds",
                {"user_id": user_id},
            ).fetchone()
        assert row is not None
        profile, events, last_seen = row
        return None if profile is None and not events else UserSummary(profile or {}, events, last_seen)

    def forget(self, key: str) -> dict[str, int]:
        """Remove every row of a user, and of the sessions that were merged into them, or of a session that nobody owns (`key` is
        its name in events), in every table with a column `user_id`, and what the quarantine holds of them. All or none; rows
        removed by table. What was shown to them and is not written yet never will be (`store.tombstones`).

        The event of a session that comes later is of nobody again. Raises SessionTakenError for a session that is a user's: what it
        did cannot be told from what else that user did.
        """
        looked_for: set[str] = set()
        quarantined: set[str] = set()
        with self._pool.connection() as connection:
            names = _names(connection, key)
            mark = quarantine.mark(connection)
            while True:
                # Looking through the quarantine takes long where much was imported: nobody is held meanwhile.
                new = names - looked_for
                quarantined.update(quarantine.rows_of(connection, _spelt(new)))
                looked_for |= new
                with connection.transaction():
                    lock_shoppers(connection, None)
                    owner = owner_of(connection, key)
                    if owner != key:
                        raise SessionTakenError(owner)
                    names = _names(connection, key)
                    if names <= looked_for:  # else a session was merged meanwhile
                        quarantined.update(quarantine.rows_since(connection, _spelt(looked_for), mark))
                        return _remove(connection, looked_for, quarantined)

    def read_profiles(self) -> dict[str, dict[str, float]]:
        """The profile of every user that has one, by user id, in the order of ids."""
        with self._pool.connection() as connection:
            return dict(connection.execute("SELECT user_id, profile FROM users ORDER BY user_id").fetchall())

    def state(self, release: str, user_id: str, limit: int) -> UserState:
        """Profile and the latest `limit` events on items that have a vector in `release`, in one round trip."""
        with self._pool.connection() as connection, connection.cursor(binary=True) as cursor:
            rows = cursor.execute(_state_text(release), {"user_id": user_id, "limit": limit}, prepare=True).fetchall()
        profile, known = rows[0][:2]
        events = [row[2:] for row in rows if row[2] is not None]
        product_ids, kinds, at, vectors, std_ids, re_ids, price = zip(*events, strict=True) if events else ((),) * 7
        return UserState(
            known,
            {} if profile is None else {name: float(value) for name, value in orjson.loads(profile).items()},
            list(product_ids),
            list(kinds),
            np.array(at, dtype=np.float64),
            stack_vectors(vectors),
            stack_ids(std_ids),
            stack_ids(re_ids),
            np.array(price, dtype=np.float64),  # None becomes nan
        )


@lru_cache(64)
def _state_text(release: str) -> str:
    return _STATE.format(vectors=table_of(release), binary=BINARY).as_string()


def _names(connection: Connection[Any], key: str) -> set[str]:
    """Under what a shopper stands in tables: their id, and the names of the sessions that were merged into them."""
    rows = connection.execute("SELECT session_id FROM merged_sessions WHERE user_id = %s", (key,)).fetchall()
    return {key, *(session for (session,) in rows)}


def _spelt(names: set[str]) -> set[str]:
    """Sessions also as pages call them."""
    return names | {name.removeprefix(SESSION) for name in names}


def _remove(connection: Connection[Any], names: set[str], quarantined: set[str]) -> dict[str, int]:
    removed = {}
    for (table,) in connection.execute(_TABLES_OF_USERS).fetchall():
        statement = sql.SQL("DELETE FROM {} WHERE user_id = ANY(%s::text[])").format(sql.Identifier(table))
        removed[table] = connection.execute(statement, (sorted(names),)).rowcount
    removed["quarantine"] = quarantine.remove(connection, quarantined)
    tombstones.add(connection, names)
    return removed


def _joined(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Rows of both; an empty part has no width to agree on."""
    return np.concatenate([part for part in (first, second) if len(part)]) if len(first) + len(second) else first
