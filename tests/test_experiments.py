"""Experiments and impressions: who gets which arm, what is logged of it, what the report makes of it."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from psycopg import sql
from pydantic import TypeAdapter, ValidationError
from scipy.stats import chisquare

from api_controller.impression_log import ImpressionLog
from catalog import Event, RawProduct
from experiments import (
    OUTCOMES,
    AnsweredBy,
    Arm,
    ArmFigures,
    Arms,
    Experiment,
    Rate,
    Tally,
    differences,
    figures,
    fraction,
    mixed,
    sample_ratio,
)
from recommender import Recommender, Request
from release import Release
from settings import Settings
from store import LONGEST_WAIT, Impression, Store
from store.vectors import table_of
from tests.releases import copy_release
from tests.serving import DEADLINE, FRESH, environment_of, eventually, metric, recommend, serving
from text_encoder import TextEncoder

T0 = datetime(2026, 6, 1, 12, tzinfo=UTC)


def experiment(*shares: float, name: str = "e") -> Experiment:
    arms = [Arm(name=f"arm {number}", share=share) for number, share in enumerate(shares)]
    return Experiment(name, 1, arms, "", T0, None)


# --- who gets which arm -----------------------------------------------------------------------------------------------


def test_a_shoppers_arm_is_known_for_ever():
    """Another hash, or another use of it, would move shoppers from arm to arm in the midst of an experiment."""
    arms = [experiment(0.5, 0.5).arm_of(f"u{number}").name[-1] for number in range(12)]
    assert "".join(arms) == "010101110101"
    assert experiment(0.5, 0.5).arm_of(None).name == "arm 0"


@given(st.text(max_size=20), st.text(max_size=20), st.lists(st.integers(1, 9), min_size=2, max_size=10))
def test_everybody_has_an_arm_and_keeps_it(name, shopper, parts):
    shares = [part / sum(parts) for part in parts]
    one, other = experiment(*shares, name=name), experiment(*shares, name=name)
    assert one.arm_of(shopper) == other.arm_of(shopper)
    assert one.arm_of(shopper) in one.arms
    assert 0.0 <= fraction(name, shopper) < 1.0


def test_arms_get_their_shares_and_experiments_are_independent_of_each_other():
    shoppers = [f"shopper-{number}" for number in range(20_000)]
    one, other = experiment(0.2, 0.3, 0.5, name="one"), experiment(0.5, 0.5, name="other")
    both = [(one.arm_of(shopper).name, other.arm_of(shopper).name) for shopper in shoppers]
    counts = [both.count((first.name, second.name)) for first in one.arms for second in other.arms]
    expected = [20_000 * first.share * second.share for first in one.arms for second in other.arms]
    assert chisquare(counts, expected).pvalue > 0.01


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        ([{"name": "a", "share": 0.5}, {"name": "b", "share": 0.4}], "add up to 0.9; expected 1"),
        ([{"name": "a", "share": 0.5}, {"name": "a", "share": 0.5}], "two arms have one name"),
        ([{"name": "a", "share": 0.999}], "at least 2"),
        ([{"name": "a", "share": 0.0}, {"name": "b", "share": 1.0}], "greater than 0"),
    ],
)
def test_arms_that_cannot_be_are_refused(arms, said):
    with pytest.raises(ValidationError, match=said):
        TypeAdapter(Arms).validate_python(arms)


# --- figures ----------------------------------------------------------------------------------------------------------


def test_rates_and_differences_as_by_hand():
    """Arm a: shoppers with lists, lists clicked: (2, 1), (1, 0), (1, 1). Arm b: two shoppers with one list, one of them clicked."""
    tallies = [Tally("a", 1, 2, 1, 0, 0), Tally("a", 1, 1, 0, 0, 0), Tally("a", 1, 1, 1, 0, 0)]
    tallies += [Tally("b", 1, 1, 1, 1, 0), Tally("b", 1, 1, 0, 0, 0)]
    a, b = figures("a", tallies), figures("b", tallies)
    assert (a.shoppers, a.lists, b.shoppers, b.lists) == (3, 4, 2, 2)
    # Per shopper: 2 of 3; the variance of the mean is p (1 - p) / (n - 1).
    assert a.per_shopper["click"].value == pytest.approx(2 / 3)
    assert a.per_shopper["click"].variance == pytest.approx(2 / 3 * 1 / 3 / 2)
    # Per list: 2 of 4; what each shopper's clicks miss of half of their lists: 0, -1/2, 1/2; squares add up to 1/2.
    assert a.per_list["click"].value == pytest.approx(1 / 2)
    assert a.per_list["click"].variance == pytest.approx((1 / 2) / 2 / 3 / (4 / 3) ** 2)
    by = {(one.outcome, one.per): one for one in differences([a, b])}
    assert by.keys() == {(outcome, per) for outcome in OUTCOMES for per in ("shopper", "list")}
    click = by["click", "shopper"]
    assert click.difference == pytest.approx(1 / 2 - 2 / 3)
    reach = 1.959964 * math.sqrt(1 / 9 + 1 / 4)
    assert (click.low, click.high) == pytest.approx((click.difference - reach, click.difference + reach))
    assert by["cart", "list"].difference == pytest.approx(1 / 2)
    assert (by["purchase", "list"].low, by["purchase", "list"].high) == (0.0, 0.0)


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), min_size=2, max_size=30))
def test_shoppers_counted_together_are_shoppers_counted_one_by_one(shoppers):
    one_by_one = [Tally("a", 1, lists, min(lists, click), 0, 0) for lists, click in shoppers]
    together = [Tally("a", one_by_one.count(kind), kind.lists, kind.click, 0, 0) for kind in dict.fromkeys(one_by_one)]
    for per in ("per_shopper", "per_list"):
        ours, theirs = (getattr(figures("a", tallies), per)["click"] for tallies in (together, one_by_one))
        assert ours.value == pytest.approx(theirs.value)
        assert ours.variance == pytest.approx(theirs.variance, abs=1e-12)


def test_nobody_and_one_shopper_have_no_interval():
    nobody, one = figures("a", []), figures("b", [Tally("b", 1, 3, 1, 0, 0)])
    assert math.isnan(nobody.per_list["click"].value)
    assert differences([nobody, one]) == []
    assert one.per_list["click"].value == pytest.approx(1 / 3)
    assert one.per_list["click"].interval() == (None, None)


def of_shoppers(*counts: int) -> list[ArmFigures]:
    nothing: dict[str, Rate] = {}
    return [ArmFigures(f"arm {number}", count, count, nothing, nothing) for number, count in enumerate(counts)]


def test_a_broken_split_is_flagged_and_a_sound_one_is_not():
    arms = experiment(0.5, 0.5).arms
    sound = sample_ratio(arms, of_shoppers(5050, 4950))
    assert (sound.chi_square, sound.broken) == (pytest.approx(1.0), False)
    assert sound.p == pytest.approx(chisquare([5050, 4950]).pvalue)
    broken = sample_ratio(arms, of_shoppers(5300, 4700))
    assert broken.broken
    assert broken.p == pytest.approx(chisquare([5300, 4700]).pvalue)
    assert not sample_ratio(experiment(0.53, 0.47).arms, of_shoppers(5300, 4700)).broken
    assert sample_ratio(arms, of_shoppers(0, 0)).p == 1.0


# --- the log ----------------------------------------------------------------------------------------------------------


def shown(list_id: str, user: str | None, products: list[str], minutes: int = 0, **rest) -> Impression:
    given = {
        "kind": "for_you", "context": "", "release": "r", "rules": "default", "rules_version": None, "experiment": "e",
        "experiment_version": 1, "arm": "a", **rest,
    }  # fmt: skip
    count = len(products)
    return Impression(
        list_id, user, **given, at=T0 + timedelta(minutes=minutes), product_ids=products, scores=[0.5] * count,
        retrieval_ranks=list(range(1, count + 1)),
    )  # fmt: skip


def did(user: str, product: str, minutes: float, kind: str = "click", list_id: str = "") -> Event:
    named = {"list_id": list_id} if list_id else {}
    return Event(user_id=user, product_id=product, kind=kind, at=T0 + timedelta(minutes=minutes), **named)


@pytest.fixture
def log(store):
    store.products.put([RawProduct(product_id=name, title=name) for name in "xyz"])
    return store


def taken(store: Store) -> dict[float, set[str]]:
    """By minute of the list."""
    lists = store.impressions.read_taken(0.0, ["skip"])
    return {(one.at - T0.timestamp()) / 60: set(one.taken) for one in lists}


def test_an_event_belongs_to_the_list_it_names_else_to_the_latest_that_showed_the_product(log):
    log.impressions.put([shown("l1", "u", ["x", "y"]), shown("l2", "u", ["x"], 10), shown("l3", "v", ["x"], 1)])
    log.events.put(
        [
            did("u", "x", 15),  # the second list's
            did("u", "y", 16),  # only the first list showed it
            did("u", "x", 17, "cart", list_id="l1"),
            did("u", "z", 18),  # no list's
            did("u", "z", 19, list_id="l1"),  # nor this: the list named did not show it
            did("v", "x", 0.5),  # before it was shown
            did("v", "x", 1 + 24 * 60),  # a day after
            did("v", "x", 2, "skip"),  # nothing was taken
        ]
    )
    assert taken(log) == {0: {"x", "y"}, 10: {"x"}}
    assert log.experiments.tallies("e", 1) == [Tally("a", 1, 1, 0, 0, 0), Tally("a", 1, 2, 2, 1, 0)]


def test_an_arm_says_what_made_its_lists_and_what_changed_meanwhile(log):
    log.impressions.put(
        [
            shown("l1", "u", ["x"]), shown("l2", "v", ["x"], 5), shown("l3", "u", ["x"], 10, rules_version=1),
            shown("l4", "u", ["x"], 20, arm="b"), shown("l5", "u", ["x"], 30, arm="b", release="s"),
            shown("l6", "u", ["x"], 40, arm="c"), shown("l7", "u", ["x"], 50, arm="c", rules="sale", rules_version=3),
            shown("l8", "u", ["x"], 60, experiment_version=2, release="t"),
        ]
    )  # fmt: skip
    answered = log.experiments.answered_by("e", 1)
    at = [T0 + timedelta(minutes=minutes) for minutes in (0, 5, 10)]
    assert answered[:2] == [
        AnsweredBy("a", "r", "default", None, 2, at[0], at[1]),
        AnsweredBy("a", "r", "default", 1, 1, at[2], at[2]),
    ]
    (rules,), (release,) = mixed("a", answered), mixed("b", answered)
    assert f"the rules 'default' changed while arm 'a' ran (none from {at[0]:%Y-%m-%d %H:%M}, 1 from" in rules
    assert "the release that answers changed while arm 'b' ran (r from" in release
    assert mixed("c", answered) == []


def test_what_another_list_showed_later_does_not_count_for_the_arm(log):
    log.impressions.put([shown("l1", "u", ["x"]), shown("l2", "u", ["x"], 10, experiment=None, arm=None)])
    log.events.put([did("u", "x", 15)])
    assert log.experiments.tallies("e", 1) == [Tally("a", 1, 1, 0, 0, 0)]


def test_a_report_has_more_time_than_a_request(settings, monkeypatch):
    monkeypatch.setattr("store.experiments._TALLIES", "SELECT current_setting('statement_timeout'), 0, 0, 0, 0, 0")
    with Store.open(settings, statement_seconds=5) as store:
        assert store.experiments.tallies("e", 1)[0].arm == "30s"
        with store.pool.connection() as connection:
            assert connection.execute("SELECT current_setting('statement_timeout')").fetchone() == ("5s",)


def test_lists_put_twice_and_views_said_twice_count_once(log):
    both = [shown("l1", "u", ["x", "y", "z"]), shown("l2", None, ["x"])]
    log.impressions.put(both)
    log.impressions.put(both)
    for _ in range(2):
        log.impressions.see([("l1", [1, 3]), ("unknown", [2]), ("l1", [3])])
    log.impressions.see([("l1", [2])])
    log.events.put([did("u", "x", 1, list_id="l1")])
    (one,) = log.impressions.read_taken(0.0, [])
    assert (one.user_id, one.product_ids, one.seen, one.taken) == ("u", ["x", "y", "z"], [1, 2, 3], ["x"])
    assert log.impressions.read_taken(T0.timestamp() + 1, []) == []


def test_what_is_old_is_forgotten_and_only_that(log, monkeypatch):
    monkeypatch.setattr("store.impressions.FORGET_ROWS", 2)
    log.impressions.put([shown(f"l{minute}", "u", ["x"], minute) for minute in range(7)])
    assert sum(log.impressions.forget(T0 + timedelta(minutes=5))) == 5
    with log.pool.connection() as connection:
        left = connection.execute("SELECT list_id FROM impressions ORDER BY 1").fetchall()
    assert left == [("l5",), ("l6",)]


def test_starts_are_versions_and_there_is_one_at_a_time(store):
    arms, others = experiment(0.5, 0.5).arms, experiment(0.9, 0.1).arms
    first = store.experiments.start("e", arms, "")
    assert (first.version, first.arms, first.stopped_at) == (1, arms, None)
    assert store.experiments.start("e", arms, "") == first
    assert store.experiments.start("other", arms, "") is None
    second = store.experiments.start("e", others, "")
    assert (second.version, store.experiments.running()) == (2, second)
    stopped = store.experiments.stop("e")
    assert store.experiments.stop("e") == stopped
    assert store.experiments.running() is None
    assert store.experiments.start("other", arms, "").version == 1
    assert [(run.name, run.version) for run in store.experiments.read()] == [("other", 1), ("e", 2), ("e", 1)]
    assert all(run.stopped_at for run in store.experiments.read("e"))
    assert store.experiments.stop("nothing") is None


# --- over HTTP --------------------------------------------------------------------------------------------------------


def add_second_release(shop: Settings) -> Release:
    """A copy of the live release, which is given back, in which each product has the vector of another: its lists differ."""
    first = Release.open(shop.models_dir)
    turn = sql.SQL("""
        WITH numbered AS (
            SELECT product_id, vector, row_number() OVER (ORDER BY product_id) AS up,
                row_number() OVER (ORDER BY product_id DESC) AS down FROM {table}
        )
        UPDATE {table} AS rows SET vector = other.vector FROM numbered AS own JOIN numbered AS other ON other.up = own.down
        WHERE rows.product_id = own.product_id
    """)
    with Store.open(shop) as store:
        copy_release(store, first, "second", [product.product_id for product in store.products.read_features()])
        with store.pool.connection() as connection:
            connection.execute(turn.format(table=table_of("second")))
    return first


@pytest.fixture(scope="module")
def shop(new_shop):
    """A shop with a second release, whose lists are others."""
    with new_shop() as settings:
        add_second_release(settings)
        yield settings


def arms_of(shop) -> list[dict]:
    first = Release.current(shop.models_dir)
    return [
        {"name": "control", "release": first, "share": 0.5},
        {"name": "turned", "release": "second", "share": 0.5},
    ]


@pytest.fixture
def running(shop, client):
    """The experiment "split", running; its arms by shopper."""
    started = client.put("/experiments/split", json={"arms": arms_of(shop)})
    assert started.status_code == 200, started.text
    eventually(lambda: recommend(client, user_id="somebody")["experiment"] == "split")
    yield Experiment("split", 1, [Arm(**arm) for arm in arms_of(shop)], "", T0, None)
    assert client.post("/experiments/split/stop").json()["stopped_at"]
    eventually(lambda: recommend(client, user_id="somebody")["experiment"] is None)


def report(client, **version) -> dict:
    answer = client.get("/experiments/split/report", params=version)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_each_arm_answers_from_its_release_and_what_is_clicked_counts_for_it(shop, client, running):
    with Store.open(shop) as store:
        recommender = Recommender(store, shop, TextEncoder.load(shop))
        lists = {
            name: [item.product_id for item in recommender.recommend(Request(k=20, release=name)).items]
            for name in (Release.current(shop.models_dir), "second")
        }
    assert len(set(map(tuple, lists.values()))) == 2
    shoppers = [f"s{number}" for number in range(30)]
    assert {running.arm_of(shopper).name for shopper in shoppers} == {"control", "turned"}
    version = client.get("/experiments").json()[0]["version"]
    for number, shopper in enumerate(shoppers):
        answer = recommend(client, user_id=shopper, k=20)
        arm = running.arm_of(shopper)
        assert [item["product_id"] for item in answer["items"]] == lists[arm.release]
        assert (answer["experiment"], answer["arm"], answer["release"]) == ("split", arm.name, arm.release)
        if arm.name == "turned":  # by the list that they name, and by what was shown
            event = {"user_id": shopper, "product_id": answer["items"][0]["product_id"], "kind": "click"}
            event |= {"list_id": answer["list_id"]} if number % 2 else {}
            event["at"] = datetime.now(UTC).isoformat()
            assert client.post("/events", json=event).json()["stored"] == 1
    count = sum(running.arm_of(shopper).name == "turned" for shopper in shoppers)
    somebody = running.arm_of("somebody").name  # asked while the experiment started

    def counted() -> bool:
        return sum(arm["shoppers"] for arm in report(client, version=version)["report"]) == len(shoppers) + 1

    eventually(counted)
    control, other = report(client)["report"]
    assert other["shoppers"] == count + (somebody == "turned")
    expected = count / (count + (somebody == "turned"))
    assert other["per_shopper"]["click"]["value"] == pytest.approx(expected)
    assert control["per_shopper"]["click"]["value"] == 0.0
    click = next(one for one in report(client)["differences"] if (one["outcome"], one["per"]) == ("click", "shopper"))
    assert click["difference"] == pytest.approx(expected)
    assert click["low"] <= click["difference"] <= click["high"]
    assert not report(client)["sample_ratio"]["broken"]
    assert "fewer than 100 shoppers" in report(client)["warnings"][0]
    assert metric(client, 'styletower_exposures_total{arm="turned",experiment="split"}') >= count
    assert metric(client, 'styletower_impressions_total{outcome="written"}') >= len(shoppers)


def test_nobody_in_particular_gets_the_first_arm_and_does_not_count(shop, client, running):
    answer = recommend(client, k=3)
    assert (answer["experiment"], answer["arm"], answer["release"]) == (None, None, Release.current(shop.models_dir))

    def written() -> list:
        with psycopg.connect(shop.database_url) as connection:
            query = "SELECT user_id, experiment, product_ids, retrieval_ranks FROM impressions WHERE list_id = %s"
            return connection.execute(query, (answer["list_id"],)).fetchall()

    eventually(lambda: bool(written()))
    items = answer["items"]
    assert written() == [
        (None, None, [item["product_id"] for item in items], [item["retrieval_rank"] for item in items])
    ]


def test_a_product_put_while_it_runs_is_found_by_both_arms(client, running):
    product = {"product_id": "in-both", "title": "Linen dress", "attributes": {"category": "dress"}, "price": 7e7}
    assert client.put("/products", json=product).status_code == 200
    arms = set()
    for number in range(30):
        answer = recommend(client, user_id=f"s{number}", filters={"min_price": 6e7})
        assert [item["product_id"] for item in answer["items"]] == ["in-both"]
        arms.add(answer["arm"])
    assert arms == {"control", "turned"}


def test_a_page_says_what_was_seen(shop, client):
    answer = recommend(client, user_id="looks", k=5)
    seen = {"list_id": answer["list_id"], "positions": [1, 2]}
    counter = 'styletower_rows_total{outcome="stored",what="view"}'
    before = metric(client, counter)
    for body in (seen, [seen, {**seen, "positions": [4]}]):
        assert client.post("/impressions", json=body).status_code == 200
    assert metric(client, counter) == before + 3
    with psycopg.connect(shop.database_url) as connection:
        query = "SELECT positions FROM impression_views WHERE list_id = %s"
        assert connection.execute(query, (answer["list_id"],)).fetchall() == [([1, 2, 4],)]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "named"),
    [
        ("PUT", "/experiments/e", {"arms": [{"name": "a", "share": 1}]}, 422, "arms"),
        ("PUT", "/experiments/e", {"arms": [{"name": "a", "share": 0.5}, {"name": "b", "share": 0.4}]}, 422, "0.9"),
        ("POST", "/impressions", {"list_id": "x", "positions": [0]}, 422, "positions"),
        ("POST", "/impressions", {"list_id": "x", "positions": []}, 422, "positions"),
        ("POST", "/experiments/nothing/stop", None, 404, "nothing"),
        ("GET", "/experiments/nothing/report", None, 404, "nothing"),
    ],
)
def test_what_cannot_be_is_refused_and_named(client, method, path, body, status, named):
    answer = client.request(method, path, json=body)
    assert answer.status_code == status
    assert named in answer.text


def test_arms_differ_by_rules_alone_and_the_log_names_them(shop, client):
    first = recommend(client, k=1)["items"][0]["product_id"]
    pin = {"kind": "pin", "product_id": first, "place": 3}
    assert client.put("/rules", json={"name": "pinned", "rules": [pin]}).status_code == 200
    arms = [{"name": "plain", "share": 0.5}, {"name": "pinned", "rules": "pinned", "share": 0.5}]
    assert client.put("/experiments/rules", json={"arms": arms}).status_code == 200
    by_name = Experiment("rules", 1, [Arm(**arm) for arm in arms], "", T0, None)
    plain, pinned = (next(s for s in map(str, range(50)) if by_name.arm_of(s).name == arm["name"]) for arm in arms)
    eventually(lambda: recommend(client, user_id=plain)["experiment"] == "rules")
    third = [recommend(client, user_id=shopper)["items"][2]["product_id"] for shopper in (plain, pinned)]
    assert third[0] != first
    assert third[1] == first
    asked = recommend(client, user_id=pinned, rule_set="default")  # otherwise than the arm
    tried = recommend(client, user_id=plain, rules=[pin])
    assert [answer["experiment"] for answer in (asked, tried)] == [None, None]
    assert (
        recommend(client, user_id=plain, rule_set="pinned")["arm"] == "plain"
    )  # which leaves the rules to the request
    last = recommend(client, user_id=pinned)["list_id"]

    def logged() -> dict[str, tuple]:
        with psycopg.connect(shop.database_url) as connection:
            rows = connection.execute("SELECT list_id, arm, rules, rules_version FROM impressions").fetchall()
        return {row[0]: row[1:] for row in rows}

    eventually(lambda: last in logged())
    assert logged()[last] == ("pinned", "pinned", 1)
    assert logged()[asked["list_id"]] == (None, "default", None)
    assert tried["list_id"] not in logged()

    def told() -> tuple[dict[str, list], list[str]]:
        answer = client.get("/experiments/rules/report").json()
        by = {
            arm["arm"]: [(one["rules"], one["rules_version"]) for one in arm["answered_by"]] for arm in answer["report"]
        }
        return by, [warning for warning in answer["warnings"] if "changed" in warning]

    # Requests asked for two sets of rules in one arm, and neither changed.
    assert told() == ({"plain": [("default", None), ("pinned", 1)], "pinned": [("pinned", 1)]}, [])
    assert client.put("/rules", json={"name": "pinned", "rules": [pin | {"place": 2}]}).json()["version"] == 2
    eventually(lambda: recommend(client, user_id=pinned)["rules"]["version"] == 2)
    eventually(lambda: told()[0]["pinned"] == [("pinned", 1), ("pinned", 2)])
    (warning,) = told()[1]
    assert warning.startswith("the rules 'pinned' changed while arm 'pinned' ran (1 from 20")
    assert client.post("/experiments/rules/stop").status_code == 200
    eventually(lambda: recommend(client, user_id=plain)["experiment"] is None)


@pytest.mark.parametrize(("field", "value"), [("release", "no-such"), ("rules", "no-such")])
def test_an_arm_that_cannot_answer_is_refused(shop, client, field, value):
    first, second = arms_of(shop)
    answer = client.put("/experiments/e", json={"arms": [first, {**second, field: value}]})
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", "arms", 1, field]
    assert "no-such" in answer.text


def test_another_experiment_waits_for_the_one_that_runs(shop, client, running):
    answer = client.put("/experiments/second", json={"arms": arms_of(shop)})
    assert answer.status_code == 409
    assert "stop it first" in answer.text
    with pytest.raises(AssertionError, match="no experiment 'split version 99'"):
        report(client, version=99)


def test_an_arm_whose_release_is_lost_is_answered_by_the_live_one_and_not_counted(new_shop):
    with new_shop() as shop:
        first = add_second_release(shop)
        with Store.open(shop) as store, serving(environment_of(shop)) as (_, client):
            assert client.put("/experiments/split", json={"arms": arms_of(shop)}).status_code == 200
            eventually(
                lambda: {recommend(client, user_id=f"s{n}")["release"] for n in range(30)} == {first.name, "second"}
            )
            shopper = next(f"s{n}" for n in range(30) if recommend(client, user_id=f"s{n}")["release"] == "second")
            store.vectors.drop("second")
            answer = recommend(client, user_id=shopper, k=4)
            assert len(answer["items"]) == 4
            assert (answer["release"], answer["experiment"], answer["degraded"]) == (first.name, None, False)
            assert "'second' cannot be used" in answer["warnings"][0]
            assert metric(client, 'styletower_missed_exposures_total{arm="turned",experiment="split"}') == 1


def test_two_workers_agree_and_write_every_list_before_they_end(shop):
    arms = [{"name": "a", "share": 0.5}, {"name": "b", "share": 0.5}]
    with serving(environment_of(shop), "--workers", "2") as (_, client):
        eventually(lambda: client.get("/ready").is_success)
        assert client.put("/experiments/both", json={"arms": arms}).status_code == 200

        def told(count: int) -> list:
            return [client.post("/recommend", json={"user_id": "w"}, headers=FRESH).json() for _ in range(count)]

        eventually(lambda: {answer["experiment"] for answer in told(10)} == {"both"})
        answers = told(30)
        assert len({answer["arm"] for answer in answers}) == 1
        assert client.post("/experiments/both/stop").status_code == 200
        eventually(lambda: {answer["experiment"] for answer in told(10)} == {None})
        answers += told(10)
    ids = [answer["list_id"] for answer in answers]
    with psycopg.connect(shop.database_url) as connection:
        query = "SELECT count(*) FROM impressions WHERE list_id = ANY(%s)"
        assert connection.execute(query, (ids,)).fetchone() == (len(set(ids)),)
    assert len(set(ids)) == 40


@pytest.mark.parametrize("share", ["0", "0.5"])
def test_what_is_not_to_be_logged_is_not(new_shop, share):
    with new_shop() as shop:
        with serving({**environment_of(shop), "IMPRESSION_SHARE": share}) as (_, client):
            for number in range(20):
                assert recommend(client, user_id=f"s{number}", k=1)["list_id"]
            status = client.put("/experiments/e", json={"arms": arms_of(shop)}).status_code
            assert status == (409 if share == "0" else 422)  # the second release is not there
        with psycopg.connect(shop.database_url) as connection:
            rows = connection.execute("SELECT user_id FROM impressions ORDER BY 1").fetchall()
        logged = {f"s{number}" for number in range(20) if fraction("impressions", f"s{number}") < float(share)}
        assert {user for (user,) in rows} == logged


# --- on the way to the log --------------------------------------------------------------------------------------------


def outcomes(log: ImpressionLog) -> dict[str, float]:
    return {outcome: log.lists.labels(outcome)._value.get() for outcome in ("written", "dropped", "skipped")}


def just_shown(list_id: str, context: str = "") -> Impression:
    return replace(shown(list_id, "u", ["x"], context=context), at=datetime.now(UTC))


def test_while_the_database_is_away_lists_wait_and_what_is_too_much_is_dropped_and_counted(settings, monkeypatch):
    monkeypatch.setattr("api_controller.impression_log.MAX_WAITING", 3)
    with Store.open(settings) as store:
        log = ImpressionLog(store, 0, CollectorRegistry())
        put, store.impressions.put = store.impressions.put, away
        for number in range(5):
            log.add(just_shown(f"l{number}"))
        assert outcomes(log) == {"written": 0, "dropped": 2, "skipped": 0}
        store.impressions.put = put
        log.close()
        assert outcomes(log) == {"written": 3, "dropped": 2, "skipped": 0}
        with store.pool.connection() as connection:
            assert connection.execute("SELECT array_agg(list_id ORDER BY 1) FROM impressions").fetchone() == (
                ["l0", "l1", "l2"],
            )


def test_lists_of_one_who_is_forgotten_while_they_wait_and_those_that_waited_too_long_are_not_written(store):
    log = ImpressionLog(store, 0, CollectorRegistry())
    put, store.impressions.put = store.impressions.put, away
    for one in (just_shown("of u"), replace(just_shown("of v"), user_id="v")):
        log.add(one)
    log.add(replace(just_shown("of yesterday"), user_id="v", at=datetime.now(UTC) - LONGEST_WAIT))
    store.users.forget("u")
    store.impressions.put = put
    log.close()
    assert outcomes(log) == {"written": 1, "dropped": 1, "skipped": 1}
    with store.pool.connection() as connection:
        assert connection.execute("SELECT list_id FROM impressions").fetchall() == [("of v",)]


def away(impressions) -> None:
    raise psycopg.OperationalError("the database is away")


def test_a_list_that_cannot_be_written_keeps_no_other_from_it(store, monkeypatch):
    monkeypatch.setattr("api_controller.impression_log.BATCH", 1)
    log = ImpressionLog(store, 0, CollectorRegistry())
    for number, context in enumerate(("", "no text in PostgreSQL: \x00", "")):
        log.add(just_shown(f"l{number}", context))
    log.close()
    assert outcomes(log) == {"written": 2, "dropped": 1, "skipped": 0}


def test_lists_past_their_retention_go_by_themselves(store):
    old = shown("old", "u", ["x"])  # of T0, months before or after any day this runs
    store.impressions.put([old, replace(old, list_id="new", at=datetime.now(UTC))])
    log = ImpressionLog(store, 1, CollectorRegistry())

    def left() -> list:
        with store.pool.connection() as connection:
            return connection.execute("SELECT list_id FROM impressions").fetchall()

    eventually(lambda: left() == [("new",)])
    log.close()


def test_new_lists_do_not_wait_until_all_old_ones_are_gone(store, monkeypatch):
    monkeypatch.setattr("store.impressions.FORGET_ROWS", 1)
    store.impressions.put([shown(f"old{number}", "u", ["x"]) for number in range(3)])
    forget, made, written = store.impressions.forget, threading.Event(), threading.Event()

    def slowly(before):
        made.wait()
        behind.add(just_shown("new"))
        steps = forget(before)
        yield next(steps)
        if outcomes(behind)["written"] == 1:  # the step before was followed by a look at what waits
            written.set()
        yield from steps

    store.impressions.forget = slowly
    behind = ImpressionLog(store, 1, CollectorRegistry())
    made.set()
    assert written.wait(DEADLINE)
    behind.close()


# --- releases side by side --------------------------------------------------------------------------------------------


def test_a_request_is_answered_by_the_release_it_names_and_few_stay_in_memory(shop, monkeypatch):
    monkeypatch.setattr("loaded_release.MAX_RELEASES", 1)
    live = Release.current(shop.models_dir)
    with Store.open(shop) as store:
        every = [product.product_id for product in store.products.read_features()]
        of_second = store.vectors.fetch("second", every).product_ids
        known = {"second": set(of_second), "third": set(of_second[::2])}
        copy_release(store, Release.open(shop.models_dir, "second"), "third", of_second[::2])
        recommender = Recommender(store, shop, TextEncoder.load(shop))
        lists = [[item.product_id for item in recommender.recommend(Request(k=20)).items]]
        for name in ("second", "third", "second"):
            answer = recommender.recommend(Request(k=20, release=name))
            assert (answer.release, answer.warnings) == (name, [])
            assert {item.product_id for item in answer.items} <= known[name]
            lists.append([item.product_id for item in answer.items])
            assert list(recommender.releases._others) == [name]
        assert lists[1] == lists[3]
        assert len(set(map(tuple, lists))) == 3
        for name in (None, live):
            assert recommender.recommend(Request(k=20, release=name)).release == live
        weights = shop.models_dir / "third" / "user_tower.pth"
        whole = weights.read_bytes()
        weights.write_bytes(whole[:-1])
        answer = recommender.recommend(Request(k=20, release="third"))
        assert (answer.release, len(answer.items)) == (live, 20)
        assert "'third' cannot be used" in answer.warnings[0]
        assert "sha256 differs" in answer.warnings[0]
        weights.write_bytes(whole)
        recommender.releases.check("third")  # asked anew, whatever was found before
        assert recommender.recommend(Request(k=20, release="third")).release == "third"
