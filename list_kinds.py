"""Kinds of list: which products each kind considers, and what beside the reranker's logit puts them in order.

- `for_you`: retrieval and reranking for the shopper (recommender.py).
- `similar`: the nearest to one product by the item tower alone, the same for everybody.
- `because`: near one product and to the shopper's taste. The product stands in the query as a second wish, at half the scale that
  the user tower learned for likeness, and its part of the score is added to the logit.
- `basket`: what goes with a cart, nothing of a category that is in it. What is taken together with the cart is considered first;
  then what the shopper wants with the cart as their latest history. The links' part of the score is added to the logit.
- `trending`: what shoppers want now; each act counts half after a half-life.
- `again`: what the shopper bought, that first which is due.

Where a context names closed values ("a black dress"), lists of kind `for_you` and `because` are first of what has them: so much is
added to the logit for each, and products are searched among those too (context_words.py).

A list that cannot be made of its kind (nothing looked at yet, nothing known in the cart) is the one for the shopper, and its `kind`
and a warning say so. A list of what to buy again is never filled with anything else.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, TypeVar, get_args

import numpy as np

from catalog import ListKind
from context_words import NOTHING, Named
from loaded_release import LoadedRelease
from rule_search import Limits, Search
from settings import Settings
from store import Found, History, Purchases, Store, UserState
from tensors import DAY, KIND_WEIGHTS, LINK_SCALE, OTHER_KIND_WEIGHT, LinkWeights

if TYPE_CHECKING:
    from recommender import Request

KINDS: tuple[ListKind, ...] = get_args(ListKind)

# What a cart is linked to comes before everything else that is considered. More than scores ever differ, and not so much that
# single precision loses their order.
CART_LIFT = 1000.0

# Of a list that is about a product, that product's share of the scale: its items are then about halfway, by cosine, between those
# that are most like it and what the shopper would be shown anyway. With more the list is more alike and less wanted
# (docs/protocol.md).
ABOUT_SHARE = 0.5

TRENDING_EVENTS = 200_000  # the latest, that trends are read from
# For so long they are not read again. A service reads them every minute behind the requests (`refresh`), which then never wait.
TRENDING_SECONDS = 180.0
# But those of so short a time ago are, by every request.
TRENDING_FRESH_SECONDS = 600.0
CLOCK_SKEW = 3600.0  # seconds that a sender's clock may be ahead; later events have not happened yet

PURCHASES = 500  # distinct products of one shopper, the latest
REPEATS = 200_000  # the latest purchases, that intervals are learned from
REPEATS_SECONDS = 3600.0  # for so long they are not learned again
REPEATS_PATIENCE = 2.0  # times as long until a request learns them itself, since nobody did behind it
# Until a shop sees something bought again.
DEFAULT_INTERVAL_DAYS = 90.0


class RequestError(ValueError):
    """A request that lacks what its kind needs, or names what is not there: `field` says where."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class UnknownProductError(LookupError):
    """The product that a list is about is not in the release, or not sold any more."""


@dataclass(frozen=True)
class Anchor:
    """The product that a list is about."""

    product_id: str
    title: str


@dataclass(frozen=True)
class Plan:
    """What a request's kind makes of it."""

    kind: ListKind  # of the list that can be made
    request: Request
    state: UserState
    warnings: Sequence[str] = ()
    anchor: Anchor | None = None
    anchor_vector: np.ndarray | None = None  # float32 [item width], unit length
    cart: Sequence[str] = ()  # what is known of it
    purchases: Sequence[Purchases] = ()
    named: Named = NOTHING  # by the context

    @property
    def linked_from(self) -> list[str]:
        """The products whose links count."""
        return list(self.cart) or list(dict.fromkeys(self.state.product_ids))


