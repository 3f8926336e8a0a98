"""What the shop's own sellers typed into other products: examples for a model, votes on a closed field, words of open fields.

Near copies fill a catalogue (the same shirt in nine colours), so the values that sellers gave the nearest products say a lot
about one whose seller gave none, at no cost in tokens. Nearest: by cosine of TF-IDF over the words of the titles, and by price.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from catalog import RawProduct
from lexicon import fold, plain_text

MAX_PRODUCTS = 50_000  # looked at; more answer no better and cost a millisecond each time
VOTERS = 5  # nearest products that vote on a field
SHARPNESS = 3  # of a vote's weight, similarity ** SHARPNESS: a near copy outweighs four that share a word
PRICE_SHARPNESS = 2.0  # likeness falls by exp(-this * |difference of log prices|): at twice the price, to a quarter
MIN_USES, MIN_SHARE = 2, 0.7  # a word belongs to an open field if sellers typed it there so often, and hardly elsewhere
SHOP_WEIGHT = 0.02  # of the whole shop's votes: no value is impossible, and one distant neighbour decides nothing

Values = Mapping[str, Sequence[str]]  # of one product: field -> values


class Neighbours:
    """Products whose sellers filled in some fields, by the words of their titles."""

    def __init__(self, products: Iterable[tuple[RawProduct, Values]]) -> None:
        """`products` with their sellers' values; those without any are left out, of very many a fixed sample is kept."""
        filled = ((raw, values) for raw, values in products if values)
        kept = heapq.nsmallest(MAX_PRODUCTS, filled, key=lambda pair: _draw(pair[0].product_id))
        self._raws = [raw for raw, _ in kept]
        self._values = [values for _, values in kept]
        from sklearn.feature_extraction.text import TfidfVectorizer  # a second, for which no server's start should wait

        self._vectorizer = TfidfVectorizer(analyzer=_words, sublinear_tf=True)
        self._titles = self._vectorizer.fit_transform([raw.title for raw in self._raws]) if kept else None
        having: dict[str, list[int]] = {}
        for row, values in enumerate(self._values):
            for name in values:
                having.setdefault(name, []).append(row)
        self._having = {name: np.array(rows) for name, rows in having.items()}  # field -> rows that have it
        self._shares = {name: self._share_of(name) for name in self._having}
        prices = [math.nan if raw.price is None else math.log(raw.price + 1) for raw in self._raws]
        self._log_prices = np.array(prices, dtype=np.float64)
        self._typed = self._typed_words()
        self._last: tuple[object, np.ndarray] = None, self._log_prices

    def __len__(self) -> int:
        return len(self._raws)

    def votes(self, raw: RawProduct, name: str) -> dict[str, float]:
        """value -> share, of the sellers' values in the nearest products that have the field. Empty if none has it."""
        rows = self._having.get(name)
        if rows is None:
            return {}
        similarity = self._similarity(raw)[rows]
        nearest = np.argsort(-similarity, kind="stable")[:VOTERS]
        votes: defaultdict[str, float] = defaultdict(float)
        for index in nearest:
            values = self._values[rows[index]][name]
            for value in values:
                votes[value] += float(similarity[index]) ** SHARPNESS / len(values)
        total = sum(votes.values())
        return {
            value: (SHOP_WEIGHT * share + votes[value]) / (SHOP_WEIGHT + total)
            for value, share in self._shares[name].items()
        }

    def examples(
        self, raw: RawProduct, names: Sequence[str], count: int
    ) -> list[tuple[RawProduct, dict[str, list[str]]]]:
        """The nearest products that have any of the fields, with these fields' values; the nearest last."""
        rows = sorted({int(row) for name in names for row in self._having.get(name, ())})
        rows = [row for row in rows if self._raws[row].product_id != raw.product_id]
        if not rows or count == 0:
            return []
        similarity = self._similarity(raw)[rows]
        nearest = [rows[index] for index in np.argsort(-similarity, kind="stable")[:count]]
        return [
            (self._raws[row], {name: list(self._values[row][name]) for name in names if name in self._values[row]})
            for row in reversed(nearest)
        ]

    def words(self, unread: Iterable[str], names: Iterable[str]) -> list[tuple[str, str]]:
        """(field, value) of the open fields' values that hold one of the `unread` words, as sellers typed them elsewhere."""
        wanted = set(names)
        found = {pair: None for word in unread for pair in self._typed.get(word, ()) if pair[0] in wanted}
        return list(found)

    def _typed_words(self) -> dict[str, list[tuple[str, str]]]:
        """word -> the (field, value) pairs that hold it."""
        uses = Counter((name, value) for values in self._values for name in values for value in values[name])
        anywhere: Counter[str] = Counter()
        for (_, value), count in uses.items():
            anywhere[value] += count
        words: dict[str, list[tuple[str, str]]] = {}
        for (name, value), count in uses.items():
            if count >= MIN_USES and count >= MIN_SHARE * anywhere[value]:
                for word in value.split():
                    words.setdefault(word, []).append((name, value))
        return words

    def _similarity(self, raw: RawProduct) -> np.ndarray:
        assert self._titles is not None
        last = self._last  # read once: other threads ask too
        if last[0] != (raw.title, raw.price):  # field after field of one product is the usual case
            words = self._vectorizer.transform([raw.title])
            likeness = np.asarray((self._titles @ words.T).todense()).ravel()
            if raw.price is not None:
                distance = np.abs(self._log_prices - math.log(raw.price + 1))
                likeness *= np.exp(-PRICE_SHARPNESS * np.nan_to_num(distance, nan=0.0))
            last = self._last = (raw.title, raw.price), likeness
        return last[1]

    def _share_of(self, name: str) -> dict[str, float]:
        """How frequent each value of a field is, with half a product more for each."""
        counts = Counter(value for row in self._having[name] for value in self._values[row][name])
        total = sum(counts.values()) + 0.5 * len(counts)
        return {value: (count + 0.5) / total for value, count in counts.items()}


def _words(title: str) -> list[str]:
    return re.findall(r"\w+", fold(plain_text(title))) or [""]


def _draw(product_id: str) -> bytes:
    return hashlib.blake2b(product_id.encode(), digest_size=8).digest()
