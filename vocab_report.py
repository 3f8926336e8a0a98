"""How the RE vocabulary drifts, and merges that make it small again: suggested, reviewed by a person, applied on request.

    python vocab_report.py report                       # prints the state, writes suggestions.jsonl
    python vocab_report.py apply suggestions.jsonl      # after you deleted and changed lines in it
    python vocab_report.py list                         # what is in force, in the form of that file
    python vocab_report.py undo                         # takes the last application back
    python vocab_report.py undo FILE                    # forgets the aliases that a file names

Three kinds of suggestions, all within one field:

- `spelling`: the same but for spaces, punctuation, singular and plural, word order, or one wrong letter of a long word;
- `compound`: a value made of parts that occur elsewhere ("long h line blazer") becomes these parts ("long", "h line",
  "blazer"), so that nothing it says is lost;
- `similar`: nearest neighbours by the text encoder, unless the lexicon reads different things in them.

Applied merges are aliases of the vocabulary: the next training reads a value as what it stands for, and its release keeps
doing so. The features stored with products are never rewritten.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import CliPositionalArg

from catalog import FeatureSchema, Identifier, Product, Value, Values
from lexicon import Lexicon
from release import Release
from settings import Settings, UserError, run_script
from store import Alias, Store
from text_encoder import TextEncoder
from vocab import UNKNOWN, AliasMap, ReVocab, Word, normalise, resolve_aliases

Kind = Literal["spelling", "compound", "similar"]
KINDS: tuple[Kind, ...] = get_args(Kind)

CATEGORY = "category"  # the lexicon's field for what a product is
COMPOUND_FROM = 100  # values of a field: one that fits on a screen or two needs no taking apart
MAX_WORDS = 10  # of a value that is taken apart; a longer one is a sentence
MAX_PART = 4  # words of one part
MAX_REST = 3  # words of a value that neither the lexicon nor other products know
BOUND_SHARE = 0.95  # a word that stands beside the same other word this often does not stand for itself
BOUND_COUNT = 5  # products that say so
TYPO_LENGTH = 6  # letters of a word in which one wrong letter is a typo; short words differ by one letter and mean it
TYPO_RATIO = 3  # how much more frequent the right spelling is
SIMILARITY_CHUNK = 1024  # rows of the similarity matrix held at once
SHOWN = 10  # new words shown for a field


def _word_set(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Words of English that say nothing without the word before them ("stand collar") or behind them ("high rise").
_NEEDS_LEFT = _word_set(
    "neck neckline collar sleeve sleeves sleeved shoulder rise fit line leg legs hem cuff waist length blend lined down"
    " free weight elasticity fiber fabric"
)
_NEEDS_RIGHT = _word_set(
    "high highly low mid semi micro extra ultra super extreme half full quarter slight slightly off multi faux very early"
    " late"
)
# Words that may tell of a degree, and of what: "light stretch" is not light.
_DEGREES = _word_set("light heavy medium moderate normal standard regular strong good little thin thick")
_MEASURES = _word_set("stretch stretchy elastic")
# Words that add nothing: "relaxed fit" is relaxed.
_FILLERS = _word_set("fit style type look design wear fabric material 핏 스타일 룩 소재 디자인")
_NEGATORS = re.compile(r"\b(?:no|not|non|un|without|never|free|none|nor)\b|없|않|아닌|미포함|불포함|제외")
_NEGATED = re.compile(rf"{_NEGATORS.pattern}|\b(?:un|non|anti)\w+|\w+less\b")
_PLAIN = re.compile(r"[^\W_]+(?:[ '’&][^\W_]+)*")  # words only: a bracket or a sign of some kind is structure
_DIGITS = re.compile(r"\d+")


class Suggestion(BaseModel):
    """One line of the file: `value` is to be read as `becomes`. The rest is for the reviewer."""

    model_config = ConfigDict(extra="forbid")

    field: Identifier
    value: Value
    becomes: Values
    kind: str = Field("own", max_length=20)
    products: int = Field(0, ge=0, description="that carry the value, alone or as a part of one that is taken apart")
    score: float = Field(1.0, description="similar: cosine; compound: share of its words that occur elsewhere")


# --- what the lexicon knows -------------------------------------------------------------------------------------------


class Knowledge:
    """What the lexicon reads in a value, whatever the field: {(lexicon field, lexicon value)}."""

    def __init__(self, lexicon: Lexicon) -> None:
        bound = lexicon.bind(FeatureSchema(std={}, re=list(lexicon.content.fields)))
        self._terms, self._pattern = bound.terms, bound.pattern

    def knows(self, text: str) -> bool:
        """Whether the lexicon has this very word or phrase."""
        return bool(self._terms.get(text))

    def read(self, text: str) -> frozenset[Word]:
        return frozenset(pair for match in self._pattern.finditer(text) for pair in self._terms[match.group()])

    def garments(self, word: str) -> frozenset[str]:
        """The kinds of product that a word names."""
        return frozenset(value for field, value in self._terms.get(word, ()) if field == CATEGORY)

    def is_phrase(self, text: str) -> bool:
        """Whether several words mean more than each of them says: "shirt dress" does, "wool coat" does not."""
        if not self.knows(text):
            return False
        words = text.split()
        said = {pair for word in words for pair in self._terms.get(word, ())}
        # Two garments in one name are a third: a shirt dress. Two names of one are not: a bomber jacket is a jacket.
        one_each = len({name for name, _ in said}) == len(said)
        return not (one_each and all(self.knows(word) for word in words) and said >= set(self._terms[text]))


def differ_in_meaning(one: str, other: str, knowledge: Knowledge) -> bool:
    """Whether two values must not be merged: other numbers, a negation in one, or the lexicon reads different things."""
    return (
        _DIGITS.findall(one) != _DIGITS.findall(other)
        or sorted(_NEGATED.findall(one)) != sorted(_NEGATED.findall(other))
        or knowledge.read(one) != knowledge.read(other)
    )


# --- compounds --------------------------------------------------------------------------------------------------------


class Splitter:
    """Takes the values of one field apart. `counts`: products that carry each value."""

    def __init__(self, counts: Mapping[str, int], knowledge: Knowledge) -> None:
        self._knowledge = knowledge
        self._bound = _bound_pairs(counts, knowledge)
        self._phrase: dict[str, bool] = {}

    def parts(self, value: str) -> list[str]:
        """The value's words, with those together that belong together. Joined by spaces they are the value."""
        words = value.split()
        best: list[tuple[float, int]] = [(0.0, 0)]  # of the first n words: least cost, where the last part starts
        for end in range(1, len(words) + 1):
            # Of equal costs the longest last part: in "polo shirt dress" the dress comes last.
            best.append(
                min(
                    (best[start][0] + cost, start)
                    for start in range(max(0, end - MAX_PART), end)
                    if (cost := self._cost(words[start:end])) is not None
                )
            )
        parts, end = [], len(words)
        while end:
            start = best[end][1]
            parts.append(" ".join(words[start:end]))
            end = start
        return parts[::-1]

    def _cost(self, words: list[str]) -> float | None:
        """Of one part; None if these words are none. The fewest parts win, so that phrases stay whole."""
        if len(words) == 1:
            return 3.0 if _is_bound(words[0]) else 1.0
        text = " ".join(words)
        if text not in self._phrase:
            self._phrase[text] = self._knowledge.is_phrase(text)
        if self._phrase[text]:
            return 0.9
        return 1.0 if all(self._belong(*pair) for pair in pairwise(words)) else None

    def _belong(self, left: str, right: str) -> bool:
        return (
            right in _NEEDS_LEFT
            or _needs_right(left)
            or (left in _DEGREES and right in _MEASURES)
            or (left, right) in self._bound
        )


