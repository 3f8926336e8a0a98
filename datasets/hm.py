"""H&M (Kaggle 2022): articles with rich attributes, purchases by day, and customers' ages."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from pathlib import Path

import polars as pl

from catalog import FeatureSchema, RawProduct, Rejected, User
from datasets import Source
from datasets.events import checked_events
from datasets.reading import find_file, need_columns, need_file, read_frames, readable, valid_values, validated

ORIGIN = "the public original is on Kaggle: 'H&M Personalized Fashion Recommendations'"
ENDINGS = (".csv", ".csv.gz", ".parquet")
# Programs that read ids as numbers drop their leading zeros; padded again, the tables meet.
DIGITS = {"article_id": 10, "product_code": 7}

STD_COLUMNS = {
    "gender": "index_group_name",
    "category_group": "product_group_name",
    "category": "product_type_name",
    "pattern": "graphical_appearance_name",
    "colour": "colour_group_name",
    "tone": "perceived_colour_value_name",
    "colour_family": "perceived_colour_master_name",
    "section": "section_name",
    "garment_group": "garment_group_name",
    "line": "index_name",
    "department": "department_name",
}
RE_FIELDS = [
    "material", "fit", "style", "neckline", "sleeve", "length", "detail", "function", "occasion", "word",
]  # fmt: skip
ARTICLE_COLUMNS = ["article_id", "product_code", "prod_name", "detail_desc", *STD_COLUMNS.values()]
TRANSACTION_COLUMNS = ["t_dat", "customer_id", "article_id"]


def read(path: Path | None, prices_before: date | None = None) -> Source:
    """A folder with articles, transactions (or transactions_train) and perhaps customers, as CSV or Parquet.

    The set has no price list: a product's price is the median of what was paid for it, before the day `prices_before`
    if given. An evaluation on later days needs that: else merely having a price betrays that an article was sold then.
    """
    articles = need_file(path, ["articles"], ENDINGS, ORIGIN)
    transactions = need_file(articles.parent, ["transactions_train", "transactions"], ENDINGS, ORIGIN)
    customers = find_file(articles.parent, ["customers"], ENDINGS)
    return Source(
        schema=_schema(articles),
        products=_products(articles, transactions, prices_before),
        users=_users(customers) if customers else (),
        events=_events(transactions),
        events_file=transactions.name,
    )


def _schema(articles: Path) -> FeatureSchema:
    values: dict[str, set[str]] = {name: set() for name in STD_COLUMNS}
    for frame in read_frames(articles, ARTICLE_COLUMNS):
        if not isinstance(frame, Rejected):
            for name, column in STD_COLUMNS.items():
                values[name].update(frame[column].drop_nulls().unique())
    closed = {name: valid_values(seen) for name, seen in values.items()}
    return FeatureSchema(std={name: allowed for name, allowed in closed.items() if allowed}, re=RE_FIELDS)


def _products(articles: Path, transactions: Path, prices_before: date | None) -> Iterator[RawProduct | Rejected]:
    prices = _median_prices(transactions, prices_before)
    names = {"product_id": "article_id", "title": "prod_name", "description": "detail_desc", "group_id": "product_code"}
    for frame in read_frames(articles, ARTICLE_COLUMNS):
        if isinstance(frame, Rejected):
            yield frame
            continue
        for row in frame.with_columns(map(_padded, DIGITS)).iter_rows(named=True):
            line = row.pop("line")
            values = {field: row[column] for field, column in names.items()}
            values["attributes"] = {field: row[column] for field, column in STD_COLUMNS.items() if row[column]}
            values["price"] = prices.get(row["article_id"])
            yield validated(RawProduct, values, articles.name, line, row, names)


def _users(customers: Path) -> Iterator[User | Rejected]:
    for frame in read_frames(customers, ["customer_id", "age"]):
        if isinstance(frame, Rejected):
            yield frame
            continue
        for line, customer, age in frame.select("line", "customer_id", "age").iter_rows():
            values = {"user_id": customer, "profile": {} if age is None else {"age": age}}
            row = {"customer_id": customer, "age": age}
            yield validated(User, values, customers.name, line, row, {"user_id": "customer_id"})


def _events(transactions: Path) -> Iterator[pl.DataFrame | Rejected]:
    """A purchase a row; the same customer, article and day twice is one event, because its id is the same."""
    names = {"user_id": "customer_id", "product_id": "article_id", "at": "t_dat"}
    for frame in read_frames(transactions, TRANSACTION_COLUMNS):
        if isinstance(frame, Rejected):
            yield frame
            continue
        rows = frame.with_columns(_padded("article_id")).select(
            "line", *(pl.col(column).alias(field) for field, column in names.items()), pl.lit("purchase").alias("kind")
        )
        yield from checked_events(rows, transactions.name, names, raw=frame)


def _padded(column: str) -> pl.Expr:
    return pl.col(column).cast(pl.String).str.zfill(DIGITS[column])


def _median_prices(transactions: Path, before: date | None) -> dict[str, float]:
    """Straight from the file by polars: rows that cannot be read do not count here, `_events` reports them."""
    with readable(transactions):
        if transactions.suffix == ".parquet":
            rows = pl.scan_parquet(transactions)
        else:
            rows = pl.scan_csv(
                transactions, infer_schema=False, ignore_errors=True, truncate_ragged_lines=True, encoding="utf8-lossy"
            )
        need_columns(transactions, rows.collect_schema().names(), [*TRANSACTION_COLUMNS, "price"])
        if before is not None:
            rows = rows.filter(pl.col("t_dat").cast(pl.String) < before.isoformat())
        paid = rows.select(_padded("article_id"), pl.col("price").cast(pl.Float64, strict=False))
        paid = paid.filter(pl.col("price").is_finite() & (pl.col("price") >= 0))
        return dict(paid.group_by("article_id").median().collect(engine="streaming").iter_rows())
