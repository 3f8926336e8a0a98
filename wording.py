"""What reasons say, in words that a page can show: English and Korean.

Which reason is given, and how much it weighs, is the model's to say (explain.py); here it only gets its words.
"""

from __future__ import annotations

import json
import re
import unicodedata
from functools import cache
from pathlib import Path

LEXICON = Path(__file__).parent / "lexicon.json"

_HANGUL = re.compile("[가-힣]")
_FIRST_SYLLABLE, _LAST_SYLLABLE, _FINALS = 0xAC00, 0xD7A3, 28
# Digits as they are read: 영 일 이 삼 사 오 육 칠 팔 구. A number that ends in 0 is read 십, 백, 천, 만: all end in a consonant.
_DIGITS_WITH_FINAL = frozenset("013678")

# Figures of a body: the name in English, in Korean. Others are called what the shop calls them.
_FIGURES = {
    "height": ("height", "키"), "weight": ("weight", "몸무게"), "age": ("age", "나이"), "bust": ("bust", "가슴둘레"),
    "chest": ("chest", "가슴둘레"), "waist": ("waist", "허리둘레"), "hip": ("hips", "엉덩이둘레"), "hips": ("hips", "엉덩이둘레"),
    "shoulder": ("shoulders", "어깨너비"), "foot": ("foot length", "발 길이"), "size": ("size", "사이즈"), "bmi": ("BMI", "BMI"),
}  # fmt: skip
_UNITS = ("cm", "kg", "mm", "lb", "lbs", "inch", "in")

# What a shopper did with a product: in English, and in Korean after the object.
_DEEDS = {
    "view": ("looked at", "보셨어요"), "click": ("looked at", "보셨어요"), "cart": ("put into the cart", "장바구니에 담으셨어요"),
    "purchase": ("bought", "구매하셨어요"), "skip": ("passed over", "넘기셨어요"),
}  # fmt: skip
_OTHER_DEED = ("showed interest in", "눈여겨보셨어요")
_NO_INTEREST = ("came across", "접하셨어요")

MAX_CONTEXT = 60  # characters of a context that a reason repeats

Text = dict[str, str]  # by language: "en", "ko"


def particle(word: str, pair: str) -> str:
    """The particle that fits after `word`: of `pair` "을/를" (the form after a final consonant, then that after a vowel).

    Judged by the last letter or digit, signs and brackets aside. How a Latin word is spoken in Korean cannot be told from its
    letters: after one, and after anything else, both stand: "을(를)".
    """
    closed, open_ = pair.split("/")
    letters = [letter for letter in unicodedata.normalize("NFC", word) if unicodedata.category(letter)[0] in "LN"]
    last = letters[-1] if letters else ""
    if last and _FIRST_SYLLABLE <= ord(last) <= _LAST_SYLLABLE:
        return closed if (ord(last) - _FIRST_SYLLABLE) % _FINALS else open_
    if last.isascii() and last.isdigit():
        return closed if last in _DIGITS_WITH_FINAL else open_
    return f"{closed}({open_})"


def with_particle(word: str, pair: str) -> str:
    return word + particle(word, pair)


@cache
def _korean() -> tuple[dict[str, str], dict[tuple[str, str], str]]:
    """The shop's own Korean words, from its lexicon: of fields, and of (field, value), where it has one."""
    fields = json.loads(LEXICON.read_bytes())["fields"] if LEXICON.exists() else {}

    def first(spellings: list[str]) -> str | None:
        return next((spelling.strip("=*") for spelling in spellings if _HANGUL.search(spelling)), None)

    names = {name: word for name, field in fields.items() if (word := first(field["names"]))}
    values = {
        (name, value.replace("-", " ").casefold()): word
        for name, field in fields.items()
        for value, spellings in field["values"].items()
        if (word := first(spellings))
    }
    return names, values


