"""Business rules over HTTP, on a trained shop behind a real server."""

from __future__ import annotations

import json
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

import score_users
from settings import UserError
from store import Store
from tests.serving import FRESH, environment_of, eventually, ids, metric, recommend, serving


@pytest.fixture(scope="module")
def facts(shop):
    """What the shop's own products are, by id."""
    with Store.open(shop) as store:
        return store.products.facts([product.product_id for product in store.products.read_features()])


def effect(answer, number: int = 0) -> dict:
    return answer["rules"]["effects"][number]


def refused(answer) -> list[list]:
    assert answer.status_code == 422, answer.text
    return [error["loc"] for error in answer.json()["detail"]]


# --- each rule --------------------------------------------------------------------------------------------------------


def test_without_rules_nothing_is_said_of_them(client):
    answer = recommend(client, k=3)
    assert answer["rules"] is None
    assert "rules" not in answer["milliseconds"]
    assert [item["placed_by"] for item in answer["items"]] == [""] * 3


def test_a_filter_keeps_what_it_says_and_says_what_it_took(client, facts):
    price = sorted(one.price for one in facts.values())[60]
    rule = {"kind": "filter", "keep": {"all": [{"price": {"max": price}}, {"in_stock": True}]}}
    answer = recommend(client, k=30, rules=[rule])
    assert len(answer["items"]) == 30
    assert all(facts[one].price <= price and facts[one].in_stock for one in ids(answer))
    first = ids(recommend(client, k=100))
    assert effect(answer)["kind"] == "filter"
    assert 0 < effect(answer)["removed"] <= len(first)
    allowed = [one for one in facts.values() if one.price <= price and one.in_stock]
    assert len(recommend(client, k=100, rules=[rule])["items"]) == len(allowed)


def test_filters_of_a_rule_and_of_a_request_both_hold(client, facts):
    rule = {"kind": "filter", "keep": {"std": "gender", "none_of": ["men"]}}
    answer = recommend(client, k=100, filters={"std": {"gender": ["men", "women"]}}, rules=[rule])
    right = [one for one in facts.values() if "women" in one.std["gender"] and "men" not in one.std["gender"]]
    assert len(answer["items"]) == min(100, len(right))
    assert set(ids(answer)) <= {one.product_id for one in right}


def test_a_request_may_filter_by_what_it_does_not_want_and_by_arrival(client, facts):
    """The bound lies in the middle of the longest time without an arrival, so that it does not matter when this is asked."""
    arrivals = sorted({one.arrived_at for one in facts.values() if one.arrived_at})
    before, after = max(pairwise(arrivals), key=lambda pair: pair[1] - pair[0])
    middle = (before + after) / 2
    moment = datetime.fromtimestamp(middle, UTC).isoformat()
    women = {one.product_id for one in facts.values() if "men" not in one.std["gender"] and one.arrived_at}
    late = {one for one in women if facts[one].arrived_at > middle}
    bounds = [
        ({"arrived_after": moment}, late),
        ({"arrived_within_days": (time.time() - middle) / 86_400}, late),
        ({"arrived_before": moment}, women - late),
    ]
    for bound, right in bounds:
        found = ids(recommend(client, k=100, filters={"std_none": {"gender": ["Men"]}, **bound}))
        assert set(found) <= right
        assert len(found) == min(100, len(right)) > 0
    assert refused(client.post("/recommend", json={"filters": {"std_none": {"gender": ["robot"]}}})) == [
        ["body", "filters", "std_none", "gender"]
    ]


