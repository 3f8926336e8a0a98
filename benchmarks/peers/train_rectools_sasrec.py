"""How fast RecTools trains SASRec (Kang and McAuley, ICDM 2018), of the user tower's size.

    python train_rectools_sasrec.py QUESTION.npz ANSWER.npz     # benchmarks/train.py --peers calls it so

QUESTION: events user [E] and item [E] in time order; batch of sequences; length of a sequence, width, heads, blocks, dropout,
learning_rate, seed; negatives of a target, 0 for the softmax over the whole catalogue; steps. ANSWER, of each step: started [K] in
seconds, epoch [K], sequences [K] and targets [K], which are the places of these sequences that a next item is learned for.
"""

from __future__ import annotations

import logging
import math
import sys
import time
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytorch_lightning
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel
from rectools.models.nn.transformers.sasrec import SASRecTransformerLayers


class Clock(pytorch_lightning.Callback):
    """When each step began, in which epoch, and what it worked on."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, int, int, int]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, number: int) -> None:
        started = time.perf_counter()
        self.rows.append((started, trainer.current_epoch, len(batch["y"]), int((batch["y"] != 0).sum())))


def main() -> None:
    with np.load(sys.argv[1]) as found:
        arrays = {name: found[name] for name in ("user", "item")}
        question = {name: found[name].item() for name in found.files if found[name].ndim == 0}
    moments = pd.to_datetime(np.arange(len(arrays["user"])), unit="s")  # nothing but the order is read
    events = pd.DataFrame(
        {Columns.User: arrays["user"], Columns.Item: arrays["item"], Columns.Weight: 1.0, Columns.Datetime: moments}
    )
    sequences = int((np.bincount(arrays["user"]) > 1).sum())
    epochs = math.ceil(question["steps"] / math.ceil(sequences / question["batch"]))

    def trainer() -> pytorch_lightning.Trainer:
        return pytorch_lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", callbacks=[Clock()], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip

    pytorch_lightning.seed_everything(question["seed"], verbose=False)
    negatives = question["negatives"]
    model = SASRecModel(
        n_blocks=question["blocks"], n_heads=question["heads"], n_factors=question["width"],
        dropout_rate=question["dropout"], session_max_len=question["length"], batch_size=question["batch"],
        lr=question["learning_rate"], loss="sampled_softmax" if negatives else "softmax", n_negatives=negatives or 1,
        transformer_layers_type=SASRecTransformerLayers, get_trainer_func=trainer,
    )  # fmt: skip
    model.fit(Dataset.construct(events))
    clock = next(one for one in model.fit_trainer.callbacks if isinstance(one, Clock))  # the library made a copy
    started, epoch, users, targets = map(np.array, zip(*clock.rows, strict=True))
    np.savez(sys.argv[2], started=started, epoch=epoch, sequences=users, targets=targets)


if __name__ == "__main__":
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)  # its advice about hardware
    for module in ("pytorch_lightning", "rectools", "pydantic"):
        warnings.filterwarnings("ignore", module=module)
    main()
