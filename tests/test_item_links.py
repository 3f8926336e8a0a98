"""Links from item to item: on shoppers few enough to count by hand, and against the same sums done densely."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import item_links
from item_links import MOST_LINKS, SHRINKAGE, ItemLinks, group_numbers

ITEMS = 9


def build(*baskets: list[int], items: int = ITEMS, group: list[int] | None = None) -> ItemLinks:
    """Links of shoppers who took these items, in this order; every item alone in its group unless told otherwise."""
    user = np.repeat(np.arange(len(baskets)), [len(basket) for basket in baskets])
    item = np.array([item for basket in baskets for item in basket], dtype=np.int32)
    return ItemLinks.build(user, item, np.arange(items) if group is None else np.array(group))


def scores(
    links: ItemLinks, *histories: list[int], candidates: list[int] | None = None, targets: list[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Of histories padded to one length; `targets` are items."""
    width = max(1, *map(len, histories))
    history = np.array([[*given, *[0] * (width - len(given))] for given in histories])
    mask = np.array([[True] * len(given) + [False] * (width - len(given)) for given in histories])
    offered = np.arange(len(links.group)) if candidates is None else np.array(candidates)
    columns = None if targets is None else np.array([offered.tolist().index(target) for target in targets])
    return links.scores(history, mask, offered, columns)


# ------------------------------------------------------------------------------------------------------------ the table
def test_a_pair_weighs_its_shoppers_damped_by_how_many_took_each():
    links = build([0, 1], [0, 1, 2], [0])
    damping = 1 / np.sqrt(np.array([3, 2, 1]) + SHRINKAGE)
    np.testing.assert_allclose(links.damping[:3], damping)
    expected = np.zeros((ITEMS, ITEMS))
    for pair, shoppers in {(0, 1): 2, (0, 2): 1, (1, 2): 1}.items():
        expected[pair] = expected[pair[::-1]] = shoppers * damping[pair[0]] * damping[pair[1]]
    np.testing.assert_allclose(links.together.toarray(), expected, rtol=1e-6)
    assert (links.together.dtype, links.damping.dtype) == (np.float32, np.float32)


def test_who_takes_a_pair_again_and_again_is_one_shopper():
    once, often = build([0, 1]), build([0, 1, 0, 0, 1])
    np.testing.assert_array_equal(once.together.toarray(), often.together.toarray())


def test_the_links_of_an_item_are_its_row():
    others, strengths = build([3, 5], [3, 5], [3, 8]).of(3)
    assert dict(zip(others.tolist(), strengths.tolist(), strict=True)) == pytest.approx(
        {5: 2 / np.sqrt(6 * 5), 8: 1 / np.sqrt(6 * 4)}
    )
    assert build([3, 5]).of(0)[0].tolist() == []


def test_an_item_keeps_its_strongest_links_and_none_with_itself():
    """Item 0 was taken with each other item, with the later ones by more shoppers."""
    others = range(1, MOST_LINKS + 11)
    links = build(*([0, other] for other in others for _ in range(1 + (other > 10))), items=MOST_LINKS + 11)
    assert sorted(links.of(0)[0].tolist()) == list(range(11, MOST_LINKS + 11))
    assert all(links.of(other)[0].tolist() == [0] for other in others)


def test_of_equally_strong_links_the_first_items_are_kept():
    links = build(*([0, other] for other in range(1, MOST_LINKS + 6)), items=MOST_LINKS + 6)
    assert sorted(links.of(0)[0].tolist()) == list(range(1, MOST_LINKS + 1))


def test_of_a_robot_the_latest_distinct_items_count(monkeypatch):
    """Item 1 was met first, and again at the end: it is among the latest three."""
    monkeypatch.setattr(item_links, "MOST_OF_A_SHOPPER", 3)
    links = build([1, 2, 3, 4, 4, 5, 1], [2, 3])
    assert [np.sort(links.of(item)[0]).tolist() for item in range(6)] == [[], [4, 5], [3], [2], [1, 5], [1, 4]]
    np.testing.assert_allclose(links.damping[:4] ** -2, [3, 4, 4, 4], rtol=1e-6)


def test_shoppers_events_may_come_interleaved():
    user, item = np.array([1, 0, 1, 0]), np.array([0, 1, 2, 3])
    links = ItemLinks.build(user, item, np.arange(ITEMS))
    np.testing.assert_array_equal(links.together.toarray(), build([1, 3], [0, 2]).together.toarray())


def test_without_events_nothing_is_linked():
    none = np.zeros(0, dtype=np.int32)
    links = ItemLinks.build(none, none, np.arange(3))
    assert links.together.shape == (3, 3)
    assert links.of(2)[0].tolist() == []
    assert not scores(links, [0, 1], targets=[2])[0].any()


