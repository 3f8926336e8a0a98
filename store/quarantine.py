"""Rows that did not get in, kept with the reason so that a person can mend them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from psycopg import Connection
from psycopg.rows import class_row
from psycopg_pool import ConnectionPool

from catalog import Rejected

CHUNK = 10_000  # rows of one statement

_INSERT = """
    INSERT INTO quarantine (digest, source, file, line, reason, raw)
    SELECT md5(jsonb_build_array(%(source)s::text, file, line, reason, raw)::text), %(source)s, file, line, reason, raw
    FROM unnest(%(files)s::text[], %(lines)s::bigint[], %(reasons)s::text[], %(raws)s::text[])
        AS rejected(file, line, reason, raw)
    ON CONFLICT (digest) DO NOTHING
"""


@dataclass(frozen=True)
class QuarantinedRow:
    """`line` 0 means that the line is not known."""

    source: str
    file: str
    line: int
    reason: str
    raw: str
    at: datetime


class Quarantine:
    def __init__(self, pool: ConnectionPool[Connection[Any]]) -> None:
        self._pool = pool

    def add(self, source: str, rejected: list[Rejected]) -> None:
        """Keep rows; one that is there already (same source, place, reason and content) stays as it is."""
        with self._pool.connection() as connection:
            insert(connection, source, rejected)

    def read(self, source: str | None = None, limit: int = 1000) -> list[QuarantinedRow]:
        """In the order of source, file and line."""
        with self._pool.connection() as connection, connection.cursor(row_factory=class_row(QuarantinedRow)) as cursor:
            return cursor.execute(
                "SELECT source, file, line, reason, raw, at FROM quarantine"
                " WHERE %(source)s::text IS NULL OR source = %(source)s"
                " ORDER BY source, file, line, digest LIMIT %(limit)s",
                {"source": source, "limit": limit},
            ).fetchall()

    def counts(self, source: str | None = None) -> dict[str, int]:
        """Rows by reason, most frequent first."""
        with self._pool.connection() as connection:
            rows = connection.execute(
                "SELECT reason, count(*) FROM quarantine WHERE %(source)s::text IS NULL OR source = %(source)s"
                " GROUP BY reason ORDER BY count(*) DESC, reason",
                {"source": source},
            ).fetchall()
        return dict(rows)


def insert(connection: Connection[Any], source: str, rejected: Iterable[Rejected]) -> None:
    """`Quarantine.add` on a given connection, in its transaction."""
    rows = list(rejected)
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        connection.execute(
            _INSERT,
            {
                "source": source,
                "files": [_storable(row.file) for row in chunk],
                "lines": [row.line for row in chunk],
                "reasons": [_storable(row.reason) for row in chunk],
                "raws": [_storable(row.raw) for row in chunk],
            },
        )


def _storable(text: str) -> str:
    """A row may be here because of its bytes; PostgreSQL takes neither NUL nor lone surrogates, so both are spelt."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\x00", "\\x00")
