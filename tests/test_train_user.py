"""The user tower's training, on a shop of two hundred items made by hand."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from model_user import UserTower, UserTowerConfig
from shop_data import ShopData
from store import EventLog
from tensors import DAY, Histories, ItemFeatures, Popularity
from text_encoder import Ragged
from train_user import SampledSoftmax, UserOptions, best
from training import fit

ITEMS, SHOPPERS, DAYS = 200, 30, 4  # more items than are mined for a request


@pytest.fixture(scope="module")
def shop() -> ShopData:
    """Every shopper meets two random items a day."""
    random = np.random.default_rng(0)
    events = SHOPPERS * DAYS * 2
    users = [f"u{number:02}" for number in range(SHOPPERS)]
    products = [f"p{number:03}" for number in range(ITEMS)]
    log = EventLog(
        users, products, ["view"], [""],
        user=np.tile(np.arange(SHOPPERS), DAYS * 2), product=random.integers(0, ITEMS, events),
        kind=np.zeros(events, dtype=np.int8), at=np.repeat(np.arange(DAYS), SHOPPERS * 2) * DAY,
        context=np.zeros(events, dtype=np.int32),
    )  # fmt: skip
    histories = Histories.build(log, products)
    nothing = np.zeros((ITEMS, 1), dtype=np.int32)
    titles = Ragged(np.zeros((0, 3), dtype=np.float32), np.zeros(2, dtype=np.int64))
    vectors = F.normalize(torch.from_numpy(random.normal(size=(ITEMS, 5)).astype(np.float32)), dim=-1).numpy()
    return ShopData(
        ItemFeatures(products, nothing, nothing, titles, nothing[:, 0]), vectors, np.ones(ITEMS), np.arange(ITEMS), histories,
        Popularity.fit(histories.item, histories.at, np.zeros(ITEMS), [(7.0, 0.0)]), [{}] * SHOPPERS,
        np.zeros((1, 3), dtype=np.float32), float(histories.at.max()),
    )  # fmt: skip


def train(shop: ShopData, folder: Path, killed_at: int = 0) -> tuple[dict[str, torch.Tensor], int]:
    """Weights after three epochs with mined negatives, fewer than there are items, and how many steps that took."""
    given = UserOptions(_env_file=None, epochs=3, batch_size=16, negatives=16, learning_rate=0.01, checkpoint_seconds=0)
    torch.manual_seed(0)
    tower = UserTower(UserTowerConfig(ITEMS, 5, shop.popularity.width, 0, 3, collaborative=4, width=16, heads=2))
    softmax, calls = SampledSoftmax(shop, tower, given, 0.0, shop.now), count(1)

    def loss(model: torch.nn.Module, rows: np.ndarray) -> torch.Tensor:
        if next(calls) == killed_at:
            raise KeyboardInterrupt
        return softmax.loss(model, rows)

    fit(
        tower, softmax.batches, loss, lambda model: {"epochs": 0.0}, "epochs", given, folder, "user", keep_best=False,
        state=softmax,
    )  # fmt: skip
    return tower.state_dict(), next(calls) - 1


def test_a_run_resumed_within_an_epoch_keeps_the_hard_negatives_of_its_start(shop, tmp_path):
    expected, steps = train(shop, tmp_path / "uninterrupted")
    with pytest.raises(KeyboardInterrupt):
        train(shop, tmp_path / "killed", killed_at=steps // 2)
    resumed, left = train(shop, tmp_path / "killed")
    assert left == steps - steps // 2 + 1
    for name, weight in expected.items():
        assert torch.equal(resumed[name], weight), name


@settings(deadline=None)
@given(st.data())
def test_best_keeps_a_share_of_the_untouched(data):
    """Against the same said plainly: the best untouched first, filled up with the best others, put in order."""
    count = data.draw(st.integers(1, 8))
    logits = np.array(data.draw(st.permutations(range(12))), dtype=np.float32)
    untouched = np.array(data.draw(st.lists(st.booleans(), min_size=12, max_size=12)))
    new = data.draw(st.integers(0, 10))
    met = data.draw(st.sets(st.integers(0, 11), max_size=4))
    logits[list(met)] = -np.inf
    reserved = [i for i in np.argsort(-logits) if untouched[i] and np.isfinite(logits[i])][: min(new, count)]
    others = [i for i in np.argsort(-logits, kind="stable") if i not in reserved][: count - len(reserved)]
    expected = sorted(logits[reserved + others].tolist(), reverse=True)
    found = best(torch.from_numpy(logits)[None], count, torch.from_numpy(untouched), new)[0].numpy()
    assert logits[found].tolist() == expected
    assert set(reserved) <= set(found.tolist())