@dataclass(frozen=True)
class Sought:
    """What a list is made of: N products that were found."""

    found: Found
    scores: np.ndarray | None = None  # float [N], falling: the order of a kind that asks no reranker
    bonus: np.ndarray | None = None  # float [N], added to the reranker's logits
    named: np.ndarray | None = None  # float [N], of that bonus what stands for the words of the context
    stages: Sequence[str] = ()  # of each product, where no reranker is asked: who put it there


@dataclass(frozen=True)
class Source:
    """Where the products of a list come from, for the pipeline and for rules (rule_search.py)."""

    query: np.ndarray  # float32 [row width], that searches are by
    search: Search
    new_goods: Callable[[int], Found]  # so many products that nobody met yet
    candidates: Callable[[], Found]
    finished: Callable[
        [Found], Sought
    ]  # what is to be made of all that was found; a product more changes nothing of the others


@dataclass(frozen=True)
class Usual:
    """How the list for the shopper is found: the pipeline's own searches."""

    search: Callable[[Request, History | None], Search]
    candidates: Callable[[np.ndarray, Request, UserState], Found]
    new_goods: Callable[[np.ndarray, Request, UserState, int], Found]


def check(request: Request) -> None:
    """Raises RequestError for a request that lacks what its kind needs, or gives what its kind has no use for."""
    if request.kind not in KINDS:
        raise RequestError("kind", f"{request.kind!r} is no kind of list; there are {list(KINDS)}")
    if request.product_id is not None and request.kind not in ("similar", "because"):
        raise RequestError(
            "product_id", f"a list of kind {request.kind!r} is about no product; 'similar' and 'because' are"
        )
    if request.cart and request.kind != "basket":
        raise RequestError("cart", f"a list of kind {request.kind!r} has no use for a cart; 'basket' has")
    if request.kind == "similar" and request.product_id is None:
        raise RequestError("product_id", "a list of kind 'similar' needs the product that it is about")
    if request.kind == "because" and not (request.product_id or request.user_id or request.history):
        raise RequestError(
            "product_id",
            "a list of kind 'because' needs a product, or a user_id or history whose latest look it is about",
        )
    if request.kind == "basket" and not request.cart:
        raise RequestError("cart", "a list of kind 'basket' needs the products in the cart")
    if request.kind == "again" and request.user_id is None:
        raise RequestError("user_id", "a list of kind 'again' needs the shopper who bought")


