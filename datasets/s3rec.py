"""Amazon Beauty as published with S3-Rec (Zhou et al., CIKM 2020, arXiv:2008.07873): sequences of items and items' attributes.

The files hold no times, only each shopper's order. The times made of it here are that order and not dates: one event a day, the
last of every shopper on `LAST_DAY`. So `import_data.py s3rec FOLDER --until 2000-01-01` leaves out exactly the last event of each,
which is the leave-one-out test of the papers. No item occurs twice in a sequence of the published file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import polars as pl

from catalog import FeatureSchema, RawProduct, Rejected
from datasets import Source
from datasets.events import checked_events
from datasets.reading import need_file, raw_text, readable, valid_values, validated
from settings import UserError

ORIGIN = "the public original is in the folder data/ of S3-Rec's repository (github.com/RUCAIBox/CIKM2020-S3Rec)"
LAST_DAY = datetime(2000, 1, 1, tzinfo=UTC)  # any day would do; so round a one is not taken for a date
# The files name no item. Its number must not stand in for a name: numbers were given in the order of the sequences, test events
# included, and a model that reads titles would read there what was taken together.
TITLE = "beauty product"


def read(path: Path | None) -> Source:
    """A folder with Beauty.txt (shopper, then items, a line each) and Beauty_item2attributes.json ({item: [attribute]})."""
    sequences = need_file(path, ["Beauty"], (".txt",), ORIGIN)
    attributes = need_file(sequences.parent, ["Beauty_item2attributes"], (".json",), ORIGIN)
    attributes_of = _attributes(attributes)
    closed = valid_values({value for values in attributes_of.values() if _is_plain(values) for value in values})
    return Source(
        schema=FeatureSchema(std={"attribute": closed}, re=[]) if closed else None,
        products=_products(attributes_of, attributes.name),
        events=_events(sequences),
        events_file=sequences.name,
        notes=("s3rec: the times are made of the order, one event a day; none is a date",),
    )


def _attributes(file: Path) -> dict[str, Any]:
    """Attributes of each item, the rarest first: the item tower reads four values of a field (tensors.MAX_STD_VALUES), and 14 % of
    the items have five or six. What it leaves out is then what says least, such as a department that a third of the shop is in."""
    with readable(file):
        text = file.read_bytes()
    try:
        given = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise UserError(f"{file} is not valid JSON ({error}); {ORIGIN}") from error
    if not isinstance(given, dict):
        raise UserError(f"{file} is not a JSON object of item to attributes; {ORIGIN}")
    plain = {item: list(dict.fromkeys(map(str, values))) for item, values in given.items() if _is_plain(values)}
    counts = Counter(value for values in plain.values() for value in values)
    # What is no list of numbers or words stays as it is: `_products` rejects it.
    return given | {item: sorted(values, key=counts.__getitem__) for item, values in plain.items()}


def _is_plain(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, (str, int)) for value in values)


def _products(attributes_of: dict[str, Any], file: str) -> Iterator[RawProduct | Rejected]:
    """All attributes are one closed field: the files do not say which of them are brands and which are categories."""
    for number, (item, values) in enumerate(attributes_of.items(), start=1):
        row = {"product_id": item, "title": TITLE, "attributes": {"attribute": values}}
        yield validated(RawProduct, row, file, number, {item: values})


def _events(file: Path) -> Iterator[pl.DataFrame | Rejected]:
    """A purchase for each item of a line; the line of its sequence is each event's line."""
    rows: list[tuple[int, str, str, int]] = []
    with readable(file), file.open(encoding="utf-8", errors="replace") as stream:
        for line, text in enumerate(stream, start=1):
            shopper, *items = text.split() or [""]
            if not items:
                yield Rejected(file.name, line, "row: not a shopper and their items", raw_text(text.rstrip("\n")))
            rows += [(line, shopper, item, days) for days, item in zip(range(len(items))[::-1], items, strict=True)]
    columns = {"line": pl.Int64, "user_id": pl.String, "product_id": pl.String, "days": pl.Int64}
    frame = pl.DataFrame(rows, schema=columns, orient="row").with_columns(
        kind=pl.lit("purchase"), at=pl.lit(LAST_DAY) - pl.duration(days="days")
    )
    yield from checked_events(frame.drop("days"), file.name)
