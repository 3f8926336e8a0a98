"""Which releases were made, with their manifests and the words they learned after training."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg
from psycopg import Connection
from psycopg.rows import class_row
from psycopg_pool import ConnectionPool

RETRAIN_LOCK = 0x5354_0008  # key of the advisory lock that lets one process retrain at a time
WORDS_LOCK = 0x5354_0003  # first key of the advisory lock that lets one process add words to a release at a time


@dataclass(frozen=True)
class RecordedRelease:
    name: str
    manifest: dict[str, Any]
    recorded_at: datetime


class Releases:
    def __init__(self, pool: ConnectionPool[Connection[Any]]) -> None:
        self._pool = pool

    def record(self, name: str, manifest: dict[str, Any]) -> None:
        """Add a release; a name that is there gets the new manifest."""
        with self._pool.connection() as connection:
            connection.execute(
                "INSERT INTO releases (name, manifest) VALUES (%s, %s)"
                " ON CONFLICT (name) DO UPDATE SET manifest = excluded.manifest, recorded_at = now()",
                (name, json.dumps(manifest)),
            )

    def read(self) -> list[RecordedRelease]:
        """Ordered by name: names begin with the time, so the newest is last."""
        with self._pool.connection() as connection, connection.cursor(row_factory=class_row(RecordedRelease)) as cursor:
            return cursor.execute("SELECT name, manifest, recorded_at FROM releases ORDER BY name").fetchall()

    def delete(self, name: str) -> None:
        """Forget a release and its words; its vectors are dropped by `store.vectors.drop`."""
        with self._pool.connection() as connection, connection.transaction():
            connection.execute("DELETE FROM release_words WHERE release = %s", (name,))
            connection.execute("DELETE FROM releases WHERE name = %s", (name,))

    @contextmanager
    def retraining(self) -> Iterator[bool]:
        """Holds the lock of retraining for the length of a `with` block; False when another process holds it. It ends with the
        connection, so a process that is killed leaves nothing locked."""
        with self._pool.connection() as connection:
            row = connection.execute("SELECT pg_try_advisory_lock(%s)", (RETRAIN_LOCK,)).fetchone()
            assert row is not None
            try:
                yield row[0]
            finally:
                with suppress(psycopg.OperationalError):  # a connection that is gone holds no lock
                    connection.execute("SELECT pg_advisory_unlock(%s)", (RETRAIN_LOCK,))

    def words(self, release: str) -> dict[tuple[str, str], int]:
        """The ids of the (field, value) words that came after training, in the order of ids."""
        with self._pool.connection() as connection:
            return _words(connection, release)

    def add_words(self, release: str, words: Sequence[tuple[str, str]], first_id: int) -> dict[tuple[str, str], int]:
        """Give new (field, value) words the next ids, from `first_id` on without a gap; returns all words.

        Processes that add words at the same time agree: a word has one id, an id one word.
        """
        with self._pool.connection() as connection, connection.transaction():
            connection.execute("SELECT pg_advisory_xact_lock(%s, hashtext(%s))", (WORDS_LOCK, release))
            known = _words(connection, release)
            for word in words:
                known.setdefault(word, first_id + len(known))
            connection.execute(
                "INSERT INTO release_words (release, field, value, id)"
                " SELECT %s, * FROM unnest(%s::text[], %s::text[], %s::integer[]) ON CONFLICT DO NOTHING",
                (release, [field for field, _ in known], [value for _, value in known], list(known.values())),
            )
        return known


def _words(connection: Connection[Any], release: str) -> dict[tuple[str, str], int]:
    rows = connection.execute(
        "SELECT field, value, id FROM release_words WHERE release = %s ORDER BY id", (release,)
    ).fetchall()
    return {(field, value): word_id for field, value, word_id in rows}
