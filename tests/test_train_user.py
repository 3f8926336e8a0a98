"""The user tower's training, on a shop of two hundred items made by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from item_links import ItemLinks
from model_user import UserTower, UserTowerConfig
from settings import UserError
from shop_data import Requests, ShopData
from store import EventLog
from tensors import DAY, Histories, ItemFeatures, Popularity, ProfileScaler
from text_encoder import Ragged
from train_user import (
    HISTORY_TRUSTS,
    SampledSoftmax,
    UserOptions,
    best,
    doubts,
    item_keys,
    learn,
    learn_on,
    retrieve,
    trusted_config,
)
from training import fit

ITEMS, SHOPPERS, DAYS = 200, 30, 4  # more items than are mined for a request


def shop_of(
    user: np.ndarray, product: np.ndarray, day: np.ndarray, items: int, group: np.ndarray | None = None
) -> ShopData:
    """Events in time order, on items with random vectors; every item alone in its group unless told otherwise."""
    random, shoppers = np.random.default_rng(0), int(user.max()) + 1
    users = [f"u{number:03}" for number in range(shoppers)]
    products = [f"p{number:03}" for number in range(items)]
    log = EventLog(
        users, products, ["view"], [""], user=user, product=product, kind=np.zeros(len(user), dtype=np.int8), at=day * DAY,
        context=np.zeros(len(user), dtype=np.int32),
    )  # fmt: skip
    histories = Histories.build(log, products)
    nothing = np.zeros((items, 1), dtype=np.int32)
    titles = Ragged(np.zeros((0, 3), dtype=np.float32), np.zeros(2, dtype=np.int64))
    vectors = F.normalize(torch.from_numpy(random.normal(size=(items, 5)).astype(np.float32)), dim=-1).numpy()
    return ShopData(
        ItemFeatures(products, nothing, nothing, titles, nothing[:, 0]), vectors, np.ones(items),
        np.arange(items) if group is None else group, histories,
        Popularity.fit(histories.item, histories.at, np.zeros(items), [(7.0, 0.0)]), [{}] * shoppers,
        np.zeros((1, 3), dtype=np.float32), float(histories.at.max()),
    )  # fmt: skip


@pytest.fixture(scope="module")
def shop() -> ShopData:
    """Every shopper meets two random items a day."""
    events = SHOPPERS * DAYS * 2
    product = np.random.default_rng(0).integers(0, ITEMS, events)
    day = np.repeat(np.arange(DAYS), SHOPPERS * 2)
    return shop_of(np.tile(np.arange(SHOPPERS), DAYS * 2), product, day, ITEMS)


def test_nothing_is_aimed_for_on_the_first_day_of_a_log_when_nothing_could_be_known_to_be_wanted():
    day = 20_000 + np.array([0.0, 0.5, 1.0, 2.0])  # half a century after the epoch, as real logs are
    shop = shop_of(np.zeros(4, dtype=np.int64), np.arange(4), day, 4)
    assert shop.targets(0.0, shop.now).tolist() == [2, 3]
    assert shop.targets(day[3] * DAY, shop.now).tolist() == [3]


def test_what_is_hardly_what_it_seems_is_said(monkeypatch):
    monkeypatch.setattr("train_user.CROWD", 4)
    log = shop_of(np.array([0, 0, 0, 1, 1, 1, 1, 2]), np.arange(8), 20_000 + np.arange(8.0), 8)
    people: list[dict[str, float]] = [{"height_cm": 160.0}, {"height_cm": 170.0}, {"height_cm": 1.65}]
    assert doubts(replace(log, profiles=people), ProfileScaler.fit(people[:2])) == [
        "1 values of height_cm are more than 4 standard deviations from the mean, as 1.65 is, and count as so many; are they in "
        "another unit?",
        "shopper 'u001' has 4 events, 50% of all; a robot, or many people under one name? "
        "Who has no account is known by a session_id",
    ]


def test_a_robot_that_meets_everything_teaches_no_more_than_its_latest_examples(monkeypatch):
    monkeypatch.setattr("shop_data.MOST_TARGETS", 3)
    user, product = np.array([0, *[1] * 8, 2, 2]), np.array([0, *range(8), 5, 6])
    day = 20_000 + np.array([0.0, *range(2, 10), 2.0, 3.0])
    order = np.argsort(day, kind="stable")
    shop = shop_of(user[order], product[order], day[order], 8)
    taught = shop.targets(0.0, shop.now)
    assert shop.histories.user[taught].tolist() == [1, 1, 1, 2, 2]
    assert shop.histories.item[taught].tolist() == [5, 6, 7, 5, 6]


def test_histories_hold_what_index_rows_hold_adapted_or_not(shop):
    random = np.random.default_rng(0)
    std, re = random.integers(0, 9, (ITEMS, 2)), random.integers(0, 7, (ITEMS, 3))
    shop = replace(shop, items=replace(shop.items, std=std, re=re))
    for adapter in (False, True):
        config = UserTowerConfig(ITEMS, 5, shop.popularity.width, 0, 3, 4, adapter, 9, 7, width=16, heads=2)
        tower = UserTower(config)
        for weight in tower.parameters():
            torch.nn.init.normal_(weight)  # an adapter that has learned
        every = torch.from_numpy(shop.vectors), torch.from_numpy(std), torch.from_numpy(re)
        turned = tower.adapted(*every)
        assert torch.allclose(turned, every[0]) != adapter
        popularity, index = shop.popularity_as_of(shop.now), shop.history_as_of(np.array([3]), shop.now, 5)
        no_profiles = np.zeros((SHOPPERS, 0), dtype=np.float32)
        one = np.zeros(1, dtype=np.int64)
        batch = shop.user_batch(tower, index, one + 3, one, one + shop.now, no_profiles, popularity)
        rows = item_keys(tower, shop, popularity)[shop.histories.item[index.index]]
        assert torch.allclose(batch.history, turned[shop.histories.item[index.index]], atol=1e-6)
        assert torch.allclose(batch.history, rows[..., :5], atol=1e-6)
        assert torch.allclose(batch.collaborative, rows[..., -4:], atol=1e-6)


def test_an_adapter_learns_from_what_was_taken_what_an_item_that_nobody_met_is_to_whom(tmp_path):
    """Shoppers keep to one of two styles, of which the item tower's vectors know nothing: they are all the same."""
    random, style = np.random.default_rng(0), np.arange(ITEMS) % 2
    user, day = np.repeat(np.arange(SHOPPERS), 8), np.tile(np.arange(8), SHOPPERS)
    met = 2 * random.integers(0, ITEMS // 2 - 1, len(user)) + user % 2  # never the last two items
    order = np.argsort(day, kind="stable")
    shop = shop_of(user[order], met[order], day[order], ITEMS)
    same = np.full((ITEMS, 5), 5**-0.5, dtype=np.float32)
    words = (3 + style).astype(np.int32)[:, None]
    shop = replace(shop, vectors=same, items=replace(shop.items, std=words))

    torch.manual_seed(0)
    tower = UserTower(UserTowerConfig(ITEMS, 5, shop.popularity.width, 0, 3, 0, True, 5, 3, width=16, heads=2))
    given = UserOptions(_env_file=None, epochs=8, batch_size=16, learning_rate=0.01, checkpoint_seconds=0)
    no_profiles = np.zeros((SHOPPERS, 0), dtype=np.float32)
    learn(tower.train(), shop, given, no_profiles, shop.now, tmp_path, "user")
    users, now = np.arange(SHOPPERS), np.full(SHOPPERS, shop.now)
    popularity, index = shop.popularity_as_of(shop.now), shop.history_as_of(users, shop.now, 5)
    with torch.no_grad():
        query = tower.eval()(shop.user_batch(tower, index, users, np.zeros_like(users), now, no_profiles, popularity))
        scores = (query @ item_keys(tower, shop, popularity)[-2:].T).numpy()
    assert (scores.argmax(axis=1) == users % 2).mean() > 0.9


def softmax_of(shop: ShopData, tower: UserTower, given: UserOptions, end: float) -> SampledSoftmax:
    return SampledSoftmax(shop, tower, given, shop.profile_scaler(end).transform(shop.profiles), end)


def train(shop: ShopData, folder: Path, killed_at: int = 0) -> tuple[dict[str, torch.Tensor], int]:
    """Weights after three epochs with mined negatives, fewer than there are items, and how many steps that took."""
    given = UserOptions(_env_file=None, epochs=3, batch_size=16, negatives=16, learning_rate=0.01, checkpoint_seconds=0)
    torch.manual_seed(0)
    tower = UserTower(UserTowerConfig(ITEMS, 5, shop.popularity.width, 0, 3, collaborative=4, width=16, heads=2))
    softmax, calls = softmax_of(shop, tower, given, shop.now), count(1)

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


def test_figures_that_are_not_read_are_in_no_profile_and_unknown_ones_are_named(shop):
    bodies = replace(shop, profiles=[{"height_cm": 170.0, "age": 30.0}, {"age": 40.0}, {}])
    assert bodies.without_figures(["height_cm"]).profiles == [{"age": 30.0}, {"age": 40.0}, {}]
    assert bodies.without_figures([]).profiles == bodies.profiles
    with pytest.raises(UserError, match=r"no profile has \['weight_kg'\]; there are \['age', 'height_cm'\]"):
        bodies.without_figures(["height_cm", "weight_kg"])


# --------------------------------------------------------------------------------------------------------------- links
PAIRS = 24
OFTEN = 5  # shoppers who take both items of a pair


def pairs_shop(often: int, group: np.ndarray | None = None) -> ShopData:
    """A checkerboard of pairs, item 2n and item 2n + 1: of each, `often` shoppers take the one and two days later the other,
    and one shopper, the last of all, only the first. Vectors know nothing of it."""
    pair = np.repeat(np.arange(PAIRS), often)
    both, alone = np.arange(PAIRS * often), PAIRS * often + np.arange(PAIRS)
    return shop_of(
        np.concatenate([both, alone, both]), np.concatenate([2 * pair, 2 * np.arange(PAIRS), 2 * pair + 1]),
        np.concatenate([np.zeros(len(both) + PAIRS), np.full(len(both), 2.0)]), 2 * PAIRS, group,
    )  # fmt: skip


def tower_without_collaborative(shop: ShopData) -> UserTower:
    torch.manual_seed(0)
    items = len(shop.items)
    return UserTower(
        UserTowerConfig(items, 5, shop.popularity.width, 0, 3, collaborative=0, width=16, heads=2, dropout=0.0)
    )


def losses(shop: ShopData, weights: tuple[float, float], forget: float = 0.0, forget_links: float = 0.0) -> list[float]:
    """The loss of every target alone, the tower untrained, when links weigh so much more than at the start."""
    tower = tower_without_collaborative(shop)
    tower.link_growth.data = torch.tensor(weights)
    given = UserOptions(_env_file=None, forget=forget, forget_links=forget_links)
    softmax = softmax_of(shop, tower, given, shop.now)
    return [softmax.loss(tower, np.array([row])).item() for row in softmax.targets]


def test_an_example_does_not_find_its_answer_in_the_table():
    """Where nobody but the shopper took a pair, its link is worth nothing; where others did, it is."""
    assert losses(pairs_shop(1), (-0.1, 0.0)) == losses(pairs_shop(1), (0.0, 0.0))
    for weak, strong in zip(losses(pairs_shop(2), (-0.1, 0.0)), losses(pairs_shop(2), (0.0, 0.0)), strict=True):
        assert strong < weak - 0.1


def test_links_that_are_forgotten_say_nothing_and_variants_still_do():
    group = np.arange(2 * PAIRS) // 2
    shop, nearly_all = pairs_shop(OFTEN, group), 1.0 - 1e-7
    assert losses(shop, (0.0, 0.0), forget_links=nearly_all) == losses(shop, (0.1, 0.0), forget_links=nearly_all)
    assert losses(shop, (0.0, 0.0), forget_links=nearly_all) != losses(shop, (0.0, 0.1), forget_links=nearly_all)


def test_what_the_shopper_took_later_is_no_competitor_and_what_lies_after_the_end_is_not_known_to_be():
    """One shopper takes 0, 1 and 2 on three days, another 3 and 4. All scores are equal: the loss says how many compete."""
    shop = shop_of(np.array([0, 0, 0, 1, 1]), np.arange(5), np.array([0.0, 2.0, 4.0, 0.0, 2.0]), 5)
    tower = tower_without_collaborative(shop)
    for weight in tower.parameters():
        weight.data.zero_()
    tower.link_growth.data.fill_(-1.0)

    def competitors(end: float) -> list[float]:
        softmax = softmax_of(shop, tower, UserOptions(_env_file=None), end)
        return [np.exp(softmax.loss(tower, np.array([row])).item()) for row in softmax.targets]

    assert competitors(shop.now) == pytest.approx([3.0, 3.0, 4.0], rel=1e-4)  # of 1 and of 2 itself, 3 and 4
    assert competitors(3 * DAY) == pytest.approx([4.0, 4.0], rel=1e-4)  # of 1 itself, 2, 3 and 4


@pytest.mark.parametrize("hard_share", [0.0, 0.5])
def test_the_sampled_denominator_is_that_of_the_full_softmax_on_average(shop, hard_share):
    """Each candidate counts by the inverse of how likely it was to be there (Horvitz and Thompson), the batch's own aside."""
    given = UserOptions(_env_file=None, negatives=100, hard_share=hard_share)
    softmax = softmax_of(shop, tower_without_collaborative(shop), given, shop.now)
    softmax.hard_share_of = np.arange(ITEMS) / np.arange(ITEMS).sum()
    worth, draws = np.random.default_rng(1).random(ITEMS), 4000
    torch.manual_seed(0)
    sums = []
    for targets in np.random.default_rng(2).choice(softmax.shop.histories.item[softmax.targets], (draws, 16)):
        candidates, log_inclusion = softmax._candidates(targets)
        sums.append((worth[candidates] / np.exp(log_inclusion.numpy())).sum())
    assert np.mean(sums) == pytest.approx(worth.sum(), rel=0.02)


def test_the_target_competes_for_certain_against_as_many_as_there_are(shop):
    """Scores are all equal: whatever is drawn, on average the target is one of all that the shopper did not take."""
    tower = tower_without_collaborative(shop)
    for weight in tower.parameters():
        weight.data.zero_()
    tower.link_growth.data.fill_(-1.0)
    softmax = softmax_of(shop, tower, UserOptions(_env_file=None, negatives=100, hard_share=0.0), shop.now)
    row, draws = softmax.targets[:1], 500
    taken = len(np.unique(shop.histories.item[shop.histories.user == shop.histories.user[row]]))
    torch.manual_seed(0)
    competitors = np.mean([np.exp(softmax.loss(tower, row).item()) for _ in range(draws)])
    assert competitors == pytest.approx(ITEMS - taken + 1, rel=0.03)


def test_variants_of_what_was_met_weigh_in_the_loss():
    group = np.arange(2 * PAIRS) // 2
    for weak, strong in zip(
        losses(pairs_shop(1, group), (0.0, -1.0)), losses(pairs_shop(1, group), (0.0, 0.0)), strict=True
    ):
        assert strong < weak - 0.1


def test_a_hidden_history_links_to_nothing():
    group = np.arange(2 * PAIRS) // 2
    hidden = 1.0 - 1e-7
    shop = pairs_shop(OFTEN, group)
    assert losses(shop, (0.0, 0.0), hidden) == losses(shop, (0.1, 0.1), hidden)
    assert losses(shop, (0.0, 0.0)) != losses(shop, (0.1, 0.1))


def test_partners_are_retrieved_first_when_links_alone_know_them(tmp_path):
    shop = pairs_shop(OFTEN)
    given = UserOptions(_env_file=None, epochs=4, batch_size=16, learning_rate=0.01, collaborative=0)
    tower = tower_without_collaborative(shop)
    softmax = softmax_of(shop, tower, given, shop.now)
    fit(
        tower, softmax.batches, softmax.loss, lambda model: {"epochs": 0.0}, "epochs", given, tmp_path, "user",
        keep_best=False,
    )  # fmt: skip
    assert tower.link_weights.together > UserTower(tower.config).link_weights.together  # learned to trust them
    users = PAIRS * OFTEN + np.arange(PAIRS)
    requests = Requests(users, np.zeros(PAIRS, dtype=np.int64), [np.array([2 * n + 1]) for n in range(PAIRS)], shop.now)
    profiles = np.zeros((PAIRS * (OFTEN + 1), 0), dtype=np.float32)

    found = retrieve(tower, shop, shop.links(shop.now), requests, profiles, 30, 10)
    assert found.rows[:, 0].tolist() == [2 * n + 1 for n in range(PAIRS)]
    damping = 1 / np.sqrt([OFTEN + 1 + 3, OFTEN + 3])  # of the item that the last shoppers took too, and of its partner
    np.testing.assert_allclose(found.together[:, 0], OFTEN * damping.prod(), rtol=1e-5)
    assert not found.together[:, 1:].any()
    assert not found.variant.any()

    none = np.zeros(0, dtype=np.int64)
    unlinked = retrieve(tower, shop, ItemLinks.build(none, none, shop.group), requests, profiles, 30, 10)
    assert (unlinked.rows[:, 0] == found.rows[:, 0]).mean() < 0.5


def test_requests_are_taken_and_joined_with_all_that_belongs_to_them():
    shop = pairs_shop(OFTEN)
    requests = Requests(np.arange(6), np.zeros(6, dtype=np.int64), [np.array([1])] * 6, shop.now)
    found = retrieve(
        tower_without_collaborative(shop).eval(),
        shop,
        shop.links(DAY),
        requests,
        np.zeros((6, 0), dtype=np.float32),
        30,
        10,
    )
    again = type(found).joined([found.take(np.array([0, 1])), found.take(np.array([2, 3, 4, 5]))])
    for name in ("rows", "scores", "together", "variant", "queries"):
        np.testing.assert_array_equal(getattr(found, name), getattr(again, name))


@pytest.mark.parametrize(("growth", "borne_out", "trust"), [(0.05, True, 1.0), (0.3, False, 0.0), (0.0, True, 2.0)])
def test_links_are_trusted_as_far_as_later_days_bear_them_out(growth, borne_out, trust):
    """Shoppers who met the one item of a pair take its partner, or else what the tower would show them if there were no links."""
    shop = pairs_shop(OFTEN)
    tower = tower_without_collaborative(shop).eval()
    tower.link_growth.data.fill_(growth)  # 0.05: more than what is between two items without links; 0: hardly enough
    links, profiles = shop.links(shop.now), np.zeros((PAIRS * (OFTEN + 1), 0), dtype=np.float32)
    users = PAIRS * OFTEN + np.arange(PAIRS)
    partners = [np.array([2 * n + 1]) for n in range(PAIRS)]
    requests = Requests(users, np.zeros(PAIRS, dtype=np.int64), partners, shop.now)
    if not borne_out:
        tower.config = replace(tower.config, link_trust=0.0)
        first = retrieve(tower, shop, links, requests, profiles, 30, 1).rows
        assert first[:, 0].tolist() != np.concatenate(partners).tolist()
        requests = replace(requests, answers=list(first))
    tower.config = replace(tower.config, history_trust=0.5, link_trust=0.25)  # what counted before is no matter
    assert trusted_config(tower, shop, links, requests, profiles, 30, 1).link_trust == trust


@pytest.mark.parametrize("trust", HISTORY_TRUSTS)
def test_histories_are_trusted_as_far_as_later_days_bear_them_out(trust):
    """Shoppers take what a tower finds for them that trusts their histories so far."""
    torch.manual_seed(0)
    shop = pairs_shop(OFTEN)
    none = np.zeros(0, dtype=np.int64)
    links, profiles = ItemLinks.build(none, none, shop.group), np.zeros((PAIRS * (OFTEN + 1), 0), dtype=np.float32)
    tower = tower_without_collaborative(shop).eval()
    config = tower.config
    users = np.arange(PAIRS * OFTEN)
    requests = Requests(users, np.zeros_like(users), [np.array([0])] * len(users), shop.now)
    tower.config = replace(config, history_trust=trust)
    found = retrieve(tower, shop, links, requests, profiles, 30, 5).rows
    tower.config = config
    requests = replace(requests, answers=list(found))
    assert trusted_config(tower, shop, links, requests, profiles, 30, 5) == replace(config, history_trust=trust)
    assert tower.config == config


def test_a_tower_that_learns_on_learns_what_was_taken_until_then_and_nothing_of_later(tmp_path):
    """Everybody takes items 0 to 9 on day 2, and 10 to 19 on day 3."""
    shoppers = 30
    day = np.repeat([0.0, 2.0, 3.0], shoppers)
    product = np.concatenate([part + np.arange(shoppers) % 10 for part in (20, 0, 10)])
    user = np.tile(np.arange(shoppers), 3)
    shop = shop_of(user, product, day, 40)
    before_that = shop_of(user[: 2 * shoppers], product[: 2 * shoppers], day[: 2 * shoppers], 40)
    profiles = np.zeros((shoppers, 0), dtype=np.float32)
    given = UserOptions(_env_file=None, batch_size=2, learning_rate=0.1, collaborative=0)

    def chance(tower: UserTower) -> np.ndarray:
        """Of items 0 to 9, and of 10 to 19, for shoppers as of day 2."""
        requests = Requests(
            np.arange(shoppers), np.zeros(shoppers, dtype=np.int64), [np.array([0])] * shoppers, 2 * DAY
        )
        found = retrieve(tower, shop, shop.links(2 * DAY), requests, profiles, 30, 39)
        shares = np.exp(found.scores) / np.exp(found.scores).sum(axis=1, keepdims=True)
        return np.array([(shares * (found.rows // 10 == ten)).sum(axis=1).mean() for ten in (0, 1)])

    def learned(shop: ShopData, end: float) -> np.ndarray:
        torch.manual_seed(0)
        tower = tower_without_collaborative(shop).eval()
        tower.config = trusted = replace(tower.config, history_trust=0.5, link_trust=0.25)
        learn_on(tower, shop, given, profiles, end, tmp_path, "on")
        assert tower.config == trusted
        assert not tower.training
        return chance(tower)

    torch.manual_seed(0)
    untaught = chance(tower_without_collaborative(shop).eval())
    until_third = learned(shop, 3 * DAY)
    assert until_third[0] > untaught[0] + 0.1
    np.testing.assert_array_equal(learned(before_that, 3 * DAY), until_third)
    assert np.abs(learned(shop, shop.now) - until_third).max() > 0.01
    assert not list(tmp_path.glob("*.pt"))
