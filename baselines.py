"""The plain lines that every table stands beside: popularity in its windows, item-kNN, EASE, attributes and words.

Each takes the training side of a split and returns a function from the items a shopper met (rows) to a score for every item, or
None where it does not apply. All are exact; none is tuned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import scipy.sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

from catalog import Product
from tensors import DAY, Histories

Score = Callable[[np.ndarray], np.ndarray]

EASE_MOST_ITEMS = 20_000  # beyond, its items-by-items inverse does not fit a small machine
EASE_REGULARISATION = 200.0
POPULARITY_WEIGHT = 0.1  # of log popularity beside content, as published with these splits


@dataclass(frozen=True)
class Split:
    """The training side: catalogue, events before the cut."""

    product_ids: list[str]
    products: Sequence[Product]
    histories: Histories
    cut: float

    def items_of(self, user_id: str) -> np.ndarray:
        """Distinct rows of the items a shopper met; empty for a stranger."""
        user = self._user_number.get(user_id)
        if user is None:
            return np.zeros(0, dtype=np.int64)
        starts = self.histories.starts
        return np.unique(self.histories.item[starts[user] : starts[user + 1]]).astype(np.int64)

    @property
    def _user_number(self) -> dict[str, int]:
        cached = self.__dict__.get("_numbers")
        if cached is None:
            cached = {user_id: number for number, user_id in enumerate(self.histories.user_ids)}
            self.__dict__["_numbers"] = cached
        return cached

    def matrix(self) -> scipy.sparse.csr_matrix:
        """Shoppers by items, 1 where they met: [U, N]."""
        histories, shape = self.histories, (len(self.histories.user_ids), len(self.product_ids))
        met = scipy.sparse.csr_matrix((np.ones(len(histories.item)), (histories.user, histories.item)), shape=shape)
        met.data[:] = 1.0
        return met


def popularity(days: float | None, split: Split) -> Score:
    histories = split.histories
    recent = (
        histories.first_meeting if days is None else histories.first_meeting & (histories.at >= split.cut - days * DAY)
    )
    counts = np.bincount(histories.item[recent], minlength=len(split.product_ids)).astype(np.float64)
    # Among items equally wanted lately, the ones more wanted ever.
    counts += 1e-6 * np.bincount(histories.item[histories.first_meeting], minlength=len(split.product_ids))
    return lambda met: counts.copy()


def item_knn(split: Split) -> Score:
    """Cosine of co-occurrence (Sarwar et al., WWW 2001); popularity decides among the untouched."""
    met_by = split.matrix()
    counts = np.asarray(met_by.sum(0)).ravel()
    scale = scipy.sparse.diags(1.0 / np.sqrt(np.maximum(counts, 1.0)))
    together = (met_by.T @ met_by).tolil()
    together.setdiag(0.0)
    cosine = (scale @ together.tocsr() @ scale).tocsr()
    return lambda met: np.asarray(cosine[met].sum(0)).ravel() + 1e-6 * counts


def ease(split: Split) -> Score | None:
    """Steck, "Embarrassingly shallow autoencoders for sparse data", WWW 2019."""
    if len(split.product_ids) > EASE_MOST_ITEMS:
        return None
    met_by = split.matrix()
    gram = (met_by.T @ met_by).toarray()
    gram[np.diag_indices(len(gram))] += EASE_REGULARISATION
    inverse = np.linalg.inv(gram)
    weights = inverse / -np.diag(inverse)
    np.fill_diagonal(weights, 0.0)
    return lambda met: weights[met].sum(0)


def content(popularity_weight: float, split: Split) -> Score | None:
    """TF-IDF of titles and words with attribute one-hots, mean of the history, plus weighted log popularity."""
    documents = [" ".join([p.title, *(v for values in p.re.values() for v in values)]) for p in split.products]
    attributes = [[f"{field}={v}" for field, values in p.std.items() for v in values] for p in split.products]
    if len({tuple(row) for row in attributes}) < len(split.products) // 100:
        return None  # products that hardly differ on paper
    words = TfidfVectorizer(min_df=2, sublinear_tf=True).fit_transform(documents)
    columns = TfidfVectorizer(analyzer=lambda row: row, use_idf=False).fit_transform(attributes)
    vectors = normalize(scipy.sparse.hstack([words, columns]).tocsr())
    transposed = vectors.T.tocsr()
    counts = np.bincount(split.histories.item[split.histories.first_meeting], minlength=len(split.product_ids))
    wanted = popularity_weight * np.log1p(counts)

    def score(met: np.ndarray) -> np.ndarray:
        liked = scipy.sparse.csr_matrix(vectors[met].sum(0) / max(1, len(met)))
        return np.asarray((liked @ transposed).todense()).ravel() + wanted

    return score


BASELINES: dict[str, Callable[[Split], Score | None]] = {
    "popularity": partial(popularity, None),
    "popularity, last 90 days": partial(popularity, 90.0),
    "popularity, last 180 days": partial(popularity, 180.0),
    "item-kNN (cosine)": item_knn,
    "EASE": ease,
    "content": partial(content, 0.0),
    "content + log popularity": partial(content, POPULARITY_WEIGHT),
}
