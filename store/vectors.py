"""Item vectors of the releases, and the search over them: inner product, by HNSW or exactly.

Each release has a table of its own, so that a release is built beside the live one and dropped at once.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import lru_cache
from typing import Any

import numpy as np
import psycopg
from pgvector import HalfVector
from psycopg import Connection, sql
from psycopg_pool import ConnectionPool

from conditions import ArrivalRange, Condition, InStock, OfArrival, OfPrice, OfStd, PriceRange, moment
from store.conditions import condition_sql

# Scoring all that a filter keeps costs as much as it keeps. The index instead meets the more before it has enough, the fewer of its
# items pass: `limit * items / kept` in each of its parts. The costs are equal at about this many times sqrt(limit * items); what
# keeps fewer is answered exactly.
EXACT_FACTOR = 2.2
# Counting up to that bound takes longer than an index search, so it is left out when the planner's estimate is this
# many times above it.
ESTIMATE_MARGIN = 2
MOST_INDEX_MEMORY = 4 * 1024 * 1024  # kB that an index build may take, whatever it needs
DEFAULT_EF_SEARCH = 200  # recall@100 is .998 and up at 300,000 items
MAX_EF_SEARCH = 1000  # pgvector's own bound
MAX_M, MAX_EF_CONSTRUCTION = 100, 1000  # likewise

# What nobody met is asked for and searched so many times as wide as its share of a list.
SHARES_ASKED, SHARES_WIDE = 2, 6
# Of the items that a history is linked to the strongest are looked up, twice a list and at least so many. A weak link helps only an
# item that is all but near enough without it: on held-out days of three data sets the first hundred are the same to 98 or 99 %, and
# no worse.
LINKED_ASKED, LEAST_LINKED = 2, 200

_PREFIX = "item_vectors_"
_UNFINISHED = "~new"  # after the name of a release whose table is being built
_RELEASE = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}(~new)?")  # with prefix and index suffix within PostgreSQL's 63 bytes
USUAL, OUTSTANDING, UNTOUCHED = range(3)  # the parts of an index, see search_space.py
PARTS = 3
CAREFUL_ROWS = 50_000  # that nobody met, of which a graph with three times the links still takes but a minute
SAMPLED_ROWS = 5_000  # of which an index is built to foresee how long one of all will take: half a second
DELETE_WAIT = "200ms"  # for a table on which an index is being built; see `delete`
OUTDATED_WAIT = "10min"  # for a look at every product, of a great catalogue; see `outdated`
_COLUMNS = sql.SQL("product_id, vector, placed, part, std_ids, re_ids, linked, link_strength, features_at")
# The wire form as bytes: a hundred rows become one array at once (`stack_vectors`, `stack_ids`), not number by number.
BINARY = sql.SQL("vector_send(vector), array_send(std_ids), array_send(re_ids)")

# What a shopper met, however long ago. A subquery, not a list: nobody carries ten thousand ids to and fro.
_MET = sql.SQL("(SELECT product_id FROM events WHERE user_id = %(met_by)s::text)")
_MET_SO = sql.SQL("(SELECT product_id FROM events WHERE user_id = %(met_by)s::text AND ({}))")

# The best by inner product and links of what `near` gives and of what the items of the history are linked to (see item_links.py),
# among them the best `new` that nobody met. Links only ever add, so whatever is ahead of an unlinked item by inner product stays
# ahead of it: none of these is missed. Variants are looked up as they are now, so that a new colour is one at once.
# Few columns are put in order. All others, and what a product has, are read of what is kept alone.
_BEST = sql.SQL("""
    WITH every_link AS (
        SELECT product_id, sum(together)::float4 AS together, max(variant)::float4 AS variant
        FROM (
            SELECT link.product_id, link.strength AS together, 0 AS variant
            FROM {vectors} AS met, unnest(met.linked, met.link_strength) AS link(product_id, strength)
            WHERE met.product_id = ANY(%(history)s::text[])
            UNION ALL
            (SELECT product_id, 0 AS together, 1 AS variant FROM products WHERE group_id IN (
                SELECT group_id FROM products WHERE product_id = ANY(%(history)s::text[])
            ) AND product_id <> ALL(%(history)s::text[]) LIMIT {most_variants})
        ) AS every GROUP BY product_id
    ), links AS MATERIALIZED (
        SELECT *, %(together)s::float8 * ln(1 + %(scale)s::float8 * together) + %(variant)s::float8 * variant AS gain
        FROM every_link
    ), {near}, scored AS (
        SELECT product_id, part, place, coalesce(together, 0) AS together, coalesce(variant, 0) AS variant,
            coalesce(gain, 0) - distance AS score
        FROM (SELECT product_id, part, place, distance FROM near {linked}) AS every LEFT JOIN links USING (product_id)
    ), ranked AS MATERIALIZED (
        SELECT * FROM scored ORDER BY score DESC, product_id
    ), share AS MATERIALIZED (
        SELECT * FROM ranked WHERE part = {untouched} LIMIT {new}
    ), best AS (
        SELECT * FROM share
        UNION ALL
        (SELECT * FROM ranked WHERE product_id NOT IN (SELECT product_id FROM share)
        LIMIT greatest(0, {limit} - (SELECT count(*) FROM share)))
    )
    SELECT reached.count, std IS NOT NULL, best.product_id, score, {binary}, price, title, best.part, together, variant
    FROM ({reached}) AS reached
        LEFT JOIN (
            best JOIN {vectors} AS v ON v.ctid = best.place
                LEFT JOIN products ON products.product_id = best.product_id
        ) ON true
    ORDER BY score DESC, best.product_id
