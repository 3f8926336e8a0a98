"""Products, histories and profiles to padded tensors: the only place that does.

Everything here is a pure function of its arguments: training, the index build and the live API all make their tensors with the
same code, so what a model sees when it serves is what it saw when it learned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from catalog import Product
from vocab import PAD, ReVocab, StdVocab

if TYPE_CHECKING:  # importing the text encoder costs seconds that a reader of tensors need not pay
    from store import EventLog
    from text_encoder import Ragged

DAY = 86_400.0  # seconds

MAX_STD_VALUES = 4  # of one field: a fifth colour says "multicolour", nothing more
MAX_RE_VALUES = 24  # of one product: the 99th percentile of the sets we know is below
MAX_TITLE_TOKENS = 24
MAX_HISTORY_IDS = 24  # STD and RE ids that summarise a shopper's history for the reranker

# What an event says about wanting, relative to a look. A skip is remembered but is nothing to aim for.
KIND_WEIGHTS = {"view": 1.0, "click": 1.0, "cart": 2.0, "purchase": 4.0, "skip": 0.0}
OTHER_KIND_WEIGHT = 1.0
INTEREST = 1.0  # what an event counts in popularity, a skip aside
MOST_OF_A_DAY = 10  # times that one shopper's doing one thing with one product counts: a page in a loop is no crowd
KIND_IDS = {kind: number for number, kind in enumerate(KIND_WEIGHTS, start=1)}  # 0: a shop's own kind
KINDS = len(KIND_IDS) + 1

MAX_AGE_DAYS = 365.0  # of an event: older is as old
PROFILE_CLIP = 4.0  # standard deviations; beyond lies a typing error
MISTYPED = 10.0  # robust standard deviations from the median; beyond, a value is no part of what shoppers are like


# --------------------------------------------------------------------------------------------------------------- items
@dataclass(frozen=True)
class ItemLayout:
    """How many id slots a product has: `std_slots` by field, in the vocabulary's field order, and `re_slots`."""

    std_slots: dict[str, int]
    re_slots: int

    @property
    def std_width(self) -> int:
        return sum(self.std_slots.values())

    @classmethod
    def fit(cls, products: Sequence[Product], std_vocab: StdVocab, re_vocab: ReVocab) -> ItemLayout:
        """The smallest layout that holds these products, within the caps above.

        RE values count as what they are read as, since one value may be several words, and whether the vocabulary knows
        them or not: a word that it learns later needs its slot.
        """
        slots = dict.fromkeys(std_vocab.field_names, 1)
        most_re = 1
        for product in products:
            for field in slots:
                slots[field] = max(slots[field], len(product.std.get(field, ())))
            most_re = max(most_re, len(re_vocab.words_of(product.re)))
        return cls({field: min(n, MAX_STD_VALUES) for field, n in slots.items()}, min(most_re, MAX_RE_VALUES))


def std_row(product: Product, vocab: StdVocab, layout: ItemLayout) -> list[int]:
    """Ids of a product's STD values in their slots, zero padded: int [std_width]."""
    row: list[int] = []
    for field, slots in layout.std_slots.items():
        ids = vocab.ids({field: product.std.get(field, [])})[:slots]
        row += ids + [PAD] * (slots - len(ids))
    return row


def re_row(product: Product, vocab: ReVocab, layout: ItemLayout) -> list[int]:
    """Ids of a product's RE values, zero padded: int [re_slots]. Words the vocabulary lacks are left out."""
    ids = vocab.ids(product.re)[: layout.re_slots]
    return ids + [PAD] * (layout.re_slots - len(ids))


class TextScaler(nn.Module):
    """Centres and scales a text encoder's vectors [..., width].

    They lie in a narrow cone (any two texts have a cosine of about .9), so what tells two of them apart is too faint to learn
    from until the common part is gone (Mu and Viswanath, "All-but-the-Top", ICLR 2018).
    """

    mean: Tensor
    spread: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("spread", torch.ones(()))

    @torch.no_grad()
    def fit(self, vectors: Tensor) -> None:
        """Learn the common part of vectors [K, width]; of fewer than two there is none to learn."""
        if len(vectors) < 2:
            return
        spread = vectors.std(dim=0).mean()
        if spread > 0:
            self.mean.copy_(vectors.mean(dim=0))
            self.spread.copy_(spread)

    def forward(self, vectors: Tensor) -> Tensor:
        return (vectors - self.mean) / self.spread


