"""Kinds of list and the reasons of their items, through the whole pipeline and over HTTP, on a small trained shop."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

import list_kinds
from catalog import Event, Product, RawProduct
from datasets import sample_shop
from lexicon import LEXICON, Lexicon
from list_kinds import ListKinds, RequestError, due_score, interval_days
from loaded_release import UnavailableError
from readers import LexiconReader
from recommender import Answer, Recommended, Recommender, Request
from rules import DEFAULT, NamedRules, RuleSet
from store import Filters, Purchases, Store
from tensors import DAY, LinkWeights
from text_encoder import TextEncoder

NOW = sample_shop.NOW.timestamp()


@pytest.fixture(scope="module")
def asked(shop):
    """The store and the pipeline over the trained shop."""
    with Store.open(shop) as store:
        yield store, Recommender(store, shop, TextEncoder.load(shop))


def ids(answer: Answer) -> list[str]:
    return [item.product_id for item in answer.items]


def scores(answer: Answer) -> dict[str, float]:
    return {item.product_id: item.score for item in answer.items}


def categories(store: Store) -> dict[str, list[str]]:
    return {product.product_id: product.std["category"] for product in store.products.read_features()}


def few(store: Store) -> Filters:
    """Keeps fewer products than are considered: then leaving something out changes scores, and not who is compared."""
    prices = store.products.read_commerce().price
    return Filters(max_price=float(np.sort(prices[np.isfinite(prices)])[80]))


# ---------------------------------------------------------------------------------------------------------------- why
def weights(item: Recommended, *kinds: str) -> dict[str, float]:
    """Of an item's reasons of those kinds: what they name -> weight."""
    return {r.product_id or r.field or r.value: r.weight for r in item.reasons if r.kind in kinds}


PRODUCTS = ("history", "taken_together", "variant", "because")


def test_leaving_out_the_product_that_a_reason_names_costs_the_item_its_weight(asked):
    """Among few products exactly that; the history holds one product twice."""
    store, recommender = asked
    history = store.events.read().product_ids[:40:5]
    history = [*history, history[1]]
    request = Request(history=history, exclude=history, filters=few(store), k=100, now=NOW)
    whole = recommender.recommend(request)
    assert len(whole.items) < 100
    checked = 0
    for left in dict.fromkeys(history):
        without = scores(recommender.recommend(replace(request, history=[h for h in history if h != left])))
        for item in whole.items:
            if left in (named := weights(item, *PRODUCTS)):
                assert named[left] == pytest.approx(item.score - without[item.product_id], abs=2e-3)
                assert without[item.product_id] < item.score
                checked += 1
    assert checked > len(whole.items) / 2


def test_a_product_that_is_not_sold_any_more_is_no_reason(new_shop):
    """Its row stays where it was deleted while an index was built; what was done with it goes on counting."""
    with new_shop() as shop, Store.open(shop) as store:
        recommender = Recommender(store, shop, TextEncoder.load(shop))
        history = store.events.read().product_ids[3:60:8]
        request = Request(history=history, exclude=history, k=20, now=NOW)
        before = recommender.recommend(request)
        named = {product_id for item in before.items for product_id in weights(item, *PRODUCTS)} & {*history}
        gone = min(named)
        with store.pool.connection() as connection:
            connection.execute("DELETE FROM products WHERE product_id = %s", (gone,))
        after = recommender.recommend(request)
        assert scores(after) == pytest.approx(scores(before))
        told = {product_id for item in after.items for product_id in weights(item, *PRODUCTS)}
        assert gone not in told
        assert named - {gone} <= told  # another may be told in its place


def test_without_the_product_of_the_top_reason_an_item_falls_in_a_whole_search_too(asked):
    """There the other candidates change as well, and the list that scores are relative to."""
    store, recommender = asked
    history = store.events.read().product_ids[3:60:8]
    request = Request(history=history, exclude=history, k=20, now=NOW)
    right = []
    for item in recommender.recommend(request).items:
        named = weights(item, *PRODUCTS)
        if not named:
            continue
        top = max(named, key=lambda name: named[name])
        rest = [product_id for product_id in history if product_id != top]
        without = scores(recommender.recommend(replace(request, history=rest, k=100)))
        if item.product_id in without:
            fall = item.score - without[item.product_id]
            right.append(fall > 0 and 0.5 < fall / named[top] < 2.0)
    assert len(right) > 5
    assert np.mean(right) > 0.7