""")
# One index scan a part. The index holds half precision, and gives the rows in an order that is nearly theirs.
_NEAR = sql.SQL("near AS MATERIALIZED ({parts})")
_PART = sql.SQL("""
    (SELECT product_id, v.part, v.ctid AS place, v.vector <#> %(query)b AS distance FROM {rows}
    WHERE v.part = {part} AND product_id <> ALL(%(exclude)s::text[]) AND product_id NOT IN {met} AND {passes}
    ORDER BY v.placed <#> %(placed)b::halfvec LIMIT {limit})
""")
# A part searched less wide, as is all that is searched after it. A scan asks for its width when it begins, and this one does not
# begin before the row that it is joined to is there.
_NARROWER = sql.SQL("""
    (SELECT part.* FROM
        (SELECT set_config('hnsw.ef_search', {width}, true) AS width OFFSET 0) AS narrower, LATERAL {part} AS part)
""")
_NARROWED = sql.SQL("narrower.width IS NOT NULL AND {}")
# Each looked up once, in the order of the key.
_LINKED = sql.SQL("""
    UNION ALL
    SELECT product_id, v.part, v.ctid, v.vector <#> %(query)b FROM {rows}
    WHERE v.product_id = ANY(ARRAY(
            SELECT product_id FROM (
                SELECT product_id FROM links WHERE product_id NOT IN (SELECT product_id FROM near) {strongest}
            ) AS strongest ORDER BY product_id
        )) AND product_id <> ALL(%(exclude)s::text[]) AND product_id NOT IN {met} AND {passes}
""")
# All that pass. `kept` may stop one above the bound: then the filter keeps too many and nothing is scored.
_ALL = sql.SQL("""
    kept AS MATERIALIZED (
        SELECT product_id FROM products WHERE std IS NOT NULL AND {filters} {bound}
    ), near AS MATERIALIZED (
        SELECT product_id, v.part, v.ctid AS place, v.vector <#> %(query)b AS distance
        FROM kept JOIN {vectors} AS v USING (product_id)
        WHERE product_id <> ALL(%(exclude)s::text[]) AND product_id NOT IN {met} AND {within}
    )
""")
# Products that somebody else chose, in the order chosen.
_AMONG = sql.SQL("""
    SELECT NULL, true, v.product_id, -(v.vector <#> %(query)b), {binary}, p.price, p.title, v.part, 0, 0
    FROM unnest(%(ids)s::text[]) WITH ORDINALITY AS given(product_id, place)
        JOIN {vectors} AS v USING (product_id) JOIN products AS p USING (product_id)
    WHERE p.std IS NOT NULL AND v.product_id <> ALL(%(exclude)s::text[]) AND v.product_id NOT IN {met} AND {filters}
    ORDER BY place LIMIT %(limit)s
""")

# One row a link: a variant has no strength. And one a title, which has no item.
_LINKS = sql.SQL("""
    SELECT met.product_id, link.product_id, link.strength, NULL
    FROM {vectors} AS met, unnest(met.linked, met.link_strength) AS link(product_id, strength)
    WHERE met.product_id = ANY(%(history)s::text[]) AND link.product_id = ANY(%(items)s::text[])
    UNION ALL
    SELECT met.product_id, other.product_id, NULL, NULL
    FROM products AS met JOIN products AS other ON other.group_id = met.group_id AND other.product_id <> met.product_id
    WHERE met.product_id = ANY(%(history)s::text[]) AND other.product_id = ANY(%(items)s::text[])
    UNION ALL
    SELECT product_id, NULL, NULL, title FROM products WHERE product_id = ANY(%(titled)s::text[])
""")
MOST_VARIANTS = 1000  # a "product" of more variants is a slip in the shop's data, and must not slow a request down


@dataclass(frozen=True)
class ItemRows:
    """Rows of a release. n items, D dimensions, S and R the widths that the encoder gives the ids."""

    product_ids: list[str]
    vectors: np.ndarray  # float32 [n, D]
    std_ids: np.ndarray  # int32 [n, S], 0 is padding
    re_ids: np.ndarray  # int32 [n, R], 0 is padding
    placed: np.ndarray | None = None  # float32 [n, P], where the index has them: see search_space.py; None: as they are
    part: np.ndarray | None = None  # int [n], and in which part; None: all in the first
    linked: Sequence[list[str]] = ()  # of each item, the products it was taken together with; () if nobody knows
    link_strength: Sequence[list[float]] = ()  # and how strongly: see item_links.py
    # Of each item `products.features_at` of the features that it was made of, None if they had none. () if nobody knows.
    features_at: Sequence[datetime | None] = ()


@dataclass(frozen=True)
class History:
    """Through which items a search also goes, and what links from them are worth in units of its scores."""

    product_ids: Sequence[str]
    together: float  # of ln(1 + scale * strength)
    variant: float
    scale: float


@dataclass(frozen=True)
class Filters:
    """What may be found. A product whose price or arrival is unknown passes no bound of it."""

    std: dict[str, list[str]] = field(default_factory=dict)  # any of the values within a field, in every field
    min_price: float | None = None
    max_price: float | None = None
    in_stock: bool | None = None
    std_none: dict[str, list[str]] = field(default_factory=dict)  # none of the values, in every field
    arrived_after: datetime | None = None  # or at that moment
    arrived_before: datetime | None = None
    also: Sequence[Condition] = ()  # that hold too
    now: float | None = None  # epoch seconds from which conditions count their days back; None for the clock

    def conditions(self) -> list[Condition]:
        """What must hold, all of it."""
        found: list[Condition] = [OfStd.model_construct(std=name, any_of=some) for name, some in self.std.items()]
        found += [OfStd.model_construct(std=name, none_of=none) for name, none in self.std_none.items() if none]
        if self.min_price is not None or self.max_price is not None:
            found.append(OfPrice(price=PriceRange.model_construct(min=self.min_price, max=self.max_price)))
        if self.in_stock is not None:
            found.append(InStock(in_stock=self.in_stock))
        if self.arrived_after is not None or self.arrived_before is not None:
            found.append(
                OfArrival(arrived=ArrivalRange.model_construct(after=self.arrived_after, before=self.arrived_before))
            )
        return [*found, *self.also]


@dataclass(frozen=True)
class Hide:
    """What of a shopper's past a search leaves out: products met by an event of these kinds since then."""

    kinds: Sequence[str] | None = None  # None for any kind
    since: float | None = None  # epoch seconds; None however long ago


@dataclass(frozen=True)
class Found:
    """What a search found, best first. Shapes as in `ItemRows`."""

    product_ids: list[str]
    scores: np.ndarray  # float32 [n], inner products
    vectors: np.ndarray  # float32 [n, D]
    std_ids: np.ndarray  # int32 [n, S]
    re_ids: np.ndarray  # int32 [n, R]
    price: np.ndarray  # float64 [n], nan if unknown
    titles: list[str]
    part: np.ndarray  # int [n], see search_space.py
    plan: str  # "hnsw", "hnsw-iterative" or "exact"
    together: np.ndarray  # float32 [n], strength of the links with the history; 0 without any
    variant: np.ndarray  # float32 [n], 1 for a variant of something in the history

    def take(self, order: np.ndarray) -> Found:
        """Those rows, in that order."""
        return Found(
            [self.product_ids[row] for row in order],
            self.scores[order],
            self.vectors[order],
            self.std_ids[order],
            self.re_ids[order],
            self.price[order],
            [self.titles[row] for row in order],
            self.part[order],
            self.plan,
            self.together[order],
            self.variant[order],
        )

    def take_first(self, limit: int) -> Found:
        return self.take(np.arange(min(limit, len(self.product_ids))))

    def joined(self, other: Found) -> Found:
        """Both, best first, those of one score by id. No item may be in both."""
        if not self.product_ids or not other.product_ids:
            return replace(self if self.product_ids else other, plan=self.plan)
        both = Found(
            self.product_ids + other.product_ids,
            np.concatenate([self.scores, other.scores]),
            np.concatenate([self.vectors, other.vectors]),
            np.concatenate([self.std_ids, other.std_ids]),
            np.concatenate([self.re_ids, other.re_ids]),
            np.concatenate([self.price, other.price]),
            self.titles + other.titles,
            np.concatenate([self.part, other.part]),
            self.plan,
            np.concatenate([self.together, other.together]),
            np.concatenate([self.variant, other.variant]),
        )
        return both.take(np.lexsort((np.array(both.product_ids), -both.scores)))

    def without(self, ids: Collection[str]) -> Found:
        """The rows of other products."""
        return self.take(np.array([row for row, id_ in enumerate(self.product_ids) if id_ not in ids], dtype=int))


@dataclass(frozen=True)
class Links:
    """What leads from some products to others."""

    together: list[tuple[str, str, float]]  # from, to, and how strongly, of what was taken together
    variants: list[tuple[str, str]]
    titles: dict[str, str]  # of those asked for that are products


@dataclass(frozen=True)
class BuildCost:
    """What an index build will take, about."""

    rows: int
    seconds: float
    megabytes: float  # of the server's memory, for the largest part
    fits: bool  # the graph is built in so much memory; else much of it on disk, several times as slowly


class Vectors:
    def __init__(self, pool: ConnectionPool[Connection[Any]]) -> None:
        self._pool = pool
        self._indexed: set[str] = set()  # releases seen to have their index; it never goes before the table does

    def create(self, release: str, dimensions: int) -> None:
        """An empty table; whatever an earlier build of this release left is dropped."""
        self.drop(release)
        # MAIN: of a row over 2 kB the links are stored elsewhere, which are read of a history alone, and not the vector, which is
        # read of all that a search meets.
        with self._pool.connection() as connection:
            connection.execute(
                sql.SQL(
                    'CREATE TABLE {} (product_id text COLLATE "C", vector vector({}) STORAGE MAIN NOT NULL,'
                    " placed halfvec({}) STORAGE MAIN NOT NULL, part int2 NOT NULL, std_ids int4[] NOT NULL,"
                    " re_ids int4[] NOT NULL, linked text[] NOT NULL, link_strength float4[] NOT NULL,"
                    " features_at timestamptz, PRIMARY KEY (product_id) INCLUDE (features_at))"
                ).format(table_of(release), sql.Literal(dimensions), sql.Literal(dimensions + 1))
            )

    def begin(self, release: str, dimensions: int) -> str:
        """An empty table beside the one that the release may have, which goes on answering; the name for it, until `finish`."""
        name = release + _UNFINISHED
        self.create(name, dimensions)
        return name

    def finish(self, release: str) -> None:
        """The table that `begin` made, in the place of the release's own; a search meets the one or the other."""
        built = release + _UNFINISHED
        with self._pool.connection() as connection, connection.transaction():
            connection.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(table_of(release)))
            rename = "ALTER {} IF EXISTS {{}} RENAME TO {{}}"
            connection.execute(sql.SQL(rename.format("TABLE")).format(table_of(built), table_of(release)))
            for part in range(PARTS):
                names = _index_of(built, part), _index_of(release, part)
                connection.execute(sql.SQL(rename.format("INDEX")).format(*names))
        self._indexed -= {built, release}

    def copy(self, release: str, rows: ItemRows) -> None:
        """Add rows by binary COPY. May be called several times; an id that is there is an error."""
        copy_from = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT binary)").format(table_of(release), _COLUMNS)
        with self._pool.connection() as connection, connection.cursor().copy(copy_from) as copy:
            copy.set_types(
                ["text", "vector", "halfvec", "int2", "int4[]", "int4[]", "text[]", "float4[]", "timestamptz"]
            )
            made_of = rows.features_at or [None] * len(rows.product_ids)
            for row, features_at in zip(_adapted(rows), made_of, strict=True):
                copy.write_row((*row, features_at))

    def build_cost(self, release: str, m: int = 16, ef_construction: int = 64, anew: int | None = None) -> BuildCost:
        """Foreseen of what `build_index` would do, from indexes over a few of the rows, built now by one process, as n log n."""
        table = table_of(release)
        seconds = memory = 0.0
        with self._pool.connection() as connection, connection.transaction(force_rollback=True):
            connection.execute("SELECT set_config('max_parallel_maintenance_workers', '0', true)")
            connection.execute(
                sql.SQL("CREATE TEMP TABLE sample AS SELECT placed FROM {} ORDER BY product_id LIMIT {}").format(
                    table, SAMPLED_ROWS
                )
            )
            row = connection.execute("SELECT vector_dims(placed) FROM sample LIMIT 1").fetchone()
            dimensions = 0 if row is None else row[0]
            parts = _rows_of_parts(connection, release, anew)
            by_care: dict[tuple[int, int], list[int]] = {}
            for part, rows in parts.items():
                by_care.setdefault(_care(part, rows, m, ef_construction, anew), []).append(rows)
            for (its_m, its_ef_construction), counts in by_care.items():
                memory = max(memory, *(_index_memory(rows, dimensions, its_m) for rows in counts))
                if sum(counts) <= SAMPLED_ROWS:  # it is there in a moment
                    continue
                started = time.perf_counter()
                connection.execute(
                    sql.SQL(
                        "CREATE INDEX ON sample USING hnsw (placed halfvec_ip_ops) WITH (m = {}, ef_construction = {})"
                    ).format(sql.Literal(its_m), sql.Literal(its_ef_construction))
                )
                one = (time.perf_counter() - started) / (SAMPLED_ROWS * math.log(SAMPLED_ROWS))
                seconds += one * sum(rows * math.log(rows) for rows in counts if rows)
        return BuildCost(sum(parts.values()), seconds, memory / 1024, memory < MOST_INDEX_MEMORY)

    def build_index(
        self,
        release: str,
        m: int = 16,
        ef_construction: int = 64,
        progress: Callable[[float], None] | None = None,
        anew: int | None = None,
    ) -> None:
        """Build the HNSW indexes over inner product, one a part; or only that of the part `anew`, in the place of the one it has.
        `progress` is given the share that is done, 0 to 1."""
        with self._pool.connection() as builder, ThreadPoolExecutor(1) as thread:
            parts = _rows_of_parts(builder, release, anew)
            total, done = max(1, sum(parts.values())), 0
            for part, count in parts.items():
                # The backend's id names this build in the progress view, whoever else builds.
                backend = builder.info.backend_pid
                care = _care(part, count, m, ef_construction, anew)
                build = thread.submit(self._build_part, builder, release, part, count, *care, anew is not None)
                try:
                    while True:
                        try:
                            build.result(timeout=0.2)
                            break
                        except FutureTimeoutError:
                            if progress:
                                progress((done + count * self._build_progress(backend)) / total)
                except BaseException:
                    builder.cancel_safe()  # Ctrl-C stops the server's work too
                    raise
                done += count
            # Searches join the products: without figures on a table filled a moment ago the plan is a bad one.
            builder.execute(sql.SQL("ANALYZE {}, products, events").format(table_of(release)))
        if progress:
            progress(1.0)

    def _build_part(
        self, connection: Connection[Any], release: str, part: int, rows: int, m: int, ef_construction: int, anew: bool
    ) -> None:
        name = _index_of(release, part)
        statement = sql.SQL(
            "CREATE INDEX {} ON {} USING hnsw (placed halfvec_ip_ops) WITH (m = {}, ef_construction = {}) WHERE part = {}"
        ).format(name, table_of(release), sql.Literal(m), sql.Literal(ef_construction), sql.Literal(part))
        for workers in (None, "0"):
            try:
                with connection.transaction():
                    row = connection.execute(
                        sql.SQL("SELECT vector_dims(placed) FROM {} LIMIT 1").format(table_of(release))
                    ).fetchone()
                    memory = _index_memory(rows, 0 if row is None else row[0], m)
                    connection.execute("SELECT set_config('maintenance_work_mem', %s, true)", (f"{memory}kB",))
                    if workers is not None:
                        connection.execute(
                            "SELECT set_config('max_parallel_maintenance_workers', %s, true)", (workers,)
                        )
                    if anew:
                        connection.execute(sql.SQL("DROP INDEX IF EXISTS {}").format(name))
                    connection.execute(statement)
                return
            except (psycopg.errors.DiskFull, psycopg.errors.OutOfMemory):
                # Parallel builds share memory through /dev/shm, which containers keep small (64 MB in Docker).
                if workers is not None:
                    raise

    def _build_progress(self, backend: int) -> float:
        with self._pool.connection() as connection:
            row = connection.execute(
                "SELECT coalesce(blocks_done::float8 / nullif(blocks_total, 0), 0)"
                " FROM pg_stat_progress_create_index WHERE pid = %s",
                (backend,),
            ).fetchone()
        return 0.0 if row is None else float(row[0])

    def upsert(self, release: str, rows: ItemRows) -> None:
        """Add or replace rows; searches see them at once. Links stay what they were: they come from the past of an item, not
        from what is written on it."""
        with self._pool.connection() as connection, connection.transaction():
            upsert(connection, release, rows)

    def count(self, release: str) -> int:
        with self._pool.connection() as connection:
            row = connection.execute(sql.SQL("SELECT count(*) FROM {}").format(table_of(release))).fetchone()
        assert row is not None
        return int(row[0])

    def holds_rows(self, release: str) -> bool:
        """The release has a table of vectors, and something in it."""
        if release not in self.releases():
            return False
        with self._pool.connection() as connection:
            row = connection.execute(sql.SQL("SELECT EXISTS (SELECT FROM {})").format(table_of(release))).fetchone()
        assert row is not None
        return bool(row[0])

    def outdated(self, release: str) -> list[str]:
        """Products that have features and no vector in the release, or one that was made of others, in the order of ids. Looks at
        every product, which may take longer than a request may."""
        query = sql.SQL(
            "SELECT product_id FROM products LEFT JOIN {} AS v USING (product_id) WHERE std IS NOT NULL"
            " AND (v.product_id IS NULL OR v.features_at IS DISTINCT FROM products.features_at) ORDER BY product_id"
        ).format(table_of(release))
        with self._pool.connection() as connection, connection.transaction():
            connection.execute("SELECT set_config('statement_timeout', %s, true)", (OUTDATED_WAIT,))
            return [product_id for (product_id,) in connection.execute(query).fetchall()]

    def drop(self, release: str) -> None:
        """Remove the release's vectors, if it has any."""
        self._indexed.discard(release)
        with self._pool.connection() as connection:
            connection.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(table_of(release)))

    def drop_all(self, release: str) -> None:
        """The same, and what a build that was stopped left of it. A name that no table can have has none."""
        if _RELEASE.fullmatch(release):
            self.drop(release)
            self.drop(release + _UNFINISHED)

    def exists(self, release: str) -> bool:
        """Whether the release has a table."""
        with self._pool.connection() as connection:
            name = table_of(release).as_string(connection)
            row = connection.execute("SELECT to_regclass(%s) IS NOT NULL", (name,)).fetchone()
        assert row is not None
        return bool(row[0])

    def releases(self) -> list[str]:
        """Releases that have a table, sorted."""
        with self._pool.connection() as connection:
            return [name for name in _tables(connection) if not name.endswith(_UNFINISHED)]

    def fetch(self, release: str, ids: Sequence[str]) -> ItemRows:
        """The rows of those `ids` that exist, in the order asked."""
        query = sql.SQL("SELECT product_id, {} FROM {} WHERE product_id = ANY(%s::text[])").format(
            BINARY, table_of(release)
        )
        with self._pool.connection() as connection, connection.cursor(binary=True) as cursor:
            found = {row[0]: row for row in cursor.execute(query, (list(ids),))}
        rows = [found[product_id] for product_id in ids if product_id in found]
        product_ids, vectors, std_ids, re_ids = zip(*rows, strict=True) if rows else ((),) * 4
        return ItemRows(list(product_ids), stack_vectors(vectors), stack_ids(std_ids), stack_ids(re_ids))

    def search(
        self,
        release: str,
        query: np.ndarray,
        limit: int,
        filters: Filters | None = None,
        exclude: Sequence[str] = (),
        ef_search: int | None = None,
        met_by: str | None = None,
        history: History | None = None,
        hides: Sequence[Hide] | None = None,
        placed: np.ndarray | None = None,
        new: int = 0,
    ) -> Found:
        """The `limit` items with the greatest inner product with `query` (float32 [D]) that pass `filters`; with a `history`, the
        links from it count too. Among them are the best `new` of those that nobody met yet.

        placed: the query in the coordinates of the index, float32 [D + 1]; None where items stand there as they are.

        Products that were deleted, have no features, are in `exclude` or were met by the user `met_by` (in one of the ways in
        `hides`, if given) never appear.
        Fewer than `limit` come back only when no more match. Without filters it is mostly one round trip.
        """
        conditions, parameters = _conditions(filters or Filters())
        where = sql.SQL(" AND ").join(conditions) if conditions else sql.SQL("true")
        met, met_parameters = _met(hides)
        parameters |= met_parameters
        linked_from = history or History([], 0.0, 0.0, 0.0)
        parameters |= {
            "query": np.ascontiguousarray(query, dtype=np.float32),
            "placed": np.append(query, 0.0).astype(np.float32) if placed is None else placed,
            "exclude": list(exclude),
            "met_by": met_by,
            "history": list(linked_from.product_ids), "together": linked_from.together, "variant": linked_from.variant,
            "scale": linked_from.scale,
        }  # fmt: skip
        ef_search = min(max(ef_search or DEFAULT_EF_SEARCH, limit, new), MAX_EF_SEARCH)
        settings = _hnsw_settings(ef_search)
        with self._pool.connection() as connection:
            if not self._has_index(connection, release):
                return _exact(connection, release, where, met, parameters, limit, new)
            if not conditions:
                for unmet in _shares(limit, new, ef_search):
                    asked = limit, new, unmet
                    text = _plain(release, *asked) if hides is None else _nearest(release, met, None, *asked)
                    rows = _query(connection, text, parameters, settings, True)
                    found = _found(rows, "hnsw")
                    more = unmet.limit < max(limit, new) and (found.part == UNTOUCHED).sum() >= unmet.limit
                    # The graph may have been left before enough were met, and what it gave need not be sold any more.
                    if rows[0][0] >= limit and all(sold for _, sold, *_ in rows) and not more:
                        return found
            else:
                kept, items = _estimates(connection, release, where, parameters)
                bound = int(EXACT_FACTOR * math.sqrt(max(limit, new) * items))
                if kept <= ESTIMATE_MARGIN * bound:
                    rows = _query(connection, _all(release, met, where, bound, limit, new), parameters, {}, False)
                    if rows[0][0] <= bound:
                        return _found(rows, "exact")
            every = _Unmet(max(limit, new), ef_search)
            rows = _query(connection, _nearest(release, met, where, limit, new, every), parameters, settings, False)
            if rows[0][0] < limit:
                return _exact(connection, release, where, met, parameters, limit, new)
            return _found(rows, "hnsw-iterative")

    def hidden(self, ids: Sequence[str], met_by: str | None, hides: Sequence[Hide]) -> list[set[str]]:
        """Which of `ids` a search for the user would leave out, of each of `hides`."""
        found = []
        with self._pool.connection() as connection:
            for hide in hides:
                met, parameters = _met([hide])
                query = sql.SQL("SELECT product_id FROM {} AS met WHERE product_id = ANY(%(ids)s::text[])").format(met)
                rows = connection.execute(query, {**parameters, "met_by": met_by, "ids": list(ids)}).fetchall()
                found.append({product_id for (product_id,) in rows})
        return found

    def among(
        self, release: str, ids: Sequence[str], query: np.ndarray, limit: int, filters: Filters | None = None,
        exclude: Sequence[str] = (), met_by: str | None = None, hides: Sequence[Hide] | None = None,
    ) -> Found:  # fmt: skip
        """The first `limit` of `ids`, in the order given, that `search` could find; scores are inner products with `query`."""
        conditions, parameters = _conditions(filters or Filters())
        met, met_parameters = _met(hides)
        parameters |= met_parameters
        parameters |= {
            "query": np.ascontiguousarray(query, dtype=np.float32), "ids": list(ids), "exclude": list(exclude),
            "met_by": met_by, "limit": limit,
        }  # fmt: skip
        where = sql.SQL(" AND ").join(conditions) if conditions else sql.SQL("true")
        statement = _AMONG.format(vectors=table_of(release), met=met, filters=where, binary=BINARY)
        with self._pool.connection() as connection:
            rows = _query(connection, statement, parameters, {}, False)
        return _found(rows, "exact")

    def links(self, release: str, history: Sequence[str], items: Sequence[str], titled: Sequence[str]) -> Links:
        """From products of `history` to `items`; and the titles of `titled`."""
        parameters = {"history": list(history), "items": list(items), "titled": list(titled)}
        with self._pool.connection() as connection, connection.cursor(binary=True) as cursor:
            rows = cursor.execute(_links_text(release), parameters, prepare=True).fetchall()
        return Links(
            [(met, item, strength) for met, item, strength, _ in rows if strength is not None],
            [(met, item) for met, item, strength, _ in rows if item is not None and strength is None],
            {product_id: title for product_id, item, _, title in rows if item is None},
        )

    def _has_index(self, connection: Connection[Any], release: str) -> bool:
        if release not in self._indexed:
            name = _index_of(release, PARTS - 1).as_string(connection)  # the last that is built
            row = connection.execute("SELECT to_regclass(%s) IS NOT NULL", (name,)).fetchone()
            if row is not None and row[0]:
                self._indexed.add(release)
        return release in self._indexed


