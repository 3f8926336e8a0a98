"""A key-value cache for readings that are dear to make again, such as the answers of an LLM."""

from __future__ import annotations

import json
from typing import Any

from psycopg import Connection
from psycopg_pool import ConnectionPool


class Cache:
    def __init__(self, pool: ConnectionPool[Connection[Any]]) -> None:
        self._pool = pool

    def get_many(self, kind: str, keys: list[str]) -> dict[str, dict[str, Any]]:
        """The values that are there."""
        with self._pool.connection() as connection:
            rows = connection.execute(
                "SELECT key, value FROM cache WHERE kind = %s AND key = ANY(%s::text[])", (kind, keys)
            ).fetchall()
        return dict(rows)

    def put_many(self, kind: str, values: dict[str, dict[str, Any]]) -> None:
        """Add or replace values. Each is a JSON object."""
        keys = sorted(values)  # one order for all writers: no deadlock
        with self._pool.connection() as connection:
            connection.execute(
                "INSERT INTO cache (kind, key, value) SELECT %s, * FROM unnest(%s::text[], %s::json[])"
                " ON CONFLICT (kind, key) DO UPDATE SET value = excluded.value",
                (kind, keys, [json.dumps(values[key]) for key in keys]),
            )
