"""Who is judged on a split, what the release and the plain lines are asked, and the rows that come of it."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

import evaluate
import import_data
from baselines import Case
from catalog import Event, Product
from datasets import Source, hm, s3rec, sample_shop
from datasets.events import event_frame
from evaluate import CASES, CUTS, EvaluateOptions, after_cut
from metrics import read_ratios
from recommender import Recommender
from results import ORACLE, ORACLE_OF_CONTENTS
from tests.test_import_sources import article, bought, rental, s3rec_folder, write_csv, write_lines
from tests.test_import_sources import events as events_of

# --- cases


def cases_of(split, folder, seen: dict[str, set[str]]) -> list[Case]:
    """Of a folder's test days, when these shoppers had met these products before."""
    return CASES[split](after_cut(split, folder), set(seen), seen)


def test_sample_week_asks_for_what_is_new_in_the_first_session_after_the_cut(monkeypatch):
    def event(user: str, product: str, hours: float, context: str = "") -> Event:
        return Event(user_id=user, product_id=product, at=CUTS["sample-week"] + timedelta(hours=hours), context=context)

    log = [
        event("u", "old", -1), event("u", "b", 2, "gym"), event("u", "a", 2.5, "gym"), event("u", "old", 2.6, "gym"),
        event("u", "late", 3), event("v", "old", 1), event("stranger", "a", 1),
    ]  # fmt: skip
    monkeypatch.setattr(sample_shop, "read", lambda path: Source(events=[event_frame(log)]))
    at = (CUTS["sample-week"] + timedelta(hours=2)).timestamp()
    assert cases_of("sample-week", None, {"u": {"old"}, "v": {"old"}}) == [Case("u", "gym", at, ["a", "b"])]


# --- who is judged, and on what

A, B, C, D = "0123455001", "0123456002", "0123456003", "0123456004"


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
    cases = cases_of("hm-week", hm_folder, {"c1": {A}, "c2": {B}, "c4": {D}})
    cut = CUTS["hm-week"].timestamp()
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
    cases = cases_of("rtr-warm", rtr_folder, {"7": {"100"}})
    assert cases == [Case("7", "wedding", at(7, 2), ["99"])]


def test_rtr_cold_is_the_first_rental_of_those_without_a_past(rtr_folder):
    cases = cases_of("rtr-cold", rtr_folder, {"7": {"100"}})
    assert cases == [Case("8", "party", at(7, 1), ["9"]), Case("9", "party", at(8, 1), ["2"])]
    assert CUTS["rtr-cold"].timestamp() == at(7, 1)


def test_s3rec_asks_for_the_last_item_of_everyone_with_a_past(tmp_path):
    s3rec_folder(tmp_path, ["b 1 2 3", "a 3 1", "lone 2", "again 1 2 1"], {"1": [7], "2": [7], "3": [7]})
    seen = {"a": {"3"}, "b": {"1", "2"}, "again": {"1", "2"}}
    cut = CUTS["s3rec-beauty"].timestamp()
    assert cases_of("s3rec-beauty", tmp_path, seen) == [Case("a", "", cut, ["1"]), Case("b", "", cut, ["3"])]
    before = [event for event in events_of(s3rec.read(tmp_path)) if event[3] < CUTS["s3rec-beauty"]]
    assert {user: {item for other, item, *_ in before if other == user} for user in seen} == seen


# --- what is asked beside a product


def beside(log: list[tuple[str, str, float]], seen: dict[str, set[str]] | None = None) -> list[tuple]:
    """Who is asked about which product, with which targets, when `log` (shopper, product, hours after the cut) is taken. Of the
    catalogue's four, a and b are one in two colours, c and d are of no group."""
    cut = CUTS["hm-week"]
    taken = [Event(user_id=user, product_id=product, at=cut + timedelta(hours=hours)) for user, product, hours in log]
    cases = evaluate.beside_cases(event_frame(taken), {"a": "g", "b": "g", "c": None, "d": None}, seen or {})
    return [(case.user_id, (case.at - cut.timestamp()) / 3600, case.about, case.targets) for case in cases]


def test_beside_the_first_product_stands_what_else_was_taken_within_a_day():
    log = [("u", "c", 5), ("u", "a", 6), ("u", "d", 28), ("u", "a", 7), ("u", "c", 8), ("u", "b", 29), ("lone", "a", 0)]
    assert beside(log) == [("u", 5, "c", ["a", "d"])]


