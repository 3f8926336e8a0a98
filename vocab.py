"""Words to ids and back: the closed STD vocabulary and the growing RE vocabulary.

Ids 0, 1 and 2 are padding, unknown and mask in both; then one id for each `field=value`. One table serves all fields of
a vocabulary, so the same value in two fields keeps two ids, and every text feature is one id: no noise in attention.
"""

from __future__ import annotations

import json
import re
import threading
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path

from catalog import FeatureSchema, Product

PAD, UNKNOWN, MASK = 0, 1, 2
FIRST_WORD = 3

_SEPARATORS = re.compile(r"[\s_\-‐‑–—/]+")
_LIST_SEPARATORS = re.compile(r"[,，、;|]")


def normalise(text: str) -> str:
    """One spelling for one value: NFKC, case folded, runs of space / hyphen / underscore / slash to one space.

    Idempotent: `normalise(normalise(x)) == normalise(x)`.
    """
    # Case folding can undo NFKC (and the reverse), so both are applied until nothing changes: two rounds at most.
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return _SEPARATORS.sub(" ", folded).strip()


def split_values(values: Iterable[str]) -> list[str]:
    """Split comma-joined values ("Cotton, Linen") and drop empties and repeats by spelling; order is kept."""
    found: dict[str, str] = {}
    for value in values:
        for part in _LIST_SEPARATORS.split(value):
            key = normalise(part)
            if key:
                found.setdefault(key, part.strip())
    return list(found.values())


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
        data = {"fields": self.field_names, "words": [list(word) for word in self.words[FIRST_WORD:]]}
        path.write_text(json.dumps(data, ensure_ascii=False, indent=0), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> _Vocabulary:
        """Read what `save` wrote. Raises ValueError naming the file if it is damaged."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            vocabulary = cls.__new__(cls)
            _Vocabulary.__init__(vocabulary, data["fields"])
            for field, value in data["words"]:
                vocabulary._add(field, value)
            if len(vocabulary) != FIRST_WORD + len(data["words"]):
                raise ValueError("a word stands twice")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a saved vocabulary: {error}") from error
        return vocabulary


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
    """The open vocabulary: a new value gets the next id at once. Safe to grow from several threads."""

    def __init__(self, fields: Iterable[str]) -> None:
        super().__init__(fields)
        self._lock = threading.Lock()

    def grow(self, field: str, value: str) -> int:
        """The id of a value, added if new. Raises ValueError on an unknown field or an empty value."""
        known = self._ids.get((field, normalise(value)))
        if known is not None:
            return known
        with self._lock:
            return self._add(field, value)

    def grow_from(self, products: Iterable[Product], min_count: int = 1) -> int:
        """Add the RE values that at least `min_count` of the products carry; returns how many were new."""
        counts: dict[tuple[str, str], int] = {}
        for product in products:
            for field in self.field_names:
                for value in {normalise(value) for value in product.re.get(field, ())} - {""}:
                    counts[field, value] = counts.get((field, value), 0) + 1
        before = len(self)
        for (field, value), count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
            if count >= min_count:
                self.grow(field, value)
        return len(self) - before

    @classmethod
    def load(cls, path: Path) -> ReVocab:
        loaded = super().load(path)
        assert isinstance(loaded, ReVocab)
        loaded._lock = threading.Lock()
        return loaded
