"""Every figure of ranked lists, its interval, and whether two models differ. Knows arrays, not databases.

Of lists of products, best first:

- recall@100: targets among the first 100, over **targets**, so that who took much counts for more.
- recall@10, @12, @20, @50: the share of a shopper's targets among the first k, a mean over **shoppers**. These two kinds of recall
  are those of the lines published on these splits; where everybody has one target they are one.
- ndcg@10, @12: binary gains, ideal of min(targets, k) places (Järvelin and Kekäläinen, TOIS 2002); a mean over shoppers.
- mrr: 1 / place of the first target, 0 when it is not among the first 100; a mean over shoppers.
- hit@10: the share of shoppers with a target among the first 10.
- novelty@10, in bits: the mean of -log2 of the share of training shoppers who met the item, as if one more shopper had met every
  item (Zhou et al., PNAS 2010; Vargas and Castells, RecSys 2011).
- diversity@10: 1 - the mean cosine of the pairs in a list (Ziegler et al., WWW 2005), in `Catalogue.content`.
- popularity@10: the mean percentile of the items by training events: 1 the most popular, 0.5 drawn at random, 0 the least.
- coverage@10: the share of the catalogue that stands in anybody's first 10.

Slices: "all"; of recall@100, targets with training events ("warm") and without ("cold"); of recall@100 and ndcg, shoppers by how
many distinct items their training history has.

Every metric but coverage is a ratio of sums over shoppers (`Ratio`), so one bootstrap over shoppers serves them all.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import scipy.sparse

RETRIEVED = 100
TOP = 10  # of a list, what is judged beyond accuracy: the first screen
RECALL_AT = (10, 12, 20, 50)
NDCG_AT = (10, 12)
HISTORIES = {"history 0": (0, 0), "history 1-2": (1, 2), "history 3-9": (3, 9), "history 10+": (10, np.inf)}
BOOTSTRAPS = 1000
FLIPS = 10_000
FLIPS_AT_ONCE = 250  # 32 MB of signs for 16,000 shoppers
SEED = 0  # of resamples and flips: the same lists get the same bounds and p each time


@dataclass(frozen=True)
class Catalogue:
    """Facts about the N items that can be offered, as of the cut."""

    product_ids: Sequence[str]
    events: np.ndarray  # int64 [N], training events
    met_by: np.ndarray  # int64 [N], training shoppers who met the item
    shoppers: int  # in the training events
    content: scipy.sparse.csr_matrix  # float64 [N, W], what items are: rows of length 1, or 0 where nothing is known


@dataclass(frozen=True)
class Ratio:
    """A metric as sum of numerators over sum of denominators. S shoppers; a denominator of 0 leaves the shopper out."""

    numerator: np.ndarray  # float64 [S]
    denominator: np.ndarray  # float64 [S]


@dataclass(frozen=True)
class Figure:
    """One figure. low and high bound 95 % of bootstrap resamples over shoppers; n is how many targets or shoppers it is a mean
    over."""

    metric: str
    slice: str
    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Comparison:
    """One model's figure less another's on the same shoppers; p of there being no difference, two-sided."""

    difference: float
    low: float
    high: float
    p: float
    n: int


def measure(
    lists: Sequence[Sequence[str]], targets: Sequence[Sequence[str]], history: np.ndarray, catalogue: Catalogue
) -> dict[tuple[str, str], Ratio]:
    """Every ratio by (metric, slice), without those that nobody has a part in.

    lists: of each of S shoppers, product ids of the catalogue, best first. targets: what each took, at least one id, also such
    as the catalogue does not hold. history: int64 [S], distinct items of each one's training history.
    """
    row_of = {product_id: row for row, product_id in enumerate(catalogue.product_ids)}
    shoppers = len(targets)
    counts = np.array([len(own) for own in targets])
    shopper = np.repeat(np.arange(shoppers), counts)  # [T], of each target, like the next two
    place = _places(lists, targets)
    warm = np.array([target in row_of and catalogue.events[row_of[target]] > 0 for own in targets for target in own])

    def per_shopper(of_targets: np.ndarray) -> np.ndarray:
        return np.bincount(shopper, of_targets, minlength=shoppers)

    every = np.ones(shoppers)
    found: dict[tuple[str, str], Ratio] = {}
    for name, part in (("all", np.ones(len(place), dtype=bool)), ("warm", warm), ("cold", ~warm)):
        found[f"recall@{RETRIEVED}", name] = Ratio(per_shopper(part & (place < RETRIEVED)), per_shopper(part))
    for k in RECALL_AT:
        found[f"recall@{k}", "all"] = Ratio(per_shopper(place < k) / counts, every)
    discount = 1.0 / np.log2(np.arange(RETRIEVED + 1) + 2)
    for k in NDCG_AT:
        ideal = np.cumsum(discount[:k])[np.minimum(counts, k) - 1]
        found[f"ndcg@{k}", "all"] = Ratio(per_shopper(np.where(place < k, discount[place], 0.0)) / ideal, every)
    first = np.full(shoppers, RETRIEVED)
    np.minimum.at(first, shopper, place)
    found["mrr", "all"] = Ratio(np.where(first < RETRIEVED, 1.0 / (first + 1), 0.0), every)
    found[f"hit@{TOP}", "all"] = Ratio((first < TOP).astype(np.float64), every)
    for metric in (f"recall@{RETRIEVED}", *(f"ndcg@{k}" for k in NDCG_AT)):
        whole = found[metric, "all"]
        for name, (least, most) in HISTORIES.items():
            part = (least <= history) & (history <= most)
            found[metric, name] = Ratio(whole.numerator * part, whole.denominator * part)
    found |= _beyond_accuracy(lists, row_of, catalogue)
    return {key: ratio for key, ratio in found.items() if ratio.denominator.any()}


def _places(lists: Sequence[Sequence[str]], targets: Sequence[Sequence[str]]) -> np.ndarray:
    """Places, from 0, of the targets of one shopper after the other: int64 [T]; RETRIEVED where the list does not hold it."""
    places = []
    for ranked, own in zip(lists, targets, strict=True):
        place_of = {product_id: place for place, product_id in enumerate(ranked[:RETRIEVED])}
        places += [place_of.get(target, RETRIEVED) for target in own]
    return np.array(places)


def _beyond_accuracy(
    lists: Sequence[Sequence[str]], row_of: dict[str, int], catalogue: Catalogue
) -> dict[tuple[str, str], Ratio]:
    """novelty, diversity and popularity of the first TOP; an empty list has none of them, a list of one no diversity."""
    top = np.full((len(lists), TOP), -1)
    for number, ranked in enumerate(lists):
        top[number, : len(ranked[:TOP])] = [row_of[product_id] for product_id in ranked[:TOP]]
    filled = top >= 0
    length = filled.sum(1)

    def mean(fact: np.ndarray) -> Ratio:
        """Of a fact about items [N], the mean of each list."""
        return Ratio(np.where(filled, fact[top], 0.0).sum(1) / np.maximum(length, 1), (length > 0).astype(np.float64))

    # The squared length of a list's sum is the squared lengths of its vectors and twice the inner product of each pair.
    content = catalogue.content
    total = sum(content[top[:, place]].multiply(filled[:, place, None]) for place in range(TOP))
    squared = np.asarray(content.multiply(content).sum(1)).ravel()
    pairs = np.asarray(total.multiply(total).sum(1)).ravel() - np.where(filled, squared[top], 0.0).sum(1)
    diversity = np.where(length > 1, 1.0 - pairs / np.maximum(length * (length - 1), 1), 0.0)
    return {
        (f"novelty@{TOP}", "all"): mean(-np.log2((catalogue.met_by + 1) / (catalogue.shoppers + 1))),
        (f"diversity@{TOP}", "all"): Ratio(diversity, (length > 1).astype(np.float64)),
        (f"popularity@{TOP}", "all"): mean(_percentiles(catalogue.events)),
    }


def _percentiles(events: np.ndarray) -> np.ndarray:
    """Share of the other items that have fewer events, those with as many counted half: float64 [N]."""
    _, rank, tied = np.unique(events, return_inverse=True, return_counts=True)
    fewer = np.cumsum(tied) - tied
    return (fewer + (tied - 1) / 2)[rank] / max(len(events) - 1, 1)


def coverage(lists: Sequence[Sequence[str]], catalogue: Catalogue) -> Figure:
    """coverage@10. Its bounds are its value: a resample has a third fewer shoppers' lists in it, and so always covers less."""
    offered = {product_id for ranked in lists for product_id in ranked[:TOP]}
    share = len(offered) / len(catalogue.product_ids)
    return Figure(f"coverage@{TOP}", "all", share, share, share, len(lists))


