"""The oracle on a shop of a dozen items, where what the test days tell is known."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pytest

import ceiling
from baselines import Case, Split
from catalog import Product
from ceiling import FOLDS, NEAR_DAYS, Answers, Oracle
from settings import UserError
from tensors import DAY
from tests.test_baselines import CUT, split_of

ITEMS = [f"i{number:02}" for number in range(12)]
START = datetime.fromtimestamp(CUT * DAY, UTC)
# Few shoppers teach it here, so it takes small steps and many.
SLOWLY = {"MOST_SHOPPERS": 8, "EPOCHS": 20, "LEARNING_RATE": 0.01}
Taken = list[tuple[str, str, float]]  # shopper, item, days after the cut


def shop(met: dict[str, str]) -> Split:
    events = [(user, item, 1.0) for user, item in met.items()]
    split = split_of([*events, ("somebody", ITEMS[11], 0.0)], [Product(product_id=item, title=item) for item in ITEMS])
    return replace(split, groups=[None] * len(ITEMS))


@pytest.fixture(autouse=True)
def slowly(monkeypatch):
    for name, value in SLOWLY.items():
        monkeypatch.setattr(ceiling, name, value)


def oracle(split: Split, taken: Taken, queries: np.ndarray | None = None) -> tuple[Oracle, list[Case]]:
    """Each shopper is judged by the first thing they took; the release knows nothing but what `queries` [C, D] say of them."""
    first: dict[str, Case] = {}
    for user, item, day in taken:
        first.setdefault(user, Case(user, "", (CUT + day) * DAY, [item]))
    cases = list(first.values())
    frame = pl.DataFrame(
        {
            "user_id": [user for user, *_ in taken],
            "product_id": [item for _, item, _ in taken],
            "at": [START + timedelta(days=day) for *_, day in taken],
        },
        schema_overrides={"at": pl.Datetime("us", "UTC")},
    )
    told = np.zeros((len(cases), 2), dtype=np.float32) if queries is None else queries
    answers = Answers(told, np.zeros((len(ITEMS), told.shape[1]), dtype=np.float32), [[] for _ in cases])
    return Oracle(split, cases, len(cases), answers, frame), cases


def test_what_the_test_days_take_comes_first_and_what_was_met_never():
    met = {f"u{number}": ITEMS[11] for number in range(60)}
    taken = [(f"u{number}", ITEMS[3] if number % 3 else ITEMS[number % 11], 1.0) for number in range(60)]
    found, _ = oracle(shop(met), taken)
    lists = found.recommend()
    assert all(ranked[0] == ITEMS[3] for ranked in lists)
    assert all(sorted(ranked[:11]) == ITEMS[:11] for ranked in lists)


def test_what_is_taken_by_those_who_met_the_same_is_learned():
    met = {f"u{number}": ITEMS[number % 2] for number in range(80)}
    taken = [(f"u{number}", ITEMS[5 + number % 2], 1.0) for number in range(80)]
    found, cases = oracle(shop(met), taken)
    for case, ranked in zip(cases, found.recommend(), strict=True):
        assert ranked[0] == case.targets[0]


def test_what_a_query_says_is_learned_from_others():
    taken = [(f"u{number}", ITEMS[5 + number % 2], 1.0) for number in range(200)]
    queries = np.array([[1.0, -1.0] if number % 2 else [-1.0, 1.0] for number in range(200)], dtype=np.float32)
    found, cases = oracle(shop({}), taken, queries)
    right = [case.targets[0] == ranked[0] for case, ranked in zip(cases, found.recommend(), strict=True)]
    assert np.mean(right) > 0.95


def test_nobody_is_told_what_their_own_fold_took():
    taken = [(f"u{number}", ITEMS[number], 1.0) for number in range(11)] + [("u0", ITEMS[4], 2.0)]
    found, _ = oracle(shop({f"u{number}": ITEMS[11] for number in range(11)}), taken)
    for case in range(11):
        fold = found.fold[case]
        told = np.expm1(found.near(fold, None))
        of_others = [number for number in range(11) if found.fold[number] != fold]
        right = np.zeros(12)
        right[of_others] = 1
        right[4] += 0 in of_others
        assert np.allclose(told, right)
        linked = found._together(fold, np.array([case]))[0] > 0
        assert not linked[[number for number in range(11) if number not in of_others and number != 4]].any()
        assert linked[of_others].all()


def test_who_took_nothing_new_teaches_nothing():
    met = {f"u{number}": ITEMS[number % 2] for number in range(40)}
    taken = [(f"u{number}", ITEMS[2 if number < 30 else number % 2], 1.0) for number in range(40)]
    found, _ = oracle(shop(met), taken)
    assert all(ranked[0] == ITEMS[2] for ranked in found.recommend())
    found, _ = oracle(shop({"u0": ITEMS[0]}), [("u0", ITEMS[1], 1.0)])
    with pytest.raises(UserError, match="too few shoppers took anything new"):
        found.recommend()


def test_what_was_taken_near_the_request_is_told_by_itself():
    taken = [("u0", ITEMS[0], 0.0), ("u1", ITEMS[1], NEAR_DAYS), ("u2", ITEMS[2], NEAR_DAYS + 1.0)]
    found, cases = oracle(shop({}), taken)
    near = np.expm1(found.near(found.fold[0], cases[0].at / DAY))
    assert near[:3].round(6).tolist() == [0.0, 1.0, 0.0]
    assert len({*found.fold.tolist()}) == min(FOLDS, 3)


def test_places_of_what_nobody_met_go_to_the_contents_that_others_took_oftenest_by_the_item():
    # Items 0 and 1 were met; of what was not, 2 to 7 are coats, 8 and 9 hats, 10 a shoe.
    titles = ["met", "met", *["coat"] * 6, *["hat"] * 2, "shoe"]
    split = shop({"u0": ITEMS[0], "u1": ITEMS[1]})
    named = [Product(product_id=item, title=title) for item, title in zip(ITEMS, [*titles, "met"], strict=True)]
    taken = [(f"u{number}", ITEMS[[2, 3, 4, 8, 9][number % 5]], 1.0) for number in range(60)]
    found, _ = oracle(replace(split, products=named), taken)
    found.lists = [np.array([0, 2, 1, 3, 10])] * len(found.lists)
    for ranked in found.recommend_contents():
        assert [ranked[0], ranked[2]] == [ITEMS[0], ITEMS[1]]
        assert sorted([ranked[1], ranked[3]]) == [ITEMS[8], ITEMS[9]]  # of hats 12 an item, of coats 6
        assert ranked[4] in ITEMS[2:8]


def test_what_only_their_own_fold_took_says_nothing_of_contents():
    taken = [(f"u{number}", ITEMS[number], 1.0) for number in range(11)]
    found, _ = oracle(shop({"u0": ITEMS[11]}), taken)
    found.lists = [np.array([number]) for number in range(11)]
    for case, ranked in enumerate(found.recommend_contents()):
        of_fold = [ITEMS[number] for number in range(11) if found.fold[number] == found.fold[case]]
        assert ranked[0] not in of_fold