def test_met_goods_are_hidden_by_kind_and_window_only_if_a_rule_says_so(client):
    seen, bought, long_ago, *_ = ids(recommend(client, k=3))
    now = datetime.now(UTC)
    events = [
        {"user_id": "hider", "product_id": seen, "kind": "view", "at": (now - timedelta(days=1)).isoformat()},
        {"user_id": "hider", "product_id": bought, "kind": "purchase", "at": (now - timedelta(days=1)).isoformat()},
        {"user_id": "hider", "product_id": long_ago, "kind": "purchase", "at": (now - timedelta(days=100)).isoformat()},
    ]
    assert client.post("/events", json=events).json()["stored"] == 3
    three = {seen, bought, long_ago}

    def shown(*rules, **more) -> set[str]:
        return three & set(ids(recommend(client, user_id="hider", k=100, rules=list(rules), **more)))

    recent = {"kind": "hide", "events": ["purchase"], "days": 30}
    # The shop has 200 products: what is not hidden need not be among the best hundred, so it is asked for by a filter.
    only = {"kind": "filter", "keep": {"products": sorted(three)}}
    assert shown(only) == set()
    assert shown(only, recent) == {seen, long_ago}
    assert shown(only, {"kind": "hide", "events": ["view"]}, recent) == {long_ago}
    assert shown(only, {"kind": "hide", "events": []}) == three
    everything = recommend(client, user_id="hider", k=100, rules=[only, {"kind": "hide"}], exclude_history=False)
    assert set(ids(everything)) == three
    assert "exclude_history" in effect(everything, 1)["note"]
    assert shown(only, recent, history=[long_ago]) == {seen, long_ago}  # a history counts as viewed
    assert shown(only, {"kind": "hide", "events": ["view"]}, history=[long_ago]) == {bought}
    answer = recommend(client, user_id="hider", k=10, rules=[only, {"kind": "hide", "events": ["purchase"]}])
    assert effect(answer, 1)["removed"] <= 2


def test_a_pin_is_fetched_from_anywhere_and_says_so(client, facts):
    far = sorted(set(facts) - set(ids(recommend(client, k=100))))[0]
    rule = {"kind": "pin", "product_id": far, "place": 2, "name": "of the week"}
    answer = recommend(client, k=5, rules=[rule])
    assert ids(answer)[1] == far
    assert [item["placed_by"] for item in answer["items"]] == ["", "of the week", "", "", ""]
    assert effect(answer) == {"rule": "of the week", "kind": "pin", "removed": 0, "moved": 1, "note": ""}
    assert answer["items"][1]["reasons"]
    for gone in ({"exclude": [far]}, {"filters": {"max_price": facts[far].price - 1}}):
        answer = recommend(client, k=5, rules=[rule], **gone)
        assert far not in ids(answer)
        assert len(answer["items"]) == 5
        assert "not shown" in effect(answer)["note"]


def test_boost_and_bury_move_what_they_name(client, facts):
    plain = ids(recommend(client, k=100))
    category = facts[plain[0]].std["category"][0]
    named = {one for one in plain if facts[one].std["category"] == [category]}
    condition = {"std": "category", "any_of": [category.upper()]}
    buried = recommend(client, k=100, rules=[{"kind": "bury", "when": condition}])
    assert set(ids(buried)[-len(named) :]) == named
    assert effect(buried)["moved"] > 0
    boosted = ids(recommend(client, k=100, rules=[{"kind": "boost", "when": condition, "factor": 1_000_000}]))
    assert set(boosted[: len(named)]) == named
    assert [one for one in boosted if one in named] == [one for one in plain if one in named]


def test_a_cap_looks_further_until_the_list_is_full_or_the_shop_is_at_its_end(client, facts):
    """At most one of a category: a list of a hundred has one of each category that there is."""
    categories = {one.std["category"][0] for one in facts.values()}
    answer = recommend(client, k=100, rules=[{"kind": "at_most", "n": 1, "std": "category"}])
    assert Counter(facts[one].std["category"][0] for one in ids(answer)) == Counter(categories)
    assert answer["warnings"] == [
        f"{len(categories)} of 100 places: rules, filters, exclusions and what the shopper met leave no more to show"
    ]
    groups = {one.group_id or one.product_id for one in facts.values()}
    answer = recommend(client, k=100, rules=[{"kind": "at_most", "n": 1, "group": True}])
    assert len({facts[one].group_id or one for one in ids(answer)}) == len(answer["items"]) == min(100, len(groups))
    assert effect(answer)["removed"] > 0
    assert not recommend(client, k=10, rules=[{"kind": "at_most", "n": 1, "std": "category"}])["warnings"]


