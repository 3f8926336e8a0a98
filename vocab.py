"""Words to ids and back: the closed STD vocabulary and the growing RE vocabulary.

Ids 0, 1 and 2 are padding, unknown and mask in both; then one id for each `field=value`. One table serves all fields of
a vocabulary, so the same value in two fields keeps two ids, and every text feature is one id: no noise in attention.
"""

from __future__ import annotations

import json
import re
import threading
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from catalog import FeatureSchema, Product

PAD, UNKNOWN, MASK = 0, 1, 2
FIRST_WORD = 3

Word = tuple[str, str]  # (field, value in normalised spelling)
AliasMap = Mapping[Word, Sequence[str]]  # what a value of a field stands for: one or more values of the same field

_SEPARATORS = re.compile(r"[\s_\-‐‑–—/]+")
_LIST_SEPARATORS = re.compile(r"[,，、;|]")


def normalise(text: str) -> str:
    """One spelling for one value: NFKC, case folded, runs of space / hyphen / underscore / slash to one space.

    Idempotent: `normalise(normalise(x)) == normalise(x)`.
    """
    # Case folding can undo NFKC (and the reverse), so both are applied until nothing changes: two rounds at most.
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return _SEPARATORS.sub(" ", folded).strip()


_cached_normalise = lru_cache(maxsize=65_536)(normalise)  # a catalogue repeats its values again and again


def split_values(values: Iterable[str]) -> list[str]:
    """Split comma-joined values ("Cotton, Linen") and drop empties and repeats by spelling; order is kept."""
    found: dict[str, str] = {}
    for value in values:
        for part in _LIST_SEPARATORS.split(value):
            key = normalise(part)
            if key:
                found.setdefault(key, part.strip())
    return list(found.values())


def resolve_aliases(aliases: AliasMap) -> dict[Word, tuple[str, ...]]:
    """The same aliases with chains followed to their ends (a to b, b to c: a to c), all in normalised spelling.

    Idempotent; no value of the result stands for a value that stands for others. Raises ValueError for an alias without a
    target, for one value spelt twice with different targets, and for aliases that go in a circle.
    """
    direct: dict[Word, tuple[str, ...]] = {}
    for (field, value), targets in aliases.items():
        key = (field, normalise(value))
        spelt = tuple(dict.fromkeys(normalise(target) for target in targets))
        if not key[1] or not spelt or "" in spelt:
            raise ValueError(f"{field}: {value!r} or what it would become has no letters or digits to make a word of")
        if direct.setdefault(key, spelt) != spelt:
            raise ValueError(f"{field}: {value!r} becomes two different things")
    resolved: dict[Word, tuple[str, ...]] = {}
    for start in direct:
        # Depth first, with a stack of its own: a chain may be longer than Python's.
        path: dict[Word, None] = {}
        stack = [start]
        while stack:
            word = stack[-1]
            field = word[0]
            waiting = [(field, t) for t in direct[word] if (field, t) in direct and (field, t) not in resolved]
            if word in resolved:
                stack.pop()
            elif not waiting:
                ends = (resolved.get((field, target), (target,)) for target in direct[word])
                resolved[word] = tuple(dict.fromkeys(end for targets in ends for end in targets))
                path.pop(word, None)
                stack.pop()
            else:
                path[word] = None
                if waiting[0] in path:
                    circle = [value for _, value in path][list(path).index(waiting[0]) :]
                    raise ValueError(f"{field}: {' -> '.join([*circle, circle[0]])} goes in a circle")
                stack.append(waiting[0])
    return resolved


