"""Sessions: shoppers without an account, who may turn out to be a user."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any
from zlib import crc32

from psycopg import Connection
from psycopg_pool import ConnectionPool

# First key of the advisory locks that let no event of a session in while the session is merged or forgotten. They are few, however
# many sessions one call brings: the server has room for some thousands of locks.
SESSIONS_LOCK = 0x5354_0007
LOCKS = 64

_LOCK = "SELECT {function}(%s, number) FROM unnest(%s::integer[]) AS numbers(number)"


def lock_sessions(connection: Connection[Any], sessions: Collection[str] | None, shared: bool = False) -> None:
    """Hold the sessions (None: all there are) till the end of the transaction. Whoever writes their events shares the hold; whoever
    moves or removes them is alone."""
    numbers = range(LOCKS) if sessions is None else sorted({crc32(session.encode()) % LOCKS for session in sessions})
    if numbers:  # in one order for all, so that nobody waits in a circle
        function = "pg_advisory_xact_lock_shared" if shared else "pg_advisory_xact_lock"
        connection.execute(_LOCK.format(function=function), (SESSIONS_LOCK, list(numbers)))


class SessionTakenError(Exception):
    """The session is another user's already."""


class Sessions:
    """A session goes by the name that it has in the event log, see `catalog.session_key`."""

    def __init__(self, pool: ConnectionPool[Connection[Any]]) -> None:
        self._pool = pool

    def owner(self, session: str) -> str:
        """The user that a session was merged into, or the session itself."""
        with self._pool.connection() as connection:
            row = connection.execute("SELECT user_id FROM merged_sessions WHERE session_id = %s", (session,)).fetchone()
        return session if row is None else str(row[0])

    def merge(self, session: str, user_id: str) -> int:
        """Make a session the user's, and what it did: how many events moved, 0 when it was merged before. What arrives later under
        the session's name goes to the user too.

        Raises SessionTakenError when it was merged into somebody else.
        """
        with self._pool.connection() as connection, connection.transaction():
            lock_sessions(connection, [session])
            connection.execute(
                "INSERT INTO merged_sessions (session_id, user_id) VALUES (%s, %s) ON CONFLICT DO NOTHING",
                (session, user_id),
            )
            owner = connection.execute(
                "SELECT user_id FROM merged_sessions WHERE session_id = %s", (session,)
            ).fetchone()
            if owner != (user_id,):
                raise SessionTakenError(session)
            moved = connection.execute("UPDATE events SET user_id = %s WHERE user_id = %s", (user_id, session)).rowcount
            # With its lists, or nobody would know out of which of them something was taken.
            connection.execute("UPDATE impressions SET user_id = %s WHERE user_id = %s", (user_id, session))
        return moved
