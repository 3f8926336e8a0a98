"""Rent the Runway (Misra, Wan, McAuley, RecSys 2018): rentals with the renter's body and occasion.

Every table here comes from rentals. Only what is fixed before any rental (an item's category) becomes a product's
attribute; ratings, fit and counts would tell a model the future.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import polars as pl

from catalog import FeatureSchema, RawProduct, Rejected, User
from datasets import Source
from datasets.events import checked_events
from datasets.reading import need_file, raw_text, read_frames, read_objects, valid_values, validated
from settings import UserError

ORIGIN = (
    "the public original is renttherunway_final_data.json.gz, 'Clothing Fit Dataset for Size Recommendation', "
    "from Julian McAuley's group at UC San Diego and on Kaggle"
)
CENTIMETRES_PER_INCH = 2.54
KILOGRAMS_PER_POUND = 0.45359237
CELL_TYPES = (str, int, float, type(None))
AGES = (14, 90)  # outside are birthdays left at a form's default

# Our column: the column of the public original. The Parquet form has ours, with the bust size in two columns.
COLUMNS = {
    "user_id": "user_id",
    "item_id": "item_id",
    "category": "category",
    "rented_for": "rented for",
    "review_date": "review_date",
    "body_type": "body type",
    "age": "age",
    "weight_lbs": "weight",
    "height_in": "height",
    "bust_size": "bust size",
}
NUMBERS = {
    "age": pl.col("age"),
    "weight_lbs": pl.col("weight_lbs").str.extract(r"^\s*([\d.]+)\s*lbs\s*$"),
    "height_in": pl.col("height_in").str.extract(r"^\s*(\d+)'").cast(pl.Float64) * 12
    + pl.col("height_in").str.extract(r"'\s*(\d+)\"?\s*$").cast(pl.Float64),
    "bust_size": pl.col("bust_size").str.extract(r"^\s*(\d+)"),
}


def read(path: Path | None) -> Source:
    """A folder with rentals.parquet or renttherunway_final_data.json(.gz), or one of these files."""
    file = need_file(path, ["rentals", "renttherunway_final_data"], (".parquet", ".json", ".json.gz"), ORIGIN)
    found = list(_parquet(file) if file.suffix == ".parquet" else _json(file))
    rejected = [row for row in found if isinstance(row, Rejected)]
    frames = [frame for frame in found if isinstance(frame, pl.DataFrame)]
    if not frames:
        raise UserError(f"{file} has no rows; {ORIGIN}")
    rentals = pl.concat(frames)
    categories = valid_values(rentals["category"].drop_nulls().unique())
    return Source(
        schema=FeatureSchema(std={"category": categories}, re=[]) if categories else None,
        products=_products(rentals, file.name),
        users=_users(rentals, file.name),
        events=_events(rentals, file.name, rejected),
        events_file=file.name,
    )


def _products(rentals: pl.DataFrame, file: str) -> Iterator[RawProduct | Rejected]:
    names = {"product_id": "item_id", "title": "category"}
    items = rentals.drop_nulls("item_id").group_by("item_id", maintain_order=True)
    firsts = items.agg(pl.col("line").first(), pl.col("category").drop_nulls().first())
    for item, line, category in firsts.iter_rows():
        values = {"product_id": item, "title": category, "attributes": {"category": category} if category else {}}
        yield validated(RawProduct, values, file, line, {"item_id": item, "category": category}, names)


def _users(rentals: pl.DataFrame, file: str) -> Iterator[User | Rejected]:
    renters = rentals.drop_nulls("user_id").group_by("user_id", maintain_order=True)
    bodies = renters.agg(
        pl.col("line").first(),
        (pl.col("height_in").median() * CENTIMETRES_PER_INCH).round(1).alias("height_cm"),
        (pl.col("weight_lbs").median() * KILOGRAMS_PER_POUND).round(1).alias("weight_kg"),
        pl.col("age").filter(pl.col("age").is_between(*AGES)).median(),
        pl.col("bust_size").median(),
        pl.col("body_type").drop_nulls().first(),
    )
    for row in bodies.iter_rows(named=True):
        user, line, body_type = row.pop("user_id"), row.pop("line"), row.pop("body_type")
        profile = {name: number for name, number in row.items() if number is not None}
        if body_type:
            profile["body_" + "_".join(re.findall(r"\w+", body_type))] = 1.0
        yield validated(User, {"user_id": user, "profile": profile}, file, line, {"user_id": user, **profile})


def _events(rentals: pl.DataFrame, file: str, rejected: list[Rejected]) -> Iterator[pl.DataFrame | Rejected]:
    """A rental a row, kept even where a number of the renter's body could not be read."""
    yield from rejected
    names = {"product_id": "item_id", "at": "review_date", "context": "rented_for"}
    rows = rentals.select(
        "line",
        "user_id",
        pl.lit("purchase").alias("kind"),
        *(pl.col(column).alias(name) for name, column in names.items()),
    )
    yield from checked_events(rows, file, names, raw=rentals)


def _parquet(file: Path) -> Iterator[pl.DataFrame | Rejected]:
    columns = [*list(COLUMNS)[:-1], "bust_size_num"]
    for frame in read_frames(file, columns):
        if isinstance(frame, Rejected):
            yield frame
        else:
            yield from _numbers_read(frame.rename({"bust_size_num": "bust_size"}), file.name, {})


def _json(file: Path) -> Iterator[pl.DataFrame | Rejected]:
    cells: list[list[str | None]] = []
    lines: list[int] = []
    for row in read_objects(file):
        if isinstance(row, Rejected):
            yield row
            continue
        line, values = row
        wrong = next((name for name in COLUMNS.values() if type(values.get(name)) not in CELL_TYPES), None)
        if wrong is None:
            lines.append(line)
            cells.append([None if (cell := values.get(name)) is None else str(cell) for name in COLUMNS.values()])
        else:
            yield Rejected(file.name, line, f"{wrong}: neither text nor a number", raw_text(values))
    frame = pl.DataFrame(cells, schema=dict.fromkeys(COLUMNS, pl.String), orient="row")
    day = pl.col("review_date").str.to_date("%B %d, %Y", strict=False).cast(pl.String)
    # What is no such date stays as it stands, so that the rejected row shows it.
    yield from _numbers_read(
        frame.with_columns(pl.Series("line", lines, dtype=pl.Int64), pl.coalesce(day, "review_date")),
        file.name,
        NUMBERS,
    )


def _numbers_read(frame: pl.DataFrame, file: str, readings: dict[str, pl.Expr]) -> Iterator[pl.DataFrame | Rejected]:
    """The frame with its body numbers as floats. A number that cannot be read is reported and counts as not given."""
    numbers = frame.select(
        readings.get(name, pl.col(name)).cast(pl.Float64, strict=False).alias(name) for name in NUMBERS
    )
    for name in NUMBERS:
        for row in frame.filter(pl.col(name).is_not_null() & ~numbers[name].is_finite().fill_null(False)).to_dicts():
            line = row.pop("line")
            yield Rejected(file, line, f"{COLUMNS[name]}: no number to be read in it", raw_text(row))
    finite = numbers.with_columns(pl.when(pl.all().is_finite()).then(pl.all()))
    yield frame.with_columns(finite).select("line", *COLUMNS)