@given(st.data())
def test_a_table_made_in_blocks_is_the_same_table(data):
    user, item, group = data.draw(events())
    whole = ItemLinks.build(user, item, group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(item_links, "ITEMS_AT_ONCE", data.draw(st.integers(1, ITEMS)))
        blocks = ItemLinks.build(user, item, group)
    np.testing.assert_array_equal(whole.together.toarray(), blocks.together.toarray())


def test_variants_share_a_number_and_others_have_one_each():
    numbers = group_numbers(["b", None, "a", "b", None, "1"])
    assert numbers.dtype == np.int64
    same = numbers[:, None] == numbers[None]
    expected = np.eye(6, dtype=bool)
    expected[0, 3] = expected[3, 0] = True
    assert (same == expected).all()
    assert group_numbers([]).shape == (0,)


# ------------------------------------------------------------------------------------------------------------ the scores
def test_a_candidate_has_the_links_of_all_that_was_met_each_item_once():
    links = build([0, 1, 2], [0, 2])
    together, variant = scores(links, [0, 1, 0, 0], [1], [], candidates=[2, 5, 0])
    table = links.together.toarray()
    np.testing.assert_allclose(
        together, [[table[0, 2] + table[1, 2], 0, table[1, 0]], [table[1, 2], 0, table[1, 0]], [0] * 3]
    )
    assert not variant.any()
    assert (together.dtype, variant.dtype) == (np.float32, np.float32)


def test_what_is_masked_says_nothing():
    links = build([0, 1], group=[0, 1, 0, 1, 4, 5, 6, 7, 8])
    together, variant = links.scores(np.array([[0, 1]]), np.zeros((1, 2), dtype=bool), np.arange(ITEMS))
    assert not together.any()
    assert not variant.any()


def test_variants_of_what_was_met_are_marked_and_nothing_is_its_own():
    links = build(group=[0, 0, 0, 1, 1, 2, 3, 4, 5])
    _, variant = scores(links, [1, 5], [3], [0, 1])
    assert [np.flatnonzero(row).tolist() for row in variant] == [[0, 2], [4], [2]]


def test_the_answer_is_not_read_from_the_shoppers_own_taking():
    """Nobody but the shopper took 0 and 1; 0 and 2 were taken by somebody else too."""
    links = build([0, 1, 2], [0, 2])
    together, _ = scores(links, [0], [0], targets=[1, 2])
    assert together[0, 1] == 0.0
    assert together[1, 2] == pytest.approx(links.together[0, 2] / 2)
    assert together[1, 1] == pytest.approx(links.together[0, 1])  # of what is no answer nothing is left out


def test_of_a_pair_that_is_not_in_the_table_nothing_is_left_out():
    links = build([0, 1], [0, 1], [0, 1], [3])
    together, _ = scores(links, [0], [0, 3], targets=[1, 1])
    assert together[0, 1] == together[1, 1] == pytest.approx(links.together[0, 1] * 2 / 3)


@st.composite
def events(draw) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """User and item of up to forty events, and the groups of ITEMS items."""
    pairs = draw(st.lists(st.tuples(st.integers(0, 5), st.integers(0, ITEMS - 1)), max_size=40))
    group = draw(st.lists(st.integers(0, ITEMS - 1), min_size=ITEMS, max_size=ITEMS))
    user, item = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return user, item.astype(np.int32), np.array(group)


@given(st.data())
def test_scores_are_the_dense_sums(data):
    user, item, group = data.draw(events())
    most_links, most_of_a_shopper = data.draw(st.integers(1, ITEMS)), data.draw(st.integers(1, ITEMS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(item_links, "MOST_LINKS", most_links)
        patch.setattr(item_links, "MOST_OF_A_SHOPPER", most_of_a_shopper)
        links = ItemLinks.build(user, item, group)
    rows, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    size = rows * width
    history = np.array(data.draw(st.lists(st.integers(0, ITEMS - 1), min_size=size, max_size=size)))
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size))).reshape(rows, width)
    candidates = np.array(data.draw(st.lists(st.integers(0, ITEMS - 1), unique=True, min_size=1)))
    column = st.integers(0, len(candidates) - 1)
    targets = data.draw(st.none() | st.lists(column, min_size=rows, max_size=rows).map(np.array))
    history = history.reshape(rows, width)

    table, damping = dense_table(user, item, most_links, most_of_a_shopper)
    together, variant = links.scores(history, mask, candidates, targets)
    for row in range(rows):
        met = sorted(set(history[row][mask[row]].tolist()))
        expected = table[met].sum(0)[candidates]
        if targets is not None:
            target = candidates[targets[row]]
            expected[targets[row]] = sum(max(0.0, table[one, target] - damping[one] * damping[target]) for one in met)
        np.testing.assert_allclose(together[row], expected, atol=1e-6)
        of_met = [any(group[one] == group[other] for one in met) and other not in met for other in candidates]
        np.testing.assert_array_equal(variant[row], of_met)
    assert (together >= 0.0).all()


def dense_table(
    user: np.ndarray, item: np.ndarray, most_links: int, most_of_a_shopper: int
) -> tuple[np.ndarray, np.ndarray]:
    """The table [ITEMS, ITEMS] and the damping, shopper by shopper and cell by cell."""
    taken = np.zeros((6, ITEMS), dtype=np.float32)
    for shopper in range(6):
        latest = list(dict.fromkeys(item[user == shopper][::-1].tolist()))
        taken[shopper, latest[:most_of_a_shopper]] = 1.0
    damping = (1.0 / np.sqrt(taken.sum(0) + SHRINKAGE)).astype(np.float32)
    table = taken.T @ taken * np.outer(damping, damping)
    np.fill_diagonal(table, 0.0)
    for row in table:
        row[np.argsort(-row, kind="stable")[most_links:]] = 0.0
    return table, damping
