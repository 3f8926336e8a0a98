"""How a seller of the sample shop lists an item: title, description and attributes, in Korean or English.

Between them they state every RE value, and nearly every STD value, of the item; each part alone has gaps, spellings and
shortcuts, as real listings do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from datasets.sample_shop_words import ATTRIBUTE_NAMES, RE_FIELDS, UNLISTED, WORDS

Features = dict[str, list[str]]  # field -> canonical values, STD and RE together

_UNLISTED_SHARE = 0.3  # how often a value that has a word outside the lexicon is called by it
_MIXED_SHARE = 0.04  # how often an English word slips into a Korean listing
_REPEATED_SHARE = 0.25  # how often a description repeats what title or attributes said
# How often a seller fills in an attribute.
_FILLED = {
    "category": 0.6, "gender": 0.75, "brand": 0.85, "colour": 0.85, "season": 0.6, "price_band": 0.35, "pattern": 0.45,
    "material": 0.7, "fit": 0.5, "style": 0.35, "detail": 0.25, "function": 0.25, "occasion": 0.3, "neckline": 0.4,
    "mood": 0.1,
}  # fmt: skip
# How often a title names what the attributes name already; brand, gender and colour are named more if they do not.
_TITLED = {"style": 0.12, "fit": 0.6, "neckline": 0.15, "detail": 0.2, "material": 0.6}
_EDITIONS = {
    "spring": ("Spring Edition", "스프링 에디션"),
    "summer": ("Summer Edition", "썸머 에디션"),
    "autumn": ("Fall Collection", "가을 신상"),
    "winter": ("Winter Collection", "윈터 컬렉션"),
}
_OPENINGS = ("매일 손이 가는", "이번 시즌 새로 나온", "재구매가 많은", "하나쯤 있으면 좋은", "공들여 만든")


@dataclass(frozen=True)
class Listing:
    title: str
    description: str
    attributes: dict[str, list[str]]


def write_listing(rng: np.random.Generator, features: Features, korean: bool) -> Listing:
    """A listing of the item in one language, with slips into the other."""
    writer = _Writer(rng, features, korean)
    attributes = writer.attributes()
    title = writer.title()
    return Listing(title, writer.description(), attributes)


@dataclass
class _Writer:
    rng: np.random.Generator
    features: Features
    korean: bool
    stated: set[tuple[str, str]] = field(default_factory=set)

    def _chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def _pick(self, choices: Sequence[str]) -> str:
        return choices[int(self.rng.integers(len(choices)))]

    def _word(self, name: str, value: str, korean: bool) -> str:
        """One spelling of a value: mostly the usual one, now and then one that no lexicon lists."""
        self.stated.add((name, value))
        rare = UNLISTED.get(name, {}).get(value)
        if rare and self._chance(_UNLISTED_SHARE):
            return rare[korean][0]
        spellings = WORDS[name][value][korean]
        return spellings[0] if self._chance(0.7) else self._pick(spellings)

    def _words(self, name: str, values: Sequence[str]) -> list[str]:
        return [self._word(name, value, self.korean and not self._chance(_MIXED_SHARE)) for value in values]

    def _unstated(self, name: str) -> list[str]:
        return [value for value in self.features[name] if (name, value) not in self.stated]

    def _title_words(self, name: str, stated: float, unstated: float) -> list[str]:
        """At most one word, with a chance that depends on whether the attributes have said it."""
        values = self._unstated(name)
        return self._words(name, self.features[name][:1]) if self._chance(unstated if values else stated) else []

    def _body_words(self, name: str) -> list[str]:
        """Words for what nothing has stated yet, and now and then for all values of the field."""
        return self._words(name, self.features[name] if self._chance(_REPEATED_SHARE) else self._unstated(name))

    def attributes(self) -> dict[str, list[str]]:
        filled = {}
        for name, share in _FILLED.items():
            values = self.features[name]
            if not values or not self._chance(share):
                continue
            korean = self.korean if self._chance(0.8) else not self.korean
            typed = [self._typed(self._word(name, value, korean)) for value in values]
            filled[self._pick(ATTRIBUTE_NAMES[name][self.korean])] = [", ".join(typed)] if self._chance(0.4) else typed
        return filled

    def _typed(self, word: str) -> str:
        """A word as typed into a form: any case, now and then a stray space."""
        roll = self.rng.random()
        word = word if roll < 0.6 else _capitals(word) if roll < 0.85 else word.upper()
        return word + " " if self._chance(0.02) else word

    def title(self) -> str:
        brand = self._title_words("brand", 0.35, 0.97)
        gender = self._title_words("gender", 0.45, 0.95)
        describing = [word for name, share in _TITLED.items() for word in self._title_words(name, share, share)]
        if self.features["pattern"] != ["solid"]:
            describing += self._title_words("pattern", 0.8, 1.0)
        noun = self._words("category", self.features["category"])
        colour = self._title_words("colour", 0.5, 1.0)
        season = self.features["season"]
        edition = _EDITIONS[season[0]][self.korean] if len(season) < 4 and self._chance(0.15) else ""
        if self.korean:
            ending = self._pick(("{}", "({})", "[{}]", "- {}")).format(colour[0]) if colour else ""
            lead = [self._pick(("{}", "[{}]", "[{}]")).format(brand[0])] if brand else []
            return " ".join([*lead, *gender, *describing, *noun, *([edition] if edition else []), ending]).strip()
        whose = [{"women": "Women's", "men": "Men's", "unisex": "Unisex"}[self.features["gender"][0]] for _ in gender]
        title = " ".join([*brand, *whose, *(_capitals(word) for word in [*describing, *noun])])
        if edition:
            title += f"{self._pick((' –', ' |', ','))} {edition}"
        endings = (" in {}", " ({})", ", {}") if edition else (" – {}", " in {}", " ({})", ", {}")
        ending = self._pick(endings).format(_capitals(colour[0])) if colour else ""
        return title + ending

    def description(self) -> str:
        if self._chance(0.4):  # many sellers leave the season to the reader
            self.stated |= {("season", value) for value in self.features["season"]}
        words = {name: self._body_words(name) for name in (*RE_FIELDS, "season")}
        noun = self._word("category", self.features["category"][0], self.korean)
        pattern = self._words("pattern", self.features["pattern"]) if self._chance(_REPEATED_SHARE) else []
        if self.korean:
            return self._korean_description(words, pattern, noun)
        return _english_description(words, pattern, noun)

    def _korean_description(self, words: dict[str, list[str]], pattern: list[str], noun: str) -> str:
        opening = self._pick(_OPENINGS)
        made = [f"{'·'.join(words['material'])} 소재의"] if words["material"] else []
        sentences = [" ".join([opening, *made, *words["fit"], *pattern, *words["neckline"], noun]) + "입니다."]
        clauses = []  # as they go on, and as they end
        if words["detail"]:
            details = _joined(words["detail"])
            clauses.append((f"{details} 디테일을 더했고", f"{details} 디테일이 포인트입니다."))
        if words["function"]:
            # "통기성이 좋으며", but "방수 기능이 좋으며"
            qualities = _joined([word if word.endswith("성") else f"{word} 기능" for word in words["function"]])
            qualities += _particle(qualities, "이", "가")
            clauses.append((f"{qualities} 좋으며", f"{qualities} 좋습니다."))
        sentences += _clauses(clauses)
        clauses = []
        if words["style"] or words["mood"]:
            mood = " ".join(word if word.endswith("운") else f"{word}한" for word in words["mood"])
            look = f"{mood} {'·'.join(words['style'])}".strip() + " 스타일"
            clauses.append((f"{look}로", f"{look}입니다."))
        if words["season"]:
            when = f"{', '.join(words['season'])}에"
            clauses.append((f"{when} 활용하기 좋고", f"{when} 활용하기 좋습니다."))
        if words["occasion"]:
            what_for = f"{', '.join(words['occasion'])}에"
            clauses.append((f"{what_for} 잘 어울리며", f"{what_for} 잘 어울립니다."))
        return " ".join(sentences + _clauses(clauses))


def _english_description(words: dict[str, list[str]], pattern: list[str], noun: str) -> str:
    plural = noun.endswith("s") and not noun.endswith("ss")
    described = " ".join([*words["fit"], *pattern, *words["neckline"], noun])
    article = "" if plural else "an " if described[0] in "aeiou" else "a "
    made = f" in {' and '.join(words['material'])}" if words["material"] else ""
    sentences = [_sentence(f"{article}{described}{made}")]
    qualities = " and ".join(word for word in words["function"] if "protection" not in word)
    if any("protection" in word for word in words["function"]):
        qualities += " with UV protection"
    details = f"finished with {' and '.join(words['detail'])} details" if words["detail"] else ""
    qualities = qualities.strip()
    if details:
        sentences.append(_sentence(f"{details}, {qualities}" if qualities else details))
    elif qualities:
        verb = (
            ("they come" if plural else "it comes") if qualities[:5] == "with " else "they are" if plural else "it is"
        )
        sentences.append(_sentence(f"{verb} {qualities}"))
    look = " ".join([*words["mood"], *words["style"]])
    look = f"{'an' if look[0] in 'aeiou' else 'a'} {look} look" if look else ""
    wear = f"for {' and '.join(words['occasion'])} wear" if words["occasion"] else ""
    *others, last = words["season"] or [""]
    season = f"for {', '.join(others)}{' and ' if others else ''}{last}" if last else ""
    if look or wear or season:
        sentences.append(_sentence(", ".join(part for part in (f"{look} {wear}".strip(), season) if part)))
    return " ".join(sentences)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _capitals(text: str) -> str:
    """Title case as shops write it: `V-Neck`, `A-Line T-Shirt`; a letter after an apostrophe stays small."""
    return " ".join("-".join(part[:1].upper() + part[1:] for part in word.split("-")) for word in text.split(" "))


def _clauses(clauses: Sequence[tuple[str, str]]) -> list[str]:
    """One sentence: every clause but the last goes on."""
    if not clauses:
        return []
    return [", ".join([going_on for going_on, _ in clauses[:-1]] + [clauses[-1][1]])]


def _particle(word: str, after_consonant: str, after_vowel: str) -> str:
    """The Korean particle that fits the last syllable; a Latin ending is read by its letter."""
    last = word[-1]
    closed = (ord(last) - ord("가")) % 28 > 0 if "가" <= last <= "힣" else last in "lmnr"
    return after_consonant if closed else after_vowel


def _joined(words: Sequence[str]) -> str:
    joined = words[0]
    for word in words[1:]:
        joined += _particle(joined, "과 ", "와 ") + word
    return joined