class ListKinds:
    """Plans lists and finds what they are made of. Safe to use from several threads."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self.store, self.settings = store, settings
        self.kind_weights = {**KIND_WEIGHTS, **settings.event_weights}  # others are OTHER_KIND_WEIGHT
        self._trending: _Aged[dict[str, float]] = _Aged(TRENDING_SECONDS)
        self._intervals: _Aged[dict[str | None, float]] = _Aged(REPEATS_PATIENCE * REPEATS_SECONDS)

    # -------------------------------------------------------------------------------------------------------------- plans
    def plan(self, loaded: LoadedRelease, request: Request, state: UserState, now: float) -> Plan:
        """Raises UnknownProductError when the product that the list is about is not there, RequestError when the shop cannot tell
        categories."""
        plan = self._of_kind(loaded, request, state, now)
        if plan.kind not in ("for_you", "because") or not self.settings.context_words:
            return plan
        # Whoever filters by a field has said more plainly what of it they want.
        return replace(plan, named=loaded.context_words.named(request.context).but(request.filters.std))

    def _of_kind(self, loaded: LoadedRelease, request: Request, state: UserState, now: float) -> Plan:
        if request.kind == "similar":
            return self._about(loaded, request, state, [request.product_id or ""])
        if request.kind == "because":
            return self._because(loaded, request, state, now)
        if request.kind == "basket":
            return self._basket(loaded, request, state, now)
        if request.kind == "again":
            assert request.user_id is not None
            bought = self.store.events.purchases(request.user_id, self.settings.list_category_field, PURCHASES)
            warnings = [] if bought else [f"user {request.user_id!r} has bought nothing yet"]
            # What was met is what the list is of: neither the shop's rules nor the usual one hide it.
            return Plan("again", replace(request, exclude_history=False), state, warnings, purchases=bought)
        return Plan(request.kind, request, state)

    def _about(self, loaded: LoadedRelease, request: Request, state: UserState, product_ids: Sequence[str]) -> Plan:
        """About the first of those products that is sold."""
        nothing = np.zeros(loaded.user_tower.config.row_width, dtype=np.float32)
        found = self.store.vectors.among(loaded.name, product_ids, nothing, 1)
        if not found.product_ids:
            raise UnknownProductError(product_ids)
        anchor = Anchor(found.product_ids[0], found.titles[0])
        request = replace(request, exclude=[*request.exclude, anchor.product_id])
        return Plan(request.kind, request, state, (), anchor, found.vectors[0, : loaded.item_width])

    def _because(self, loaded: LoadedRelease, request: Request, state: UserState, now: float) -> Plan:
        if request.product_id is not None:
            if request.product_id not in state.product_ids:  # to be asked about it is to look at it
                rows = self.store.vectors.fetch(loaded.name, [request.product_id])
                state = state.extended(rows, kind="view", at=now, limit=loaded.user_tower.config.history)
            return self._about(loaded, request, state, [request.product_id])
        try:
            return self._about(loaded, request, state, _looks(state, self.kind_weights))
        except UnknownProductError:
            warning = "nothing was looked at yet; this is the list for the shopper"
            return Plan("for_you", request, state, [warning])

    def _basket(self, loaded: LoadedRelease, request: Request, state: UserState, now: float) -> Plan:
        field = self.settings.list_category_field
        if field not in loaded.std_fields:
            raise RequestError(
                "kind",
                f"a basket's complements are of other categories, and the shop has no STD field {field!r};"
                f" set LIST_CATEGORY_FIELD to one of {sorted(loaded.std_fields)}",
            )
        rows = self.store.vectors.fetch(loaded.name, list(dict.fromkeys(request.cart)))
        there = set(rows.product_ids)
        unknown = [product_id for product_id in request.cart if product_id not in there]
        warnings = [f"item {product_id!r} in cart is unknown; ignored" for product_id in unknown]
        if not rows.product_ids:
            return Plan(
                "for_you", request, state, [*warnings, "nothing in the cart is known; this is the list for the shopper"]
            )
        # As the products say: the release does not know a category that came after it was trained.
        facts = self.store.products.facts(rows.product_ids)
        values_of = {product_id: known.std.get(field, []) for product_id, known in facts.items()}
        bare = [product_id for product_id in rows.product_ids if not values_of.get(product_id)]
        warnings += [
            f"item {product_id!r} in cart has no {field}; more of its kind may be offered" for product_id in bare
        ]
        values = [value for values in values_of.values() for value in values]
        filters = request.filters
        unwanted = list(dict.fromkeys([*filters.std_none.get(field, []), *values]))
        request = replace(
            request,
            filters=replace(filters, std_none={**filters.std_none, **({field: unwanted} if unwanted else {})}),
            exclude=[*request.exclude, *rows.product_ids],
        )
        state = state.extended(rows, kind="cart", at=now, limit=loaded.user_tower.config.history)
        return Plan("basket", request, state, warnings, cart=rows.product_ids)

    # ------------------------------------------------------------------------------------------------------------- sources
    def source(
        self, loaded: LoadedRelease, query: np.ndarray, plan: Plan, now: float, usual: Usual, limits: Limits, count: int
    ) -> Source:
        """Where the products of a planned list come from: query float32 [row width] of the user tower, `limits` of the plan's
        request, at least `count` candidates while there are so many."""
        if plan.kind == "similar":
            return self._likeness(loaded, query, plan, usual, limits, count)
        if plan.kind == "basket":
            return self._complements(loaded, query, plan, usual, limits, count)
        if plan.kind in ("trending", "again"):
            ranking = self._due(plan, now) if plan.kind == "again" else self._wanted(plan, now)
            return self._ranking(loaded, query, plan, ranking, usual, limits, count)
        request, state, pull = plan.request, plan.state, np.zeros_like(query)
        if plan.anchor_vector is not None:
            pull[: loaded.item_width] = ABOUT_SHARE * loaded.scale * plan.anchor_vector

        def candidates() -> Found:
            if not plan.named:
                return usual.candidates(query + pull, request, state)
            first = self._named_first(loaded, plan, query + pull, usual, limits, count)
            if len(first.product_ids) >= count:
                return first
            return _with(first, usual.candidates(query + pull, request, state), count)

        def finished(found: Found) -> Sought:
            bonus = named = None
            if plan.anchor_vector is not None:
                found = _ordered(
                    found, _product(found, query) + loaded.link_weights.gain(found.together, found.variant)
                )
                likeness = _product(found, pull)
                # Less the mean, as the retrieval score is to the reranker: a score then says what tells this item from the others.
                bonus = likeness - likeness.mean() if len(likeness) else likeness
            if plan.named:
                vocabularies = loaded.encoder.std_vocab, loaded.encoder.re_vocab
                named = plan.named.lift(found.std_ids, found.re_ids, *vocabularies, self.settings.list_category_field)
                bonus = named if bonus is None else bonus + named
            return Sought(found, bonus=bonus, named=named)

        return Source(
            query + pull,
            usual.search(request, linked(plan.linked_from, loaded.link_weights)),
            lambda limit: usual.new_goods(query + pull, request, state, limit),
            candidates,
            finished,
        )

    def _named_first(
        self, loaded: LoadedRelease, plan: Plan, query: np.ndarray, usual: Usual, limits: Limits, count: int
    ) -> Found:
        """Up to `count` candidates: what has all that the context names, and if that is not enough what has some of it."""
        request, conditions = plan.request, plan.named.conditions(self.settings.list_category_field)
        each = [[one] for one in conditions] if len(conditions) > 1 else []
        history = linked(plan.linked_from, loaded.link_weights)
        first: Found | None = None
        for wanted in (conditions, *each):
            filters = replace(request.filters, also=[*request.filters.also, *wanted])
            more = usual.search(replace(request, filters=filters), history)(query, count, limits)
            first = more if first is None else _with(first, more, count)
            if len(first.product_ids) >= count:
                break
        assert first is not None
        return first

    def _likeness(
        self, loaded: LoadedRelease, query: np.ndarray, plan: Plan, usual: Usual, limits: Limits, count: int
    ) -> Source:
        likeness = np.zeros_like(query)
        likeness[: loaded.item_width] = plan.anchor_vector  # alone, however popular
        search = usual.search(plan.request, None)

        def finished(found: Found) -> Sought:
            found = _ordered(found, _product(found, likeness))
            return Sought(found, found.scores, stages=["retrieval"] * len(found.product_ids))

        return Source(
            likeness, search, lambda limit: usual.new_goods(likeness, plan.request, plan.state, limit),
            lambda: search(likeness, count, limits), finished,
        )  # fmt: skip

    def _complements(
        self, loaded: LoadedRelease, query: np.ndarray, plan: Plan, usual: Usual, limits: Limits, count: int
    ) -> Source:
        search = usual.search(plan.request, linked(plan.cart, LinkWeights(CART_LIFT, 0.0)))

        def finished(found: Found) -> Sought:
            # Of a product without a category its variants are the same thing again all the same.
            found = found.take(np.flatnonzero(found.variant == 0))
            weights = loaded.weights_of(plan.kind)
            found = _ordered(found, _product(found, query) + weights.gain(found.together, 0.0))
            return Sought(found, bonus=weights.gain(found.together, 0.0))

        return Source(
            query, search, lambda limit: usual.new_goods(query, plan.request, plan.state, limit),
            lambda: search(query, count, limits), finished,
        )  # fmt: skip

    def _ranking(
        self, loaded: LoadedRelease, query: np.ndarray, plan: Plan, ranking: Mapping[str, float], usual: Usual,
        limits: Limits, count: int,
    ) -> Source:  # fmt: skip
        """By a score for each product; where trends are too few, the list for the shopper follows."""
        request = plan.request
        ids = sorted(ranking, key=lambda product_id: (-ranking[product_id], product_id))
        others = usual.search(request, linked(plan.linked_from, loaded.link_weights))

        def search(query: np.ndarray, limit: int, limits: Limits) -> Found:
            found = self._first(loaded, ids, query, limit, request, limits)
            if plan.kind == "again" or len(found.product_ids) >= limit:
                return found
            # A quiet shop, or a filter that keeps little.
            rest = others(query, limit, limits).without(set(found.product_ids))
            return _placed(found, 0).joined(_placed(rest, len(found.product_ids))).take_first(limit)

        def finished(found: Found) -> Sought:
            scores = np.array([ranking.get(product_id, 0.0) for product_id in found.product_ids])
            usually = _product(found, query) + loaded.link_weights.gain(found.together, found.variant)
            order = np.lexsort((-usually, -scores))
            stages = [plan.kind if found.product_ids[row] in ranking else "retrieval" for row in order]
            return Sought(found.take(order), scores[order], stages=stages)

        return Source(
            query, search,
            lambda limit: search(query, 0, limits) if plan.kind == "again" else usual.new_goods(query, request, plan.state, limit),
            lambda: search(query, count, limits), finished,
        )  # fmt: skip

    def _first(
        self, loaded: LoadedRelease, ids: Sequence[str], query: np.ndarray, limit: int, request: Request, limits: Limits
    ) -> Found:
        """The first `limit` of `ids` that may be offered, in order. Few are asked after first: mostly they are enough."""
        filters = limits.filters(request.filters, request.moment)
        start, size = 0, 10 * limit
        found = None
        while found is None or (start < len(ids) and len(found.product_ids) < limit):
            more = self.store.vectors.among(
                loaded.name,
                ids[start : start + size],
                query,
                limit,
                filters,
                limits.left_out,
                limits.met_by,
                limits.hides,
            )
            more = _placed(more, start)
            found = more if found is None else found.joined(more)
            start, size = start + size, 10 * size
        return found.take_first(limit)

    def _wanted(self, plan: Plan, now: float) -> dict[str, float]:
        return self.trending(now, replayed=plan.request.now is not None)

    def _due(self, plan: Plan, now: float) -> dict[str, float]:
        intervals = self.intervals()
        return {
            bought.product_id: due_score(bought, interval_days(bought, intervals), now) for bought in plan.purchases
        }

    # ------------------------------------------------------------------------------------------------------------- figures
    def trending(self, now: float, replayed: bool = False) -> dict[str, float]:
        """How much each product is wanted now, of those that the latest events are about. What was done in the last ten minutes
        is read each time, what was before that every TRENDING_SECONDS at least; a replayed moment is read whole."""

        if replayed:
            return self._trending_between(now, None, now)
        made, settled = self._trending.get(self._settled)
        fresh = self._trending_between(now, made - TRENDING_FRESH_SECONDS, now + CLOCK_SKEW)
        aged = 0.5 ** ((now - made + TRENDING_FRESH_SECONDS) / (self.settings.trending_half_life_days * DAY))
        wanted = {product_id: aged * score for product_id, score in settled.items()}
        for product_id, score in fresh.items():
            wanted[product_id] = wanted.get(product_id, 0.0) + score
        return wanted

    def _settled(self, made: float) -> dict[str, float]:
        return self._trending_between(made - TRENDING_FRESH_SECONDS, None, made - TRENDING_FRESH_SECONDS)

    def _trending_between(self, as_of: float, since: float | None, until: float) -> dict[str, float]:
        half_life = self.settings.trending_half_life_days * DAY
        return self.store.events.trending(
            as_of, half_life, self.kind_weights, OTHER_KIND_WEIGHT, since, until, TRENDING_EVENTS
        )

    def refresh(self) -> None:
        """Read what lists of kind "trending" and "again" take long to read, so that no request has to."""
        self._trending.renew(self._settled)
        self._intervals.renew(self._repeats, REPEATS_SECONDS)

    def intervals(self) -> dict[str | None, float]:
        """Median days until the same product is bought again, by category and (None) of all."""
        return self._intervals.get(self._repeats)[1]

    def _repeats(self, made: float) -> dict[str | None, float]:
        return self.store.events.repeat_intervals(self.settings.list_category_field, REPEATS)


def interval_days(bought: Purchases, intervals: Mapping[str | None, float]) -> float:
    """After how many days this shopper buys this product again: the mean of their own gaps and one more, which is that of the
    product's category, else of all products, else DEFAULT_INTERVAL_DAYS."""
    of_category = [intervals[category] for category in bought.categories if category in intervals]
    usual = float(np.mean(of_category)) if of_category else intervals.get(None, DEFAULT_INTERVAL_DAYS)
    return ((bought.last - bought.first) / DAY + usual) / bought.days


