"""Rules in the database: conditions mean in SQL what they mean in Python; versions stay, and one of each name is live."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from pydantic import TypeAdapter

from catalog import Event, Product, RawProduct
from conditions import Condition, holds
from rules import DEFAULT, RuleSet
from store import Filters, Hide, ItemRows, Store, rules
from tests.serving import eventually

NOW = datetime(2026, 6, 30, tzinfo=UTC)
IDS = [f"p{number:02}" for number in range(60)]
RELEASE = "first"
CAPPED = RuleSet.model_validate([{"kind": "at_most", "n": 1, "std": "brand"}])
SORTED = RuleSet.model_validate(
    [{"kind": "bury", "when": {"not": {"in_stock": True}}}, {"kind": "explore", "share": 0.1}]
)


def random_product(chance: np.random.Generator, product_id: str) -> tuple[RawProduct, Product]:
    def maybe(value):
        return value if chance.random() < 0.8 else None

    raw = RawProduct(
        product_id=product_id, title="t", price=maybe(float(chance.integers(5))), in_stock=bool(chance.integers(2)),
        group_id=maybe(f"g{chance.integers(3)}"), arrived_at=maybe(NOW - timedelta(days=int(chance.integers(5)))),
    )  # fmt: skip
    std = {"brand": [str(value) for value in chance.choice(["a", "b", "c"], chance.integers(3), replace=False)]}
    re = {
        "style": [
            str(value) for value in chance.choice(["Boho-Chic", "boho  chic", "STREET", "거리"], chance.integers(3))
        ]
    }
    return raw, Product(product_id=product_id, title="t", std=std, re=re)


def random_condition(chance: np.random.Generator, levels: int = 3) -> dict:
    kind = chance.choice(
        ["std", "re", "price", "stock", "arrived", "days", "products", "groups"] + ["tree"] * 6 * (levels > 1)
    )
    some = str(chance.choice(["any_of", "none_of"]))
    match kind:
        case "std":
            return {"std": "brand", some: [str(value) for value in chance.choice(["a", "b", "c"], 2)]}
        case "re":
            return {"re": "style", some: [str(chance.choice(["boho_chic", "Street", "거리"]))]}
        case "price":
            return {"price": {str(chance.choice(["min", "max"])): float(chance.integers(5))}}
        case "stock":
            return {"in_stock": bool(chance.integers(2))}
        case "arrived":
            at = NOW - timedelta(days=int(chance.integers(5)))
            return {"arrived": {str(chance.choice(["after", "before"])): at.isoformat()}}
        case "days":
            return {"arrived": {"within_days": float(chance.integers(1, 5))}}
        case "products":
            return {"products": [str(value) for value in chance.choice(IDS, 10)]}
        case "groups":
            return {"groups": [f"g{chance.integers(3)}"]}
    word = str(chance.choice(["all", "any", "not"]))
    parts = [random_condition(chance, levels - 1) for _ in range(2)]
    return {word: parts[0] if word == "not" else parts}


@pytest.fixture
def filled(store: Store) -> Store:
    """60 products, none of which has everything, with vectors in a release."""
    chance = np.random.default_rng(0)
    both = [random_product(chance, product_id) for product_id in IDS]
    with store.importing("test") as batch:
        batch.products(raw for raw, _ in both)
        batch.features(product for _, product in both)
    store.vectors.create(RELEASE, 3)
    none = np.zeros((len(IDS), 0), dtype=np.int32)
    store.vectors.copy(RELEASE, ItemRows(IDS, chance.normal(size=(len(IDS), 3)).astype(np.float32), none, none))
    return store


def found(store: Store, **given) -> set[str]:
    filters = Filters(**given, now=NOW.timestamp())
    return set(store.vectors.search(RELEASE, np.ones(3, dtype=np.float32), len(IDS), filters).product_ids)


def test_a_search_and_a_rule_understand_a_condition_alike(filled):
    chance = np.random.default_rng(1)
    facts = filled.products.facts(IDS)
    sizes = set()
    for _ in range(150):
        condition = TypeAdapter(Condition).validate_python(random_condition(chance))
        right = {one for one in IDS if holds(condition, facts[one], NOW.timestamp())}
        assert found(filled, also=[condition]) == right, condition
        sizes.add(len(right))
    assert len(sizes) > 15


def test_filters_of_a_request_leave_out_values_and_arrivals(filled):
    facts = filled.products.facts(IDS)
    middle = NOW - timedelta(days=2)
    at = middle.timestamp()
    assert found(filled, std_none={"brand": ["a"]}) == {one for one in IDS if "a" not in facts[one].std["brand"]}
    known = [one for one in IDS if facts[one].arrived_at is not None]
    assert found(filled, arrived_after=middle) == {one for one in known if facts[one].arrived_at >= at}
    assert found(filled, arrived_before=middle) == {one for one in known if facts[one].arrived_at < at}
    both = found(filled, std={"brand": ["b"]}, std_none={"brand": ["a"]}, arrived_after=middle)
    assert both == found(filled, std={"brand": ["b"]}) & found(filled, std_none={"brand": ["a"]}) & found(
        filled, arrived_after=middle
    )
    assert both


def test_what_was_met_is_hidden_by_kind_and_window(filled):
    met = [("p00", "view", 1), ("p01", "view", 50), ("p02", "purchase", 1), ("p03", "purchase", 50)]
    filled.events.put(
        [Event(user_id="u", product_id=p, kind=kind, at=NOW - timedelta(days=days)) for p, kind, days in met]
    )

    def hidden(*hides: Hide) -> set[str]:
        found = filled.vectors.search(RELEASE, np.ones(3, dtype=np.float32), 60, met_by="u", hides=hides)
        left = set(IDS) - set(found.product_ids)
        assert left == set().union(*filled.vectors.hidden(IDS, "u", hides))
        return left

    since = (NOW - timedelta(days=10)).timestamp()
    assert hidden() == set()
    assert hidden(Hide()) == {"p00", "p01", "p02", "p03"}
    assert hidden(Hide(["purchase"])) == {"p02", "p03"}
    assert hidden(Hide(None, since)) == {"p00", "p02"}
    assert hidden(Hide(["view"], since), Hide(["purchase"])) == {"p00", "p02", "p03"}
    assert hidden(Hide([])) == set()


def test_which_open_values_and_groups_the_shop_has(filled):
    assert filled.products.open_values("style", ["boho chic", "street", "gothic"]) == {"boho chic", "street"}
    assert filled.products.open_values("nothing", ["street"]) == set()
    assert filled.products.groups(["g0", "g9"]) == {"g0"}


def test_versions_stay_and_the_latest_turn_is_live(store):
    assert store.rules.live("shop") is None
    first = store.rules.put("shop", CAPPED, "Jin", "caps", live=True)
    second = store.rules.put("shop", SORTED, "Sol", "", live=False)
    assert [(first.version, first.live), (second.version, second.live)] == [(1, True), (2, False)]
    assert (store.rules.live("shop").version, store.rules.live("shop").rules) == (1, CAPPED)
    assert store.rules.make_live("shop", 2, "Jin", "try").live
    assert (store.rules.live("shop").version, store.rules.live("shop").rules) == (2, SORTED)
    store.rules.make_live("shop", 1, "Sol", "back")
    assert store.rules.live("shop").version == 1
    assert [(turn.version, turn.who, turn.note) for turn in store.rules.history("shop")] == [
        (1, "Sol", "back"), (2, "Jin", "try"), (1, "Jin", "caps"),
    ]  # fmt: skip
    assert [(one.version, one.live) for one in store.rules.versions("shop")] == [(2, False), (1, True)]
    version, rules, _ = store.rules.get("shop", 2)
    assert (version.who, rules) == ("Sol", SORTED)
    assert store.rules.get("shop", 3) is None
    with pytest.raises(LookupError):
        store.rules.make_live("shop", 3, "", "")


def test_what_was_read_while_it_changed_is_not_kept(store, monkeypatch):
    pool = store.rules._pool

    class ChangedMeanwhile:
        @contextmanager
        def connection(self):
            with pool.connection() as connection:
                yield connection
            monkeypatch.setattr(store.rules, "_pool", pool)
            store.rules.put("shop", SORTED, "", "", live=True)

    store.rules.put("shop", CAPPED, "", "", live=True)
    monkeypatch.setattr(store.rules, "_pool", ChangedMeanwhile())
    assert store.rules.live("shop").version == 1
    assert store.rules.live("shop").version == 2


def test_a_shop_without_rules_is_not_asked_for_them_by_every_request(store, monkeypatch):
    monkeypatch.setattr(rules, "FRESH_SECONDS", 3600.0)
    assert store.rules.live(DEFAULT) is None
    monkeypatch.setattr(store.rules, "_pool", None)
    assert store.rules.live(DEFAULT) is None


def test_names_do_not_touch_each_other(store):
    store.rules.put("a", CAPPED, "", "", live=True)
    assert store.rules.put("b", SORTED, "", "", live=True).version == 1
    assert (store.rules.live("a").rules, store.rules.live("b").rules) == (CAPPED, SORTED)
    assert [one.name for one in store.rules.versions("b")] == ["b"]


def test_two_who_save_at_once_make_two_versions_and_another_process_sees_the_last(store, settings):
    with Store.open(settings) as other:
        store.rules.put("shop", CAPPED, "", "", live=True)
        assert other.rules.live("shop").version == 1
        with ThreadPoolExecutor(8) as pool:
            versions = list(pool.map(lambda _: store.rules.put("shop", CAPPED, "", "", live=True).version, range(20)))
        assert sorted(versions) == list(range(2, 22))
        last = store.rules.history("shop")[0].version
        eventually(lambda: other.rules.live("shop").version == last)
        assert other.rules.last_live("shop").version == last
