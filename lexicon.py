"""The shop's lexicon: which words, in English and Korean, name which value of which field.

`lexicon.json` is edited by the shop. Each field has

- `names`: what sellers call it ("color", "색상");
- `values`: each value and its other spellings;
- `pick`: how a closed field takes one value from a text: the `first` named, the `head` noun of the first phrase
  ("shirt dress with belt" is a dress), or `all`. Open fields take all;
- `generic`: values that give way to any other ("shoes" to "boots");
- `broader`: where a finer value goes when the shop's schema does not list it ("hoodie" is a "sweatshirt").

`ignore` lists words that look like a value and are not ("화면" is a screen, not 면, cotton), `stop_words` are left out of
the field `word`. Two marks in a spelling: `=wide` counts as a seller's whole value, in a title and right before a product's
name, since elsewhere it tells of a part ("wide straps"); `롱*` may be followed by more syllables, where a lone Korean
syllable otherwise stands alone or before a particle. English plurals and the spelling without a space ("tshirt") are
understood.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from catalog import FeatureSchema
from settings import UserError
from vocab import normalise, split_values

LEXICON = Path(__file__).with_name("lexicon.json")
WORD_FIELD = "word"  # an open field of this name takes the description's words that no other field took
SPOKEN_OF = 0.02  # share of the products that name a value of a field, for it to be one of the shop's
MAX_WORDS = 12  # of the field `word`: enough for a product's own vocabulary, short enough for attention

_LETTER = "a-zß-ɏ"  # Latin with accents, after case folding
_HANGUL = "가-힣"
# What may follow a Korean noun within one written word.
_PARTICLES = (
    "은|는|이|가|을|를|의|에|와|과|도|로|만|으로|이나|나|인|이고|이며|에는|에도|에서|부터|까지|처럼|보다|같은"
    "|소재|혼방|혼용|원단|재질|용|옷|룩"
)
_PARTICLE = re.compile(f"(?:{_PARTICLES})$")
_AFTER_WORD = re.compile(f"[{_HANGUL}]{{1,3}}(?![{_HANGUL}])")

_SIGNS = str.maketrans({"’": "'", "™": None, "®": None, "©": None})  # NFKC would write ™ as the letters "tm"
_SPACES = re.compile(r"[^\S\n]+|(?<=\w)[-‐‑_]+(?=\w)")
_FRACTION = re.compile(r"(?<=\b\w)/(?=\w\b)")  # 3/4, S/S: one word to the lexicon
_PERCENT = re.compile(r"\d+(?:\.\d+)?\s*%")
_LIST_SLASH = re.compile(r"(?<!\d)/|/(?!\d)")
_TOKEN = re.compile(rf"[{_LETTER}]+(?:'[{_LETTER}]+)?|[{_HANGUL}]+")
# Where the phrase that names the product ends.
_PHRASE_END = re.compile(r"[.,;:!?()\[\]\n&+]|\b(?:with|in|for|from|by|of|featuring|made|and|has|having|plus)\b")

_NEGATORS = re.compile(
    r"\b(?:no|not|non|without|never|lacks?|nor|free|none)\b|n't\b|없|않|아니|아닙|아닌|아님|미포함|불포함|제외"
)
_NEGATED_BEFORE = re.compile(
    r"(?:\b(?:no|not|non|without|never|lacks?|nor)|n't)"
    r"(?: (?!(?:only|just|in|of|with|and|but|for|to|on|at|from|by|like)\b)[a-z]+){0,2} ?$"
)
_NEGATED_AFTER = re.compile(
    r" ?(?:처리|기능|효과|가공)?(?:이|가|은|는|도|을|를)? ?(?:되지|하지|거의|전혀)? ?"
    r"(?:없|않|아니|아닙|아닌|아님|미포함|불포함|제외)"
    r"| free\b(?! ?(?:size|사이즈))|s? ?[:=] ?(?:no|none)\b"
)
_NEGATION_GOES_ON = re.compile(r"\s*,?\s*(?:or|nor)\s*")
_LOOK_BEHIND = 40  # characters before a word that may hold its "not"


_key = lru_cache(maxsize=65_536)(normalise)  # sellers type the same names and values again and again


class LexiconField(BaseModel):
    model_config = ConfigDict(extra="forbid")

    names: list[str]
    values: dict[str, list[str]]
    pick: Literal["first", "head", "all"] = "first"
    generic: list[str] = []
    broader: dict[str, str] = {}

    @model_validator(mode="after")
    def _refers_to_its_own_values(self) -> LexiconField:
        strangers = ({*self.generic, *self.broader, *self.broader.values()}) - set(self.values)
        if strangers:
            raise ValueError(f"generic and broader name {sorted(strangers)}, which are not among the values")
        for value in self.values:
            seen = {value}
            while (value := self.broader.get(value, "")) in self.values:
                if value in seen:
                    raise ValueError(f"broader goes in a circle at {value!r}")
                seen.add(value)
        return self


class LexiconFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    fields: dict[str, LexiconField]
    ignore: list[str] = []
    stop_words: list[str] = []


class _Spelling(NamedTuple):
    text: str  # normalised
    weak: bool  # within running text it counts only right before a product's name
    open_end: bool  # more Korean syllables may follow


def _spelling(written: str) -> _Spelling:
    return _Spelling(normalise(written.strip("=*")), written.startswith("="), written.endswith("*"))


def _spellings(value: str, others: list[str]) -> list[_Spelling]:
    """All spellings of a value, its own name first, unless the list says `=name` of it."""
    written = {spelling.text: spelling for spelling in map(_spelling, [value, *others])}
    return list(written.values())


def _variants(text: str) -> Iterator[str]:
    """The spellings a reader would also accept: plural, and two words written as one."""
    forms = [text]
    if re.fullmatch(rf"[{_LETTER}0-9 ]*[{_LETTER}]{{3}}", text):
        if text.endswith(("ss", "x", "ch", "sh")):
            forms.append(text + "es")
        elif text[-1] == "y" and text[-2] not in "aeiou":
            forms.append(text[:-1] + "ies")
        elif not text.endswith("s"):
            forms.append(text + "s")
    for form in forms:
        yield form
        if form.count(" ") == 1:
            yield form.replace(" ", "")


class Said(NamedTuple):
    """A value, and the words of the text that say it."""

    value: str
    words: str


class Hit(NamedTuple):
    start: int  # in the folded text
    end: int
    found: tuple[tuple[str, str], ...]  # (schema field, value)


@dataclass
class BoundLexicon:
    """A lexicon seen through one shop's schema: every value it gives for a closed field is an allowed one."""

    schema: FeatureSchema
    field_names: dict[str, str] = field(default_factory=dict)  # normalised name -> schema field
    whole: dict[str, dict[str, str]] = field(default_factory=dict)  # schema field -> normalised spelling -> value
    picks: dict[str, str] = field(default_factory=dict)  # schema field -> first | head | all
    generic: set[tuple[str, str]] = field(default_factory=set)
    terms: dict[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)  # found in text -> (field, value)s
    weak: dict[str, set[str]] = field(default_factory=dict)  # term -> schema fields it means only before a noun
    nouns: set[str] = field(default_factory=set)  # terms of fields that take the head of a phrase: products, colours
    stop_words: frozenset[str] = frozenset()
    pattern: re.Pattern[str] = re.compile("(?!)")

    def field_of(self, attribute: str) -> str | None:
        """The schema field that a seller's attribute name means."""
        return self.field_names.get(_key(attribute))

    def closed_values(self, name: str, written: str) -> tuple[list[str], list[str]]:
        """What a seller wrote in a closed field: (allowed values, parts that are none)."""
        whole = self.whole[name].get(_key(written))
        if whole is not None:
            return [whole], []
        allowed, strangers = [], []
        for part in _parts(written):
            value = self.whole[name].get(_key(part))
            if value is None:
                strangers.append(part)
            else:
                allowed.append(value)
        return allowed, strangers

    def open_values(self, name: str, written: str) -> list[str]:
        """What was written in an open field: normalised, known spellings by their value, percentages left out."""
        known = self.whole.get(name, {})
        whole = normalise(_PERCENT.sub(" ", written))
        parts = [whole] if whole in known else [normalise(part) for part in _parts(_PERCENT.sub(" ", written))]
        return list(dict.fromkeys(known.get(part, part) for part in parts if part))

    def read(self, title: str, description: str, wanted: Iterable[str]) -> dict[str, list[Said]]:
        """The values of the `wanted` schema fields that the words of a product name. HTML is welcome."""
        texts, hits = self._read(title, description)
        found: dict[str, list[tuple[int, Hit, str]]] = {}
        for number in (0, 1):
            for hit in hits[number]:
                for name, value in hit.found:
                    found.setdefault(name, []).append((number, hit, value))
        values = {}
        for name in wanted:
            if name == WORD_FIELD and name in self.schema.re:
                said = [Said(word, word) for word in self._words(texts[1], hits[1])]
            elif name not in found:
                continue
            else:
                said = [Said(value, texts[number][hit.start : hit.end]) for number, hit, value in found[name]]
                if self.picks[name] == "all":
                    first: dict[str, Said] = {}
                    for one in said:
                        first.setdefault(one.value, one)
                    said = list(first.values())
                else:
                    said = [said[self._pick(name, found[name], texts)]]
            if said:
                values[name] = said
        return values

    def unread(self, title: str, description: str) -> list[str]:
        """Content words of a product that no field of the schema took: what a reader of more than words may find."""
        texts, hits = self._read(title, description)
        return list(
            dict.fromkeys(word for text, own in zip(texts, hits, strict=True) for word in self._words(text, own))
        )

    def _read(self, title: str, description: str) -> tuple[list[str], list[list[Hit]]]:
        texts = [fold(plain_text(title)), fold(plain_text(description))]
        return texts, [list(self._hits(texts[0], in_title=True)), list(self._hits(texts[1], in_title=False))]

    def _pick(self, name: str, found: list[tuple[int, Hit, str]], texts: list[str]) -> int:
        """Which of the values counts. The title goes before the description; within either, a generic value gives way."""
        where = min(number for number, _, _ in found)
        named = [index for index, (number, _, _) in enumerate(found) if number == where]
        if self.picks[name] == "head":
            # The head noun stands last: "knit cardigan", "니트 가디건".
            end = _PHRASE_END.search(texts[where], found[named[0]][1].end)
            named = [index for index in named if end is None or found[index][1].start < end.start()][::-1]
        return next((index for index in named if (name, found[index][2]) not in self.generic), named[0])

    def _hits(self, text: str, in_title: bool) -> Iterator[Hit]:
        """What is named in a folded text and not negated. A negated hit is yielded empty: its words are taken."""
        watch = _NEGATORS.search(text) is not None
        previous_end, previous_negated = 0, False
        for match in self.pattern.finditer(text):
            start, end = match.span()
            term = match.group()
            found = self.terms[term]
            if term in self.weak and not in_title:
                after = self.pattern.match(text, end + 1)
                if after is None or after.group() not in self.nouns:
                    found = tuple(pair for pair in found if pair[0] not in self.weak[term])
            if watch:
                before = text[max(previous_end, start - _LOOK_BEHIND) : start]
                negated = (
                    _NEGATED_BEFORE.search(before) is not None
                    or _NEGATED_AFTER.match(text, end) is not None
                    or (previous_negated and _NEGATION_GOES_ON.fullmatch(before) is not None)
                )
                previous_end, previous_negated = end, negated
                if negated:
                    yield Hit(start, end, ())
                    continue
            if found:
                yield Hit(start, end, found)

    def _words(self, text: str, hits: list[Hit]) -> list[str]:
        """Content words that no field took, in the order of the text."""
        words: dict[str, None] = {}
        start = 0
        for hit in [*hits, Hit(len(text), len(text), ())]:
            for token in _TOKEN.findall(text, start, hit.start):
                word = _stem(token)
                if word not in self.stop_words and token not in self.stop_words and len(word) >= _shortest(word):
                    words[word] = None
            start = hit.end
            tail = _AFTER_WORD.match(text, start)  # the particle of a Korean word that a field took
            if tail and hit.end > hit.start and _is_hangul(text[start - 1]):
                start = tail.end()
        return list(words)[:MAX_WORDS]


