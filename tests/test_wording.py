"""The words of reasons: Korean particles follow the last sound, and every text is there in both languages."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

import wording

SYLLABLES = st.integers(0xAC00, 0xD7A3).map(chr)
# What may stand after the last syllable without being spoken.
SIGNS = st.text(st.sampled_from("'\"’”)]}.,!?… "), max_size=4)
PAIRS = st.sampled_from(["은/는", "이/가", "을/를", "과/와"])


@given(st.text(max_size=8), SYLLABLES, SIGNS, PAIRS)
def test_a_particle_follows_the_final_consonant_of_the_last_syllable(before, syllable, signs, pair):
    """Unicode takes a syllable apart into two jamo without a final consonant, into three with one."""
    final = len(unicodedata.normalize("NFD", syllable)) == 3
    closed, open_ = pair.split("/")
    for spelling in ("NFC", "NFD"):  # some systems write syllables taken apart
        word = unicodedata.normalize(spelling, before + syllable) + signs
        assert wording.particle(word, pair) == (closed if final else open_)


@given(st.text(max_size=20), PAIRS)
def test_a_particle_is_one_of_the_pair_or_both_whatever_the_word(word, pair):
    closed, open_ = pair.split("/")
    assert wording.particle(word, pair) in {closed, open_, f"{closed}({open_})"}


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("원피스", "원피스를"), ("청바지", "청바지를"), ("가디건", "가디건을"), ("‘셔츠’", "‘셔츠’를"),
        ("니트 (블랙)", "니트 (블랙)을"),
        ("501", "501을"), ("2", "2를"), ("10", "10을"), ("dress", "dress을(를)"), ("", "을(를)"),
    ],
)  # fmt: skip
def test_particles_of_words_numbers_and_latin(word, said):
    assert wording.with_particle(word, "을/를") == said


def test_features_are_said_in_the_words_of_the_lexicon():
    assert wording.said("category", "dress")[2:] == ("카테고리", "원피스")
    assert wording.said("fabric_weight", "zigzagcore") == ("fabric weight", "zigzagcore", "fabric weight", "zigzagcore")
    assert wording.of_attribute("category", "dress", often=True)["ko"] == "카테고리 ‘원피스’를 자주 고르셨어요"
    assert wording.of_attribute("category", "dress", often=False) == {
        "en": "Its category: dress", "ko": "카테고리는 ‘원피스’예요",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("figure", "english", "korean"),
    [("height_cm", "height (165.5 cm)", "키(165.5 cm)"), ("arm_span", "arm span (165.5)", "arm span(165.5)")],
)
def test_figures_have_their_names_and_units(figure, english, korean):
    text = wording.of_figure(figure, 165.5)
    assert english in text["en"]
    assert korean in text["ko"]


def test_deeds_and_purchases():
    assert wording.of_history("린넨 셔츠", "purchase") == {
        "en": "Because you bought “린넨 셔츠”", "ko": "‘린넨 셔츠’를 구매하셨어요",
    }  # fmt: skip
    assert "showed interest in" in wording.of_history("x", "wishlist")["en"]
    assert wording.of_purchases(1, 0) == {
        "en": "You bought it once, last today",
        "ko": "1번 구매하셨고, 마지막 구매는 오늘이에요",
    }
    assert wording.of_purchases(3, 1)["ko"].endswith("어제예요")
    assert wording.of_purchases(3, 34)["en"] == "You bought it 3 times, last 34 days ago"


def test_a_long_context_is_cut():
    text = wording.of_context("a very long occasion " * 20, "", "")
    assert max(map(len, text.values())) < wording.MAX_CONTEXT + 20
