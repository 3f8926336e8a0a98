"""The plain lines on five items whose order is known by hand, and against the textbook forms of their formulas."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import baselines
from baselines import (
    BASELINES,
    EASE_REGULARISATION,
    Case,
    Score,
    Split,
    best_window,
    content,
    content_vectors,
    ease,
    item_knn,
    peer_lists,
    popularity,
    sentences,
)
from catalog import Product
from evaluate import _baseline_lists
from settings import UserError
from store import EventLog
from tensors import DAY, Histories

CUT = 200  # days
NOTHING = np.zeros(0, dtype=np.int64)

Events = list[tuple[str, str, float]]  # shopper, item, day


def split_of(events: Events, products: list[Product]) -> Split:
    users, ids = sorted({user for user, _, _ in events}), [product.product_id for product in products]
    log = EventLog(
        users, ids, ["purchase"], [""],
        user=np.array([users.index(user) for user, _, _ in events], dtype=np.int32),
        product=np.array([ids.index(item) for _, item, _ in events], dtype=np.int32),
        kind=np.zeros(len(events), dtype=np.int8), at=np.array([day * DAY for _, _, day in events]),
        context=np.zeros(len(events), dtype=np.int32),
    )  # fmt: skip
    return Split(ids, products, Histories.build(log, ids), CUT * DAY)


def order(name: str, split: Split, user_id: str) -> str:
    """Items in the order in which this line offers them, as one word."""
    return "".join(offered(BASELINES[name], split, user_id))


def offered(line: Callable[[Split], Score | None], split: Split, user_id: str) -> list[str]:
    score = line(split)
    assert score is not None
    (found,) = _baseline_lists(split, [Case(user_id, "", 0.0, [])], score)
    return found


@pytest.fixture(scope="module")
def five() -> Split:
    """A and B are red dresses, C and D blue coats; nobody ever took E, a hat in no colour."""
    products = [
        Product(product_id="A", title="linen dress", std={"colour": ["red"]}),
        Product(product_id="B", title="linen dress", std={"colour": ["red"]}, re={"style": ["party"]}),
        Product(product_id="C", title="wool coat", std={"colour": ["blue"]}),
        Product(product_id="D", title="wool coat", std={"colour": ["blue"]}, re={"style": ["party"]}),
        Product(product_id="E", title="hat"),
    ]
    events: Events = [
        ("u1", "A", 10), ("u1", "B", 20), ("u1", "C", 150),
        ("u2", "A", 10), ("u2", "C", 190),
        ("u3", "B", 20), ("u3", "C", 30), ("u3", "C", 195),  # taking C again says nothing new about C
        ("u4", "D", 199),
        ("u5", "A", 5),
    ]  # fmt: skip
    return split_of(events, products)


@pytest.mark.parametrize(
    ("name", "stranger"),
    [
        ("popularity", "ACBDE"),  # 3, 3, 2, 1, 0
        ("item-kNN (cosine)", "ACBDE"),  # no neighbours: popularity
        ("EASE", "ABCDE"),  # nothing to say: product order
        ("content", "ABCDE"),
        ("content + log popularity", "ACBDE"),
    ],
)
def test_the_order_for_a_shopper_without_a_history(five, name, stranger):
    assert order(name, five, "stranger") == stranger


@pytest.mark.parametrize(
    ("days", "stranger"),
    [
        (90.0, "CDABE"),  # 2, 1, and the rest by what they ever were
        (180.0, "CBDAE"),  # 3, 2, 1, 0, 0
    ],
)
def test_popularity_in_a_window(five, days, stranger):
    found = offered(partial(popularity, days), five, "stranger")
    assert "".join(found) == stranger


@pytest.mark.parametrize(
    ("name", "offered"),
    [
        ("popularity", "CBDE"),  # never A, which they have
        ("item-kNN (cosine)", "CBDE"),  # C: 2 of 3 and 3 met it with A; B: 1 of 3 and 2
        ("EASE", "CBDE"),
        ("content", "BCDE"),  # the other red dress; the rest shares no word with it
        ("content + log popularity", "BCDE"),
    ],
)
def test_the_order_for_a_shopper_who_took_the_red_dress(five, name, offered):
    assert order(name, five, "u5") == offered


def test_the_window_is_the_one_that_foretold_the_newest_tenth_of_training():
    """A was all the fashion, B is since ten days, C only in the last two; then ten shoppers take `then`."""
    early = [("A", 20.0)] * 30 + [("B", 182.0)] * 20 + [("C", 189.5)] * 10 + [("B", 189.5)] * 9
    products = [Product(product_id=product_id, title="x") for product_id in "ABCD"]

    def window(then: str) -> float | None:
        taken = [*early, *[(then, 190.0)] * 10]
        return best_window(
            split_of([(f"u{n:03}", item, day) for n, (item, day) in enumerate(taken)], products), count=1
        )

    assert window("A") is None  # a year would do as well: of equals the longest
    assert window("B") == 90.0  # 180 days reach back to A's
    assert window("C") == 7.0
    assert window("D") is None  # nothing foretold it


class Vectors:
    """A text encoder of three texts."""

    def cached_pooled(self, texts: list[str]) -> np.ndarray:
        known = {"dress": [1.0, 0.0], "gown party": [0.8, 0.6], "coat": [0.0, 1.0]}
        return np.array([known[text] for text in texts], dtype=np.float32)


def test_sentences_are_compared_with_the_mean_of_the_history():
    products = [
        Product(product_id="A", title="dress"), Product(product_id="B", title="coat"),
        Product(product_id="C", title="gown", re={"style": ["party"]}), Product(product_id="D", title="dress"),
    ]  # fmt: skip
    split = split_of([("u", "A", 1), ("u", "B", 1), ("v", "A", 1)], products)
    assert sentences(split) is None  # no encoder
    score = sentences(replace(split, text_encoder=Vectors()))
    np.testing.assert_allclose(score(np.array([0, 1])), [0.5, 0.5, 0.7, 0.5], atol=1e-6)
    np.testing.assert_allclose(score(np.array([0])), [1.0, 0.0, 0.8, 1.0], atol=1e-6)
    assert score(NOTHING).tolist() == [0.0] * 4


def test_sentences_are_left_out_where_all_products_read_the_same():
    products = [Product(product_id=f"{item:03}", title="dress") for item in range(200)]
    split = split_of([("u", "000", 1)], products)
    assert sentences(replace(split, text_encoder=Vectors())) is None


@pytest.fixture(scope="module")
def random_split() -> tuple[Split, np.ndarray]:
    """Thirty shoppers and twelve items at random, and who met what as a dense matrix."""
    random = np.random.default_rng(0)
    met = random.random((30, 12)) < 0.3
    met[0, :3], met[:, 11] = [True, True, False], False
    products = [Product(product_id=f"{item:02}", title="x") for item in range(12)]
    events = [(f"{user:02}", f"{item:02}", float(random.integers(CUT))) for user, item in np.argwhere(met)]
    return split_of(events + events[:20], products), met.astype(float)


def test_item_knn_is_the_cosine_of_columns(random_split):
    split, met = random_split
    lengths = np.maximum(np.linalg.norm(met, axis=0), 1.0)
    cosine = (met / lengths).T @ (met / lengths)
    np.fill_diagonal(cosine, 0.0)
    score = item_knn(split)
    for user, row in enumerate(met):
        np.testing.assert_allclose(score(split.items_of(f"{user:02}")), row @ cosine + 1e-6 * met.sum(0), atol=1e-12)


def test_ease_is_a_ridge_regression_of_each_item_on_the_others(random_split):
    split, met = random_split
    weights = np.zeros((12, 12))
    for item in range(12):
        others = np.delete(np.arange(12), item)
        gram = met[:, others].T @ met[:, others] + EASE_REGULARISATION * np.eye(11)
        weights[others, item] = np.linalg.solve(gram, met[:, others].T @ met[:, item])
    score = ease(split)
    for user, row in enumerate(met):
        np.testing.assert_allclose(score(split.items_of(f"{user:02}")), row @ weights, atol=1e-12)


def test_ease_is_left_out_where_its_matrix_would_not_fit(five, monkeypatch):
    monkeypatch.setattr(baselines, "EASE_MOST_ITEMS", 4)
    assert ease(five) is None


def test_content_is_left_out_where_products_hardly_differ_on_paper():
    products = [Product(product_id=str(item), title="gown", std={"category": ["gown"]}) for item in range(200)]
    assert content(0.0, split_of([("u1", "0", 1)], products)) is None


def test_content_vectors_are_alike_where_products_are(five):
    cosine = (content_vectors(five.products) @ content_vectors(five.products).T).toarray()
    # Nothing is known of the hat: no word of it is on two products.
    np.testing.assert_allclose(np.diag(cosine), [1, 1, 1, 1, 0])
    assert 0.5 < cosine[0, 1] < 1.0  # the same dress, but for "party"
    assert 0.0 < cosine[1, 3] < cosine[0, 1]  # which is all that the second coat shares with it
    assert cosine[0, 2] == 0.0
    silent = [Product(product_id=str(number), title="") for number in range(3)]
    assert content_vectors(silent).nnz == 0


def test_other_colours_of_what_was_taken_come_first_by_their_group():
    """The dress and the coat share no word; only the group says that p2 is p0 in another colour."""
    titles = ["red dress", "blue dress", "green coat", "grey coat"]
    products = [Product(product_id=f"p{n}", title=title) for n, title in enumerate(titles * 2)]
    split = split_of([("u", "p0", 1)], products)
    with_groups = replace(split, groups=["g", None, "g", None, None, None, None, None])
    name = "content + log popularity + group"
    assert BASELINES[name](split) is None
    score = BASELINES[name](with_groups)(np.array([0]))
    assert score[2] > 0.1 > score[3] == 0
    assert score[4] > score[2]  # the same words say more


PEER = """
import sys
import numpy as np
from benchmarks.peers.tuning import Question  # importable from wherever the script lies
question = np.load(sys.argv[1])
assert sys.argv[3:] == ["last"]
assert Question.read(sys.argv[1]).at.tolist() == sorted(question["at"])
# Red of A and B, blue of C and D: E has nothing.
assert sorted(zip(question["attribute_item"], question["attribute"])) == [(0, 1), (1, 1), (2, 0), (3, 0)]
met = np.zeros(question["shape"], dtype=bool)
met[question["user"], question["item"]] = True
order = np.argsort(met[question["judged"]], axis=1, kind="stable")  # what was not met, in product order
left = (~met[question["judged"]]).sum(1, keepdims=True)
lists = np.where(np.arange(order.shape[1]) < left, order, -1)[:, : int(question["count"])]
np.savez(sys.argv[2], lists=lists)
"""


def test_a_library_in_its_own_environment_is_told_and_answers_by_files(five, tmp_path):
    script = tmp_path / "peer.py"
    script.write_text(PEER)
    python, answers = Path(sys.executable), tmp_path / "answers"
    assert peer_lists(python, (script, "last"), five, ["u4", "u1"], 4, answers) == [["A", "B", "C", "E"], ["D", "E"]]
    assert peer_lists(python, (script, "last"), five, ["u4", "stranger"], 4, answers) is None


def test_a_library_is_asked_again_only_if_question_or_script_changed(five, tmp_path):
    script, answers = tmp_path / "peer.py", tmp_path / "answers"
    script.write_text(PEER)
    nowhere = tmp_path / "python"  # whoever asks again fails
    first = peer_lists(Path(sys.executable), (script, "last"), five, ["u4"], 4, answers)
    assert peer_lists(nowhere, (script, "last"), five, ["u4"], 4, answers) == first
    for users, count in ((["u1"], 4), (["u4"], 3)):
        with pytest.raises(UserError, match="did not run"):
            peer_lists(nowhere, (script, "last"), five, users, count, answers)
    script.write_text(PEER + "# tuned otherwise")
    with pytest.raises(UserError, match="did not run"):
        peer_lists(nowhere, (script, "last"), five, ["u4"], 4, answers)
    assert len(list(answers.iterdir())) == 1


def test_a_library_that_is_stopped_and_asked_again_finds_what_it_left_beside_its_answer(five, tmp_path):
    script, answers = tmp_path / "peer.py", tmp_path / "answers"
    script.write_text(
        """