class Lexicon:
    """The lexicon file, checked. `digest` changes whenever its content does."""

    def __init__(self, content: LexiconFile) -> None:
        self.content = content
        self.digest = hashlib.blake2b(content.model_dump_json().encode(), digest_size=8).hexdigest()
        self._bound: BoundLexicon | None = None

    @classmethod
    def load(cls, path: Path) -> Lexicon:
        """Raises UserError if the file is missing or wrong."""
        try:
            return cls(LexiconFile.model_validate_json(path.read_bytes()))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; LEXICON names the lexicon file") from error
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise UserError(f"{path}: {place}: {first['msg']}; mend the lexicon and run again") from error

    def bind(self, schema: FeatureSchema) -> BoundLexicon:
        """Compile for a schema (about half a second); the last one is kept."""
        bound = self._bound
        if bound is None or (bound.schema is not schema and bound.schema != schema):
            self._bound = bound = _bind(self.content, schema)
        return bound

    def fields_of(self, texts: Sequence[tuple[str, str]], attributes: Iterable[str]) -> FeatureSchema:
        """What products speak of in their titles and descriptions, as a schema for a shop that has none: the fields of which
        SPOKEN_OF of them name a value, but those that `attributes` of the shop mean already. A field of which a product has one
        value is closed, to all the values of the lexicon; one of which it may have many is open."""
        fields = self.content.fields
        one = {name: list(field.values) for name, field in fields.items() if field.pick != "all"}
        bound = _bind(self.content, FeatureSchema(std=one, re=[name for name in fields if name not in one]))
        held = {bound.field_of(attribute) for attribute in attributes}
        named = Counter(name for title, description in texts for name in bound.read(title, description, fields))
        kept = [name for name in fields if name not in held and named[name] >= max(1, SPOKEN_OF * len(texts))]
        return FeatureSchema(
            std={name: one[name] for name in kept if name in one}, re=[name for name in kept if name not in one]
        )