@pytest.mark.parametrize(
    ("part", "kind"),
    [({"context": "beach vacation"}, "context"), ({"profile": {"height_cm": 150.0, "weight_kg": 90.0}}, "body")],
)
def test_context_and_body_have_reasons_of_their_own_and_no_others_of_the_shopper(asked, part, kind):
    store, recommender = asked
    request = Request(filters=few(store), k=100, now=NOW)
    whole = recommender.recommend(replace(request, **part))
    kinds = {reason.kind for item in whole.items for reason in item.reasons}
    assert kind in kinds
    assert not kinds & ({"history", "taken_together", "variant", "because", "context", "body"} - {kind})
    if kind == "context":
        without = scores(recommender.recommend(request))
        for item in whole.items:
            for reason in item.reasons:
                if reason.kind == kind:
                    assert reason.weight == pytest.approx(item.score - without[item.product_id], abs=2e-3)
    for figure, value in part.get("profile", {}).items():
        without = scores(recommender.recommend(replace(request, profile={**part["profile"], figure: math.nan})))
        for item in whole.items:
            for reason in item.reasons:
                if reason.field == figure:
                    assert reason.value == f"{value:g}"
                    assert reason.weight == pytest.approx(item.score - without[item.product_id], abs=2e-3)


def test_an_attribute_weighs_what_the_reranker_loses_without_it(new_shop):
    with new_shop() as shop, Store.open(shop) as store:
        recommender = Recommender(store, shop, TextEncoder.load(shop))
        request = Request(history=store.events.read().product_ids[:3], filters=few(store), k=100, now=NOW)
        whole = recommender.recommend(request)
        loaded = recommender.live()
        checked = 0
        for item in whole.items[:12]:
            attributes = [reason for reason in item.reasons if reason.kind == "attribute"]
            for reason in attributes:
                vocab = loaded.encoder.std_vocab if reason.field in loaded.std_fields else loaded.encoder.re_vocab
                word_id = vocab.id(reason.field, reason.value)
                row = store.vectors.fetch(loaded.name, [item.product_id])
                bare = replace(
                    row,
                    std_ids=np.where(row.std_ids == word_id, 0, row.std_ids)
                    if reason.field in loaded.std_fields
                    else row.std_ids,
                    re_ids=row.re_ids
                    if reason.field in loaded.std_fields
                    else np.where(row.re_ids == word_id, 0, row.re_ids),
                )
                store.vectors.upsert(loaded.name, bare)  # the vector stays: the reranker alone loses the attribute
                without = scores(recommender.recommend(replace(request, explain=False)))
                store.vectors.upsert(loaded.name, row)
                assert reason.weight == pytest.approx(item.score - without[item.product_id], abs=2e-3)
                checked += 1
        assert checked


def test_reasons_have_words_in_both_languages_and_the_heaviest_first(asked):
    store, recommender = asked
    user = store.events.read().user_ids[0]
    for item in recommender.recommend(Request(user, context="beach vacation", k=50, now=NOW)).items:
        assert 1 <= len(item.reasons) <= 4
        assert all(reason.text["en"] and reason.text["ko"] for reason in item.reasons)
        told = [reason.weight for reason in item.reasons]
        assert told[:-1] == sorted(told[:-1], reverse=True)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({}, "you put into the cart"),
        ({"cart": 0.5, "wishlist": 0.5}, "you looked at"),
        ({"wishlist": 3.0}, "you showed interest in"),
        ({"skip": 9.0}, "you passed over"),
        ({"view": -2.0, "cart": -2.0, "skip": -2.0, "wishlist": -1.0}, "you came across"),
    ],
)
def test_of_all_that_was_done_with_a_product_a_reason_names_what_the_shop_counts_most(asked, weights, words):
    store, recommender = asked
    product_id = store.events.read().product_ids[9]  # one that moves much of its shopper's list
    store.events.put(
        [
            Event(
                event_id=kind, user_id="doer", product_id=product_id, kind=kind, at=sample_shop.NOW - timedelta(days=1)
            )
            for kind in ("view", "cart", "wishlist", "skip")
        ]
    )
    weighing = Recommender(
        store, recommender.settings.model_copy(update={"event_weights": weights}), recommender.text_encoder
    )
    answer = weighing.recommend(Request("doer", filters=few(store), k=100, now=NOW))
    named = [reason for item in answer.items for reason in item.reasons if reason.kind == "history"]
    assert named
    assert {reason.text["en"].split(" “")[0] for reason in named} == {f"Because {words}"}


