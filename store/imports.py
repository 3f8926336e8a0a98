"""Imports: many rows by COPY, in one transaction, so that an import happens wholly or not at all.

Rows are copied into staging tables while the importer reads its files, and merged when the block ends: the shop's own
tables are locked only for that moment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import orjson
import polars as pl
from psycopg import Connection, sql
from psycopg_pool import ConnectionPool

from catalog import SESSION, Event, FeatureSchema, Product, RawProduct, Rejected, User
from store import products, quarantine, users
from store.schema import read_schema, united, write_schema
from store.sessions import lock_shoppers

CHUNK = 50_000  # rows held in memory at once
IMPORT_LOCK = 0x5354_0002  # key of the advisory lock that lets one import in at a time
UNKNOWN_PRODUCT = "product_id: unknown product"

PRODUCT_COLUMNS: dict[str, pl.DataType] = {
    "product_id": pl.String(),
    "title": pl.String(),
    "description": pl.String(),
    "attributes": pl.String(),
    "price": pl.Float64(),
    "in_stock": pl.Boolean(),
    "group_id": pl.String(),
    "arrived_at": pl.Datetime("us", "UTC"),
}
EVENT_COLUMNS: dict[str, pl.DataType] = {
    "event_id": pl.String(),
    "user_id": pl.String(),
    "product_id": pl.String(),
    "kind": pl.String(),
    "at": pl.Datetime("us", "UTC"),
    "context": pl.String(),
    "list_id": pl.String(),
}

_STAGING = """
    CREATE TEMP TABLE import_products (LIKE products, row bigint GENERATED ALWAYS AS IDENTITY) ON COMMIT DROP;
    CREATE TEMP TABLE import_users (LIKE users, row bigint GENERATED ALWAYS AS IDENTITY) ON COMMIT DROP;
    CREATE TEMP TABLE import_events (LIKE events, file text NOT NULL, line bigint NOT NULL) ON COMMIT DROP;
    CREATE TEMP TABLE import_features (
        product_id text COLLATE "C" NOT NULL, std jsonb NOT NULL, re jsonb NOT NULL, file text NOT NULL,
        line bigint NOT NULL, row bigint GENERATED ALWAYS AS IDENTITY
    ) ON COMMIT DROP;
"""

_KNOWN_EVENTS = """
    SELECT event_id, coalesce(merged_sessions.user_id, import_events.user_id) AS user_id, product_id, kind, at, context,
        list_id
    FROM import_events LEFT JOIN merged_sessions ON session_id = import_events.user_id
    WHERE EXISTS (SELECT FROM products WHERE products.product_id = import_events.product_id)
"""

# Each gives (new, changed, distinct ids given). Of an id given twice the last row counts. A row that was inserted, not
# updated, has xmax 0.
_MERGE_PRODUCTS = f"""
    WITH given AS MATERIALIZED (
        SELECT DISTINCT ON (product_id) * FROM import_products ORDER BY product_id, row DESC
    ), merged AS ({products.UPSERT.format(rows="given")} RETURNING xmax = 0 AS new)
    SELECT count(*) FILTER (WHERE new), count(*) FILTER (WHERE NOT new), (SELECT count(*) FROM given) FROM merged
"""
_MERGE_USERS = f"""
    WITH given AS MATERIALIZED (
        SELECT DISTINCT ON (user_id) * FROM import_users ORDER BY user_id, row DESC
    ), merged AS ({users.UPSERT.format(rows="given")} RETURNING xmax = 0 AS new)
    SELECT count(*) FILTER (WHERE new), count(*) FILTER (WHERE NOT new), (SELECT count(*) FROM given) FROM merged
"""
_MERGE_FEATURES = f"""
    WITH given AS MATERIALIZED (
        SELECT DISTINCT ON (product_id) product_id, given.std, given.re, %(source)s::text AS origin,
            NULL::jsonb AS evidence, products.std IS NULL AS new
        FROM import_features AS given JOIN products USING (product_id) ORDER BY product_id, row DESC
    ), merged AS ({products.UPDATE_FEATURES.format(rows="given")} RETURNING products.product_id)
    SELECT count(merged.product_id) FILTER (WHERE new), count(merged.product_id) FILTER (WHERE NOT new), count(*)
    FROM given LEFT JOIN merged USING (product_id)
