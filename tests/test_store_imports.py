"""Imports: all or nothing, twice is the same as once, one at a time."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from catalog import Event, FeatureSchema, Product, RawProduct, Rejected, User
from store.imports import UNKNOWN_PRODUCT, Counts, ImportReport

T0 = datetime(2024, 3, 1, 12, 0, 0, 123456, tzinfo=UTC)
TABLES = ("products", "users", "events", "feature_schema", "quarantine")
SCHEMA = FeatureSchema(std={"colour": ["red"]}, re=["fit"])
# What PostgreSQL takes: no NUL, no lone surrogates.
texts = st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=20)


def product(product_id: str, **rest) -> RawProduct:
    return RawProduct(product_id=product_id, title="t", **rest)


def features(product_id: str, colour: str = "red") -> Product:
    return Product(product_id=product_id, title="t", std={"colour": [colour]})


def event(user: str, item: str, minutes: int = 0) -> Event:
    return Event(user_id=user, product_id=item, at=T0 + timedelta(minutes=minutes))


def frame(events: list[Event], **more) -> pl.DataFrame:
    names = ["event_id", "user_id", "product_id", "kind", "at", "context", "list_id"]
    columns = {name: [getattr(event, name) for event in events] for name in names}
    return pl.DataFrame({**columns, **more})


def run(store, products=(), users=(), events=(), given_features=()) -> ImportReport:
    with store.importing(source="s") as batch:
        batch.products(products)
        batch.users(users)
        batch.events(events)
        batch.features(given_features)
    return batch.report


def snapshot(store):
    with store.pool.connection() as connection:
        return {name: sorted(map(str, connection.execute(f"SELECT * FROM {name}").fetchall())) for name in TABLES}


def everything(store) -> ImportReport:
    with store.importing(source="s") as batch:
        batch.events([event("u", "p1"), event("u", "missing")], file="e.csv")  # the order of calls is free
        batch.schema(SCHEMA)
        batch.reject(Rejected("p.csv", 3, "title: missing", "{}"))
        batch.features([features("p1"), features("missing")])
        batch.products([product("p1", price=1.5, arrived_at=T0), product("p2")])
        batch.users([User(user_id="u", profile={"age": 30})])
    return batch.report


def test_everything_arrives_and_is_counted(store):
    report = everything(store)
    assert (report.products, report.users) == (Counts(2, 0, 0), Counts(1, 0, 0))
    assert (report.events, report.features) == (Counts(1, 0, 0), Counts(1, 0, 0))
    assert report.rejected == 3
    assert report.reasons == {UNKNOWN_PRODUCT: 2, "title: missing": 1}
    assert store.products.get("p1").raw == product("p1", price=1.5, arrived_at=T0)
    assert store.products.get("p1").product == features("p1")
    assert store.products.origins() == {"p1": "s"}
    assert store.users.get("u") == User(user_id="u", profile={"age": 30})
    assert store.schema() == SCHEMA
    assert store.events.read().at.tolist() == [T0.timestamp()]


def test_a_second_import_changes_nothing(store):
    everything(store)
    before = snapshot(store)
    report = everything(store)
    assert snapshot(store) == before
    assert (report.products, report.users) == (Counts(0, 0, 2), Counts(0, 0, 1))
    assert (report.events, report.features) == (Counts(0, 0, 1), Counts(0, 0, 1))


def test_changed_rows_are_counted_as_changed(store):
    everything(store)
    report = run(
        store,
        products=[product("p1", price=1.5, arrived_at=T0), product("p2", in_stock=False), product("p3")],
        users=[User(user_id="u", profile={"age": 31})],
        given_features=[features("p1", "blue"), features("p3")],
    )
    assert report.products == Counts(1, 1, 1)
    assert report.users == Counts(0, 1, 0)
    assert report.features == Counts(1, 1, 0)
    assert store.products.get("p1").product == features("p1", "blue")


def test_of_one_id_given_twice_the_last_row_wins_without_a_report_line(store):
    report = run(
        store,
        products=[product("p", price=1), product("q"), product("p", price=2)],
        users=[User(user_id="u", profile={"a": 1}), User(user_id="u", profile={"a": 2})],
        given_features=[features("p", "red"), features("p", "blue")],
    )
    assert (report.products, report.users, report.features) == (Counts(2, 0, 0), Counts(1, 0, 0), Counts(1, 0, 0))
    assert report.rejected == 0
    assert store.products.get("p").raw.price == 2
    assert store.products.get("p").product == features("p", "blue")
    assert store.users.get("u").profile == {"a": 2}


@pytest.mark.parametrize("earlier", [[], [event("v", "p")]], ids=["empty log", "log with events"])
def test_an_event_counts_once(store, earlier):
    run(store, products=[product("p")], events=earlier)
    report = run(store, events=[event("u", "p"), event("u", "p", 1), event("u", "p")])
    assert report.events == Counts(2, 0, 1)
    assert run(store, events=[event("u", "p", 1), event("u", "p", 2)]).events == Counts(1, 0, 1)
    assert len(store.events.read().at) == 3 + len(earlier)


def test_the_event_log_has_its_indexes_after_the_first_import(store):
    def indexes() -> set:
        with store.pool.connection() as connection:
            return set(connection.execute("SELECT indexdef FROM pg_indexes WHERE tablename = 'events'").fetchall())

    migrated = indexes()
    assert len(migrated) == 5
    run(store, products=[product("p")], events=[event("u", "p")])
    assert indexes() == migrated


def test_rows_on_unknown_products_are_quarantined_with_their_place(store):
    with store.importing(source="s") as batch:
        batch.products([product("p")])
        batch.events_frame(frame([event("u", "x"), event("u", "p")], line=[7, 8]), file="e.parquet")
        batch.events([event("u", "y")], file="more.jsonl")
        batch.features([features("z")], file="f.json")
    rows = {(row.file, row.line, row.reason) for row in store.quarantine.read("s")}
    assert rows == {
        (file, line, UNKNOWN_PRODUCT) for file, line in [("e.parquet", 7), ("more.jsonl", 0), ("f.json", 0)]
    }
    assert '"product_id": "x"' in next(row.raw for row in store.quarantine.read("s") if row.line == 7)
    assert store.events.read().product_ids == ["p"]


def test_columns_and_objects_are_the_same_events(store):
    run(store, products=[product("p")], events=[event("u", "p"), event("v", "p", 3)])
    with store.importing(source="s") as batch:
        batch.events_frame(frame([event("u", "p"), event("v", "p", 3)]))
    assert batch.report.events == Counts(0, 0, 2)


@pytest.mark.parametrize("call", ["products", "users", "events", "features", "reject"])
def test_a_failure_in_the_middle_leaves_everything_as_it_was(store, call):
    everything(store)
    before = snapshot(store)

    def broken():
        yield {"products": product("new"), "users": User(user_id="new"), "events": event("new", "p1"),
               "features": features("p2"), "reject": None}[call]  # fmt: skip
        raise RuntimeError("the file breaks off")

    def failing_import():
        with store.importing(source="s") as batch:
            batch.products([product("p9")])
            batch.reject(Rejected("f", 1, "r", "raw"))
            if call == "reject":
                list(broken())
            getattr(batch, call)(broken())

    with pytest.raises(RuntimeError):
        failing_import()
    assert snapshot(store) == before


def test_the_schema_grows_by_what_an_import_brings(store):
    with store.importing(source="a") as batch:
        batch.schema(FeatureSchema(std={"colour": ["red"], "kind": ["x"]}, re=["fit", "mood"]))
    with store.importing(source="b") as batch:
        batch.schema(FeatureSchema(std={"colour": ["blue", "red"], "mood": ["calm"]}, re=["kind", "style"]))
    assert store.schema() == FeatureSchema(
        std={"colour": ["red", "blue"], "mood": ["calm"]}, re=["fit", "kind", "style"]
    )


def test_a_second_import_waits_for_the_first(store):
    entered = threading.Event()

    def second():
        with store.importing(source="second") as batch:
            entered.set()
            batch.products([product("p", price=2)])

    with store.importing(source="first") as batch, store.pool.connection() as watcher:
        batch.products([product("p", price=1)])
        thread = threading.Thread(target=second)
        thread.start()
        waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        while watcher.execute(waiting).fetchone() == (0,):
            assert not entered.is_set()
    thread.join()
    assert store.products.get("p").raw.price == 2


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=5), st.floats(min_value=0, allow_infinity=False))
def test_any_text_and_number_arrives_as_it_was(store, rows, price):
    for special in ('"', "\\N", "\\.", "\r\n", ""):
        rows.append((special, special, special))
    products = [
        RawProduct(product_id=f"p{number}", title=title or "t", description=description, price=price,
                   attributes={"a": [attribute[:200]]}, group_id=title.strip() or None)
        for number, (title, description, attribute) in enumerate(rows)
    ]  # fmt: skip
    events = [
        Event(user_id=f"u{number}", product_id=f"p{number}", at=T0, context=context, event_id=f"e{number}")
        for number, (_, context, _) in enumerate(rows)
    ]
    with store.pool.connection() as connection:
        connection.execute("TRUNCATE products, events")
    run(store, products=products, events=events)
    assert [store.products.get(raw.product_id).raw for raw in products] == products
    log = store.events.read()
    assert {log.user_ids[user]: log.contexts[context] for user, context in zip(log.user, log.context, strict=True)} == {
        event.user_id: event.context for event in events
    }


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    arrived_at=st.datetimes(datetime(1990, 1, 1), datetime(2099, 12, 31), timezones=st.just(UTC)),
    at=st.datetimes(datetime(1990, 1, 1), datetime(2026, 6, 30), timezones=st.just(UTC)),
)
def test_times_arrive_to_the_microsecond(store, arrived_at, at):
    with store.pool.connection() as connection:
        connection.execute("TRUNCATE products, events")
    run(
        store,
        products=[product("p", arrived_at=arrived_at)],
        events=[Event(user_id="u", product_id="p", at=at)],
    )
    assert store.products.get("p").raw.arrived_at == arrived_at
    with store.pool.connection() as connection:
        assert connection.execute("SELECT at FROM events").fetchall() == [(at,)]