def _is_bound(word: str) -> bool:
    return word in _NEEDS_LEFT or _needs_right(word)


def _needs_right(word: str) -> bool:
    # One Latin letter or a number: "v neck", "a line", "3 4 sleeve".
    return word in _NEEDS_RIGHT or word.isdigit() or (len(word) == 1 and word.isascii())


def _bound_pairs(counts: Mapping[str, int], knowledge: Knowledge) -> set[tuple[str, str]]:
    """Neighbours that are one name: of which one hardly ever stands beside another word ("peter pan"), or two garments of
    different kinds that are often named together ("shirt jacket", which is no shirt)."""
    pairs: Counter[tuple[str, str]] = Counter()
    words: Counter[str] = Counter()
    for value, count in counts.items():
        written = value.split()
        for pair in pairwise(written):
            pairs[pair] += count
        for word in written:
            words[word] += count

    def is_one_name(left: str, right: str) -> bool:
        kinds = knowledge.garments(left), knowledge.garments(right)
        if kinds[0] and kinds[1]:
            return not kinds[0] & kinds[1]
        # Words that the lexicon knows stand for themselves, however seldom this shop sets them apart.
        if knowledge.knows(left) and knowledge.knows(right):
            return False
        return pairs[left, right] >= BOUND_SHARE * min(words[left], words[right])

    return {pair for pair, count in pairs.items() if count >= BOUND_COUNT and is_one_name(*pair)}