def test_a_product_in_another_colour_and_what_was_met_before_are_no_targets():
    log = [("u", "a", 0), ("u", "b", 1), ("u", "c", 2), ("u", "d", 3), ("v", "a", 0), ("v", "b", 1)]
    assert beside(log, {"u": {"c"}}) == [("u", 0, "a", ["d"])]
    assert beside([("u", "c", 0), ("u", "d", 1)]) == [("u", 0, "c", ["d"])]  # no group is no common group


def test_what_the_catalogue_does_not_hold_is_missed_in_a_list_but_not_asked_about():
    assert beside([("u", "gone", 0), ("u", "c", 1), ("u", "new", 2)]) == [("u", 1, "c", ["new"])]


def test_of_very_many_shoppers_some_are_drawn_the_same_each_time(monkeypatch):
    log = [(f"u{number:02}", product, 0.0) for number in range(30) for product in "ac"]
    every = beside(log)
    monkeypatch.setattr(evaluate, "BESIDE_SHOPPERS", 7)
    drawn = beside(log)
    assert len(drawn) == 7 < len(every) == 30
    assert drawn == sorted(drawn) == beside(log)
    assert set(map(str, drawn)) < set(map(str, every))
    assert drawn != every[:7]


def test_of_products_taken_in_one_instant_the_lowest_id_is_asked_about():
    assert beside([("u", "d", 0), ("u", "a", 0), ("u", "c", 0)]) == [("u", 0, "a", ["c", "d"])]


# --- the script, its rows and its page


class ScriptedRecommender:
    """Finds B before C before D; its reranker turns that around. What it is asked is kept."""

    asked: ClassVar[list] = []
    degraded = False

    def __init__(self, *parts):
        self.asked.clear()
        rows = SimpleNamespace(vectors=np.ones((4, 2), dtype=np.float32))
        self.store = SimpleNamespace(vectors=SimpleNamespace(fetch=lambda release, ids: rows))

    def live(self):
        return SimpleNamespace(name="scripted", std_fields=["category"])

    def query(self, request):
        return np.full((1, 2), len(request.context), dtype=np.float32)

    def recommend(self, request):
        self.asked.append(request)
        found = [(rank, product_id) for rank, product_id in enumerate((B, C, D), start=1)]
        items = [SimpleNamespace(product_id=product_id, retrieval_rank=rank) for rank, product_id in reversed(found)]
        return SimpleNamespace(items=items, degraded=self.degraded)


@pytest.fixture
def judge(store, settings, hm_folder, monkeypatch, capsys, exit_code):
    """Runs the script in `hm_folder` against a database of the training events; gives exit code and stderr."""
    monkeypatch.chdir(hm_folder)
    import_data.import_source(store, "hm", hm.read(hm_folder), CUTS["hm-week"].date())
    features = [Product(product_id=number, title="Parka", std={"colour": ["some colour"]}) for number in (A, B, C, D)]
    store.products.put_features(features, "test")
    monkeypatch.setattr(evaluate, "Recommender", ScriptedRecommender)
    monkeypatch.setattr(evaluate.TextEncoder, "load", lambda settings: None)
    capsys.readouterr()

    def run(*arguments):
        given = [*arguments, "--no-shown", "--database-url", settings.database_url]  # the scripted one has no release
        return exit_code(EvaluateOptions, evaluate.main, "evaluate.py", *given), capsys.readouterr().err

    return run


def test_what_another_split_judges_beside_a_product_is_not_judged_twice(judge, hm_folder, monkeypatch):
    monkeypatch.setattr(evaluate, "SAME_BESIDE", ("hm-week",))
    assert judge("hm-week", ".")[0] == 0
    rows = json.loads((hm_folder / "docs/results.json").read_text())
    assert {row["stage"] for row in rows} == {"retrieval", "reranked"}
    assert {request.kind for request in ScriptedRecommender.asked} == {"for_you"}


