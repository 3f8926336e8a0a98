"""Events by the hundred thousand: columns in, checked columns out.

`catalog.Event` alone says what a valid event is. Expressions over whole columns pick the rows that are valid beyond
doubt; every other row is asked of `Event` one by one, so both ways must agree (a property test holds them to it).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b

import polars as pl

from catalog import EARLIEST, MAX_ID, MAX_TEXT, SESSION, Event, Rejected, newest_event
from datasets.reading import validated

EVENT_SCHEMA: dict[str, pl.DataType] = {
    "event_id": pl.String(),
    "user_id": pl.String(),
    "product_id": pl.String(),
    "kind": pl.String(),
    "at": pl.Datetime("us", "UTC"),
    "context": pl.String(),
    "list_id": pl.String(),
}

# Narrower than `Event` on purpose: a row that fits none of these is judged by `Event` itself.
_PLAIN_ID = r"^[\w!-~]+$"
_PLAIN_KIND = r"^[a-z][a-z0-9_]{0,31}$"
_DAY = r"^\d{4}-\d\d-\d\d$"
_TIME = r"^\d{4}-\d\d-\d\dT([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)?$"


def event_frame(events: Iterable[Event]) -> pl.DataFrame:
    """Valid events as a frame of EVENT_SCHEMA."""
    rows = [tuple(getattr(event, name) for name in EVENT_SCHEMA) for event in events]
    return pl.DataFrame(rows, schema=EVENT_SCHEMA, orient="row")


def judged_events(rows: Iterable[tuple[int, Event | Rejected]]) -> Iterator[pl.DataFrame | Rejected]:
    """(line, event or why it is none) as `checked_events` gives them."""
    accepted, lines = [], []
    for line, row in rows:
        if isinstance(row, Rejected):
            yield row
        else:
            accepted.append(row)
            lines.append(line)
    yield event_frame(accepted).with_columns(line=pl.Series(lines, dtype=pl.Int64))


def checked_events(
    rows: pl.DataFrame, file: str, names: Mapping[str, str] = {}, raw: pl.DataFrame | None = None
) -> Iterator[pl.DataFrame | Rejected]:
    """The valid events of `rows` in frames of EVENT_SCHEMA plus `line`, the others as `Rejected`.

    `rows` has `line` and columns named as the fields of `Event`, of any type; null is the same as absent. `names` gives
    a field's name in the file, `raw` the rows as they stood there (the same height).
    """
    given = rows.with_columns(pl.lit(None).alias(name) for name in EVENT_SCHEMA if name not in rows.columns)
    texts = given.select(_as_text(given[name]) for name in EVENT_SCHEMA if name != "at").with_columns(
        given["line"].cast(pl.Int64),
        *(given[name].is_null().alias(f"{name}_absent") for name in ("event_id", "kind", "context", "list_id")),
        _as_time(given["at"]),
    )
    marked = texts.with_columns(
        clean=pl.all_horizontal(
            *(_plain_id(name) for name in ("user_id", "product_id")),
            ~pl.col("user_id").str.starts_with(SESSION),
            pl.col("kind_absent") | pl.col("kind").str.contains(_PLAIN_KIND),
            pl.col("event_id_absent") | _plain_id("event_id"),
            pl.col("list_id_absent") | _plain_id("list_id"),
            pl.col("context_absent")
            | (pl.col("context").str.len_chars() <= MAX_TEXT) & ~pl.col("context").str.contains("\x00", literal=True),
            pl.col("at").is_between(EARLIEST, newest_event(), closed="left"),
        ).fill_null(False)
    )
    clean = marked.filter("clean").with_columns(
        pl.col("kind").fill_null(Event.model_fields["kind"].default), pl.col("context", "list_id").fill_null("")
    )
    others = ~marked["clean"]
    judged = (
        (line, validated(Event, values, file, line, row, names))
        for line, values, row in zip(
            rows["line"].filter(others),
            given.select(*EVENT_SCHEMA).filter(others).iter_rows(named=True),
            (rows if raw is None else raw).drop("line").filter(others).iter_rows(named=True),
            strict=True,
        )
    )
    yield _with_ids(clean)
    yield from judged_events(judged)


def _plain_id(name: str) -> pl.Expr:
    return pl.col(name).str.contains(_PLAIN_ID) & (pl.col(name).str.len_chars() <= MAX_ID)


def _as_text(column: pl.Series) -> pl.Series:
    """Text and whole numbers as text; null where only `Event` can say."""
    if column.dtype == pl.String or column.dtype.is_integer():
        return column.cast(pl.String)
    return pl.Series(column.name, [None] * len(column), dtype=pl.String)


def _as_time(column: pl.Series) -> pl.Series:
    """UTC times; null where only `Event` can say."""
    name = column.name
    if isinstance(column.dtype, pl.Datetime):
        zoned = column if column.dtype.time_zone else column.dt.replace_time_zone("UTC")
        return zoned.dt.convert_time_zone("UTC").cast(EVENT_SCHEMA["at"])
    if column.dtype == pl.Date:
        return column.cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
    if column.dtype != pl.String:
        return pl.Series(name, [None] * len(column), dtype=EVENT_SCHEMA["at"])
    text = pl.col(name)
    day = pl.when(text.str.contains(_DAY)).then(text).str.to_date("%Y-%m-%d", strict=False).cast(pl.Datetime("us"))
    offset = (
        pl.when(text.str.contains(r"[+-]\d\d:\d\d$")).then(text).otherwise(text.str.strip_chars_end("Z") + "+00:00")
    )
    moment = (
        pl.when(text.str.contains(_TIME))
        .then(offset)
        .str.to_datetime("%Y-%m-%dT%H:%M:%S%.f%:z", time_unit="us", strict=False)
    )
    return column.to_frame().select(pl.coalesce(day.dt.replace_time_zone("UTC"), moment).alias(name))[name]


def _with_ids(clean: pl.DataFrame) -> pl.DataFrame:
    """Fill `event_id` as `catalog.event_id_of` does (a property test compares them), the time formatted by column."""
    at = pl.col("at")
    whole = at.dt.strftime("%Y-%m-%dT%H:%M:%S+00:00")
    iso = pl.when(at.dt.microsecond() == 0).then(whole).otherwise(at.dt.strftime("%Y-%m-%dT%H:%M:%S%.6f+00:00"))
    keys = clean.select(pl.concat_str("user_id", "product_id", "kind", iso, separator="\x1f").alias("key"))["key"]
    ids = [blake2b(key.encode(), digest_size=12).hexdigest() for key in keys]
    return clean.with_columns(pl.col("event_id").fill_null(pl.Series(ids, dtype=pl.String))).select(
        *EVENT_SCHEMA, "line"
    )
