"""How much of a split could be known: an oracle that other shoppers of the test days tell what those days brought.

    python evaluate.py rtr-cold FOLDER --ceiling

It starts from what the release answers and learns, on top of that, what no system can know at the cut:

- how often each item was taken in the test days, in all and within two weeks of the request;
- what the same shoppers took together, the test days counted too (item_links.py);
- a bias of each item and a low-rank product of the shopper's query with a vector of each item (Koren, Bell and Volinsky, IEEE
  Computer 2009), fitted by a softmax over the whole catalogue to what other shoppers of the split took.

Of all this a shopper's own part is left out, and that of the fifth of the shoppers whom they are judged with. Two things make the
oracle better than it could honestly be: it stops at the epoch that is best for the very shoppers judged, and what teaches it
is of the same days. So it shows about where models of this kind end; it is no bound that nothing could pass.

A second oracle leaves the release's lists as they are but for the items that nobody met by the cut: in their places stand those
whose contents (values and title) others of the test days took oftenest. It shows what the best reader of contents could do for
goods that nothing else is known of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from baselines import Case, Split
from item_links import ItemLinks, group_numbers
from metrics import RETRIEVED
from settings import UserError
from tensors import DAY, log_strength

FOLDS = 5
NEAR_DAYS = 14  # before and after a request: what is wanted around then
TABLE_EPOCHS, TABLE_RATE = 3, 0.1  # of the weights of whole tables alone
EPOCHS, LEARNING_RATE = 6, 2e-3  # of everything
WEIGHT_DECAY = 0.05
# Adam gives a parameter its whole step however little its gradient is; of a hundred thousand items nearly all would be moved by
# chance. Above the gradient of an item that nobody in the batch took, below that of one that somebody did.
EPSILON = 1e-3
RANK = 64
DROPOUT = 0.3
MOST_SCORES = 16_000_000  # of a batch of shoppers and the whole catalogue
MOST_SHOPPERS = 128  # of a batch
SEED = 0
TOLD = 6  # tables that `Oracle._told` makes


@dataclass(frozen=True)
class Events:
    """Who took what, and when."""

    user: np.ndarray  # int64 [E]
    item: np.ndarray  # int64 [E], catalogue rows
    at: np.ndarray  # float64 [E], epoch seconds

    def take(self, kept: np.ndarray) -> Events:
        return Events(self.user[kept], self.item[kept], self.at[kept])


@dataclass(frozen=True)
class Answers:
    """What the release makes of C requests to a catalogue of N items."""

    queries: np.ndarray  # float32 [C, D], of its user tower
    rows: np.ndarray  # float32 [N, D], of the items
    lists: Sequence[Sequence[str]]  # of each request, best first


class Correction(nn.Module):
    """What is learned on top of the release; it starts as the release's own inner product."""

    def __init__(self, items: int, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.weights = nn.Parameter(torch.zeros(TOLD))
        self.bias = nn.Parameter(torch.zeros(items))
        self.item = nn.Embedding(items, RANK)
        nn.init.zeros_(self.item.weight)
        self.shopper = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * RANK), nn.GELU(), nn.Dropout(DROPOUT), nn.Linear(2 * RANK, RANK)
        )

    def forward(self, queries: Tensor, rows: Tensor, told: Sequence[Tensor]) -> Tensor:
        """queries float32 [B, D], rows [N, D], told TOLD times [B, N]: logits float32 [B, N]."""
        logits = self.scale * (queries @ rows.T) + self.shopper(queries) @ self.item.weight.T + self.bias
        for weight, table in zip(self.weights, told, strict=True):
            logits = logits + weight * table
        return logits


