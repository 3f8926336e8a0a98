"""Business rules: what a shop's people may ask of a ranked list, and how it is done.

The order in which rules act is theirs, not that of the list: filters and hides, then boosts and buries, then places are given from
the first to the last: to pins, to whom a share of places is due, else to the best that no cap holds back. docs/rules.md is for who
writes them.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError, model_validator

from catalog import FeatureSchema, Identifier, Number, Value
from conditions import (
    MAX_DEPTH,
    Condition,
    Facts,
    IsNew,
    Not,
    OfGroups,
    OfStd,
    Path,
    depth,
    holds,
    moment,
    parts,
    said,
    spelt,
)

DEFAULT = "default"  # the rules of a request that names none
MAX_RULES = 100
MAX_PLACE = 100
MAX_FACTOR = 1e6
MAX_TITLE = 120  # characters

Share = Annotated[Number, Field(gt=0, le=1)]
Days = Annotated[Number, Field(gt=0, le=36_500)]
Factor = Annotated[Number, Field(gt=1, le=MAX_FACTOR)]
EventKind = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]


class _Rule(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: Annotated[Value, Field(description="in answers and counts; else the rule says itself what it is")] = ""

    def title(self) -> str:
        said = self._said()
        return self.name or (said if len(said) <= MAX_TITLE else f"{said[: MAX_TITLE - 1]}…")

    def _said(self) -> str:
        raise NotImplementedError

    def condition(self) -> tuple[str, Condition] | None:
        """The rule's condition and the name of the part that holds it."""
        return None


class _When(_Rule):
    when: Condition

    def condition(self) -> tuple[str, Condition] | None:
        return "when", self.when


class Filter(_Rule):
    """Only what meets `keep` is shown."""

    kind: Literal["filter"]
    keep: Condition

    def condition(self) -> tuple[str, Condition] | None:
        return "keep", self.keep

    def _said(self) -> str:
        return f"only {said(self.keep)}"


class HideMet(_Rule):
    """What the shopper met by an event of these kinds (none given: of any kind) in the last `days` is not shown.

    Where a set has such rules, they take the place of what is done without any: to hide everything that was ever met.
    """

    kind: Literal["hide"]
    events: Annotated[list[EventKind], Field(max_length=50)] | None = None
    days: Days | None = None

    def _said(self) -> str:
        kinds = "seen in any way" if self.events is None else " or ".join(self.events) or "nothing"
        return f"hide {kinds}" + ("" if self.days is None else f" within {self.days:g} days")


class Pin(_Rule):
    """A product at a place, counted from 1."""

    kind: Literal["pin"]
    product_id: Identifier
    place: Annotated[int, Field(ge=1, le=MAX_PLACE)]

    def _said(self) -> str:
        return f"{self.product_id} at place {self.place}"


class Boost(_When):
    """`factor` times the odds that the model gives: the logarithm of it is added to the logit."""

    kind: Literal["boost"]
    factor: Factor

    def _said(self) -> str:
        return f"{said(self.when)}: {self.factor:g} times the odds"


class Bury(_When):
    """The odds that the model gives divided by `factor`; without one, behind everything else."""

    kind: Literal["bury"]
    factor: Factor | None = None

    def _said(self) -> str:
        return f"{said(self.when)}: " + ("last" if self.factor is None else f"odds divided by {self.factor:g}")


class AtMost(_Rule):
    """At most `n` items in an answer that have the same value of a closed field, or that are variants of one product."""

    kind: Literal["at_most"]
    n: Annotated[int, Field(ge=1, le=MAX_PLACE)]
    std: Identifier | None = None
    group: Literal[True] | None = None

    @model_validator(mode="after")
    def _counts_one_thing(self) -> AtMost:
        if (self.std is None) == (self.group is None):
            raise ValueError('give std (the name of a closed field) or "group": true, one of the two')
        return self

    def _said(self) -> str:
        return f"at most {self.n} per {self.std or 'product group'}"

    def values(self, product: Facts) -> Sequence[str]:
        if self.std is not None:
            return product.std.get(self.std, ())
        return () if product.group_id is None else (product.group_id,)

    def none_of(self, values: list[str]) -> Condition:
        if self.std is not None:
            return OfStd.model_construct(std=self.std, none_of=values)
        return Not(not_=OfGroups.model_construct(groups=values))


