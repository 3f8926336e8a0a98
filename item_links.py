"""Links from item to item: what the same shoppers took together, and the variants (colours, sizes) of one product.

A model of vectors squeezes such pairs into a few dimensions and loses the rare ones; a table just remembers them. It is the wide
part beside the user tower's deep one (Cheng et al., "Wide & Deep Learning for Recommender Systems", DLRS 2016); each pair weighs
as in item-to-item filtering (Linden, Smith and York, IEEE Internet Computing 2003): shoppers who took both, damped by how
many took each, so that two best sellers are no pair yet and neither is a coincidence.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse

from tensors import Histories, from_behind, ranges

# Links kept of an item, the strongest. A history of thirty items reaches well over a thousand others through them.
MOST_LINKS = 50
# Distinct items read of one shopper, the latest: robots and resellers pair everything with everything.
MOST_OF_A_SHOPPER = 100
# Added to an item's shoppers: what two or three people took together by chance must not outweigh what hundreds did.
SHRINKAGE = 3.0
ITEMS_AT_ONCE = 4096  # rows of the table in the making


@dataclass(frozen=True)
class ItemLinks:
    """Links among N items."""

    together: (
        scipy.sparse.csr_matrix
    )  # float32 [N, N], shoppers who took both, damped; at most MOST_LINKS a row, none with itself
    damping: np.ndarray  # float32 [N], 1 / sqrt(shoppers + SHRINKAGE)
    group: np.ndarray  # int64 [N], number of the item's product; an item without variants is alone in its own

    @classmethod
    def build(cls, user: np.ndarray, item: np.ndarray, group: np.ndarray) -> ItemLinks:
        """From events in time order within each shopper: `user` and `item` int [E]. `group` int [N] also says how many items
        there are."""
        items = len(group)
        user, item = _latest(user, item, items)
        users = int(user.max(initial=-1)) + 1
        met = scipy.sparse.csr_matrix((np.ones(len(item), dtype=np.float32), (user, item)), shape=(users, items))
        met_by = met.T.tocsr()
        damping = (1.0 / np.sqrt(np.asarray(met.sum(0)).ravel() + SHRINKAGE)).astype(np.float32)
        blocks = []
        for start in range(0, items, ITEMS_AT_ONCE):
            part = slice(start, start + ITEMS_AT_ONCE)
            block = (met_by[part] @ met).tocoo()
            block.data *= damping[part][block.row] * damping[block.col]
            blocks.append(_strongest(block, start))
        return cls(scipy.sparse.vstack(blocks, format="csr", dtype=np.float32), damping, group)

    @classmethod
    def before(cls, histories: Histories, moment: float, group: np.ndarray) -> ItemLinks:
        """From what shoppers did before that moment (epoch seconds), skips aside."""
        counted = (histories.at < moment) & (histories.worth > 0)
        return cls.build(histories.user[counted], histories.item[counted], group)

    def scores(
        self, history: np.ndarray, mask: np.ndarray, candidates: np.ndarray, targets: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """How strongly what a shopper met is linked to each candidate.

        history int [B, T] and mask bool [B, T]; candidates int [C], distinct. Returns float32 [B, C] each: the sum of
        `together` over the distinct items of the history, and 1 where a variant of one of them is meant that is not in the
        history itself.

        targets int [B], in training: columns of `candidates` that the shopper of the row did take. Their own taking is left
        out of the count, or each example would find its answer written in the table.
        """
        met = scipy.sparse.csr_matrix(
            (np.ones(mask.sum(), dtype=np.float32), history[mask], np.append(0, np.cumsum(mask.sum(1)))),
            shape=(len(history), len(self.group)),
        )
        met.sum_duplicates()
        met.data[:] = 1.0
        row = np.repeat(np.arange(len(history)), np.diff(met.indptr))
        column_of = np.full(len(self.group), -1)
        column_of[candidates] = np.arange(len(candidates))

        linked = met @ self.together
        column = column_of[linked.indices]
        found = column >= 0
        together = np.zeros((len(history), len(candidates)), dtype=np.float32)
        together[np.repeat(np.arange(len(history)), np.diff(linked.indptr))[found], column[found]] = linked.data[found]
        if targets is not None:
            target = candidates[targets[row]]
            written = np.asarray(self.together[met.indices, target]).ravel()
            own = np.minimum(written, self.damping[met.indices] * self.damping[target])
            np.subtract.at(together, (row, targets[row]), own)

        by_group = np.argsort(self.group[candidates], kind="stable")
        groups = self.group[candidates][by_group]
        first, stop = (np.searchsorted(groups, self.group[met.indices], side) for side in ("left", "right"))
        count = stop - first  # variants among the candidates of each item met
        variant = np.zeros_like(together)
        variant[np.repeat(row, count), by_group[ranges(first, count)]] = 1.0
        met_column = column_of[met.indices]
        variant[row[met_column >= 0], met_column[met_column >= 0]] = 0.0
        return np.maximum(together, 0.0), variant

    @cached_property
    def _drawn_from(self) -> np.ndarray:
        """Sums of the strengths before each link, and of all: float64 [links + 1]."""
        return np.concatenate([[0.0], np.cumsum(self.together.data, dtype=np.float64)])

    def draw(self, items: np.ndarray, place: np.ndarray) -> np.ndarray:
        """Of each of `items` int [B] an item that it was taken together with, by the links' strength, or itself if there is none:
        int64 [B]. place: [B], uniform in [0, 1)."""
        table, total = self.together, self._drawn_from
        start, stop = table.indptr[items], table.indptr[items + 1]
        drawn = np.searchsorted(total, total[start] + place * (total[stop] - total[start]), side="right") - 1
        linked = stop > start
        other = items.astype(np.int64)
        other[linked] = table.indices[np.clip(drawn, start, stop - 1)[linked]]
        return other

    def of(self, item: int) -> tuple[np.ndarray, np.ndarray]:
        """The items that one was taken together with, and how strongly: int [K], float32 [K], K at most MOST_LINKS."""
        row = slice(self.together.indptr[item], self.together.indptr[item + 1])
        return self.together.indices[row], self.together.data[row]


def group_numbers(group_ids: list[str | None]) -> np.ndarray:
    """int64 [N]: one number a product with variants; who has no group id is alone in a group."""
    names = [f"\x00{row}" if group_id is None else group_id for row, group_id in enumerate(group_ids)]
    return np.unique(names, return_inverse=True)[1].astype(np.int64)


def _latest(user: np.ndarray, item: np.ndarray, items: int) -> tuple[np.ndarray, np.ndarray]:
    """The distinct pairs, of each shopper the MOST_OF_A_SHOPPER whose last event is latest."""
    pair = user.astype(np.int64) * max(1, items) + item
    _, last_from_behind = np.unique(pair[::-1], return_index=True)
    last = np.sort(len(pair) - 1 - last_from_behind)  # events that are the last on their pair, in time order
    user, item = user[last], item[last]
    order = np.argsort(user, kind="stable")
    user, item = user[order], item[order]
    kept = from_behind(user) <= MOST_OF_A_SHOPPER
    return user[kept], item[kept]


def _strongest(block: scipy.sparse.coo_matrix, first: int) -> scipy.sparse.csr_matrix:
    """Rows `first`, `first` + 1, ... of the table, without links to themselves, cut to MOST_LINKS each."""
    other = block.row + first != block.col
    row, column, value = block.row[other], block.col[other], block.data[other]
    order = np.lexsort((column, -value, row))
    row, column, value = row[order], column[order], value[order]
    kept = np.arange(len(row)) - np.searchsorted(row, row) < MOST_LINKS
    return scipy.sparse.csr_matrix((value[kept], (row[kept], column[kept])), shape=block.shape)