def compounds(counts: Mapping[str, int], knowledge: Knowledge, min_products: int) -> dict[str, tuple[list[str], float]]:
    """Values to take apart: value -> (parts, share of its words that other products or the lexicon know).

    Neighbouring words that nobody else uses stay together and are kept as a part of their own: the whole value, carried by
    one product, would not be trained at all. A value with many such words, or with a negation, stays whole.
    """
    splitter = Splitter(counts, knowledge)
    parts_of = {
        value: splitter.parts(value)
        for value in counts
        if _PLAIN.fullmatch(value) and len(value.split()) <= MAX_WORDS and not _NEGATORS.search(value)
    }
    used = Counter[str]()
    for value, parts in parts_of.items():
        for part in dict.fromkeys(parts):
            used[part] += counts[value]
    found = {}
    for value, parts in parts_of.items():
        known = [used[part] >= min_products or knowledge.knows(part) for part in parts]
        joined: list[tuple[str, bool]] = []
        for part, is_known in zip(parts, known, strict=True):
            if joined and not is_known and not joined[-1][1]:
                joined[-1] = (f"{joined[-1][0]} {part}", False)
            else:
                joined.append((part, is_known))
        rest = sum(len(part.split()) for part, is_known in joined if not is_known)
        words = len(value.split())
        becomes = list(dict.fromkeys(part for part, _ in joined))
        if len(becomes) < 2 or rest > MAX_REST or rest == words:
            continue
        if all(any(len(word) > 1 and not word.isdigit() for word in part.split()) for part in becomes):
            found[value] = (becomes, 1 - rest / words)
    return found


# --- spelling ---------------------------------------------------------------------------------------------------------


def spellings(counts: Mapping[str, int], knowledge: Knowledge) -> dict[str, tuple[str, float]]:
    """Rarer spellings -> (the most frequent spelling of the same, score)."""
    right = _typos(counts, knowledge)
    splitter = Splitter(counts, knowledge)
    found: dict[str, tuple[str, float]] = {}
    ordered = sorted(counts, key=lambda value: (-counts[value], value))
    for by_order in (False, True):
        groups: dict[str, list[str]] = defaultdict(list)
        for value in ordered:
            if value in found:
                continue
            group = groups[_bag(value, right, splitter) if by_order else _squashed(value, right)]
            if (
                group
                and not differ_in_meaning(_corrected(value, right), group[0], knowledge)
                and not (by_order and _turned(value, group[0], knowledge))
            ):
                found[value] = (group[0], 0.9 if by_order else 1.0)
            else:
                group.append(value)
    return found


def _corrected(value: str, right: Mapping[str, str]) -> str:
    return " ".join(right.get(word, word) for word in value.split())


def _singular(word: str) -> str:
    """English plurals to singulars, well enough to compare: what comes out need not be a word."""
    if len(word) < 4 or not word.isascii() or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith(("sses", "xes", "ches", "shes")):
        return word[:-2]
    return word[:-1] if word.endswith("s") else word


def _words(value: str, right: Mapping[str, str]) -> list[str]:
    return [_singular(right.get(word, word)) for word in value.split()]


