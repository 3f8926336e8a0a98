"""Keys of the API, by their digests."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from psycopg import Connection
from psycopg.rows import class_row
from psycopg_pool import ConnectionPool


@dataclass(frozen=True)
class ApiKey:
    key_id: str
    digest: bytes  # SHA-256 of the key
    kind: str  # "admin" or "public"
    note: str
    made_at: datetime
    revoked_at: datetime | None


class Keys:
    def __init__(self, pool: ConnectionPool[Connection[Any]]) -> None:
        self._pool = pool

    def add(self, key_id: str, digest: bytes, kind: str, note: str) -> bool:
        """Add a key; False when another one has that id."""
        with self._pool.connection() as connection:
            added = connection.execute(
                "INSERT INTO api_keys (key_id, digest, kind, note) VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING",
                (key_id, digest, kind, note),
            )
        return added.rowcount == 1

    def read(self) -> list[ApiKey]:
        """Every key that was ever made, the oldest first."""
        with self._pool.connection() as connection, connection.cursor(row_factory=class_row(ApiKey)) as cursor:
            return cursor.execute(
                "SELECT key_id, digest, kind, note, made_at, revoked_at FROM api_keys ORDER BY made_at, key_id"
            ).fetchall()

    def revoke(self, key_id: str) -> bool:
        """The key opens nothing any more; False when there is no such key in force."""
        with self._pool.connection() as connection:
            revoked = connection.execute(
                "UPDATE api_keys SET revoked_at = now() WHERE key_id = %s AND revoked_at IS NULL", (key_id,)
            )
        return revoked.rowcount == 1