def test_what_the_shop_counts_for_nothing_is_no_look(asked):
    store, recommender = asked
    wanted, ignored = store.events.read().product_ids[:2]
    for product_id, kind, hour in ((wanted, "cart", 1), (ignored, "dismiss", 2)):
        at = sample_shop.NOW - timedelta(days=1) + timedelta(hours=hour)
        store.events.put([Event(user_id="dismisser", product_id=product_id, kind=kind, at=at)])
    request = Request("dismisser", kind="because", k=1, now=NOW)
    assert recommender.recommend(request).anchor.product_id == ignored  # a shop's own kind counts as a look
    settings = recommender.settings.model_copy(update={"event_weights": {"dismiss": 0.0}})
    assert Recommender(store, settings, recommender.text_encoder).recommend(request).anchor.product_id == wanted


def test_reasons_can_be_left_out(asked):
    answer = asked[1].recommend(Request(context="office", k=5, now=NOW, explain=False))
    assert [item.reasons for item in answer.items] == [[]] * 5
    assert ids(answer) == ids(asked[1].recommend(Request(context="office", k=5, now=NOW)))


# -------------------------------------------------------------------------------------------------------------- similar
def test_similar_is_the_same_for_everybody_and_what_the_product_page_shows(asked):
    store, recommender = asked
    product_id = store.events.read().product_ids[0]
    answer = recommender.recommend(Request(kind="similar", product_id=product_id, k=10, now=NOW))
    assert answer.kind == "similar"
    assert answer.anchor.product_id == product_id
    assert product_id not in ids(answer)
    assert ids(answer) == ids(recommender.similar(product_id, 10))
    told = replace(Request(kind="similar", product_id=product_id, k=10, now=NOW), context="wedding")
    assert ids(recommender.recommend(told)) == ids(answer)
    reason = answer.items[0].reasons[0]
    assert (reason.kind, reason.product_id, reason.title) == ("similar", product_id, answer.anchor.title)


def test_the_product_page_obeys_the_live_rules(asked):
    store, recommender = asked
    product_id = store.events.read().product_ids[0]
    plain = ids(recommender.similar(product_id, 3))
    pin = RuleSet.model_validate([{"kind": "pin", "product_id": plain[2], "place": 1}])
    store.rules.put(DEFAULT, pin, "", "", live=True)
    pinned = ids(recommender.similar(product_id, 3))
    store.rules.put(DEFAULT, RuleSet([]), "", "", live=True)
    assert pinned == [plain[2], plain[0], plain[1]]


# -------------------------------------------------------------------------------------------------------------- because
def test_because_is_nearer_to_its_product_than_the_shoppers_own_list_and_more_to_their_taste_than_similar(
    asked, monkeypatch
):
    """And so it is the more, the more of the scale its product has: half of it is less near than all, and more wanted.

    Nearness is told as the share of the way from the shopper's own list to `similar`: how far these two are apart is the
    release's own, and each training makes another."""
    store, recommender = asked
    loaded = recommender.live()
    log = store.events.read()
    # Of each shopper: of their own list, `similar`, `because`, and `because` with all of the scale.
    likeness, wish = [], []
    for user, product_id in zip(log.user_ids[:30], log.product_ids[-30:], strict=True):

        def answer(kind, user=user, product_id=product_id, k=10):
            named = None if kind == "for_you" else product_id
            return recommender.recommend(Request(user, kind=kind, k=k, now=NOW, product_id=named))

        lists = [answer("for_you"), answer("similar"), answer("because")]
        with monkeypatch.context() as patch:
            patch.setattr(list_kinds, "ABOUT_SHARE", 1.0)
            lists.append(answer("because"))
        assert lists[2].anchor.product_id == product_id
        assert product_id not in ids(lists[2])
        anchor = store.vectors.fetch(loaded.name, [product_id]).vectors[0, : loaded.item_width]
        own = scores(answer("for_you", k=100))
        rows = [store.vectors.fetch(loaded.name, ids(made)).vectors[:, : loaded.item_width] for made in lists]
        likeness.append([float((vectors @ anchor).mean()) for vectors in rows])
        wish.append([np.mean([own.get(id_, min(own.values())) for id_ in ids(made)]) for made in lists])
    for_you, similar, because, by_all = np.mean(likeness, axis=0)
    assert 0.15 < (because - for_you) / (similar - for_you) < (by_all - for_you) / (similar - for_you) - 0.05
    _, of_similar, of_because, of_all = np.mean(wish, axis=0)
    assert of_similar + 0.1 < of_all < of_because - 0.05