def figures(measured: dict[tuple[str, str], Ratio]) -> list[Figure]:
    """Every ratio with its bounds."""
    numerators = np.stack([ratio.numerator for ratio in measured.values()], axis=1)
    denominators = np.stack([ratio.denominator for ratio in measured.values()], axis=1)
    values, low, high = _bounded(numerators, denominators)
    counts = denominators.sum(0).astype(int)
    return [
        Figure(metric, part, float(values[column]), float(low[column]), float(high[column]), int(counts[column]))
        for column, (metric, part) in enumerate(measured)
    ]


def compare(pairs: Sequence[tuple[Ratio, Ratio]]) -> list[Comparison]:
    """Each pair's first less its second, with the interval of a paired bootstrap over shoppers and the p of `sign_flip_p`.

    Both of a pair were measured on the same shoppers, and are means over the same shoppers or targets; ValueError if not.
    """
    if not pairs:
        return []
    for ours, theirs in pairs:
        if not np.array_equal(ours.denominator, theirs.denominator):
            raise ValueError("only ratios with the same denominators can be paired")
    differences = np.stack([ours.numerator - theirs.numerator for ours, theirs in pairs], axis=1)
    denominators = np.stack([ours.denominator for ours, _ in pairs], axis=1)
    values, low, high = _bounded(differences, denominators)
    p, counts = sign_flip_p(differences), denominators.sum(0)
    return [
        Comparison(
            float(values[column]), float(low[column]), float(high[column]), float(p[column]), int(counts[column])
        )
        for column in range(len(pairs))
    ]


