"""Rules on a ranked list: each does what it says, alone and with others, on lists whose right answer is known."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from catalog import FeatureSchema
from conditions import MAX_DEPTH, Facts, holds, said
from rules import Ranked, RuleSet, apply, filtered, seed_of

NOW = 1_780_000_000.0
DAY = 86_400
BRANDS = ["own", "north", "south"]


def product(number: int, brand: str | None = "own", **other) -> Facts:
    facts = {"price": 10.0, "in_stock": True, "group_id": None, "arrived_at": NOW - DAY * number, "new": False} | other
    std = facts.pop("std", {"brand": [] if brand is None else [brand]})
    return Facts(f"p{number}", std, facts.pop("re", {}), **facts)


def ranked(facts: list[Facts], scores=None, vectors=None) -> Ranked:
    count = len(facts)
    return Ranked(
        facts,
        np.arange(count, 0, -1, dtype=float) if scores is None else np.array(scores, dtype=float),
        np.eye(max(1, count))[:count] if vectors is None else np.array(vectors, dtype=float).reshape(count, 2),
    )


def arrange(rules: list[dict], candidates: Ranked, k: int, seed: int = 0):
    """The product ids in their places, and the whole outcome."""
    outcome = apply(RuleSet.model_validate(rules), candidates, k, NOW, seed)
    return [candidates.facts[placed.row].product_id for placed in outcome.placed], outcome


def brands(count: int, every: int, brand: str = "own") -> list[Facts]:
    """Products of which each `every`th from the end on is of a brand, the others of brands of their own."""
    return [product(n, brand if n >= count - every else f"b{n}") for n in range(count)]


# --- one rule each ----------------------------------------------------------------------------------------------------


def test_no_rule_leaves_the_order_of_scores():
    ids, outcome = arrange([], ranked([product(n) for n in range(5)], [1, 3, 2, 3, 0]), 4)
    assert ids == ["p1", "p3", "p2", "p0"]
    assert not outcome.effects


def test_a_boost_multiplies_the_odds():
    """Log-odds 0, 0.5 and 1: three times the odds are 1.1 more, which puts p2 first; twice are 0.7, which puts it second."""
    candidates = ranked([product(0, "a"), product(1, "a"), product(2, "own")], [1, 0.5, 0])
    own = {"std": "brand", "any_of": ["own"]}
    assert arrange([{"kind": "boost", "when": own, "factor": 3}], candidates, 3)[0] == ["p2", "p0", "p1"]
    ids, outcome = arrange([{"kind": "boost", "when": own, "factor": 2}], candidates, 3)
    assert ids == ["p0", "p2", "p1"]
    assert (outcome.effects[0].moved, outcome.effects[0].removed) == (1, 0)
    assert arrange([{"kind": "boost", "when": own, "factor": 1.5}], candidates, 3)[1].effects[0].moved == 0


def test_a_bury_divides_the_odds_or_puts_behind_everything():
    candidates = ranked([product(0, "own"), product(1, "a"), product(2, "a")], [1, 0.5, 0])
    own = {"std": "brand", "any_of": ["own"]}
    assert arrange([{"kind": "bury", "when": own, "factor": 2}], candidates, 3)[0] == ["p1", "p0", "p2"]
    boosted = [{"kind": "bury", "when": own}, {"kind": "boost", "when": own, "factor": 1000}]
    assert arrange(boosted, candidates, 3)[0] == ["p1", "p2", "p0"]
    assert arrange(boosted, candidates, 2)[0] == ["p1", "p2"]


def test_a_cap_lets_in_the_best_of_each_value_and_says_what_it_kept_out():
    facts = [product(n, "own" if n < 4 else f"b{n}") for n in range(8)]
    ids, outcome = arrange([{"kind": "at_most", "n": 2, "std": "brand"}], ranked(facts), 4)
    assert ids == ["p0", "p1", "p4", "p5"]
    assert outcome.effects[0].rule == "at most 2 per brand"
    assert outcome.effects[0].removed == 2
    assert not outcome.full


def test_a_cap_is_kept_even_when_it_leaves_fewer_than_k():
    facts = [product(n, "own", group_id="g") for n in range(5)]
    rules = [{"kind": "at_most", "n": 2, "std": "brand"}, {"kind": "at_most", "n": 1, "group": True}]
    ids, outcome = arrange(rules, ranked(facts), 4)
    assert ids == ["p0"]
    further = [
        product(9, "own"),
        product(9, "other", group_id="g"),
        product(9, "other", group_id="h"),
        product(9, None),
    ]
    assert [all(holds(part, one, NOW) for part in outcome.full) for one in further] == [True, False, True, True]


def test_products_without_a_value_or_a_group_are_not_capped():
    rules = [{"kind": "at_most", "n": 1, "std": "brand"}, {"kind": "at_most", "n": 1, "group": True}]
    assert len(arrange(rules, ranked([product(n, None) for n in range(4)]), 4)[0]) == 4


def test_a_product_of_two_values_needs_room_in_both():
    facts = [product(0, std={"brand": ["a", "b"]}), product(1, "b"), product(2, "a"), product(3, "c")]
    assert arrange([{"kind": "at_most", "n": 1, "std": "brand"}], ranked(facts), 4)[0] == ["p0", "p3"]


def test_pins_stand_at_their_places_and_say_so():
    pins = [{"kind": "pin", "product_id": "p4", "place": 1}, {"kind": "pin", "product_id": "p0", "place": 3}]
    ids, outcome = arrange(pins, ranked([product(n) for n in range(5)]), 4)
    assert ids == ["p4", "p1", "p0", "p2"]
    assert [placed.by for placed in outcome.placed] == ["p4 at place 1", "", "p0 at place 3", ""]
    assert [effect.moved for effect in outcome.effects] == [1, 1]


def test_a_pin_that_may_not_be_shown_is_said_and_one_past_the_end_comes_last():
    pins = [{"kind": "pin", "product_id": "ghost", "place": 1}, {"kind": "pin", "product_id": "p0", "place": 9}]
    ids, outcome = arrange(pins, ranked([product(n) for n in range(3)]), 10)
    assert ids == ["p1", "p2", "p0"]
    assert "not shown" in outcome.effects[0].note
    assert arrange(pins, ranked([product(n) for n in range(3)]), 2)[0] == ["p0", "p1"]  # place 9 is on no page of 2


def test_pins_count_towards_caps_and_no_cap_holds_them_back():
    facts = [product(n, "own") for n in range(4)] + [product(4, "other"), product(5, "third")]
    pins = [{"kind": "pin", "product_id": f"p{n}", "place": 4 - n} for n in (2, 3)]
    assert arrange([*pins, {"kind": "at_most", "n": 1, "std": "brand"}], ranked(facts), 4)[0] == [
        "p3",
        "p2",
        "p4",
        "p5",
    ]


def test_a_promoted_share_is_spread_over_the_list():
    facts = [product(n, "own" if n >= 20 else f"b{n}") for n in range(30)]
    rules = [{"kind": "promote", "when": {"std": "brand", "any_of": ["own"]}, "share": 0.2}]
    ids, outcome = arrange(rules, ranked(facts), 20)
    places = [place for place, one in enumerate(ids, start=1) if one in {f"p{n}" for n in range(20, 30)}]
    assert places == [5, 10, 15, 20]
    assert [outcome.placed[place - 1].by for place in places] == ["20 % of places: brand is own"] * 4
    assert outcome.effects[0].moved == 4


def test_what_is_there_by_itself_counts_towards_its_share():
    rules = [{"kind": "promote", "when": {"std": "brand", "any_of": ["own"]}, "share": 0.5}]
    ids, outcome = arrange(rules, ranked([product(n, "own" if n < 2 else f"b{n}") for n in range(6)]), 4)
    assert ids == ["p0", "p1", "p2", "p3"]
    assert outcome.effects[0].moved == 0


def test_a_share_that_cannot_be_had_is_said():
    rules = [{"kind": "promote", "when": {"std": "brand", "any_of": ["own"]}, "share": 0.5}]
    ids, outcome = arrange(rules, ranked([product(n, "own" if n == 5 else f"b{n}") for n in range(6)]), 6)
    assert len(ids) == 6
    assert ids.index("p5") == 1
    assert outcome.effects[0].note.startswith("1 of 3 places")


def test_diversity_takes_what_is_unlike_first():
    """Two likenesses: a, a, a and b, b. A little diversity changes nothing, much of it takes turns."""
    vectors = [[1, 0], [1, 0], [1, 0], [0, 1], [0, 1]]
    candidates = ranked([product(n) for n in range(5)], [1.0, 0.9, 0.8, 0.5, 0.0], vectors)
    assert arrange([{"kind": "diversity", "strength": 0.01}], candidates, 5)[0] == ["p0", "p1", "p2", "p3", "p4"]
    ids, outcome = arrange([{"kind": "diversity", "strength": 0.6}], candidates, 5)
    assert ids[:2] == ["p0", "p3"]
    assert outcome.effects[0].moved == 1
    assert arrange([{"kind": "diversity", "strength": 1}], candidates, 2)[0] == ["p0", "p3"]


def test_exploration_gives_new_goods_their_share_another_day_others_and_the_same_answer_twice():
    facts = [product(n, new=n >= 40) for n in range(60)]
    rules = [{"kind": "explore", "share": 0.25}]
    lists = []
    for day in range(30):
        seed = seed_of("someone", NOW + DAY * day)
        ids, outcome = arrange(rules, ranked(facts, np.zeros(60)), 8, seed)
        assert arrange(rules, ranked(facts, np.zeros(60)), 8, seed)[0] == ids
        new = [one for one in ids if int(one[1:]) >= 40]
        assert len(new) == 2
        assert Counter(placed.by for placed in outcome.placed)["25 % of places for new goods"] == 2
        lists.append(tuple(new))
    assert len(set(lists)) > 20
    assert len({one for new in lists for one in new}) > 12  # of twenty


def test_a_list_too_short_for_a_whole_place_explores_now_and_then():
    facts = [product(n, new=n >= 10) for n in range(20)]
    counts = [
        len(
            [
                one
                for one in arrange([{"kind": "explore", "share": 0.1}], ranked(facts), 5, seed)[0]
                if int(one[1:]) >= 10
            ]
        )
        for seed in range(200)
    ]
    assert set(counts) == {0, 1}
    assert 60 < sum(counts) < 140  # half of them


def test_filters_say_how_many_each_took():
    rules = RuleSet.model_validate(
        [
            {"kind": "filter", "keep": {"price": {"max": 5}}},
            {"kind": "filter", "keep": {"in_stock": True}},
        ]
    )
    facts = [product(0), product(1, price=5.0), product(2, price=5.0, in_stock=False), product(3, price=None)]
    assert filtered(rules, facts, NOW) == ([1], {0: 2, 1: 1})


# --- conditions -------------------------------------------------------------------------------------------------------

DRESS = Facts(
    "d", {"brand": ["own"], "colour": ["red", "blue"]}, {"style": ["Boho-Chic"]}, 50.0, True, "g1", NOW - 10 * DAY, True
)
BARE = Facts("b", {}, {}, None, False, None, None)


@pytest.mark.parametrize(
    ("condition", "of_dress", "of_bare"),
    [
        ({"std": "colour", "any_of": ["green", "blue"]}, True, False),
        ({"std": "colour", "any_of": ["green"]}, False, False),
        ({"std": "colour", "none_of": ["green", "blue"]}, False, True),
        ({"re": "style", "any_of": ["boho chic"]}, True, False),
        ({"re": "style", "none_of": ["BOHO/CHIC"]}, False, True),
        ({"price": {"min": 50}}, True, False),
        ({"price": {"max": 50, "min": 10}}, True, False),
        ({"price": {"max": 49.9}}, False, False),
        ({"in_stock": False}, False, True),
        ({"arrived": {"within_days": 10}}, True, False),
        ({"arrived": {"within_days": 9.9}}, False, False),
        ({"arrived": {"after": "2000-01-01", "before": "2090-01-01"}}, True, False),
        ({"arrived": {"before": "2000-01-01"}}, False, False),
        ({"new_goods": True}, True, False),
        ({"products": ["d", "e"]}, True, False),
        ({"groups": ["g1"]}, True, False),
        ({"not": {"price": {"max": 49}}}, True, True),
        ({"all": [{"in_stock": True}, {"groups": ["g2"]}]}, False, False),
        ({"any": [{"in_stock": True}, {"groups": ["g2"]}]}, True, False),
    ],
)
def test_conditions_mean_what_they_say(condition, of_dress, of_bare):
    (rule,) = RuleSet.model_validate([{"kind": "bury", "when": condition}]).root
    assert holds(rule.when, DRESS, NOW) == of_dress
    assert holds(rule.when, BARE, NOW) == of_bare
    assert said(rule.when)
    again = RuleSet.model_validate_json(RuleSet([rule]).model_dump_json(by_alias=True, exclude_defaults=True))
    assert again.root == [rule]


def nested(levels: int) -> dict:
    return {"not": nested(levels - 1)} if levels > 1 else {"in_stock": True}


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ([{"kind": "filter", "keep": {"stock": True}}], "exactly one of std, re"),
        ([{"kind": "filter", "keep": {"in_stock": True, "new_goods": True}}], "exactly one of std, re"),
        ([{"kind": "bury", "when": {"std": "brand"}}], "any_of or none_of"),
        ([{"kind": "bury", "when": {"price": {}}}], "min, max or both"),
        ([{"kind": "bury", "when": {"arrived": {}}}], "within_days or several"),
        ([{"kind": "filter", "keep": {"not": {"new_goods": True}}}], "cannot ask for new_goods"),
        ([{"kind": "bury", "when": nested(MAX_DEPTH + 1)}], "more than 8 levels"),
        ([{"kind": "bury", "when": nested(600)}], "ecursion"),
        ([{"kind": "boost", "when": {"in_stock": True}, "factor": 0.5}], "greater than 1"),
        ([{"kind": "at_most", "n": 2}], "one of the two"),
        ([{"kind": "at_most", "n": 0, "std": "brand"}], "greater than or equal to 1"),
        ([{"kind": "diversity", "strength": 0.1}] * 2, "two rules of kind diversity"),
        (
            [{"kind": "pin", "product_id": "a", "place": 1}, {"kind": "pin", "product_id": "b", "place": 1}],
            "place 1 is",
        ),
        (
            [{"kind": "pin", "product_id": "a", "place": 1}, {"kind": "pin", "product_id": "a", "place": 2}],
            "'a' is pinned",
        ),
        ([{"kind": "explore", "share": 0.6}, {"kind": "promote", "when": {"in_stock": True}, "share": 0.6}], "120 %"),
        ([{"kind": "explore", "share": math.nan}], "share"),
    ],
)
def test_rules_that_cannot_be_are_refused(rules, said):
    with pytest.raises(ValidationError, match=said):
        RuleSet.model_validate(rules)


def test_a_rule_of_many_words_is_called_by_the_first_of_them():
    values = [f"brand number {number}" for number in range(200)]
    (rule,) = RuleSet.model_validate([{"kind": "filter", "keep": {"std": "brand", "any_of": values}}]).root
    assert rule.title().startswith("only brand is brand number 0 or brand number 1 or")
    assert len(rule.title()) == 120


def test_nesting_up_to_the_bound_is_taken():
    assert RuleSet.model_validate([{"kind": "bury", "when": nested(MAX_DEPTH)}])


def test_values_are_spelt_as_the_schema_does_and_what_the_shop_lacks_is_named_with_its_path():
    schema = FeatureSchema(std={"brand": ["Own Brand", "North"]}, re=["style"])
    rules = RuleSet.model_validate(
        [
            {"kind": "bury", "when": {"not": {"std": "brand", "any_of": ["own-brand"]}}},
            {"kind": "bury", "when": {"all": [{"in_stock": True}, {"std": "brand", "none_of": ["North", "East"]}]}},
            {"kind": "filter", "keep": {"any": [{"re": "colour", "any_of": ["x"]}, {"re": "brand", "any_of": ["x"]}]}},
            {"kind": "boost", "when": {"std": "style", "any_of": ["x"]}, "factor": 2},
            {"kind": "at_most", "n": 1, "std": "planet"},
        ]
    )
    spelt, unknown = rules.spelt(schema, ("body",))
    assert spelt.root[0].when.not_.any_of == ["Own Brand"]
    assert [path for path, _ in unknown] == [
        ("body", 1, "when", "all", 1, "none_of", 1),
        ("body", 2, "keep", "any", 0, "re"),
        ("body", 2, "keep", "any", 1, "re"),
        ("body", 3, "when", "std"),
        ("body", 4, "std"),
    ]
    reasons = [reason for _, reason in unknown]
    assert reasons[0] == "'East' is no value of brand"
    assert '"std" instead of "re"' in reasons[2]
    assert '"re" instead of "std"' in reasons[3]


# --- whatever the rules -----------------------------------------------------------------------------------------------

own = {"std": "brand", "any_of": ["own"]}
facts_of_any = st.builds(
    lambda number, brand, group, new: product(number, brand, group_id=group, new=new),
    st.integers(0, 10**6), st.sampled_from([*BRANDS, None]), st.sampled_from(["g1", "g2", None]), st.booleans(),
)  # fmt: skip
lists = st.lists(facts_of_any, max_size=25, unique_by=lambda facts: facts.product_id).flatmap(
    lambda facts: st.tuples(
        st.just(facts),
        st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=len(facts), max_size=len(facts)),
        st.lists(st.sampled_from([(1.0, 0.0), (0.0, 1.0), (0.6, 0.8)]), min_size=len(facts), max_size=len(facts)),
    )
)
cap = st.builds(lambda n: {"kind": "at_most", "n": n, "std": "brand"}, st.integers(1, 4))
any_rules = st.tuples(
    st.lists(cap, max_size=1),
    st.lists(st.just({"kind": "at_most", "n": 2, "group": True}), max_size=1),
    st.lists(st.builds(lambda s: {"kind": "diversity", "strength": s}, st.floats(0, 1)), max_size=1),
    st.lists(st.builds(lambda s: {"kind": "promote", "when": own, "share": s}, st.floats(0.05, 0.5)), max_size=1),
    st.lists(st.builds(lambda s: {"kind": "explore", "share": s}, st.floats(0.05, 0.5)), max_size=1),
    st.lists(st.sampled_from([{"kind": "bury", "when": own}, {"kind": "boost", "when": own, "factor": 5}]), max_size=2),
).map(lambda groups: [rule for group in groups for rule in group])


@given(lists, any_rules, st.integers(1, 12), st.data())
def test_nothing_is_invented_doubled_or_over_a_cap_and_pins_stand(candidates, rules, k, data):
    facts, scores, vectors = candidates
    pinned = (
        data.draw(st.lists(st.sampled_from(facts), unique_by=lambda one: one.product_id, max_size=2)) if facts else []
    )
    places = data.draw(st.permutations(range(1, 13)))
    pins = [{"kind": "pin", "product_id": p.product_id, "place": n} for p, n in zip(pinned, places, strict=False)]
    ids, outcome = arrange([*rules, *pins], ranked(facts, scores, vectors), k, seed=3)
    assert set(ids) <= {one.product_id for one in facts}
    assert len(set(ids)) == len(ids) <= k
    shown = [facts[placed.row] for placed in outcome.placed]
    kept = {pin["product_id"] for pin in pins if pin["place"] <= k}
    for rule in rules:
        if rule["kind"] == "at_most":
            by_group = rule.get("group")
            values = [one.group_id if by_group else "".join(one.std["brand"]) for one in shown]
            of_pins = Counter(value for value, one in zip(values, shown, strict=True) if one.product_id in kept)
            for value, count in Counter(value for value in values if value).items():
                assert count <= max(rule["n"], of_pins[value])
    free = len(ids) - len(kept)
    for number, pin in enumerate(
        sorted((pin for pin in pins if pin["place"] <= k), key=lambda pin: pin["place"]), start=1
    ):
        assert ids.index(pin["product_id"]) + 1 == min(
            pin["place"], free + number
        )  # earlier only where the others ran out
    # Nobody who would still fit was left out.
    if len(ids) < k:
        left = [one for one in facts if one.product_id not in ids]
        assert not any(all(holds(part, one, NOW) for part in outcome.full) for one in left)


@given(lists, cap, st.integers(1, 12))
def test_with_one_cap_there_are_k_while_there_can_be(candidates, rule, k):
    facts, scores, vectors = candidates
    ids, _ = arrange([rule], ranked(facts, scores, vectors), k)
    counts = Counter("".join(one.std["brand"]) for one in facts)
    most = sum(count if brand == "" else min(count, rule["n"]) for brand, count in counts.items())
    assert len(ids) == min(k, most)


@given(lists, st.integers(1, 12))
def test_no_diversity_is_the_order_of_scores(candidates, k):
    ids, outcome = arrange([{"kind": "diversity", "strength": 0}], ranked(*candidates), k)
    assert ids == arrange([], ranked(*candidates), k)[0]
    assert outcome.effects[0].moved == 0


@given(lists, st.floats(0.05, 1), st.integers(1, 12))
def test_every_beginning_of_a_list_has_the_promoted_share_while_there_are_such_products(candidates, share, k):
    facts, scores, vectors = candidates
    rules = [{"kind": "promote", "when": own, "share": share}]
    ids, _ = arrange(rules, ranked(facts, scores, vectors), k)
    promoted = {one.product_id for one in facts if one.std["brand"] == ["own"]}
    for place in range(1, len(ids) + 1):
        have = len(promoted & set(ids[:place]))
        assert have >= min(math.floor(share * place), len(promoted))