def due_score(bought: Purchases, interval: float, now: float) -> float:
    """How much it is time to buy a product again: log2(1 + times bought) at the moment when it is due, less before, and less
    again long after, when it has been given up. `interval` in days, `now` in epoch seconds."""
    share = max(0.0, now - bought.last) / DAY / max(interval, 1.0)
    return math.log2(1 + bought.days) * share * math.exp(1.0 - share)


def _looks(state: UserState, kind_weights: Mapping[str, float]) -> list[str]:
    """The products looked at, the latest first; after them those met in any other way that counts for interest."""
    met = list(zip(reversed(state.product_ids), reversed(state.kinds), strict=True))
    looked = [product_id for product_id, kind in met if kind in ("view", "click")]
    return list(
        dict.fromkeys(
            [*looked, *(product_id for product_id, kind in met if kind_weights.get(kind, OTHER_KIND_WEIGHT) > 0)]
        )
    )


def _product(found: Found, query: np.ndarray) -> np.ndarray:
    """Inner products [N] of what was found with a query; nothing has no width to agree on."""
    return found.vectors @ query if found.product_ids else np.zeros(0, dtype=np.float32)


def linked(product_ids: Sequence[str], weights: LinkWeights) -> History:
    """What a search follows links from."""
    return History(product_ids, weights.together, weights.variant, LINK_SCALE)


