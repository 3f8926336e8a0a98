"""The plain lines that every table stands beside: popularity, item-kNN, EASE, attributes, words and sentences; and the lines of
libraries that live in an environment of their own (benchmarks/peers).

Each takes the training side of a split and returns a function from the items a shopper met (rows) to a score for every item, or
None where it does not apply. All are exact. Popularity's window is chosen on the newest training events; the weights of the others
are as published with these splits and not tuned (the libraries' are: benchmarks/peers/tuning.py).
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

from catalog import Product
from settings import UserError
from tensors import DAY, Histories, distinct

if TYPE_CHECKING:  # importing it costs seconds that a reader of this module need not pay
    from text_encoder import TextEncoder

Score = Callable[[np.ndarray], np.ndarray]

# Of popularity, in days; None is all of them. The longest first: it counts the most events, so it wins a tie.
WINDOWS = (None, 365.0, 180.0, 90.0, 60.0, 30.0, 14.0, 7.0, 3.0, 2.0, 1.0)
VALIDATION_SHARE = 0.1  # of the training events, the newest: they choose the window
VALIDATION_LIST = 100  # items, as many as the tables ask for
EASE_MOST_ITEMS = 20_000  # beyond, its items-by-items inverse does not fit a small machine
EASE_REGULARISATION = 200.0  # as published with these splits
POPULARITY_WEIGHT = 0.1  # of log popularity beside content, as published with these splits
GROUP_WEIGHT = 0.7  # of an item's group (its other colours and sizes) beside content, likewise
HARDLY_DIFFER = 100  # products to one distinct text or set of attributes: what is on paper then tells nothing apart
ROOT = Path(__file__).parent
PEERS = ROOT / "benchmarks" / "peers"


@dataclass(frozen=True)
class Case:
    """One shopper of the test: who, what they said, when, and what they then took; or took beside the product `about`."""

    user_id: str
    context: str
    at: float
    targets: list[str]
    about: str = ""


@dataclass(frozen=True)
class Split:
    """The training side: catalogue, events before the cut."""

    product_ids: list[str]
    products: Sequence[Product]
    histories: Histories
    cut: float
    groups: Sequence[str | None] = ()  # of each product; empty if the shop has none
    text_encoder: TextEncoder | None = None

    def items_of(self, user_id: str) -> np.ndarray:
        """Distinct rows of the items a shopper met; empty for a stranger."""
        return np.unique(self.events_of(user_id))

    def events_of(self, user_id: str) -> np.ndarray:
        """Rows of the items a shopper met, event by event, in time order: int64; empty for a stranger."""
        user = self._user_number.get(user_id)
        if user is None:
            return np.zeros(0, dtype=np.int64)
        starts = self.histories.starts
        return self.histories.item[starts[user] : starts[user + 1]].astype(np.int64)

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
    wanted = _wanted(split, days, split.cut)
    return lambda met: wanted.copy()


def best_window_popularity(split: Split) -> Score:
    return popularity(best_window(split), split)


def best_window(split: Split, count: int = VALIDATION_LIST) -> float | None:
    """The days (None: all) whose `count` most wanted items hold most of what shoppers newly took in the last part of training.

    What a shopper took before is not left out of the list here: it is one list for all.
    """
    histories = split.histories
    # From a midnight on, as the test days are: else a window of one day would mean two different things.
    start = np.floor(np.quantile(histories.at, 1.0 - VALIDATION_SHARE, method="higher") / DAY) * DAY
    taken = histories.item[histories.first_meeting & (histories.at >= start)]

    def hits(days: float | None) -> int:
        top = np.argsort(-_wanted(split, days, start), kind="stable")[:count]
        return int(np.isin(taken, top).sum())

    return max(WINDOWS, key=hits)


def _wanted(split: Split, days: float | None, now: float) -> np.ndarray:
    """Shoppers who newly took each item in the `days` before `now` (epoch seconds): float64 [N]."""
    histories = split.histories
    past = histories.first_meeting & (histories.at < now)
    recent = past if days is None else past & (histories.at >= now - days * DAY)
    counts = np.bincount(histories.item[recent], minlength=len(split.product_ids)).astype(np.float64)
    # Among items equally wanted lately, the ones more wanted ever.
    return counts + 1e-6 * np.bincount(histories.item[past], minlength=len(split.product_ids))


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
    """Steck, "Embarrassingly shallow autoencoders for sparse data", WWW 2019. Ours, since the whole of it is shorter than asking
    a library for the same formula; its one weight is as published."""
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
    group as one more attribute. The weights are as published, not tuned."""
    if group_weight and not any(split.groups):
        return None
    if len({tuple(row) for row in _attributes(split.products)}) < len(split.products) // HARDLY_DIFFER:
        return None
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
    words = _columns(_documents(products), min_df=2, sublinear_tf=True)
    columns = _columns(_attributes(products), analyzer=lambda row: row, use_idf=False)
    return normalize(scipy.sparse.hstack([words, columns]).tocsr())