def upsert(connection: Connection[Any], release: str, rows: ItemRows) -> None:
    """`Vectors.upsert` on a given connection, in its transaction, in which the products that the rows are made of were read too."""
    statement = sql.SQL(
        "INSERT INTO {} ({}) VALUES (%s, %b, %b, %s, %b::int4[], %b::int4[], %b::text[], %b::float4[],"
        " (SELECT features_at FROM products WHERE product_id = %s))"
        " ON CONFLICT (product_id) DO UPDATE SET vector = excluded.vector, placed = excluded.placed, part = excluded.part,"
        " std_ids = excluded.std_ids, re_ids = excluded.re_ids, features_at = excluded.features_at"
    ).format(table_of(release), _COLUMNS)
    ordered = sorted(_adapted(rows), key=lambda row: row[0])  # so that two writers cannot deadlock
    connection.cursor().executemany(statement, [(*row, row[0]) for row in ordered])


def delete(connection: Connection[Any], ids: Collection[str]) -> None:
    """Remove products from the rows of every release, in the connection's transaction.

    A table on which an index is being built takes no changes for minutes. Rows left there harm nobody: no search finds a product
    that is not among the products.
    """
    for release in _tables(connection):
        statement = sql.SQL("DELETE FROM {} WHERE product_id = ANY(%s::text[])").format(table_of(release))
        with (
            suppress(psycopg.errors.UndefinedTable, psycopg.errors.LockNotAvailable),  # one that is dropped meanwhile
            connection.transaction(),
        ):
            connection.execute("SELECT set_config('lock_timeout', %s, true)", (DELETE_WAIT,))
            connection.execute(statement, (sorted(ids),))
            connection.execute("SELECT set_config('lock_timeout', '0', true)")


