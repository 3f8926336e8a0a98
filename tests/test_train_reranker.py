"""What the reranker learns from: lists of shoppers with a history and of strangers, weighed alike."""

from __future__ import annotations

import numpy as np
import pytest

from train_reranker import Lists
from train_user import Retrieved


def lists(known: list[bool]) -> Lists:
    empty = np.zeros((len(known), 1))
    nothing = Retrieved(empty, empty, empty, empty, empty)
    return Lists([(0, 0, 0.0)] * len(known), nothing, empty > 0, empty[:, 0], np.array(known))


def test_both_kinds_of_shoppers_weigh_the_same_however_many_they_are():
    own = lists([True, False, False, False])
    assert own.weights(np.arange(4)).tolist() == pytest.approx([2.0, 2 / 3, 2 / 3, 2 / 3])
    assert own.weights(np.array([0, 1])).tolist() == pytest.approx([1.0, 1.0])


def test_where_there_is_one_kind_only_every_list_weighs_the_same():
    for known in (True, False):
        assert lists([known] * 3).weights(np.arange(3)).tolist() == pytest.approx([1.0] * 3)