def _bind(content: LexiconFile, schema: FeatureSchema) -> BoundLexicon:
    bound = BoundLexicon(schema, stop_words=frozenset(normalise(word) for word in content.stop_words))
    named = {normalise(name): key for key, entry in content.fields.items() for name in (*entry.names, key)}
    closed_or_open = [*schema.std, *schema.re]
    lexicon_field = {name: named[normalise(name)] for name in closed_or_open if normalise(name) in named}
    for name, key in lexicon_field.items():
        for synonym in content.fields[key].names:
            bound.field_names.setdefault(normalise(synonym), name)
    bound.field_names.update({normalise(name): name for name in closed_or_open})  # the schema's own names win

    found: dict[str, dict[tuple[str, str], None]] = {}  # insertion-ordered sets
    open_ended: set[str] = set()
    for key, entry in content.fields.items():
        spellings = {value: _spellings(value, others) for value, others in entry.values.items()}
        uses = Counter(spelling.text for written in spellings.values() for spelling in written)
        targets = [name for name in closed_or_open if lexicon_field.get(name) == key]
        for name in targets:
            known = _value_of_spelling(entry, spellings, schema.std.get(name))
            bound.whole[name] = known
            bound.picks[name] = "all" if name in schema.re else entry.pick
            bound.generic |= {(name, known[normalise(value)]) for value in entry.generic if normalise(value) in known}
        for value, written in spellings.items():
            for spelling in written:
                if spelling.open_end:
                    open_ended.add(spelling.text)
                for form in _variants(spelling.text):
                    if spelling.weak:
                        bound.weak.setdefault(form, set()).update(targets)
                    if entry.pick == "head":
                        bound.nouns.add(form)
                    # Also without a field in this schema: "shirt collar" must not be read as a shirt.
                    taken = found.setdefault(form, {})
                    for name in targets:
                        # A spelling of two values ("봄가을") stands for each.
                        target = bound.whole[name].get(normalise(value) if uses[form] > 1 else form)
                        if target is not None:
                            taken[name, target] = None
        for name in targets:  # the schema's own words, of closed fields
            for value in schema.std.get(name, ()):
                if _readable(normalise(value)) and normalise(value) not in bound.weak:
                    for form in _variants(normalise(value)):
                        found.setdefault(form, {}).setdefault((name, value), None)
    for name in schema.std:
        own = bound.whole.setdefault(name, {})
        own.update({normalise(value): value for value in reversed(schema.std[name])})
    for word in content.ignore:
        found[normalise(word)] = {}
    found.pop("", None)
    bound.terms = {term: tuple(pairs) for term, pairs in found.items()}
    bound.pattern = _compile(bound.terms, open_ended)
    heads = {name for name, pick in bound.picks.items() if pick == "head"}
    bound.terms |= {term: _with_modifiers(bound, term, heads) for term in bound.terms}
    return bound