def _squashed(value: str, right: Mapping[str, str]) -> str:
    text = "".join(_words(value, right))
    # A value of signs only ("+", "++") is told from others by nothing else.
    return "".join(letter for letter in text if letter.isalnum()) or value


def _bag(value: str, right: Mapping[str, str], splitter: Splitter) -> str:
    return " ".join(sorted(_squashed(part, right) for part in splitter.parts(value)))


def _turned(one: str, other: str, knowledge: Knowledge) -> bool:
    """Whether the same words in another order name another thing: of "shirt dress" and "dress shirt" the last counts."""
    ends = one.split()[-1], other.split()[-1]
    return ends[0] != ends[1] and all(knowledge.garments(end) for end in ends)


def _typos(counts: Mapping[str, int], knowledge: Knowledge) -> dict[str, str]:
    """Rare long words -> the much more frequent word that is one letter off."""
    words: Counter[str] = Counter()
    for value, count in counts.items():
        for word in set(value.split()):
            words[word] += count
    by_rest: dict[str, set[str]] = defaultdict(set)
    long = [word for word in words if len(word) >= TYPO_LENGTH - 1 and word.isascii() and word.isalpha()]
    for word in long:
        for rest in _without_one(word):
            by_rest[rest].add(word)
    found = {}
    for word in long:
        # What the lexicon has is spelt right.
        if len(word) < TYPO_LENGTH or knowledge.knows(word):
            continue
        near = {other for rest in _without_one(word) for other in by_rest[rest]} - {word}
        better = [
            other
            for other in near
            if words[other] >= TYPO_RATIO * words[word] and one_edit_apart(word, other) and not _other_word(word, other)
        ]
        if better:
            found[word] = min(better, key=lambda other: (-words[other], other))
    return found


def _other_word(word: str, other: str) -> bool:
    """A first letter more or less, or another ending, makes another word ("lined", "unlined"; "trimmed", "trimmer")."""
    shorter, longer = sorted((word, other), key=len)
    return word[0] != other[0] or (len(shorter) == len(longer) and shorter[:-1] == longer[:-1])


def _without_one(word: str) -> set[str]:
    return {word} | {word[:at] + word[at + 1 :] for at in range(len(word))}


def one_edit_apart(one: str, other: str) -> bool:
    """Whether one letter added, left out, replaced, or two neighbours swapped make one word the other."""
    if one == other or abs(len(one) - len(other)) > 1:
        return False
    start = 0
    while start < min(len(one), len(other)) and one[start] == other[start]:
        start += 1
    a, b = one[start:], other[start:]
    if len(a) == len(b):
        return a[1:] == b[1:] or (a[:2] == b[1::-1] and a[2:] == b[2:])
    return a[1:] == b or a == b[1:]


# --- similar ----------------------------------------------------------------------------------------------------------


def similar(
    counts: Mapping[str, int], vectors: npt.NDArray[np.float32], knowledge: Knowledge, threshold: float
) -> dict[str, tuple[str, float]]:
    """Mutual nearest neighbours -> rarer value: (more frequent value, cosine).

    A text encoder puts opposites side by side ("thin" and "thick" have a cosine of .99), so closeness alone is not enough:
    the words must be forms of one another ("check", "checked"), or known to the lexicon as names of the same thing.

    vectors: float32 [values, width], unit length, in the order of `counts`.
    """
    values = list(counts)
    nearest = np.full(len(values), -1)
    cosine = np.full(len(values), -1.0)
    for start in range(0, len(values) if len(values) > 1 else 0, SIMILARITY_CHUNK):
        rows = np.arange(start, min(start + SIMILARITY_CHUNK, len(values)))
        scores = vectors[rows] @ vectors.T
        scores[np.arange(len(rows)), rows] = -2.0
        nearest[rows] = scores.argmax(axis=1)
        cosine[rows] = scores.max(axis=1)
    found = {}
    for row, value in enumerate(values):
        if cosine[row] < threshold or nearest[nearest[row]] != row:
            continue
        other = values[nearest[row]]
        if (counts[value], other) < (counts[other], value) and say_the_same(value, other, knowledge):
            found[value] = (other, round(float(cosine[row]), 4))
    return found