def said(field: str, value: str) -> tuple[str, str, str, str]:
    """A feature in words: field and value in English, field and value in Korean. `value` in the vocabulary's spelling."""
    names, values = _korean()
    plain = field.replace("_", " ")
    return plain, value, names.get(field, plain), values.get((field, value), value)


def of_history(title: str, deed: str, interest: bool = True) -> Text:
    """`deed`: a kind of event, a shop's own too. `interest`: whether the shop takes it for a sign of any; what the known kinds are
    called is true either way."""
    english, korean = _DEEDS.get(deed, _OTHER_DEED if interest else _NO_INTEREST)
    return {
        "en": f"Because you {english} “{title}”",
        "ko": f"‘{title}’{particle(title, '을/를')} {korean}",
    }


def of_anchor(title: str) -> Text:
    return {"en": f"Because you looked at “{title}”", "ko": f"‘{title}’{particle(title, '을/를')} 보셨어요"}


def taken_together(title: str) -> Text:
    return {"en": f"Often taken together with “{title}”", "ko": f"‘{title}’{particle(title, '과/와')} 함께 많이 찾아요"}


def of_variant(title: str) -> Text:
    return {"en": f"Another version of “{title}”", "ko": f"‘{title}’의 다른 색상이나 사이즈예요"}


def of_likeness(title: str) -> Text:
    return {"en": f"Similar to “{title}”", "ko": f"‘{title}’{particle(title, '과/와')} 비슷해요"}


def of_context(context: str, field: str, value: str) -> Text:
    """`field` and `value` are what of the item the context names, empty if nothing."""
    short = context if len(context) <= MAX_CONTEXT else context[: MAX_CONTEXT - 1].rstrip() + "…"
    if not field:
        return {"en": f"For “{short}”", "ko": f"‘{short}’에 어울려요"}
    name, english, korean_name, korean = said(field, value)
    return {
        "en": f"For “{short}” ({name}: {english})",
        "ko": f"‘{short}’에 어울려요 ({korean_name}: {korean})",
    }


def of_figure(field: str, value: float) -> Text:
    """Of a figure of the profile, as `height_cm`."""
    name, _, unit = field.rpartition("_")
    if unit not in _UNITS or not name:
        name, unit = field, ""
    english, korean = _FIGURES.get(name, (name.replace("_", " "),) * 2)
    figure = f"{value:g} {unit}".strip()
    return {"en": f"Fits your {english} ({figure})", "ko": f"고객님의 {korean}({figure})에 잘 맞아요"}


def of_attribute(field: str, value: str, often: bool) -> Text:
    """`often`: the shopper's history has it again and again."""
    name, english, korean_name, korean = said(field, value)
    if often:
        return {
            "en": f"You often choose {name}: {english}",
            "ko": f"{korean_name} ‘{korean}’{particle(korean, '을/를')} 자주 고르셨어요",
        }
    return {
        "en": f"Its {name}: {english}",
        "ko": f"{with_particle(korean_name, '은/는')} ‘{korean}’{particle(korean, '이에요/예요')}",
    }


def of_purchases(times: int, days_ago: int) -> Text:
    often = "once" if times == 1 else f"{times} times"
    ago, korean_ago = ("today", "오늘") if days_ago == 0 else (f"{days_ago} days ago", f"{days_ago}일 전")
    if days_ago == 1:
        ago, korean_ago = "yesterday", "어제"
    return {
        "en": f"You bought it {often}, last {ago}",
        "ko": f"{times}번 구매하셨고, 마지막 구매는 {korean_ago}{'예요' if days_ago == 1 else '이에요'}",
    }


GENERAL: dict[str, Text] = {
    "popular": {"en": "Popular now", "ko": "지금 인기 있는 상품이에요"},
    "similar_shoppers": {"en": "Shoppers like you chose it", "ko": "비슷한 고객들이 고른 상품이에요"},
    "trending": {"en": "Trending now", "ko": "요즘 뜨는 상품이에요"},
    "match": {"en": "A good match for you", "ko": "고객님께 잘 맞는 상품이에요"},
}