def _value_of_spelling(
    entry: LexiconField, spellings: Mapping[str, list[_Spelling]], allowed: list[str] | None
) -> dict[str, str]:
    """Normalised spelling -> value: the lexicon's for an open field, the schema's for a closed one."""
    known: dict[str, str] = {}
    if allowed is None:
        for value, written in spellings.items():
            for spelling in written:
                for form in _variants(spelling.text):
                    known.setdefault(form, normalise(value))
        known.update({normalise(value): normalise(value) for value in entry.values})
        return known
    own = {normalise(value): value for value in reversed(allowed)}
    # Which allowed value a lexicon value is: by its own name, else by any of its spellings.
    same: dict[str, str] = {}
    for value, written in spellings.items():
        forms = (form for spelling in written for form in _variants(spelling.text))
        match = next((own[form] for form in forms if form in own), None)
        if match is not None:
            same[value] = match
    for value, written in spellings.items():
        target: str | None = value
        while target is not None and target not in same:
            target = entry.broader.get(target)
        if target is not None:
            for spelling in written:
                for form in _variants(spelling.text):
                    known.setdefault(form, same[target])
    return {**known, **own}


def _readable(text: str) -> bool:
    """Whether a schema's value may be looked for in running text: "S" or "36" would be found everywhere."""
    return bool(re.search(rf"[{_LETTER}]{{3}}|[{_HANGUL}]{{2}}", text))