def say_the_same(one: str, other: str, knowledge: Knowledge) -> bool:
    """Whether there is evidence, other than closeness, that two values mean one thing."""
    if differ_in_meaning(one, other, knowledge):
        return False
    if _stems(one) == _stems(other):
        return True
    words = set(one.split()), set(other.split())
    if words[0] <= words[1] or words[1] <= words[0]:
        return False  # the longer one says more
    return bool(knowledge.read(one)) and knowledge.knows(one) and knowledge.knows(other)


def _stems(value: str) -> list[str]:
    """The words' stems in order, without words that add nothing (unless there are no others)."""
    words = [word for word in value.split() if word not in _FILLERS] or value.split()
    return [_stem(word) for word in words]


def _stem(word: str) -> str:
    """English endings off, well enough to compare: "crop", "cropped", "cropping" give one stem."""
    stem = re.sub(r"(?<=[a-z]{3})(?:ing|ed|ey|y|es|s)$", "", word)
    stem = re.sub(r"([b-df-hj-np-tv-z])\1$", r"\1", stem)
    return re.sub(r"(?<=[a-z]{3})e$", "", stem)


# --- the report -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FieldReport:
    """One field's state, its aliases in force resolved, and what is suggested for it."""

    field: str
    counts: Counter[str]  # products that carry each value
    new: list[str] | None  # values that the live release was not trained with; None without one
    suggestions: list[Suggestion]
    after: Counter[str]  # the counts if all suggestions were applied


def field_report(
    field: str,
    products: Sequence[Product],
    aliases: AliasMap,
    knowledge: Knowledge,
    text_encoder: TextEncoder | None,
    release_vocab: ReVocab | None = None,
    kinds: Sequence[Kind] = KINDS,
    min_products: int = 5,
    min_similarity: float = 0.97,
) -> FieldReport:
    """What there is to say about one field. `text_encoder` may be None when `kinds` has no "similar"."""
    counts = _counts(field, products, aliases)
    split: dict[str, tuple[list[str], float]] = {}
    if "compound" in kinds and len(counts) >= COMPOUND_FROM:
        split = compounds(counts, knowledge, min_products)
    # What is left to merge: the values that stay whole, and the parts of the others as they are read now.
    vocab = ReVocab([field], aliases)
    whole: Counter[str] = Counter()
    for value, count in counts.items():
        for part in split[value][0] if value in split else [value]:
            for read in vocab.stands_for(field, part):
                if read not in split:
                    whole[read] += count
    spelt = spellings(whole, knowledge) if "spelling" in kinds else {}
    close: dict[str, tuple[str, float]] = {}
    left = {value: count for value, count in whole.items() if value not in spelt}
    if "similar" in kinds and text_encoder is not None and left:
        close = similar(left, text_encoder.cached_pooled(list(left)), knowledge, min_similarity)
    merged = {
        value: (kind, to) for kind, found in (("spelling", spelt), ("similar", close)) for value, to in found.items()
    }
    suggestions = [
        Suggestion(field=field, value=value, becomes=[to], kind=kind, products=whole[value], score=score)
        for value, (kind, (to, score)) in merged.items()
    ]
    suggestions += [
        Suggestion(
            field=field, value=value, becomes=parts, kind="compound", products=counts[value], score=round(score, 2)
        )
        for value, (parts, score) in split.items()
    ]
    suggestions.sort(key=lambda line: (-KINDS[::-1].index(line.kind), -line.products, line.value))
    after = _counts(field, products, resolve_aliases({**aliases, **_as_aliases(suggestions)}))
    new = None
    if release_vocab is not None:
        known_as = _counts(field, products, release_vocab.aliases)
        new = [value for value, _ in known_as.most_common() if release_vocab.id(field, value) == UNKNOWN]
    return FieldReport(field, counts, new, suggestions, after)


def _counts(field: str, products: Iterable[Product], aliases: AliasMap) -> Counter[str]:
    vocab = ReVocab([field], aliases)
    return Counter(value for product in products for _, value in vocab.words_of(product.re))