@dataclass(frozen=True)
class ItemBatch:
    """What the item tower reads."""

    std: Tensor  # int64 [B, S], 0 = no value
    re: Tensor  # int64 [B, R], 0 = no value
    tokens: Tensor  # float32 [B, T, text width], title token vectors
    token_mask: Tensor  # bool [B, T], True where a token is

    def to(self, device: torch.device | str) -> ItemBatch:
        return ItemBatch(self.std.to(device), self.re.to(device), self.tokens.to(device), self.token_mask.to(device))


@dataclass(frozen=True)
class ItemFeatures:
    """A catalogue as arrays; `batch` makes tensors of any rows of it."""

    product_ids: list[str]
    std: np.ndarray  # int32 [N, std_width]
    re: np.ndarray  # int32 [N, re_slots]
    titles: Ragged  # token vectors of the distinct titles
    title_of: np.ndarray  # int32 [N], row in `titles`

    def __len__(self) -> int:
        return len(self.product_ids)

    def batch(self, rows: np.ndarray) -> ItemBatch:
        tokens, token_mask = pad_ragged(self.titles, self.title_of[rows])
        return ItemBatch(
            torch.from_numpy(_compact(self.std[rows])), torch.from_numpy(_compact(self.re[rows])), tokens, token_mask
        )


def item_features(
    products: Sequence[Product], std_vocab: StdVocab, re_vocab: ReVocab, layout: ItemLayout, titles: Ragged,
    title_of: np.ndarray,
) -> ItemFeatures:  # fmt: skip
    """Arrays of a catalogue. `titles` holds token vectors of distinct titles, `title_of[i]` product i's row there."""
    std = np.array([std_row(product, std_vocab, layout) for product in products], dtype=np.int32)
    re = np.array([re_row(product, re_vocab, layout) for product in products], dtype=np.int32)
    return ItemFeatures(
        [product.product_id for product in products],
        std.reshape(len(products), layout.std_width),
        re.reshape(len(products), layout.re_slots),
        titles,
        title_of.astype(np.int32),
    )


