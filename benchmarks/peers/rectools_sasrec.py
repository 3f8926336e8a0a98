"""SASRec by the library RecTools. Asked, tuned and answering as tuning.py says; the argument is the variant.

sasrec              SASRec's own layers (Kang and McAuley, ICDM 2018), trained by sampled softmax
esasrec             LiGR layers and the same loss: eSASRec (Tikhonovich et al., RecSys 2025, arXiv:2508.06450)
esasrec-attributes  the same, an item's embedding being the sum of its own and of its attributes' (`CatFeaturesItemNet`)

Fixed are the values that its authors found for Amazon Beauty (one block, one head, 64 factors, learning rate .001), with what two
cores can do: 128 negatives, the lower end of their grid, and sequences no longer than nearly all are. RecTools 0.19 offers no item
net for text, and recommends no item that nobody took in training.
"""

from __future__ import annotations

import logging
import sys
import warnings
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytorch_lightning
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel
from rectools.models.nn.item_net import CatFeaturesItemNet, IdEmbeddingsItemNet
from rectools.models.nn.transformers.ligr import LiGRLayers
from rectools.models.nn.transformers.sasrec import SASRecTransformerLayers

from benchmarks.peers.tuning import SEED, Question, Stages, answer

NEGATIVES = 128  # a step's time grows with them
BATCH = 64  # shoppers a step
LONGEST = 50  # of a sequence
WHOLE = 0.95  # share of the shoppers whose sequence must fit: a step's time grows with its length, used or not
STEPS = 7_000  # of a training at most: 20 passes over Beauty's 22,363 shoppers
PASSES = 40  # at most, where a pass has few steps
STAGES = 5  # at the end of each, recall decides whether to go on


@dataclass(frozen=True)
class Setting:
    dropout: float
    factors: int


# Three only: a trial is a whole training.
TRIALS = [Setting(0.2, 64), Setting(0.5, 64), Setting(0.5, 128)]


def fit(question: Question, setting: Setting) -> Stages:
    variant = sys.argv[3]
    dataset = _dataset(question, with_attributes=variant == "esasrec-attributes")
    lengths = np.bincount(question.user)
    sequences = lengths[lengths > 1]  # of one event there is no next to learn from
    if len(sequences) == 0:
        sys.exit("SASRec learns what comes next, and no shopper has two events")
    passes = min(PASSES, max(STAGES, round(STEPS * BATCH / len(sequences))))
    ligr = variant.startswith("esasrec")
    pytorch_lightning.seed_everything(SEED, verbose=False)
    model = SASRecModel(
        n_blocks=1, n_heads=1, n_factors=setting.factors, dropout_rate=setting.dropout, lr=0.001, batch_size=BATCH,
        loss="sampled_softmax", n_negatives=NEGATIVES,
        session_max_len=int(min(LONGEST, np.quantile(sequences, WHOLE, method="higher"))),
        transformer_layers_type=LiGRLayers if ligr else SASRecTransformerLayers, use_key_padding_mask=ligr,
        item_net_block_types=(IdEmbeddingsItemNet, CatFeaturesItemNet)[: 1 + (variant == "esasrec-attributes")],
        recommend_torch_device="cpu",
    )  # fmt: skip

    order = np.argsort(question.judged)

    def lists() -> np.ndarray:
        found = model.recommend(
            question.judged, dataset, k=question.count, filter_viewed=True, on_unsupported_targets="ignore"
        )
        row = np.searchsorted(question.judged[order], found[Columns.User])
        table = np.full((len(question.judged), question.count), -1)
        table[order[row], found[Columns.Rank] - 1] = found[Columns.Item]
        return table

    for stage in np.diff(np.linspace(0, passes, STAGES + 1).round().astype(int)).tolist():
        model.fit_partial(dataset, min_epochs=stage, max_epochs=stage)
        yield lists


def _dataset(question: Question, with_attributes: bool) -> Dataset:
    # Their place in the question as time: nothing but the order is read, and no two events are at one moment.
    moments = pd.to_datetime(np.arange(len(question.user)), unit="s")
    events = pd.DataFrame(
        {Columns.User: question.user, Columns.Item: question.item, Columns.Weight: 1.0, Columns.Datetime: moments}
    )
    if not with_attributes:
        return Dataset.construct(events)
    taken = np.isin(question.attribute_item, question.item)  # the library has no place for other items
    features = pd.DataFrame(
        {"id": question.attribute_item[taken], "feature": "attribute", "value": question.attribute[taken]}
    )
    return Dataset.construct(events, item_features_df=features, cat_item_features=["attribute"])


if __name__ == "__main__":
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)  # its advice about hardware, once a stage
    for module in ("pytorch_lightning", "rectools", "pydantic"):  # and about the inner life of RecTools, as often
        warnings.filterwarnings("ignore", module=module)
    answer(TRIALS, fit)
