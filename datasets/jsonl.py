"""A shop's own files: products, users and events with the fields of `catalog`, as JSON lines or Parquet."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import polars as pl
from pydantic import BaseModel, ValidationError

from catalog import Event, FeatureSchema, RawProduct, Rejected, User
from datasets import Source
from datasets.events import EVENT_SCHEMA, checked_events, judged_events
from datasets.reading import CHUNK_ROWS, find_file, parquet_columns, read_frames, read_objects, validated
from lexicon import LEXICON, Lexicon
from settings import UserError
from vocab import normalise, split_values

ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")
MAX_CLOSED_VALUES = 500  # more different values than this are a description, not a choice from a list
READ_PRODUCTS = 2_000  # whose texts are read to see of what they speak
MIN_USES = 5  # a value of a closed field is used this often on average; free words mostly stand once or twice

Record = TypeVar("Record", bound=BaseModel)


def read(path: Path | None, lexicon: Path = LEXICON) -> Source:
    """A folder with any of products, users and events (.jsonl, .jsonl.gz, .parquet), and perhaps schema.json."""
    if path is None or not path.is_dir():
        raise UserError(
            f"{path or 'jsonl'}: expected a folder with products.jsonl or products.parquet; see docs/data.md"
        )
    products, users, events = (find_file(path, [stem], ENDINGS) for stem in ("products", "users", "events"))
    if not (products or users or events):
        raise UserError(f"{path} has none of products, users, events ({', '.join(ENDINGS)}); see docs/data.md")
    schema = _read_schema(path / "schema.json")
    inferred = schema is None and products is not None
    notes: tuple[str, ...] = ()
    if schema is None and products is not None:
        typed, spoken = infer_schema(_records(products, RawProduct), Lexicon.load(lexicon))
        schema = FeatureSchema(std=typed.std | spoken.std, re=[*typed.re, *spoken.re])
        notes = _explain(typed, spoken)
        if not (schema.std or schema.re):
            schema = None
    return Source(
        schema=schema,
        schema_is_inferred=inferred,
        notes=notes,
        products=_records(products, RawProduct) if products else (),
        users=_records(users, User) if users else (),
        events=_events(events) if events else (),
        events_file=events.name if events else "",
    )


def infer_schema(products: Iterator[RawProduct | Rejected], lexicon: Lexicon) -> tuple[FeatureSchema, FeatureSchema]:
    """Two parts of a schema. Of the attributes: those of few and repeated values are STD with the values seen, the others RE.
    And of what no attribute says, but titles and descriptions do, in words of the lexicon."""
    spellings: dict[str, dict[str, str]] = {}
    uses: dict[str, int] = {}
    texts: list[tuple[str, str]] = []  # of some products, each as likely as any other (Vitter, ACM TOMS 1985)
    random = Random(0)
    for number, product in enumerate(found for found in products if not isinstance(found, Rejected)):
        place = number if number < READ_PRODUCTS else random.randrange(number + 1)
        if place < READ_PRODUCTS:
            texts[place : place + 1] = [(product.title, product.description)]
        for name, values in product.attributes.items():
            seen = spellings.setdefault(name, {})
            for value in split_values(values):
                uses[name] = uses.get(name, 0) + 1
                if len(seen) <= MAX_CLOSED_VALUES:
                    seen.setdefault(normalise(value), value)
    closed = {
        name: sorted(seen.values())
        for name, seen in spellings.items()
        if 0 < len(seen) <= MAX_CLOSED_VALUES and uses[name] >= MIN_USES * len(seen)
    }
    typed = FeatureSchema(std=closed, re=[name for name in spellings if name not in closed])
    return typed, lexicon.fields_of(texts, spellings)


def _explain(typed: FeatureSchema, spoken: FeatureSchema) -> tuple[str, ...]:
    lines = ["no schema.json; without it, and if the shop has no schema yet, the fields are"]
    for whence, schema in (("attributes", typed), ("titles and descriptions", spoken)):
        closed = ", ".join(f"{name} ({len(values)} values)" for name, values in schema.std.items())
        lines.append(f"  from {whence}: closed (STD): {closed or 'none'}; open (RE): {', '.join(schema.re) or 'none'}")
    return tuple(lines)


def _read_schema(path: Path) -> FeatureSchema | None:
    if not path.exists():
        return None
    try:
        return FeatureSchema.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {field or 'file'}: {first['msg']}; see docs/data.md") from error


def _records(path: Path, model: type[Record]) -> Iterator[Record | Rejected]:
    for row in read_objects(path):
        if isinstance(row, Rejected):
            yield row
        else:
            line, values = row
            yield validated(model, _without_nulls(values, path), path.name, line, values)


def _without_nulls(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """In Parquet `attributes` and `profile` are structs, with null where a row has none, or maps (lists of pairs)."""
    if path.suffix != ".parquet":
        return values
    cleaned = dict(values)
    for name in ("attributes", "profile"):
        value = values.get(name)
        if isinstance(value, dict | list):
            pairs = value.items() if isinstance(value, dict) else value
            cleaned[name] = {key: item for key, item in pairs if item is not None}
    return cleaned


def _events(path: Path) -> Iterator[pl.DataFrame | Rejected]:
    if path.suffix == ".parquet":
        required = ["user_id", *(name for name, field in Event.model_fields.items() if field.is_required())]
        present = parquet_columns(path)
        if others := [name for name in present if name not in EVENT_SCHEMA]:
            raise UserError(f"{path}: events have no column {', '.join(others)} (but {', '.join(EVENT_SCHEMA)})")
        for frame in read_frames(path, list(dict.fromkeys([*required, *present]))):
            yield from [frame] if isinstance(frame, Rejected) else checked_events(frame, path.name)
        return
    rows = read_objects(path)
    while chunk := list(islice(rows, CHUNK_ROWS)):
        yield from (row for row in chunk if isinstance(row, Rejected))
        yield from _checked_objects([row for row in chunk if not isinstance(row, Rejected)], path.name)


def _checked_objects(rows: list[tuple[int, dict[str, Any]]], file: str) -> Iterator[pl.DataFrame | Rejected]:
    """By columns if every row is text throughout, as events nearly always are; else one by one."""
    names = {name for _, row in rows for name in row}
    try:
        if not names <= EVENT_SCHEMA.keys():
            raise TypeError("a field that events do not have")
        columns = {name: pl.Series([row.get(name) for _, row in rows], dtype=pl.String, strict=True) for name in names}
        frame = pl.DataFrame({"line": [line for line, _ in rows], **columns})
    except TypeError:
        yield from judged_events((line, validated(Event, row, file, line, row)) for line, row in rows)
    else:
        yield from checked_events(frame, file)