def _as_aliases(suggestions: Iterable[Suggestion]) -> dict[Word, list[str]]:
    return {(line.field, line.value): line.becomes for line in suggestions}


# --- the file ---------------------------------------------------------------------------------------------------------


def write_suggestions(lines: Iterable[Suggestion], path: Path) -> None:
    """One JSON object a line. Raises UserError when the file is there: a person may have edited it."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.writelines(_line(line) + "\n" for line in lines)
    except FileExistsError:
        raise UserError(
            f"{path} is there already, maybe with your changes; move it away or name another file"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a file that can be written") from error


def read_suggestions(path: Path, fields: Sequence[str]) -> list[Suggestion]:
    """What `write_suggestions` wrote and a person changed; empty lines are welcome. `fields`: the RE fields there are.

    Raises UserError that names the line when one is malformed, names an unknown field, has no target or repeats a value.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name the file that `vocab_report.py report` wrote") from error
    found: dict[Word, Suggestion] = {}
    # Not `splitlines`: U+2028 and the like may stand within a JSON text.
    for number, raw in enumerate(text.split("\n"), start=1):
        if not raw.strip():
            continue
        where = f"{path}, line {number}"
        try:
            line = Suggestion.model_validate_json(raw)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            raise UserError(f"{where}: {name + ': ' if name else ''}{first['msg']}") from error
        if line.field not in fields:
            raise UserError(f"{where}: {line.field!r} is no open field of this shop (there are: {', '.join(fields)})")
        line.value, line.becomes = normalise(line.value), [normalise(target) for target in line.becomes]
        if not line.value or not line.becomes or "" in line.becomes:
            raise UserError(f"{where}: value and becomes must say something; delete the line if nothing is to change")
        if line.value in line.becomes:
            raise UserError(f"{where}: {line.value!r} would become itself; delete the line if nothing is to change")
        word = (line.field, line.value)
        if word in found and found[word].becomes != line.becomes:
            raise UserError(f"{where}: {line.value!r} becomes something else in an earlier line; keep one of them")
        found[word] = line
    return list(found.values())


def _line(line: Suggestion) -> str:
    return json.dumps(line.model_dump(), ensure_ascii=False)


# --- the script -------------------------------------------------------------------------------------------------------


class VocabOptions(Settings):
    """Report how the RE vocabulary drifts and suggest merges; apply a reviewed file of them, list or undo what is applied.
    Applied merges take effect with the next training."""

    action: CliPositionalArg[Literal["report", "apply", "list", "undo"]] = Field(
        description="report writes suggestions; apply puts a reviewed file into force; list and undo what is in force"
    )
    file: CliPositionalArg[Path | None] = Field(
        None, description="report: to write (suggestions.jsonl); apply: to read; undo: whose values to forget"
    )
    field: str = Field("", description="report on this RE field alone")
    kind: Literal["", "spelling", "compound", "similar"] = Field("", description="only suggestions of this kind")
    sample: int = Field(0, ge=0, description="print so many random suggestions, for a review (see SEED)")
    min_products: int = Field(5, ge=1, description="products that make a part of a value a known one")
    min_similarity: float = Field(0.97, ge=-1, le=1, description="cosine from which neighbours are suggested")
    lexicon: Path = Field(Path(__file__).with_name("lexicon.json"), description="the words of the shop's features")


