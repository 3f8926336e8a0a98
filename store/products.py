"""Products: what sellers gave, and the structured features read from it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import orjson
from psycopg import Connection, sql
from psycopg_pool import ConnectionPool

from catalog import Product, RawProduct
from conditions import Facts
from store import vectors
from store.conditions import SPELT
from store.vectors import ItemRows, table_of

_RAW = "product_id, title, description, attributes, price, in_stock, group_id, arrived_at"

# `{rows}` gives the columns of _RAW. Rows that change nothing are not written again. Ordered, so that two writers
# lock rows in the same order and cannot deadlock.
UPSERT = f"""
    INSERT INTO products ({_RAW}) SELECT {_RAW} FROM {{rows}} ORDER BY product_id
    ON CONFLICT (product_id) DO UPDATE SET title = excluded.title, description = excluded.description,
        attributes = excluded.attributes, price = excluded.price, in_stock = excluded.in_stock,
        group_id = excluded.group_id, arrived_at = excluded.arrived_at
    WHERE (products.title, products.description, products.attributes, products.price, products.in_stock,
        products.group_id, products.arrived_at) IS DISTINCT FROM (excluded.title, excluded.description,
        excluded.attributes, excluded.price, excluded.in_stock, excluded.group_id, excluded.arrived_at)
"""

# `{rows}` gives product_id, std, re, origin, evidence.
UPDATE_FEATURES = """
    UPDATE products SET std = given.std, re = given.re, features_origin = given.origin, features_evidence = given.evidence,
        features_at = clock_timestamp()
    FROM (SELECT product_id, std, re, origin, evidence FROM {rows} ORDER BY product_id) AS given
    WHERE products.product_id = given.product_id
        AND (products.std, products.re, products.features_origin, products.features_evidence)
            IS DISTINCT FROM (given.std, given.re, given.origin, given.evidence)
"""

_HELD = "SELECT FROM products WHERE product_id = ANY(%s::text[]) ORDER BY product_id FOR UPDATE"
_STANDING = sql.SQL("""
    SELECT product_id, title, description, attributes, features_origin, std, re, {indexed}
    FROM products WHERE product_id = ANY(%s::text[]) ORDER BY product_id
