"""Stage 3: train DeepFM on what retrieval returns and write reranker_deepfm.pth into the release.

    python train_reranker.py                   # works on the newest release

The held-out days of stage 2 are replayed, as of `--moments` moments in them: for each request the user tower that never saw those
days retrieves the candidates; what the shopper then took are the positives, the other candidates are the negatives. At the last
moment the tower goes on learning, from all that happened until then: so the lists that judge are as a shop would show them that
had just trained. By those of a tower left as it was, a reranker would be praised for having learned in its stead what has come to
sell since, which the tower that serves knows by itself.

Tables come from the item tower, the order starts at retrieval's own, and a listwise softmax (Cao et al., ICML 2007) improves it.

The newest of these requests judge, and are later than all that were learned from: other shoppers of the same days buy the same
things, and would praise a model that has learned what sold on those days. They choose the epoch, and how far to trust the model at
all: with shoppers of whom something is known, and with strangers. Then it learns from every request, for as many epochs.

Where a shop logs what it shows (docs/experiments.md), the lists that shoppers of those days were shown and took something out of
stand in the place of their replayed requests: of what they saw, what they took are the positives, the rest the negatives, and the
place of an item is a feature (see model_reranker.py). The candidates around what was shown, and all features, are those of the
release in training, as of the moment of showing but for popularity and links, which are as of the start of that one of `--moments`
parts of the held-out days, and prices, which are today's. A history, figures of the body or filters that only the request held are
not logged and not known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from scipy.special import softmax
from torch import Tensor, nn
from torch.nn import functional as F

from model_reranker import ListwiseDeepFM, RerankerConfig, build_deepfm, start_from_retrieval, transfer
from release import RERANKER, USER_TOWER, USER_TOWER_HOLDOUT, ItemEncoder, Release
from settings import UserError, run_script
from shop_data import Requests, ShopData, event_weights
from store import ShownList, Store
from tensors import (
    KIND_WEIGHTS,
    MAX_HISTORY_IDS,
    POSITION,
    Candidates,
    Past,
    PriceScale,
    RerankBatch,
    item_dense_names,
    rerank_batch,
    user_dense_names,
)
from text_encoder import TextEncoder
from train_user import Retrieved, UserOptions, item_keys, learn_on, retrieve
from training import FitReport, TrainOptions, check_checkpoint, finish, fit, is_main_process, shuffled_batches

STAGE = "reranker"
NDCG_AT = 12
SLICES = 4  # at least, into which the held-out days are cut: the last ones judge
JUDGING = 0.2  # share of the lists at least that judge
TRUSTS = (0.0, 0.25, 0.5, 0.75, 1.0)
LEAST_LISTS = 10  # from which something can be learned, and judged
LEAST_SHARE = 0.1  # of shoppers with a history, or of strangers: fewer would weigh too much each
# Of the shown lists, the share that a step sees without their places, so that the model does not lean on them alone: the rate of
# the paper in model_reranker.py.
POSITION_DROPOUT = 0.15
NEWTON_STEPS = 20
MOST_PLACE_EFFECT = 3.0  # the tenth place a thousandth as good as the first
NOT_SEEN = -1e9  # logit of a candidate that the shopper did not see: it has no part in the softmax


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
    moments: int = Field(4, ge=1, le=100, description="moments in the held-out days as of which requests are replayed")
    transfer: bool = Field(True, description="start from the item tower's STD and RE tables")
    hidden: list[int] = Field([128, 64], description="widths of the deep part")
    refit: bool = Field(True, description="learn from the judging requests too before serving")
    impressions: Literal["auto", "off", "on"] = Field(
        "auto", description="learn from the lists that were shown: if there are enough, never, or however few there are"
    )
    min_clicked_lists: int = Field(
        1000, ge=1, description="shown lists with something taken out of them that are enough for --impressions auto"
    )


@dataclass(frozen=True)
class Lists:
    """Replayed requests and shown lists with their candidates. Only lists with at least one positive can teach an order."""

    requests: list[tuple[int, int, float]]  # user number, context row, moment as of which items and links are known
    found: Retrieved
    positive: np.ndarray  # bool [L, N]
    answers: np.ndarray  # int [L], all right answers, retrieved or not
    known: np.ndarray  # bool [L], the shopper had a history
    slice: np.ndarray  # int [L], number of the stretch of time in which they asked
    at: np.ndarray  # float64 [L], epoch seconds until when the history goes
    place: (
        np.ndarray
    )  # int [L, N], from 1, at which the shopper saw a candidate; 0 if not, and throughout a replayed list

    def __len__(self) -> int:
        return len(self.requests)

    @classmethod
    def joined(cls, parts: list[Lists]) -> Lists:
        arrays = [field.name for field in fields(cls)][2:]
        return cls(
            [request for part in parts for request in part.requests],
            Retrieved.joined([part.found for part in parts]),
            *(np.concatenate([getattr(part, name) for part in parts]) for name in arrays),
        )

    @property
    def shown(self) -> np.ndarray:
        """bool [L], the list was really shown."""
        return np.asarray((self.place > 0).any(axis=1))

    def counts(self, which: np.ndarray) -> np.ndarray:
        """Which candidates the shopper chose among: all of a replayed list but what was met before, which fills it up in a small
        shop; what was seen of a shown one. bool [K, N]"""
        seen = self.place[which] > 0
        return np.asarray((seen | ~seen.any(axis=1, keepdims=True)) & np.isfinite(self.found.scores[which]))

    def weights(self, which: np.ndarray) -> np.ndarray:
        """Of the lists `which`, so that shoppers with a history and strangers count the same: float64 [K], with a sum of K.

        A shop's strangers are many and easy to please with what is popular; left alone they would decide how everybody's
        list is ordered.
        """
        share = self.known[which].mean()
        weights = np.where(self.known[which], 1.0 / max(share, LEAST_SHARE), 1.0 / max(1.0 - share, LEAST_SHARE))
        return weights * len(which) / weights.sum()

    def judging(self) -> np.ndarray:
        """Which lists judge, bool [L]: those of the last slices, `JUDGING` of all at least. Where one slice holds all, a share
        of its shoppers."""
        for first in np.unique(self.slice)[:0:-1]:
            late = self.slice >= first
            if late.mean() >= JUDGING:
                return late
        users = np.array([user for user, _, _ in self.requests])
        shoppers = np.random.default_rng(0).permutation(np.unique(users))
        return np.isin(users, shoppers[: max(1, round(JUDGING * len(shoppers)))])


def ndcg(positive_in_order: np.ndarray, answers: np.ndarray, count: int) -> np.ndarray:
    """NDCG@count of each list: bool [L, >= count] in ranked order, number of right answers [L] -> float [L]."""
    discount = 1.0 / np.log2(np.arange(count) + 2)
    gained = positive_in_order[:, :count] @ discount[: positive_in_order.shape[1]]
    ideal = np.concatenate([[0.0], np.cumsum(discount)])[np.minimum(answers, count)]
    return gained / np.maximum(ideal, discount[-1])


def place_effect(lists: Lists, which: np.ndarray) -> float:
    """What one unit of the log of the place adds to the logit of being taken, beside retrieval's own: a conditional logistic
    regression (McFadden, 1974) on the shown lists among `which`, by Newton's method. Training starts from it: gradient steps take
    epochs to get there, and until then the clicks of the first places count for whatever happens to stand there."""
    which = which[lists.shown[which]]
    counts, place, positive = lists.counts(which), np.log(np.maximum(lists.place[which], 1)), lists.positive[which]
    retrieval = np.where(counts, lists.found.scores[which], NOT_SEEN)
    target = positive / np.maximum(positive.sum(axis=1, keepdims=True), 1)
    effect = 0.0
    for _ in range(NEWTON_STEPS):
        share = softmax(retrieval + effect * place, axis=1)
        mean = (share * place).sum(axis=1)
        slope = ((target * place).sum(axis=1) - mean).sum()
        curvature = ((share * place**2).sum(axis=1) - mean**2).sum()
        # All places alike say nothing, nor do so few lists that any effect explains them.
        effect = float(np.clip(effect + slope / max(curvature, 1e-9), -MOST_PLACE_EFFECT, MOST_PLACE_EFFECT))
    return effect


def ndcg_by_trust(own: Tensor, retrieval: Tensor, positive: np.ndarray, answers: np.ndarray) -> dict[float, np.ndarray]:
    """NDCG of each list by each of TRUSTS in the model: its own logits and retrieval's [L, N], where right answers stand bool
    [L, N], how many there are [L]."""
    found = {}
    for trust in TRUSTS:
        order = torch.lerp(retrieval, own, trust).argsort(dim=1, descending=True, stable=True).numpy()
        found[trust] = ndcg(np.take_along_axis(positive, order, axis=1), answers, NDCG_AT)
    return found


def best_trusts(found: dict[float, np.ndarray], known: np.ndarray) -> tuple[float, float]:
    """Of `ndcg_by_trust`, the trust that is best for shoppers with a history (`known` bool [L]) and that for strangers; of fewer
    lists than LEAST_LISTS of either, the one that is best for all. Of equal ones the least."""

    def best(of: np.ndarray) -> float:
        which = of if of.sum() >= LEAST_LISTS else np.ones_like(of)
        return max(found, key=lambda trust: float(found[trust][which].mean()))

    return best(known), best(~known)


class ListFeatures:
    """RerankBatch of any lists."""

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
        rows = found.rows
        index_rows = np.stack([self.keys[moment][items] for moment, items in zip(as_of, rows, strict=True)])
        # What was met before is not there when serving: it must not move the mean from which scores count.
        there = np.isfinite(found.scores)
        mean = np.mean(found.scores, axis=1, where=there, keepdims=True)
        candidates = Candidates(
            found.queries, index_rows, np.where(there, found.scores, mean), found.together, found.variant, shop.items.std[rows],
            shop.items.re[rows], shop.price[rows],
        )  # fmt: skip
        past = self._past(users, lists.at[which], as_of)
        return rerank_batch(candidates, past, self.prices, self.item_width, self.popularity_width)

    def _past(self, users: np.ndarray, at: np.ndarray, as_of: np.ndarray) -> Past:
        shop = self.shop
        found = shop.history_as_of(users, at, self.length)
        width = found.index.shape[1]
        index = np.zeros((len(users), self.length), dtype=np.int64)
        mask = np.zeros((len(users), self.length), dtype=bool)
        index[:, :width], mask[:, :width] = found.index, found.mask
        items = shop.histories.item[index]
        vectors = np.stack(
            [self.keys[moment][met, : self.item_width] for moment, met in zip(as_of, items, strict=True)]
        )
        return Past(
            vectors, mask, shop.items.std[items], shop.items.re[items], shop.price[items],
            self.profiles[users],
        )  # fmt: skip


def shown_requests(
    shop: ShopData, shown: list[ShownList], as_of: float, most: int
) -> tuple[Requests, list[np.ndarray], list[np.ndarray]]:
    """Shown lists as requests; of each the rows of the items seen, `most` at most, and their places, from 1.

    Lists of shoppers without an event that is known, or without an item seen that still is and was not taken, are left out.
    """
    user_of = {user_id: number for number, user_id in enumerate(shop.histories.user_ids)}
    context_of = {context: number for number, context in enumerate(shop.histories.contexts)}
    row_of = {product_id: row for row, product_id in enumerate(shop.items.product_ids)}
    users, contexts, answers, at, seen, places = [], [], [], [], [], []
    for one in shown:
        taken = {row_of[product_id] for product_id in one.taken if product_id in row_of}
        place_of: dict[int, int] = {}
        for place, product_id in enumerate(one.product_ids, start=1):
            row = row_of.get(product_id, -1)
            # What was taken was seen, whatever the page says.
            if row >= 0 and (one.seen is None or place in one.seen or row in taken):
                place_of.setdefault(row, place)
        rows = list(place_of)[:most]
        if one.user_id in user_of and 0 < len(taken.intersection(rows)) < len(rows):
            users.append(user_of[one.user_id])
            contexts.append(context_of[one.context])
            answers.append(np.array(sorted(taken.intersection(rows))))
            at.append(one.at)
            seen.append(np.array(rows))
            places.append(np.array([place_of[row] for row in rows]))
    return Requests(np.array(users, int), np.array(contexts, int), answers, as_of, np.array(at, float)), seen, places


def with_contexts(shop: ShopData, contexts: list[str], text_encoder: TextEncoder) -> ShopData:
    """The shop with words that no event came with, too."""
    new = sorted(set(contexts) - set(shop.histories.contexts))
    if not new:
        return shop
    return replace(
        shop,
        histories=replace(shop.histories, contexts=[*shop.histories.contexts, *new]),
        context_vectors=np.concatenate([shop.context_vectors, text_encoder.cached_pooled(new)]),
    )


def replay(
    shop: ShopData, release: Release, options: RerankerOptions, shown: list[ShownList]
) -> tuple[ListFeatures | None, PriceScale]:
    """Retrieve candidates for the requests of the held-out days, as of `moments` moments in them, in the end with a user tower that
    learned all until then: for lists that were shown, and for what shoppers took in a stretch in which they were shown none. None
    where fewer than LEAST_LISTS hold what was taken, or the user tower learned nothing, and so held nothing out."""
    part, prices = release.manifest["user_tower"], PriceScale.fit(shop.price)
    if not release.learned_from_events:
        return None, prices
    start, end = part["validation_start"], shop.now
    tower = release.aligned_user_tower(shop.items.product_ids, USER_TOWER_HOLDOUT)
    profiles = release.profile_scaler().transform(shop.profiles)
    per_moment = -(-SLICES // options.moments)  # rounded up
    edges = np.linspace(start, end, options.moments * per_moment + 1)
    links_of = lru_cache(1)(shop.links)  # stretches that follow each other may share a moment
    found: list[Lists] = []
    keys: dict[float, np.ndarray] = {}
    for number in range(len(edges) - 1):
        moment = float(edges[number - number % per_moment])
        if number == (options.moments - 1) * per_moment > 0:
            learned = UserOptions(**part["options"], _env_file=None)
            learn_on(tower, shop, learned, profiles, moment, release.folder, f"{STAGE}_replay")
        of_part = [one for one in shown if edges[number] <= one.at < edges[number + 1]]
        seen_requests, seen, places = shown_requests(shop, of_part, moment, options.candidates)
        replayed: Requests = shop.requests(edges[number], edges[number + 1], moment)
        replayed = replayed.take(np.flatnonzero(~np.isin(replayed.users, seen_requests.users)))
        if not len(replayed) and not len(seen_requests):
            continue
        links = links_of(moment)
        for requests, kept in ((replayed, None), (seen_requests, seen)):
            if not len(requests):
                continue
            retrieved = retrieve(
                tower, shop, links, requests, profiles, tower.config.history, options.candidates,
                round(options.new_goods * options.candidates), "replaying requests", kept,
            )  # fmt: skip
            positive = np.stack(
                [np.isin(row, answer) for row, answer in zip(retrieved.rows, requests.answers, strict=True)]
            )
            place = np.zeros(retrieved.rows.shape, dtype=np.int64)
            for row, items in enumerate(kept or []):
                column_of = {item: column for column, item in enumerate(retrieved.rows[row])}
                place[row, [column_of[item] for item in items]] = places[row]
            useful = np.flatnonzero(positive.any(1))
            pairs = zip(requests.users[useful], requests.contexts[useful], strict=True)
            at = requests.moments[useful]
            found.append(
                Lists(
                    [(int(user), int(context), moment) for user, context in pairs], retrieved.take(useful),
                    positive[useful], np.array([len(answer) for answer in requests.answers])[useful],
                    np.asarray(shop.history_as_of(requests.users[useful], at, 1).mask.any(axis=1)),
                    np.full(len(useful), number), at, place[useful],
                )
            )  # fmt: skip
        if moment not in keys:
            with torch.no_grad():
                popularity = shop.popularity_as_of(moment)
                keys[moment] = item_keys(tower, shop, popularity).numpy()
    if sum(map(len, found)) < LEAST_LISTS:
        return None, prices
    features = ListFeatures(shop, Lists.joined(found), profiles, prices, release)
    features.keys = keys
    return features, prices


def impressions_to_use(store: Store, release: Release, options: RerankerOptions) -> tuple[list[ShownList], str]:
    """The lists shown in the held-out days to learn from, and a sentence for people about them. The days before shaped the user
    tower, whose scores would betray what was taken.

    Raises UserError when there are none though they were asked for.
    """
    if options.impressions == "off":
        return [], "impressions: not used (--impressions off)"
    ignored = [kind for kind, weight in {**KIND_WEIGHTS, **event_weights(release)}.items() if weight <= 0]
    shown = store.impressions.read_taken(release.manifest["user_tower"]["validation_start"], ignored)
    said = f"{len(shown)} lists with something taken out of them were shown in the held-out days"
    if options.impressions == "auto" and len(shown) < options.min_clicked_lists:
        return [], f"impressions: not used, {said}, fewer than {options.min_clicked_lists} (--min-clicked-lists)"
    if not shown:
        raise UserError(
            "no list with something taken out of it was logged in the held-out days; use --impressions auto"
        )
    return shown, f"impressions: used, {said}"


def main(options: RerankerOptions) -> None:
    release = Release.open(options.models_dir, options.release)
    encoder = ItemEncoder(release, TextEncoder.load(options))
    if "user_tower" not in release.manifest:
        raise UserError(f"release {release.name} has no user tower yet; run train_user.py first")
    check_checkpoint(options, release.folder, STAGE)  # before lists are made to learn from: that takes longest
    with Store.open(options) as store:
        shop = ShopData.of_release(store, encoder, release)
        shown, why = impressions_to_use(store, release, options)
    if is_main_process():
        print(why)
    shop = with_contexts(shop, [one.context for one in shown], encoder.text_encoder)
    features, prices = replay(shop, release, options, shown)
    with_places = features is not None and bool(features.lists.shown.any())

    config = RerankerConfig(
        std_rows=len(encoder.std_vocab), re_rows=len(encoder.re_vocab), std_slots=encoder.layout.std_slots,
        re_slots=encoder.layout.re_slots, history_ids=MAX_HISTORY_IDS, user_dense=user_dense_names(release.profile_scaler()),
        item_dense=[*item_dense_names(shop.popularity.width), *([POSITION] if with_places else [])],
        embedding_dim=encoder.tower.config.embedding_dim,
        hidden=tuple(options.hidden),
    )  # fmt: skip

    def new_model(effect: float) -> ListwiseDeepFM:
        torch.manual_seed(options.seed)
        deepfm = build_deepfm(config)
        if options.transfer:
            transfer(deepfm, encoder.tower.std_table.weight, encoder.tower.re_table.weight)
        start_from_retrieval(deepfm, config, effect)
        return ListwiseDeepFM(deepfm, config)

    def write(model: ListwiseDeepFM, config: RerankerConfig, lists: int, shown: int, **report: FitReport) -> None:
        release.save_weights(RERANKER, model.deepfm)
        release.record(
            "reranker", config=config, prices=prices, lists=lists, impressions={"lists": shown, "why": why},
            options=options.model_dump(mode="json", exclude={"database_url"}), **report,
        )  # fmt: skip

    if features is None:
        if is_main_process():
            write(new_model(0.0), replace(config, trust=0.0, stranger_trust=0.0), 0, 0)
            lacking = (
                f"fewer than {LEAST_LISTS} lists of the held-out days hold what the shopper took; import more events, or raise "
                "--validation-share of train_user.py"
                if release.learned_from_events
                else f"{USER_TOWER} learned nothing either; when there are more events, train again (retrain.py)"
            )
            print(f"release {release.name}: {RERANKER} learned nothing, and lists keep retrieval's order: {lacking}")
        return
    lists = features.lists
    if shown and is_main_process():
        print(f"impressions: {lists.shown.sum()} of them hold something seen and not taken that is still sold")
    metric = f"ndcg@{NDCG_AT}" + (" with impressions" if with_places else "")  # not to be compared with one without

    judging = lists.judging()
    train_rows, validation_rows = np.flatnonzero(~judging), np.flatnonzero(judging)
    effect = place_effect(lists, train_rows)
    weight_of = lists.weights(np.arange(len(lists)))
    validation_weights = lists.weights(validation_rows)

    def logits(model: nn.Module, which: np.ndarray) -> tuple[Tensor, Tensor]:
        """The model's own, and retrieval's; of what was shown, given the places."""
        batch = features.batch(which)
        retrieval = config.retrieval_of(batch)
        if with_places:
            position = torch.from_numpy(np.log(np.maximum(lists.place[which], 1))).float()
            if model.training:
                position = position * (torch.rand(len(which), 1) >= POSITION_DROPOUT)
            batch = replace(batch, position=position)
            retrieval = retrieval + effect * position
        unseen = torch.from_numpy(~lists.counts(which))
        return model(batch).masked_fill(unseen, NOT_SEEN), retrieval.masked_fill(unseen, NOT_SEEN)

    def loss(model: nn.Module, which: np.ndarray) -> Tensor:
        positive = torch.from_numpy(lists.positive[which]).float()
        target = positive / positive.sum(1, keepdim=True)
        weight = torch.from_numpy(weight_of[which]).float()
        return (F.cross_entropy(logits(model, which)[0], target, reduction="none") * weight).mean()

    def validate(model: nn.Module) -> dict[str, float]:
        parts = [logits(model, validation_rows[i : i + 256]) for i in range(0, len(validation_rows), 256)]
        own_logits, retrieval = (torch.cat(column) for column in zip(*parts, strict=True))
        found = ndcg_by_trust(own_logits, retrieval, lists.positive[validation_rows], lists.answers[validation_rows])
        known = lists.known[validation_rows]
        trust, stranger_trust = best_trusts(found, known)
        own, before = np.where(known, found[trust], found[stranger_trust]), found[0.0]
        return {
            metric: float(np.average(own, weights=validation_weights)),
            f"ndcg@{NDCG_AT} of retrieval": float(np.average(before, weights=validation_weights)),
            "with history": float(own[known].mean()) if known.any() else 0.0,
            "of retrieval": float(before[known].mean()) if known.any() else 0.0,
            "trust": trust,
            "stranger trust": stranger_trust,
        }

    def batches(rows: np.ndarray) -> Callable[[int], list[np.ndarray]]:
        return lambda epoch: shuffled_batches(rows, options.batch_size, options.seed, epoch)

    model = new_model(effect)
    report = fit(model, batches(train_rows), loss, validate, metric, options, release.folder, STAGE)
    best = report.history[report.best_epoch]  # the start is epoch 0
    config = replace(config, trust=best["trust"], stranger_trust=best["stranger trust"])
    if options.refit and report.best_epoch:
        model = new_model(effect)
        again = options.model_copy(update={"epochs": report.best_epoch})
        fit(
            model, batches(np.arange(len(lists))), loss, lambda model: {"epochs": 0.0}, "epochs", again, release.folder,
            f"{STAGE}_refit", keep_best=False,
        )  # fmt: skip
    if not is_main_process():
        return  # one process writes the release
    write(model, config, len(lists), int(lists.shown.sum()), report=report)
    for stage in (STAGE, f"{STAGE}_refit"):
        finish(release.folder, stage)
    print(
        f"release {release.name}: {RERANKER}, {report.metric} {report.best:.4f} on {len(validation_rows)} later lists "
        f"(retrieval's own order {best[f'ndcg@{NDCG_AT} of retrieval']:.4f}), trusted {config.trust:.0%} with shoppers who have a "
        f"history and {config.stranger_trust:.0%} with strangers, after {report.seconds:.0f} s"
    )


if __name__ == "__main__":
    run_script(RerankerOptions, main)
