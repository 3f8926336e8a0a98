"""Experiments: two or more ways to answer side by side. Who gets which, and whether they differ. Knows no database.

An arm is a release and a rule set. A shopper's arm is a hash of the experiment's name and of who they are, so that it stays the
same in every worker, today and tomorrow. What a shopper does with the lists of their arm is counted by shopper, who were assigned
by chance; their lists were not.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from catalog import Identifier

MAX_ARMS = 10
OUTCOMES = ("click", "cart", "purchase")
NORMAL_95 = 1.959964  # standard errors to each side that hold 95 % of a normal distribution
# Below, the split is broken and no figure of the experiment is to be trusted (Fabijan et al., KDD 2019).
SAMPLE_RATIO_P = 0.001


class Arm(BaseModel):
    """One way to answer, for a share of the shoppers: a release (none: whichever is live) and the live rules of a name (none: those
    that the request asks for)."""

    model_config = ConfigDict(extra="forbid")

    name: Identifier
    release: Identifier | None = None
    rules: Identifier | None = None
    share: Annotated[float, Field(gt=0, lt=1)]


def _arms(arms: list[Arm]) -> list[Arm]:
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
        raise ValueError(f"two arms have one name: {sorted({name for name in names if names.count(name) > 1})}")
    total = sum(arm.share for arm in arms)
    if abs(total - 1.0) > 1e-6:
        raise ValueError(f"the arms' shares add up to {total:g}; expected 1")
    return arms


Arms = Annotated[list[Arm], Field(min_length=2, max_length=MAX_ARMS), AfterValidator(_arms)]


@dataclass(frozen=True)
class Experiment:
    """One run of an experiment. The first arm is what the others are compared with, and what anonymous shoppers get."""

    name: str
    version: int  # from 1; each start is a new one
    arms: list[Arm]
    note: str
    started_at: datetime
    stopped_at: datetime | None

    def arm_of(self, shopper: str | None) -> Arm:
        """The same for the same shopper always; the first for nobody in particular."""
        place = 0.0 if shopper is None else fraction(self.name, shopper)
        until = 0.0
        for arm in self.arms[:-1]:
            until += arm.share
            if place < until:
                return arm
        return self.arms[-1]


def fraction(salt: str, shopper: str) -> float:
    """A number in [0, 1) that looks drawn at random, by `salt` and shopper."""
    digest = hashlib.blake2b(f"{salt}\x1f{shopper}".encode(), digest_size=6).digest()
    return int.from_bytes(digest) / 2**48


# -------------------------------------------------------------------------------------------------------------- report
@dataclass(frozen=True)
class Tally:
    """So many shoppers of an arm who were shown `lists` lists, and of those took something out of so many."""

    arm: str
    shoppers: int
    lists: int
    click: int
    cart: int
    purchase: int


@dataclass(frozen=True)
class AnsweredBy:
    """So many lists of an arm by one release and one version of one rule set, and when they were shown."""

    arm: str
    release: str
    rules: str
    rules_version: int | None  # None: no rules of that name were live
    lists: int
    first_at: datetime
    last_at: datetime


def mixed(arm: str, answered: Sequence[AnsweredBy]) -> list[str]:
    """What changed of an arm while it ran, in words; other arms' lists are ignored. Requests may ask for rule sets of several
    names: only a new version of one of them is a change."""
    own = sorted((one for one in answered if one.arm == arm), key=lambda one: one.first_at)
    seen = {"the release that answers": [(one.release, one.first_at) for one in own]}
    for one in own:
        version = "none" if one.rules_version is None else str(one.rules_version)
        seen.setdefault(f"the rules {one.rules!r}", []).append((version, one.first_at))
    said = []
    for what, versions in seen.items():
        first_of: dict[str, datetime] = {}
        for version, at in versions:
            first_of.setdefault(version, at)
        if len(first_of) > 1:
            parts = ", ".join(f"{version} from {at:%Y-%m-%d %H:%M}" for version, at in first_of.items())
            said.append(
                f"{what} changed while arm {arm!r} ran ({parts}): its figures mix them; for figures of one, start the experiment"
                " under a new name and change nothing meanwhile"
            )
    return said


@dataclass(frozen=True)
class Rate:
    """A mean over shoppers, with the variance of the mean (nan from fewer than two shoppers)."""

    value: float
    variance: float

    def less(self, other: Rate) -> Rate:
        """The difference of two groups of shoppers: their variances add up."""
        return Rate(self.value - other.value, self.variance + other.variance)

    def interval(self) -> tuple[float | None, float | None]:
        """What bounds 95 %, by the normal distribution; None when there are too few shoppers to say."""
        if math.isnan(self.variance):
            return None, None
        reach = NORMAL_95 * math.sqrt(self.variance)
        return self.value - reach, self.value + reach


@dataclass(frozen=True)
class ArmFigures:
    arm: str
    shoppers: int
    lists: int
    # outcome -> of shoppers, the share that did so at least once; of lists, the share out of which somebody did
    per_shopper: dict[str, Rate]
    per_list: dict[str, Rate]


@dataclass(frozen=True)
class Difference:
    """An arm's rate less the first arm's; low and high bound 95 % (None when there are too few shoppers to say)."""

    arm: str
    outcome: str
    per: str  # "shopper" or "list"
    difference: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class SampleRatio:
    """Whether the arms got the shares of shoppers that they should have, by a chi-square test."""

    expected: dict[str, float]  # shoppers
    chi_square: float
    p: float
    broken: bool


def figures(arm: str, tallies: Sequence[Tally]) -> ArmFigures:
    """Rates of one arm; the tallies of others are ignored."""
    own = [tally for tally in tallies if tally.arm == arm]
    per_shopper, per_list = {}, {}
    for outcome in OUTCOMES:
        per_shopper[outcome] = _ratio([(tally.shoppers, float(getattr(tally, outcome) > 0), 1.0) for tally in own])
        per_list[outcome] = _ratio(
            [(tally.shoppers, float(getattr(tally, outcome)), float(tally.lists)) for tally in own]
        )
    shoppers = sum(tally.shoppers for tally in own)
    return ArmFigures(arm, shoppers, sum(tally.shoppers * tally.lists for tally in own), per_shopper, per_list)


def _ratio(parts: Sequence[tuple[int, float, float]]) -> Rate:
    """Sum of numerators over sum of denominators, over shoppers given as (how many, numerator, denominator).

    A shopper's lists are not independent of each other, so the variance is that of a ratio of two means over shoppers, by the
    delta method (Deng, Knoblich and Lu, KDD 2018). With denominators of 1 it is the plain variance of a mean.
    """
    count = sum(many for many, _, _ in parts)
    if count == 0:
        return Rate(math.nan, math.nan)
    top = sum(many * numerator for many, numerator, _ in parts)
    bottom = sum(many * denominator for many, _, denominator in parts)
    value = top / bottom
    if count == 1:
        return Rate(value, math.nan)
    squares = sum(many * (numerator - value * denominator) ** 2 for many, numerator, denominator in parts)
    return Rate(value, squares / (count - 1) / count / (bottom / count) ** 2)


def differences(arms: Sequence[ArmFigures]) -> list[Difference]:
    """Each later arm against the first, in every rate that both have."""
    first, *others = arms
    found = []
    for other in others:
        for outcome in OUTCOMES:
            for per in ("shopper", "list"):
                rates = [getattr(arm, f"per_{per}")[outcome] for arm in (other, first)]
                difference = rates[0].less(rates[1])
                if not math.isnan(difference.value):
                    found.append(Difference(other.arm, outcome, per, difference.value, *difference.interval()))
    return found


def sample_ratio(arms: Sequence[Arm], figures_of: Sequence[ArmFigures]) -> SampleRatio:
    """Shoppers that were counted, against the shares. Before anybody was, p is 1."""
    total = sum(arm.shoppers for arm in figures_of)
    expected = {arm.name: total * arm.share for arm in arms}
    if total == 0:
        return SampleRatio(expected, 0.0, 1.0, False)
    from scipy.special import chdtrc  # half a second that only those who read a report wait for

    chi_square = sum((arm.shoppers - expected[arm.arm]) ** 2 / expected[arm.arm] for arm in figures_of)
    p = float(chdtrc(len(arms) - 1, chi_square))
    return SampleRatio(expected, chi_square, p, p < SAMPLE_RATIO_P)