class Promote(_When):
    """Of the first p places at least `share` * p, rounded down, are such items: DetGreedy of Geyik et al., "Fairness-Aware
    Ranking in Search & Recommendation Systems" (KDD 2019), for one group."""

    kind: Literal["promote"]
    share: Share

    def _said(self) -> str:
        return f"{100 * self.share:g} % of places: {said(self.when)}"


class Diversity(_Rule):
    """Maximal marginal relevance (Carbonell & Goldstein, SIGIR 1998). 0 leaves the order as it is, 1 looks at likeness alone."""

    kind: Literal["diversity"]
    strength: Annotated[Number, Field(ge=0, le=1)]

    def _said(self) -> str:
        return f"diversity {self.strength:g}"


class Explore(_Rule):
    """A share of places for products that nobody met yet, drawn by what the model thinks of them, anew for each shopper and day."""

    kind: Literal["explore"]
    share: Share

    def _said(self) -> str:
        return f"{100 * self.share:g} % of places for new goods"


Rule = Annotated[
    Filter | HideMet | Pin | Boost | Bury | AtMost | Promote | Diversity | Explore, Field(discriminator="kind")
]


RuleKind = TypeVar("RuleKind", bound=_Rule)


class RuleSet(RootModel[Annotated[list[Rule], Field(max_length=MAX_RULES)]]):
    """Rules that hold together."""

    @model_validator(mode="after")
    def _can_hold_together(self) -> RuleSet:
        for kind, name in ((Diversity, "diversity"), (Explore, "explore")):
            if len(self.of(kind)) > 1:
                raise ValueError(f"two rules of kind {name}; there may be one")
        for number, rule in enumerate(self.root):
            name, condition = rule.condition() or ("", None)
            if condition is not None and depth(condition) > MAX_DEPTH:
                raise ValueError(f"rule {number}: {name} is a tree of more than {MAX_DEPTH} levels")
            searched = condition is not None and isinstance(rule, Filter | Promote)
            if searched and condition and any(isinstance(part, IsNew) for _, part in parts(condition)):
                raise ValueError(
                    f"rule {number}: a {rule.kind} rule cannot ask for new_goods; ask for arrived, or use explore"
                )
        places = Counter(rule.place for _, rule in self.of(Pin))
        pinned = Counter(rule.product_id for _, rule in self.of(Pin))
        for what, counts in (("place", places), ("product", pinned)):
            twice = [name for name, count in counts.items() if count > 1]
            if twice:
                raise ValueError(f"{what} {twice[0]!r} is pinned twice")
        share = sum(rule.share for _, rule in self.of(Promote)) + sum(rule.share for _, rule in self.of(Explore))
        if share > 1 + 1e-9:
            raise ValueError(f"promote and explore rules give away {100 * share:g} % of the places")
        return self

    def of(self, kind: type[RuleKind]) -> list[tuple[int, RuleKind]]:
        """The rules of a kind, with their numbers."""
        return [(number, rule) for number, rule in enumerate(self.root) if isinstance(rule, kind)]

    def conditions(self, path: Path = ()) -> Iterator[tuple[Path, Condition]]:
        """Every condition and every part of one, with where it stands."""
        for number, rule in enumerate(self.root):
            named = rule.condition()
            if named is not None:
                yield from parts(named[1], (*path, number, named[0]))

    def spelt(self, schema: FeatureSchema, path: Path = ()) -> tuple[RuleSet, list[tuple[Path, str]]]:
        """The same with STD values in the schema's own spelling, and which fields and values the shop does not have, each with
        its path."""
        unknown: list[tuple[Path, str]] = []
        rules: list[Rule] = []
        for number, rule in enumerate(self.root):
            if isinstance(rule, AtMost) and rule.std is not None and rule.std not in schema.std:
                unknown.append(((*path, number, "std"), f"no such closed field; there are {sorted(schema.std)}"))
            named = rule.condition()
            if named is not None:
                name, condition = named
                rule = rule.model_copy(update={name: spelt(condition, schema, (*path, number, name), unknown)})
            rules.append(rule)
        return RuleSet.model_construct(rules), unknown