class Oracle:
    """Answers each fold of the shoppers with what the others teach."""

    def __init__(self, split: Split, cases: Sequence[Case], judged: int, answers: Answers, taken: pl.DataFrame) -> None:
        """cases: a request each of the shoppers who teach; the first `judged` of them are answered. taken: all events of the test
        days, of whomever, with `user_id`, `product_id` and `at`."""
        self.split, self.judged, self.answers = split, judged, answers
        row_of = {product_id: row for row, product_id in enumerate(split.product_ids)}
        self.targets, self.lists = (
            [np.array([row_of[id_] for id_ in ids if id_ in row_of], dtype=np.int64) for ids in given]
            for given in ([case.targets for case in cases], answers.lists)
        )
        self.met = [split.items_of(case.user_id) for case in cases]
        self.day = np.array([case.at // DAY for case in cases])
        self.fold = np.random.default_rng(SEED).permutation(len(cases)) % FOLDS
        self.rows = torch.from_numpy(answers.rows)

        number_of = {user_id: number for number, user_id in enumerate(split.histories.user_ids)}
        taken = taken.filter(pl.col("product_id").is_in(split.product_ids)).sort("at", maintain_order=True)
        for user_id in [*taken["user_id"], *(case.user_id for case in cases)]:
            number_of.setdefault(user_id, len(number_of))
        fold_of = np.full(len(number_of), -1)
        fold_of[[number_of[case.user_id] for case in cases]] = self.fold
        after = Events(
            np.array([number_of[user_id] for user_id in taken["user_id"]], dtype=np.int64),
            np.array([row_of[product_id] for product_id in taken["product_id"]], dtype=np.int64),
            taken["at"].dt.epoch("s").to_numpy().astype(np.float64),
        )
        # A shopper teaches with all that they newly took.
        order = np.argsort(after.user, kind="stable")
        bounds = np.searchsorted(after.user[order], np.arange(len(number_of) + 1))
        self.taken = []
        for case, met in zip(cases, self.met, strict=True):
            number = number_of[case.user_id]
            items = after.item[order[bounds[number] : bounds[number + 1]]]
            self.taken.append(np.setdiff1d(items, met))
        # What the test days tell a fold: everything but what its own shoppers took.
        self.told_to = [after.take(fold_of[after.user] != fold) for fold in range(FOLDS)]
        self.links_of = [self._links(told) for told in self.told_to]
        self.near = cache(self._near)
        # The release puts what nobody met far down.
        self.unmet = (np.bincount(split.histories.item, minlength=len(split.product_ids)) == 0).astype(np.float32)

    def recommend(self) -> list[list[str]]:
        """The best RETRIEVED products for each shopper who is judged, without what they met before, best first.

        Raises UserError when there is nobody to teach it."""
        lists: list[list[str]] = [[] for _ in range(self.judged)]
        for fold in range(FOLDS):
            judged = np.flatnonzero(self.fold[: self.judged] == fold)
            for case, rows in zip(judged, self._answer(fold, judged), strict=True):
                lists[case] = [self.split.product_ids[row] for row in rows]
        return lists

    def recommend_contents(self) -> list[list[str]]:
        """The release's lists of the shoppers who are judged, but in the places of what nobody met by the cut stand the items whose
        contents others took oftenest, per item of such contents. What is alike in contents comes in random order."""
        unmet = np.flatnonzero(self.unmet)
        # One number for all items of the same values and title.
        products = [self.split.products[row] for row in unmet.tolist()]
        content = group_numbers([product.model_dump_json(exclude={"product_id"}) for product in products])
        shuffled = np.random.default_rng(SEED).permutation(len(unmet))
        oftenest = []
        for told in self.told_to:
            taken = np.bincount(told.item, minlength=len(self.unmet))[unmet]
            rate = np.bincount(content, weights=taken) / np.bincount(content)
            oftenest.append(unmet[np.lexsort((shuffled, -rate[content]))])
        lists = []
        for rows, fold in zip(self.lists[: self.judged], self.fold[: self.judged], strict=True):
            places = np.flatnonzero(self.unmet[rows])
            filled = rows.copy()
            filled[places] = oftenest[fold][: len(places)]
            lists.append([self.split.product_ids[row] for row in filled])
        return lists

    def _answer(self, fold: int, judged: np.ndarray) -> np.ndarray:
        """Lists of catalogue rows of the cases `judged` [B], after the epoch that is best for them: int64 [B, RETRIEVED]."""
        torch.manual_seed(SEED)
        random = np.random.default_rng([SEED, fold])
        model = Correction(*self.answers.rows.shape)
        teaching = np.array([case for case in np.flatnonzero(self.fold != fold) if len(self.taken[case])])
        if not len(teaching):
            raise UserError(
                "too few shoppers took anything new in the test days to teach an oracle; leave out --ceiling"
            )
        few, many = [model.scale, model.weights], [model.bias, *model.item.parameters(), *model.shopper.parameters()]
        every: list[dict[str, Any]] = [
            {"params": few, "lr": TABLE_RATE, "weight_decay": 0.0},
            {"params": many, "lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY},
        ]
        best, kept = 0, np.zeros((0, 0), dtype=np.int64)
        # The few first: where shoppers are too few to teach what is particular to items, their best epoch is the oracle's.
        for groups, epochs in ((every[:1], TABLE_EPOCHS), (every, EPOCHS)):
            steps = epochs * len(self._batches(teaching))
            optimiser = torch.optim.AdamW([dict(group) for group in groups], eps=EPSILON)  # it writes into them
            rates = [group["lr"] for group in groups]
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rates, total_steps=steps)
            for epoch in range(epochs):
                model.train()
                batches = self._batches(random.permutation(teaching))
                for cases in tqdm(batches, desc=f"oracle {fold + 1}/{FOLDS}, epoch {epoch + 1}/{epochs}", leave=False):
                    loss = self._loss(model, cases)
                    optimiser.zero_grad()
                    loss.backward()
                    optimiser.step()
                    schedule.step()
                found = self._found(model.eval(), judged)
                hits = sum(np.isin(self.targets[case], rows).sum() for case, rows in zip(judged, found, strict=True))
                if hits >= best:
                    best, kept = hits, found
        return kept

    def _batches(self, cases: np.ndarray) -> list[np.ndarray]:
        size = max(1, min(MOST_SHOPPERS, MOST_SCORES // len(self.rows)))
        return [cases[start : start + size] for start in range(0, len(cases), size)]

    def _loss(self, model: Correction, cases: np.ndarray) -> Tensor:
        shares = F.log_softmax(self._logits(model, cases), dim=1)
        own = [row[torch.from_numpy(self.taken[case])].mean() for row, case in zip(shares, cases, strict=True)]
        return -torch.stack(own).mean()

    @torch.no_grad()
    def _found(self, model: Correction, cases: np.ndarray) -> np.ndarray:
        count = min(RETRIEVED, len(self.rows))
        return np.concatenate([self._logits(model, part).topk(count).indices.numpy() for part in self._batches(cases)])

    def _logits(self, model: Correction, cases: np.ndarray) -> Tensor:
        """float32 [B, N], -inf for what was met."""
        queries = torch.from_numpy(self.answers.queries[cases])
        logits = model(queries, self.rows, [torch.from_numpy(table) for table in self._told(cases)])
        met = torch.zeros_like(logits, dtype=torch.bool)
        for row, case in enumerate(cases):
            met[row, torch.from_numpy(self.met[case])] = True
        return logits.masked_fill(met, -torch.inf)

    def _told(self, cases: np.ndarray) -> np.ndarray:
        """Where the release puts an item, and what the test days tell the folds of `cases` [B]: float32 [TOLD, B, N]."""
        tables = np.zeros((TOLD, len(cases), len(self.rows)), dtype=np.float32)
        listed, place, often, near, together, unmet = tables
        unmet[:] = self.unmet
        for row, case in enumerate(cases):
            found, fold = self.lists[case], int(self.fold[case])
            listed[row, found], place[row, found] = 1.0, -np.log1p(np.arange(len(found)))
            often[row] = self.near(fold, None)
            near[row] = self.near(fold, self.day[case])
        for fold in np.unique(self.fold[cases]):
            own = np.flatnonzero(self.fold[cases] == fold)
            together[own] = self._together(fold, cases[own])
        return tables

    def _near(self, fold: int, day: float | None) -> np.ndarray:
        """log(1 + how often) each item was taken within NEAR_DAYS of that day, or in all the test days: float32 [N]."""
        told = self.told_to[fold]
        if day is not None:
            told = told.take(np.abs(told.at / DAY - day) <= NEAR_DAYS)
        return np.log1p(np.bincount(told.item, minlength=len(self.rows))).astype(np.float32)

    def _links(self, told: Events) -> ItemLinks:
        histories = self.split.histories
        user, item = np.concatenate([histories.user, told.user]), np.concatenate([histories.item, told.item])
        return ItemLinks.build(user, item, group_numbers(list(self.split.groups)))

    def _together(self, fold: int, cases: np.ndarray) -> np.ndarray:
        """How strongly what each shopper met is linked to every item: float32 [B, N]."""
        met = [self.met[case] for case in cases]
        lengths = np.array([len(items) for items in met])
        mask = np.arange(max(1, lengths.max())) < lengths[:, None]
        history = np.zeros(mask.shape, dtype=np.int64)
        history[mask] = np.concatenate(met)
        strength, _ = self.links_of[fold].scores(history, mask, np.arange(len(self.rows)))
        return log_strength(strength)