""")
_INDEXED = sql.SQL(
    "EXISTS (SELECT FROM {} AS rows WHERE rows.product_id = products.product_id"
    " AND rows.features_at IS NOT DISTINCT FROM products.features_at)"
)


@dataclass(frozen=True)
class StoredProduct:
    raw: RawProduct
    product: Product | None  # structured features; None until the product has been read
    evidence: dict[str, list[dict[str, Any]]]  # who said each value; empty where the features came with an import


@dataclass(frozen=True)
class Commerce:
    """The business side of every product, ordered by product id. N products."""

    product_ids: list[str]
    price: np.ndarray  # float64 [N], nan if unknown
    in_stock: np.ndarray  # bool [N]
    group_id: list[str | None]
    arrived_at: np.ndarray  # float64 [N], epoch seconds, nan if unknown


@dataclass(frozen=True)
class Standing:
    """A product as it stands in the shop."""

    text: tuple[str, str, dict[str, list[str]]]  # title, description, attributes: all that features are read from
    origin: str | None  # who read the features, None: nobody yet
    product: Product | None
    indexed: bool  # has a vector, of its features as they are, in every one of the releases


class Change:
    """Who changes the same products waits, so that of two changes one stands wholly."""

    def __init__(self, connection: Connection[Any], ids: Collection[str], releases: Sequence[str]) -> None:
        self._connection = connection
        indexed = sql.SQL(" AND ").join([sql.SQL("true"), *(_INDEXED.format(table_of(name)) for name in releases)])
        # Two statements: one that waits for a lock knows of other tables what they were before it waited.
        connection.execute(_HELD, (list(ids),))
        rows = connection.execute(_STANDING.format(indexed=indexed), (list(ids),)).fetchall()
        self.before = {
            product_id: Standing(
                (title, description, attributes),
                origin,
                None if std is None else Product.model_construct(product_id=product_id, title=title, std=std, re=re),
                has_vector,
            )
            for product_id, title, description, attributes, origin, std, re, has_vector in rows
        }

    def put(self, given: Sequence[RawProduct]) -> None:
        put(self._connection, given)

    def put_features(self, given: Sequence[Product], origins: Sequence[str], evidence: Sequence[str]) -> None:
        put_features(self._connection, given, origins, evidence)

    def put_vectors(self, release: str, rows: ItemRows) -> None:
        vectors.upsert(self._connection, release, rows)


class Products:
    def __init__(self, pool: ConnectionPool[Connection[Any]]) -> None:
        self._pool = pool

    def put(self, products: list[RawProduct]) -> None:
        """Add or replace the raw side of products; of one id given twice the last counts. Features stay."""
        with self._pool.connection() as connection:
            put(connection, products)

    def get(self, product_id: str) -> StoredProduct | None:
        with self._pool.connection() as connection:
            row = connection.execute(
                f"SELECT {_RAW}, std, re, features_evidence FROM products WHERE product_id = %s", (product_id,)
            ).fetchone()
        if row is None:
            return None
        *raw, std, re, evidence = row
        product = None if std is None else Product(product_id=product_id, title=raw[1], std=std, re=re)
        return StoredProduct(_raw_product(raw), product, evidence or {})

    def iter_raw(self, batch_size: int = 1000) -> Iterator[list[RawProduct]]:
        """Every product ordered by id, in lists of at most `batch_size`, as of one moment."""
        with (
            self._pool.connection() as connection,
            connection.transaction(),
            connection.cursor("raw_products", binary=True) as cursor,
        ):
            cursor.execute(f"SELECT {_RAW} FROM products ORDER BY product_id")
            while rows := cursor.fetchmany(batch_size):
                yield [_raw_product(row) for row in rows]

    def put_features(
        self, products: Sequence[Product], origin: str | Sequence[str], evidence: Sequence[str] | None = None
    ) -> None:
        """Set the structured features; `origin` says who read them, of all or of each, `evidence` (JSON) who said each value.

        The title is the raw product's. A product that was deleted meanwhile stays deleted.
        """
        with self._pool.connection() as connection:
            put_features(connection, products, origin, evidence)

    def features_at(self) -> dict[str, datetime | None]:
        """When the features of every product that has some changed last; None for those that are older than the note of it."""
        with self._pool.connection() as connection, connection.cursor(binary=True) as cursor:
            return dict(cursor.execute("SELECT product_id, features_at FROM products WHERE std IS NOT NULL").fetchall())

    def origins(self) -> dict[str, str]:
        """Who read the features, of every product that has some."""
        with self._pool.connection() as connection:
            return dict(
                connection.execute(
                    "SELECT product_id, features_origin FROM products WHERE std IS NOT NULL ORDER BY product_id"
                ).fetchall()
            )

    def read_features(self) -> list[Product]:
        """Every product that has features, ordered by id."""
        with self._pool.connection() as connection, connection.cursor(binary=True) as cursor:
            rows = cursor.execute(
                "SELECT product_id, title, std, re FROM products WHERE std IS NOT NULL ORDER BY product_id"
            ).fetchall()
        # Checked when they came in; checking 100,000 products again costs seconds.
        return [
            Product.model_construct(product_id=product_id, title=title, std=std, re=re)
            for product_id, title, std, re in rows
        ]

    def read_commerce(self) -> Commerce:
        with self._pool.connection() as connection, connection.cursor(binary=True) as cursor:
            rows = cursor.execute(
                "SELECT product_id, coalesce(price, 'nan'), in_stock, group_id,"
                " coalesce(extract(epoch FROM arrived_at)::float8, 'nan') FROM products ORDER BY product_id"
            ).fetchall()
        product_ids, price, in_stock, group_id, arrived_at = zip(*rows, strict=True) if rows else ((),) * 5
        return Commerce(
            list(product_ids),
            np.array(price, dtype=np.float64),
            np.array(in_stock, dtype=bool),
            list(group_id),
            np.array(arrived_at, dtype=np.float64),
        )

    def facts(self, ids: Sequence[str]) -> dict[str, Facts]:
        """What rules look at, of those of `ids` that exist and have features."""
        with self._pool.connection() as connection, connection.cursor(binary=True) as cursor:
            rows = cursor.execute(
                "SELECT product_id, std, re, price, in_stock, group_id, extract(epoch FROM arrived_at)::float8"
                " FROM products WHERE product_id = ANY(%s::text[]) AND std IS NOT NULL",
                (list(ids),),
            ).fetchall()
        return {row[0]: Facts(*row) for row in rows}

    def open_values(self, field: str, values: Iterable[str]) -> set[str]:
        """Those of `values` (in `vocab.normalise`'s spelling) that some product has in an open field. Reads all products."""
        query = (
            f"SELECT DISTINCT {SPELT} FROM products, jsonb_array_elements_text(re -> %s::text) AS said(value)"
            f" WHERE {SPELT} = ANY(%s::text[])"
        )
        with self._pool.connection() as connection:
            return {value for (value,) in connection.execute(query, (field, list(values))).fetchall()}

    def groups(self, ids: Iterable[str]) -> set[str]:
        """Those of `ids` that are groups of products."""
        query = "SELECT DISTINCT group_id FROM products WHERE group_id = ANY(%s::text[])"
        with self._pool.connection() as connection:
            return {group_id for (group_id,) in connection.execute(query, (list(ids),)).fetchall()}

    def existing(self, ids: Iterable[str]) -> set[str]:
        """Those of `ids` that are products."""
        with self._pool.connection() as connection:
            rows = connection.execute(
                "SELECT product_id FROM products WHERE product_id = ANY(%s::text[])", (list(ids),)
            ).fetchall()
        return {product_id for (product_id,) in rows}

    @contextmanager
    def changing(self, ids: Collection[str], releases: Sequence[str]) -> Iterator[Change]:
        """One transaction over products and their rows in `releases`."""
        with self._pool.connection() as connection, connection.transaction():
            yield Change(connection, ids, releases)

    def delete(self, ids: Collection[str]) -> set[str]:
        """Remove products and their vectors in every release; no search finds them from now on. Returns those that were there.

        What shoppers did with them stays in the event log.
        """
        with self._pool.connection() as connection, connection.transaction():
            rows = connection.execute(
                "DELETE FROM products WHERE product_id IN (SELECT product_id FROM products"
                " WHERE product_id = ANY(%s::text[]) ORDER BY product_id FOR UPDATE) RETURNING product_id",
                (list(ids),),
            ).fetchall()
            deleted = {product_id for (product_id,) in rows}
            vectors.delete(connection, deleted)
        return deleted

    def count(self) -> int:
        with self._pool.connection() as connection:
            row = connection.execute("SELECT count(*) FROM products").fetchone()
        assert row is not None
        return int(row[0])


def put(connection: Connection[Any], products: Sequence[RawProduct]) -> None:
    """`Products.put` on a given connection, in its transaction."""
    rows = [raw_row(product) for product in {product.product_id: product for product in products}.values()]
    columns = list(zip(*rows, strict=True)) or [()] * 8
    source = (
        "unnest(%s::text[], %s::text[], %s::text[], %s::jsonb[], %s::float8[], %s::boolean[], %s::text[],"
        f" %s::timestamptz[]) AS given({_RAW})"
    )
    connection.execute(UPSERT.format(rows=source), [list(column) for column in columns])


def put_features(
    connection: Connection[Any],
    products: Sequence[Product],
    origin: str | Sequence[str],
    evidence: Sequence[str] | None = None,
) -> None:
    """`Products.put_features` on a given connection, in its transaction."""
    origins = [origin] * len(products) if isinstance(origin, str) else origin
    sayings: Sequence[str | None] = [None] * len(products) if evidence is None else evidence
    given = zip(products, origins, sayings, strict=True)
    latest = {product.product_id: (product, origin, said) for product, origin, said in given}
    # %b: the text form of an array escapes every quote of the JSON, which costs more than the update itself.
    rows = (
        "unnest(%b::text[], %b::text[]::jsonb[], %b::text[]::jsonb[], %b::text[], %b::text[]::jsonb[])"
        " AS given(product_id, std, re, origin, evidence)"
    )
    connection.execute(
        UPDATE_FEATURES.format(rows=rows),
        (
            list(latest),
            [orjson.dumps(product.std).decode() for product, _, _ in latest.values()],
            [orjson.dumps(product.re).decode() for product, _, _ in latest.values()],
            [origin for _, origin, _ in latest.values()],
            [said for _, _, said in latest.values()],
        ),
    )


def raw_row(product: RawProduct) -> tuple[Any, ...]:
    """The columns of _RAW, attributes as JSON text."""
    return (
        product.product_id,
        product.title,
        product.description,
        orjson.dumps(product.attributes).decode(),
        product.price,
        product.in_stock,
        product.group_id,
        product.arrived_at,
    )


def _raw_product(row: Any) -> RawProduct:
    names = ("product_id", "title", "description", "attributes", "price", "in_stock", "group_id", "arrived_at")
    return RawProduct.model_construct(**dict(zip(names, row, strict=True)))
