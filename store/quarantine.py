"""Rows that did not get in, kept with the reason so that a person can mend them."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from psycopg import Connection
from psycopg.rows import class_row
from psycopg_pool import ConnectionPool

from catalog import Rejected

CHUNK = 10_000  # rows of one statement
API = "api"  # the source of what came over HTTP
SCAN_ROWS = 20_000  # looked through by one statement of `rows_of`
MOST_OF_A_CALL = 100
MOST_REFUSED = 10_000
SWEEP_LOCK = 0x5354_0009  # key of the advisory lock that lets one process at a time remove rows above a bound
# A field that names the shopper, in our own rows and in those of the sources that we import.
_SHOPPER_FIELD = re.compile("user|customer|session|shopper|reviewer|member", re.IGNORECASE)

_INSERT = """
    INSERT INTO quarantine (digest, source, file, line, reason, raw)
    SELECT md5(jsonb_build_array(%(source)s::text, file, line, reason, raw)::text), %(source)s, file, line, reason, raw
    FROM unnest(%(files)s::text[], %(lines)s::bigint[], %(reasons)s::text[], %(raws)s::text[])
        AS rejected(file, line, reason, raw)
    ON CONFLICT (digest) DO NOTHING
"""

# The rows after `after` that hold one of `forms` anywhere, of the next `rows`, and where those end.
_HOLDING = """
    WITH part AS MATERIALIZED (SELECT digest, raw FROM quarantine WHERE digest > %(after)s ORDER BY digest LIMIT %(rows)s),
    holding AS (SELECT * FROM part WHERE EXISTS (SELECT FROM unnest(%(forms)s::text[]) AS form WHERE strpos(raw, form) > 0))
    SELECT (SELECT max(digest) FROM part), ARRAY(SELECT digest FROM holding ORDER BY digest),
        ARRAY(SELECT raw FROM holding ORDER BY digest)
"""

# The rows that hold one of `forms` anywhere, of those that a snapshot taken at `mark` may not have seen.
_HOLDING_SINCE = """
    SELECT digest, raw FROM quarantine
    WHERE written_by >= %(mark)s::xid8 AND EXISTS (SELECT FROM unnest(%(forms)s::text[]) AS form WHERE strpos(raw, form) > 0)
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

    def add_refused(self, refused: list[Rejected]) -> None:
        """Keep what the API refused in one call, the first MOST_OF_A_CALL of it: anybody may send nonsense for ever, so of all that
        was refused the newest MOST_REFUSED stay."""
        if not refused:
            return
        with self._pool.connection() as connection, connection.transaction():
            insert(connection, API, refused[:MOST_OF_A_CALL])
            sweeper = connection.execute("SELECT pg_try_advisory_xact_lock(%s)", (SWEEP_LOCK,)).fetchone()
            if sweeper is not None and sweeper[0]:
                connection.execute(
                    "DELETE FROM quarantine WHERE digest IN ("
                    "SELECT digest FROM quarantine WHERE source = %s ORDER BY at DESC, line, digest OFFSET %s)",
                    (API, MOST_REFUSED),
                )

    def delete_before(self, moment: datetime) -> int:
        """Remove rows that came before that moment: how many."""
        with self._pool.connection() as connection:
            return connection.execute("DELETE FROM quarantine WHERE at < %s", (moment,)).rowcount

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


def mark(connection: Connection[Any]) -> str:
    """Of this moment, for `rows_since`."""
    row = connection.execute("SELECT pg_snapshot_xmin(pg_current_snapshot())::text").fetchone()
    assert row is not None
    return str(row[0])


def rows_of(connection: Connection[Any], ids: Collection[str]) -> Iterator[str]:
    """The digests of the rows that tell of a shopper known by any of `ids`. In a row of JSON a field that names a shopper says so,
    in any other the id as a word of its own: better a row too many than a trace. Reads all rows, SCAN_ROWS at a time: rows that
    come meanwhile it may not see."""
    forms = _forms(ids)
    after: str | None = ""
    while after is not None:
        row = connection.execute(_HOLDING, {"after": after, "rows": SCAN_ROWS, "forms": sorted(forms)}).fetchone()
        assert row is not None
        after, digests, raws = row
        for digest, raw in zip(digests, raws, strict=True):
            if _tells_of(raw, ids, forms):
                yield digest


def rows_since(connection: Connection[Any], ids: Collection[str], mark: str) -> Iterator[str]:
    """The same of the rows that came after the `mark`, and perhaps of some from before."""
    forms = _forms(ids)
    for digest, raw in connection.execute(_HOLDING_SINCE, {"mark": mark, "forms": sorted(forms)}).fetchall():
        if _tells_of(raw, ids, forms):
            yield digest


def remove(connection: Connection[Any], digests: Collection[str]) -> int:
    """Remove rows, in the connection's transaction: how many were there."""
    return connection.execute("DELETE FROM quarantine WHERE digest = ANY(%s)", (sorted(digests),)).rowcount


def _forms(ids: Collection[str]) -> set[str]:
    """How an id may be spelt in a row."""
    return {form for name in ids for form in (name, *(json.dumps(name, ensure_ascii=a)[1:-1] for a in (True, False)))}


def _tells_of(raw: str, ids: Collection[str], spellings: Collection[str]) -> bool:
    try:
        row = json.loads(raw)
    except ValueError:
        row = None
    if isinstance(row, dict):
        told = [value for name, value in row.items() if _SHOPPER_FIELD.search(name)]
        # White space around an id, or a list where one id belongs, may be why the row is here.
        if any(str(value).strip() in ids for value in told):
            return True
        raw = json.dumps([value for value in told if isinstance(value, (dict, list))], ensure_ascii=False)
    return any(re.search(rf"(?<!\w){re.escape(form)}(?!\w)", raw) for form in spellings)


def _storable(text: str) -> str:
    """A row may be here because of its bytes; PostgreSQL takes neither NUL nor lone surrogates, so both are spelt."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\x00", "\\x00")