def test_because_of_the_latest_look_names_it(asked):
    store, recommender = asked
    looked, bought, skipped = store.events.read().product_ids[:3]
    for product_id, kind, hour in ((looked, "view", 1), (bought, "purchase", 2), (skipped, "skip", 3)):
        at = sample_shop.NOW - timedelta(days=1) + timedelta(hours=hour)
        store.events.put([Event(user_id="looker", product_id=product_id, kind=kind, at=at)])
    answer = recommender.recommend(Request("looker", kind="because", k=10, now=NOW))
    assert (answer.kind, answer.anchor.product_id) == ("because", looked)
    named = [reason for item in answer.items for reason in item.reasons if reason.kind == "because"]
    assert named
    assert all(reason.product_id == looked and "looked at" in reason.text["en"] for reason in named)


def test_because_of_nothing_is_the_list_for_the_shopper_and_says_so(asked):
    answer = asked[1].recommend(Request("nobody-yet", kind="because", k=5, now=NOW))
    assert (answer.kind, answer.anchor, len(answer.items)) == ("for_you", None, 5)
    assert any("nothing was looked at" in warning for warning in answer.warnings)


# --------------------------------------------------------------------------------------------------------------- basket
def test_a_basket_is_completed_by_other_categories_and_what_was_taken_together_with_it_comes_first(new_shop):
    with new_shop() as shop, Store.open(shop) as store:
        recommender = Recommender(store, shop, TextEncoder.load(shop))
        name, of = recommender.live().name, categories(store)
        recommender.live().link_weights = LinkWeights(0.0, 0.0)  # as if later days bore none of them out
        cart = next(iter(of))
        far = [product_id for product_id in of if not set(of[product_id]) & set(of[cart])][::40][:3]
        same = next(product_id for product_id in of if product_id != cart and of[product_id] == of[cart])
        with store.pool.connection() as connection:  # an index row's links are written once, when the index is built
            connection.execute(
                f'UPDATE "item_vectors_{name}" SET linked = %s, link_strength = %s WHERE product_id = %s',
                ([*far, same], [0.9, 0.9, 0.9, 0.95], cart),
            )
        answer = recommender.recommend(Request(kind="basket", cart=[cart], k=100, now=NOW))
        assert answer.kind == "basket"
        assert len(answer.items) == 100
        assert set(ids(answer)[:3]) == set(far)
        assert cart not in ids(answer)
        assert not any(set(of[product_id]) & set(of[cart]) for product_id in ids(answer))
        for item in answer.items[:3]:
            assert (item.reasons[0].kind, item.reasons[0].product_id) == ("taken_together", cart)
        # What was chosen stays out of what completes it: the category of the first complement goes too.
        more = recommender.recommend(Request(kind="basket", cart=[cart, far[0]], k=50, now=NOW))
        assert not any(set(of[product_id]) & {*of[cart], *of[far[0]]} for product_id in ids(more))


def test_a_basket_offers_nothing_of_a_category_that_came_after_training_and_tells_of_a_product_without_one(new_shop):
    with new_shop() as shop, Store.open(shop) as store:
        recommender = Recommender(store, shop, TextEncoder.load(shop))
        schema = store.schema()
        umbrellas = [f"umbrella-{number}" for number in range(5)]
        store.put_schema(
            schema.model_copy(update={"std": {**schema.std, "category": [*schema.std["category"], "umbrella"]}})
        )
        recommender.put_products(
            [RawProduct(product_id=one, title="Umbrella", attributes={"category": "umbrella"}) for one in umbrellas],
            LexiconReader(Lexicon.load(LEXICON)),
        )
        assert set(ids(recommender.recommend(Request(kind="similar", product_id=umbrellas[0], k=4)))) == set(
            umbrellas[1:]
        )
        answer = recommender.recommend(Request(kind="basket", cart=umbrellas[:1], k=100))
        assert (answer.kind, answer.warnings, len(answer.items)) == ("basket", [], 100)
        assert not set(ids(answer)) & set(umbrellas)
        recommender.put_products([RawProduct(product_id="thing", title="Thing")], LexiconReader(Lexicon.load(LEXICON)))
        answer = recommender.recommend(Request(kind="basket", cart=["thing"], k=5))
        assert (answer.kind, len(answer.items)) == ("basket", 5)
        assert answer.warnings == ["item 'thing' in cart has no category; more of its kind may be offered"]