def _ordered(found: Found, scores: np.ndarray) -> Found:
    """With those scores, best first."""
    return replace(found, scores=scores.astype(np.float32)).take(np.argsort(-scores, kind="stable"))


def _with(first: Found, more: Found, count: int) -> Found:
    """All of the first, and of the others the best until there are `count`."""
    others = more.without(set(first.product_ids)).take_first(max(0, count - len(first.product_ids)))
    return first.joined(others)


def _placed(found: Found, start: int) -> Found:
    """Scored by place, the first being number `start`."""
    return replace(found, scores=-np.arange(start, start + len(found.product_ids), dtype=np.float32))


Value = TypeVar("Value")


class _Aged(Generic[Value]):
    """A value that is made again when it is too old, by one thread while others wait."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._lock = threading.Lock()
        self._kept: tuple[float, Value] | None = None

    def get(self, make: Callable[[float], Value]) -> tuple[float, Value]:
        """When it was made (epoch seconds), and the value; `make` is given the moment."""
        with self._lock:
            now = time.time()
            if self._kept is None or not 0.0 <= now - self._kept[0] < self.seconds:
                self._kept = (now, make(now))
            return self._kept

    def renew(self, make: Callable[[float], Value], seconds: float = 0.0) -> None:
        """Make it again unless it is younger than `seconds`. Nobody waits meanwhile while there is one that is young enough."""
        now = time.time()
        if self._kept is not None and 0.0 <= now - self._kept[0] < seconds:
            return
        fresh = now, make(now)
        with self._lock:
            self._kept = fresh