def _with_modifiers(bound: BoundLexicon, term: str, heads: set[str]) -> tuple[tuple[str, str], ...]:
    """A product's name says more than its category: a "denim jacket" is denim too."""
    found = bound.terms[term]
    if not any(name in heads for name, _ in found) or len(term) < 3:
        return found
    # A Korean noun is two syllables or more: 면바지 is 면 + 바지, but 운동화 (sneakers) is no 운동.
    modifiers = term.rpartition(" ")[0] if _LATIN_END.search(term) else term[:-2]
    inner = (match.group() for match in bound.pattern.finditer(modifiers))
    more = [pair for word in inner if word not in bound.weak for pair in bound.terms[word]]
    return (*found, *(pair for pair in dict.fromkeys(more) if pair not in found and pair[0] not in heads))


_WIDE = 16  # branches of one regex alternation
_LATIN_END = re.compile(rf"[{_LETTER}]$")

_Trie = dict[str, "_Trie | str"]  # "" holds the guard that must follow the finished term


def _compile(terms: Iterable[str], open_ended: set[str]) -> re.Pattern[str]:
    """One pattern that finds the longest term at each place, Latin ones at word boundaries.

    A trie spelt as a pattern: its size does not slow it down as a plain alternation of thousands of words would.
    """
    latin: _Trie = {}
    hangul: _Trie = {}
    lone: _Trie = {}
    for term in terms:
        if _is_hangul(term[0]):
            alone = len(term) == 1
            _plant(lone if alone else hangul, term, _guard_after(term, alone and term not in open_ended))
        else:
            _plant(latin, term, _guard_after(term, False))
    groups = [
        (rf"(?<![{_LETTER}\d])", latin),
        (rf"(?=[{_HANGUL}])", hangul),
        (rf"(?<![{_HANGUL}])", lone),
    ]
    return re.compile("|".join(guard + _spell(trie) for guard, trie in groups if trie) or "(?!)")


