"""Implicit ALS, by the library `implicit` (Hu, Koren and Volinsky, "Collaborative filtering for implicit feedback datasets",
ICDM 2008).

    python implicit_als.py QUESTION.npz ANSWER.npz     # evaluate.py --peers calls it so

QUESTION: `user`, `item` int64 [E], the training events in time order; `shape` (shoppers, items); `judged` int64 [J], shoppers to
answer for; `count`. ANSWER: `lists` int64 [J, count], items that the shopper had not met, best first, -1 where there are no more.
"""

import sys

import numpy as np
import scipy.sparse
from implicit.als import AlternatingLeastSquares

question = np.load(sys.argv[1])
met = scipy.sparse.csr_matrix(
    (np.ones(len(question["user"]), dtype=np.float32), (question["user"], question["item"])), shape=question["shape"]
)
met.data[:] = 1.0
# The settings of the published line on these splits; they were not tuned.
model = AlternatingLeastSquares(factors=64, regularization=0.1, alpha=10, iterations=15, random_state=0, use_gpu=False)
model.fit(met)
judged = question["judged"]
lists, scores = model.recommend(judged, met[judged], N=int(question["count"]), filter_already_liked_items=True)
# The library fills up with items that were met, at the lowest score there is.
np.savez(sys.argv[2], lists=np.where(scores > np.finfo(np.float32).min, lists, -1).astype(np.int64))