def test_a_promoted_share_is_there_and_spread(client, facts):
    plain = ids(recommend(client, k=20))
    brands = Counter(brand for one in facts.values() for brand in one.std.get("brand", ()))
    shown = {brand for one in plain for brand in facts[one].std.get("brand", ())}
    brand = next(name for name, count in brands.most_common() if name not in shown)
    rule = {"kind": "promote", "when": {"std": "brand", "any_of": [brand]}, "share": 0.1, "name": "own brand"}
    answer = recommend(client, k=20, rules=[rule])
    places = [place for place, one in enumerate(ids(answer), start=1) if brand in facts[one].std.get("brand", ())]
    assert places == [10, 20][: brands[brand]]
    assert [answer["items"][place - 1]["placed_by"] for place in places] == ["own brand"] * len(places)


def test_new_goods_have_their_share_and_the_same_today_again(client, shop):
    new = [
        {"product_id": f"fresh{n:02}", "title": f"Linen shirt {n}", "attributes": {"category": ["shirt"]}}
        for n in range(30)
    ]
    assert client.put("/products", json=new).json()["stored"] == 30
    rules = [{"kind": "explore", "share": 0.4, "name": "new"}]
    answer = recommend(client, user_id="curious", k=10, rules=rules)
    with Store.open(shop) as store:
        met = set(store.events.read().product_ids)
    placed = {item["product_id"] for item in answer["items"] if item["placed_by"] == "new"}
    assert placed
    assert not placed & met
    assert len(set(ids(answer)) - met) >= 4
    assert ids(recommend(client, user_id="curious", k=10, rules=rules)) == ids(answer)
    others = [ids(recommend(client, user_id=f"curious{n}", k=10, rules=rules)) for n in range(5)]
    assert len({tuple(one) for one in others}) > 1


def test_diversity_is_one_knob(client):
    plain = ids(recommend(client, k=30))
    assert ids(recommend(client, k=30, rules=[{"kind": "diversity", "strength": 0}])) == plain
    diverse = recommend(client, k=30, rules=[{"kind": "diversity", "strength": 0.9}])
    assert diverse["items"][0]["product_id"] == plain[0]
    assert ids(diverse) != plain
    assert effect(diverse)["moved"] > 0


# --- trying, saving, going back ---------------------------------------------------------------------------------------

FIRST = [{"kind": "at_most", "n": 1, "std": "category"}]
SECOND = [{"kind": "at_most", "n": 2, "std": "category", "name": "two of each"}]


def test_rules_that_are_tried_leave_no_trace(client):
    before, versions, counted = ids(recommend(client, k=10)), client.get("/rules").json(), removals(client)
    tried = recommend(client, k=10, rules=FIRST)
    assert ids(tried) != before
    assert tried["rules"]["version"] is None
    assert client.post("/rules/check", json={"rules": FIRST}).json() == {
        "rules": ["at most 1 per category"],
        "warnings": [],
    }
    assert ids(recommend(client, k=10)) == before
    assert client.get("/rules").json() == versions
    assert removals(client) == counted


def removals(client) -> float:
    return metric(client, "styletower_rule_removals_total")


