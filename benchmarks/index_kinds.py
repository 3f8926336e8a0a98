"""What half precision in the index costs and saves: `python -m benchmarks.index_kinds --items 100000`

Of a shop of that size (big_shop.py) the usual rows, where the release's search space has them, lie in two tables, as `halfvec`, as
in the store, and as `vector`, each with an HNSW index built alike. Compared are time and size of these, what searches find of exact
search in single precision, and what a search takes, in turns. Rows go to docs/performance.json.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
from pgvector import HalfVector
from psycopg import sql
from pydantic import Field

from benchmarks import big_shop
from benchmarks.big_shop import RELEASE, base_shop, open_shop
from benchmarks.performance import Row, save
from release import Release
from results import commit
from settings import Settings, run_script
from store import Store
from store.vectors import USUAL

KINDS = ("halfvec", "vector")
QUERIES = 200
FOUND = 100
MEMORY = "2GB"  # enough for either graph of a million


class IndexOptions(Settings):
    """Compare indexes of half and of single precision."""

    items: int = Field(100_000, ge=1000, description="size of catalogue")
    write: bool = Field(True, description="write what was compared into docs/performance.json")


def table_of(kind: str) -> sql.Identifier:
    return sql.Identifier(f"benchmark_{kind}")


def fill(store: Store, kind: str, placed: np.ndarray) -> None:
    with store.pool.connection() as connection:
        connection.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(table_of(kind)))
        connection.execute(
            sql.SQL("CREATE TABLE {} (number int4, placed {}({}))").format(
                table_of(kind), sql.SQL(kind), sql.Literal(placed.shape[1])
            )
        )
        into = sql.SQL("COPY {} FROM STDIN (FORMAT binary)").format(table_of(kind))
        with connection.cursor().copy(into) as copy:
            copy.set_types(["int4", kind])
            for number, row in enumerate(placed):
                copy.write_row((number, HalfVector(row.astype(np.float16)) if kind == "halfvec" else row))


def build(store: Store, kind: str) -> tuple[float, float]:
    """Seconds, and megabytes of the index."""
    with store.pool.connection() as connection, connection.transaction():
        connection.execute("SELECT set_config('maintenance_work_mem', %s, true)", (MEMORY,))
        started = time.perf_counter()
        connection.execute(
            sql.SQL("CREATE INDEX {} ON {} USING hnsw (placed {})").format(
                sql.Identifier(f"benchmark_{kind}_hnsw"), table_of(kind), sql.SQL(f"{kind}_ip_ops")
            )
        )
        seconds = time.perf_counter() - started
        size = connection.execute("SELECT pg_relation_size(%s::regclass)", (f"benchmark_{kind}_hnsw",)).fetchone()
    assert size is not None
    return seconds, size[0] / 2**20


def compare(store: Store, release: Release, base: big_shop.Base, items: int) -> dict[str, dict[str, float]]:
    """By metric, the figure of each of KINDS."""
    rows = store.vectors.fetch(RELEASE, [big_shop.name_of(number) for number in range(items)])
    space = release.search_space()
    placed, part = space.place(rows.vectors)
    usual = part == USUAL
    placed, exact = placed[usual], rows.vectors[usual]
    queries = big_shop.queries_of(release, base, rows.vectors, np.random.default_rng(1), QUERIES)
    figures: dict[str, dict[str, float]] = {}

    def note(metric: str, kind: str, value: float) -> None:
        figures.setdefault(metric, {})[kind] = value

    for kind in KINDS:
        fill(store, kind, placed)
        seconds, megabytes = build(store, kind)
        note("build, s", kind, seconds)
        note("size, MB", kind, megabytes)
    hits, times = dict.fromkeys(KINDS, 0), {kind: list[float]() for kind in KINDS}
    with store.pool.connection() as connection, connection.cursor(binary=True) as cursor:
        connection.execute(f"SET hnsw.ef_search = {int(release.manifest['index']['ef_search'])}")
        connection.execute("SET enable_seqscan = off")
        for query in queries:
            scores = exact @ query
            best = np.partition(scores, -FOUND)[-FOUND] - 1e-4  # items tied with the last one are as good
            moved: np.ndarray = space.query(query)
            asked: dict[str, Any] = {"halfvec": HalfVector(moved.astype(np.float16)), "vector": moved}
            for kind in KINDS:
                statement = sql.SQL("SELECT number FROM {} ORDER BY placed <#> %b::{} LIMIT {}").format(
                    table_of(kind), sql.SQL(kind), sql.Literal(FOUND)
                )
                started = time.perf_counter()
                found = cursor.execute(statement, (asked[kind],), prepare=True).fetchall()
                times[kind].append(time.perf_counter() - started)
                hits[kind] += int((scores[[number for (number,) in found]] >= best).sum())
        connection.execute("RESET hnsw.ef_search")
        connection.execute("RESET enable_seqscan")
        for kind in KINDS:
            connection.execute(sql.SQL("DROP TABLE {}").format(table_of(kind)))
            note(f"recall@{FOUND}", kind, hits[kind] / (FOUND * len(queries)))
            note("a search, ms", kind, 1000 * statistics.median(times[kind]))
    return figures


def main(options: IndexOptions) -> None:
    base = base_shop(options.data_dir / "benchmark")
    settings, store = open_shop(base, options.items)
    with store:
        figures = compare(store, Release.open(settings.models_dir, RELEASE), base, options.items)
    now, command = commit(), f"python -m benchmarks.index_kinds --items {options.items}"
    rows = []
    for metric, of in figures.items():
        half, single = of["halfvec"], of["vector"]
        rows.append(Row("index", options.items, metric, half, single, half / single, now, command))
        print(f"{metric:12s} halfvec {half:10.3f}  vector {single:10.3f}  x {half / single:.3f}")
    if options.write:
        save(rows)


if __name__ == "__main__":
    run_script(IndexOptions, main)
