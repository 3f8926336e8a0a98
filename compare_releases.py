"""Two releases judged by the same newest events, of which neither learned: whether a new one may take the live one's place.

It may not where it is worse beyond chance: the shoppers of few days are few, and one list more or less decides nothing.

What each stage says of itself when it is trained is of its own held-out days. Those of two nights are not the same, and shoppers
are easier to foresee on some days than on others, so such figures are not to be compared.

Judged are the user towers as they were before they learned from their held-out days too (`user_tower_holdout.pth`), by what
shoppers took from the later of both days on which these begin. (How many epochs the new one took and how far it trusts links was
chosen by such events, two small numbers in its favour.) Rerankers are not: the live one learned from all days until it was
trained, the new one from all until now, and no event is left that is new to both. Neither can spoil what its tower finds: it is
trusted as far as it beat retrieval's own order on later lists, down to not at all (`trust` and `stranger_trust` in the manifest).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np

import metrics
from metrics import Ratio
from release import USER_TOWER_HOLDOUT, ItemEncoder, Release
from settings import UserError
from shop_data import Requests, ShopData
from store import Store
from text_encoder import TextEncoder
from train_user import RETRIEVED, hits, retrieve

MOST_REQUESTS = 2000  # drawn from all: each is a search of the whole catalogue by both


@dataclass(frozen=True)
class Comparison:
    """recall@RETRIEVED of both releases on the same requests."""

    new: Ratio
    live: Ratio
    since: float  # epoch seconds

    def worse(self, margin: float) -> bool:
        """Whether the new one is worse by more than this share of the live one's, as sure as an interval of 95 % makes it."""
        enough = Ratio(self.live.numerator * (1.0 - margin), self.live.denominator)
        return metrics.compare([(self.new, enough)])[0].high < 0

    def __str__(self) -> str:
        new, live = (ratio.numerator.sum() / ratio.denominator.sum() for ratio in (self.new, self.live))
        return (
            f"recall@{RETRIEVED} {new:.4f} against {live:.4f}, on the same {len(self.new.numerator)} requests since "
            f"{datetime.fromtimestamp(self.since, UTC):%Y-%m-%d}, which neither learned from"
        )


def compare(store: Store, shop: ShopData, new: Release, live: Release, text_encoder: TextEncoder) -> Comparison:
    """shop: as the new release sees it. Raises UserError when the live one cannot be judged, or nothing is left to judge by."""
    encoder = ItemEncoder(live, text_encoder)
    encoder.learn_words(store.releases.words(live.name))
    as_live_sees_it = ShopData.of_release(store, encoder, live)
    since = max(release.manifest["user_tower"]["validation_start"] for release in (new, live))
    requests = shop.requests(since, shop.now, since)
    asked, again = both_know(requests, shop, as_live_sees_it)
    if not len(asked):
        raise UserError(
            f"no shopper met anything new since {datetime.fromtimestamp(since, UTC):%Y-%m-%d}, the first day new to both"
        )
    chosen = np.random.default_rng(0).permutation(len(asked))[:MOST_REQUESTS]
    return Comparison(judge(new, shop, asked.take(chosen)), judge(live, as_live_sees_it, again.take(chosen)), since)


def judge(release: Release, shop: ShopData, requests: Requests) -> Ratio:
    """recall@RETRIEVED of a release's held-out user tower, by request."""
    tower = release.aligned_user_tower(shop.items.product_ids, USER_TOWER_HOLDOUT)
    profiles = release.profile_scaler().transform(shop.profiles)
    found = retrieve(tower, shop, shop.links(requests.as_of), requests, profiles, tower.config.history, RETRIEVED)
    return Ratio(
        hits(found.rows, requests.answers, RETRIEVED).astype(float),
        np.array([len(answer) for answer in requests.answers], dtype=float),
    )


def both_know(requests: Requests, shop: ShopData, other: ShopData) -> tuple[Requests, Requests]:
    """The requests in the numbers of both shops, which were read one after the other: what came or went meanwhile is left out."""
    item_of = numbers(shop.items.product_ids, other.items.product_ids)
    user_of = numbers(shop.histories.user_ids, other.histories.user_ids)
    context_of = numbers(shop.histories.contexts, other.histories.contexts)
    answers = [
        np.array([item for item in answer.tolist() if item in item_of], dtype=np.int64) for answer in requests.answers
    ]
    kept = [
        row
        for row, (user, context) in enumerate(zip(requests.users.tolist(), requests.contexts.tolist(), strict=True))
        if user in user_of and context in context_of and len(answers[row])
    ]
    asked = replace(requests, answers=answers).take(np.array(kept, dtype=np.int64))
    again = replace(
        asked,
        users=np.array([user_of[user] for user in asked.users.tolist()], dtype=np.int64),
        contexts=np.array([context_of[context] for context in asked.contexts.tolist()], dtype=np.int64),
        answers=[np.array([item_of[item] for item in answer.tolist()]) for answer in asked.answers],
    )
    return asked, again


def numbers(names: list[str], others: list[str]) -> Mapping[int, int]:
    """Of each name that both lists have, its place in the first -> in the second."""
    place_of = {name: place for place, name in enumerate(others)}
    return {place: place_of[name] for place, name in enumerate(names) if name in place_of}
