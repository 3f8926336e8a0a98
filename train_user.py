"""Stage 2: train the user tower against the frozen item tower and write user_tower.pth into the release.

    python train_user.py                       # works on the newest release

Two fits. The first holds out the newest events: they choose the number of epochs and how far histories and links are trusted, and
the reranker later learns from them with this tower, which never saw them. The second learns from everything for as many epochs; it
is the one that serves.

Loss: sampled softmax over in-batch targets and negatives, half of them uniform and half hard: drawn from what the tower itself
ranks high. Each counts by how likely it was to be among them, so that the denominator is on average that of the full softmax
(Horvitz and Thompson, JASA 1952; with draws that may repeat it is the logQ correction of Yi et al., RecSys 2019). A catalogue of
at most `negatives` items gets the full softmax.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from item_links import ItemLinks
from model_user import UserTower, UserTowerConfig
from release import USER_TOWER, USER_TOWER_HOLDOUT, ItemEncoder, Release
from settings import WARNING, UserError, run_script
from shop_data import HoldOutOptions, Requests, ShopData, validation_start
from store import Store
from tensors import DAY, PROFILE_CLIP, HistoryIndex, ProfileScaler, UserBatch
from text_encoder import TextEncoder
from training import FitReport, finish, fit, is_main_process

STAGE = "user"
RETRIEVED = 100
YEAR = 365.0  # days
POPULARITY_TABLES = 32  # days whose popularity is kept in memory
SCORE_BATCH = 256  # requests scored against the whole catalogue at once, at most
MOST_SCORES = 32_000_000  # of those requests: several tables of so many numbers live at a time
MINING_REQUESTS = 1024  # that hard negatives are mined from, each epoch
MINED = 50  # top items of each
LEAST_TARGETS = 2  # events from which something can be learned
CROWD = 10_000  # events that no single person makes
NAMED = 3  # of those who made so many
GOING_ON = 0.3  # of the learning rate, for a tower that is trained and goes on learning
# What is tried of the history's share of a query, and times the learned weights of links; of equally good ones the first is taken.
# Links may count for more than they learned to: a tower that goes without them in most examples (`--forget-links`) knows little of
# what they know by then.
HISTORY_TRUSTS = (1.0, 0.75, 0.5)
LINK_TRUSTS = (1.0, 0.75, 1.5, 0.5, 2.0, 0.25, 0.125, 0.0)


class UserOptions(HoldOutOptions):
    epochs: int = Field(12, ge=1, le=10_000, description="passes over the events at most")
    weight_decay: float = Field(0.05, ge=0, le=1, description="of AdamW; collaborative coordinates need much")
    negatives: int = Field(8192, ge=16, description="items a step that everybody's target competes with")
    hard_share: float = Field(
        0.5, ge=0, lt=1, description="share of the negatives drawn from what the tower ranks high"
    )
    history: int = Field(30, ge=1, le=500, description="events of a shopper that are read, the latest ones")
    baskets: bool = Field(True, description="let events of the same instant stand in each other's history")
    forget: float = Field(0.1, ge=0, lt=1, description="share of shoppers whose history, context or body is hidden")
    forget_links: float = Field(
        0.5, ge=0, lt=1, description="share of examples without the links of what was taken together"
    )
    collaborative: int = Field(32, ge=0, le=512, description="collaborative coordinates of an item; 0 for none")
    adapter: bool = Field(
        True,
        description="let what STD and RE values say to shoppers turn item vectors; without: they stay as the item tower made them",
    )
    layers: int = Field(1, ge=1, le=12, description="transformer layers over the history")
    train_days: float = Field(540.0, gt=0, description="days of events before the newest that are learned from")
    validation_requests: int = Field(10_000, ge=1, description="held-out requests scored after each epoch, at most")
    popularity_days: list[float] = Field([1.0, 7.0, 30.0, 90.0, 365.0], description="trailing windows of popularity")
    season_days: float = Field(
        90.0, ge=0, le=365, description="how wanted an item was a year ago in so many days to come; 0 leaves it out"
    )
    refit: bool = Field(True, description="learn from the held-out events too before serving")
    behaviour: bool = Field(True, description="for ablation: whether the tower reads histories and follows their links")
    context: bool = Field(True, description="for ablation: whether the tower reads contexts")
    profile: bool = Field(True, description="for ablation: whether the tower reads profiles")
    popularity: bool = Field(True, description="for ablation: whether queries have weights for popularity coordinates")
    unread_figures: list[str] = Field(
        [], description="for ablation: figures of profiles that neither this stage nor the reranker reads"
    )


def targets_before(shop: ShopData, options: UserOptions, end: float) -> np.ndarray:
    """Events to learn from before `end`, see `ShopData.targets`."""
    return shop.targets(end - options.train_days * DAY, end)


class SampledSoftmax:
    """Batches and loss of the user tower over events before `end`."""

    def __init__(
        self, shop: ShopData, tower: UserTower, options: UserOptions, profiles: np.ndarray, end: float
    ) -> None:
        """profiles: of each user, scaled, float32 [U, P]. Raises UserError when there is nothing to learn from."""
        self.shop, self.tower, self.options, self.profiles, self.end = shop, tower, options, profiles, end
        self.targets = targets_before(shop, options, end)
        if len(self.targets) < LEAST_TARGETS:
            raise UserError(
                f"only {len(self.targets)} events to learn from before {np.datetime64(int(end), 's')} UTC; "
                "import more events, or raise --train-days"
            )
        self.length = shop.histories.lengths(self.targets, options.history, options.baskets)
        self.day = (shop.histories.at[self.targets] // DAY).astype(np.int64)
        count = len(shop.items)
        self.target_share = np.bincount(shop.histories.item[self.targets], minlength=count) / len(self.targets)
        self.hard_share_of = np.full(count, 1.0 / count)
        self.mined_epoch = 0
        self.links = shop.links(end)
        self.popularity = lru_cache(POPULARITY_TABLES)(self._popularity)

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Batches of events of one day each, so that one popularity table serves a batch, and of histories of about one
        length, so that little of it is padding."""
        random = np.random.default_rng([self.options.seed, epoch])
        order = random.permutation(len(self.targets))
        order = order[np.lexsort((self.length[order], self.day[order]))]
        batches: list[np.ndarray] = []
        size = self.options.batch_size
        for rows in np.split(order, np.flatnonzero(np.diff(self.day[order])) + 1):
            batches += [self.targets[rows[i : i + size]] for i in range(0, len(rows), size)]
        random.shuffle(batches)
        # Once an epoch, before its first step: a run resumed within an epoch goes on with the negatives of its start.
        if epoch > self.mined_epoch and self.options.hard_share > 0 and len(self.shop.items) > self.options.negatives:
            self._mine(random)
            self.mined_epoch = epoch
        return [batch for batch in batches if len(batch) > 1]

    def state_dict(self) -> dict[str, Any]:
        """What was mined, for a checkpoint."""
        return {"hard_share_of": torch.from_numpy(self.hard_share_of), "mined_epoch": self.mined_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.hard_share_of, self.mined_epoch = state_dict["hard_share_of"].numpy(), state_dict["mined_epoch"]

    def _popularity(self, as_of: float) -> Tensor:
        """Popularity coordinates of the whole catalogue: float32 [N, P]."""
        return self.shop.popularity_as_of(as_of)

    def loss(self, model: nn.Module, rows: np.ndarray) -> Tensor:
        shop, histories, options = self.shop, self.shop.histories, self.options
        as_of = float(histories.at[rows].min() // DAY * DAY)
        popularity = self.popularity(as_of)
        index = histories.before(rows, options.history, options.baskets)
        batch = self.tower.forget(self._user_batch(index, rows, popularity), options.forget)
        query = model(batch)  # (B, D)

        items = histories.item[rows]
        candidates, log_inclusion = self._candidates(items)
        numbers = torch.from_numpy(candidates)
        keys = self.tower.item_rows(numbers, shop.adapted(self.tower, candidates), popularity[numbers])  # (C, D)
        column_of = np.full(len(shop.items), -1)
        column_of[candidates] = np.arange(len(candidates))
        target = column_of[items]
        history = histories.item[index.index]
        together, variant = self.links.scores(history, batch.history_mask.numpy(), candidates, target)
        # What a table knows the tower need not learn, and would not; but the table knows little beyond the first hundred items.
        together[torch.rand(len(rows)).numpy() < options.forget_links] = 0.0
        scores = query @ keys.T + self.tower.link_scores(together, variant)
        logits = scores - log_inclusion  # (B, C)
        # What the shopper already met is not offered again, so it is no competitor. Nor is what they took later: it is no wrong
        # answer, and its links with the history, unlike the target's, are counted with this shopper's own taking.
        row, event = histories.of_users(histories.user[rows], self.end)
        column = column_of[histories.item[event]]
        logits[torch.from_numpy(row[column >= 0]), torch.from_numpy(column[column >= 0])] = -torch.inf
        weight = torch.from_numpy(histories.weight[rows])
        own = (torch.arange(len(rows)), torch.from_numpy(target))
        logits[own] = scores[own]  # one of what they took, and there for certain
        return (F.cross_entropy(logits, own[1], reduction="none") * weight).sum() / weight.sum()

    def _user_batch(self, index: HistoryIndex, rows: np.ndarray, popularity: Tensor) -> UserBatch:
        histories = self.shop.histories
        return self.shop.user_batch(
            self.tower,
            index,
            histories.user[rows],
            histories.context[rows],
            histories.at[rows],
            self.profiles,
            popularity,
        )

    def _candidates(self, targets: np.ndarray) -> tuple[np.ndarray, Tensor]:
        """Distinct catalogue rows [C] that compete, and the log of how likely each was to be drawn."""
        count, drawn = len(self.shop.items), self.options.negatives
        if count <= drawn:
            return np.arange(count), torch.zeros(count)
        # torch's generator, since a resumed run restores it.
        hard = int(drawn * self.options.hard_share)
        uniform = torch.randint(count, (drawn - hard,)).numpy()
        mined = (
            torch.multinomial(torch.from_numpy(self.hard_share_of), hard, replacement=True).numpy()
            if hard
            else uniform[:0]
        )
        candidates = np.unique(np.concatenate([targets, uniform, mined]))
        expected = (
            len(targets) * self.target_share[candidates]
            + (drawn - hard) / count
            + hard * self.hard_share_of[candidates]
        )
        return candidates, torch.from_numpy(np.log(-np.expm1(-expected))).float()

    @torch.no_grad()
    def _mine(self, random: np.random.Generator) -> None:
        """What the tower ranks high now becomes what negatives are drawn from."""
        rows = random.choice(self.targets, size=min(MINING_REQUESTS, len(self.targets)), replace=False)
        histories = self.shop.histories
        as_of = float(histories.at[self.targets].max() // DAY * DAY)
        popularity = self.popularity(as_of)
        training = self.tower.training
        self.tower.eval()
        keys = item_keys(self.tower, self.shop, popularity)
        counts = np.zeros(len(self.shop.items))
        for start in range(0, len(rows), SCORE_BATCH):
            part = rows[start : start + SCORE_BATCH]
            index = histories.before(part, self.options.history)
            query = self.tower(self._user_batch(index, part, popularity))
            np.add.at(counts, (query @ keys.T).topk(min(MINED, len(keys))).indices.numpy().ravel(), 1)
        self.tower.train(training)
        self.hard_share_of = counts / counts.sum()


def learn(
    tower: UserTower, shop: ShopData, options: UserOptions, profiles: np.ndarray, end: float, folder: Path, name: str
) -> None:
    """Let a tower learn from all events before `end`, in place, for as many epochs as the options say: nothing is held out to judge
    them. Arguments as of SampledSoftmax and `fit`."""
    softmax = SampledSoftmax(shop, tower, options, profiles, end)
    fit(
        tower, softmax.batches, softmax.loss, lambda model: {"epochs": 0.0}, "epochs", options, folder, name, keep_best=False,
        parameters=parameter_groups, state=softmax,
    )  # fmt: skip


def learn_on(
    tower: UserTower, shop: ShopData, options: UserOptions, profiles: np.ndarray, end: float, folder: Path, name: str
) -> None:
    """Let a trained tower go once more over all events before `end`, newer ones than it was trained with, in place: about what it
    would be, trained then. Of the newer ones alone it would learn less than it forgets."""
    config = tower.config
    # As it learned before: or histories and links would make up for what they lack.
    tower.config = replace(config, history_trust=1.0, link_trust=1.0)
    rate = GOING_ON * options.learning_rate
    once = options.model_copy(update={"epochs": 1, "learning_rate": rate, "fresh": True})
    learn(tower, shop, once, profiles, end, folder, name)
    finish(folder, name)
    tower.config = config


def item_keys(tower: UserTower, shop: ShopData, popularity: Tensor) -> Tensor:
    """Index rows of the whole catalogue: float32 [N, row_width]."""
    every = np.arange(len(shop.items))
    return tower.item_rows(torch.from_numpy(every), shop.adapted(tower, every), popularity)


@dataclass(frozen=True)
class Retrieved:
    """Candidates of B requests, N each, best first."""

    rows: np.ndarray  # int64 [B, N], of the catalogue
    scores: np.ndarray  # float32 [B, N], links counted
    together: np.ndarray  # float32 [B, N], see ItemLinks.scores
    variant: np.ndarray  # float32 [B, N], likewise
    queries: np.ndarray  # float32 [B, D]

    def take(self, which: np.ndarray) -> Retrieved:
        """The requests that an index picks."""
        return Retrieved(*(getattr(self, part.name)[which] for part in fields(self)))

    @classmethod
    def joined(cls, parts: Sequence[Retrieved]) -> Retrieved:
        return cls(*(np.concatenate([getattr(part, name.name) for part in parts]) for name in fields(cls)))


@torch.no_grad()
def retrieve(
    tower: UserTower, shop: ShopData, links: ItemLinks, requests: Requests, profiles: np.ndarray, history: int,
    count: int, new: int = 0, progress: str = "", kept: Sequence[np.ndarray] | None = None,
) -> Retrieved:  # fmt: skip
    """The best `count` catalogue rows for each request by exact search, without what the shopper met before; of items that had no
    event yet at least the best `new`. The distinct rows `kept` of each request, `count` at most, are among them however they score.
    """
    parts: list[Retrieved] = []
    start = 0
    for scored in _scored(tower, shop, links, requests, profiles, history, progress):
        of_part = None if kept is None else kept[start : start + len(scored.requests)]
        start += len(scored.requests)
        logits = scored.unlinked + tower.link_scores(scored.together, scored.variant)
        _hide_met(logits, shop, scored.requests, of_part)
        found = best(logits, min(count, logits.shape[1]), scored.untouched, new).numpy()
        if of_part is not None:
            found = np.stack([with_kept(*row) for row in zip(found, of_part, logits.numpy(), strict=True)])
        taken = (logits.numpy(), scored.together, scored.variant)
        scores, *linked = (np.take_along_axis(part, found, axis=1) for part in taken)
        parts.append(Retrieved(found, scores, linked[0], linked[1], scored.queries.numpy()))
    return Retrieved.joined(parts)


@torch.no_grad()
def trusted_config(
    tower: UserTower, shop: ShopData, links: ItemLinks, requests: Requests, profiles: np.ndarray, history: int, count: int,
) -> UserTowerConfig:  # fmt: skip
    """The tower's configuration with those of HISTORY_TRUSTS and of LINK_TRUSTS with which most of what the shoppers of `requests`
    took is among the best `count`.

    Training reads what happened just before the very days it learns from. What is asked later is asked of older histories and
    links, and they say less, the less the longer ago and the faster a shop's goods change.
    """
    config = tower.config
    tower.config = replace(config, history_trust=1.0, link_trust=1.0)
    found: Counter[tuple[float, float]] = Counter()
    for scored in _scored(tower, shop, links, requests, profiles, history):
        # Queries, and so logits, are mixed in proportion to the trust: both are made once for all of them.
        of_strangers = tower.stranger_query(scored.batch) @ scored.keys.T
        added = tower.link_scores(scored.together, scored.variant)
        for history_trust in HISTORY_TRUSTS:
            unlinked = torch.lerp(of_strangers, scored.unlinked, history_trust)
            _hide_met(unlinked, shop, scored.requests)
            for link_trust in LINK_TRUSTS:
                rows = (unlinked + link_trust * added).topk(min(count, added.shape[1])).indices.numpy()
                found[history_trust, link_trust] += int(hits(rows, scored.requests.answers, count).sum())
    tower.config = config
    history_trust, link_trust = max(found, key=found.__getitem__)
    return replace(config, history_trust=history_trust, link_trust=link_trust)


@dataclass(frozen=True)
class _Scored:
    """B requests and the whole catalogue of N."""

    requests: Requests
    batch: UserBatch
    untouched: Tensor  # bool [N], items that had no event yet
    keys: Tensor  # float32 [N, D]
    queries: Tensor  # float32 [B, D]
    unlinked: Tensor  # float32 [B, N], logits before links
    together: np.ndarray  # float32 [B, N], see ItemLinks.scores
    variant: np.ndarray  # float32 [B, N], likewise


def _scored(
    tower: UserTower, shop: ShopData, links: ItemLinks, requests: Requests, profiles: np.ndarray, history: int,
    progress: str = "",
) -> Iterator[_Scored]:  # fmt: skip
    """So many requests at once as fit into memory, in order."""
    popularity = shop.popularity_as_of(requests.as_of)
    keys = item_keys(tower, shop, popularity)
    untouched = popularity[:, -1] > 0
    batch_size = max(1, min(SCORE_BATCH, MOST_SCORES // len(keys)))
    every = np.arange(len(keys))
    starts = range(0, len(requests), batch_size)
    for start in tqdm(starts, desc=progress, unit="batch", disable=not progress, leave=False):
        part = requests.take(np.arange(start, min(start + batch_size, len(requests))))
        now = part.moments
        index = shop.history_as_of(part.users, now, history)
        batch = shop.user_batch(tower, index, part.users, part.contexts, now, profiles, popularity)
        query = tower(batch)
        together, variant = links.scores(shop.histories.item[index.index], index.mask, every)
        yield _Scored(part, batch, untouched, keys, query, query @ keys.T, together, variant)


def _hide_met(logits: Tensor, shop: ShopData, requests: Requests, kept: Sequence[np.ndarray] | None = None) -> None:
    """Take what each shopper met by then out of [B, N], in place, but for the rows `kept` of each."""
    for row, (user, now) in enumerate(zip(requests.users, requests.moments, strict=True)):
        met = shop.seen(user, now).astype(np.int64)
        if kept is not None:
            met = np.setdiff1d(met, kept[row])
        logits[row, torch.from_numpy(met)] = -torch.inf


def best(logits: Tensor, count: int, untouched: Tensor, new: int) -> Tensor:
    """Columns of the greatest `count` of each row of logits [B, N], greatest first; the greatest `new` of those that `untouched`
    bool [N] marks are among them, however small: int64 [B, count]."""
    new = min(new, count, int(untouched.sum()))
    if new == 0:
        return logits.topk(count).indices
    reserved = logits.masked_fill(~untouched, -torch.inf).topk(new)
    # Who met all of them but a few has fewer to be lifted; the places of the others say nothing.
    lift = torch.where(reserved.values > -torch.inf, torch.inf, logits.gather(1, reserved.indices))
    chosen = logits.scatter(1, reserved.indices, lift).topk(count).indices
    order = logits.gather(1, chosen).argsort(dim=1, descending=True, stable=True)
    return chosen.gather(1, order)


def with_kept(found: np.ndarray, kept: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """`found` int64 [N] with all of `kept` in it, in the places of its last others; greatest scores [catalogue] first."""
    missing = np.setdiff1d(kept, found)
    others = np.flatnonzero(~np.isin(found, kept))
    chosen = found.copy()
    chosen[others[len(others) - len(missing) :]] = missing
    return chosen[np.argsort(-scores[chosen], kind="stable")]


def hits(rows: np.ndarray, answers: list[np.ndarray], count: int) -> np.ndarray:
    """How many of its answers stand among the first `count` rows of each request: int64 [B]."""
    found = [np.isin(answer, row[:count]).sum() for row, answer in zip(rows, answers, strict=True)]
    return np.array(found, dtype=np.int64)


def recall(rows: np.ndarray, answers: list[np.ndarray], count: int) -> float:
    """The share of all answers found among the first `count` rows of their request."""
    return float(hits(rows, answers, count).sum()) / max(1, sum(len(answer) for answer in answers))


def lacking_to_learn(shop: ShopData, options: UserOptions, split: float, held_out: Requests) -> str:
    """What a log lacks to be learned from until `split` and judged by after it; empty when it lacks nothing."""
    if not len(shop.histories.at):
        return "there is no event on a product yet"
    if len(targets_before(shop, options, split)) < LEAST_TARGETS:
        return f"fewer than {LEAST_TARGETS} events to learn from before {np.datetime64(int(split), 's')} UTC"
    return "" if len(held_out) else "no shopper meets anything new in the held-out days"


def doubts(shop: ShopData, scaler: ProfileScaler) -> list[str]:
    """What in a shop's data is hardly what it seems, in words for people."""
    said = [
        f"{len(far):,} values of {field} are more than {PROFILE_CLIP:g} standard deviations from the mean, as {far[0]:g} is, and "
        "count as so many; are they in another unit?"
        for field, far in scaler.far_off(shop.profiles).items()
    ]
    histories = shop.histories
    events = np.diff(histories.starts)
    said += [
        f"shopper {histories.user_ids[user]!r} has {events[user]:,} events, {events[user] / events.sum():.0%} of all; a robot, or "
        "many people under one name? Who has no account is known by a session_id"
        for user in np.argsort(-events, kind="stable")[:NAMED]
        if events[user] >= CROWD
    ]
    return said


def main(options: UserOptions) -> None:
    release = Release.open(options.models_dir, options.release)
    encoder = ItemEncoder(release, TextEncoder.load(options))
    windows = [(days, 0.0) for days in options.popularity_days]
    if options.season_days:
        windows.append((YEAR, YEAR - options.season_days))
    with Store.open(options) as store:
        shop = ShopData.load(store, encoder, windows, options.event_weights)
        shop = shop.without_figures(options.unread_figures)
    split = validation_start(shop.histories.at, options.validation_share)
    known_until = release.manifest["item_tower"].get("pairs_until")
    if known_until is not None and split < known_until:
        raise UserError(
            f"the item tower of release {release.name} learned from events that would be held out here; give both the same "
            "--validation-share, or train the item tower again"
        )
    scaler = shop.profile_scaler(split)
    config = UserTowerConfig(
        items=len(shop.items), item_width=shop.vectors.shape[1], popularity_width=shop.popularity.width,
        profile_width=scaler.width, text_width=shop.context_vectors.shape[1], collaborative=options.collaborative,
        adapter=options.adapter, std_words=len(encoder.std_vocab), re_words=len(encoder.re_vocab),
        layers=options.layers, history=options.history, behaviour=options.behaviour,
        context=options.context, profile=options.profile, popularity=options.popularity,
    )  # fmt: skip

    def record(config: UserTowerConfig, validation_start: float, **report: FitReport) -> None:
        release.save_trained_items(shop.items.product_ids)
        release.record(
            "user_tower", config=config, profile_scaler=scaler, popularity_windows=windows, validation_start=validation_start,
            options=options.model_dump(mode="json", exclude={"database_url"}), **report,
        )  # fmt: skip

    profiles = scaler.transform(shop.profiles)
    if is_main_process():
        for doubt in doubts(shop, scaler):
            print(f"{WARNING}{doubt}")
    held_out = shop.requests(split, shop.now, split)
    if lacking := lacking_to_learn(shop, options, split, held_out):
        if is_main_process():
            tower = UserTower.untaught(config)
            for name in (USER_TOWER_HOLDOUT, USER_TOWER):
                release.save_weights(name, tower)
            record(tower.config, shop.now)
            print(
                f"release {release.name}: {USER_TOWER} learned nothing: {lacking}. Lists hold what is like the products that a "
                "shopper met, what many want, and what is new; when there are more events, train again (retrain.py)"
            )
        return
    chosen = np.random.default_rng(options.seed).permutation(len(held_out))[: options.validation_requests]
    held_out = held_out.take(chosen)

    links = shop.links(split)

    def validate(model: nn.Module) -> dict[str, float]:
        tower_now = model if isinstance(model, UserTower) else tower
        rows = retrieve(tower_now, shop, links, held_out, profiles, options.history, RETRIEVED).rows
        return {f"recall@{count}": recall(rows, held_out.answers, count) for count in (10, RETRIEVED)}

    def new_tower() -> UserTower:
        tower = UserTower(config)
        told = shop.context_vectors[shop.context_vectors.any(axis=1)]
        tower.context_scaler.fit(torch.from_numpy(told))
        return tower

    torch.manual_seed(options.seed)
    tower = new_tower()
    softmax = SampledSoftmax(shop, tower, options, profiles, split)
    report = fit(
        tower, softmax.batches, softmax.loss, validate, f"recall@{RETRIEVED}", options, release.folder, STAGE,
        parameters=parameter_groups, state=softmax,
    )  # fmt: skip
    trusted = trusted_config(tower, shop, links, held_out, profiles, options.history, RETRIEVED)
    if is_main_process():
        print(
            f"the held-out days bear out {trusted.history_trust:.1%} of what a history says in training, and "
            f"{trusted.link_trust:.1%} of what links from item to item do"
        )
        release.save_weights(USER_TOWER_HOLDOUT, tower)

    if options.refit:
        torch.manual_seed(options.seed)
        tower = new_tower()
        again = options.model_copy(update={"epochs": max(1, report.best_epoch)})
        learn(tower, shop, again, profiles, shop.now, release.folder, f"{STAGE}_refit")
    if not is_main_process():
        return  # one process writes the release
    release.save_weights(USER_TOWER, tower)
    record(trusted, split, report=report)
    for stage in (STAGE, f"{STAGE}_refit"):
        finish(release.folder, stage)
    print(f"release {release.name}: {USER_TOWER}, {report.metric} {report.best:.4f} after {report.seconds:.0f} s")


def parameter_groups(model: nn.Module) -> list[dict]:
    """Weight decay belongs on the collaborative table (it is what overfits) and on matrices, not on gains and biases."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]


if __name__ == "__main__":
    run_script(UserOptions, main)