"""
# (new, changed, rows given); an event never changes.
_MERGE_EVENTS = f"""
    WITH given AS MATERIALIZED ({_KNOWN_EVENTS}), merged AS (
        INSERT INTO events (event_id, user_id, product_id, kind, at, context, list_id) SELECT * FROM given ORDER BY event_id
        ON CONFLICT (event_id) DO NOTHING RETURNING 1
    )
    SELECT (SELECT count(*) FROM merged), 0, (SELECT count(*) FROM given)
"""
# The same into an empty table, without its indexes: three times as fast, and nobody has a history to read meanwhile.
# In a table truncated by this very transaction the rows need no write-ahead log either.
_EMPTY_EVENTS = """
    TRUNCATE events;
    DROP INDEX events_user_at, events_at, events_purchase_at, events_list;
    ALTER TABLE events DROP CONSTRAINT events_pkey;
"""
_FILL_EVENTS = f"""
    WITH given AS MATERIALIZED ({_KNOWN_EVENTS}), filled AS (
        INSERT INTO events (event_id, user_id, product_id, kind, at, context, list_id)
        SELECT DISTINCT ON (event_id) * FROM given ORDER BY event_id RETURNING 1
    )
    SELECT (SELECT count(*) FROM filled), 0, (SELECT count(*) FROM given)
"""
_INDEX_EVENTS = """
    ALTER TABLE events ADD CONSTRAINT events_pkey PRIMARY KEY (event_id);
    CREATE INDEX events_user_at ON events (user_id, at);
    CREATE INDEX events_at ON events (at);
    CREATE INDEX events_purchase_at ON events (at) WHERE kind = 'purchase';
    CREATE INDEX events_list ON events (list_id) WHERE list_id <> '';
"""
_UNKNOWN = """
    SELECT file, line, (to_jsonb(given) - 'file' - 'line' - 'row')::text FROM {staging} AS given
    WHERE NOT EXISTS (SELECT FROM products WHERE products.product_id = given.product_id)