class _Vocabulary:
    """Ids of `field=value` words. `fields[i]` is the number of word i's field (0 for the three special ids)."""

    def __init__(self, field_names: Iterable[str]) -> None:
        self.field_names = list(field_names)
        self.words: list[tuple[str, str]] = [("", "<pad>"), ("", "<unknown>"), ("", "<mask>")]
        self._field_number = {name: number for number, name in enumerate(self.field_names, start=1)}
        self._ids: dict[tuple[str, str], int] = {}

    def __len__(self) -> int:
        return len(self.words)

    @property
    def fields(self) -> list[int]:
        """The field number of every id: 0 for the special ids, else 1 + position in `field_names`."""
        return [self._field_number.get(field, 0) for field, _ in self.words]

    def id(self, field: str, value: str) -> int:
        """The id of a value; `UNKNOWN` if the vocabulary does not hold it."""
        return self._ids.get((field, normalise(value)), UNKNOWN)

    def word(self, word_id: int) -> tuple[str, str]:
        """(field, value) of an id, in normalised spelling."""
        return self.words[word_id]

    def ids(self, features: Mapping[str, list[str]]) -> list[int]:
        """Ids of one product's values, each once, in field order; unknown values are left out."""
        found: dict[int, None] = {}
        for field in self.field_names:
            for value in features.get(field, ()):
                word_id = self.id(field, value)
                if word_id != UNKNOWN:
                    found[word_id] = None
        return list(found)

    def _add(self, field: str, value: str) -> int:
        if field not in self._field_number:
            raise ValueError(f"{field!r} is not a field of this vocabulary (it has {self.field_names})")
        key = (field, normalise(value))
        if not key[1]:
            raise ValueError(f"{field}: {value!r} has no letters or digits to make a word of")
        if key not in self._ids:
            self.words.append(key)
            # Published last: a reader on another thread sees an id only when its word is there.
            self._ids[key] = len(self.words) - 1
        return self._ids[key]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self._data(), ensure_ascii=False, indent=0), encoding="utf-8")

    def _data(self) -> dict[str, Any]:
        return {"fields": self.field_names, "words": [list(word) for word in self.words[FIRST_WORD:]]}

    def _restore(self, data: dict[str, Any]) -> None:
        """Take what `_data` gave. Raises KeyError, TypeError or ValueError if it is damaged."""
        _Vocabulary.__init__(self, data["fields"])
        for field, value in data["words"]:
            self._add(field, value)
        if len(self) != FIRST_WORD + len(data["words"]):
            raise ValueError("a word stands twice")

    @classmethod
    def load(cls, path: Path) -> _Vocabulary:
        """Read what `save` wrote. Raises ValueError naming the file if it is damaged."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            vocabulary = cls.__new__(cls)
            vocabulary._restore(data)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a saved vocabulary: {error}") from error
        return vocabulary


def spellings(schema: FeatureSchema) -> dict[str, dict[str, str]]:
    """By what the values of each STD field are known: field -> normalised -> as the schema spells it."""
    return {field: {normalise(value): value for value in values} for field, values in schema.std.items()}


class StdVocab(_Vocabulary):
    """The closed vocabulary: exactly the allowed values of a schema's STD fields."""

    def __init__(self, schema: FeatureSchema) -> None:
        super().__init__(sorted(schema.std))
        for field in self.field_names:
            for value in schema.std[field]:
                if normalise(value):
                    self._add(field, value)

    @classmethod
    def load(cls, path: Path) -> StdVocab:
        loaded = super().load(path)
        assert isinstance(loaded, StdVocab)
        return loaded


class ReVocab(_Vocabulary):
    """The open vocabulary: a new value gets the next id at once. Safe to grow from several threads.

    `aliases` are the merges a person asked for (vocab_report.py): a value that has one never gets an id of its own, it
    is read as what it stands for. Aliases of fields that this vocabulary does not have are left out. Raises ValueError
    for aliases that cannot be (see `resolve_aliases`).
    """

    def __init__(self, fields: Iterable[str], aliases: AliasMap | None = None) -> None:
        super().__init__(fields)
        self._lock = threading.Lock()
        self._set_aliases(aliases or {})

    def _set_aliases(self, aliases: AliasMap) -> None:
        self.aliases = resolve_aliases({word: to for word, to in aliases.items() if word[0] in self._field_number})

    def stands_for(self, field: str, value: str) -> tuple[str, ...]:
        """What a value is read as: itself, or what its alias says. Normalised; empty for an empty value."""
        spelt = _cached_normalise(value)
        return self.aliases.get((field, spelt), (spelt,) if spelt else ())

    def words_of(self, features: Mapping[str, list[str]]) -> list[Word]:
        """The words that one product's values are read as, each once, in field order, known to the vocabulary or not."""
        return list(dict.fromkeys(self._read(features)))

    def _read(self, features: Mapping[str, list[str]]) -> Iterator[Word]:
        for field in self.field_names:
            for value in features.get(field, ()):
                for target in self.stands_for(field, value):
                    yield field, target

    def ids(self, features: Mapping[str, list[str]]) -> list[int]:
        """Ids of one product's values, aliases resolved, each once, in field order; unknown values are left out."""
        return [self._ids[word] for word in self.words_of(features) if word in self._ids]

    def grow(self, field: str, value: str) -> list[int]:
        """The ids of what a value is read as (several for a compound's alias), added if new.

        Raises ValueError on an unknown field or an empty value.
        """
        return [self._grow(field, target) for target in self.stands_for(field, value) or (value,)]

    def _grow(self, field: str, value: str) -> int:
        known = self._ids.get((field, value))
        if known is not None:
            return known
        with self._lock:
            return self._add(field, value)

    def grow_from(self, products: Iterable[Product], min_count: int = 1) -> int:
        """Add the RE words that at least `min_count` of the products carry, aliases resolved; returns how many were new."""
        counts = Counter(word for product in products for word in self.words_of(product.re))
        before = len(self)
        for (field, value), count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
            if count >= min_count:
                self._grow(field, value)
        return len(self) - before

    def _data(self) -> dict[str, Any]:
        aliases = [[field, value, list(targets)] for (field, value), targets in self.aliases.items()]
        return {**super()._data(), "aliases": aliases}

    def _restore(self, data: dict[str, Any]) -> None:
        super()._restore(data)
        self._lock = threading.Lock()
        # Releases made before there were aliases have none.
        self._set_aliases({(field, value): targets for field, value, targets in data.get("aliases", [])})

    @classmethod
    def load(cls, path: Path) -> ReVocab:
        loaded = super().load(path)
        assert isinstance(loaded, ReVocab)
        return loaded
