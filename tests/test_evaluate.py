"""Figures known by hand: who is judged on a split, the metrics, their bounds, and what is written of them."""

from __future__ import annotations

import json
import math
import sys
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

import evaluate
import import_data
from catalog import Event, Product
from datasets import Source, hm, sample_shop
from datasets.events import event_frame
from evaluate import (
    HM_CUT,
    RTR_CUT,
    SAMPLE_CUT,
    Case,
    EvaluateOptions,
    Row,
    figures,
    hm_cases,
    measure,
    rtr_cases,
    sample_cases,
    save,
    write_page,
)
from recommender import Recommender
from settings import run_script
from tests.test_import_sources import article, bought, rental, write_csv, write_lines
from train_reranker import ndcg


def case(user_id: str, *targets: str) -> Case:
    return Case(user_id, "", 0.0, list(targets))


def ranked(position: int) -> list[str]:
    """Strangers, with the item "z" at this position (from 0)."""
    return [*(f"x{number}" for number in range(position)), "z"]


# --- cases


def test_sample_week_asks_for_what_is_new_in_the_first_session_after_the_cut(monkeypatch):
    def event(user: str, product: str, hours: float, context: str = "") -> Event:
        return Event(user_id=user, product_id=product, at=SAMPLE_CUT + timedelta(hours=hours), context=context)

    log = [
        event("u", "old", -1), event("u", "b", 2, "gym"), event("u", "a", 2.5, "gym"), event("u", "old", 2.6, "gym"),
        event("u", "late", 3), event("v", "old", 1), event("stranger", "a", 1),
    ]  # fmt: skip
    monkeypatch.setattr(sample_shop, "read", lambda path: Source(events=[event_frame(log)]))
    at = (SAMPLE_CUT + timedelta(hours=2)).timestamp()
    assert sample_cases({"u", "v"}, {"u": {"old"}, "v": {"old"}}) == [Case("u", "gym", at, ["a", "b"])]


# --- metrics

SECOND = 1 / math.log2(3)  # what a hit in second place gains


def test_metrics_of_lists_known_by_hand():
    cases = [case("u1", "a", "b", "c"), case("u2", "b"), case("u3", "z"), case("u4", "z")]
    lists = [["x", "a", "b"], ["b"], ranked(99), ranked(100)]
    found = {
        (metric, part): (value, n) for metric, part, value, _, _, n in figures(measure(lists, cases, {"a", "c"}, 2), 2)
    }
    assert found == {
        ("recall@100", "all"): (4 / 6, 6),  # all but "c", and u4's "z" in place 101
        ("recall@100", "warm"): (1 / 2, 2),  # "a" of "a" and "c"
        ("recall@100", "cold"): (3 / 4, 4),
        ("recall@2", "all"): (pytest.approx((1 / 3 + 1) / 4), 4),  # a mean over shoppers
        # Three targets: two places could have been filled.
        ("ndcg@2", "all"): (pytest.approx((SECOND / (1 + SECOND) + 1) / 4), 4),
    }


def test_a_slice_without_targets_has_no_figure():
    found = figures(measure([["a"]], [case("u1", "a")], {"a"}, 10), 10)
    assert {(metric, part) for metric, part, *_ in found} == {
        ("recall@100", "all"), ("recall@100", "warm"), ("recall@10", "all"), ("ndcg@10", "all"),
    }  # fmt: skip


def shuffles(count: int):
    """A ranking of so many items, and which of them are relevant."""
    return st.tuples(st.permutations(range(count)), st.sets(st.integers(0, count - 1), min_size=1))


