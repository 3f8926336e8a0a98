"""What the reranker learns from: lists of shoppers with a history and of strangers, weighed alike; lists that were shown; and what
judges it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

import train_reranker
from catalog import Event, RawProduct
from datasets import sample_shop
from recommender import Recommender, Request
from release import ItemEncoder, Release, report_metrics
from settings import Settings, UserError
from shop_data import ShopData
from store import Impression, ShownList, Store
from tensors import ITEM_DENSE
from text_encoder import TextEncoder
from train_reranker import (
    Lists,
    RerankerOptions,
    best_trusts,
    impressions_to_use,
    ndcg_by_trust,
    place_effect,
    replay,
    shown_requests,
)
from train_user import Retrieved, UserOptions, item_keys, learn_on, retrieve, with_kept

SHOWN = 10  # items a list
LIKED, OTHER = 0.9, 0.4  # how likely an item is taken at the first place; at place p, a p-th of it


def lists(known: list[bool], slices: list[int] | None = None) -> Lists:
    """One list of each shopper: 0, 1, ..."""
    empty = np.zeros((len(known), 1))
    nothing = Retrieved(empty, empty, empty, empty, empty)
    requests = [(user, 0, 0.0) for user in range(len(known))]
    slice_of = np.array(slices or [0] * len(known))
    return Lists(requests, nothing, empty > 0, empty[:, 0], np.array(known), slice_of, empty[:, 0], empty)


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


# --- lists that were shown --------------------------------------------------------------------------------------------


def test_what_is_kept_takes_the_last_places_and_the_order_is_by_score():
    scores = np.array([5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    assert with_kept(np.array([0, 1, 2]), np.array([4]), scores).tolist() == [0, 1, 4]
    assert with_kept(np.array([0, 1, 2]), np.array([2, 5]), scores).tolist() == [0, 2, 5]
    assert with_kept(np.array([0, 1, 2]), np.array([5, 4, 3]), scores).tolist() == [3, 4, 5]
    assert with_kept(np.array([0, 1, 2]), np.array([1]), scores).tolist() == [0, 1, 2]


def test_the_effect_of_the_place_is_found_beside_retrievals():
    """Items are taken by the softmax of their retrieval score and -1.5 times the log of the place; some were not seen."""
    random, count = np.random.default_rng(0), 4000
    place = np.tile(np.arange(1, 7), (count, 1))
    scores = random.normal(size=(count, 6))
    place[:, 5] = 0
    chances = np.exp(scores - 1.5 * np.log(np.maximum(place, 1))) * (place > 0)
    taken = (random.random((count, 1)) > np.cumsum(chances, axis=1) / chances.sum(axis=1, keepdims=True)).sum(axis=1)
    nothing = np.zeros((count, 6))
    found = Retrieved(nothing, scores, nothing, nothing, nothing)
    every, requests, positive = np.arange(count), [(0, 0, 0.0)] * count, np.arange(6) == taken[:, None]
    own = Lists(requests, found, positive, every, every > 0, every, every, place)
    assert place_effect(own, every) == pytest.approx(-1.5, abs=0.1)
    alike = Lists(requests, found, positive, every, every > 0, every, every, place > 0)
    assert place_effect(alike, every) == 0.0


@pytest.fixture(scope="module")
def shop(new_shop):
    """A trained shop in whose held-out days lists were shown, mostly with what is liked (dresses and the like) far down."""
    with new_shop() as settings:
        with Store.open(settings) as store:
            show(store, settings, *lists_of(store, settings))
        yield settings


def liked_products(store: Store) -> set[str]:
    products = store.products.read_features()
    category = max(
        (set(product.std["category"]).pop() for product in products if product.std.get("category")),
        key=lambda value: sum(value in product.std.get("category", ()) for product in products),
    )
    return {product.product_id for product in products if category in product.std.get("category", ())}


def held_out_since(settings: Settings) -> float:
    return float(Release.open(settings.models_dir).manifest["user_tower"]["validation_start"])


def lists_of(store: Store, settings: Settings) -> tuple[list[Impression], list[Event]]:
    """A thousand lists and what was taken out of them: what stands first is taken most, and what is liked, were it first."""
    random = np.random.default_rng(0)
    liked = liked_products(store)
    every = {product.product_id for product in store.products.read_features()}
    groups = [sorted(liked), sorted(every - liked)]
    users = store.events.read().user_ids
    start, end = held_out_since(settings), sample_shop.NOW.timestamp() - 3600
    impressions, events = [], []
    for number in range(1000):
        first, last = (groups[1], groups[0]) if random.random() < 0.9 else (groups[0], groups[1])
        half = SHOWN // 2
        products = [str(one) for part in (first, last) for one in random.choice(part, half, replace=False)]
        user, at = users[random.integers(len(users))], datetime.fromtimestamp(random.uniform(start, end), UTC)
        impressions.append(
            Impression(
                f"l{number}", user, "for_you", "", "r", "default", None, None, None, None, at, products, [0.0] * SHOWN,
                list(range(1, SHOWN + 1)),
            )
        )  # fmt: skip
        events += [
            Event(user_id=user, product_id=one, kind="click", at=at + timedelta(minutes=place), list_id=f"l{number}")
            for place, one in enumerate(products, start=1)
            if random.random() < (LIKED if one in liked else OTHER) / place
        ]
    return impressions, events


def show(store: Store, settings: Settings, impressions: list[Impression], events: list[Event]) -> None:
    store.impressions.put(impressions)
    assert store.events.put(events).stored == len(events)


def options(shop: Settings, **given) -> RerankerOptions:
    return RerankerOptions(**shop.model_dump(), _env_file=None, **given)


def advantage(shop: Settings) -> float:
    """How much higher the release scores what is liked than the rest, for a stranger, in logits."""
    with Store.open(shop) as store:
        liked = liked_products(store)
        recommender = Recommender(store, shop, TextEncoder.load(shop))
        answer = recommender.recommend(Request(k=100, now=sample_shop.NOW.timestamp()))
        scores = {item.product_id: item.score for item in answer.items}
    of_liked = [score for product_id, score in scores.items() if product_id in liked]
    of_others = [score for product_id, score in scores.items() if product_id not in liked]
    return float(np.mean(of_liked) - np.mean(of_others))


def test_what_is_liked_wins_though_it_was_shown_low_and_clicked_less(shop, capsys, monkeypatch):
    with Store.open(shop) as store:
        _, events = lists_of(store, shop)
        liked = liked_products(store)
    of_liked = sum(event.product_id in liked for event in events)
    assert of_liked < len(events) - of_liked  # half of what was shown is liked, and less than half of the clicks
    before = advantage(shop)
    learn = {"impressions": "on", "epochs": 6, "learning_rate": 3e-3, "patience": 6}
    train_reranker.main(options(shop, **learn))
    said = capsys.readouterr().out
    assert "impressions: used, " in said
    manifest = Release.open(shop.models_dir).manifest["reranker"]
    assert manifest["impressions"]["lists"] > 500
    assert f"impressions: {manifest['impressions']['lists']} of them hold" in said
    assert manifest["config"]["item_dense"][-1] == "position"
    with_places = advantage(shop)
    monkeypatch.setattr(train_reranker, "POSITION_DROPOUT", 1.0)
    train_reranker.main(options(shop, **learn))
    without = advantage(shop)
    assert with_places > before + 0.1
    assert without < before


def test_each_list_is_judged_by_how_far_the_model_is_trusted():
    retrieval = torch.tensor([[3.0, 2.0, 0.0], [3.0, 2.0, 0.0]])
    own = torch.tensor([[0.0, 2.0, 3.0], [0.0, 2.0, 3.0]])
    found = ndcg_by_trust(own, retrieval, np.eye(3, dtype=bool)[[0, 2]], np.array([1, 1]))
    assert list(found) == [0.0, 0.25, 0.5, 0.75, 1.0]
    first, second, third = 1.0, 1 / np.log2(3), 0.5
    assert found[0.0] == pytest.approx([first, third])
    assert found[0.5] == pytest.approx([second, third])  # 1.5, 2, 1.5: of equal scores the first stays first
    assert found[1.0] == pytest.approx([third, first])


def test_the_model_is_trusted_with_strangers_as_far_as_it_betters_their_lists():
    known = np.arange(40) < 20
    found = {0.0: np.where(known, 0.5, 0.2), 0.5: np.where(known, 0.5, 0.3), 1.0: np.where(known, 0.1, 0.4)}
    assert best_trusts(found, known) == (0.0, 1.0)
    # Too few strangers say nothing of themselves, and none at all neither.
    few = np.arange(40) < 35
    assert best_trusts({0.0: np.where(few, 0.3, 0.1), 1.0: np.where(few, 0.2, 0.6)}, few) == (0.0, 0.0)
    assert best_trusts({0.0: np.full(40, 0.3), 1.0: np.full(40, 0.4)}, np.ones(40, dtype=bool)) == (1.0, 1.0)


def test_few_lists_are_not_used_and_it_is_said(shop, capsys):
    train_reranker.main(options(shop, epochs=1))
    said = capsys.readouterr().out
    assert "impressions: not used, " in said
    assert "fewer than 1000 (--min-clicked-lists)" in said
    manifest = Release.open(shop.models_dir).manifest["reranker"]
    assert manifest["impressions"]["lists"] == 0
    assert "fewer than 1000" in manifest["impressions"]["why"]
    assert "position" not in manifest["config"]["item_dense"]


def test_each_epoch_is_judged_and_the_best_is_served_by_the_trusts_that_were_chosen(shop, monkeypatch):
    judged = []

    def replayed(*given):
        features, prices = replay(*given)
        features.lists = replace(features.lists, known=np.arange(len(features.lists)) % 2 == 0)
        return features, prices

    def chosen(found, known):
        assert list(found) == [0.0, 0.25]
        judged.append((found[0.25][known].mean(), found[0.0][~known].mean()))
        assert 0.1 < known.mean() < 0.9  # both kinds count the same
        return (0.25, 0.0) if len(judged) == 1 else (0.0, 0.25)

    monkeypatch.setattr(train_reranker, "TRUSTS", (0.0, 0.25))
    monkeypatch.setattr(train_reranker, "best_trusts", chosen)
    monkeypatch.setattr(train_reranker, "replay", replayed)
    train_reranker.main(options(shop, epochs=1))
    manifest = Release.open(shop.models_dir).manifest["reranker"]
    report, config = manifest["report"], manifest["config"]
    first = report["history"][0]
    assert first["ndcg@12"] == pytest.approx(sum(judged[0]) / 2)
    assert first["with history"] == pytest.approx(judged[0][0])
    best = report["history"][report["best_epoch"]]
    assert best["epoch"] == report["best_epoch"]
    expected = (0.25, 0.0) if report["best_epoch"] == 0 else (0.0, 0.25)
    assert (config["trust"], config["stranger_trust"]) == (best["trust"], best["stranger trust"]) == expected


def test_what_counts_as_taking_is_what_counts_in_the_release(store, settings):
    """Not what the settings say by now: its user tower learned from the others."""
    store.products.put([RawProduct(product_id="p", title="p")])
    at = datetime(2026, 6, 1, tzinfo=UTC)
    for kind in ("wishlist", "view"):
        store.impressions.put(
            [Impression(kind, kind, "for_you", "", "r", "default", None, None, None, None, at, ["p"], [0.0], [1])]
        )
        store.events.put([Event(user_id=kind, product_id="p", kind=kind, at=at, list_id=kind)])
    trained = {"validation_start": at.timestamp(), "options": {"event_weights": {"view": 0}}}
    release = cast(Release, SimpleNamespace(manifest={"user_tower": trained}))
    given = settings.model_dump() | {"event_weights": {"wishlist": 0}}
    used, _ = impressions_to_use(store, release, RerankerOptions(**given, _env_file=None, impressions="on"))
    assert [one.user_id for one in used] == ["wishlist"]


def test_where_nothing_was_shown_learning_from_it_is_refused(new_shop):
    with new_shop() as shop, pytest.raises(UserError, match="no list with something taken out of it was logged"):
        train_reranker.main(options(shop, impressions="on"))


def test_a_shown_list_is_a_request_with_what_was_seen_among_its_candidates(shop):
    with Store.open(shop) as store:
        release = Release.open(shop.models_dir)
        encoder = ItemEncoder(release, TextEncoder.load(shop))
        data = ShopData.load(store, encoder, release.manifest["user_tower"]["popularity_windows"])
    ids, start = data.items.product_ids, held_out_since(shop)
    user = data.histories.user_ids[3]
    met = int(data.histories.item[data.histories.starts[3]])

    def shown(seen: list[int] | None, taken: list[str], products: list[str] | None = None) -> ShownList:
        return ShownList(user, "", start + 10.0, products or [ids[0], "gone", ids[met], ids[5]], seen, taken)

    given = [
        shown(None, [ids[5]]),
        shown([1, 2], [ids[5]]),  # what was taken was seen
        shown([4], [ids[5]]),  # nothing seen but what was taken: no choice
        shown(None, ["gone"]),  # nor where what was taken is no more
        ShownList("stranger", "", start, [ids[0], ids[1]], None, [ids[0]]),
    ]
    requests, seen, places = shown_requests(data, given, start, 100)
    assert requests.users.tolist() == [3, 3]
    assert [rows.tolist() for rows in seen] == [[0, met, 5], [0, 5]]
    assert [one.tolist() for one in places] == [[1, 3, 4], [1, 4]]
    assert [answer.tolist() for answer in requests.answers] == [[5], [5]]
    # A shopper may be shown what they met, and it then is a candidate with a score like others.
    tower = release.aligned_user_tower(ids, "user_tower_holdout.pth")
    profiles = release.profile_scaler().transform(data.profiles)
    found = retrieve(tower, data, data.links(start), requests, profiles, 10, 5, kept=seen)
    for row, kept in zip(found.rows, seen, strict=True):
        assert set(kept) <= set(row)
        assert len(set(row)) == 5
    assert np.isfinite(found.scores).all()
    assert (np.diff(found.scores, axis=1) <= 0).all()


def test_histories_of_many_moments_are_those_of_each(shop):
    with Store.open(shop) as store:
        release = Release.open(shop.models_dir)
        encoder = ItemEncoder(release, TextEncoder.load(shop))
        data = ShopData.load(store, encoder, release.manifest["user_tower"]["popularity_windows"])
    histories = data.histories
    users = np.arange(0, len(histories.user_ids), 3)
    # Exactly at an event, which is no history of itself, and before and after all of them.
    moments = histories.at[(histories.starts[users] + histories.starts[users + 1]) // 2]
    moments[:2] = 0.0, np.inf
    together = data.history_as_of(users, moments, 10)
    for row, (user, moment) in enumerate(zip(users, moments, strict=True)):
        own = np.arange(histories.starts[user], histories.starts[user + 1])
        expected = own[histories.at[own] < moment][-10:]
        assert together.index[row][together.mask[row]].tolist() == expected.tolist()
        alone = data.history_as_of(np.array([user]), float(moment), 10)
        assert alone.index[alone.mask].tolist() == expected.tolist()


def test_lists_of_the_last_days_are_of_a_tower_that_learned_what_was_taken_until_then(shop):
    with Store.open(shop) as store:
        release = Release.open(shop.models_dir)
        encoder = ItemEncoder(release, TextEncoder.load(shop))
        data = ShopData.of_release(store, encoder, release)
    features, _ = replay(data, release, options(shop, moments=3), [])
    first, second, last = sorted(features.keys)
    assert first == held_out_since(shop)
    assert {first, second, last} == {moment for _, _, moment in features.lists.requests}
    judging = features.lists.judging()
    assert {features.lists.requests[row][2] for row in np.flatnonzero(judging)} == {last}

    tower = release.aligned_user_tower(data.items.product_ids, "user_tower_holdout.pth")
    profiles = release.profile_scaler().transform(data.profiles)

    def keys(moment: float) -> np.ndarray:
        with torch.no_grad():
            return np.asarray(item_keys(tower, data, data.popularity_as_of(moment)))

    assert np.array_equal(features.keys[first], keys(first))
    assert np.array_equal(features.keys[second], keys(second))
    assert not np.array_equal(features.keys[last], keys(last))
    learned = UserOptions(**release.manifest["user_tower"]["options"], _env_file=None)
    learn_on(tower, data, learned, profiles, last, shop.models_dir, "test")
    assert np.array_equal(features.keys[last], keys(last))

    # What stands in a list and what stands in the history are of one tower: both grow with it.
    every, column = np.arange(len(features.lists)), ITEM_DENSE.index("nearest")
    before = features.batch(every).item_dense[..., column]
    for moment, rows in features.keys.items():
        features.keys[moment] = np.concatenate([2 * rows[:, : features.item_width], rows[:, features.item_width :]], 1)
    near = before > 0.1
    assert near.any()
    assert torch.allclose(features.batch(every).item_dense[..., column][near], 4 * before[near], rtol=1e-4)


def test_what_was_met_is_no_candidate_where_a_shop_has_fewer_products_than_a_list(new_shop):
    with new_shop() as shop:
        with Store.open(shop) as store:
            release = Release.open(shop.models_dir)
            data = ShopData.of_release(store, ItemEncoder(release, TextEncoder.load(shop)), release)
        every_product = options(shop, candidates=len(data.items), moments=1, epochs=1)
        features, _ = replay(data, release, every_product, [])
        own, every = features.lists, np.arange(len(features.lists))
        counts = own.counts(every)
        for row, (user, _, moment) in enumerate(own.requests):
            assert set(own.found.rows[row][~counts[row]]) == set(data.seen(user, moment))
        assert not counts.all()
        batch = features.batch(every)
        assert torch.isfinite(batch.item_dense).all()
        retrieval = batch.item_dense[..., ITEM_DENSE.index("retrieval")].numpy()
        assert np.mean(retrieval, axis=1, where=counts) == pytest.approx(np.zeros(len(own)), abs=1e-4)
        train_reranker.main(every_product)
        assert np.isfinite(Release.open(shop.models_dir).manifest["reranker"]["report"]["best"])


def test_a_log_too_small_to_learn_from_leaves_retrieval_s_order(new_shop, monkeypatch, capsys):
    """A young shop goes live all the same."""
    monkeypatch.setattr(train_reranker, "LEAST_LISTS", 10**6)
    with new_shop() as shop:
        train_reranker.main(options(shop))
        assert "learned nothing, and lists keep retrieval's order" in capsys.readouterr().out
        manifest = Release.open(shop.models_dir).manifest
        assert (manifest["reranker"]["lists"], manifest["reranker"]["config"]["trust"]) == (0, 0.0)
        assert manifest["reranker"]["config"]["stranger_trust"] == 0.0
        assert report_metrics(manifest).keys() == {"item_tower", "user_tower"}
        with Store.open(shop) as store:
            answer = Recommender(store, shop, TextEncoder.load(shop)).recommend(Request("u1", k=20))
    assert [item.retrieval_rank for item in answer.items] == list(range(1, 21))


def test_what_cannot_be_continued_is_refused_before_the_lists_are_made(shop, monkeypatch):
    checkpoint = Release.open(shop.models_dir).folder / "reranker.checkpoint.pt"
    torch.save({"identity": "of other options"}, checkpoint)
    monkeypatch.setattr(train_reranker, "replay", lambda *given: pytest.fail("the work of minutes was begun"))
    with pytest.raises(UserError, match="interrupted run with other options"):
        train_reranker.main(options(shop))
    checkpoint.unlink()