def _tables(connection: Connection[Any]) -> list[str]:
    """Names of the releases that have a table, unfinished ones too, sorted."""
    rows = connection.execute(
        "SELECT substr(tablename, %s) FROM pg_tables"
        " WHERE schemaname = current_schema() AND starts_with(tablename, %s)",
        (len(_PREFIX) + 1, _PREFIX),
    ).fetchall()
    return sorted(release for (release,) in rows)


def table_of(release: str) -> sql.Identifier:
    """The table of a release's vectors. Raises ValueError for a name that is no release's."""
    if not _RELEASE.fullmatch(release):
        raise ValueError(f"{release!r} is no release name: lower-case letters, digits, - and _, at most 40")
    return sql.Identifier(_PREFIX + release)


def stack_vectors(sent: Sequence[bytes]) -> np.ndarray:
    """float32 [n, D] from pgvector's wire form: a header of 4 bytes, then big-endian floats. [0, 0] of none."""
    if not sent:
        return np.empty((0, 0), dtype=np.float32)
    dimensions = (len(sent[0]) - 4) // 4
    layout = np.dtype([("header", "V4"), ("values", ">f4", (dimensions,))])
    return np.frombuffer(b"".join(sent), dtype=layout)["values"].astype(np.float32)


def stack_ids(sent: Sequence[bytes]) -> np.ndarray:
    """int32 [n, width] from the wire form of int4[]: a header of 20 bytes, then a length and a value each. [0, 0] of
    none; all rows have one width."""
    if not sent:
        return np.empty((0, 0), dtype=np.int32)
    width = max(0, (len(sent[0]) - 20) // 8)  # the header of an empty array is shorter
    if not width:
        return np.empty((len(sent), 0), dtype=np.int32)
    layout = np.dtype([("header", "V20"), ("values", [("length", ">i4"), ("value", ">i4")], (width,))])
    return np.frombuffer(b"".join(sent), dtype=layout)["values"]["value"].astype(np.int32)


def _index_of(release: str, part: int) -> sql.Identifier:
    return sql.Identifier(f"{_PREFIX}{release}_hnsw{part}")


def _rows_of_parts(connection: Connection[Any], release: str, only: int | None) -> dict[int, int]:
    """How many rows each part has, or that one."""
    counted = sql.SQL("SELECT part, count(*) FROM {} GROUP BY part").format(table_of(release))
    rows = dict(connection.execute(counted).fetchall())
    return {part: rows.get(part, 0) for part in (range(PARTS) if only is None else [only])}


def _care(part: int, rows: int, m: int, ef_construction: int, anew: int | None) -> tuple[int, int]:
    """m and ef_construction of a part's graph.

    The outstanding are few, and most searches end among them. Of a great catalogue's best sellers many are much alike, and of what
    nobody met many are the same on paper: with the links that are enough elsewhere a build may leave such a crowd where no search,
    however wide, gets to it. Which does, chance decides, for pgvector draws the levels of a graph at random: see
    build_index.build_graph. Of many that nobody met the care is taken only where a first graph did not find them.
    """
    if part == OUTSTANDING or (part == UNTOUCHED and (part == anew or rows <= CAREFUL_ROWS)):
        return min(MAX_M, 3 * m), min(MAX_EF_CONSTRUCTION, 4 * ef_construction)
    return m, ef_construction


def _index_memory(rows: int, dimensions: int, m: int) -> int:
    """kB in which the graph of an index build fits: an element, its vector and 2m + m/(m-1)*m neighbours of 16 bytes.

    When it does not fit, the rest is inserted row by row into the index on disk, three times as slowly.
    """
    bytes_needed = rows * (256 + 2 * dimensions + 64 * m) * 5 // 4
    return int(np.clip(bytes_needed // 1024, 64 * 1024, MOST_INDEX_MEMORY))


def _adapted(rows: ItemRows) -> Iterable[tuple[Any, ...]]:
    vectors = np.ascontiguousarray(rows.vectors, dtype=np.float32)
    count = len(vectors)
    placed = np.pad(vectors, ((0, 0), (0, 1))) if rows.placed is None else rows.placed
    part = [USUAL] * count if rows.part is None else np.asarray(rows.part).tolist()
    links = rows.linked or [[]] * count, rows.link_strength or [[]] * count
    halves = map(HalfVector, placed.astype(np.float16))
    return zip(
        rows.product_ids, vectors, halves, part, rows.std_ids.tolist(), rows.re_ids.tolist(), *links, strict=True
    )


def _conditions(filters: Filters) -> tuple[list[sql.Composable], dict[str, Any]]:
    """SQL conditions on `products` and their parameters."""
    parameters: dict[str, Any] = {}
    now = time.time() if filters.now is None else filters.now
    return [condition_sql(condition, parameters, now) for condition in filters.conditions()], parameters


def _met(hides: Sequence[Hide] | None) -> tuple[sql.Composable, dict[str, Any]]:
    """A subquery of what %(met_by)s met, in one of these ways (None: in any at all), and its parameters."""
    if hides is None:
        return _MET, {}
    ways: list[sql.Composable] = [sql.SQL("false")]
    parameters: dict[str, Any] = {}
    for number, hide in enumerate(hides):
        kinds, since = f"kinds{number}", f"since{number}"
        ways.append(
            sql.SQL("({0}::text[] IS NULL OR kind = ANY({0}::text[])) AND at >= {1}::timestamptz").format(
                sql.Placeholder(kinds), sql.Placeholder(since)
            )
        )
        parameters |= {
            kinds: None if hide.kinds is None else list(hide.kinds),
            since: "-infinity" if hide.since is None else moment(hide.since),
        }
    return _MET_SO.format(sql.SQL(" OR ").join(ways)), parameters


@dataclass(frozen=True)
class _Unmet:
    """How many of what nobody met are asked for, and in how wide a search."""

    limit: int
    ef_search: int


def _shares(limit: int, new: int, ef_search: int) -> list[_Unmet]:
    """What to ask for in turn. Of what nobody met few but its share get into most lists: so few are asked for first, and more only
    where all of these are in the list."""
    most = max(limit, new)
    every, few = _Unmet(most, ef_search), _Unmet(SHARES_ASKED * new, max(new, min(ef_search, SHARES_WIDE * new)))
    if limit == 0:
        return [_Unmet(most, few.ef_search)]
    return [few, every] if 0 < few.limit < limit else [every]


@lru_cache(64)
def _links_text(release: str) -> str:
    return _LINKS.format(vectors=table_of(release)).as_string()


@lru_cache(64)
def _plain(release: str, limit: int, new: int, unmet: _Unmet) -> str:
    """`_nearest` without filters that leaves out all that was met: nearly every one."""
    return _nearest(release, _MET, None, limit, new, unmet).as_string()


def _nearest(
    release: str, met: sql.Composable, where: sql.Composable | None, limit: int, new: int, unmet: _Unmet
) -> sql.Composed:
    """Finds the best by the graphs and the links. Without a condition, what is not sold is found too.

    What is the same for nearly all requests stands in it as a number: the server then plans it once for all of them.
    """
    table = table_of(release)
    rows: sql.Composable = sql.SQL("{} AS v").format(table)
    passes: sql.Composable = sql.SQL("true")
    counted: sql.Composable = sql.SQL("SELECT count(*) FROM near")
    strongest: sql.Composable = sql.SQL("ORDER BY gain DESC, product_id LIMIT {}").format(
        sql.Literal(max(LEAST_LINKED, LINKED_ASKED * max(limit, new)))
    )
    if where is not None:
        strongest = sql.SQL("")  # of these a filter might leave none
        rows = sql.SQL("{} AS v JOIN products USING (product_id)").format(table)
        passes = sql.SQL("std IS NOT NULL AND {}").format(where)
        counted = sql.SQL("SELECT count(*) FROM near WHERE part = {}").format(sql.Literal(USUAL))
    parts = [
        _PART.format(rows=rows, part=sql.Literal(part), met=met, passes=passes, limit=sql.Literal(limit))
        for part in (USUAL, OUTSTANDING)
    ]
    of_unmet = _PART.format(
        rows=rows, part=sql.Literal(UNTOUCHED), met=met, passes=_NARROWED.format(passes), limit=sql.Literal(unmet.limit)
    )
    parts.append(_NARROWER.format(width=sql.Literal(str(unmet.ef_search)), part=of_unmet))
    near = _NEAR.format(parts=sql.SQL(" UNION ALL ").join(parts))
    linked = _LINKED.format(rows=rows, met=met, passes=passes, strongest=strongest)
    return _best(release, near, linked, counted, limit, new)


def _all(
    release: str, met: sql.Composable, where: sql.Composable, bound: int | None, limit: int, new: int
) -> sql.Composed:
    """Finds the best of all that pass; none are looked at if they are more than `bound`."""
    within = (
        sql.SQL("true") if bound is None else sql.SQL("(SELECT count(*) FROM kept) <= {}").format(sql.Literal(bound))
    )
    most = sql.SQL("") if bound is None else sql.SQL("LIMIT {}").format(sql.Literal(bound + 1))
    near = _ALL.format(vectors=table_of(release), met=met, filters=where, bound=most, within=within)
    return _best(release, near, sql.SQL(""), sql.SQL("SELECT count(*) FROM kept"), limit, new)


def _best(
    release: str, near: sql.Composable, linked: sql.Composable, counted: sql.Composable, limit: int, new: int
) -> sql.Composed:
    return _BEST.format(
        vectors=table_of(release), near=near, linked=linked, reached=counted, limit=sql.Literal(limit),
        new=sql.Literal(new), binary=BINARY, untouched=sql.Literal(UNTOUCHED), most_variants=sql.Literal(MOST_VARIANTS),
    )  # fmt: skip


def _hnsw_settings(ef_search: int) -> dict[str, str]:
    return {
        "hnsw.ef_search": str(ef_search),
        # Goes on until enough rows pass the conditions; the statement puts them in order.
        "hnsw.iterative_scan": "relaxed_order",
        # On a small table the planner would rather sort everything; this leaves it only the index's own order.
        "enable_seqscan": "off",
        "enable_sort": "off",
        # And each product by its key, never all of them kept aside to be gone through for every row.
        "enable_material": "off",
    }


def _estimates(
    connection: Connection[Any], release: str, where: sql.Composable, parameters: dict[str, Any]
) -> tuple[float, float]:
    """The planner's guesses how many products the conditions keep, and how many items the release has."""
    explain = sql.SQL("EXPLAIN (FORMAT json) SELECT FROM products WHERE std IS NOT NULL AND {}").format(where)
    with connection.pipeline():
        kept = connection.execute(explain, parameters, prepare=False)
        items = connection.execute(
            "SELECT greatest(reltuples, 0) FROM pg_class WHERE oid = %s::regclass", (table_of(release).as_string(),)
        )
        plan, count = kept.fetchone(), items.fetchone()
    assert plan is not None
    assert count is not None
    return float(plan[0][0]["Plan"]["Plan Rows"]), float(count[0])


def _exact(
    connection: Connection[Any], release: str, where: sql.Composable, met: sql.Composable, parameters: dict[str, Any],
    limit: int, new: int,
) -> Found:  # fmt: skip
    """All matches scored and sorted."""
    rows = _query(connection, _all(release, met, where, None, limit, new), parameters, {}, False)
    return _found(rows, "exact")


def _query(
    connection: Connection[Any], statement: sql.Composed | str, parameters: dict[str, Any], settings: Mapping[str, str],
    prepare: bool,
) -> list[Any]:  # fmt: skip
    """The rows of a statement under settings of the server's, in one round trip: what a pipeline sends together is one transaction,
    at whose end the settings lapse. One that is prepared is planned when a connection meets it first, and never again; those with
    filters are not to be: their best plan depends on the values."""
    # Starting parallel workers costs more than they save on so few rows.
    given = {"max_parallel_workers_per_gather": "0", **settings}
    if prepare:
        given["plan_cache_mode"] = "force_generic_plan"
    with connection.pipeline(), connection.cursor(binary=True) as cursor:
        connection.execute(
            "SELECT " + ", ".join(f"set_config('{name}', '{value}', true)" for name, value in given.items())
        )
        cursor.execute(statement, parameters, prepare=prepare)
        return cursor.fetchall()


def _found(rows: Sequence[Any], plan: str) -> Found:
    columns = list(zip(*(row for row in rows if row[2] is not None), strict=True)) or [()] * 12
    _, _, product_ids, scores, vectors, std_ids, re_ids, price, titles, part, together, variant = columns
    return Found(
        list(product_ids),
        np.array(scores, dtype=np.float32),
        stack_vectors(vectors),
        stack_ids(std_ids),
        stack_ids(re_ids),
        np.array(price, dtype=np.float64),  # None becomes nan
        list(titles),
        np.array(part, dtype=np.int64),
        plan,
        np.array(together, dtype=np.float32),
        np.array(variant, dtype=np.float32),
    )