@given(st.integers(2, 40).flatmap(shuffles), st.integers(1, 20))
def test_ndcg_is_scikit_learns_here_and_in_the_rerankers_training(ranking, short):
    order, relevant = ranking
    relevance, score = np.zeros(len(order)), np.empty(len(order))
    relevance[list(relevant)] = 1.0
    score[list(order)] = np.arange(len(order), 0, -1)
    expected = ndcg_score([relevance], [score], k=short)
    measured = measure([[str(item) for item in order]], [case("u", *map(str, relevant))], set(), short)
    assert measured.ndcg_short[0] == pytest.approx(expected)
    in_order = relevance[list(order)].astype(bool)[None]
    assert ndcg(in_order, np.array([len(relevant)]), short)[0] == pytest.approx(expected)


def test_bounds_are_those_of_a_mean_over_shoppers_and_the_same_each_time():
    cases = [case(f"u{number}", "z") for number in range(400)]
    measured = measure([ranked(0 if number % 2 else 200) for number in range(400)], cases, set(), 10)
    found = figures(measured, 10)
    assert found == figures(measured, 10)
    for _, _, value, low, high, _ in found:
        assert value == 0.5
        # A mean of 400 coins: its standard error is 0.5 / 20.
        assert (low, high) == pytest.approx((0.5 - 1.96 * 0.025, 0.5 + 1.96 * 0.025), abs=0.01)


@given(st.lists(st.tuples(st.integers(0, 120), st.booleans()), min_size=1, max_size=30))
def test_bounds_hold_the_value(shoppers):
    """Even where a slice is so rare that many resamples miss it."""
    cases = [case(f"u{number}", "z" if warm else "x0") for number, (_, warm) in enumerate(shoppers)]
    for _, _, value, low, high, _ in figures(measure([ranked(place) for place, _ in shoppers], cases, {"z"}, 10), 10):
        assert low <= value + 1e-9
        assert value - 1e-9 <= high


# --- who is judged, and on what

A, B, C, D = "0123456001", "0123456002", "0123456003", "0123456004"


@pytest.fixture
def hm_folder(tmp_path):
    """Training: c1 took A, c2 took B, c4 took D. Then c1 takes A again and C, c2 takes D, c3 comes for the first time."""
    write_csv(tmp_path / "articles.csv", [article(number) for number in (A, B, C, D)])
    write_csv(
        tmp_path / "transactions_train.csv",
        [
            bought("2020-09-01", "c1", A, 0.1), bought("2020-09-02", "c2", B, 0.1), bought("2020-09-20", "c4", D, 0.1),
            bought("2020-09-21", "c1", A, 0.1), bought("2020-09-21", "c1", C, 0.1), bought("2020-09-22", "c1", C, 0.1),
            bought("2020-09-22", "c2", D, 0.1), bought("2020-09-22", "c3", A, 0.1),
        ],
    )  # fmt: skip
    return tmp_path


def test_hm_targets_are_new_items_of_shoppers_with_a_past(hm_folder):
    cases = hm_cases(hm_folder, {"c1", "c2", "c4"}, {"c1": {A}, "c2": {B}, "c4": {D}})
    cut = HM_CUT.timestamp()
    assert cases == [Case("c1", "", cut, [C]), Case("c2", "", cut, [D])]


@pytest.fixture
def rtr_folder(tmp_path):
    """Shopper 7 rented 100 before the cut; 8 and 9 rent for the first time after it."""

    def rented(user: str, item: str, day: str, occasion: str = "party"):
        return rental(user, item, review_date=day, **{"rented for": occasion})

    write_lines(
        tmp_path / "renttherunway_final_data.json",
        [
            rented("7", "100", "June 30, 2017"),
            rented("7", "300", "July 9, 2017"), rented("7", "100", "July 1, 2017"),  # a repeat is no target
            rented("7", "200", "July 2, 2017", "work"), rented("7", "99", "July 2, 2017", "wedding"),
            rented("8", "5", "July 2, 2017"), rented("8", "9", "July 1, 2017"),
            rented("9", "1", "June 30, 2017"),  # known to the file, not to the training side
            rented("9", "2", "August 1, 2017"),
        ],
    )  # fmt: skip
    return tmp_path