def _guard_after(term: str, lone_syllable: bool) -> str:
    if lone_syllable:
        return rf"(?=(?:{_PARTICLES})?(?![{_HANGUL}]))"
    if _LATIN_END.search(term):
        return rf"(?![{_LETTER}])"
    return r"(?!\d)" if term[-1].isdigit() else ""


def _plant(trie: _Trie, term: str, guard: str) -> None:
    for letter in term:
        branch = trie.setdefault(letter, {})
        assert isinstance(branch, dict)
        trie = branch
    trie[""] = guard


def _spell(trie: _Trie) -> str:
    letters = sorted((letter, rest) for letter, rest in trie.items() if isinstance(rest, dict))
    branches = [re.escape(letter) + _spell(rest) for letter, rest in letters]
    if len(branches) > _WIDE:
        # The regex engine tries branches one by one: hundreds of first syllables would cost it a microsecond each time.
        branches = [
            f"(?=[{re.escape(letters[at][0])}-{re.escape(letters[min(at + _WIDE, len(letters)) - 1][0])}])"
            f"(?:{'|'.join(branches[at : at + _WIDE])})"
            for at in range(0, len(branches), _WIDE)
        ]
    end = trie.get("")
    if isinstance(end, str):
        branches.append(end)  # last, so that the longest term wins
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"


class _TextOnly(HTMLParser):
    """Text of HTML: blocks end a line, inline tags vanish, scripts are left out."""

    _INLINE = frozenset({"a", "b", "strong", "i", "em", "u", "span", "font", "small", "sup", "sub", "mark", "s"})
    _SILENT = frozenset({"script", "style"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._silent = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._silent = tag in self._SILENT
        if tag not in self._INLINE:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._silent = False
        if tag not in self._INLINE:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.parts.append(data.replace("\n", " "))


def plain_text(text: str) -> str:
    """Text without HTML tags and entities; a block of HTML becomes a line."""
    if "<" not in text:
        return unescape(text) if "&" in text else text
    parser = _TextOnly()
    try:
        parser.feed(text)
        parser.close()
    except AssertionError:  # the standard parser's answer to a malformed "<![": not HTML then
        return unescape(text)
    return "".join(parser.parts)


def says(text: str, value: str) -> bool:
    """Whether a text (folded and normalised) holds the words of a value: its English plural and Korean particles count too."""
    words = normalise(fold(value))
    if not words:
        return False
    if _is_hangul(words[0]):
        return words.replace(" ", "") in text.replace(" ", "")
    return re.search(rf"(?<![{_LETTER}\d]){re.escape(words)}(?:e?s)?(?![{_LETTER}\d])", text) is not None


def fold(text: str) -> str:
    """Running text in the lexicon's spelling: NFKC, case folded, hyphens within words to spaces; lines are kept."""
    folded = text.translate(_SIGNS).casefold()
    if not folded.isascii():
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", folded).casefold())
    return _FRACTION.sub(" ", _SPACES.sub(" ", folded))


def _parts(written: str) -> list[str]:
    return split_values([_LIST_SLASH.sub(",", written)])


def _is_hangul(letter: str) -> bool:
    return "가" <= letter <= "힣"


def _shortest(word: str) -> int:
    return 2 if _is_hangul(word[:1]) else 3


def _stem(token: str) -> str:
    """A word without its possessive or Korean particle, where enough is left to be a word."""
    if not _is_hangul(token[0]):
        return token.partition("'")[0]
    bare = _PARTICLE.sub("", token)
    return bare if len(bare) >= 2 else token
