"""Implicit ALS, by the library `implicit` (Hu, Koren and Volinsky, "Collaborative filtering for implicit feedback datasets",
ICDM 2008). Asked, tuned and answering as tuning.py says."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse
from implicit.als import AlternatingLeastSquares

from benchmarks.peers.tuning import SEED, Question, Stages, answer


@dataclass(frozen=True)
class Setting:
    factors: int
    regularisation: float
    alpha: float  # weight of a meeting against none


TRIALS = [
    Setting(64, 0.1, 10.0),  # of the published line on these splits
    Setting(64, 0.1, 40.0),
    Setting(64, 10.0, 10.0),
    Setting(128, 0.1, 10.0),
    Setting(256, 0.1, 10.0),
    Setting(256, 0.1, 40.0),
]


def fit(question: Question, setting: Setting) -> Stages:
    ones = np.ones(len(question.user), dtype=np.float32)
    met = scipy.sparse.csr_matrix((ones, (question.user, question.item)), shape=question.shape)
    met.data[:] = 1.0
    model = AlternatingLeastSquares(
        factors=setting.factors, regularization=setting.regularisation, alpha=setting.alpha, iterations=15,
        random_state=SEED, use_gpu=False,
    )  # fmt: skip
    model.fit(met, show_progress=False)

    def lists() -> np.ndarray:
        judged = question.judged
        found, scores = model.recommend(judged, met[judged], N=question.count, filter_already_liked_items=True)
        # The library fills up with items that were met, at the lowest score there is.
        return np.where(scores > np.finfo(np.float32).min, found, -1)

    yield lists


if __name__ == "__main__":
    answer(TRIALS, fit)
