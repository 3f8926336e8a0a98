"""What rules need of the catalogue beyond the usual candidates: what is pinned or has a share of the places, more where caps leave
too few, and how much filters and hides took away."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from conditions import Condition, Not, OfProducts
from rules import Effect, Explore, Filter, HideMet, Outcome, Pin, Promote, Ranked, RuleSet, apply, filtered, seed_of
from store import Filters, Found, Hide, Store
from tensors import DAY

MAX_ROUNDS = 7  # of looking for more, each for as many as are there already: 12,800 candidates at the end
SPARE = 3  # times as many products as a share has places, since caps may hold some back
DRAWN_FROM = 5  # times as many new products as have places: a draw without a choice is none
COUNTED = 100  # candidates of which it is said how many a filter or a hide took away


@dataclass(frozen=True)
class Limits:
    """What a request does not let be shown, besides its own filters."""

    conditions: Sequence[Condition] = ()  # that must hold
    exclude: Sequence[str] = ()
    viewed: Sequence[str] = ()  # what the request says was met, so far as that hides it
    met_by: str | None = None  # whose past is hidden
    hides: Sequence[Hide] | None = None  # so far as it was met in one of these ways; None: in any

    @property
    def left_out(self) -> list[str]:
        """The products that are not to be shown, each once."""
        return list(dict.fromkeys([*self.exclude, *self.viewed]))

    def filters(self, given: Filters, now: float) -> Filters:
        """A request's own with these; conditions count their days back from `now`."""
        return replace(given, also=[*given.also, *self.conditions], now=now) if self.conditions else given


Search = Callable[[np.ndarray, int, Limits], Found]  # a query float32 [D], how many, within which limits


def limits_of(
    rules: RuleSet,
    user_id: str | None,
    history: Sequence[str],
    exclude: Sequence[str],
    exclude_history: bool,
    now: float,
) -> Limits:
    """Of a request. What its `history` names counts as viewed just now. With `exclude_history` off nothing met is hidden,
    whatever rules say."""
    limits = Limits([rule.keep for _, rule in rules.of(Filter)], exclude)
    if not exclude_history:
        return limits
    ways = [rule for _, rule in rules.of(HideMet)]
    viewed = history if not ways or any(_hides_views(rule) for rule in ways) else ()
    hides = [Hide(rule.events, None if rule.days is None else now - DAY * rule.days) for rule in ways]
    return replace(limits, viewed=viewed, met_by=user_id, hides=hides if ways else None)


def _hides_views(rule: HideMet) -> bool:
    return rule.events is None or "view" in rule.events


def ranked_of(
    store: Store, product_ids: Sequence[str], scores: np.ndarray, vectors: np.ndarray, item_width: int, untouched: int
) -> tuple[list[int], Ranked]:
    """What rules look at, of products with their scores [N] and rows of a release [N, D], whose columns are as in `RuleSearch`;
    and which of the N it holds: those that are still there."""
    facts = store.products.facts(product_ids)
    rows = [row for row, product_id in enumerate(product_ids) if product_id in facts]
    known = vectors[rows] if rows else np.zeros((0, untouched + 1), dtype=np.float32)
    new = known[:, untouched] > 0
    described = [replace(facts[product_ids[row]], new=bool(one)) for row, one in zip(rows, new, strict=True)]
    return rows, Ranked(described, scores[rows], known[:, :item_width])


class RuleSearch:
    """One request under its rules: `search` finds for it within limits, `new_goods` so many products that nobody met, by
    `query`. `item_width` columns of a row are the item's vector, column `untouched` says that nobody met it."""

    def __init__(
        self, rules: RuleSet, limits: Limits, store: Store, search: Search, new_goods: Callable[[int], Found],
        query: np.ndarray, item_width: int, untouched: int, k: int, user_id: str | None, now: float,
    ) -> None:  # fmt: skip
        self.rules, self.limits, self.store, self.search, self.new_goods = rules, limits, store, search, new_goods
        self.query, self.item_width, self.untouched = query, item_width, untouched
        self.k, self.user_id, self.now = k, user_id, now
        self.rounds = 0

    def supplemented(self, found: Found) -> Found:
        """With what is pinned and what has a share of the places, so far as the limits let it be shown."""
        pinned = {rule.product_id for _, rule in self.rules.of(Pin) if rule.place <= self.k} - set(found.product_ids)
        if pinned:
            found = self._with(found, self._within(len(pinned), OfProducts.model_construct(products=sorted(pinned))))
        for _, promote in self.rules.of(Promote):
            found = self._with(found, self._within(SPARE * math.ceil(promote.share * self.k), promote.when))
        for _, explore in self.rules.of(Explore):
            found = self._with(found, self.new_goods(DRAWN_FROM * math.ceil(explore.share * self.k + 1)))
        return found

    def _within(self, limit: int, *conditions: Condition) -> Found:
        limits = replace(self.limits, conditions=[*self.limits.conditions, *conditions])
        return self.search(self.query, limit, limits)

    def _with(self, found: Found, more: Found) -> Found:
        return found.joined(more.without(set(found.product_ids)))

    def arranged(self, found: Found, scores: np.ndarray) -> Outcome:
        """The places, given the rows of `found` and their logits [N]."""
        rows, ranked = ranked_of(self.store, found.product_ids, scores, found.vectors, self.item_width, self.untouched)
        outcome = apply(self.rules, ranked, self.k, self.now, seed_of(self.user_id or "", self.now))
        placed = [replace(one, row=rows[one.row]) for one in outcome.placed]
        return replace(outcome, placed=placed)

    def more(self, found: Found, outcome: Outcome) -> Found | None:
        """With candidates that caps would let in, where they left places empty. None when there are none, or this went on for
        too long."""
        if len(outcome.placed) >= self.k or not outcome.full or self.rounds == MAX_ROUNDS:
            return None
        self.rounds += 1
        there = Not(not_=OfProducts.model_construct(products=found.product_ids))
        further = self._within(max(len(found.product_ids), self.k), *outcome.full, there)
        return found.joined(further) if further.product_ids else None

    def effects(self, outcome: Outcome) -> list[Effect]:
        """What each rule did: of filters and hides, how many they took of what a search without them finds."""
        effects = list(outcome.effects)
        ways = self.rules.of(HideMet)
        if self.limits.hides is None:
            for number, _ in ways:
                effects[number] = replace(effects[number], note="not applied: the request has exclude_history off")
            ways = []
        if not ways and not self.rules.of(Filter):
            return effects
        open_to = replace(self.limits, conditions=())
        if ways:
            open_to = replace(open_to, viewed=(), met_by=None)
        ids = self.search(self.query, max(self.k, COUNTED), open_to).product_ids
        facts = self.store.products.facts(ids)
        known = [facts[product_id] for product_id in ids if product_id in facts]
        rows, removed = filtered(self.rules, known, self.now)
        left = {known[row].product_id for row in rows}
        hidden = self.store.vectors.hidden(sorted(left), self.limits.met_by, self.limits.hides or ())
        for (number, rule), gone in zip(ways, hidden, strict=True):
            gone = left & (gone | (set(self.limits.viewed) if _hides_views(rule) else set()))
            removed[number] = len(gone)
            left -= gone
        for number, count in removed.items():
            effects[number] = replace(effects[number], removed=count)
        return effects
