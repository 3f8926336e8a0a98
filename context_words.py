"""What the words of a context name: "warm wool coat" asks for coats, of wool, and warm ones.

The user tower knows contexts by what shoppers of the log took who said them: occasions, mostly. A text the like of which nobody
said lies somewhere among those, and could move a list anywhere. So where a context names values of closed fields (a category, a
colour, whom it is for) in the lexicon's words, Korean or English, it is taken at its word: what has them comes first.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from catalog import FeatureSchema
from conditions import Condition, OfStd
from lexicon import LEXICON, BoundLexicon, Lexicon, fold
from vocab import FIRST_WORD, ReVocab, StdVocab

# Logits for each closed field that is as named: more than two products differ by in anything else.
CLOSED_LIFT = 10.0
# For each value of an open field, which only the words of some products tell: among those that have what is closed.
OPEN_LIFT = 3.0
CACHE = 1024  # texts
SCHEMAS = 4  # of the releases that one process answers with
# A text names one value of a closed field, as a product has; on either side of these words it may be another.
_OR = re.compile(r"\b(?:or|and)\b|[,/&+]|또는|혹은|아니면|(?<=[가-힣])이?나(?=\s)|(?<=[가-힣])(?:하고|이?랑)(?=\s)")
# Who says what they do not want names it too.
_NOT = re.compile(r"\b(?:no|not|non|without|except|avoid|but|instead)\b|말고|빼고|제외|아닌|없는|싫")


@dataclass(frozen=True)
class Named:
    """Values in the schema's spelling, by field. Nothing is named by who names no closed value: what a tower learned of occasions,
    materials and styles says more than the bare word."""

    std: Mapping[str, list[str]] = field(default_factory=dict)
    re: Mapping[str, list[str]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.std)

    def but(self, fields: Collection[str]) -> Named:
        """Without those closed fields."""
        return Named({name: some for name, some in self.std.items() if name not in fields}, self.re)

    def conditions(self, category: str) -> list[Condition]:
        """One for each closed field; that of the field `category` first."""
        names = sorted(self.std, key=lambda name: name != category)
        return [OfStd.model_construct(std=name, any_of=self.std[name]) for name in names]

    def lift(
        self, std_ids: np.ndarray, re_ids: np.ndarray, std_vocab: StdVocab, re_vocab: ReVocab, category: str
    ) -> np.ndarray:
        """Logits for having what is named: float32 [N] of ids [N, S] and [N, R]. The field `category` weighs more than all others
        together: who asks for a black coat is better served with a grey coat than with a black dress."""
        lift = np.zeros(len(std_ids), dtype=np.float32)
        for name, values in self.std.items():
            weight = len(self.std) if name == category else 1
            lift += CLOSED_LIFT * weight * _has(std_ids, std_vocab.ids({name: values}))
        for name, values in self.re.items():
            for value in values:
                lift += OPEN_LIFT * _has(re_ids, re_vocab.ids({name: [value]}))
        return lift


NOTHING = Named()


class ContextWords:
    """Reads contexts for a schema. Safe to use from several threads."""

    def __init__(self, schema: FeatureSchema) -> None:
        self._schema = schema
        self._bound: BoundLexicon | None = None
        self._lock = threading.Lock()
        self.named = lru_cache(CACHE)(self._named)  # of a context

    @classmethod
    def of_schema(cls, schema: FeatureSchema) -> ContextWords:
        """The same for every release of that schema: the next one does not have to compile the lexicon again."""
        return _of_schema(schema.model_dump_json())

    def prepare(self) -> BoundLexicon:
        """The lexicon compiled for the schema, which takes half a second once."""
        with self._lock:
            if self._bound is None:
                self._bound = Lexicon.load(LEXICON).bind(self._schema)
        return self._bound

    def _named(self, text: str) -> Named:
        told = fold(text)
        if not told.strip() or _NOT.search(told):
            return NOTHING
        closed: dict[str, list[str]] = {}
        words: dict[str, list[str]] = {}
        for part in _OR.split(told):
            for name, said in self.prepare().read(part, "", [*self._schema.std, *self._schema.re]).items():
                values = (closed if name in self._schema.std else words).setdefault(name, [])
                values += [one.value for one in said if one.value not in values]
        return Named(closed, words) if closed else NOTHING


@lru_cache(SCHEMAS)
def _of_schema(schema: str) -> ContextWords:
    return ContextWords(FeatureSchema.model_validate_json(schema))


def _has(ids: np.ndarray, named: Sequence[int]) -> np.ndarray:
    """Which rows [N] of ids [N, W] hold one of those ids that is a word's."""
    return np.asarray(np.isin(ids, [word for word in named if word >= FIRST_WORD]).any(axis=1))
