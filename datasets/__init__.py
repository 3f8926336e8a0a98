"""One importer a source. Each module has `read(path) -> Source`; `import_data.py` hands the source to the store."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import polars as pl

from catalog import FeatureSchema, Product, RawProduct, Rejected, User


@dataclass(frozen=True)
class Source:
    """What an importer found. The iterables are read once, in this order, and give a bad row as `Rejected`.

    `events` comes in frames of `datasets.events.EVENT_SCHEMA`, already checked: `checked_events` makes them from
    columns (with the `line` of each in `events_file`), `event_frame` from `Event` objects.
    """

    schema: FeatureSchema | None = None
    products: Iterable[RawProduct | Rejected] = ()
    users: Iterable[User | Rejected] = ()
    events: Iterable[pl.DataFrame | Rejected] = ()
    events_file: str = ""
    features: Iterable[Product | Rejected] = ()
    schema_is_inferred: bool = False
    """The schema is a guess from the data: it is used only if the shop has none yet."""
    notes: tuple[str, ...] = ()
    """What the person who imports should know, one line each."""
