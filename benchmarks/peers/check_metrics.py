"""metrics.py beside the metrics of RecTools (Tikhonovich et al., "RecTools", RecSys 2023), on random rankings.

    .venv-peers/bin/python -m benchmarks.peers.check_metrics     # in the root of the repository; ends with 1 when one differs

Where the definitions differ, what makes them one:

- NDCG: RecTools divides by the ideal of k places; ours, and its `divide_by_achievable=True`, by that of min(targets, k).
- MRR: theirs is cut at a k; ours is theirs at 100.
- Recall: a mean over shoppers. Ours over targets is theirs weighted by each shopper's targets.
- MeanInvUserFreq (novelty): an item nobody met counts as met by one shopper. Ours adds a shopper who met every item; given such a
  shopper among the interactions, theirs is the same.
- IntraListDiversity has no cosine of its own, so it is given one; it counts a list of one as 0, ours leaves it out.
- CatalogCoverage counts items; `normalize=True` makes it a share.
- Debiasing: RecTools can drop targets that are popular beyond measure; ours has no such thing, and theirs is off by default.
- AvgRecPopularity is a mean of counts, ours of percentiles: not comparable.
"""

import sys

import numpy as np
import pandas as pd
import scipy.sparse
from rectools import Columns
from rectools.metrics import MRR, NDCG, CatalogCoverage, HitRate, IntraListDiversity, MeanInvUserFreq, Recall
from rectools.metrics.distances import PairwiseDistanceCalculator

from metrics import HISTORIES, NDCG_AT, RECALL_AT, RETRIEVED, TOP, Catalogue, coverage, figures, measure

ITEMS, SHOPPERS, WORDS = 1000, 200, 40
LARGEST_DIFFERENCE = 1e-9


class Cosine(PairwiseDistanceCalculator):
    """1 - cosine of the rows of `content` [N, W], rows of length 1."""

    def __init__(self, content: np.ndarray) -> None:
        self.content = content

    def _get_distances_for_item_pairs(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return 1.0 - (self.content[list(first)] * self.content[list(second)]).sum(1)


def table(rows: list[list[int]]) -> pd.DataFrame:
    """Of each shopper's items in order, RecTools' table of user, item and rank."""
    triples = [(user, item, rank) for user, own in enumerate(rows) for rank, item in enumerate(own, start=1)]
    return pd.DataFrame(triples, columns=[Columns.User, Columns.Item, Columns.Rank])


def main() -> None:
    random = np.random.default_rng(0)
    wanted = 1.0 / np.arange(1, ITEMS + 1)  # as in a shop: few items are most of the trade, and some are cold
    wanted /= wanted.sum()

    def drawn(least: int, most: int) -> list[list[int]]:
        return [
            random.choice(ITEMS, random.integers(least, most + 1), replace=False, p=wanted).tolist()
            for _ in range(SHOPPERS)
        ]

    lists, targets, met = drawn(2, 150), drawn(1, 30), drawn(0, 15)
    history = np.array([len(own) for own in met])
    content = random.random((ITEMS, WORDS))
    content /= np.linalg.norm(content, axis=1, keepdims=True)
    met_by = np.bincount([item for own in met for item in own], minlength=ITEMS)
    ids = [str(item) for item in range(ITEMS)]
    catalogue = Catalogue(ids, met_by, met_by, int((history > 0).sum()), scipy.sparse.csr_matrix(content))
    ours_lists = [[ids[item] for item in own] for own in lists]
    ratios = measure(ours_lists, [[ids[item] for item in own] for own in targets], history, catalogue)
    ours = {(figure.metric, figure.slice): figure.value for figure in figures(ratios)}
    ours[f"coverage@{TOP}", "all"] = coverage(ours_lists, catalogue).value

    reco, taken = table(lists), table(targets)[Columns.UserItem]
    before = table([*met, list(range(ITEMS))])[Columns.UserItem]  # the last has met every item
    counts = np.array([len(own) for own in targets])
    theirs = {(f"recall@{k}", "all"): Recall(k).calc(reco, taken) for k in RECALL_AT}
    ndcg = {k: NDCG(k, divide_by_achievable=True).calc_per_user(reco, taken).sort_index().to_numpy() for k in NDCG_AT}
    recall = Recall(RETRIEVED).calc_per_user(reco, taken).sort_index().to_numpy()
    slices = {"all": (0.0, np.inf), **HISTORIES}
    for name, (least, most) in slices.items():
        part = (least <= history) & (history <= most)
        if part.any():
            theirs[f"recall@{RETRIEVED}", name] = (recall * counts)[part].sum() / counts[part].sum()
            theirs |= {(f"ndcg@{k}", name): values[part].mean() for k, values in ndcg.items()}
    warm = taken[taken[Columns.Item].isin(np.flatnonzero(met_by))]
    for name, part in (("warm", warm), ("cold", taken.drop(warm.index))):
        sizes = part.groupby(Columns.User).size()
        theirs[f"recall@{RETRIEVED}", name] = (Recall(RETRIEVED).calc_per_user(reco, part) * sizes).sum() / sizes.sum()
    theirs["mrr", "all"] = MRR(RETRIEVED).calc(reco, taken)
    theirs[f"hit@{TOP}", "all"] = HitRate(TOP).calc(reco, taken)
    theirs[f"novelty@{TOP}", "all"] = MeanInvUserFreq(TOP).calc(reco, before)
    theirs[f"diversity@{TOP}", "all"] = IntraListDiversity(TOP, Cosine(content)).calc(reco)
    theirs[f"coverage@{TOP}", "all"] = CatalogCoverage(TOP, normalize=True).calc(reco, ids)

    differing = 0
    for key in ours:
        if key not in theirs:
            print(f"{key[0]:14s} {key[1]:12s} {ours[key]:.12f} not in RecTools")
            continue
        differs = not abs(ours[key] - theirs[key]) <= LARGEST_DIFFERENCE
        differing += differs
        print(f"{key[0]:14s} {key[1]:12s} {ours[key]:.12f} {theirs[key]:.12f}{' DIFFERS' if differs else ''}")
    sys.exit(1 if differing or theirs.keys() - ours.keys() else 0)


if __name__ == "__main__":
    main()