def compare_runs(pairs: Sequence[tuple[Ratio, Ratio]]) -> tuple[float, float, float]:
    """A model's mean over its runs less another's, and the bounds of 95 % of resamples; of each pair both have one seed and,
    like all pairs, the same shoppers. ValueError if not.

    Shoppers and runs are both drawn anew (the pigeonhole bootstrap: Owen, Annals of Applied Statistics 2007), since other
    shoppers would have taken other things, and other seeds would have given other models.
    """
    denominator = pairs[0][0].denominator
    if any(not np.array_equal(ratio.denominator, denominator) for pair in pairs for ratio in pair):
        raise ValueError("only ratios with the same denominators can be paired")
    differences = np.stack([ours.numerator - theirs.numerator for ours, theirs in pairs], axis=1)  # (S, R)
    shoppers, runs = differences.shape
    both = np.hstack([differences, denominator[:, None]])
    random = np.random.default_rng(SEED)
    resampled = []
    for _ in range(BOOTSTRAPS):
        sums = np.bincount(random.integers(0, shoppers, shoppers, dtype=np.int32), minlength=shoppers) @ both
        if sums[-1] > 0:  # else nobody of a rare slice was drawn: it says nothing
            resampled.append(sums[random.integers(0, runs, runs)].mean() / sums[-1])
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(differences.mean(1).sum() / denominator.sum()), float(low), float(high)


def verdict(low: float, high: float) -> str:
    """Of an idea, by the interval of what leaving it out makes of a figure of which more is better."""
    return "helps" if high < 0 else "hurts" if low > 0 else "no difference seen"


def write_ratios(path: Path, ratios: dict[tuple[str, ...], Ratio]) -> None:
    """Every shopper's part of figures into an .npz file, which appears whole or not at all."""
    arrays: dict[str, Any] = {}
    for key, ratio in ratios.items():
        arrays["|".join((*key, "numerator"))] = ratio.numerator
        arrays["|".join((*key, "denominator"))] = ratio.denominator
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp.npz")
    np.savez_compressed(temporary, **arrays)
    os.replace(temporary, path)


def read_ratios(path: Path) -> dict[tuple[str, ...], Ratio]:
    """What `write_ratios` wrote."""
    with np.load(path, allow_pickle=False) as saved:
        keys = dict.fromkeys(tuple(name.split("|"))[:-1] for name in saved.files)
        return {
            key: Ratio(saved["|".join((*key, "numerator"))], saved["|".join((*key, "denominator"))]) for key in keys
        }


def _bounded(numerators: np.ndarray, denominators: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ratios of sums of [S, M], and where 95 % of bootstrap resamples over shoppers lie: value, low, high, each [M]."""
    shoppers, width = numerators.shape
    random = np.random.default_rng(SEED)
    both = np.hstack([numerators, denominators])
    sums = np.empty((BOOTSTRAPS, 2 * width))
    for resample in sums:
        drawn = np.bincount(random.integers(0, shoppers, shoppers, dtype=np.int32), minlength=shoppers)
        resample[:] = drawn @ both
    bounds = np.empty((2, width))
    for column in range(width):
        top, bottom = sums[:, column], sums[:, width + column]
        # A resample may draw nobody of a rare slice; it then says nothing about it.
        bounds[:, column] = np.quantile(top[bottom > 0] / bottom[bottom > 0], [0.025, 0.975])
    return numerators.sum(0) / denominators.sum(0), bounds[0], bounds[1]


def sign_flip_p(differences: np.ndarray) -> np.ndarray:
    """Two-sided p of the randomisation test: were the models alike, each shopper's difference could as well have had the other sign
    (Smucker, Allan and Carterette, CIKM 2007).

    differences: float64 [S, C], a column a comparison; returns [C]. p counts the observed signs among the flips, so it is never 0
    (Phipson and Smyth, 2010). All columns see the same flips.
    """
    # A sum that is as large but for the rounding of its terms is as large: .1 + .2 - .3 is not 0 in every order.
    observed = np.abs(differences.sum(0)) - 1e-9 * np.abs(differences).sum(0)
    random = np.random.default_rng(SEED)
    as_large = np.zeros(differences.shape[1])
    for _ in range(FLIPS // FLIPS_AT_ONCE):
        signs = random.integers(0, 2, (FLIPS_AT_ONCE, len(differences)), dtype=np.int8) * 2.0 - 1.0
        as_large += (np.abs(signs @ differences) >= observed).sum(0)
    return (as_large + 1) / (FLIPS + 1)