def test_the_script_judges_both_stages_and_the_plain_lines(judge, hm_folder):
    assert judge("hm-week", ".")[0] == 0
    asked = [
        (request.kind, request.user_id, request.product_id, request.cart, request.now, request.k)
        for request in ScriptedRecommender.asked
    ]
    cut = CUTS["hm-week"].timestamp()
    assert asked == [
        ("for_you", "c1", None, (), cut, 100), ("for_you", "c2", None, (), cut, 100),
        # c1 is the only one who took two things on one day, A and C.
        ("similar", "c1", A, (), cut, 100), ("because", "c1", A, (), cut, 100), ("basket", "c1", None, [A], cut, 100),
    ]  # fmt: skip
    rows = json.loads((hm_folder / "docs/results.json").read_text())
    found = {(row["model"], row["stage"], row["metric"], row["slice"]): (row["value"], row["n"]) for row in rows}
    # c1 took C, which nobody had before: second in both lists. c2 took D: third, then first.
    second, third = 1 / math.log2(3), 1 / math.log2(4)
    assert found["styletower", "retrieval", "ndcg@12", "all"] == (pytest.approx((second + third) / 2), 2)
    assert found["styletower", "reranked", "ndcg@12", "all"] == (pytest.approx((second + 1) / 2), 2)
    for part, n in (("all", 2), ("warm", 1), ("cold", 1)):
        assert found["styletower", "retrieval", "recall@100", part] == (1.0, n)
    # A, B and D were taken once each: without A, c1 is offered B, D, C; without B, c2 is offered A, D, C.
    assert found["popularity", "retrieval", "ndcg@12", "all"] == (pytest.approx((third + second) / 2), 2)
    assert found["popularity", "retrieval", "ndcg@12", "history 1-2"] == (pytest.approx((third + second) / 2), 2)
    # Of three shoppers one each met A, B and D, and none C; the release never offers A.
    assert found["styletower", "retrieval", "novelty@10", "all"][0] == pytest.approx(
        (2 * math.log2(2) + math.log2(4)) / 3
    )
    assert found["styletower", "retrieval", "popularity@10", "all"][0] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert found["styletower", "retrieval", "coverage@10", "all"] == (3 / 4, 2)
    assert found["popularity", "retrieval", "coverage@10", "all"] == (1.0, 2)
    assert found["popularity", "retrieval", "diversity@10", "all"][0] == pytest.approx(0.0)  # four parkas

    # Beside A, c1 took C: second in the scripted list, and last of what popularity offers, B and D first.
    for kind in ("similar", "because", "basket"):
        assert found["styletower", kind, "ndcg@12", "all"] == (pytest.approx(second), 1)
        beside = ("styletower against popularity", kind, "ndcg@12 difference", "all")
        assert found[beside] == (pytest.approx(second - third), 1)
    assert found["popularity", "beside a product", "ndcg@12", "all"] == (pytest.approx(third), 1)
    assert (hm_folder / "docs/results.md").read_text().count("### hm-week: beside a product") == 1

    found = {name: value for name, value in found.items() if name[1] in ("retrieval", "reranked")}
    against = {name: found[name] for name in found if " against " in name[0]}
    reranking = ("styletower reranked against its retrieval", "reranked")
    assert against[*reranking, "ndcg@12 difference", "all"] == (pytest.approx((1 - third) / 2), 2)
    assert against[*reranking, "ndcg@12 p", "all"] == (1.0, 2)  # one shopper whose sign does not matter
    reranked = ("styletower against popularity", "reranked")
    assert against[*reranked, "ndcg@12 difference", "all"] == (pytest.approx((1 - third) / 2), 2)
    assert against[*reranked, "recall@100 difference", "all"] == (0.0, 2)
    plain = set(evaluate.BASELINES) - {"sentence encoder"}  # the text encoder is left out here, so its line is too
    assert {name[0] for name in found} - {name[0] for name in against} == {"styletower", *plain}
    assert {name[0] for name in against if name[1] == "retrieval"} == {f"styletower against {name}" for name in plain}

    def written():
        return {file: file.read_bytes() for file in (hm_folder / "docs").rglob("*.*")}

    before = written()
    assert {file.name for file in before} == {
        "results.json",
        "results.md",
        "hm-week-recall.svg",
        "hm-week-warm-cold.svg",
    }
    assert judge("hm-week", ".")[0] == 0
    assert judge("page")[0] == 0
    assert written() == before


