"""How fast sentence-transformers trains contrastively: SimCSE (Gao, Yao, Chen, EMNLP 2021) as its users write it.

    python train_sentence_transformers.py QUESTION.npz ANSWER.npz whole|frozen     # benchmarks/train.py --peers calls it so

Each title is its own positive, the two differing by dropout alone; MultipleNegativesRankingLoss over in-batch negatives; mean
pooling, then a dense layer to the item tower's width. `whole` trains the text encoder and the layer, `frozen` the layer alone;
the library then still runs the encoder at each step, since it keeps no vectors.

QUESTION: titles [N] of the items, the text encoder's folder, max_tokens of a title, width of a vector, batch of items, temperature,
learning_rate, seed, steps. ANSWER, of each step: started [K] in seconds, epoch [K], items [K].

Do not put the project's root on PYTHONPATH: the library imports a package `datasets`, as the project's folder is called.
"""

from __future__ import annotations

import sys
import tempfile
import time
from typing import Any

import numpy as np
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from transformers import TrainerCallback

from datasets import Dataset  # type: ignore[attr-defined]  # the package, see above


class Clock(TrainerCallback):
    """When each step began, and in which epoch."""

    def __init__(self) -> None:
        self.started: list[float] = []
        self.epoch: list[int] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.started.append(time.perf_counter())
        self.epoch.append(int(state.epoch))


def main() -> None:
    with np.load(sys.argv[1]) as found:
        question = {name: found[name].tolist() for name in found.files}
    encoder = Transformer(question["encoder"], max_seq_length=question["max_tokens"])
    encoder.requires_grad_(sys.argv[3] == "whole")
    width = encoder.get_embedding_dimension()
    model = SentenceTransformer(
        modules=[encoder, Pooling(width, "mean"), Dense(width, question["width"]), Normalize()], device="cpu"
    )
    # A last batch that is smaller would make steps unequal; the trainer runs until it has taken all of its steps.
    pairs = Dataset.from_dict({"anchor": question["titles"], "positive": question["titles"]})
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            folder, per_device_train_batch_size=question["batch"], dataloader_drop_last=True, max_steps=question["steps"],
            learning_rate=question["learning_rate"], seed=question["seed"], use_cpu=True, save_strategy="no",
            logging_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        SentenceTransformerTrainer(
            model, arguments, train_dataset=pairs, callbacks=[clock],
            loss=MultipleNegativesRankingLoss(model, scale=1.0 / question["temperature"]),
        ).train()  # fmt: skip
    items = np.full(len(clock.started), question["batch"])
    np.savez(sys.argv[2], started=clock.started, epoch=clock.epoch, items=items)


if __name__ == "__main__":
    main()
