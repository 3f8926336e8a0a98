"""Where items lie for the index: the same inner products, in coordinates in which a graph over the items serves the queries.

HNSW links each item to those that are near to it, and a search walks these links towards the query. So near has to mean what it
means to queries. In an item's own row it does not: a coordinate that queries weigh ten times as much as another counts as little
as that one between two items, and a few items that are many times as popular as the others lie far from everything, where links
to them get lost. Three things mend it, none of which changes an order:

- Rows are centred and stretched along the axes of the queries' second moment S, by a power of it, and queries shrunk by the
  inverse. By S^(1/2) distances are differences of scores; where that would draw a few popular items out too far, less is done.
- A last coordinate, which queries have at 0, gives all rows of a part one length: then the nearest is the best (Bachrach et al.,
  "Speeding up the Xbox recommender system using a Euclidean transformation for inner-product spaces", RecSys 2014).
- The longest rows, the popular items, are a part with an index of its own (Yan et al., "Norm-ranging LSH for maximum inner product
  search", NeurIPS 2018), and so are the products that nobody met yet, of which a list wants some in any case.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from store.vectors import OUTSTANDING, PARTS, UNTOUCHED, USUAL

STRETCHES = (0.5, 0.375, 0.25)  # powers of S, from all of the way to half of it; the first that keeps lengths alike
MOST_UNEQUAL = 2.5  # times the median are the OUTSTANDING still long
LEAST_SPREAD = (
    0.1  # of the mean eigenvalue of S, added to each: a direction that no query of the sample took is not flattened
)
OUTSTANDING_SHARE = 0.03  # of the items


class SearchSpace(nn.Module):
    """Maps rows of D dimensions and queries to the index, D + 1 dimensions. Fresh, it leaves rows as they are, all in one part.
    Saved and loaded like a model."""

    mean: Tensor
    stretch: Tensor
    shrink: Tensor
    lengths: Tensor
    outstanding_from: Tensor
    untouched: Tensor

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dimensions))
        self.register_buffer("stretch", torch.eye(dimensions))
        self.register_buffer("shrink", torch.eye(dimensions))
        self.register_buffer("lengths", torch.zeros(PARTS))  # of the rows of each part
        self.register_buffer("outstanding_from", torch.tensor(torch.finfo(torch.float32).max))  # this length on
        self.register_buffer("untouched", torch.tensor(-1))

    @property
    def dimensions(self) -> int:
        """In the index."""
        return len(self.mean) + 1

    @classmethod
    def fit(cls, rows: np.ndarray, queries: np.ndarray, untouched: int) -> SearchSpace:
        """For a catalogue's rows float32 [N, D], by a sample of queries [M, D] like those to come. `untouched` is the column of
        a row that is 1 where nobody met the item, -1 if there is none."""
        space = cls(rows.shape[1])
        spread, axes = np.linalg.eigh(queries.T.astype(np.float64) @ queries / len(queries))
        spread = np.maximum(spread, 0.0)
        spread = spread / spread.mean() + LEAST_SPREAD
        space.mean.copy_(torch.from_numpy(rows.mean(axis=0, dtype=np.float64)))
        space.untouched.fill_(untouched)
        for power in STRETCHES:
            space.stretch.copy_(torch.from_numpy(axes * spread**power @ axes.T))
            space.shrink.copy_(torch.from_numpy(axes / spread**power @ axes.T))
            length = np.linalg.norm(space._stretched(rows), axis=1)
            outstanding_from = np.quantile(length, 1.0 - OUTSTANDING_SHARE)
            if outstanding_from <= MOST_UNEQUAL * np.median(length):
                break
        space.outstanding_from.fill_(float(outstanding_from))
        part = space._parts(rows, length)
        space.lengths.copy_(torch.tensor([length[part == one].max(initial=0.0) for one in range(PARTS)]))
        return space

    def place(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where rows [n, D] go: float32 [n, D + 1], and the part of each, int [n]. A row that came after the fit and is longer than
        its part's gets no last coordinate: a little easier to find than it should be."""
        stretched = self._stretched(rows)
        square = np.square(stretched).sum(axis=1)
        part = self._parts(rows, np.sqrt(square))
        rest = np.sqrt(np.maximum(0.0, self.lengths.numpy()[part] ** 2 - square))
        return np.concatenate([stretched, rest[:, None]], axis=1).astype(np.float32), part

    def unmet(self, rows: np.ndarray) -> np.ndarray:
        """Which of the rows [n, D] are of items that nobody met, bool [n]."""
        column = int(self.untouched)
        return np.zeros(len(rows), dtype=bool) if column < 0 else rows[:, column] > 0

    def query(self, query: np.ndarray) -> np.ndarray:
        """A query [D] as the index takes it: float32 [D + 1]. Its products with placed rows are those with the rows themselves,
        less one number that is the same for all."""
        return np.append(query @ self.shrink.numpy(), np.float32(0.0)).astype(np.float32)

    def _stretched(self, rows: np.ndarray) -> np.ndarray:
        return (rows - self.mean.numpy()) @ self.stretch.numpy()

    def _parts(self, rows: np.ndarray, length: np.ndarray) -> np.ndarray:
        part = np.where(length >= float(self.outstanding_from), OUTSTANDING, USUAL)
        return np.where(self.unmet(rows), UNTOUCHED, part)