def distinct(texts: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The distinct texts in order of first sight, and for each text its row among them."""
    rows: dict[str, int] = {}
    row_of = np.fromiter((rows.setdefault(text, len(rows)) for text in texts), dtype=np.int32, count=len(texts))
    return list(rows), row_of


def pad_ragged(ragged: Ragged, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Rows of a ragged array as float32 [B, T, W] with a bool mask [B, T]; T >= 1 even if all are empty."""
    starts = ragged.offsets[rows]
    lengths = np.minimum(ragged.offsets[rows + 1] - starts, MAX_TITLE_TOKENS)
    width = max(1, int(lengths.max(initial=0)))
    mask = np.arange(width) < lengths[:, None]
    tokens = np.zeros((len(rows), width, ragged.values.shape[1]), dtype=np.float32)
    tokens[mask] = ragged.values[(starts[:, None] + np.arange(width))[mask]]
    return torch.from_numpy(tokens), torch.from_numpy(mask)


def _compact(ids: np.ndarray) -> np.ndarray:
    """Move padding to the right and cut columns that are padding in every row: attention pays for every column."""
    order = np.argsort(ids == PAD, axis=1, kind="stable")
    width = max(1, int((ids != PAD).sum(1).max(initial=0)))
    return np.take_along_axis(ids, order[:, :width], axis=1).astype(np.int64)


# ------------------------------------------------------------------------------------------------------------ profiles
@dataclass(frozen=True)
class ProfileScaler:
    """Z-scores with the training shoppers' statistics. Missing numbers become 0 with a flag of 1.

    Values beyond MISTYPED do not count in the statistics: a single height in tenths of a millimetre would leave nothing of the
    differences between all others.
    """

    fields: list[str]
    mean: list[float]
    std: list[float]

    @classmethod
    def fit(cls, profiles: Sequence[Mapping[str, float]], min_share: float = 0.01) -> ProfileScaler:
        """Learn every field that at least `min_share` of the shoppers with a profile have."""
        counts = Counter(field for profile in profiles for field in profile)
        filled = sum(1 for profile in profiles if profile)
        fields = sorted(field for field, count in counts.items() if count >= max(2, min_share * filled))
        values = [_typed_right(np.array([p[field] for p in profiles if field in p])) for field in fields]
        # A field that never varies carries nothing: a standard deviation of 1 maps it to 0 instead of to infinity.
        return cls(fields, [float(v.mean()) for v in values], [float(v.std()) or 1.0 for v in values])

    @property
    def width(self) -> int:
        return 2 * len(self.fields)

    def transform(self, profiles: Sequence[Mapping[str, float]]) -> np.ndarray:
        """float32 [B, 2 * fields]: z-scores clipped to +-4, then missing flags. Fields never seen are ignored."""
        values = np.array([[p.get(f, np.nan) for f in self.fields] for p in profiles], dtype=np.float64)
        values = values.reshape(len(profiles), len(self.fields))
        z = np.clip((values - np.array(self.mean)) / np.array(self.std), -PROFILE_CLIP, PROFILE_CLIP)
        missing = ~np.isfinite(z)
        return np.concatenate([np.where(missing, 0.0, z), missing], axis=1).astype(np.float32)

    def doubts(self, profile: Mapping[str, float]) -> list[str]:
        """What in a profile will not count as whoever sent it means it, in words for them."""
        said = []
        for field, value in profile.items():
            if field not in self.fields:
                known = f"it knows {', '.join(self.fields)}" if self.fields else "it knows no field"
                said.append(f"profile field {field!r} is unknown to the release, and ignored; {known}")
                continue
            least, most = self._bounds(field)
            if not least <= value <= most:
                said.append(
                    f"profile field {field!r}: {value:g} is far from what shoppers have ({(least + most) / 2:.4g} on average) and "
                    f"counts as {min(max(value, least), most):.4g}; is it in another unit?"
                )
        return said

    def far_off(self, profiles: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
        """Values that are clipped, by field."""
        found = {}
        for field in self.fields:
            least, most = self._bounds(field)
            values = [profile[field] for profile in profiles if field in profile]
            if far := [value for value in values if not least <= value <= most]:
                found[field] = far
        return found

    def _bounds(self, field: str) -> tuple[float, float]:
        number = self.fields.index(field)
        most = PROFILE_CLIP * self.std[number]
        return self.mean[number] - most, self.mean[number] + most


def _typed_right(values: np.ndarray) -> np.ndarray:
    """Those within MISTYPED of the median, by the median absolute deviation; all where most are the same."""
    distance = np.abs(values - np.median(values))
    spread = 1.4826 * np.median(distance)
    return values[distance <= MISTYPED * spread] if spread > 0 else values


def _repeats(act: np.ndarray, at: np.ndarray) -> np.ndarray:
    """How many earlier rows are of the same act on the same day: int64 [E]. `act` is a number for each; rows of one stand in order
    of time, epoch seconds."""
    day = (at // DAY).astype(np.int64)
    act_of_day = act * (day.max(initial=0) + 1) + day
    order = np.argsort(act_of_day, kind="stable")
    of_order = act_of_day[order]
    count = np.empty(len(order), dtype=np.int64)
    count[order] = np.arange(len(order)) - np.searchsorted(of_order, of_order)
    return count


# ---------------------------------------------------------------------------------------------------------- popularity
@dataclass(frozen=True)
class Popularity:
    """How wanted each item was at any moment: what happened in trailing windows, age, and whether anything ever did.

    A lookup is a binary search in one sorted array, so coordinates as of any time cost no table of days by items.
    """

    keys: np.ndarray  # float64 [E] sorted: item * span + (time - origin)
    worth_before: np.ndarray  # float64 [E + 1], worth of the events before each key, and of all
    arrived: np.ndarray  # float64 [N] epoch seconds, nan if never seen
    first_event: np.ndarray  # float64 [N] epoch seconds, inf if no event yet
    origin: float
    span: float
    windows: tuple[tuple[float, float], ...]  # days ago that each begins and ends

    @classmethod
    def fit(
        cls, item: np.ndarray, at: np.ndarray, arrived_at: np.ndarray, windows: Sequence[Sequence[float]],
        worth: np.ndarray | None = None,
    ) -> Popularity:  # fmt: skip
        """From events (`item` int [E], `at` epoch seconds [E]) and known arrival times ([N], nan if unknown).

        `worth` float64 [E] says what an event counts, else 1; one that is worth nothing did not happen.
        """
        if worth is None:
            worth = np.full(len(item), INTEREST)
        item, at, worth = item[worth > 0], at[worth > 0], worth[worth > 0]
        origin = float(at.min(initial=np.inf)) if len(at) else 0.0
        latest = float(at.max(initial=-np.inf)) if len(at) else 0.0
        span = 2.0 * (latest - origin + DAY)
        first = np.full(len(arrived_at), np.inf)
        np.minimum.at(first, item, at)
        arrived = np.where(np.isnan(arrived_at), np.where(np.isinf(first), np.nan, first), arrived_at)
        keys = item.astype(np.float64) * span + (at - origin)
        order = np.argsort(keys, kind="stable")
        worth_before = np.concatenate([[0.0], np.cumsum(worth[order])])
        return cls(
            keys[order], worth_before, arrived, first, origin, span, tuple((begin, end) for begin, end in windows)
        )

    @property
    def width(self) -> int:
        return len(self.windows) + 2

    def counts(self, items: np.ndarray, as_of: float, begin: float, end: float = 0.0) -> np.ndarray:
        """Worth of the events on each item from `begin` to `end` days before `as_of` (the moment itself excluded): float64 [M]."""
        base = items.astype(np.float64) * self.span
        first, stop = (np.clip(as_of - days * DAY - self.origin, 0.0, self.span / 2) for days in (begin, end))
        before = self.worth_before
        return before[np.searchsorted(self.keys, base + stop)] - before[np.searchsorted(self.keys, base + first)]

    def coordinates(self, items: np.ndarray, as_of: float) -> np.ndarray:
        """float32 [M, width]: log counts by window, log age in days, and 1 where no event came before `as_of`."""
        columns = [np.log1p(self.counts(items, as_of, *window)) / 4.0 for window in self.windows]
        age = np.clip((as_of - self.arrived[items]) / DAY, 0.0, MAX_AGE_DAYS)
        columns.append(np.log1p(np.where(np.isnan(age), 0.0, age)) / 6.0)
        columns.append((self.first_event[items] >= as_of).astype(np.float64))
        return np.stack(columns, axis=1).astype(np.float32)


def ranges(start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """The `count` [n] numbers from each of `start` [n] on, one range after the other: int64 [sum of counts]."""
    return np.arange(count.sum()) + np.repeat(start - np.cumsum(count) + count, count)


def from_behind(numbers: np.ndarray) -> np.ndarray:
    """Of each of `numbers` [n], which are in order, how many equal ones there are from it to the end, itself one: int64 [n]."""
    return np.searchsorted(numbers, numbers, side="right") - np.arange(len(numbers))


# ----------------------------------------------------------------------------------------------------------- histories
@dataclass(frozen=True)
class Histories:
    """Every shopper's events in time order, as one flat table with a start for each shopper.

    Events at the same instant have no known order (a day's rentals, a basket), so none of them is history of another.
    """

    user_ids: list[str]
    starts: np.ndarray  # int64 [U + 1]
    item: np.ndarray  # int32 [E], row in the catalogue
    kind: np.ndarray  # int8 [E], see KIND_IDS
    at: np.ndarray  # float64 [E], epoch seconds
    context: np.ndarray  # int32 [E], row in `contexts`
    contexts: list[str]
    user: np.ndarray  # int32 [E]
    instant_start: np.ndarray  # int64 [E], first event of the same user and instant
    instant_end: np.ndarray  # int64 [E], one past the last
    first_meeting: np.ndarray  # bool [E], of worth, and no earlier such event of this user on this item
    weight: np.ndarray  # float32 [E], the strongest kind this user ever reached with the item
    # float64 [E], what the event says about wanting: nothing or less for a skip, nothing beyond MOST_OF_A_DAY.
    worth: np.ndarray

    @classmethod
    def build(
        cls, log: EventLog, product_ids: Sequence[str], kind_weights: Mapping[str, float] | None = None
    ) -> Histories:
        """From the event log; events on products outside `product_ids` (no features yet) are left out.

        `kind_weights` says what a kind counts, as a target and in popularity, where that is not KIND_WEIGHTS and 1.
        """
        row_of = {product_id: row for row, product_id in enumerate(product_ids)}
        item = np.array([row_of.get(product_id, -1) for product_id in log.product_ids], dtype=np.int32)[log.product]
        keep = np.flatnonzero(item >= 0)
        order = keep[np.lexsort((log.product[keep], log.at[keep], log.user[keep]))]
        user, item, at = log.user[order], item[order], log.at[order]
        kind_ids = np.array([KIND_IDS.get(kind, 0) for kind in log.kinds], dtype=np.int8)
        given = kind_weights or {}
        as_target = {**KIND_WEIGHTS, **given}
        target_weights = np.array([as_target.get(kind, OTHER_KIND_WEIGHT) for kind in log.kinds], dtype=np.float32)
        # A kind that is nothing to aim for is no sign of interest either.
        worth_of = [given.get(kind, INTEREST if as_target.get(kind, INTEREST) > 0 else 0.0) for kind in log.kinds]
        worth = np.array(worth_of, dtype=np.float64)[log.kind[order]]

        starts = np.searchsorted(user, np.arange(len(log.user_ids) + 1))
        new_instant = np.ones(len(order), dtype=bool)
        new_instant[1:] = (user[1:] != user[:-1]) | (at[1:] != at[:-1])
        instant_start = np.flatnonzero(new_instant)
        instant = np.cumsum(new_instant) - 1
        instant_end = np.append(instant_start[1:], len(order))

        pair = user.astype(np.int64) * max(1, len(product_ids)) + item
        pairs, pair_of = np.unique(pair, return_inverse=True)
        worth[_repeats(pair_of * max(1, len(log.kinds)) + log.kind[order], at) >= MOST_OF_A_DAY] = 0.0
        wanted = np.flatnonzero(worth > 0)
        first_meeting = np.zeros(len(order), dtype=bool)
        first_meeting[wanted[np.unique(pair[wanted], return_index=True)[1]]] = True
        weight = np.zeros(len(pairs), dtype=np.float32)
        np.maximum.at(weight, pair_of, target_weights[log.kind[order]])
        return cls(
            log.user_ids, starts, item, kind_ids[log.kind[order]], at, log.context[order], log.contexts, user,
            instant_start[instant], instant_end[instant], first_meeting, weight[pair_of], worth,
        )  # fmt: skip

    def of_users(self, users: np.ndarray, before: float) -> tuple[np.ndarray, np.ndarray]:
        """Every event of `users` int [B] before that moment (epoch seconds), one after the other: which of `users` each is of, and
        its row here; int64 [K] each."""
        count = self.starts[users + 1] - self.starts[users]
        of, row = np.repeat(np.arange(len(users)), count), ranges(self.starts[users], count)
        earlier = self.at[row] < before
        return of[earlier], row[earlier]

    def lengths(self, rows: np.ndarray, length: int, with_basket: bool = False) -> np.ndarray:
        """How many columns `before` needs for each of `rows`: int64 [B]."""
        end = (self.instant_end if with_basket else self.instant_start)[rows]
        return np.minimum(end - self.starts[self.user[rows]], length)

    def before(self, rows: np.ndarray, length: int, with_basket: bool = False) -> HistoryIndex:
        """The latest `length` events before each of the events `rows`.

        `with_basket` adds the other events of the same instant, except those on the same item: for shops whose logs
        know only days, a basket is most of what there is to learn from.
        """
        end = (self.instant_end if with_basket else self.instant_start)[rows]
        columns = self.lengths(rows, length, with_basket)
        index = (end - columns)[:, None] + np.arange(max(1, int(columns.max(initial=0))))
        mask = index < end[:, None]
        index = np.where(mask, index, 0)
        if with_basket:
            mask &= (self.item[index] != self.item[rows][:, None]) | (self.at[index] < self.at[rows][:, None])
        return HistoryIndex(index, mask)


@dataclass(frozen=True)
class HistoryIndex:
    """Rows of `Histories`, padded: `index` int64 [B, T], `mask` bool [B, T] (True where an event is), oldest first."""

    index: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True)
class UserBatch:
    """What the user tower reads. Each of the three inputs may be missing: an empty mask, a zero vector, missing flags."""

    history: Tensor  # float32 [B, T, item width]: unit item vectors as in index rows, oldest first
    collaborative: Tensor  # float32 [B, T, collaborative width]
    kind: Tensor  # int64 [B, T], see KIND_IDS
    age: Tensor  # float32 [B, T], log of days since the event
    history_mask: Tensor  # bool [B, T], True where an event is
    context: Tensor  # float32 [B, text width], unit length or zero
    profile: Tensor  # float32 [B, profile width], see ProfileScaler


def log_age(now: np.ndarray | float, at: np.ndarray) -> np.ndarray:
    """log(1 + days) from `at` to `now` (epoch seconds), float32; a time in the future counts as now."""
    return np.log1p(np.clip((now - at) / DAY, 0.0, MAX_AGE_DAYS)).astype(np.float32)


# ----------------------------------------------------------------------------------------------------------- reranking
@dataclass(frozen=True)
class RerankBatch:
    """Candidates of one or more shoppers. B lists of N candidates; user tensors have one row a list."""

    user_std: Tensor  # int64 [B, history_ids]
    user_re: Tensor  # int64 [B, history_ids]
    user_dense: Tensor  # float32 [B, U]
    item_std: Tensor  # int64 [B, N, std slots]
    item_re: Tensor  # int64 [B, N, re slots]
    item_dense: Tensor  # float32 [B, N, I]
    position: Tensor | None = None  # float32 [B, N], see POSITION; only in training on lists that were shown


# The log of the place, from 1, that a shopper saw the candidate at: 0 at the first. A feature in training alone.
POSITION = "position"
HISTORY_LENGTH = "history_length"  # of the shopper's dense features: 0 for a stranger

# Links have strengths of a few hundredths to a few tenths, and those of a long history add up to several, which says much less than
# so many times as much.
LINK_SCALE = 30.0

ITEM_DENSE = (
    "retrieval",  # the retrieval score less the list's mean: a logit, whose scale the user tower's softmax has learned
    "log_rank",  # of the retrieval order
    "content",  # cosine of the query's unit part and the item's vector
    "popularity",  # what the popularity coordinates add to the score
    "collaborative",  # what the collaborative coordinates add
    "together",  # log strength of its links with the history, see LinkWeights
    "variant",  # 1 for another colour or size of something in the history
    "nearest",  # the highest cosine with an item of the history
    "log_price",
    "price_gap",  # log price against the mean of the history; 0 if either is unknown
)


def log_strength(together: np.ndarray) -> np.ndarray:
    """log(1 + LINK_SCALE x) of links' summed strengths, float32 of any shape. Most are 0, and cost nothing."""
    result = np.zeros_like(together, dtype=np.float32)
    linked = together > 0
    result[linked] = np.log1p(LINK_SCALE * together[linked])
    return result


@dataclass(frozen=True)
class LinkWeights:
    """What links from the history add to a retrieval logit, as the user tower learned it. See item_links.py."""

    together: float  # of the log strength
    variant: float  # of being a variant of something in the history

    def gain(self, together: np.ndarray, variant: np.ndarray | float) -> np.ndarray:
        """float32, of the shape of `together`, the summed strengths."""
        return np.asarray(self.together * log_strength(together) + self.variant * variant, dtype=np.float32)


@dataclass(frozen=True)
class PriceScale:
    """Centre and spread of log prices in the training catalogue."""

    centre: float
    spread: float

    @classmethod
    def fit(cls, price: np.ndarray) -> PriceScale:
        known = np.log1p(price[np.isfinite(price)])
        return cls(float(known.mean()), float(known.std()) or 1.0) if len(known) else cls(0.0, 1.0)

    def transform(self, price: np.ndarray) -> np.ndarray:
        """float32, 0 (the centre) where the price is unknown."""
        scaled = (np.log1p(price) - self.centre) / self.spread
        return np.where(np.isfinite(scaled), scaled, 0.0).astype(np.float32)


@dataclass(frozen=True)
class Candidates:
    """What the reranker's features are computed from; B lists of N candidates in retrieval order."""

    query: np.ndarray  # float32 [B, D], of the user tower
    rows: np.ndarray  # float32 [B, N, D], index rows: unit vector, popularity, collaborative
    scores: np.ndarray  # float32 [B, N]
    together: np.ndarray  # float32 [B, N], strength of the links with the history
    variant: np.ndarray  # float32 [B, N], 1 for a variant of something in the history
    std: np.ndarray  # int [B, N, std slots]
    re: np.ndarray  # int [B, N, re slots]
    price: np.ndarray  # float [B, N], nan if unknown


@dataclass(frozen=True)
class Past:
    """The history behind those lists."""

    vectors: np.ndarray  # float32 [B, T, item width]
    mask: np.ndarray  # bool [B, T]
    std: np.ndarray  # int [B, T, std slots]
    re: np.ndarray  # int [B, T, re slots]
    price: np.ndarray  # float [B, T]
    profile: np.ndarray  # float32 [B, profile width], see ProfileScaler


def item_dense_names(popularity_width: int) -> list[str]:
    return [*ITEM_DENSE, *(f"popularity_{number}" for number in range(popularity_width))]


def user_dense_names(scaler: ProfileScaler) -> list[str]:
    return [*scaler.fields, *(f"{field}_missing" for field in scaler.fields), HISTORY_LENGTH]


def rerank_batch(
    candidates: Candidates, past: Past, prices: PriceScale, item_width: int, popularity_width: int
) -> RerankBatch:
    """The reranker's inputs for lists of candidates, the same in training and in serving."""
    query, rows, scores = candidates.query, candidates.rows, candidates.scores
    unit, popular = slice(0, item_width), slice(item_width, item_width + popularity_width)
    collaborative = slice(item_width + popularity_width, None)

    def part(columns: slice) -> np.ndarray:
        return np.asarray((rows[:, :, columns] @ query[:, columns, None])[:, :, 0])

    retrieval = scores - scores.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(query[:, unit], axis=1, keepdims=True)
    similarity = rows[:, :, unit] @ past.vectors.transpose(0, 2, 1)  # (B, N, T)
    similarity = np.where(past.mask[:, None, :], similarity, -1.0)
    nearest = np.where(past.mask.any(1, keepdims=True), similarity.max(axis=2, initial=-1.0), 0.0)

    # The price of a product that nobody met is not used. Where prices come from sales, having one at all would betray, when past
    # requests are replayed, that the product was sold later: the very answer.
    untouched = rows[:, :, popular][:, :, -1] > 0
    price = np.where(untouched, np.nan, candidates.price)
    log_price = prices.transform(price)
    paid_known = past.mask & np.isfinite(past.price)
    paid = np.where(paid_known, prices.transform(past.price), 0.0).sum(1) / np.maximum(paid_known.sum(1), 1)
    both_known = np.isfinite(price) & paid_known.any(1, keepdims=True)
    log_rank = np.broadcast_to(np.log1p(np.arange(scores.shape[1])) / 4.0, scores.shape)
    columns = [
        retrieval, log_rank, part(unit) / np.where(norm > 0, norm, 1.0), part(popular) / 4.0, part(collaborative),
        log_strength(candidates.together), candidates.variant, nearest, log_price,
        np.where(both_known, log_price - paid[:, None], 0.0),
    ]  # fmt: skip
    item_dense = np.concatenate([np.stack(columns, axis=2), rows[:, :, popular]], axis=2)
    user_dense = np.concatenate([past.profile, np.log1p(past.mask.sum(1, keepdims=True)) / 4.0], axis=1)

    masked_std = past.std * past.mask[:, :, None]
    masked_re = past.re * past.mask[:, :, None]
    return RerankBatch(
        user_std=torch.from_numpy(most_common_ids(masked_std.reshape(len(rows), -1))),
        user_re=torch.from_numpy(most_common_ids(masked_re.reshape(len(rows), -1))),
        user_dense=torch.from_numpy(user_dense.astype(np.float32)),
        item_std=torch.from_numpy(candidates.std.astype(np.int64)),
        item_re=torch.from_numpy(candidates.re.astype(np.int64)),
        item_dense=torch.from_numpy(item_dense.astype(np.float32)),
    )


def most_common_ids(ids: np.ndarray, count: int = MAX_HISTORY_IDS) -> np.ndarray:
    """Of each row of ids int [B, M] those that occur most (padding ignored), most frequent first, of equal ones the smallest first,
    then zeros: int64 [B, count]."""
    lists, width = ids.shape
    ordered = np.sort(ids, axis=1)
    starts = np.ones((lists, width + 1), dtype=bool)  # of a run of one id; the last column is the end of the last run
    np.not_equal(ordered[:, 1:], ordered[:, :-1], out=starts[:, 1:width])
    columns = np.arange(width + 1)
    next_start = np.minimum.accumulate(np.where(starts, columns, width)[:, :0:-1], axis=1)[:, ::-1]
    times = (next_start - columns[:-1]) * (starts[:, :-1] & (ordered != PAD))
    top = np.argsort(-times, axis=1, kind="stable")[:, :count]
    found = np.zeros((lists, count), dtype=np.int64)
    found[:, : top.shape[1]] = np.take_along_axis(ordered * (times > 0), top, axis=1)
    return found
