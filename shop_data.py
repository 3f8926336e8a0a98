"""What the training stages read from the database, as arrays, and the tensors of any moment in the shop's past.

A training example is a request that could have been made: what the shopper had done by then, the words they gave, their
body, and what was wanted by then. `ShopData` builds exactly that, for the user tower, the reranker and the index alike.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from item_links import ItemLinks, group_numbers
from model_user import UserTower
from release import ItemEncoder, Release
from settings import UserError
from store import Store
from tensors import (
    DAY,
    Histories,
    HistoryIndex,
    ItemFeatures,
    Popularity,
    ProfileScaler,
    UserBatch,
    from_behind,
    log_age,
)
from training import TrainOptions

# Hours before this have no past to learn from: on the first day everything looks unwanted.
WARM_UP = 1 * DAY
MOST_TARGETS = 1000  # of one shopper: a robot that walks through the whole catalogue is no teacher


class HoldOutOptions(TrainOptions):
    """Of the stages that learn from events."""

    validation_share: float = Field(0.1, gt=0, lt=0.9, description="share of events, the newest, held out first")


def validation_start(at: np.ndarray, share: float) -> float:
    """The UTC midnight that leaves about `share` of the events (epoch seconds [E]), and at least something, after it; infinity when
    there are no events."""
    if not len(at):
        return float("inf")
    midnight = np.floor(np.quantile(at, 1.0 - share) / DAY) * DAY
    return float(max(midnight, np.floor(at.min() / DAY) * DAY + WARM_UP))


def event_weights(release: Release) -> dict[str, float]:
    """What kinds of event count in the release, whatever the settings say by now."""
    return dict(release.manifest["user_tower"]["options"].get("event_weights", {}))


@dataclass(frozen=True)
class ShopData:
    """The catalogue, its vectors, and every event, aligned: item numbers are rows of `items`."""

    items: ItemFeatures
    vectors: np.ndarray  # float32 [N, item width], unit length
    price: np.ndarray  # float64 [N], nan if unknown
    group: np.ndarray  # int64 [N], number of each item's product, see item_links.py
    histories: Histories
    popularity: Popularity
    profiles: list[dict[str, float]]  # of each user of `histories`
    context_vectors: np.ndarray  # float32 [distinct contexts, text width]
    newest: float  # epoch seconds of the newest event; of the clock where there is none yet

    @classmethod
    def load(
        cls, store: Store, encoder: ItemEncoder, windows: Sequence[Sequence[float]],
        kind_weights: Mapping[str, float] = {},
    ) -> ShopData:  # fmt: skip
        """Read everything; `windows` of popularity as in `Popularity`, `kind_weights` as in `Histories.build`.

        Raises UserError when there is no product.
        """
        products = store.products.read_features()
        if not products:
            raise UserError("no product has features yet; run import_data.py and extract_features.py first")
        items = encoder.features(products)
        histories = Histories.build(store.events.read(), items.product_ids, kind_weights)
        commerce = store.products.read_commerce()
        row_of = {product_id: row for row, product_id in enumerate(commerce.product_ids)}
        rows = np.array([row_of[product_id] for product_id in items.product_ids])
        profiles = store.users.read_profiles()
        return cls(
            items,
            encoder.cached_vectors(items),
            commerce.price[rows],
            group_numbers([commerce.group_id[row] for row in rows]),
            histories,
            Popularity.fit(histories.item, histories.at, commerce.arrived_at[rows], windows, histories.worth),
            [profiles.get(user_id, {}) for user_id in histories.user_ids],
            encoder.text_encoder.cached_pooled(histories.contexts),
            float(histories.at.max()) if len(histories.at) else time.time(),
        )

    @classmethod
    def of_release(cls, store: Store, encoder: ItemEncoder, release: Release) -> ShopData:
        """The shop as the release's user tower saw it: the same windows and weights, everything that happened since."""
        trained = release.manifest["user_tower"]
        return cls.load(store, encoder, trained["popularity_windows"], event_weights(release))

    def without_figures(self, figures: Sequence[str]) -> ShopData:
        """The same shop where no profile has these figures. Raises UserError when there is one that none has anyway."""
        known = {figure for profile in self.profiles for figure in profile}
        if not known.issuperset(figures):
            raise UserError(f"no profile has {sorted(set(figures) - known)}; there are {sorted(known) or 'no figures'}")
        profiles = [{name: value for name, value in own.items() if name not in figures} for own in self.profiles]
        return replace(self, profiles=profiles)

    @property
    def now(self) -> float:
        """The moment after the newest event: popularity as of now counts every event."""
        return self.newest + 1.0

    def targets(self, start: float, end: float) -> np.ndarray:
        """Events to learn to foresee: a shopper's first meeting with an item, in [start, end), of a kind that counts. The latest
        MOST_TARGETS of each shopper."""
        histories = self.histories
        inside = (histories.at >= max(start, histories.at.min(initial=np.inf) + WARM_UP)) & (histories.at < end)
        rows = np.flatnonzero(inside & histories.first_meeting)
        return rows[from_behind(histories.user[rows]) <= MOST_TARGETS]  # they stand by shopper, in order of time

    def popularity_as_of(self, moment: float) -> Tensor:
        """Popularity coordinates of the whole catalogue: float32 [N, P]."""
        return torch.from_numpy(self.popularity.coordinates(np.arange(len(self.items)), moment))

    def links(self, before: float) -> ItemLinks:
        """Item-to-item links as of that moment, epoch seconds."""
        return ItemLinks.before(self.histories, before, self.group)

    def profile_scaler(self, before: float) -> ProfileScaler:
        """Statistics of the shoppers who had come by `before`."""
        known = np.unique(self.histories.user[self.histories.at < before])
        return ProfileScaler.fit([self.profiles[user] for user in known])

    def adapted(self, tower: UserTower, rows: np.ndarray) -> Tensor:
        """The vectors of catalogue rows int [...] as the tower turns them, see `UserTower.adapted`: float32 [..., item width]."""
        distinct, place = np.unique(rows, return_inverse=True)  # histories have many in common
        std, re = torch.from_numpy(self.items.std[distinct]), torch.from_numpy(self.items.re[distinct])
        vectors = tower.adapted(torch.from_numpy(self.vectors[distinct]), std, re)
        return vectors[torch.from_numpy(place.reshape(rows.shape))]

    def user_batch(
        self, tower: UserTower, index: HistoryIndex, users: np.ndarray, contexts: np.ndarray, now: np.ndarray,
        profiles: np.ndarray, popularity: Tensor,
    ) -> UserBatch:  # fmt: skip
        """Tensors of requests: history rows, user numbers [B], context rows [B], times [B], scaled profiles [U, P].

        popularity float32 [N, P] of the whole catalogue says which items had collaborative coordinates by then.
        """
        histories = self.histories
        items = histories.item[index.index].astype(np.int64)
        numbers = torch.from_numpy(items)
        return UserBatch(
            history=self.adapted(tower, items),
            collaborative=tower.collaborative_of(numbers, popularity[numbers]),
            kind=torch.from_numpy(histories.kind[index.index].astype(np.int64)),
            age=torch.from_numpy(log_age(now[:, None], histories.at[index.index])),
            history_mask=torch.from_numpy(index.mask),
            context=torch.from_numpy(self.context_vectors[contexts]),
            profile=torch.from_numpy(profiles[users]),
        )

    def requests(self, start: float, end: float, as_of: float) -> Requests:
        """The requests that shoppers made in [start, end), as the shop knew them at `as_of`: one for each shopper and
        context, answered right by the items they then met for the first time."""
        histories = self.histories
        rows = self.targets(start, end)
        pairs = np.stack([histories.user[rows], histories.context[rows]], axis=1)
        distinct_pairs, request_of = np.unique(pairs, axis=0, return_inverse=True)
        order = np.argsort(request_of, kind="stable")
        splits = np.cumsum(np.bincount(request_of, minlength=len(distinct_pairs)))[:-1]
        answers = [np.unique(part) for part in np.split(histories.item[rows[order]], splits)]
        return Requests(distinct_pairs[:, 0], distinct_pairs[:, 1], answers, as_of)

    def history_as_of(self, users: np.ndarray, as_of: np.ndarray | float, length: int) -> HistoryIndex:
        """The latest `length` events of each user before `as_of`: one moment, or one of each user [B]."""
        histories = self.histories
        starts, stops = histories.starts[users], histories.starts[users + 1]
        end, last = starts.copy(), stops.copy()
        while (open_ := end < last).any():  # by halves, all users at once: events are in time order within a user
            middle = (end + last) // 2
            earlier = open_ & (histories.at[np.where(open_, middle, 0)] < as_of)
            end, last = np.where(earlier, middle + 1, end), np.where(open_ & ~earlier, middle, last)
        start = np.maximum(starts, end - length)
        index = start[:, None] + np.arange(max(1, int((end - start).max(initial=0))))
        mask = index < end[:, None]
        return HistoryIndex(np.where(mask, index, 0), mask)

    def seen(self, user: int, as_of: float) -> np.ndarray:
        """Catalogue rows that the user met before `as_of`."""
        histories = self.histories
        events = slice(histories.starts[user], histories.starts[user + 1])
        return histories.item[events][histories.at[events] < as_of]


@dataclass(frozen=True)
class Requests:
    users: np.ndarray  # int [B]
    contexts: np.ndarray  # int [B], rows of `ShopData.context_vectors`
    answers: list[np.ndarray]  # catalogue rows
    as_of: float  # the moment as of which items and links are known
    at: np.ndarray | None = None  # float64 [B], when each was made and so until when a history goes; None: `as_of`

    def __len__(self) -> int:
        return len(self.users)

    @property
    def moments(self) -> np.ndarray:
        """When each was made: float64 [B]."""
        return np.full(len(self), self.as_of) if self.at is None else self.at

    def take(self, rows: np.ndarray) -> Requests:
        answers = [self.answers[row] for row in rows]
        return Requests(self.users[rows], self.contexts[rows], answers, self.as_of, self.moments[rows])
