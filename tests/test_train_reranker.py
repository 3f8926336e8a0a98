"""What the reranker learns from: lists of shoppers with a history and of strangers, weighed alike; and what judges it."""

from __future__ import annotations

import numpy as np
import pytest

from train_reranker import Lists
from train_user import Retrieved


def lists(known: list[bool], slices: list[int] | None = None) -> Lists:
    """One list of each shopper: 0, 1, ..."""
    empty = np.zeros((len(known), 1))
    nothing = Retrieved(empty, empty, empty, empty, empty)
    requests = [(user, 0, 0.0) for user in range(len(known))]
    return Lists(requests, nothing, empty > 0, empty[:, 0], np.array(known), np.array(slices or [0] * len(known)))


def test_both_kinds_of_shoppers_weigh_the_same_however_many_they_are():
    own = lists([True, False, False, False])
    assert own.weights(np.arange(4)).tolist() == pytest.approx([2.0, 2 / 3, 2 / 3, 2 / 3])
    assert own.weights(np.array([0, 1])).tolist() == pytest.approx([1.0, 1.0])


def test_where_there_is_one_kind_only_every_list_weighs_the_same():
    for known in (True, False):
        assert lists([known] * 3).weights(np.arange(3)).tolist() == pytest.approx([1.0] * 3)


def test_few_strangers_do_not_decide_what_is_learned():
    weights = lists([True] * 99 + [False]).weights(np.arange(100))
    assert weights[99] / weights[0] == pytest.approx(9.9)  # 99 if both kinds weighed the same


@pytest.mark.parametrize(
    ("slices", "judging"),
    [
        ([0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 1, 1]),
        ([3, 0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 0, 0, 1, 1, 1, 1, 1, 1, 1]),  # the last alone is too few
    ],
)
def test_the_newest_requests_judge_those_before_them(slices, judging):
    assert lists([True] * len(slices), slices).judging().astype(int).tolist() == judging


def test_where_all_asked_at_one_time_a_share_of_the_shoppers_judges():
    one_time = lists([True] * 10)
    assert one_time.judging().sum() == 2
    # Of one shopper all lists judge, or none.
    one_time.requests[:] = [(number // 2, 0, 0.0) for number in range(10)]
    assert one_time.judging().reshape(5, 2).sum(axis=1).tolist().count(2) == 1
