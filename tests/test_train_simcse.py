"""Pairs of items that shoppers took together, as positives of the item tower."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from item_links import ItemLinks
from train_simcse import MOST_REPEATS, contrastive_loss, examples, nt_xent, partners


def links_of(baskets: list[list[int]], items: int) -> ItemLinks:
    user = np.repeat(np.arange(len(baskets)), [len(basket) for basket in baskets])
    return ItemLinks.build(user, np.array([item for basket in baskets for item in basket]), np.arange(items))


def test_a_partner_was_taken_together_and_who_has_none_stays_alone():
    links = links_of([[0, 1], [0, 2], [3]], 5)
    torch.manual_seed(0)
    drawn = np.stack([partners(np.arange(5), links, 1.0) for _ in range(200)])
    assert [set(column) for column in drawn.T] == [{1, 2}, {0}, {0}, {3}, {4}]
    assert (partners(np.arange(5), links, 0.0) == np.arange(5)).all()


def test_stronger_links_are_drawn_more_often_and_the_share_is_kept():
    links = links_of([[0, 1]] * 9 + [[0, 2]], 3)
    others, strength = links.of(0)
    expected = dict(zip(others.tolist(), (strength / strength.sum()).tolist(), strict=True))
    torch.manual_seed(0)
    drawn = partners(np.zeros(20_000, dtype=np.int64), links, 0.5)
    assert (drawn == 0).mean() == pytest.approx(0.5, abs=0.02)
    for other, share in expected.items():
        assert (drawn == other).mean() == pytest.approx(0.5 * share, abs=0.02)


def test_few_items_with_links_are_shown_more_often():
    links = links_of([[0, 1]], 10)
    shown = np.bincount(examples(np.arange(10), links), minlength=10)
    assert shown.tolist() == [1 + MOST_REPEATS, 1 + MOST_REPEATS, *[1] * 8]
    every = links_of([[0, 1], [2, 3]], 4)
    assert sorted(examples(np.arange(4), every)) == [0, 1, 2, 3]
    nobody = links_of([], 4)
    assert sorted(examples(np.arange(4), nobody)) == [0, 1, 2, 3]


def test_a_pair_of_two_products_attracts_and_is_no_negative_of_itself():
    """The second view of the first example is of another product, and points elsewhere: the gradient brings them together."""
    views = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 1.0]]), dim=-1).requires_grad_()
    nt_xent(views, torch.tensor([0, 1, 2, 1]), contrastive_loss(0.5)).backward()
    assert (views.grad[0] @ views[2]) < 0  # a step against the gradient goes towards the partner
