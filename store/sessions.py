"""Sessions: shoppers without an account, who may turn out to be a user."""

from __future__ import annotations

from collections.abc import Collection
from datetime import timedelta
from typing import Any
from zlib import crc32

from psycopg import Connection
from psycopg_pool import ConnectionPool

# First key of the advisory locks that let nothing of a shopper in while their session is merged, or they are forgotten. They are
# few, however many shoppers one call brings: the server has room for some thousands of locks.
SHOPPERS_LOCK = 0x5354_0007
LOCKS = 64
DELETE_ROWS = 10_000  # of one statement of `delete_before`

_LOCK = "SELECT {function}(%s, number) FROM unnest(%s::integer[]) AS numbers(number)"


def lock_shoppers(connection: Connection[Any], keys: Collection[str] | None, shared: bool = False) -> None:
    """Hold the shoppers (None: all there are) till the end of the transaction. Whoever writes what could come to a wrong one shares
    the hold: events of sessions, and lists of anybody, who may just be forgotten. Whoever moves or removes is alone."""
    numbers = range(LOCKS) if keys is None else sorted({crc32(key.encode()) % LOCKS for key in keys})
    if numbers:  # in one order for all, so that nobody waits in a circle
        function = "pg_advisory_xact_lock_shared" if shared else "pg_advisory_xact_lock"
        connection.execute(_LOCK.format(function=function), (SHOPPERS_LOCK, list(numbers)))


class SessionTakenError(Exception):
    """The session is a user's already: `owner`."""

    def __init__(self, owner: str) -> None:
        super().__init__(owner)
        self.owner = owner


class Sessions:
    """A session goes by the name that it has in the event log, see `catalog.session_key`."""

    def __init__(self, pool: ConnectionPool[Connection[Any]]) -> None:
        self._pool = pool

    def owner(self, session: str) -> str:
        """The user that a session was merged into, or the session itself."""
        with self._pool.connection() as connection:
            return owner_of(connection, session)

    def merge(self, session: str, user_id: str) -> int:
        """Make a session the user's, and what it did: how many events moved, 0 when it was merged before. What arrives later under
        the session's name goes to the user too.

        Raises SessionTakenError when it was merged into somebody else.
        """
        with self._pool.connection() as connection, connection.transaction():
            lock_shoppers(connection, [session])
            # Merged once more, it lives: it is as young as its last login.
            row = connection.execute(
                "INSERT INTO merged_sessions AS known (session_id, user_id) VALUES (%s, %s) ON CONFLICT (session_id) DO UPDATE"
                " SET merged_at = CASE WHEN known.user_id = excluded.user_id THEN now() ELSE known.merged_at END"
                " RETURNING user_id",
                (session, user_id),
            ).fetchone()
            assert row is not None
            if row[0] != user_id:
                raise SessionTakenError(row[0])
            moved = connection.execute("UPDATE events SET user_id = %s WHERE user_id = %s", (user_id, session)).rowcount
            # With its lists, or nobody would know out of which of them something was taken.
            connection.execute("UPDATE impressions SET user_id = %s WHERE user_id = %s", (user_id, session))
        return moved

    def delete_before(self, age: timedelta) -> int:
        """Let go of whose the sessions are that were last merged longer ago than `age`: how many. What they did stays the user's;
        what comes under their names from now on is of nobody again. One that is just merged anew stays."""
        deleted, rows = 0, DELETE_ROWS
        while rows == DELETE_ROWS:
            with self._pool.connection() as connection:
                rows = connection.execute(
                    "DELETE FROM merged_sessions WHERE session_id = ANY(ARRAY(SELECT session_id FROM merged_sessions"
                    " WHERE merged_at < now() - %s ORDER BY merged_at LIMIT %s FOR UPDATE SKIP LOCKED))",
                    (age, DELETE_ROWS),
                ).rowcount
            deleted += rows
        return deleted


def owner_of(connection: Connection[Any], session: str) -> str:
    """`Sessions.owner` on a given connection, in its transaction."""
    row = connection.execute("SELECT user_id FROM merged_sessions WHERE session_id = %s", (session,)).fetchone()
    return session if row is None else str(row[0])
