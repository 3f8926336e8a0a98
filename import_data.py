"""Import products, shoppers and events: `python import_data.py SOURCE [FOLDER]`.

An import happens wholly or not at all, and twice is the same as once. Rows that cannot be taken go to the quarantine
table with file, line and reason; columns and sources are in docs/data.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from datetime import date, datetime
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import polars as pl
from pydantic import Field
from pydantic_settings import CliPositionalArg
from tqdm import tqdm

from catalog import EARLIEST, Rejected, oldest_event
from datasets import Source, aihub, hm, jsonl, myntra, rent_the_runway, s3rec, sample_shop
from lexicon import LEXICON
from settings import Settings, UserError, run_script
from store import Store
from store.imports import ImportReport, ImportSession

READERS: dict[str, Callable[[Path | None], Source]] = {
    "sample": sample_shop.read,
    "jsonl": jsonl.read,
    "hm": hm.read,
    "rent-the-runway": rent_the_runway.read,
    "myntra": myntra.read,
    "aihub": aihub.read,
    "s3rec": s3rec.read,
}
SHOWN_REASONS = 20  # lines of the report; the quarantine table holds all

Row = TypeVar("Row")


class ImportOptions(Settings):
    """Import a shop's products, shoppers and events into the database. Twice is the same as once."""

    source: CliPositionalArg[Literal["sample", "jsonl", "hm", "rent-the-runway", "myntra", "aihub", "s3rec"]] = Field(
        description="what to import: the built-in sample shop, your own files (jsonl) or a public data set"
    )
    folder: CliPositionalArg[Path | None] = Field(None, description="where its files are; see docs/data.md")
    lexicon: Path = Field(LEXICON, description="whose fields a shop of your own without a schema is read for")
    until: date | None = Field(
        None, description="leave out what happened on this day and later, for an evaluation on these days"
    )


def import_source(
    store: Store, name: str, source: Source, until: date | None = None, oldest: datetime = EARLIEST
) -> ImportReport:
    """`source`, its events from `oldest` on and before the day `until`, in one transaction; any exception leaves the database as
    it was."""
    with store.importing(source=name) as batch, tqdm(desc=name, unit=" rows", disable=None, leave=False) as progress:
        if source.schema is not None and not (source.schema_is_inferred and _has_schema(store)):
            batch.schema(source.schema)
        batch.products(_accepted(source.products, batch, progress))
        batch.users(_accepted(source.users, batch, progress))
        for events in _accepted(source.events, batch, progress):
            wanted = events if until is None else events.filter(pl.col("at").dt.date() < until)
            kept = wanted.filter(pl.col("at") >= oldest)
            batch.leave_out("at: older than EVENT_RETENTION_DAYS", wanted.height - kept.height)
            batch.events_frame(kept, source.events_file)
        batch.features(_accepted(source.features, batch, progress))
    return batch.report


def _has_schema(store: Store) -> bool:
    try:
        store.schema()
    except UserError:
        return False
    return True


def _accepted(rows: Iterable[Row | Rejected], batch: ImportSession, progress: tqdm) -> Iterator[Row]:
    for row in rows:
        progress.update(row.height if isinstance(row, pl.DataFrame) else 1)
        if isinstance(row, Rejected):
            batch.reject(row)
        else:
            yield row


def report_lines(report: ImportReport, seconds: float) -> list[str]:
    """The counts of an import as a table for people."""
    lines = [f"{'':10}{'new':>12}{'changed':>12}{'same':>12}"]
    rows = report.rejected
    for name in ("products", "users", "events", "features"):
        counts = getattr(report, name)
        rows += counts.new + counts.changed + counts.same
        lines.append(f"{name:10}{counts.new:12,}{counts.changed:12,}{counts.same:12,}")
    lines.append(f"{'rejected':10}{report.rejected:12,}")
    reasons = sorted(report.reasons.items(), key=lambda item: (-item[1], item[0]))
    lines += [f"{count:22,}  {reason}" for reason, count in reasons[:SHOWN_REASONS]]
    if others := sum(count for _, count in reasons[SHOWN_REASONS:]):
        lines.append(f"{others:22,}  other reasons")
    return [*lines, f"{rows:,} rows in {seconds:.1f} s: {rows / max(seconds, 1e-9):,.0f} rows a second"]


def main(options: ImportOptions) -> None:
    reader = READERS[options.source]
    if options.source == "jsonl":
        reader = partial(jsonl.read, lexicon=options.lexicon)
    if options.source == "hm":
        reader = partial(hm.read, prices_before=options.until)
    started = time.monotonic()
    source = reader(options.folder)
    with Store.open(options) as store:
        oldest = oldest_event(options.event_retention_days)
        report = import_source(store, options.source, source, options.until, oldest)
    for line in (*source.notes, *report_lines(report, time.monotonic() - started)):
        print(line)


if __name__ == "__main__":
    run_script(ImportOptions, main)