"""

Row = TypeVar("Row")


@dataclass(frozen=True)
class Counts:
    """What became of the distinct rows that were given."""

    new: int = 0
    changed: int = 0
    same: int = 0


@dataclass(frozen=True)
class ImportReport:
    products: Counts
    users: Counts
    events: Counts
    features: Counts
    rejected: int  # rows that went to quarantine, or were left out
    reasons: dict[str, int]  # rejected rows by reason, most frequent first


class ImportSession:
    """Takes rows in any order and any number of calls; `store.importing` merges them when its block ends.

    `file` and `line` say where a row stood; they are used only if it has to go to quarantine.
    """

    report: ImportReport  # from the end of the block on

    def __init__(self, connection: Connection[Any], source: str) -> None:
        self._connection = connection
        self._source = source
        self._schema: FeatureSchema | None = None
        self._rejected: list[Rejected] = []
        self._reasons: Counter[str] = Counter()
        connection.execute(_STAGING)

    def schema(self, schema: FeatureSchema) -> None:
        """Make this the shop's schema, with the fields and STD values that are there already kept."""
        self._schema = schema

    def products(self, products_given: Iterable[RawProduct]) -> None:
        """Add or replace the raw side of products."""
        for chunk in _chunks(products_given):
            rows = [products.raw_row(product) for product in chunk]
            self._copy("import_products", pl.DataFrame(rows, schema=PRODUCT_COLUMNS, orient="row"))

    def users(self, users_given: Iterable[User]) -> None:
        """Add or replace users."""
        for chunk in _chunks(users_given):
            rows = [(user.user_id, orjson.dumps(user.profile).decode()) for user in chunk]
            frame = pl.DataFrame(rows, schema={"user_id": pl.String, "profile": pl.String}, orient="row")
            self._copy("import_users", frame)

    def events(self, events: Iterable[Event], file: str = "") -> None:
        """Add events. One whose id is there changes nothing; one on an unknown product goes to quarantine."""
        for chunk in _chunks(events):
            rows = [tuple(getattr(event, name) for name in EVENT_COLUMNS) for event in chunk]
            self.events_frame(pl.DataFrame(rows, schema=EVENT_COLUMNS, orient="row"), file)

    def events_frame(self, frame: pl.DataFrame, file: str = "") -> None:
        """Add events by columns: event_id, user_id, product_id, kind, at (UTC), context, list_id, and `line` if it is known.

        The rows must be valid as `catalog.Event` says; they are not checked again.
        """
        line = pl.col("line") if "line" in frame.columns else pl.lit(0).alias("line")
        self._copy("import_events", frame.select(*EVENT_COLUMNS, pl.lit(file).alias("file"), line))

    def features(self, features: Iterable[Product], file: str = "") -> None:
        """Set structured features. Those of an unknown product go to quarantine."""
        names = ("product_id", "std", "re")
        for chunk in _chunks(features):
            rows = [
                (product.product_id, orjson.dumps(product.std).decode(), orjson.dumps(product.re).decode())
                for product in chunk
            ]
            frame = pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String), orient="row")
            self._copy("import_features", frame.with_columns(file=pl.lit(file), line=pl.lit(0)))

    def reject(self, rejected: Rejected) -> None:
        """Send a row that the importer could not read to quarantine."""
        self._reasons[rejected.reason] += 1
        self._rejected.append(rejected)
        if len(self._rejected) >= quarantine.CHUNK:
            self._flush_rejected()

    def leave_out(self, reason: str, rows: int) -> None:
        """Count rows that are not wanted: unlike those of `reject` nobody is to mend them, so they are not kept."""
        if rows:
            self._reasons[reason] += rows

    def _flush_rejected(self) -> None:
        quarantine.insert(self._connection, self._source, self._rejected)
        self._rejected.clear()

    def _copy(self, table: str, frame: pl.DataFrame) -> None:
        columns = sql.SQL(", ").join(map(sql.Identifier, frame.columns))
        statement = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT csv)").format(sql.Identifier(table), columns)
        # "non_numeric" quotes every text, so that an empty one is not read as NULL.
        content = frame.write_csv(
            include_header=False, quote_style="non_numeric", datetime_format="%Y-%m-%dT%H:%M:%S%.6f+00:00"
        )
        with self._connection.cursor().copy(statement) as copy:
            copy.write(content)

    def _merge(self) -> None:
        connection = self._connection
        if self._schema is not None:
            write_schema(connection, united(read_schema(connection), self._schema))
        connection.execute("SELECT set_config('work_mem', '64MB', true)")  # the merges sort what was given
        products_count = self._counts(_MERGE_PRODUCTS)
        users_count = self._counts(_MERGE_USERS)
        features_count = self._counts(_MERGE_FEATURES)
        if connection.execute(
            "SELECT FROM import_events WHERE starts_with(user_id, %s) LIMIT 1", (SESSION,)
        ).fetchone():
            lock_shoppers(connection, None, shared=True)
        events_count = self._merge_events()
        self._reject_unknown("import_features")
        self._reject_unknown("import_events")
        self._flush_rejected()
        # The planner must know the new tables at once, not when autovacuum comes by.
        connection.execute("ANALYZE products, users, events")
        self.report = ImportReport(
            products_count,
            users_count,
            events_count,
            features_count,
            self._reasons.total(),
            dict(self._reasons.most_common()),
        )

    def _merge_events(self) -> Counts:
        connection = self._connection
        if connection.execute("SELECT FROM events LIMIT 1").fetchone() is not None:
            return self._counts(_MERGE_EVENTS)
        connection.execute("LOCK TABLE events")  # from here on nobody can add the first one
        if connection.execute("SELECT FROM events LIMIT 1").fetchone() is not None:
            return self._counts(_MERGE_EVENTS)
        connection.execute(_EMPTY_EVENTS)
        counts = self._counts(_FILL_EVENTS)
        connection.execute(_INDEX_EVENTS)
        return counts

    def _counts(self, merge: str) -> Counts:
        row = self._connection.execute(merge, {"source": self._source}).fetchone()
        assert row is not None
        new, changed, given = row
        return Counts(new, changed, given - new - changed)

    def _reject_unknown(self, staging: str) -> None:
        # A server-side cursor: with the wrong products file, every event may be here.
        with self._connection.cursor(f"unknown_{staging}") as cursor:
            cursor.execute(_UNKNOWN.format(staging=staging))
            while rows := cursor.fetchmany(quarantine.CHUNK):
                for file, line, raw in rows:
                    self.reject(Rejected(file, line, UNKNOWN_PRODUCT, raw))


@contextmanager
def importing(pool: ConnectionPool[Connection[Any]], source: str) -> Iterator[ImportSession]:
    """One import, one transaction. A second import waits for the first."""
    with pool.connection() as connection, connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(%s)", (IMPORT_LOCK,))
        session = ImportSession(connection, source)
        yield session
        session._merge()


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while chunk := list(islice(iterator, CHUNK)):
        yield chunk
