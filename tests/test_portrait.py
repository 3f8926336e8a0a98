"""What is shown of a release, on items and requests whose right answer is plain."""

from __future__ import annotations

import json

import numpy as np
import pytest

import portrait
from catalog import Product
from portrait import (
    EACH,
    Shown,
    described,
    examples,
    item_map,
    learning_curves,
    read_curves,
    save_curves,
    save_examples,
    write_examples_page,
)


@pytest.fixture
def docs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "docs"


def product(number: int, title: str = "", **std: list[str]) -> Product:
    return Product(product_id=f"p{number}", title=title or f"thing {number}", std=std)


# --- map


def test_the_map_shows_the_two_directions_in_which_items_differ_most():
    """Items lie on a line of length 2 in one direction, of 1 in another, and do not differ in the third."""
    places = np.array([[2.0, 0.0, 5.0], [-2.0, 0.0, 5.0], [0.0, 1.0, 5.0], [0.0, -1.0, 5.0]], dtype=np.float32)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    found = item_map(places @ turn, [product(number, category=[f"kind {number // 2}"]) for number in range(4)])
    assert found["items"] == 4
    assert found["shares"] == pytest.approx([0.8, 0.2], abs=1e-3)
    first, second = np.abs([point[:2] for point in found["points"]]).T
    np.testing.assert_allclose(first, [2, 2, 0, 0], atol=1e-3)
    np.testing.assert_allclose(second, [0, 0, 1, 1], atol=1e-3)
    assert [point[2] for point in found["points"]] == ["kind 0", "kind 0", "kind 1", "kind 1"]


def test_a_large_catalogue_is_drawn_in_part_but_measured_whole(monkeypatch):
    monkeypatch.setattr(portrait, "MAPPED", 7)
    vectors = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    products = [product(number, attribute=[f"{number}"]) for number in range(50)]
    found = item_map(vectors, products)
    assert len({point[2] for point in found["points"]}) == 7
    assert found["items"] == 50
    assert found == item_map(vectors, products)


# --- examples


def test_the_best_and_the_worst_of_the_drawn_are_shown(monkeypatch):
    monkeypatch.setattr(portrait, "DRAWN_FROM", 40)
    products = [product(number) for number in range(30)]
    requests = [
        Shown(f"asked {number}", [], [["p0"], ["p1"], ["p9"]][number % 3], ["p0", "p1", "p2"]) for number in range(60)
    ]
    found = examples(requests, products, 10, whole_titles=True)
    drawn = np.random.default_rng(portrait.SEED).permutation(60)[:40]
    assert [example.context for example in found["best"]] == [f"asked {row}" for row in drawn if row % 3 == 0][:EACH]
    assert [example.context for example in found["worst"]] == [f"asked {row}" for row in drawn if row % 3 == 2][:EACH]
    assert {example.ndcg for example in found["best"]} == {1.0}
    assert {example.ndcg for example in found["worst"]} == {0.0}


def test_an_example_says_what_was_met_offered_and_taken():
    products = [product(number) for number in range(40)]
    ids = [own.product_id for own in products]
    request = Shown("a wedding", ids[28:40], ["p1", "p20", "p28", "gone"], ids[:25])
    other = Shown("", [], ["p30"], ids[:25])
    found = examples([request, other], products, 10, whole_titles=True)
    (best,) = found["best"]
    assert best.recommended == [f"thing {number}" for number in range(10)]
    assert best.history == [f"thing {number}" for number in range(28, 38)]
    assert best.history_length == 12
    assert (best.taken_places, best.places) == ([2], [2, 21, None, None])
    assert best.taken == ["thing 1", "thing 20", "thing 28", "(not in the catalogue)"]
    ideal = 1 + 1 / np.log2(3) + 1 / 2 + 1 / np.log2(5)
    assert best.ndcg == pytest.approx(1 / np.log2(3) / ideal, abs=1e-4)
    (worst,) = found["worst"]
    assert (worst.ndcg, worst.history_length) == (0.0, 0)


def test_other_peoples_titles_are_cut_and_what_they_leave_unsaid_is_added():
    long = product(1, "A very long title of a dress that goes on and on", category=["Dress"], colour=["Red"])
    assert described(long, whole_title=False) == "A very long title of a dress that goes… (Red)"
    assert described(long, whole_title=True) == f"{long.title} (Red)"
    assert described(product(2, "gown", category=["gown"]), whole_title=False) == "gown"


def test_the_page_of_examples_is_made_from_the_saved_alone(docs):
    assert not write_examples_page()
    assert not docs.exists()
    requests = [
        Shown("", [], ["p3"], ["p0", "p1"]),
        Shown("a gala", ["p2"], ["p1"], ["p0", "p1"]),
    ]
    products = [product(0, "a | b"), *map(product, range(1, 4))]
    save_examples("rtr-warm", "styletower", examples(requests, products, 10, whole_titles=False))
    assert write_examples_page()
    page = (docs / "examples.md").read_text()
    assert page.split("### ")[1] == (
        "rtr-warm: best 1, NDCG 0.631\n\nAsked for: a gala\n\nMet before, the latest first: thing 2.\n\n"
        "| place | recommended | taken |\n|---|---|---|\n| 1 | a \\| b |  |\n| 2 | thing 1 | **yes** |\n\n"
        "What was taken: thing 1 (place 2).\n\n"
    )
    assert page.endswith("What was taken: thing 3 (not in the list).\n")
    assert "Met before, the latest first: nothing." in page


# --- curves


def report(metric: str, values: list[float]) -> dict:
    history = [
        {"epoch": float(n), "step": 2.0 * n, metric: value, "other": 1.0, **({"loss": 9.0 - n} if n else {})}
        for n, value in enumerate(values)
    ]
    return {"report": {"metric": metric, "best_epoch": 1, "history": history}}


def test_curves_hold_loss_and_figure_by_epoch_and_a_model_replaces_its_own(docs):
    manifest = {"item_tower": report("-nt_xent", [-5.0, -1.0]), "user_tower": report("recall@100", [0.1, 0.3, 0.2])}
    manifest["reranker"] = {"lists": 0}  # there was nothing to learn from
    curves = learning_curves(manifest, ["item_tower", "user_tower", "reranker"])
    assert len(curves) == 2
    assert curves[1] == {
        "part": "user_tower", "metric": "recall@100", "best_epoch": 1,
        "points": [[0, None, 0.1], [1, 8.0, 0.3], [2, 7.0, 0.2]],
    }  # fmt: skip
    save_curves(["rtr-warm", "rtr-cold"], "styletower", curves)
    save_curves(["rtr-warm"], "another", curves[:1])
    save_curves(["rtr-cold"], "styletower", curves[:1])
    found = [(curve["split"], curve["model"], curve["part"]) for curve in read_curves()]
    assert found == [
        ("rtr-cold", "styletower", "item_tower"), ("rtr-warm", "another", "item_tower"),
        ("rtr-warm", "styletower", "item_tower"), ("rtr-warm", "styletower", "user_tower"),
    ]  # fmt: skip
    assert json.loads((docs / "curves.json").read_text()) == read_curves()
