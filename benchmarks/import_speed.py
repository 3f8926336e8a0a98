"""How many rows a second an import takes, whole: reading, checking, COPY, merging. `python -m benchmarks.import_speed`

A shop of 10,000 products and a million events, as Parquet, into a fresh embedded PostgreSQL in a temporary folder; then the same
files once more, which must change nothing.
"""

from __future__ import annotations

import os
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl

from datasets import jsonl
from import_data import import_source
from settings import Settings
from store import Store

PRODUCTS, SHOPPERS, EVENTS = 10_000, 50_000, 1_000_000


def write_shop(folder: Path) -> None:
    random = np.random.default_rng(0)
    numbers = np.arange(PRODUCTS)
    pl.DataFrame(
        {"product_id": [f"p{n}" for n in numbers], "title": [f"Linen dress number {n}" for n in numbers]}
    ).write_parquet(folder / "products.parquet")
    seconds = random.integers(0, 90 * 86_400, EVENTS) + int(datetime(2026, 1, 1, tzinfo=UTC).timestamp())
    pl.DataFrame(
        {
            "user_id": [f"u{n}" for n in random.integers(0, SHOPPERS, EVENTS)],
            "product_id": [f"p{n}" for n in random.integers(0, PRODUCTS, EVENTS)],
            "kind": random.choice(["view", "cart", "purchase"], EVENTS),
            "at": pl.Series(seconds * 1_000_000).cast(pl.Datetime("us", "UTC")),
        }
    ).write_parquet(folder / "events.parquet")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)  # the embedded server of root runs as another user, who must get in
        folder = Path(name)
        write_shop(folder)
        with Store.open(Settings(database_url="", data_dir=folder / "data", _env_file=None)) as store:
            for run in ("first import", "the same again"):
                started = time.perf_counter()
                report = import_source(store, "jsonl", jsonl.read(folder))
                seconds = time.perf_counter() - started
                rows = PRODUCTS + EVENTS
                print(
                    f"{run}: {rows:,} rows in {seconds:.1f} s, {rows / seconds:,.0f} a second; {report.events.new:,} new events"
                )


if __name__ == "__main__":
    main()
