"""Experiments: which one runs, which ones ran, and what their shoppers did."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from psycopg import Connection
from psycopg_pool import ConnectionPool

from experiments import AnsweredBy, Arm, Experiment, Tally
from store.impressions import ATTRIBUTED, ATTRIBUTION_HOURS

REPORT_SECONDS = 30  # that a report may take, whatever bounds other statements: it reads every list of an experiment
EXPERIMENTS_LOCK = 0x5354_0006  # key of the advisory lock that lets one process start or stop at a time

_COLUMNS = "name, version, arms, note, started_at, stopped_at"

# One row for all shoppers of an arm who did the same: few rows, however many shoppers. A look at a shown product's page is a click
# under another name, and shops send the one or the other.
_TALLIES = """
    , lists AS (
        SELECT list_id, bool_or(kind IN ('click', 'view')) AS click, bool_or(kind = 'cart') AS cart,
            bool_or(kind = 'purchase') AS purchase
        FROM attributed GROUP BY list_id
    ), shoppers AS (
        SELECT arm, user_id, count(*) AS lists, count(*) FILTER (WHERE click) AS click,
            count(*) FILTER (WHERE cart) AS cart, count(*) FILTER (WHERE purchase) AS purchase
        FROM impressions LEFT JOIN lists USING (list_id)
        WHERE experiment = %(name)s AND experiment_version = %(version)s GROUP BY arm, user_id
    )
    SELECT arm, count(*), lists, click, cart, purchase FROM shoppers GROUP BY arm, lists, click, cart, purchase
    ORDER BY arm, lists, click, cart, purchase
"""

_ANSWERED_BY = """
    SELECT arm, release, rules, rules_version, count(*), min(at), max(at) FROM impressions
    WHERE experiment = %(name)s AND experiment_version = %(version)s
    GROUP BY arm, release, rules, rules_version ORDER BY arm, min(at), release, rules, rules_version
"""


class Experiments:
    def __init__(self, pool: ConnectionPool[Connection[Any]]) -> None:
        self._pool = pool

    def start(self, name: str, arms: Sequence[Arm], note: str) -> Experiment | None:
        """Start a new version, in place of the one that runs under this name; the same again changes nothing.

        None when another experiment runs: there is one at a time.
        """
        with self._pool.connection() as connection, connection.transaction():
            connection.execute("SELECT pg_advisory_xact_lock(%s)", (EXPERIMENTS_LOCK,))
            running = _running(connection)
            if running is not None and running.name != name:
                return None
            if running is not None and (running.arms, running.note) == (list(arms), note):
                return running
            connection.execute("UPDATE experiments SET stopped_at = now() WHERE stopped_at IS NULL")
            row = connection.execute(
                "INSERT INTO experiments (name, version, arms, note)"
                " SELECT %(name)s, coalesce(max(version), 0) + 1, %(arms)s, %(note)s FROM experiments WHERE name = %(name)s"
                f" RETURNING {_COLUMNS}",
                {"name": name, "arms": json.dumps([arm.model_dump() for arm in arms]), "note": note},
            ).fetchone()
        assert row is not None
        return _experiment(row)

    def stop(self, name: str) -> Experiment | None:
        """The newest version, stopped now unless it was before; None when there is none."""
        with self._pool.connection() as connection, connection.transaction():
            connection.execute("SELECT pg_advisory_xact_lock(%s)", (EXPERIMENTS_LOCK,))
            connection.execute(
                "UPDATE experiments SET stopped_at = now() WHERE name = %s AND stopped_at IS NULL", (name,)
            )
            row = connection.execute(
                f"SELECT {_COLUMNS} FROM experiments WHERE name = %s ORDER BY version DESC LIMIT 1", (name,)
            ).fetchone()
        return None if row is None else _experiment(row)

    def running(self) -> Experiment | None:
        with self._pool.connection() as connection:
            return _running(connection)

    def read(self, name: str | None = None) -> list[Experiment]:
        """Every version of every experiment, or of one, the newest first."""
        with self._pool.connection() as connection:
            rows = connection.execute(
                f"SELECT {_COLUMNS} FROM experiments WHERE %(name)s::text IS NULL OR name = %(name)s"
                " ORDER BY started_at DESC, name, version DESC",
                {"name": name},
            ).fetchall()
        return [_experiment(row) for row in rows]

    def tallies(self, name: str, version: int) -> list[Tally]:
        """What the shoppers of each arm did with the lists that they were shown."""
        query = ATTRIBUTED.format(chosen="experiment = %(name)s AND experiment_version = %(version)s") + _TALLIES
        return [Tally(*row) for row in self._reported(query, name, version)]

    def answered_by(self, name: str, version: int) -> list[AnsweredBy]:
        """By what the lists of each arm were made, the first first."""
        return [AnsweredBy(*row) for row in self._reported(_ANSWERED_BY, name, version)]

    def _reported(self, query: str, name: str, version: int) -> list[Any]:
        parameters = {"name": name, "version": version, "window": ATTRIBUTION_HOURS}
        with self._pool.connection() as connection, connection.transaction():
            connection.execute("SELECT set_config('statement_timeout', %s, true)", (f"{REPORT_SECONDS}s",))
            return connection.execute(query, parameters).fetchall()


def _running(connection: Connection[Any]) -> Experiment | None:
    row = connection.execute(f"SELECT {_COLUMNS} FROM experiments WHERE stopped_at IS NULL").fetchone()
    return None if row is None else _experiment(row)


def _experiment(row: Sequence[Any]) -> Experiment:
    name, version, arms, note, started_at, stopped_at = row
    return Experiment(name, version, [Arm(**arm) for arm in arms], note, started_at, stopped_at)