def at(month: int, day: int) -> float:
    return datetime(2017, month, day, tzinfo=UTC).timestamp()


def test_rtr_warm_is_the_next_new_rental_and_of_one_day_the_lowest_number(rtr_folder):
    cases = rtr_cases(rtr_folder, {"7"}, {"7": {"100"}}, warm=True)
    assert cases == [Case("7", "wedding", at(7, 2), ["99"])]


def test_rtr_cold_is_the_first_rental_of_those_without_a_past(rtr_folder):
    cases = rtr_cases(rtr_folder, {"7"}, {"7": {"100"}}, warm=False)
    assert cases == [Case("8", "party", at(7, 1), ["9"]), Case("9", "party", at(8, 1), ["2"])]
    assert RTR_CUT.timestamp() == at(7, 1)


# --- the script, its rows and its page


class ScriptedRecommender:
    """Finds B before C before D; its reranker turns that around. What it is asked is kept."""

    asked: ClassVar[list] = []
    degraded = False

    def __init__(self, *parts):
        self.asked.clear()

    def recommend(self, request):
        self.asked.append(request)
        found = [(rank, product_id) for rank, product_id in enumerate((B, C, D), start=1)]
        items = [SimpleNamespace(product_id=product_id, retrieval_rank=rank) for rank, product_id in reversed(found)]
        return SimpleNamespace(items=items, degraded=self.degraded)


@pytest.fixture
def judge(store, settings, hm_folder, monkeypatch, capsys):
    """Runs the script in `hm_folder` against a database of the training events; gives exit code and stderr."""
    monkeypatch.chdir(hm_folder)
    import_data.import_source(store, "hm", hm.read(hm_folder), HM_CUT.date())
    features = [Product(product_id=number, title="Parka", std={"colour": ["some colour"]}) for number in (A, B, C, D)]
    store.products.put_features(features, "test")
    monkeypatch.setattr(evaluate, "Recommender", ScriptedRecommender)
    monkeypatch.setattr(evaluate.TextEncoder, "load", lambda settings: None)
    capsys.readouterr()

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments, "--database-url", settings.database_url])
        try:
            run_script(EvaluateOptions, evaluate.main)
        except SystemExit as stopped:
            return stopped.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    return run


def test_the_script_judges_both_stages_and_the_plain_lines(judge, hm_folder):
    assert judge("hm-week", ".")[0] == 0
    asked = [(request.user_id, request.now, request.k) for request in ScriptedRecommender.asked]
    assert asked == [("c1", HM_CUT.timestamp(), 100), ("c2", HM_CUT.timestamp(), 100)]
    rows = json.loads((hm_folder / "docs/results.json").read_text())
    found = {(row["model"], row["stage"], row["metric"], row["slice"]): (row["value"], row["n"]) for row in rows}
    # c1 took C, which nobody had before: second in both lists. c2 took D: third, then first.
    third = 1 / math.log2(4)
    assert found["styletower", "retrieval", "ndcg@12", "all"] == (pytest.approx((SECOND + third) / 2), 2)
    assert found["styletower", "reranked", "ndcg@12", "all"] == (pytest.approx((SECOND + 1) / 2), 2)
    for part, n in (("all", 2), ("warm", 1), ("cold", 1)):
        assert found["styletower", "retrieval", "recall@100", part] == (1.0, n)
    # A, B and D were taken once each: without A, c1 is offered B, D, C; without B, c2 is offered A, D, C.
    assert found["popularity", "retrieval", "ndcg@12", "all"] == (pytest.approx((third + SECOND) / 2), 2)
    assert {row["model"] for row in rows} == {"styletower", *evaluate.BASELINES}

    page = (hm_folder / "docs/results.md").read_text()
    assert all(f"{row['value']:.4f} [{row['low']:.4f}, {row['high']:.4f}]" in page for row in rows)
    assert "Targets: 2 (all), 1 (warm), 1 (cold)." in page

    written = {file.name: file.read_bytes() for file in (hm_folder / "docs").iterdir()}
    assert judge("hm-week", ".")[0] == 0
    assert judge("page")[0] == 0
    assert {file.name: file.read_bytes() for file in (hm_folder / "docs").iterdir()} == written