def sentences(split: Split) -> Score | None:
    """A frozen sentence encoder (text_encoder.py) of titles and words: cosine with the mean of the history. Nothing is trained."""
    texts, text_of = distinct(_documents(split.products))
    if split.text_encoder is None or len(texts) < len(split.products) // HARDLY_DIFFER:
        return None
    vectors = split.text_encoder.cached_pooled(texts)[text_of]  # [N, width], unit length
    return lambda met: vectors @ (vectors[met].sum(0) / max(1, len(met)))


def _documents(products: Sequence[Product]) -> list[str]:
    """Title and words of each product as one text."""
    return [" ".join([p.title, *(v for values in p.re.values() for v in values)]) for p in products]


def _attributes(products: Sequence[Product]) -> list[list[str]]:
    """The closed attributes of each product, "field=value"."""
    return [[f"{field}={v}" for field, values in p.std.items() for v in values] for p in products]


def _columns(rows: Sequence[Any], **options: Any) -> scipy.sparse.csr_matrix:
    """TF-IDF of what each row holds: [N, words]; one column of zeros when the rows hold nothing that counts."""
    try:
        return TfidfVectorizer(**options).fit_transform(rows)
    except ValueError:  # its word for an empty vocabulary
        return scipy.sparse.csr_matrix((len(rows), 1))


BASELINES: dict[str, Callable[[Split], Score | None]] = {
    "popularity": partial(popularity, None),
    "popularity, best window": best_window_popularity,
    "item-kNN (cosine)": item_knn,
    "EASE": ease,
    "content": partial(content, 0.0),
    "content + log popularity": partial(content, POPULARITY_WEIGHT),
    "content + log popularity + group": partial(content, POPULARITY_WEIGHT, group_weight=GROUP_WEIGHT),
    "sentence encoder": sentences,
}

PEER_SCRIPTS: dict[str, tuple[Path | str, ...]] = {  # a script and its arguments
    "implicit ALS": (PEERS / "implicit_als.py",),
    "implicit item-kNN": (PEERS / "implicit_knn.py",),
    "RecTools SASRec": (PEERS / "rectools_sasrec.py", "sasrec"),
    "RecTools eSASRec": (PEERS / "rectools_sasrec.py", "esasrec"),
    "RecTools eSASRec + attributes": (PEERS / "rectools_sasrec.py", "esasrec-attributes"),
}


def peer_lists(
    python: Path, script: tuple[Path | str, ...], split: Split, user_ids: Sequence[str], count: int, answers: Path
) -> list[list[str]] | None:
    """What a library recommends to `user_ids`, `count` products each; None when one of them has no history.

    The script runs in the environment of `python`, and is told and answers by files (benchmarks/peers/tuning.py). To tune one can
    take hours, so its answer stays in the folder `answers`, and until then what came of its trials: as long as neither the question
    nor a file beside the script changes, it is not asked again. Raises UserError when it fails.
    """
    histories = split.histories
    number_of = {user_id: number for number, user_id in enumerate(histories.user_ids)}
    if any(user_id not in number_of for user_id in user_ids):
        return None
    # Events of one instant have no order: chance decides it, or a sequence model would read the order of item numbers.
    order = np.lexsort((np.random.default_rng(0).permutation(len(histories.at)), histories.at))
    has_attribute = _columns(_attributes(split.products), analyzer=lambda row: row, use_idf=False, min_df=2)
    attribute_item, attribute = has_attribute.nonzero()
    asked = {
        "user": histories.user[order].astype(np.int64), "item": histories.item[order].astype(np.int64),
        "at": histories.at[order], "shape": np.array([len(histories.user_ids), len(split.product_ids)]),
        "count": np.array(count), "judged": np.array([number_of[user_id] for user_id in user_ids]),
        "attribute_item": attribute_item.astype(np.int64), "attribute": attribute.astype(np.int64),
    }  # fmt: skip
    path, *arguments = script
    answers.mkdir(parents=True, exist_ok=True)
    answer = answers / f"{'-'.join([Path(path).stem, *map(str, arguments)])}-{_digest(asked, Path(path).parent)}.npz"
    if not answer.exists():
        with tempfile.TemporaryDirectory(dir=answers) as name:
            question, written = Path(name) / "question.npz", answer.with_suffix(".unfinished.npz")
            np.savez(question, **asked)
            command = [python, path, question, written, *arguments]
            try:
                subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
            except (OSError, subprocess.CalledProcessError) as error:
                raise UserError(
                    f"{Path(path).name} did not run: {error}; --peers takes the python of an environment with "
                    f"{PEERS / 'requirements.txt'}"
                ) from error
            written.replace(answer)  # whole, or not at all
    with np.load(answer) as found:
        return [[split.product_ids[item] for item in row if item >= 0] for row in found["lists"]]


def _digest(asked: dict[str, np.ndarray], folder: Path) -> str:
    """Of a question, and of the scripts and requirements in the folder that answers it."""
    digest = hashlib.sha256()
    for name, array in asked.items():
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    for path in sorted(folder.glob("*.py")) + sorted(folder.glob("*.txt")):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
