"""Figures known by hand: each metric, its slices, its bounds, and what the comparison of two models says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse
import scipy.stats
from hypothesis import example, given
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

import metrics
from metrics import (
    Catalogue,
    Ratio,
    compare,
    compare_runs,
    coverage,
    figures,
    measure,
    read_ratios,
    sign_flip_p,
    verdict,
    write_ratios,
)
from train_reranker import ndcg

STRANGERS = [f"x{number}" for number in range(200)]  # nobody met or took them


def catalogue(events: dict[str, int], content: dict[str, tuple[float, float]] | None = None) -> Catalogue:
    """These items, each event of another shopper out of seven, and then the strangers."""
    ids = [*events, *(name for name in STRANGERS if name not in events)]
    counts = np.array([events.get(name, 0) for name in ids])
    vectors = np.array([(content or {}).get(name, (0.0, 0.0)) for name in ids])
    return Catalogue(ids, counts, counts, 7, scipy.sparse.csr_matrix(vectors))


def judged(lists, targets, items: Catalogue, history=None):
    """(value, n) by metric and slice."""
    history = np.zeros(len(lists), dtype=int) if history is None else np.array(history)
    return {
        (figure.metric, figure.slice): (figure.value, figure.n)
        for figure in figures(measure(lists, targets, history, items))
    }


def ranked(position: int) -> list[str]:
    """Strangers, with the item "z" at this position (from 0)."""
    return [*STRANGERS[:position], "z"]


SECOND = 1 / math.log2(3)  # what a hit in second place gains


def test_recall_and_ndcg_of_lists_known_by_hand():
    items = catalogue({"a": 1, "b": 0, "c": 1, "z": 0})
    lists, targets = [["x0", "a", "b"], ["b"], ranked(99), ranked(100)], [["a", "b", "c"], ["b"], ["z"], ["z"]]
    found = judged(lists, targets, items)
    assert found["recall@100", "all"] == (4 / 6, 6)  # all but "c", and the last one's "z" in place 101
    assert found["recall@100", "warm"] == (1 / 2, 2)  # "a" of "a" and "c"
    assert found["recall@100", "cold"] == (3 / 4, 4)
    for k in (10, 12, 20, 50):
        assert found[f"recall@{k}", "all"] == (pytest.approx((2 / 3 + 1) / 4), 4)  # a mean over shoppers
    third = 1 / math.log2(4)
    first = (SECOND + third) / (1 + SECOND + third)  # three targets: three places could have been filled
    assert found["ndcg@10", "all"] == found["ndcg@12", "all"] == (pytest.approx((first + 1) / 4), 4)


@pytest.mark.parametrize("k", [10, 12, 20, 50])
def test_the_last_place_that_counts_is_the_kth(k):
    items = catalogue({"z": 0})
    found = judged([ranked(k - 1), ranked(k)], [["z"], ["z"]], items)
    assert found[f"recall@{k}", "all"] == (1 / 2, 2)
    if k in metrics.NDCG_AT:
        assert found[f"ndcg@{k}", "all"] == (pytest.approx(1 / math.log2(k + 1) / 2), 2)


def test_more_targets_than_places_can_be_all_right():
    """Thirteen targets, the first ten places hold ten of them: an ideal list has no more."""
    found = judged([STRANGERS[:10]], [STRANGERS[:13]], catalogue({}))
    assert found["ndcg@10", "all"] == (pytest.approx(1.0), 1)
    assert found["ndcg@12", "all"][0] < 0.99
    assert found["recall@10", "all"] == (pytest.approx(10 / 13), 1)


def test_mrr_and_hits_go_by_the_first_target():
    items = catalogue({"a": 0, "z": 0})
    lists, targets = [["x0", "a", "z"], ranked(9), ranked(10), ranked(99), ranked(100)], [["a", "z"]] + [["z"]] * 4
    found = judged(lists, targets, items)
    assert found["mrr", "all"] == (pytest.approx((1 / 2 + 1 / 10 + 1 / 11 + 1 / 100 + 0) / 5), 5)
    assert found["hit@10", "all"] == (2 / 5, 5)


def test_shoppers_by_the_length_of_their_history():
    items = catalogue({"a": 0, "z": 0})
    history = [0, 1, 2, 3, 9, 10, 500]
    hits = [True, True, False, True, True, False, False]
    lists = [["a" if hit else "x0"] for hit in hits]
    targets = [["a"], ["a"], ["a", "z"], ["a", "z"], ["a"], ["a"], ["a"]]
    found = judged(lists, targets, items, history)
    ideal = 1 / (1 + SECOND)
    assert found["recall@100", "history 0"] == (1.0, 1)
    assert found["recall@100", "history 1-2"] == (1 / 3, 3)  # over targets
    assert found["recall@100", "history 3-9"] == (2 / 3, 3)
    assert found["recall@100", "history 10+"] == (0.0, 2)
    assert found["ndcg@10", "history 0"] == (1.0, 1)
    assert found["ndcg@10", "history 1-2"] == (1 / 2, 2)  # over shoppers
    assert found["ndcg@12", "history 3-9"] == (pytest.approx((ideal + 1) / 2), 2)
    assert found["ndcg@12", "history 10+"] == (0.0, 2)


def test_a_slice_that_nobody_is_in_has_no_figure():
    found = judged([["a"]], [["a"]], catalogue({"a": 1}), [4])
    everybody = {"recall@10", "recall@12", "recall@20", "recall@50", "mrr", "hit@10", "novelty@10", "popularity@10"}
    sliced = {"recall@100", "ndcg@10", "ndcg@12"}
    expected = {(metric, "all") for metric in everybody | sliced} | {(metric, "history 3-9") for metric in sliced}
    assert found.keys() == expected | {("recall@100", "warm")}  # no pair, so no diversity either


def test_a_target_that_the_catalogue_does_not_hold_is_a_cold_miss():
    found = judged([["a"]], [["a", "unknown"]], catalogue({"a": 1}))
    assert found["recall@100", "all"] == (1 / 2, 2)
    assert found["recall@100", "cold"] == (0.0, 1)


def test_novelty_is_in_bits_as_if_one_more_shopper_had_met_everything():
    items = catalogue({"a": 7, "b": 1, "c": 0})  # of seven shoppers
    found = judged([["a", "b"], ["c"], []], [["x0"]] * 3, items)
    assert found["novelty@10", "all"] == (
        pytest.approx(((0 + 2) / 2 + 3) / 2),
        2,
    )  # 8/8, 2/8, 1/8; an empty list has none
    eleven = [*STRANGERS[:10], "a"]
    assert judged([eleven], [["x0"]], items)["novelty@10", "all"] == (3.0, 1)  # the eleventh is not looked at


def test_diversity_is_one_minus_the_mean_cosine_of_pairs():
    items = catalogue(
        dict.fromkeys("abcd", 0),
        {"a": (1.0, 0.0), "b": (1.0, 0.0), "c": (0.0, 1.0), "d": (0.6, 0.8), STRANGERS[-1]: (0.0, 1.0)},
    )
    same, apart, three, silent = ["a", "b"], ["a", "c"], ["a", "c", "d"], ["a", "x0"]
    for own, expected in ((same, 0.0), (apart, 1.0), (three, 1 - (0 + 0.6 + 0.8) / 3), (silent, 1.0)):
        assert judged([own], [["x1"]], items)["diversity@10", "all"] == (pytest.approx(expected), 1)
    # A list of one has no pair: the mean is over the others.
    assert judged([same, apart, ["a"]], [["x1"]] * 3, items)["diversity@10", "all"] == (pytest.approx(0.5), 2)


def test_popularity_is_the_share_of_other_items_that_are_wanted_less():
    items = Catalogue(list("abcde"), np.array([9, 4, 4, 0, 1]), np.array([1] * 5), 7, scipy.sparse.csr_matrix((5, 1)))
    for own, expected in (("a", 1.0), ("b", 2.5 / 4), ("c", 2.5 / 4), ("e", 1 / 4), ("d", 0.0), ("abcde", 0.5)):
        assert judged([list(own)], [["a"]], items)["popularity@10", "all"] == (expected, 1)


def test_coverage_counts_what_anybody_is_offered_first_and_its_bounds_are_its_value():
    items = catalogue({"a": 0, "b": 0})
    found = coverage([["a", "b"], ["a"], [*STRANGERS[:10], "b", "x50"]], items)  # the last two are not looked at
    assert (found.metric, found.value, found.n) == ("coverage@10", 12 / 202, 3)
    assert (found.low, found.high) == (found.value, found.value)


# --- against others' code


def shuffles(count: int):
    """A ranking of so many items, and which of them are relevant."""
    return st.tuples(st.permutations(range(count)), st.sets(st.integers(0, count - 1), min_size=1))


@given(st.integers(2, 40).flatmap(shuffles), st.sampled_from(metrics.NDCG_AT))
def test_ndcg_is_scikit_learns_here_and_in_the_rerankers_training(ranking, short):
    order, relevant = ranking
    relevance, score = np.zeros(len(order)), np.empty(len(order))
    relevance[list(relevant)] = 1.0
    score[list(order)] = np.arange(len(order), 0, -1)
    expected = ndcg_score([relevance], [score], k=short)
    names = [f"x{item}" for item in order]
    found = judged([names], [[f"x{item}" for item in relevant]], catalogue({}))
    assert found[f"ndcg@{short}", "all"] == (pytest.approx(expected), 1)
    in_order = relevance[list(order)].astype(bool)[None]
    assert ndcg(in_order, np.array([len(relevant)]), short)[0] == pytest.approx(expected)


@given(st.lists(st.integers(-4, 4), min_size=2, max_size=10))
@example([1, 2, -3])  # whose sum is 0, but not as floats
def test_p_is_that_of_every_flip_there_is(tenths):
    """Also where sums that are alike differ in their last bit: scipy is given whole numbers, which have no such bit."""
    exact = scipy.stats.permutation_test(
        (np.array(tenths, dtype=float), np.zeros(len(tenths))), lambda a, b: float((a - b).sum()),
        permutation_type="samples", n_resamples=np.inf, vectorized=False,
    )  # fmt: skip
    (found,) = sign_flip_p(np.array(tenths)[:, None] / 10)
    assert found == pytest.approx(min(exact.pvalue, 1.0), abs=0.025)  # five standard errors of 10,000 flips


# --- intervals and comparisons


def test_bounds_are_those_of_a_mean_over_shoppers_and_the_same_each_time():
    items = catalogue({"z": 0})
    measured = measure([ranked(0 if number % 2 else 199) for number in range(400)], [["z"]] * 400, np.zeros(400), items)
    found = {figure.metric: figure for figure in figures(measured) if figure.slice == "all"}
    assert found == {figure.metric: figure for figure in figures(measured) if figure.slice == "all"}
    for metric in ("recall@100", "recall@10", "ndcg@10", "mrr", "hit@10"):
        assert found[metric].value == 0.5
        # A mean of 400 coins: its standard error is 0.5 / 20.
        assert (found[metric].low, found[metric].high) == pytest.approx((0.5 - 0.049, 0.5 + 0.049), abs=0.005)


@given(st.lists(st.tuples(st.integers(0, 120), st.booleans()), min_size=1, max_size=30))
def test_bounds_hold_the_value(shoppers):
    """Even where a slice is so rare that many resamples miss it."""
    items = catalogue({"z": 1})
    targets = [["z" if warm else "x0"] for _, warm in shoppers]
    history = np.array([place % 12 for place, _ in shoppers])
    for figure in figures(measure([ranked(place) for place, _ in shoppers], targets, history, items)):
        if figure.metric in ("recall@100", "recall@10", "hit@10"):  # shares of what is or is not
            assert figure.low - 1e-9 <= figure.value <= figure.high + 1e-9


def mean_of(values) -> Ratio:
    return Ratio(np.array(values, dtype=float), np.ones(len(values)))


def test_models_that_differ_by_the_same_for_everyone():
    ours, theirs = mean_of([0.75, 0.5, 1.0, 0.25, 0.5]), mean_of([0.5, 0.25, 0.75, 0.0, 0.25])
    (found,) = compare([(ours, theirs)])
    assert (found.difference, found.low, found.high, found.n) == (0.25, 0.25, 0.25, 5)  # no resample can see another
    assert found.p == pytest.approx(2 / 2**5, abs=0.01)  # all of five signs alike, one way or the other
    (turned,) = compare([(theirs, ours)])
    assert (turned.difference, turned.p) == (-0.25, found.p)


def test_models_that_do_not_differ_and_models_that_surely_do():
    random = np.random.default_rng(1)
    same = mean_of(random.random(400))
    better = Ratio(same.numerator + 0.2 * random.random(400), same.denominator)
    # Halves by chance: as much won as lost.
    noise = Ratio(same.numerator + np.tile([0.1, -0.1], 200), same.denominator)
    alike, sure, luck = compare([(same, same), (better, same), (noise, same)])
    assert (alike.difference, alike.low, alike.high, alike.p) == (0.0, 0.0, 0.0, 1.0)
    assert sure.low > 0.08
    assert sure.high < 0.12
    assert sure.p == 1 / 10_001  # never 0
    assert luck.difference == pytest.approx(0.0, abs=1e-12)
    # A mean of 400 steps of a tenth: its standard error is 0.1 / 20.
    assert (luck.low, luck.high) == pytest.approx((-0.0098, 0.0098), abs=0.002)
    assert luck.p > 0.9


def test_a_pair_is_tighter_than_its_two_intervals():
    """Shoppers differ much, the models little: only by pairs can it be seen."""
    random = np.random.default_rng(2)
    theirs = mean_of(random.random(300))
    ours = Ratio(theirs.numerator + 0.01, theirs.denominator)
    (found,) = compare([(ours, theirs)])
    alone = figures({("m", "ours"): ours, ("m", "theirs"): theirs})
    assert alone[0].low < alone[1].high  # they overlap
    assert found.low == pytest.approx(0.01)
    assert found.p < 0.001


def test_a_ratio_over_targets_is_compared_over_targets():
    """One shopper with three targets counts three times."""
    counts = np.array([3.0, 1.0])
    (found,) = compare([(Ratio(np.array([3.0, 0.0]), counts), Ratio(np.array([0.0, 1.0]), counts))])
    assert (found.difference, found.n) == (2 / 4, 4)
    assert (found.low, found.high) == (-1.0, 1.0)  # the resamples of one shopper twice
    assert found.p == 1.0  # 3 - 1: of the four signings none is closer to nothing


def test_only_figures_of_the_same_shoppers_can_be_paired():
    with pytest.raises(ValueError, match="same denominators"):
        compare([(mean_of([1, 1]), Ratio(np.ones(2), np.array([1.0, 0.0])))])


# --- several runs, and what they say of an idea


def ratio(*values: float) -> Ratio:
    return Ratio(np.array(values), np.ones(len(values)))


def test_runs_are_compared_by_their_mean_and_other_seeds_count_as_other_shoppers_do():
    """Every shopper has the same difference: only the seeds differ, and resamples lie between the least and the most."""
    pairs = [(ratio(0.5, 0.7), ratio(0.4, 0.6)), (ratio(0.7, 0.9), ratio(0.4, 0.6))]
    value, low, high = compare_runs(pairs)
    assert (value, low, high) == pytest.approx((0.2, 0.1, 0.3))
    assert compare_runs(pairs[:1]) == pytest.approx((0.1, 0.1, 0.1))
    assert compare_runs([(ratio(1, 0, 0, 0), ratio(0, 0, 0, 0))] * 2)[0] == pytest.approx(0.25)


def test_one_run_has_the_bounds_of_a_paired_bootstrap_over_shoppers():
    random = np.random.default_rng(1)
    ours, theirs = (Ratio(random.random(400), np.ones(400)) for _ in range(2))
    (other,) = compare([(ours, theirs)])
    assert compare_runs([(ours, theirs)])[0] == pytest.approx(other.difference)
    assert compare_runs([(ours, theirs)])[1:] == pytest.approx((other.low, other.high), abs=0.005)


def test_runs_on_other_shoppers_are_refused():
    with pytest.raises(ValueError, match="same denominators"):
        compare_runs([(ratio(0.5), ratio(0.4)), (Ratio(np.ones(1), np.zeros(1)), ratio(0.4))])


def test_an_idea_helps_where_it_is_missed():
    assert [verdict(-0.2, -0.1), verdict(-0.1, 0.1), verdict(0.1, 0.2)] == ["helps", "no difference seen", "hurts"]


def test_ratios_are_read_as_they_were_written(tmp_path):
    written = {
        ("reranked", "ndcg@10", "all"): ratio(0.25, 0.5),
        ("retrieval", "recall@100", "history 1-2"): ratio(1, 0),
    }
    write_ratios(tmp_path / "new" / "run.npz", written)
    read = read_ratios(tmp_path / "new" / "run.npz")
    assert list(read) == list(written)
    for key, own in written.items():
        np.testing.assert_array_equal(read[key].numerator, own.numerator)
        np.testing.assert_array_equal(read[key].denominator, own.denominator)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["run.npz"]