def test_a_cart_of_nothing_known_is_the_list_for_the_shopper_and_says_so(asked):
    answer = asked[1].recommend(Request(kind="basket", cart=["ghost"], k=5, now=NOW))
    assert (answer.kind, len(answer.items)) == ("for_you", 5)
    assert any("'ghost' in cart is unknown" in warning for warning in answer.warnings)


def test_a_shop_without_the_category_field_is_told_which_setting_names_another(asked, shop):
    store, recommender = asked
    other = Recommender(store, shop.model_copy(update={"list_category_field": "kind"}), recommender.text_encoder)
    with pytest.raises(RequestError, match=r"no STD field 'kind'; set LIST_CATEGORY_FIELD to one of \[.*'category'"):
        other.recommend(Request(kind="basket", cart=store.events.read().product_ids[:1], now=NOW))


# ------------------------------------------------------------------------------------------------------------- trending
def test_trending_counts_shoppers_and_halves_with_age(store):
    start = datetime(2026, 1, 1, tzinfo=UTC)
    store.products.put([RawProduct(product_id=product_id, title="t") for product_id in "abcd"])
    events = [
        ("u1", "a", "view", 0), ("u1", "a", "view", 1), ("u1", "a", "view", 2),  # one shopper, again and again
        ("u2", "b", "view", 2), ("u3", "b", "purchase", 2), ("u4", "c", "skip", 2), ("u1", "d", "own_kind", 0),
    ]  # fmt: skip
    store.events.put(
        [Event(user_id=u, product_id=p, kind=k, at=start + timedelta(days=day)) for u, p, k, day in events]
    )

    def trending(since=None, until=2.0, limit=100):
        moments = [None if day is None else start.timestamp() + day * DAY for day in (since, until)]
        return store.events.trending(
            start.timestamp() + 2 * DAY, DAY, {"view": 1.0, "purchase": 4.0, "skip": 0.0}, 1.0, *moments, limit
        )

    assert trending() == {"a": 1.0, "b": 5.0, "d": 0.25}
    assert trending(until=1.5) == {"a": 0.5, "d": 0.25}
    assert trending(since=1.5) == {"a": 1.0, "b": 5.0}
    assert len(trending(limit=1)) <= 1
    ages_ago = store.events.trending(
        start.timestamp() + 1e5 * DAY, DAY, {}, 1.0, None, start.timestamp() + 3 * DAY, 100
    )
    assert all(score >= 0 for score in ages_ago.values())


def test_what_the_shop_says_a_kind_of_event_counts_decides_what_trends(store, settings):
    start = datetime(2026, 1, 1, tzinfo=UTC)
    store.products.put([RawProduct(product_id=product_id, title="t") for product_id in "ab"])
    kinds = [("u1", "a", "view"), ("u2", "a", "view"), ("u3", "b", "wishlist")]
    store.events.put([Event(user_id=u, product_id=p, kind=kind, at=start) for u, p, kind in kinds])

    def trending(**weights):
        weighing = ListKinds(store, settings.model_copy(update={"event_weights": weights}))
        return weighing.trending(start.timestamp(), replayed=True)

    assert trending() == {"a": 2.0, "b": 1.0}
    assert trending(wishlist=5.0, view=0.5) == {"a": 1.0, "b": 5.0}


def test_the_whole_log_is_read_before_the_first_request_and_by_a_refresh_and_by_no_list(new_shop, monkeypatch):
    with new_shop() as shop, Store.open(shop) as store:
        recommender = Recommender(store, shop, TextEncoder.load(shop))
        recommender.live()  # what a server does before it is ready
        old = store.events.read().product_ids[0]
        kept = recommender.lists.trending(time.time()).get(old, 0.0)
        read = store.events.trending

        def only_the_latest(as_of, half_life, weights, other_weight, since, until, limit):
            assert since is not None
            return read(as_of, half_life, weights, other_weight, since, until, limit)

        with monkeypatch.context() as patched:
            patched.setattr(store.events, "trending", only_the_latest)
            assert recommender.recommend(Request(kind="trending", k=5)).items
        hour_ago = datetime.now(UTC) - timedelta(hours=1)
        store.events.put([Event(user_id=f"late-{n}", product_id=old, kind="purchase", at=hour_ago) for n in range(9)])
        assert recommender.lists.trending(time.time()).get(old, 0.0) == pytest.approx(kept)
        recommender.refresh()
        assert recommender.lists.trending(time.time())[old] > kept + 30.0
        assert recommender.recommend(Request(kind="trending", k=1)).items[0].product_id == old