def read_stored(stored: object) -> tuple[RuleSet, str]:
    """Rules as the database has them, or none and why they cannot be read: they were right for the program that stored them, which
    may have known other rules, or other bounds, than this one."""
    try:
        return RuleSet.model_validate(stored), ""
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        return RuleSet([]), f"{place}: {first['msg']}" if place else first["msg"]


@dataclass(frozen=True)
class NamedRules:
    """Which rules a request is answered by. The version is None for rules that are only tried."""

    name: str
    version: int | None
    rules: RuleSet
    problem: str = ""  # why they cannot be read; `rules` is empty then


@dataclass(frozen=True)
class Ranked:
    """N candidates, in any order; of equal scores the first is first."""

    facts: Sequence[Facts]
    scores: np.ndarray  # [N], logits
    vectors: np.ndarray  # [N, D], of unit length

    def take(self, rows: Sequence[int]) -> Ranked:
        """Those rows, in that order."""
        return Ranked([self.facts[row] for row in rows], self.scores[rows], self.vectors[rows])


@dataclass(frozen=True)
class Effect:
    """What one rule did to one answer.

    `removed`: of a filter or a hide, how many of the candidates; of a cap, how many that would have come before something that is
    there. `moved`: how many items stand elsewhere than without it.
    """

    rule: str
    kind: str
    removed: int = 0
    moved: int = 0
    note: str = ""


@dataclass(frozen=True)
class Placed:
    row: int  # of the candidates
    by: str = ""  # the rule to which it owes its place; empty where it is there by its score


@dataclass
class Outcome:
    """At most k items in their places, and what each rule did, in the order of the rules."""

    placed: list[Placed]
    effects: list[Effect]
    full: list[Condition] = field(default_factory=list)  # that any further item must meet for caps to let it in


def seed_of(shopper: str, now: float) -> int:
    """The same for a shopper all day (UTC), so that an answer can be repeated."""
    return int.from_bytes(hashlib.blake2b(f"{shopper}\x1f{moment(now).date()}".encode(), digest_size=8).digest(), "big")


def filtered(rules: RuleSet, facts: Sequence[Facts], now: float) -> tuple[list[int], dict[int, int]]:
    """Rows that pass every filter; and how many each filter, by number, keeps out of what those before it let through."""
    rows, removed = list(range(len(facts))), {}
    for number, rule in rules.of(Filter):
        passed = [row for row in rows if holds(rule.keep, facts[row], now)]
        removed[number] = len(rows) - len(passed)
        rows = passed
    return rows, removed


def apply(rules: RuleSet, ranked: Ranked, k: int, now: float, seed: int) -> Outcome:
    """Give k places, fewer when there are fewer candidates or caps let no more in. Candidates have passed filters and hides.

    `now` is epoch seconds; `seed` says what chance is to do, see `seed_of`.
    """
    return _Table(rules, ranked, k, now, seed).filled()


