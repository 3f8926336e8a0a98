"""Aliases of open values: what a person asked to have merged, by application, so that the last one can be undone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from psycopg import Connection
from psycopg.rows import class_row
from psycopg_pool import ConnectionPool

ALIASES_LOCK = 0x5354_0004  # key of the advisory lock that lets one process change the aliases at a time

_CURRENT = """
    SELECT DISTINCT ON (field, value) field, value, becomes, kind, application FROM vocabulary_aliases
    ORDER BY field, value, application DESC
"""


@dataclass(frozen=True)
class Alias:
    """From the next training on, `value` of `field` is read as `becomes`: one or more other values of the field.

    `kind` says where it came from (spelling, similar, compound, or a person's own); `application` counts from 1.
    """

    field: str
    value: str
    becomes: Sequence[str]
    kind: str
    application: int = 0


@dataclass(frozen=True)
class Applied:
    """What an application did. When nothing was new or changed there was none, and `application` is 0."""

    application: int
    new: int
    changed: int
    same: int


class Aliases:
    def __init__(self, pool: ConnectionPool[Connection[Any]]) -> None:
        self._pool = pool

    def current(self) -> list[Alias]:
        """The aliases in force, ordered by field and value."""
        with self._pool.connection() as connection:
            return _current(connection)

    def read(self) -> dict[tuple[str, str], list[str]]:
        """The aliases in force as a vocabulary takes them: {(field, value): values}."""
        return _as_map(self.current())

    def apply(
        self, aliases: Iterable[Alias], check: Callable[[Mapping[tuple[str, str], Sequence[str]]], object]
    ) -> Applied:
        """Put aliases into force, all or none, as one application; those in force already are left alone.

        `check` sees the aliases as they would stand together; whatever it raises stops the application.
        """
        with self._pool.connection() as connection, connection.transaction():
            connection.execute("SELECT pg_advisory_xact_lock(%s)", (ALIASES_LOCK,))
            before = _as_map(_current(connection))
            given = {(alias.field, alias.value): alias for alias in aliases}
            check({**before, **_as_map(given.values())})
            fresh = [alias for word, alias in given.items() if before.get(word) != list(alias.becomes)]
            changed = sum((alias.field, alias.value) in before for alias in fresh)
            if not fresh:
                return Applied(0, 0, 0, len(given))
            row = connection.execute("SELECT coalesce(max(application), 0) + 1 FROM vocabulary_aliases").fetchone()
            assert row is not None
            with connection.cursor() as cursor:
                cursor.executemany(
                    "INSERT INTO vocabulary_aliases (application, field, value, becomes, kind)"
                    " VALUES (%s, %s, %s, %s, %s)",
                    [(row[0], alias.field, alias.value, list(alias.becomes), alias.kind) for alias in fresh],
                )
            return Applied(row[0], len(fresh) - changed, changed, len(given) - len(fresh))

    def undo(self) -> int:
        """Take back the newest application; what it replaced is in force again. How many aliases it held."""
        with self._pool.connection() as connection, connection.transaction():
            connection.execute("SELECT pg_advisory_xact_lock(%s)", (ALIASES_LOCK,))
            return connection.execute(
                "DELETE FROM vocabulary_aliases WHERE application = (SELECT max(application) FROM vocabulary_aliases)"
            ).rowcount

    def forget(self, words: Iterable[tuple[str, str]]) -> int:
        """Remove the aliases of these (field, value) words, whenever applied; how many words had one."""
        fields, values = zip(*words, strict=True) if (words := list(words)) else ((), ())
        with self._pool.connection() as connection, connection.transaction():
            connection.execute("SELECT pg_advisory_xact_lock(%s)", (ALIASES_LOCK,))
            row = connection.execute(
                "WITH gone AS (DELETE FROM vocabulary_aliases"
                " WHERE (field, value) IN (SELECT * FROM unnest(%s::text[], %s::text[])) RETURNING field, value)"
                " SELECT count(DISTINCT (field, value)) FROM gone",
                ([*fields], [*values]),
            ).fetchone()
        assert row is not None
        return int(row[0])


def _current(connection: Connection[Any]) -> list[Alias]:
    with connection.cursor(row_factory=class_row(Alias)) as cursor:
        return cursor.execute(_CURRENT).fetchall()


def _as_map(aliases: Iterable[Alias]) -> dict[tuple[str, str], list[str]]:
    return {(alias.field, alias.value): list(alias.becomes) for alias in aliases}
