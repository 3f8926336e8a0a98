"""Products, users, events, quarantine, cache and releases: what is put is what is read."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from catalog import Event, FeatureSchema, Product, RawProduct, Rejected, User
from settings import UserError
from store import Alias, Applied, PutEvents
from vocab import resolve_aliases

T0 = datetime(2024, 3, 1, 12, 0, 0, 123456, tzinfo=UTC)
FULL = RawProduct(
    product_id="p1",
    title="남색 원피스",
    description='a "quoted" \\ line\nand another',
    attributes={"색상": ["남색", "Navy"], "size": []},
    price=19.99,
    in_stock=False,
    group_id="g",
    arrived_at=T0,
)
BARE = RawProduct(product_id="p2", title="t")


def product(product_id: str, **std: str) -> Product:
    return Product(product_id=product_id, title="t", std={name: [value] for name, value in std.items()}, re={"r": []})


def event(user: str, item: str, minutes: int = 0, **rest) -> Event:
    return Event(user_id=user, product_id=item, at=T0 + timedelta(minutes=minutes), **rest)


# --- products ---------------------------------------------------------------------------------------------------------


def test_a_product_comes_back_as_it_was_put(store):
    store.products.put([FULL, BARE])
    assert store.products.get("p1").raw == FULL
    assert store.products.get("p2").raw == BARE
    assert store.products.get("p1").product is None
    assert store.products.get("nobody") is None


def test_a_product_put_again_replaces_the_raw_side_and_keeps_the_features(store):
    store.products.put([FULL])
    store.products.put_features([product("p1", c="x")], origin="lexicon")
    store.products.put([RawProduct(product_id="p1", title="new")])
    stored = store.products.get("p1")
    assert stored.raw == RawProduct(product_id="p1", title="new")
    assert stored.product == Product(product_id="p1", title="new", std={"c": ["x"]}, re={"r": []})


def test_of_one_id_given_twice_the_last_counts(store):
    store.products.put([BARE, RawProduct(product_id="p2", title="later")])
    store.products.put_features([product("p2", c="x"), product("p2", c="y")], origin="o")
    assert store.products.get("p2").raw.title == "later"
    assert store.products.get("p2").product.std == {"c": ["y"]}


def test_products_are_read_in_batches_ordered_by_code_point(store):
    ids = ["a", "B", "é", "가", "Z", "1"]
    store.products.put([RawProduct(product_id=name, title="t") for name in ids])
    batches = list(store.products.iter_raw(batch_size=4))
    assert [len(batch) for batch in batches] == [4, 2]
    assert [raw.product_id for batch in batches for raw in batch] == sorted(ids)


def test_features_are_read_of_the_products_that_have_some(store):
    store.products.put([FULL, BARE])
    store.products.put_features([product("p2", c="x"), product("gone", c="x")], origin=["one", "two"])
    assert store.products.read_features() == [product("p2", c="x")]
    assert store.products.origins() == {"p2": "one"}


def test_commerce_has_every_product_in_order(store):
    store.products.put([BARE, FULL])
    commerce = store.products.read_commerce()
    assert commerce.product_ids == ["p1", "p2"]
    np.testing.assert_array_equal(commerce.price, [19.99, np.nan])
    assert commerce.in_stock.tolist() == [False, True]
    assert commerce.group_id == ["g", None]
    np.testing.assert_array_equal(commerce.arrived_at, [T0.timestamp(), np.nan])


def test_an_empty_shop_reads_as_empty(store):
    assert list(store.products.iter_raw()) == []
    assert store.products.read_features() == []
    assert store.products.read_commerce().price.shape == (0,)
    assert store.events.read().user.shape == (0,)
    assert store.users.read_profiles() == {}
    store.products.put([])
    store.products.put_features([], origin="o")
    store.users.put([])
    assert store.events.put([]) == PutEvents(0, 0, [])


def test_products_exist_until_deleted(store):
    store.products.put([FULL, BARE])
    assert store.products.existing(["p1", "p2", "p3"]) == {"p1", "p2"}
    store.products.delete(["p1", "p3"])
    assert store.products.existing(["p1", "p2"]) == {"p2"}
    assert store.products.count() == 1


# --- the schema -------------------------------------------------------------------------------------------------------


def test_a_shop_without_a_schema_says_so(store):
    with pytest.raises(UserError, match="no feature schema yet"):
        store.schema()


def test_the_schema_keeps_its_order_and_is_replaced(store):
    store.put_schema(FeatureSchema(std={"a": ["x"]}, re=[]))
    schema = FeatureSchema(std={"zz": ["b", "a"], "c": ["z", "y"]}, re=["mm", "k"])
    store.put_schema(schema)
    assert store.schema().model_dump_json() == schema.model_dump_json()


# --- users ------------------------------------------------------------------------------------------------------------


def test_users_come_back_as_they_were_put(store):
    store.users.put([User(user_id="b", profile={"height_cm": 170.5}), User(user_id="a")])
    store.users.put([User(user_id="b", profile={"weight_kg": 60})])
    assert store.users.get("b") == User(user_id="b", profile={"weight_kg": 60})
    assert store.users.get("c") is None
    assert list(store.users.read_profiles().items()) == [("a", {}), ("b", {"weight_kg": 60})]


# --- events -----------------------------------------------------------------------------------------------------------


def test_events_are_stored_once_and_only_on_products(store):
    store.products.put([FULL, BARE])
    first = event("u", "p1")
    assert store.events.put([first, first, event("u", "p2"), event("u", "x"), event("v", "x")]) == PutEvents(
        2, 1, ["x"]
    )
    assert store.events.put([first]) == PutEvents(0, 1, [])


def test_the_log_is_sorted_and_its_words_are_numbered(store):
    store.products.put([FULL, BARE])
    events = [
        event("v", "p2", 5, kind="view"),
        event("u", "p2", 0, kind="cart", context='summer, "wedding"\n'),
        event("u", "p1", 0, kind="purchase"),
        event("a", "p1", 0),
    ]
    store.events.put(events)
    log = store.events.read()
    assert (log.user_ids, log.product_ids) == (["a", "u", "v"], ["p1", "p2"])
    assert (log.kinds, log.contexts) == (["cart", "purchase", "view"], ["", 'summer, "wedding"\n'])
    assert [log.user_ids[number] for number in log.user] == ["a", "u", "u", "v"]
    assert [log.product_ids[number] for number in log.product] == ["p1", "p1", "p2", "p2"]
    assert [log.kinds[number] for number in log.kind] == ["view", "purchase", "cart", "view"]
    assert [log.contexts[number] for number in log.context] == ["", "", 'summer, "wedding"\n', ""]
    assert log.at.tolist() == [T0.timestamp()] * 3 + [T0.timestamp() + 300]
    assert [array.dtype for array in (log.user, log.product, log.kind, log.context, log.at)] == [
        np.int32, np.int32, np.int32, np.int32, np.float64,
    ]  # fmt: skip


def test_a_log_of_many_kinds_calls_each_by_its_name(store):
    """Whoever may send events may send kinds that nobody ever heard of."""
    store.products.put([FULL])
    store.events.put([event("u", "p1", number, kind=f"kind{number:03}") for number in range(300)])
    log = store.events.read()
    assert log.kind.min() >= 0
    assert [log.kinds[number] for number in log.kind] == [f"kind{number:03}" for number in range(300)]


def test_the_log_can_end_before_a_moment(store):
    store.products.put([FULL])
    store.events.put([event("u", "p1", minute) for minute in range(4)])
    log = store.events.read(before=T0 + timedelta(minutes=2))
    assert log.at.tolist() == [T0.timestamp(), T0.timestamp() + 60]


def test_events_on_a_deleted_product_stay_in_the_log(store):
    store.products.put([FULL])
    store.events.put([event("u", "p1")])
    store.products.delete(["p1"])
    assert store.events.read().product_ids == ["p1"]


# --- quarantine -------------------------------------------------------------------------------------------------------


def test_rejected_rows_are_kept_once_with_their_place(store):
    rows = [Rejected("f", 2, "b", "raw"), Rejected("f", 1, "a", "raw"), Rejected("g", 1, "b", "raw")]
    store.quarantine.add("s", rows)
    store.quarantine.add("s", rows)
    store.quarantine.add("t", rows[:1])
    found = [(row.source, row.file, row.line, row.reason, row.raw) for row in store.quarantine.read()]
    assert found == [
        ("s", "f", 1, "a", "raw"), ("s", "f", 2, "b", "raw"), ("s", "g", 1, "b", "raw"), ("t", "f", 2, "b", "raw"),
    ]  # fmt: skip
    assert [row.line for row in store.quarantine.read("s", limit=2)] == [1, 2]
    assert store.quarantine.counts("s") == {"b": 2, "a": 1}
    assert list(store.quarantine.counts()) == ["b", "a"]


def test_a_row_may_be_rejected_for_its_very_bytes(store):
    store.quarantine.add("s", [Rejected("f", 1, "NUL \x00", "\x00 \ud800")])
    (row,) = store.quarantine.read()
    assert (row.reason, row.raw) == ("NUL \\x00", "\\x00 \\ud800")


# --- cache ------------------------------------------------------------------------------------------------------------


def test_the_cache_gives_what_is_there(store):
    store.cache.put_many("llm", {"k": {"a": [1, None]}, "j": {}})
    store.cache.put_many("other", {"k": {"b": 1}})
    store.cache.put_many("llm", {"j": {"new": True}})
    assert store.cache.get_many("llm", ["k", "j", "missing"]) == {"k": {"a": [1, None]}, "j": {"new": True}}
    assert store.cache.get_many("llm", []) == {}


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=[])))
def test_any_answer_can_be_cached(store, text):
    store.cache.put_many("llm", {"k": {"answer": text, text: 1}})
    assert store.cache.get_many("llm", ["k"])["k"] == json.loads(json.dumps({"answer": text, text: 1}))


# --- releases ---------------------------------------------------------------------------------------------------------


def test_releases_are_recorded_read_and_deleted(store):
    store.releases.record("20260102-000000", {"z": 1, "a": [2]})
    store.releases.record("20260101-000000", {})
    store.releases.record("20260101-000000", {"again": True})
    found = [(release.name, release.manifest) for release in store.releases.read()]
    assert found == [("20260101-000000", {"again": True}), ("20260102-000000", {"z": 1, "a": [2]})]
    store.releases.delete("20260101-000000")
    assert [release.name for release in store.releases.read()] == ["20260102-000000"]


def test_new_words_get_the_next_ids(store):
    assert store.releases.words("r") == {}
    assert store.releases.add_words("r", [("style", "b"), ("style", "a")], first_id=10) == {
        ("style", "b"): 10, ("style", "a"): 11,
    }  # fmt: skip
    known = store.releases.add_words("r", [("style", "a"), ("mood", "a")], first_id=10)
    assert known == store.releases.words("r") == {("style", "b"): 10, ("style", "a"): 11, ("mood", "a"): 12}
    assert store.releases.add_words("other", [("style", "a")], first_id=3) == {("style", "a"): 3}
    store.releases.delete("r")
    assert store.releases.words("r") == {}


def test_words_added_at_the_same_time_get_one_id_each(store):
    workers, rounds, per_batch = 4, 10, 20
    barrier = threading.Barrier(workers)

    def add(start: int) -> None:
        batch = [("f", str(start * 5 + step)) for step in range(per_batch)]  # overlaps with the other workers'
        for number in range(rounds):
            barrier.wait()
            store.releases.add_words(f"r{number}", batch, first_id=5)

    threads = [threading.Thread(target=add, args=(start,)) for start in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    distinct = (workers - 1) * 5 + per_batch
    for number in range(rounds):
        assert sorted(store.releases.words(f"r{number}").values()) == list(range(5, 5 + distinct))


# --- aliases ----------------------------------------------------------------------------------------------------------

CREW = Alias("neck", "crewneck", ["crew neck"], "spelling")
LONG_COAT = Alias("kind", "long coat", ["long", "coat"], "compound")


def test_aliases_come_back_as_they_were_applied(store):
    assert store.aliases.read() == {}
    assert store.aliases.apply([CREW, LONG_COAT], resolve_aliases) == Applied(1, new=2, changed=0, same=0)
    assert store.aliases.read() == {("kind", "long coat"): ["long", "coat"], ("neck", "crewneck"): ["crew neck"]}
    assert [(alias.field, alias.kind, alias.application) for alias in store.aliases.current()] == [
        ("kind", "compound", 1),
        ("neck", "spelling", 1),
    ]


def test_aliases_applied_twice_change_nothing(store):
    store.aliases.apply([CREW], resolve_aliases)
    assert store.aliases.apply([CREW], resolve_aliases) == Applied(0, new=0, changed=0, same=1)
    assert store.aliases.undo() == 1
    assert store.aliases.undo() == 0


def test_undo_brings_back_what_the_last_application_replaced(store):
    store.aliases.apply([CREW], resolve_aliases)
    before = store.aliases.current()
    other = Alias("neck", "crewneck", ["round neck"], "own")
    assert store.aliases.apply([other, LONG_COAT], resolve_aliases) == Applied(2, new=1, changed=1, same=0)
    assert store.aliases.read()["neck", "crewneck"] == ["round neck"]
    assert store.aliases.undo() == 2
    assert store.aliases.current() == before


def test_aliases_that_fail_the_check_with_those_in_force_are_not_applied(store):
    store.aliases.apply([CREW], resolve_aliases)
    with pytest.raises(ValueError, match="circle"):
        store.aliases.apply([LONG_COAT, Alias("neck", "crew neck", ["crewneck"], "own")], resolve_aliases)
    assert list(store.aliases.read()) == [("neck", "crewneck")]


def test_an_alias_is_forgotten_with_its_whole_past(store):
    store.aliases.apply([CREW], resolve_aliases)
    store.aliases.apply([Alias("neck", "crewneck", ["round neck"], "own"), LONG_COAT], resolve_aliases)
    assert store.aliases.forget([("neck", "crewneck"), ("neck", "nothing")]) == 1
    assert list(store.aliases.read()) == [("kind", "long coat")]
    assert store.aliases.forget([]) == 0
