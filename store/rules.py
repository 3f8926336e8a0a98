"""Business rules by name and version, and which version of each name is live."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from psycopg import Connection
from psycopg.rows import class_row
from psycopg_pool import ConnectionPool

from rules import DEFAULT, NamedRules, RuleSet, read_stored

log = logging.getLogger("styletower")
RULES_LOCK = 0x5354_0006  # first key of the advisory lock that lets one process at a time change the rules of a name
FRESH_SECONDS = 0.5  # for so long a worker goes by what it read, so another one's change is seen within a second
MAX_LISTED = 1000

_LIVE = "(SELECT version FROM rules_turns WHERE name = rules.name ORDER BY turn DESC LIMIT 1)"
_VERSION = f"name, version, version IS NOT DISTINCT FROM {_LIVE} AS live, who, note, made_at, rules"


@dataclass(frozen=True)
class RulesVersion:
    name: str
    version: int
    live: bool
    who: str
    note: str
    made_at: datetime
    problem: str  # why this version of the program cannot read it; empty when it can


class UnreadableRulesError(Exception):
    """A version cannot be made live, since this program cannot read it; says why."""


@dataclass(frozen=True)
class RulesTurn:
    """That a version was made live."""

    name: str
    version: int
    who: str
    note: str
    at: datetime


class Rules:
    def __init__(self, pool: ConnectionPool[Connection[Any]]) -> None:
        self._pool = pool
        self._read: dict[str, tuple[float, NamedRules | None]] = {}  # what was live at a moment of time.monotonic()
        self._changes = 0  # made by this process
        self._said: set[tuple[str, int]] = set()  # versions of which the log has that they cannot be read

    def live(self, name: str) -> NamedRules | None:
        """The live version, at most FRESH_SECONDS old; None when nothing of that name was ever made live. One that cannot be read
        is empty, and says why: no list fails for it."""
        read_at, named = self._read.get(name, (0.0, None))
        now = time.monotonic()
        if name in self._read and now - read_at < FRESH_SECONDS:
            return named
        changes = self._changes
        with self._pool.connection() as connection:
            row = connection.execute(
                f"SELECT version, rules FROM rules WHERE name = %s AND version = {_LIVE}", (name,)
            ).fetchone()
        named = None if row is None else NamedRules(name, row[0], *read_stored(row[1]))
        if row is not None and named is not None and named.problem and (name, row[0]) not in self._said:
            self._said.add((name, row[0]))
            log.error(
                "version %d of the rules %r is live and cannot be read, so lists are made without it (%s); PUT /rules with what it "
                "should be, or make another version live",
                row[0], name, named.problem,
            )  # fmt: skip
        # Names that are not there are no reason to remember anything, except the one that every request asks for. Nor is what was
        # read while another thread changed it: the next request is to see the change.
        if (named is not None or name == DEFAULT or name in self._read) and changes == self._changes:
            self._read[name] = now, named
        return named

    def last_live(self, name: str) -> NamedRules | None:
        """What `live` knew last, without asking the database."""
        return self._read.get(name, (0.0, None))[1]

    def put(self, name: str, rules: RuleSet, who: str, note: str, live: bool) -> RulesVersion:
        """A new version, live at once if so wished."""
        with self._pool.connection() as connection, connection.transaction():
            connection.execute("SELECT pg_advisory_xact_lock(%s, hashtext(%s))", (RULES_LOCK, name))
            row = connection.execute(
                "INSERT INTO rules (name, version, rules, who, note)"
                " SELECT %(name)s, coalesce(max(version), 0) + 1, %(rules)s::json, %(who)s, %(note)s"
                " FROM rules WHERE name = %(name)s RETURNING version",
                {
                    "name": name,
                    "rules": rules.model_dump_json(by_alias=True, exclude_defaults=True),
                    "who": who,
                    "note": note,
                },
            ).fetchone()
            assert row is not None
            if live:
                _turn(connection, name, row[0], who, note)
        return self._changed(name, row[0])

    def make_live(self, name: str, version: int, who: str, note: str) -> RulesVersion:
        """Raises LookupError when there is no such version, UnreadableRulesError when this program cannot read it."""
        with self._pool.connection() as connection, connection.transaction():
            connection.execute("SELECT pg_advisory_xact_lock(%s, hashtext(%s))", (RULES_LOCK, name))
            found = connection.execute(
                "SELECT rules FROM rules WHERE name = %s AND version = %s", (name, version)
            ).fetchone()
            if found is None:
                raise LookupError(f"{name} version {version}")
            if problem := read_stored(found[0])[1]:
                raise UnreadableRulesError(problem)
            _turn(connection, name, version, who, note)
        return self._changed(name, version)

    def get(self, name: str, version: int) -> tuple[RulesVersion, RuleSet, Any] | None:
        """A version, its rules (none if they cannot be read), and the JSON that is stored."""
        with self._pool.connection() as connection:
            row = connection.execute(
                f"SELECT {_VERSION} FROM rules WHERE name = %s AND version = %s", (name, version)
            ).fetchone()
        if row is None:
            return None
        rules, problem = read_stored(row[-1])
        return RulesVersion(*(*row[:-1], problem)), rules, row[-1]

    def versions(self, name: str | None = None) -> list[RulesVersion]:
        """The newest first; at most MAX_LISTED."""
        with self._pool.connection() as connection:
            rows = connection.execute(
                f"SELECT {_VERSION} FROM rules WHERE %(name)s::text IS NULL OR name = %(name)s"
                " ORDER BY made_at DESC, name, version DESC LIMIT %(limit)s",
                {"name": name, "limit": MAX_LISTED},
            ).fetchall()
        return [RulesVersion(*(*row[:-1], read_stored(row[-1])[1])) for row in rows]

    def history(self, name: str | None = None) -> list[RulesTurn]:
        """What was made live, the latest first; at most MAX_LISTED."""
        with self._pool.connection() as connection, connection.cursor(row_factory=class_row(RulesTurn)) as cursor:
            return cursor.execute(
                "SELECT name, version, who, note, at FROM rules_turns"
                " WHERE %(name)s::text IS NULL OR name = %(name)s ORDER BY turn DESC LIMIT %(limit)s",
                {"name": name, "limit": MAX_LISTED},
            ).fetchall()

    def _changed(self, name: str, version: int) -> RulesVersion:
        self._changes += 1
        self._read.pop(name, None)
        found = self.get(name, version)
        assert found is not None
        return found[0]


def _turn(connection: Connection[Any], name: str, version: int, who: str, note: str) -> None:
    connection.execute(
        "INSERT INTO rules_turns (name, version, who, note) VALUES (%s, %s, %s, %s)", (name, version, who, note)
    )