def test_intervals_are_learned_once_an_hour_behind_the_requests(store, settings, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(store.events, "repeat_intervals", lambda field, limit: {None: clock[0]})
    monkeypatch.setattr(time, "time", lambda: clock[0])
    lists = ListKinds(store, settings)
    for now, learned in ((1000.0, 1000.0), (4599.0, 1000.0), (4601.0, 4601.0)):
        clock[0] = now
        lists.refresh()
        assert lists.intervals() == {None: learned}
    clock[0] = 8301.0  # due, and no request learns them
    assert lists.intervals() == {None: 4601.0}
    lists.refresh()
    assert lists.intervals() == {None: 8301.0}


def test_what_is_wanted_now_trends_at_once_in_its_category_and_the_rest_follows(asked):
    store, recommender = asked
    of = categories(store)
    cold, warm = [product_id for product_id in of if of[product_id] == of[list(of)[5]]][:2]
    before = recommender.recommend(Request(kind="trending", k=10))  # reads and keeps what was before
    assert before.kind == "trending"
    now = datetime.now(UTC)
    store.events.put([Event(user_id=f"crowd-{n}", product_id=warm, at=now - timedelta(seconds=n)) for n in range(3)])
    store.events.put([Event(user_id="crowd-0", product_id=cold, at=now - timedelta(seconds=9))])
    after = recommender.recommend(Request(kind="trending", k=10))
    assert ids(after)[:2] == [warm, cold]
    assert after.items[0].score == pytest.approx(3.0, abs=0.1)
    assert after.items[0].stage == "trending"
    assert after.items[0].reasons[0].text["en"] == "Trending now"
    inside = recommender.recommend(Request(kind="trending", filters=Filters({"category": of[warm]}), k=100))
    assert ids(inside)[:2] == [warm, cold]
    assert set(ids(inside)) == {product_id for product_id in of if set(of[product_id]) & set(of[warm])}
    # A replayed moment knows nothing of what came after it.
    assert ids(recommender.recommend(Request(kind="trending", k=10, now=NOW)))[:2] != [warm, cold]


def test_where_too_little_happened_the_list_for_the_shopper_follows_what_trends(asked):
    _, recommender = asked
    first_day = NOW - 39.5 * DAY
    answer = recommender.recommend(Request(kind="trending", k=100, now=first_day))
    stages = [item.stage for item in answer.items]
    assert len(set(ids(answer))) == 100
    assert stages == sorted(stages, reverse=True)
    assert set(stages) == {"trending", "retrieval"}


# ---------------------------------------------------------------------------------------------------------------- again
def bought(days: int, first: float, last: float, *of: str) -> Purchases:
    return Purchases("p", days, first * DAY, last * DAY, list(of))


@pytest.mark.parametrize(
    ("purchases", "intervals", "days"),
    [
        (bought(1, 0, 0, "socks"), {"socks": 30.0, None: 70.0}, 30.0),
        (bought(1, 0, 0, "hats"), {"socks": 30.0, None: 70.0}, 70.0),
        (bought(1, 0, 0), {}, list_kinds.DEFAULT_INTERVAL_DAYS),
        (bought(3, 0, 20, "socks"), {"socks": 40.0}, 20.0),  # own gaps 10 and 10, and one more of 40
    ],
)
def test_an_interval_is_learned_from_the_shopper_and_the_category(purchases, intervals, days):
    assert interval_days(purchases, intervals) == days


def test_what_is_due_comes_before_what_was_just_bought_and_what_was_given_up():
    due = {day: due_score(bought(1, 0, 0), 30.0, day * DAY) for day in (0, 10, 30, 60, 300)}
    assert due[30] == pytest.approx(1.0)
    assert due[0] == 0.0
    assert due[30] > due[60] > due[10] * 0.9 > due[300]
    assert due_score(bought(3, 0, 0), 30.0, 30 * DAY) == pytest.approx(2.0)


def test_intervals_are_medians_of_what_was_bought_on_another_day(store):
    start = datetime(2026, 1, 1, tzinfo=UTC)
    of = {"s1": "socks", "s2": "socks", "h": "hat"}
    store.products.put([RawProduct(product_id=product_id, title="t") for product_id in of])
    store.products.put_features(
        [Product(product_id=p, title="t", std={"category": [c]}) for p, c in of.items()], "test"
    )
    for user, product_id, days in [
        ("u", "s1", (0, 10, 30)),
        ("v", "s2", (0, 0.2, 40)),
        ("v", "h", (0, 100)),
        ("w", "h", (5,)),
    ]:
        store.events.put(
            [
                Event(user_id=user, product_id=product_id, kind="purchase", at=start + timedelta(days=day))
                for day in days
            ]
        )
    store.events.put([Event(user_id="w", product_id="h", kind="view", at=start + timedelta(days=6))])
    found = store.events.repeat_intervals("category", 1000)
    assert found == {"socks": pytest.approx(20.0), "hat": pytest.approx(100.0), None: pytest.approx(29.9, abs=0.2)}
    assert store.events.repeat_intervals("nothing", 1000).keys() == {None}
    assert store.events.purchases("v", "category", 10) == [
        Purchases("h", 2, start.timestamp(), start.timestamp() + 100 * DAY, ["hat"]),
        Purchases("s2", 2, start.timestamp(), start.timestamp() + 40 * DAY, ["socks"]),
    ]


def test_again_offers_what_was_bought_that_first_which_is_due(asked, monkeypatch):
    store, recommender = asked
    monkeypatch.setattr(recommender.lists, "intervals", lambda: {None: 30.0})
    due, fresh, viewed = store.events.read().product_ids[10:13]
    for product_id, kind, day in (
        (due, "purchase", 60),
        (due, "purchase", 30),
        (fresh, "purchase", 1),
        (viewed, "view", 2),
    ):
        store.events.put(
            [Event(user_id="buyer", product_id=product_id, kind=kind, at=sample_shop.NOW - timedelta(days=day))]
        )
    answer = recommender.recommend(Request("buyer", kind="again", k=10, now=NOW))
    assert answer.kind == "again"
    assert ids(answer) == [due, fresh]
    reason = answer.items[0].reasons[0]
    assert (reason.kind, reason.value, reason.product_id) == ("again", "2", due)
    assert reason.text["en"] == "You bought it 2 times, last 30 days ago"
    assert ids(recommender.recommend(Request("buyer", kind="again", exclude=[due], k=10, now=NOW))) == [fresh]


def test_again_of_nothing_bought_is_empty_and_says_so(asked):
    answer = asked[1].recommend(Request("window-shopper", kind="again", k=10, now=NOW))
    assert answer.items == []
    assert any("has bought nothing yet" in warning for warning in answer.warnings)


# ----------------------------------------------------------------------------------------------------------------- rules
@pytest.mark.parametrize("kind", ["similar", "because", "basket", "trending", "again"])
def test_every_kind_obeys_filters_exclusions_and_k(asked, kind):
    store, recommender = asked
    log = store.events.read()
    user, filters = log.user_ids[1], few(store)
    about = {"product_id": log.product_ids[0]} if kind in ("similar", "because") else {}
    if kind == "basket":
        about = {"cart": log.product_ids[:1]}
    if kind == "again":
        at = sample_shop.NOW - timedelta(days=40)
        store.events.put([Event(user_id=user, product_id=p, kind="purchase", at=at) for p in log.product_ids])
    answer = recommender.recommend(Request(user, kind=kind, filters=filters, k=5, now=NOW, **about))
    assert answer.kind == kind
    assert [item.rank for item in answer.items] == list(range(1, len(answer.items) + 1))
    assert 1 <= len(answer.items) <= 5
    if kind == "again":
        assert len(answer.items) == 5
    assert all(item.price <= filters.max_price for item in answer.items)
    falling = [item.score for item in answer.items]
    assert falling == sorted(falling, reverse=True)
    gone = ids(answer)[0]
    again = recommender.recommend(Request(user, kind=kind, filters=filters, exclude=[gone], k=5, now=NOW, **about))
    assert gone not in ids(again)
    nothing = recommender.recommend(Request(user, kind=kind, filters=Filters(max_price=0.0), k=5, now=NOW, **about))
    assert nothing.items == []


@pytest.mark.parametrize("kind", ["similar", "because", "basket", "trending"])
def test_every_kind_obeys_the_rules_of_the_shop(asked, kind):
    """Caps look further than the first hundred candidates; a pin stands where it is put."""
    store, recommender = asked
    of = categories(store)
    about = {"product_id": next(iter(of))} if kind in ("similar", "because") else {}
    if kind == "basket":
        about = {"cart": [next(iter(of))]}
    pinned = list(of)[-1]
    if kind == "basket" and of[pinned] == of[next(iter(of))]:
        pinned = next(product_id for product_id in of if of[product_id] != of[next(iter(of))])
    rules = [{"kind": "at_most", "n": 1, "std": "category"}, {"kind": "pin", "product_id": pinned, "place": 2}]
    named = NamedRules("tried", None, RuleSet.model_validate(rules))
    answer = recommender.recommend(Request(kind=kind, k=12, now=NOW, rules=named, **about))
    assert (answer.kind, len(answer.items)) == (kind, 12)
    assert answer.items[1].product_id == pinned
    every = [category for product_id in ids(answer) for category in of[product_id]]
    assert len(every) == len(set(every))
    assert all(item.reasons for item in answer.items)


def test_what_rules_hide_as_bought_is_still_offered_to_buy_again(asked):
    store, recommender = asked
    product_id = store.events.read().product_ids[20]
    store.events.put(
        [Event(user_id="rebuyer", product_id=product_id, kind="purchase", at=sample_shop.NOW - timedelta(days=9))]
    )
    for rules in ([{"kind": "hide", "events": ["purchase"]}], [{"kind": "filter", "keep": {"price": {"max": 0.0}}}]):
        named = NamedRules("tried", None, RuleSet.model_validate(rules))
        answer = recommender.recommend(Request("rebuyer", kind="again", k=5, now=NOW, rules=named))
        assert ids(answer) == ([product_id] if rules[0]["kind"] == "hide" else [])


def test_without_the_database_popular_items_stand_for_no_list_that_they_are_not(shop):
    with Store.open(shop) as store:
        recommender = Recommender(store, shop, TextEncoder.load(shop))
        recommender.live()
        store.pool.close()
        answer = recommender.recommend(Request(kind="trending", k=5))
        assert answer.degraded
        assert answer.items[0].reasons[0].text["ko"]
        for request in (Request("buyer", kind="again"), Request(kind="basket", cart=["p00001"])):
            with pytest.raises(UnavailableError):
                recommender.recommend(request)


# ------------------------------------------------------------------------------------------------------------------ HTTP
def test_every_kind_is_one_parameter_of_one_route(shop, client):
    with Store.open(shop) as store:
        log = store.events.read()
        of = categories(store)
    product_id, user = log.product_ids[0], log.user_ids[0]
    event = {"user_id": user, "product_id": product_id, "kind": "purchase", "at": datetime.now(UTC).isoformat()}
    assert client.post("/events", json=event).status_code == 200
    bodies = [
        {"user_id": user},
        {"kind": "similar", "product_id": product_id},
        {"kind": "because", "product_id": product_id, "user_id": user},
        {"kind": "because", "user_id": user},
        {"kind": "basket", "cart": [product_id], "user_id": user},
        {"kind": "trending"},
        {"kind": "again", "user_id": user},
    ]
    for body in bodies:
        answer = client.post("/recommend", json={"k": 5, **body})
        assert answer.status_code == 200, answer.text
        answer = answer.json()
        assert answer["kind"] == body.get("kind", "for_you")
        assert answer["items"]
        for item in answer["items"]:
            for reason in item["reasons"]:
                assert set(reason["text"]) == {"en", "ko"}
    basket = client.post("/recommend", json={"kind": "basket", "cart": [product_id], "k": 50}).json()
    assert not any(set(of[item["product_id"]]) & set(of[product_id]) for item in basket["items"])
    page = client.get(f"/items/{product_id}/similar", params={"k": 5}).json()
    listed = client.post("/recommend", json={"kind": "similar", "product_id": product_id, "k": 5}).json()
    assert [item["product_id"] for item in page] == [item["product_id"] for item in listed["items"]]
    assert listed["anchor"]["product_id"] == product_id
    assert client.post("/recommend", json={"explain": False, "k": 1}).json()["items"][0]["reasons"] == []
    assert 'styletower_lists_total{kind="similar"}' in client.get("/metrics").text


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"kind": "similar"}, "product_id"),
        ({"kind": "because"}, "product_id"),
        ({"kind": "basket"}, "cart"),
        ({"kind": "again"}, "user_id"),
        ({"kind": "surprise"}, "kind"),
        ({"product_id": "p"}, "product_id"),
        ({"cart": ["p"]}, "cart"),
    ],
)
def test_a_422_names_what_a_kind_lacks_or_has_no_use_for(client, body, field):
    answer = client.post("/recommend", json=body)
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", field]


@pytest.mark.parametrize("kind", ["similar", "because"])
def test_a_list_about_nothing_that_is_sold_is_a_404(client, kind):
    answer = client.post("/recommend", json={"kind": kind, "product_id": "ghost"})
    assert answer.status_code == 404
    assert "ghost" in answer.text
