"""Item-kNN, by the library `implicit`: items met together, weighed by cosine (Sarwar et al., WWW 2001) or, as in text search, by
TF-IDF or BM25 of the matrix of shoppers and items. Asked, tuned and answering as tuning.py says.

Unlike item-kNN in baselines.py, which keeps every neighbour, an item has so many neighbours only: a shopper of few items may get a
list shorter than asked.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import scipy.sparse
from implicit.nearest_neighbours import BM25Recommender, CosineRecommender, TFIDFRecommender

from benchmarks.peers.tuning import Question, Stages, answer

MODELS = {"cosine": CosineRecommender, "tf-idf": TFIDFRecommender, "bm25": BM25Recommender}


@dataclass(frozen=True)
class Setting:
    weighting: str
    neighbours: int


TRIALS = [Setting(weighting, neighbours) for weighting in MODELS for neighbours in (100, 500)]


def fit(question: Question, setting: Setting) -> Stages:
    met = scipy.sparse.csr_matrix((np.ones(len(question.user)), (question.user, question.item)), shape=question.shape)
    met.data[:] = 1.0
    # One more: the library counts an item among its own neighbours.
    model = MODELS[setting.weighting](K=setting.neighbours + 1)
    model.fit(met, show_progress=False)

    def lists() -> np.ndarray:
        judged = question.judged
        found, _ = model.recommend(judged, met[judged], N=question.count, filter_already_liked_items=True)
        return found

    yield lists


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="implicit")  # it says each time that it converts a matrix of its own
    answer(TRIALS, fit)
