"""Imports into a real database: counts, quarantine, twice is once, and nothing half-done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

import polars as pl
import pytest

import import_data
from catalog import Event, FeatureSchema, Product, RawProduct, Rejected, User
from datasets import Source, hm
from datasets.events import event_frame
from import_data import READERS, SHOWN_REASONS, ImportOptions, import_source, report_lines
from store.imports import Counts, ImportReport

ROOT = Path(__file__).parent.parent
TABLES = ("products", "users", "events", "feature_schema", "quarantine")
SCHEMA = FeatureSchema(std={"colour": ["red", "blue"]}, re=["fit"])


def snapshot(store):
    with store.pool.connection() as connection:
        return {name: sorted(map(str, connection.execute(f"SELECT * FROM {name}").fetchall())) for name in TABLES}


def product(number, **changes):
    return RawProduct(**{"product_id": f"p{number}", "title": f"Product {number}", **changes})


def bought(number, user="u1"):
    return Event(user_id=user, product_id=f"p{number}", at="2024-03-02", kind="purchase")


def shop():
    return Source(
        schema=SCHEMA,
        products=[product(1), Rejected("f", 2, "title: missing", "{}"), product(3)],
        users=[User(user_id="u1", profile={"age": 30})],
        events=[
            Rejected("g", 1, "at: missing", "{}"),
            event_frame([bought(1), bought(3)]),
            event_frame([bought(1, "u2")]),
        ],
        features=[Product(product_id="p1", title="Product 1", std={"colour": ["red"]}, re={"fit": ["slim"]})],
    )


def test_everything_of_a_source_arrives_and_is_counted(store):
    report = import_source(store, "test", shop())
    assert (report.products, report.users) == (Counts(2, 0, 0), Counts(1, 0, 0))
    assert (report.events, report.features) == (Counts(3, 0, 0), Counts(1, 0, 0))
    assert (report.rejected, report.reasons) == (2, {"title: missing": 1, "at: missing": 1})
    assert store.schema() == SCHEMA
    assert store.products.get("p1").product.re == {"fit": ["slim"]}
    assert store.users.get("u1") == User(user_id="u1", profile={"age": 30})
    assert sorted(store.events.read().product_ids) == ["p1", "p3"]
    rows = {(row.source, row.file, row.line, row.reason) for row in store.quarantine.read(source="test", limit=10)}
    assert rows == {("test", "f", 2, "title: missing"), ("test", "g", 1, "at: missing")}


def test_a_second_import_changes_nothing(store):
    import_source(store, "test", shop())
    before = snapshot(store)
    report = import_source(store, "test", shop())
    assert (report.products, report.users) == (Counts(0, 0, 2), Counts(0, 0, 1))
    assert (report.events, report.features) == (Counts(0, 0, 3), Counts(0, 0, 1))
    assert snapshot(store) == before


def test_a_changed_product_is_counted_as_changed(store):
    import_source(store, "test", shop())
    report = import_source(store, "test", Source(products=[product(1, price=5), product(3), product(4)]))
    assert report.products == Counts(new=1, changed=1, same=1)
    assert store.products.get("p1").raw.price == 5


def test_an_event_on_an_unknown_product_is_rejected_and_the_others_stay(store):
    frame = event_frame([bought(1), bought(99)]).with_columns(line=pl.Series([7, 8]))
    source = Source(products=[product(1)], events=[frame], events_file="events.csv")
    report = import_source(store, "test", source)
    assert report.events.new == 1
    assert report.reasons == {"product_id: unknown product": 1}
    (row,) = store.quarantine.read(source="test", limit=10)
    assert (row.file, row.line, row.reason) == ("events.csv", 8, "product_id: unknown product")
    assert "p99" in row.raw


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("part", ["products", "users", "events", "features"])
def test_a_failure_in_the_middle_leaves_the_database_as_before(store, part, fault):
    import_source(store, "test", shop())
    before = snapshot(store)
    rows = {
        "products": [product(number, title="changed") for number in range(20)],
        "users": [User(user_id=f"u{number}", profile={"age": 40}) for number in range(20)],
        "events": [event_frame([bought(1, f"v{number}")]) for number in range(20)],
        "features": [Product(product_id="p1", title="x", std={"colour": ["blue"]})],
    }

    def broken():
        yield Rejected("f", 1, "title: missing", "other")
        yield from rows[part]
        raise fault("the disk is gone")

    source = Source(**{**rows, "schema": FeatureSchema(std={"size": ["S"]}, re=[]), part: broken()})
    with pytest.raises(fault, match="the disk is gone"):
        import_source(store, "test", source)
    assert snapshot(store) == before


def test_an_inferred_schema_is_used_only_if_the_shop_has_none(store):
    guess = FeatureSchema(std={"size": ["S"]}, re=[])
    import_source(store, "test", Source(schema=guess, schema_is_inferred=True))
    assert store.schema() == guess
    import_source(store, "test", Source(schema=SCHEMA, schema_is_inferred=True))
    assert store.schema() == guess


def test_a_purchase_that_stands_twice_in_a_file_is_one_event(store, tmp_path):
    columns = ["article_id", "product_code", "prod_name", "detail_desc", *hm.STD_COLUMNS.values()]
    (tmp_path / "articles.csv").write_text(",".join(columns) + "\n0123456001,0123456" + ",word" * 13 + "\n")
    (tmp_path / "transactions_train.csv").write_text(
        "t_dat,customer_id,article_id,price\n" + "2020-01-05,c1,0123456001,0.5\n" * 3 + "2020-01-06,c1,0123456001,0.5\n"
    )
    report = import_source(store, "hm", hm.read(tmp_path))
    assert report.events.new == 2
    assert report.rejected == 0
    assert len(store.events.read().at) == 2


def test_what_happened_later_can_be_left_out_for_an_evaluation(store, tmp_path):
    columns = ["article_id", "product_code", "prod_name", "detail_desc", *hm.STD_COLUMNS.values()]
    articles = [f"012345600{number},0123456" + ",word" * 13 for number in (1, 2)]
    (tmp_path / "articles.csv").write_text("\n".join([",".join(columns), *articles]) + "\n")
    (tmp_path / "transactions_train.csv").write_text(
        "t_dat,customer_id,article_id,price\n2020-01-05,c1,0123456001,0.5\n2020-01-06,c1,0123456001,0.1\n"
        "2020-01-07,c1,0123456002,0.1\n"
    )
    done = command("hm", tmp_path, "--until", "2020-01-06", "--database-url", store.url, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert store.events.read().at.tolist() == [datetime(2020, 1, 5, tzinfo=UTC).timestamp()]
    # A price paid on a later day would betray that the article was sold then.
    assert [store.products.get(f"012345600{number}").raw.price for number in (1, 2)] == [0.5, None]


def test_events_older_than_they_are_kept_are_left_out_and_counted(store):
    report = import_source(store, "test", shop(), oldest=datetime(2100, 1, 1, tzinfo=UTC))
    assert report.events.new == 0
    assert report.reasons["at: older than EVENT_RETENTION_DAYS"] == 3
    assert "at: older than EVENT_RETENTION_DAYS" not in store.quarantine.counts()  # else they would be kept after all


def test_rows_by_the_thousand_arrive_whole(store):
    count = 3_000
    events = pl.concat([event_frame([bought(number, f"u{number}")]) for number in range(count)])
    report = import_source(store, "test", Source(products=map(product, range(count)), events=[events]))
    assert (report.products.new, report.events.new) == (count, count)
    assert store.products.count() == count


def test_the_report_names_counts_reasons_and_speed():
    reasons = {f"reason {number:02}": 2 for number in range(SHOWN_REASONS)} | {"rare": 1, "rarer": 1, "common": 9}
    report = ImportReport(
        products=Counts(1200, 1, 0), users=Counts(0, 0, 0), events=Counts(10, 0, 4), features=Counts(0, 0, 0),
        rejected=sum(reasons.values()), reasons=reasons,
    )  # fmt: skip
    lines = [line.split() for line in report_lines(report, seconds=2.0)]
    assert lines[0] == ["new", "changed", "same"]
    assert ["products", "1,200", "1", "0"] in lines
    assert ["events", "10", "0", "4"] in lines
    assert ["rejected", "51"] in lines
    assert lines[6] == ["9", "common"]
    assert lines[-2] == ["4", "other", "reasons"]
    assert " ".join(lines[-1]) == "1,266 rows in 2.0 s: 633 rows a second"


# --- the command


def test_every_source_of_the_command_line_has_a_reader():
    assert set(get_args(ImportOptions.model_fields["source"].annotation)) == set(READERS)


def command(*arguments, cwd):
    environment = {name: value for name, value in os.environ.items() if name not in ("DATABASE_URL", "DATA_DIR")}
    return subprocess.run(
        [sys.executable, ROOT / "import_data.py", *map(str, arguments)],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_the_command_imports_and_reports(store, tmp_path):
    rows = [{"product_id": str(n), "title": "x", "attributes": {"colour": "red"}} for n in range(5)]
    (tmp_path / "products.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    done = command("jsonl", tmp_path, "--database-url", store.url, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "colour (1 values)" in done.stdout
    assert "1  row: not valid JSON" in done.stdout
    assert store.products.count() == 5


def test_ctrl_c_stops_the_command_with_130_and_nothing_imported(store, tmp_path):
    (tmp_path / "products.jsonl").write_text('{"product_id": "1", "title": "x"}\n')
    waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    with store.importing(source="test"):  # another import is in progress, so that the command's has begun and waits
        process = subprocess.Popen(
            [sys.executable, ROOT / "import_data.py", "jsonl", tmp_path, "--database-url", store.url],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        with store.pool.connection() as connection:
            while connection.execute(waiting).fetchone() != (1,):
                assert process.poll() is None
                time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, "")
    assert store.products.count() == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["shoes"], "import_data.py: source: Input should be 'sample', 'jsonl', 'hm'"),
        (["hm", "nowhere"], "import_data.py: nowhere does not exist; expected a folder with articles.csv"),
        (["hm"], "import_data.py: this source needs a folder"),
        (["jsonl", "--until", "someday", "x"], "import_data.py: until: Input should be a valid date"),
    ],
)
def test_the_command_refuses_in_one_line_before_it_starts_anything(tmp_path, arguments, said):
    done = command(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_shop_without_a_schema_is_read_for_the_fields_of_the_lexicon_that_is_named(store, settings, tmp_path):
    (tmp_path / "products.jsonl").write_text('{"product_id": "1", "title": "Blorp chair"}\n')
    words = {"fields": {"sort": {"names": ["sort"], "values": {"blorp": []}}}}
    (tmp_path / "lexicon.json").write_text(json.dumps(words))
    given = settings.model_dump() | {"source": "jsonl", "folder": tmp_path, "lexicon": tmp_path / "lexicon.json"}
    import_data.main(ImportOptions(**given, _env_file=None))
    assert store.schema() == FeatureSchema(std={"sort": ["blorp"]}, re=[])