def report(store: Store, options: VocabOptions) -> None:
    """Print the state and write the suggestions."""
    path = options.file or Path("suggestions.jsonl")
    if path.exists():  # said before the work, not after it
        write_suggestions([], path)
    fields = store.schema().re
    if options.field:
        if options.field not in fields:
            raise UserError(f"{options.field!r} is no open field of this shop (there are: {', '.join(fields)})")
        fields = [options.field]
    kinds = [kind for kind in KINDS if options.kind in ("", kind)]
    products, aliases = store.products.read_features(), store.aliases.read()
    live = Release.current(options.models_dir)
    release_vocab = Release.open(options.models_dir, live).vocabularies()[1] if live else None
    knowledge = Knowledge(Lexicon.load(options.lexicon))
    text_encoder = TextEncoder.load(options) if "similar" in kinds else None
    reports = [
        field_report(
            field, products, aliases, knowledge, text_encoder, release_vocab, kinds, options.min_products,
            options.min_similarity,
        )
        for field in fields
    ]  # fmt: skip
    suggestions = [line for field in reports for line in field.suggestions]
    for text in (*table_lines(reports, options.min_products), "", *new_word_lines(reports, live)):
        print(text)
    if options.sample:
        print()
        chosen = random.Random(options.seed).sample(suggestions, min(options.sample, len(suggestions)))
        for line in chosen:
            print(f"{line.kind:9} {line.field}: {line.value} -> {' + '.join(line.becomes)}")
    write_suggestions(suggestions, path)
    print(
        f"\n{len(aliases)} aliases in force; {len(suggestions)} suggestions in {path}: delete and change lines, then run"
        f" vocab_report.py apply {path}"
    )


def table_lines(reports: Sequence[FieldReport], min_products: int) -> list[str]:
    """Values of each field now and after, and what is suggested."""
    wide = max([len("field"), *(len(report.field) for report in reports)])
    heads = ["values", "used once", f">= {min_products}", "after", f">= {min_products}", *KINDS]
    lines = [f"{'field':{wide}}" + "".join(f"{head:>11}" for head in heads)]
    for report in reports:
        kinds = Counter(line.kind for line in report.suggestions)
        numbers = [
            len(report.counts),
            sum(count == 1 for count in report.counts.values()),
            sum(count >= min_products for count in report.counts.values()),
            len(report.after),
            sum(count >= min_products for count in report.after.values()),
            *(kinds[kind] for kind in KINDS),
        ]
        lines.append(f"{report.field:{wide}}" + "".join(f"{number:11,}" for number in numbers))
    return lines


def new_word_lines(reports: Sequence[FieldReport], live: str | None) -> list[str]:
    """Values that products carry and the live release was not trained with."""
    if live is None:
        return ["no release is live: every value is new to the next training"]
    lines = [f"values that release {live} was not trained with, the most frequent first:"]
    for report in reports:
        if report.new:
            more = f", and {len(report.new) - SHOWN:,} more" if len(report.new) > SHOWN else ""
            lines.append(f"  {report.field}: {', '.join(report.new[:SHOWN])}{more}")
    return lines if len(lines) > 1 else [f"release {live} was trained with every value there is"]


def apply(store: Store, path: Path) -> None:
    """Put into force exactly what a file says."""
    lines = read_suggestions(path, store.schema().re)
    try:
        done = store.aliases.apply(
            [Alias(line.field, line.value, line.becomes, line.kind) for line in lines], resolve_aliases
        )
    except ValueError as error:
        raise UserError(f"{path}: with what is in force, {error}; nothing was applied") from error
    if done.application == 0:
        print(f"nothing to do: all {done.same} aliases of {path} are in force")
        return
    print(
        f"application {done.application}: {done.new} new aliases, {done.changed} changed, {done.same} in force before;"
        " they take effect with the next training (train_simcse.py)"
    )


def main(options: VocabOptions) -> None:
    if options.action == "apply" and options.file is None:
        raise UserError("apply needs the file to apply: vocab_report.py apply suggestions.jsonl")
    with Store.open(options) as store:
        if options.action == "report":
            report(store, options)
        elif options.action == "apply":
            assert options.file is not None
            apply(store, options.file)
        elif options.action == "list":
            for alias in store.aliases.current():
                line = Suggestion(field=alias.field, value=alias.value, becomes=list(alias.becomes), kind=alias.kind)
                print(json.dumps(line.model_dump(exclude={"products", "score"}), ensure_ascii=False))
        elif options.file is not None:
            lines = read_suggestions(options.file, store.schema().re)
            gone = store.aliases.forget((line.field, line.value) for line in lines)
            print(f"{gone} aliases forgotten; {len(store.aliases.current())} in force")
        else:
            print(f"{store.aliases.undo()} aliases taken back; {len(store.aliases.current())} in force")


if __name__ == "__main__":
    run_script(VocabOptions, main)
