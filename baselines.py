"""The plain lines that every table stands beside: popularity in its windows, item-kNN, EASE, attributes and words; and the lines of
libraries that live in an environment of their own (benchmarks/peers).

Each takes the training side of a split and returns a function from the items a shopper met (rows) to a score for every item, or
None where it does not apply. All are exact; none is tuned.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

from catalog import Product
from settings import UserError
from tensors import DAY, Histories

Score = Callable[[np.ndarray], np.ndarray]

EASE_MOST_ITEMS = 20_000  # beyond, its items-by-items inverse does not fit a small machine
EASE_REGULARISATION = 200.0
POPULARITY_WEIGHT = 0.1  # of log popularity beside content, as published with these splits
GROUP_WEIGHT = 0.7  # of an item's group (its other colours and sizes) beside content, likewise
PEERS = Path(__file__).with_name("benchmarks") / "peers"


@dataclass(frozen=True)
class Split:
    """The training side: catalogue, events before the cut."""

    product_ids: list[str]
    products: Sequence[Product]
    histories: Histories
    cut: float
    groups: Sequence[str | None] = ()  # of each product; empty if the shop has none

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


def content(popularity_weight: float, split: Split, group_weight: float = 0.0) -> Score | None:
    """Mean cosine to the items of the history by `content_vectors`, plus weighted log popularity; and, if weighted, the item's
    group as one more attribute."""
    if group_weight and not any(split.groups):
        return None
    if len({tuple(row) for row in _attributes(split.products)}) < len(split.products) // 100:
        return None  # products that hardly differ on paper
    vectors = content_vectors(split.products)
    if group_weight:
        own = [[group] if group else [] for group in split.groups]
        group_columns = _columns(own, analyzer=lambda row: row, use_idf=False)
        vectors = normalize(scipy.sparse.hstack([vectors, group_weight * group_columns]).tocsr())
    transposed = vectors.T.tocsr()
    counts = np.bincount(split.histories.item[split.histories.first_meeting], minlength=len(split.product_ids))
    wanted = popularity_weight * np.log1p(counts)

    def score(met: np.ndarray) -> np.ndarray:
        liked = scipy.sparse.csr_matrix(vectors[met].sum(0) / max(1, len(met)))
        return np.asarray((liked @ transposed).todense()).ravel() + wanted

    return score


def content_vectors(products: Sequence[Product]) -> scipy.sparse.csr_matrix:
    """TF-IDF of titles and words with attribute one-hots: [N, W], rows of length 1, or 0 for a product that says nothing."""
    documents = [" ".join([p.title, *(v for values in p.re.values() for v in values)]) for p in products]
    words = _columns(documents, min_df=2, sublinear_tf=True)
    columns = _columns(_attributes(products), analyzer=lambda row: row, use_idf=False)
    return normalize(scipy.sparse.hstack([words, columns]).tocsr())


def _attributes(products: Sequence[Product]) -> list[list[str]]:
    return [[f"{field}={v}" for field, values in p.std.items() for v in values] for p in products]


def _columns(rows: Sequence[Any], **options: Any) -> scipy.sparse.csr_matrix:
    """TF-IDF of what each row holds: [N, words]; one column of zeros when the rows hold nothing that counts."""
    try:
        return TfidfVectorizer(**options).fit_transform(rows)
    except ValueError:  # its word for an empty vocabulary
        return scipy.sparse.csr_matrix((len(rows), 1))


BASELINES: dict[str, Callable[[Split], Score | None]] = {
    "popularity": partial(popularity, None),
    "popularity, last 90 days": partial(popularity, 90.0),
    "popularity, last 180 days": partial(popularity, 180.0),
    "item-kNN (cosine)": item_knn,
    "EASE": ease,
    "content": partial(content, 0.0),
    "content + log popularity": partial(content, POPULARITY_WEIGHT),
    "content + log popularity + group": partial(content, POPULARITY_WEIGHT, group_weight=GROUP_WEIGHT),
}

PEER_SCRIPTS: dict[str, Path] = {"implicit ALS, 64 factors": PEERS / "implicit_als.py"}


def peer_lists(python: Path, script: Path, split: Split, user_ids: Sequence[str], count: int) -> list[list[str]] | None:
    """What a library recommends to `user_ids`, `count` products each; None when one of them has no history.

    The script runs in the environment of `python`, and is told and answers by files (see benchmarks/peers). Raises UserError
    when it fails.
    """
    histories = split.histories
    number_of = {user_id: number for number, user_id in enumerate(histories.user_ids)}
    if any(user_id not in number_of for user_id in user_ids):
        return None
    with tempfile.TemporaryDirectory() as name:
        question, answer = Path(name) / "question.npz", Path(name) / "answer.npz"
        order = np.argsort(histories.at, kind="stable")
        np.savez(
            question, user=histories.user[order].astype(np.int64), item=histories.item[order].astype(np.int64),
            shape=(len(histories.user_ids), len(split.product_ids)), count=count,
            judged=np.array([number_of[user_id] for user_id in user_ids]),
        )  # fmt: skip
        try:
            subprocess.run([python, script, question, answer], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(
                f"{script.name} did not run: {error}; --peers takes the python of an environment with {PEERS / 'requirements.txt'}"
            ) from error
        with np.load(answer) as found:
            return [[split.product_ids[item] for item in row if item >= 0] for row in found["lists"]]