def test_a_limited_run_writes_nothing(judge, hm_folder):
    assert judge("hm-week", ".", "--limit", "1")[0] == 0
    assert len(ScriptedRecommender.asked) == 1
    assert not (hm_folder / "docs").exists()


def test_a_database_that_holds_the_answers_is_refused(judge, store, hm_folder):
    store.events.put([Event(user_id="c1", product_id=C, at=HM_CUT, kind="purchase")])
    code, said = judge("hm-week", ".")
    assert code == 2
    assert "evaluate.py: the database holds events from 2020-09-21 on" in said
    assert "--until" in said
    assert not (hm_folder / "docs").exists()


def test_an_answer_given_without_the_database_is_not_judged(judge, hm_folder, monkeypatch):
    monkeypatch.setattr(ScriptedRecommender, "degraded", True)
    code, said = judge("hm-week", ".")
    assert code == 2
    assert "evaluate.py: the database did not answer" in said
    assert not (hm_folder / "docs").exists()


def test_without_a_live_release_the_script_says_what_to_run(judge, hm_folder, monkeypatch):
    monkeypatch.setattr(evaluate, "Recommender", Recommender)
    code, said = judge("hm-week", ".", "--models-dir", str(hm_folder))
    assert code == 2
    assert "evaluate.py: no release is live yet; run build_index.py" in said


def test_a_split_with_nobody_to_judge_is_said(judge, hm_folder):
    write_csv(hm_folder / "transactions_train.csv", [bought("2020-09-22", "c3", A, 0.1)])
    code, said = judge("hm-week", ".")
    assert code == 2
    assert "no shopper of . can be judged on hm-week" in said


def test_the_folder_and_the_results_must_be_there(judge):
    """The folder is not taken from the environment, which always has a PATH."""
    assert judge("rtr-cold") == (2, "evaluate.py: rtr-cold needs the folder of the data set\n")
    assert judge("page") == (2, "evaluate.py: there is no docs/results.json here yet; judge a split first\n")


def row(split: str, model: str, value: float, part: str = "all", metric: str = "recall@100") -> Row:
    return Row(split, model, "retrieval", metric, part, value, value - 0.01, value + 0.01, 7, "c0ffee", "python")


def test_saving_replaces_the_rows_of_the_same_split_and_model_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save([row("hm-week", "EASE", 0.1), row("hm-week", "EASE", 0.2, "cold"), row("hm-week", "popularity", 0.3)])
    save([row("rtr-warm", "EASE", 0.4)])
    save([row("hm-week", "EASE", 0.5)])
    rows = json.loads((tmp_path / "docs/results.json").read_text())
    assert [(row["split"], row["model"], row["value"]) for row in rows] == [
        ("hm-week", "EASE", 0.5), ("hm-week", "popularity", 0.3), ("rtr-warm", "EASE", 0.4),
    ]  # fmt: skip


def test_the_page_leaves_a_missing_figure_empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours = [row("rtr-cold", "styletower", 0.5), row("rtr-cold", "styletower", 0.125, "cold")]
    save([row("rtr-cold", "popularity", 0.25), *ours])
    page = (tmp_path / "docs/results.md").read_text()
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert table == [
        "| model | stage | recall@100 all | recall@100 cold |",
        "|---|---|---|---|",
        "| popularity | retrieval | 0.2500 [0.2400, 0.2600] |  |",
        "| **styletower** | retrieval | 0.5000 [0.4900, 0.5100] | 0.1250 [0.1150, 0.1350] |",
    ]
    write_page([])
    assert "|" not in (tmp_path / "docs/results.md").read_text()
