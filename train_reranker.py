"""Stage 3: train DeepFM on what retrieval returns and write reranker_deepfm.pth into the release.

    python train_reranker.py                   # works on the newest release

The held-out days of stage 2 are replayed: for each request of those days the user tower that never saw them retrieves the
candidates as of that moment; what the shopper then took are the positives, the other candidates are the negatives. Tables come
from the item tower, the order starts at retrieval's own, and a listwise softmax (Cao et al., ICML 2007) improves it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from accelerate import PartialState
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from model_reranker import RerankerConfig, build_deepfm, deepfm_input, start_from_retrieval, transfer
from release import RERANKER, USER_TOWER_HOLDOUT, ItemEncoder, Release
from settings import UserError, run_script
from shop_data import Requests, ShopData
from store import Store
from tensors import (
    MAX_HISTORY_IDS,
    Candidates,
    Past,
    PriceScale,
    RerankBatch,
    item_dense_names,
    rerank_batch,
    user_dense_names,
)
from text_encoder import TextEncoder
from train_user import Retrieved, item_keys, retrieve
from training import TrainOptions, finish, fit, shuffled_batches

STAGE = "reranker"
NDCG_AT = 12


class RerankerOptions(TrainOptions):
    epochs: int = Field(20, ge=1, le=10_000, description="passes over the lists at most")
    batch_size: int = Field(32, ge=2, le=65_536, description="lists a step")
    learning_rate: float = Field(5e-4, gt=0, le=1, description="of AdamW, after warm-up")
    weight_decay: float = Field(0.05, ge=0, le=1, description="of AdamW")
    patience: int = Field(3, ge=1, description="epochs without a better NDCG before stopping")
    candidates: int = Field(100, ge=10, le=1000, description="items retrieved for each request")
    new_goods: float = Field(
        0.1, ge=0, lt=1, description="share of the candidates kept for products that nobody met yet, when serving too"
    )
    moments: int = Field(4, ge=1, le=100, description="moments in the held-out days from which requests are replayed")
    transfer: bool = Field(True, description="start from the item tower's STD and RE tables")
    hidden: list[int] = Field([128, 64], description="widths of the deep part")


@dataclass(frozen=True)
class Lists:
    """Replayed requests with their candidates. Only lists with at least one positive can teach an order."""

    requests: list[tuple[int, int, float]]  # user number, context row, as of
    found: Retrieved
    positive: np.ndarray  # bool [L, N]
    answers: np.ndarray  # int [L], all right answers, retrieved or not
    known: np.ndarray  # bool [L], the shopper had a history

    def __len__(self) -> int:
        return len(self.requests)

    @classmethod
    def joined(cls, parts: list[Lists]) -> Lists:
        return cls(
            [request for part in parts for request in part.requests],
            Retrieved.joined([part.found for part in parts]),
            np.concatenate([part.positive for part in parts]),
            np.concatenate([part.answers for part in parts]),
            np.concatenate([part.known for part in parts]),
        )

    def weights(self, which: np.ndarray) -> np.ndarray:
        """Of the lists `which`, so that shoppers with a history and strangers count the same: float64 [K], with a sum of K.

        A shop's strangers are many and easy to please with what is popular; left alone they would decide how everybody's
        list is ordered.
        """
        share = self.known[which].mean()
        weights = np.where(self.known[which], 1.0 / max(share, 1e-9), 1.0 / max(1.0 - share, 1e-9))
        return weights * len(which) / weights.sum()


def ndcg(positive_in_order: np.ndarray, answers: np.ndarray, count: int) -> np.ndarray:
    """NDCG@count of each list: bool [L, >= count] in ranked order, number of right answers [L] -> float [L]."""
    discount = 1.0 / np.log2(np.arange(count) + 2)
    gained = positive_in_order[:, :count] @ discount[: positive_in_order.shape[1]]
    ideal = np.concatenate([[0.0], np.cumsum(discount)])[np.minimum(answers, count)]
    return gained / np.maximum(ideal, discount[-1])


class ListFeatures:
    """RerankBatch of any replayed lists."""

    def __init__(
        self, shop: ShopData, lists: Lists, profiles: np.ndarray, prices: PriceScale, release: Release
    ) -> None:
        config = release.user_tower(USER_TOWER_HOLDOUT).config
        self.shop, self.lists, self.profiles, self.prices = shop, lists, profiles, prices
        self.length, self.item_width, self.popularity_width = config.history, config.item_width, config.popularity_width
        self.keys: dict[float, np.ndarray] = {}

    def batch(self, which: np.ndarray) -> RerankBatch:
        shop, lists = self.shop, self.lists
        users = np.array([lists.requests[i][0] for i in which])
        as_of = np.array([lists.requests[i][2] for i in which])
        found = lists.found.take(which)
        past, rows = self._past(users, as_of), found.rows
        index_rows = np.stack([self.keys[moment][items] for moment, items in zip(as_of, rows, strict=True)])
        candidates = Candidates(
            found.queries, index_rows, found.scores, found.together, found.variant, shop.items.std[rows],
            shop.items.re[rows], shop.price[rows],
        )  # fmt: skip
        return rerank_batch(candidates, past, self.prices, self.item_width, self.popularity_width)

    def _past(self, users: np.ndarray, as_of: np.ndarray) -> Past:
        shop = self.shop
        index = np.zeros((len(users), self.length), dtype=np.int64)
        mask = np.zeros((len(users), self.length), dtype=bool)
        for moment in np.unique(as_of):
            at = np.flatnonzero(as_of == moment)
            found = shop.history_as_of(users[at], moment, self.length)
            index[at, : found.index.shape[1]], mask[at, : found.mask.shape[1]] = found.index, found.mask
        items = shop.histories.item[index]
        return Past(
            shop.vectors[items], mask, shop.items.std[items], shop.items.re[items], shop.price[items],
            self.profiles[users],
        )  # fmt: skip


def replay(shop: ShopData, release: Release, options: RerankerOptions) -> tuple[ListFeatures, PriceScale]:
    """Retrieve candidates for the requests of the held-out days, as of several moments in them."""
    part = release.manifest["user_tower"]
    start, end = part["validation_start"], shop.now
    tower = release.aligned_user_tower(shop.items.product_ids, USER_TOWER_HOLDOUT)
    profiles = release.profile_scaler().transform(shop.profiles)
    moments = np.linspace(start, end, options.moments + 1)
    found: list[Lists] = []
    keys: dict[float, np.ndarray] = {}
    for begin, stop in pairwise(moments):
        requests: Requests = shop.requests(begin, stop, float(begin))
        if not len(requests):
            continue
        retrieved = retrieve(
            tower, shop, shop.links(float(begin)), requests, profiles, tower.config.history, options.candidates,
            round(options.new_goods * options.candidates), "replaying requests",
        )  # fmt: skip
        positive = np.stack(
            [np.isin(row, answer) for row, answer in zip(retrieved.rows, requests.answers, strict=True)]
        )
        useful = np.flatnonzero(positive.any(1))
        pairs = zip(requests.users[useful], requests.contexts[useful], strict=True)
        found.append(
            Lists(
                [(int(user), int(context), float(begin)) for user, context in pairs], retrieved.take(useful),
                positive[useful], np.array([len(answer) for answer in requests.answers])[useful],
                np.asarray(shop.history_as_of(requests.users[useful], float(begin), 1).mask.any(axis=1)),
            )
        )  # fmt: skip
        with torch.no_grad():
            popularity = shop.popularity_as_of(float(begin))
            keys[float(begin)] = item_keys(tower, torch.from_numpy(shop.vectors), popularity).numpy()
    lists = Lists.joined(found) if found else None
    if lists is None or len(lists) < 10:
        raise UserError(
            f"only {0 if lists is None else len(lists)} replayed requests found what the shopper took; "
            "import more events or raise --validation-share of train_user.py"
        )
    prices = PriceScale.fit(shop.price)
    features = ListFeatures(shop, lists, profiles, prices, release)
    features.keys = keys
    return features, prices


def main(options: RerankerOptions) -> None:
    release = Release.open(options.models_dir, options.release)
    encoder = ItemEncoder(release, TextEncoder.load(options))
    if "user_tower" not in release.manifest:
        raise UserError(f"release {release.name} has no user tower yet; run train_user.py first")
    with Store.open(options) as store:
        shop = ShopData.load(store, encoder, release.manifest["user_tower"]["popularity_windows"])
    features, prices = replay(shop, release, options)
    lists = features.lists

    config = RerankerConfig(
        std_rows=len(encoder.std_vocab), re_rows=len(encoder.re_vocab), std_slots=encoder.layout.std_slots,
        re_slots=encoder.layout.re_slots, history_ids=MAX_HISTORY_IDS, user_dense=user_dense_names(release.profile_scaler()),
        item_dense=item_dense_names(features.popularity_width), embedding_dim=encoder.tower.config.embedding_dim,
        hidden=tuple(options.hidden),
    )  # fmt: skip
    torch.manual_seed(options.seed)
    model = build_deepfm(config)
    if options.transfer:
        transfer(model, encoder.tower.std_table.weight, encoder.tower.re_table.weight)
    start_from_retrieval(model, config, "retrieval")

    # Shoppers, not lists, are held out: two requests of one shopper have much in common.
    users = np.array([user for user, _, _ in lists.requests])
    shoppers = np.random.default_rng(options.seed).permutation(np.unique(users))
    held_out = np.isin(users, shoppers[: max(1, len(shoppers) // 5)])
    train_rows, validation_rows = np.flatnonzero(~held_out), np.flatnonzero(held_out)

    weight_of = lists.weights(np.arange(len(lists)))
    validation_weights = lists.weights(validation_rows)

    def logits(deepfm: nn.Module, which: np.ndarray) -> Tensor:
        return deepfm(deepfm_input(features.batch(which))).view(len(which), -1)

    def loss(deepfm: nn.Module, which: np.ndarray) -> Tensor:
        positive = torch.from_numpy(lists.positive[which]).float()
        target = positive / positive.sum(1, keepdim=True)
        weight = torch.from_numpy(weight_of[which]).float()
        return (F.cross_entropy(logits(deepfm, which), target, reduction="none") * weight).mean()

    def validate(deepfm: nn.Module) -> dict[str, float]:
        parts = [logits(deepfm, validation_rows[i : i + 256]) for i in range(0, len(validation_rows), 256)]
        order = torch.cat(parts).argsort(dim=1, descending=True, stable=True).numpy()
        answers = lists.answers[validation_rows]
        retrieved = lists.positive[validation_rows]
        reranked = np.take_along_axis(retrieved, order, axis=1)
        own, before = ndcg(reranked, answers, NDCG_AT), ndcg(retrieved, answers, NDCG_AT)
        known = lists.known[validation_rows]
        return {
            f"ndcg@{NDCG_AT}": float(np.average(own, weights=validation_weights)),
            f"ndcg@{NDCG_AT} of retrieval": float(np.average(before, weights=validation_weights)),
            "with history": float(own[known].mean()) if known.any() else 0.0,
            "of retrieval": float(before[known].mean()) if known.any() else 0.0,
        }

    report = fit(
        model, lambda epoch: shuffled_batches(train_rows, options.batch_size, options.seed, epoch), loss, validate,
        f"ndcg@{NDCG_AT}", options, release.folder, STAGE,
    )  # fmt: skip
    if not PartialState().is_main_process:
        return  # one process writes the release
    release.save_weights(RERANKER, model)
    release.record(
        "reranker",
        config=config,
        prices=prices,
        lists=len(lists),
        report=report,
        options=options.model_dump(mode="json", exclude={"database_url"}),
    )
    finish(release.folder, STAGE)
    print(
        f"release {release.name}: {RERANKER}, {report.metric} {report.best:.4f} on {len(validation_rows)} held-out lists "
        f"(retrieval's own order {report.history[-1][f'ndcg@{NDCG_AT} of retrieval']:.4f}) after {report.seconds:.0f} s"
    )


if __name__ == "__main__":
    run_script(RerankerOptions, main)