def test_a_version_is_live_until_another_is_and_may_be_again(client):
    made = client.put("/rules", json={"name": "turns", "rules": FIRST, "who": "Jin", "note": "one"}).json()
    assert (made["version"], made["live"], made["rules"]) == (1, True, [{**FIRST[0], "name": "", "group": None}])
    counted = removals(client)
    answer = recommend(client, k=10, rule_set="turns")
    assert (answer["rules"]["name"], answer["rules"]["version"]) == ("turns", 1)
    assert removals(client) == counted + effect(answer)["removed"]
    made = client.put("/rules", json={"name": "turns", "rules": SECOND, "live": False}).json()
    assert (made["version"], made["live"]) == (2, False)
    assert recommend(client, k=10, rule_set="turns")["rules"] == answer["rules"]
    assert client.post("/rules/2/live", json={"name": "turns", "who": "Sol"}).json()["live"]
    assert effect(recommend(client, k=10, rule_set="turns"))["rule"] == "two of each"
    assert client.post("/rules/1/live", json={"name": "turns", "note": "back"}).status_code == 200
    again = recommend(client, k=10, rule_set="turns")
    assert (ids(again), again["rules"]) == (ids(answer), answer["rules"])
    listed = client.get("/rules", params={"name": "turns"}).json()
    assert [(one["version"], one["live"]) for one in listed["versions"]] == [(2, False), (1, True)]
    assert [(turn["version"], turn["who"], turn["note"]) for turn in listed["history"]] == [
        (1, "", "back"), (2, "Sol", ""), (1, "Jin", "one"),
    ]  # fmt: skip
    assert client.get("/rules/2", params={"name": "turns"}).json()["rules"][0]["name"] == "two of each"


def test_the_default_rules_are_those_of_a_request_that_names_none(client):
    plain = ids(recommend(client, k=10))
    assert client.put("/rules", json={"rules": FIRST}).status_code == 200
    arranged = recommend(client, k=10)
    assert (arranged["rules"]["name"], ids(arranged)) == ("default", ids(recommend(client, k=10, rules=FIRST)))
    assert ids(recommend(client, k=10, rules=[])) == plain
    client.put("/rules", json={"rules": []})
    empty = recommend(client, k=10)
    assert (ids(empty), empty["rules"]["effects"]) == (plain, [])


def test_what_the_shop_does_not_have_is_named_with_its_path(client):
    rules = [
        {"kind": "bury", "when": {"all": [{"in_stock": True}, {"std": "category", "any_of": ["dress", "spaceship"]}]}},
        {"kind": "at_most", "n": 1, "std": "planet"},
        {"kind": "pin", "product_id": "ghost", "place": 1},
    ]
    right = [
        ["body", "rules", 0, "when", "all", 1, "any_of", 1],
        ["body", "rules", 1, "std"],
        ["body", "rules", 2, "product_id"],
    ]
    asked = [("POST", "/rules/check"), ("PUT", "/rules"), ("POST", "/recommend")]
    for method, path in asked:
        assert refused(client.request(method, path, json={"rules": rules})) == right, path
    answer = client.post(
        "/rules/check", json={"rules": [{"kind": "bury", "when": {"re": "style", "any_of": ["gorpcore"]}}]}
    )
    assert answer.json()["warnings"] == ["no product has 'gorpcore' in style yet"]
    twice = {"rules": [{"kind": "explore", "share": 0.1}] * 2}
    assert "two rules of kind explore" in client.put("/rules", json=twice).text


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/rules/999", 404),
        ("POST", "/rules/999/live", 404),
        ("GET", "/rules/0", 422),
        ("GET", "/rules/one", 422),
    ],
)
def test_a_version_that_is_not_there_is_said(client, method, path, status):
    assert client.request(method, path, json=None if method == "GET" else {}).status_code == status


def test_a_name_without_live_rules_is_said(client):
    assert refused(client.post("/recommend", json={"rule_set": "nobody"})) == [["body", "rule_set"]]