import pathlib, sys
tried = pathlib.Path(sys.argv[2]).with_suffix(".trials.json")
if not tried.exists():
    tried.touch()
    raise SystemExit(3)
tried.unlink()
"""
        + PEER
    )
    with pytest.raises(UserError, match="did not run"):
        peer_lists(Path(sys.executable), (script, "last"), five, ["u4"], 4, answers)
    assert peer_lists(Path(sys.executable), (script, "last"), five, ["u4"], 4, answers) == [["A", "B", "C", "E"]]
    assert len(list(answers.iterdir())) == 1


def test_a_library_that_fails_is_named_with_what_to_do(five, tmp_path):
    script = tmp_path / "peer.py"
    script.write_text("raise SystemExit(3)")
    with pytest.raises(UserError, match=r"peer\.py did not run.*status 3.*requirements\.txt"):
        peer_lists(Path(sys.executable), (script,), five, ["u1"], 4, tmp_path / "answers")
    with pytest.raises(UserError, match=r"did not run.*No such file"):
        peer_lists(tmp_path / "python", (script,), five, ["u1"], 4, tmp_path / "answers")
    assert list((tmp_path / "answers").iterdir()) == []


def test_ties_at_the_end_of_a_long_list_go_by_product_order():
    """Of 130 items three sold; the other 97 places go to the first of the 126 that tie and were not met."""
    products = [Product(product_id=f"{item:03}", title="x") for item in range(130)]
    split = split_of([("u1", "120", 1), ("u2", "120", 1), ("u1", "125", 1), ("u2", "007", 1)], products)
    found = offered(BASELINES["popularity"], split, "u2")
    assert found == ["125", *(f"{item:03}" for item in range(100) if item != 7)]
    found = offered(BASELINES["popularity"], split, "stranger")
    assert found == ["120", "007", "125", *(f"{item:03}" for item in range(98) if item != 7)]


def test_beside_a_product_a_plain_line_is_asked_about_it_alone_and_offers_neither_it_nor_what_was_met(five):
    """u1 met A, B and C; beside D, the other blue coat comes first for anybody who has not met it."""
    score = BASELINES["content"](five)
    asked = [Case(user_id, "", 0.0, [], about="D") for user_id in ("stranger", "u1")]
    stranger, u1 = _baseline_lists(five, asked, score)
    assert stranger[0] == "C"
    assert sorted(stranger) == ["A", "B", "C", "E"]
    assert u1 == ["E"]
