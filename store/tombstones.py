"""Tombstones: that a shopper was forgotten, for as long as something shown to them may still wait to be written."""

from __future__ import annotations

from collections.abc import Collection
from datetime import timedelta
from typing import Any

from psycopg import Connection
from psycopg_pool import ConnectionPool

# What is shown to a shopper may wait in a process's memory for so long, while the database is away; then it is dropped.
LONGEST_WAIT = timedelta(days=1)
KEPT = 2 * LONGEST_WAIT  # by far longer than anything waits
# A list that was under way at the moment has a later time, and the clocks of machines differ: so much is forgotten, too.
UNDER_WAY = timedelta(minutes=1)

# Whether what was shown at the moment `at` to the shopper `key` is of one who was forgotten since; null for nobody's.
FORGOTTEN = (
    "EXISTS (SELECT FROM tombstones WHERE digest = sha256(convert_to({key}, 'UTF8'))"
    f" AND {{at}} <= forgotten_at + interval '{UNDER_WAY.total_seconds():.0f} seconds')"
)


class Tombstones:
    def __init__(self, pool: ConnectionPool[Connection[Any]]) -> None:
        self._pool = pool

    def delete_old(self) -> int:
        """Remove those that nothing can wait for any more: how many. Those that are just set anew stay."""
        with self._pool.connection() as connection:
            return connection.execute(
                "DELETE FROM tombstones WHERE digest = ANY(ARRAY("
                "SELECT digest FROM tombstones WHERE forgotten_at < now() - %s FOR UPDATE SKIP LOCKED))",
                (KEPT,),
            ).rowcount


def add(connection: Connection[Any], keys: Collection[str]) -> None:
    """Set the tombstones of these shoppers, in the connection's transaction, which holds them (`store.sessions.lock_shoppers`)."""
    connection.execute(
        "INSERT INTO tombstones (digest, forgotten_at)"
        " SELECT DISTINCT sha256(convert_to(key, 'UTF8')), clock_timestamp() FROM unnest(%s::text[]) AS keys(key)"
        " ON CONFLICT (digest) DO UPDATE SET forgotten_at = excluded.forgotten_at",
        (list(keys),),
    )