class _Table:
    """The places while they are given away. Rows here are numbered in the order of the scores with boosts and buries in them."""

    def __init__(self, rules: RuleSet, ranked: Ranked, k: int, now: float, seed: int) -> None:
        self.rules, self.k, self.now = rules, k, now
        self.effects = [Effect(rule.title(), rule.kind) for rule in rules.root]
        every = self._conditions(ranked.facts)
        scores, last, self.order = self._scored(every, ranked.scores)
        self.facts = [ranked.facts[row] for row in self.order]
        self.vectors = ranked.vectors[self.order]
        self.last = last[self.order]
        count = len(self.order)
        self.left = np.ones(count, dtype=bool)  # may still be given a place
        self.chosen: list[tuple[int, str]] = []
        self.caps = rules.of(AtMost)
        self.taken: dict[int, Counter[str]] = {number: Counter() for number, _ in self.caps}
        self.rows_of: dict[int, dict[str, list[int]]] = {number: {} for number, _ in self.caps}
        for number, cap in self.caps:
            for row, product in enumerate(self.facts):
                for value in cap.values(product):
                    self.rows_of[number].setdefault(value, []).append(row)
        self.held = np.full(count, -1)  # the number of the cap that holds a row back; -1 for none
        self.strength = next((rule.strength for _, rule in rules.of(Diversity)), 0.0)
        self.relevance = self._relevance(scores[self.order])
        self.likest = np.zeros(count)  # the greatest cosine with anything chosen
        self._share_out(every, scores[self.order], seed)

    def _conditions(self, facts: Sequence[Facts]) -> dict[int, np.ndarray]:
        """Where the conditions of boosts, buries and promotions hold: bool [N], by the rule's number."""
        return {
            number: np.array([holds(rule.when, product, self.now) for product in facts], dtype=bool)
            for number, rule in enumerate(self.rules.root)
            if isinstance(rule, _When)
        }

    def _scored(self, every: dict[int, np.ndarray], scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Logits with what rules add [N], which go behind all others [N], and the order that both make [N]."""
        added: dict[int, np.ndarray] = {}
        last: dict[int, np.ndarray] = {}
        for number, boost in self.rules.of(Boost):
            added[number] = every[number] * math.log(boost.factor)
        for number, bury in self.rules.of(Bury):
            if bury.factor is None:
                last[number] = every[number]
            else:
                added[number] = every[number] * -math.log(bury.factor)

        def order(without: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            total = scores.astype(np.float64)
            for number, extra in added.items():
                total = total + extra * (number != without)
            back = np.zeros(len(scores), dtype=bool)
            for number, rows in last.items():
                back |= rows & (number != without)
            # Stable: with no rule in it this is the order of the scores, ties by row.
            return total, back, np.lexsort((-total, back))

        result = order()
        places = _places(result[2])
        for number in [*added, *last]:
            before = _places(order(without=number)[2])
            moved = every[number] & (before != places) & (np.minimum(before, places) < self.k)
            self.effects[number] = replace(self.effects[number], moved=int(moved.sum()))
        return result

    def _relevance(self, scores: np.ndarray) -> np.ndarray:
        """1 for the best, 0 for what stands at the last place of the list, so that one unit of it is what a cosine of 1 is."""
        front = scores[~self.last][: self.k] if not self.last.all() else scores[: self.k]
        spread = float(front[0] - front[-1]) if len(front) else 0.0
        return (scores - (front[-1] if len(front) else 0.0)) / (spread or 1.0)

    def _share_out(self, every: dict[int, np.ndarray], scores: np.ndarray, seed: int) -> None:
        """Who has a share of the places, and what is best among them."""
        self.shares = {number: (rule.share, 0.0) for number, rule in self.rules.of(Promote)}
        self.holds = {number: every[number][self.order] for number in self.shares}
        self.draws: dict[int, np.ndarray] = {}
        for number, rule in self.rules.of(Explore):
            chance = np.random.default_rng(seed)
            # A random start: a list too short for one whole place gets one now and then, and not always the same place.
            self.shares[number] = rule.share, float(chance.random())
            self.holds[number] = np.array([product.new for product in self.facts], dtype=bool)
            # The greatest of logits with Gumbel noise is a draw by their softmax. Noise by product, not by row: a product's luck
            # does not hang on who else is there.
            self.draws[number] = scores + np.array([_gumbel(seed, product.product_id) for product in self.facts])
        self.have = dict.fromkeys(self.shares, 0)  # places so far

    def filled(self) -> Outcome:
        pins = self._pins()
        for place in range(1, self.k + 1):
            if place in pins:
                self._choose(*pins.pop(place))
                continue
            natural = self._best()
            if natural is None:
                break
            self._choose(*self._due(place, natural))
        for place in sorted(pins):  # the list ends before their place
            if len(self.chosen) < self.k:
                self._choose(*pins[place])
        self._note_shares()
        placed = [Placed(int(self.order[row]), by) for row, by in self.chosen]
        return Outcome(placed, self.effects, self._full() if len(placed) < self.k else [])

    def _pins(self) -> dict[int, tuple[int, str]]:
        """Row and rule by place. Pins count towards caps from the start, and no cap holds them back."""
        row_of = {product.product_id: row for row, product in enumerate(self.facts)}
        pins = {}
        for number, rule in self.rules.of(Pin):
            if rule.place > self.k:
                continue
            row = row_of.get(rule.product_id)
            if row is None:
                self._note(number, "not shown: unknown, or filtered out, hidden or excluded")
                continue
            pins[rule.place] = row, self.effects[number].rule
            self.left[row] = False
            self._count(row)
            if row != rule.place - 1:
                self._add(number, moved=1)
        return pins

    def _best(self, among: np.ndarray | None = None, draw: np.ndarray | None = None) -> int | None:
        """The best that is left and that no cap holds back, `among` those if given. What a cap holds back and stands before it is
        out for good."""
        rows = self.left if among is None else self.left & among
        value = -np.arange(len(rows), dtype=np.float64) if draw is None else draw
        if draw is None and self.strength > 0 and self.chosen:
            value = (1 - self.strength) * self.relevance - self.strength * self.likest
        free = rows & (self.held < 0)
        front = free & ~self.last
        free = front if front.any() else free
        best = int(np.where(free, value, -np.inf).argmax()) if free.any() else None
        passed = rows & (self.held >= 0)
        if best is not None:
            same = self.last == self.last[best]
            passed &= np.where(same, value > value[best], self.last < self.last[best])
        self.left &= ~passed
        for number, _ in self.caps:
            self._add(number, removed=int((passed & (self.held == number)).sum()))
        return best

    def _due(self, place: int, natural: int) -> tuple[int, str]:
        """Who gets a place: the next in order, unless a share falls short otherwise."""
        short = {
            number: math.floor(share * place + start + 1e-9) - self.have[number]
            for number, (share, start) in self.shares.items()
        }
        for number in sorted(short, key=lambda number: (-short[number], number)):
            if short[number] <= 0 or self.holds[number][natural]:
                break
            row = self._best(self.holds[number], self.draws.get(number))
            if row is not None:
                self._add(number, moved=1)
                return row, self.effects[number].rule
        if self.strength > 0 and (self.left[:natural] & (self.held[:natural] < 0)).any():
            self._add(next(number for number, _ in self.rules.of(Diversity)), moved=1)
        return natural, ""

    def _choose(self, row: int, by: str) -> None:
        if self.left[row]:
            self.left[row] = False
            self._count(row)
        if self.strength > 0:
            likeness = self.vectors @ self.vectors[row]
            self.likest = np.maximum(self.likest, likeness) if self.chosen else likeness
        self.chosen.append((row, by))
        for number, holds_in in self.holds.items():
            self.have[number] += bool(holds_in[row])

    def _count(self, row: int) -> None:
        """Towards every cap; one that is full now holds back the rest."""
        for number, cap in self.caps:
            for value in cap.values(self.facts[row]):
                self.taken[number][value] += 1
                if self.taken[number][value] == cap.n:
                    rest = self.rows_of[number][value]
                    self.held[rest] = np.where(self.held[rest] < 0, number, self.held[rest])

    def _full(self) -> list[Condition]:
        found = []
        for number, cap in self.caps:
            values = [value for value, count in self.taken[number].items() if count >= cap.n]
            if values:
                found.append(cap.none_of(values))
        return found

    def _note_shares(self) -> None:
        for number, (share, start) in self.shares.items():
            due, have = math.floor(share * len(self.chosen) + start + 1e-9), self.have[number]
            if have < due:
                self._note(number, f"{have} of {due} places: there are no more such products to show")

    def _add(self, number: int, removed: int = 0, moved: int = 0) -> None:
        effect = self.effects[number]
        self.effects[number] = replace(effect, removed=effect.removed + removed, moved=effect.moved + moved)

    def _note(self, number: int, note: str) -> None:
        self.effects[number] = replace(self.effects[number], note=note)


def _gumbel(seed: int, product_id: str) -> float:
    digest = hashlib.blake2b(product_id.encode(), digest_size=6, key=seed.to_bytes(8, "big")).digest()
    return -math.log(
        -math.log((int.from_bytes(digest, "big") + 0.5) / 2**48)
    )  # of a number within 0 and 1, never at an end


def _places(order: np.ndarray) -> np.ndarray:
    """The place of each row, from 0."""
    places = np.empty(len(order), dtype=np.int64)
    places[order] = np.arange(len(order))
    return places