def test_rules_that_this_program_cannot_read_are_skipped_and_everybody_is_told(new_shop, capfd):
    """As after going back to an earlier version of the program, or on to one that refuses what was allowed."""
    stored = [*FIRST, {"kind": "of_another_version", "n": 1}]
    with new_shop() as shop:
        with serving(environment_of(shop)) as (_, client):
            plain = ids(recommend(client, k=10))
            assert client.put("/rules", json={"rules": FIRST}).is_success
        with psycopg.connect(shop.database_url) as connection:
            connection.execute("UPDATE rules SET rules = %s::json", (json.dumps(stored),))
        with serving(environment_of(shop)) as (_, client):
            answer = recommend(client, k=10)
            assert ids(answer) == plain
            assert (answer["rules"]["version"], answer["rules"]["effects"]) == (1, [])
            assert "of_another_version" in answer["rules"]["problem"]
            assert [warning for warning in answer["warnings"] if "cannot be read and was not applied" in warning]
            assert 'styletower_unread_rules_total{name="default"} 1.0' in client.get("/metrics").text
            assert client.get(f"/items/{plain[0]}/similar").status_code == 200  # a bare list: only /metrics can say it
            assert 'styletower_unread_rules_total{name="default"} 2.0' in client.get("/metrics").text
            listed = client.get("/rules").json()["versions"]
            assert [(one["version"], one["live"], one["problem"]) for one in listed] == [
                (1, True, answer["rules"]["problem"])
            ]
            alone = client.get("/rules/1").json()
            assert (alone["rules"], alone["unreadable"]) == ([], stored)
            refused = client.post("/rules/1/live", json={})
            assert (refused.status_code, "cannot be read" in refused.json()["detail"]) == (409, True)
            arms = [{"name": name, "share": 0.5} for name in ("one", "two")]
            started = client.put("/experiments/unread", json={"arms": arms})
            assert (started.status_code, started.json()["detail"][0]["loc"]) == (422, ["body", "arms", 0, "rules"])
            with pytest.raises(UserError, match="version 1 of the rules 'default' cannot be read"):
                score_users.main(
                    score_users.ScoreOptions(**shop.model_dump(), out=shop.models_dir / "lists.parquet", _env_file=None)
                )

            made = client.put("/rules", json={"rules": FIRST}).json()
            assert (made["version"], made["problem"], made["unreadable"]) == (2, "", None)
            assert recommend(client, k=10)["rules"]["problem"] == ""
    assert capfd.readouterr().err.count("version 1 of the rules 'default' is live and cannot be read") == 1


# --- workers, and when the database is away ---------------------------------------------------------------------------


def test_every_worker_goes_by_a_new_version(new_shop):
    with new_shop() as shop, serving(environment_of(shop), "--workers", "2") as (_, client):
        eventually(lambda: client.get("/ready").is_success)

        def versions() -> set[int]:
            answers = [client.post("/recommend", json={"k": 3}, headers=FRESH).json() for _ in range(12)]
            return {(answer["rules"] or {"version": 0})["version"] for answer in answers}

        assert versions() == {0}
        for number, rules in ((1, FIRST), (2, SECOND)):
            assert client.put("/rules", json={"rules": rules}, headers=FRESH).json()["version"] == number
            eventually(lambda number=number: versions() == {number})
        client.post("/rules/1/live", json={}, headers=FRESH)
        eventually(lambda: versions() == {1})


def test_without_the_database_rules_act_on_the_popular_list_and_what_they_cannot_do_is_said(new_shop):
    with new_shop() as shop, serving(environment_of(shop)) as (_, client):
        rules = [*FIRST, {"kind": "hide", "events": ["purchase"]}]
        client.put("/rules", json={"rules": rules})
        before = recommend(client, k=5)
        address = conninfo_to_dict(shop.database_url)
        name = sql.Identifier(str(address["dbname"]))
        with Store.open(shop) as store:
            facts = store.products.facts([product.product_id for product in store.products.read_features()])
        with psycopg.connect(shop.database_url, dbname="postgres", autocommit=True) as admin:
            admin.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(name))
            admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (address["dbname"],)
            )
            away = recommend(client, k=5)
        assert away["degraded"]
        assert ids(away) == ids(before)
        assert len({facts[one].std["category"][0] for one in ids(away)}) == 5
        assert away["rules"]["version"] == 1
        assert any("hide" in warning for warning in away["warnings"])