def test_each_shoppers_part_can_be_written_instead_without_the_oracle(judge, hm_folder, monkeypatch):
    monkeypatch.setattr(evaluate, "_oracle", lambda *_: pytest.fail("the oracle takes longer than a training"))
    assert judge("hm-week", ".", "--ceiling", "--per-shopper", "parts.npz")[0] == 0
    found = read_ratios(hm_folder / "parts.npz")
    second, third = 1 / math.log2(3), 1 / math.log2(4)
    assert found["retrieval", "ndcg@12", "all"].numerator == pytest.approx([second, third])
    assert found["reranked", "ndcg@12", "all"].numerator == pytest.approx([second, 1])
    assert found["reranked", "recall@100", "cold"].denominator.tolist() == [1, 0]
    assert found["similar", "ndcg@12", "all"].numerator == pytest.approx([second])
    assert not (hm_folder / "docs").exists()


def test_the_peers_that_are_named_are_asked_and_no_others(judge, hm_folder, monkeypatch):
    monkeypatch.setattr(evaluate, "peer_lists", lambda python, script, split, users, count, answers: [[A], [D]])
    assert judge("hm-week", ".", "--peers", "python", "--peer", "RecTools SASRec", "--peer", "implicit ALS")[0] == 0
    models = {row["model"] for row in json.loads((hm_folder / "docs/results.json").read_text())}
    assert {*models} & {*evaluate.PEER_SCRIPTS} == {"RecTools SASRec", "implicit ALS"}


def test_a_peer_that_does_not_exist_or_has_no_environment_is_said(judge, hm_folder):
    code, said = judge("hm-week", ".", "--peers", "python", "--peer", "SASRec")
    assert code == 2
    assert "there is no peer 'SASRec'; there are: implicit ALS, " in said
    assert judge("hm-week", ".", "--peer", "implicit ALS")[1].endswith("give --peers too\n")
    assert not (hm_folder / "docs").exists()


def test_the_oracle_stands_beside_and_is_taught_by_who_said_something_when_they_came(judge, hm_folder, monkeypatch):
    def events(path):
        log = [
            Event(user_id=user, product_id=product, at=CUTS["hm-week"] + timedelta(hours=hours), context=context)
            for user, product, hours, context in [
                ("c1", C, 1, ""), ("c2", D, 1, ""), ("c3", A, 2, "gym"), ("c3", B, 3, "ball"), ("c5", B, 1, ""),
            ]
        ]  # fmt: skip
        return Source(events=[event_frame(log)])

    given = []

    class ScriptedOracle:
        def __init__(self, *parts):
            given.append(parts)

        def recommend(self):
            return [[C], [D]]

        def recommend_contents(self):
            return [[D, C], [B]]

    monkeypatch.setattr(hm, "read", events)
    monkeypatch.setattr(evaluate, "Oracle", ScriptedOracle)
    assert judge("hm-week", ".", "--ceiling", "--no-baselines")[0] == 0
    ((split, cases, judged, answers, taken),) = given
    assert [(case.user_id, case.context, case.at - split.cut) for case in cases] == [
        ("c1", "", 0), ("c2", "", 0), ("c3", "gym", 7200),
    ]  # fmt: skip
    assert judged == 2
    assert answers.queries.tolist() == [[0, 0], [0, 0], [3, 3]]
    assert answers.lists == [[D, C, B]] * 3
    assert len(taken) == 5
    rows = json.loads((hm_folder / "docs/results.json").read_text())
    found = {(row["model"], row["metric"], row["slice"]): row["value"] for row in rows}
    assert found[ORACLE, "ndcg@12", "all"] == 1.0
    assert found[ORACLE_OF_CONTENTS, "recall@100", "all"] == 0.5
    assert (f"styletower against {ORACLE}", "ndcg@12 difference", "all") in found
    assert "The oracle is told what no system can know" in (hm_folder / "docs/results.md").read_text()


def test_a_limited_run_writes_nothing(judge, hm_folder):
    assert judge("hm-week", ".", "--limit", "1")[0] == 0
    asked = [(request.kind, request.user_id) for request in ScriptedRecommender.asked]
    assert asked == [("for_you", "c1"), ("similar", "c1"), ("because", "c1"), ("basket", "c1")]
    assert not (hm_folder / "docs").exists()


def test_without_categories_no_basket_is_judged(judge, hm_folder):
    assert judge("hm-week", ".", "--list-category-field", "kind of garment")[0] == 0
    kinds = {request.kind for request in ScriptedRecommender.asked}
    assert kinds == {"for_you", "similar", "because"}


def test_a_database_that_holds_the_answers_is_refused(judge, store, hm_folder):
    store.events.put([Event(user_id="c1", product_id=C, at=CUTS["hm-week"], kind="purchase")])
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
