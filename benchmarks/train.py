"""How fast each stage trains, beside the same work in other libraries. Writes docs/performance.json.

    python -m benchmarks.train                                       # beside deepctr-torch alone
    python -m benchmarks.train --peers .venv-peers/bin/python        # and the libraries of benchmarks/peers/requirements.txt
    python -m benchmarks.train --products 600 --batch-size 64 --lists 8 --no-write    # a short look

Ours are the scripts themselves, on the sample shop in a temporary folder. Both sides have as many threads, batches of one size and
vectors of one width. They do not do quite one and the same thing:

item tower   sentence-transformers has the same text encoder and the same titles, and a pair is a title and itself. Ours learns from
             token vectors that were made once and kept, reads attributes beside them, and never trains the encoder; theirs runs the
             encoder at each step. So the equal work is theirs with the encoder frozen, beside ours with the making of the vectors
             counted in.
user tower   SASRec learns in one pass over a sequence what comes next at each of its places, so one sequence has many targets. Ours
             reads a sequence for each target, since body, context, baskets and what was popular by then differ, and follows links
             beside. So both are given: sequences read in a second, and targets learned from.
reranker     deepctr-torch's `fit` has the same model and the same rows, made beforehand, and learns by binary cross-entropy. Ours
             makes the rows of each list at each step, and learns by a softmax over the list.

A figure is the median of REPEATS stretches of steps. On neither side count the first steps, and what lies between two epochs
(validation; ours also draws its batches and hard negatives there).
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from pydantic import Field
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.nn import functional as F

import extract_features
import train_reranker
import train_simcse
import train_user
from benchmarks import performance
from datasets import Source
from datasets.events import event_frame
from datasets.sample_shop import generate
from import_data import import_source
from model_reranker import deepfm_input
from results import commit
from settings import Settings, UserError, run_script
from store import Store
from tensors import distinct
from text_encoder import TITLE_TOKENS, TextEncoder, chosen

PEERS = Path(__file__).parent / "peers"
THREADS_OF_PEERS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
WARM_UP, REPEATS = 3, 5
PEER_STEPS = WARM_UP + 4 * REPEATS + 1  # at least; a step of a whole text encoder takes many seconds
ITEM_PASSES = 6  # over the catalogue, as `make demo` trains
HISTORY = 20  # events of a shopper, likewise
FEW_NEGATIVES = 128  # as many as the peer has in the tables of results
RERANKER_PASSES = 3
SELDOM = 3600.0  # seconds between checkpoints: the other side saves none
SHOPPERS, EVENTS = 2 / 3, 20  # for each product, as in the sample shop


class BenchmarkOptions(Settings):
    """How fast each stage trains, beside other libraries."""

    peers: Path | None = Field(
        None, description="python of the environment of benchmarks/peers/requirements.txt: measure these libraries too"
    )
    products: int = Field(
        3000, ge=100, le=1_000_000, description="of the sample shop; shoppers and events are in proportion"
    )
    batch_size: int = Field(256, ge=4, le=65_536, description="items or shoppers a step")
    lists: int = Field(32, ge=2, le=65_536, description="lists a step of the reranker")
    threads: int = Field(1, ge=1, le=1024, description="that each side computes with")
    write: bool = Field(True, description=f"write what was compared into {performance.FILE}")


@dataclass
class Steps:
    """When each step of a training began, and how much it worked on."""

    started: list[float] = field(default_factory=list)  # seconds
    epoch: list[int] = field(default_factory=list)
    amount: list[int] = field(default_factory=list)

    def note(self, epoch: int, amount: int) -> None:
        self.started.append(time.perf_counter())
        self.epoch.append(epoch)
        self.amount.append(amount)

    def rate(self) -> float:
        """Worked on in a second. The last step of an epoch does not count, since nothing says where it ended.

        Raises UserError when there are too few steps.
        """
        seconds, epoch, amount = np.diff(self.started), np.array(self.epoch), np.array(self.amount)
        counted = np.flatnonzero(epoch[1:] == epoch[:-1])
        counted = counted[counted >= WARM_UP]
        if len(counted) < REPEATS:
            raise UserError(f"{len(counted)} steps are too few to measure; raise --products or lower --batch-size")
        parts = np.array_split(counted, REPEATS)
        return float(np.median([amount[part].sum() / seconds[part].sum() for part in parts]))


@dataclass
class Training:
    """What a stage's script trained, as its call of `fit` says."""

    steps: Steps
    model: Any = None
    state: Any = None


@contextmanager
def clocked(stage: ModuleType) -> Iterator[Training]:
    """The one training that a stage's script does within; each of its steps is noted."""
    training, real = Training(Steps()), stage.fit

    def fit(
        model: nn.Module, batches: Callable[[int], Sequence[np.ndarray]], loss: Callable[[nn.Module, np.ndarray], Tensor],
        *others: Any, **more: Any,
    ) -> Any:  # fmt: skip
        training.model, training.state = model, more.get("state")
        current = 0

        def noted_batches(epoch: int) -> Sequence[np.ndarray]:
            nonlocal current
            current = epoch
            return batches(epoch)

        def noted_loss(wrapped: nn.Module, rows: np.ndarray) -> Tensor:
            training.steps.note(current, len(rows))
            return loss(wrapped, rows)

        return real(model, noted_batches, noted_loss, *others, **more)

    with patch.object(stage, "fit", fit):
        yield training


@dataclass(frozen=True)
class Comparison:
    metric: str
    ours: float  # a second
    theirs: float | None  # None where that library was not asked


class Bench:
    """The sample shop in a folder, and what each stage does with it."""

    def __init__(self, options: BenchmarkOptions, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.shared: dict[str, Any] = {
            "_env_file": None, "database_url": "", "data_dir": folder / "data", "models_dir": folder / "models",
            "text_encoder": chosen(options), "seed": options.seed,
        }  # fmt: skip
        shop = generate(
            products=options.products, shoppers=round(SHOPPERS * options.products), events=EVENTS * options.products
        )
        source = Source(schema=shop.schema, products=shop.products, users=shop.users, events=[event_frame(shop.events)])
        extraction = extract_features.ExtractOptions(**self.shared)
        with Store.open(extraction) as store:
            import_source(store, "sample", source)
        extract_features.main(extraction)

    def comparisons(self) -> Iterator[Comparison]:
        yield from self.item_tower()
        yield from self.user_tower(FEW_NEGATIVES, f"{FEW_NEGATIVES} negatives")
        yield from self.user_tower(self.options.products, "softmax over the catalogue")
        yield self.reranker()

    def item_tower(self) -> Iterator[Comparison]:
        options = train_simcse.SimcseOptions(
            **self.shared, epochs=ITEM_PASSES, patience=ITEM_PASSES, batch_size=self.options.batch_size, checkpoint_seconds=SELDOM
        )  # fmt: skip
        with Store.open(options) as store:
            titles = [product.title for product in store.products.read_features()]
        text_encoder = TextEncoder.load(options)
        started = time.perf_counter()
        text_encoder.cached_tokens(distinct(titles)[0])  # the script then reads them
        encoding = time.perf_counter() - started
        with clocked(train_simcse) as training:
            train_simcse.main(options)
        ours, worked_on = training.steps.rate(), ITEM_PASSES * len(titles)

        def theirs(variant: str) -> float | None:
            return ask_peer(
                self.options, self.folder, "train_sentence_transformers.py", variant, amounts=["items"],
                titles=titles, encoder=options.text_encoder,
                max_tokens=TITLE_TOKENS + 2,  # the first and the last are no words
                width=options.output, batch=options.batch_size, temperature=options.temperature,
                learning_rate=options.learning_rate, seed=options.seed, steps=PEER_STEPS,
            )[0]  # fmt: skip

        frozen = theirs("frozen")
        yield Comparison("item tower, items/s; sentence-transformers with the encoder frozen", ours, frozen)
        yield Comparison(
            f"item tower, items/s of {ITEM_PASSES} passes and the token vectors; sentence-transformers with the encoder frozen",
            worked_on / (worked_on / ours + encoding),
            frozen,
        )
        yield Comparison("item tower, items/s; sentence-transformers with the encoder trained", ours, theirs("whole"))

    def user_tower(self, negatives: int, competitors: str) -> Iterator[Comparison]:
        options = train_user.UserOptions(
            **self.shared, epochs=1, batch_size=self.options.batch_size, history=HISTORY, negatives=negatives, hard_share=0.0,
            refit=False, checkpoint_seconds=SELDOM,
        )  # fmt: skip
        with clocked(train_user) as training:
            train_user.main(options)
        ours = training.steps.rate()  # of sequences and of targets: each has its own
        config, histories = training.model.config, training.state.shop.histories
        order = np.argsort(histories.at, kind="stable")
        sequences, targets = ask_peer(
            self.options, self.folder, "train_rectools_sasrec.py", amounts=["sequences", "targets"],
            user=histories.user[order].astype(np.int64),
            item=histories.item[order].astype(np.int64), batch=options.batch_size, length=config.history, width=config.width,
            heads=config.heads, blocks=config.layers, dropout=config.dropout, learning_rate=options.learning_rate,
            negatives=negatives if negatives < self.options.products else 0, seed=options.seed, steps=PEER_STEPS,
        )  # fmt: skip
        yield Comparison(f"user tower, sequences/s, {competitors}; RecTools SASRec", ours, sequences)
        yield Comparison(f"user tower, targets/s, {competitors}; RecTools SASRec", ours, targets)

    def reranker(self) -> Comparison:
        options = train_reranker.RerankerOptions(
            **self.shared, epochs=RERANKER_PASSES, patience=RERANKER_PASSES, batch_size=self.options.lists, refit=False,
            checkpoint_seconds=SELDOM,
        )  # fmt: skip
        made: list[train_reranker.ListFeatures] = []
        real = train_reranker.replay

        def replay(*arguments: Any) -> Any:
            features, prices = real(*arguments)
            assert features is not None
            made.append(features)
            return features, prices

        with clocked(train_reranker) as training, patch.object(train_reranker, "replay", replay):
            train_reranker.main(options)
        rows_a_list = made[0].lists.positive.shape[1]
        theirs = deepctr_steps(training.model.deepfm, made[0], options.batch_size)
        return Comparison("reranker, rows/s; deepctr-torch's fit", training.steps.rate() * rows_a_list, theirs.rate())


def ask_peer(
    options: BenchmarkOptions, folder: Path, script: str, *arguments: str, amounts: Sequence[str], **question: Any
) -> list[float | None]:
    """What a library works on in a second, by each of the `amounts` that its answer counts; None without --peers.

    The script is told and answers by files in `folder`. Raises UserError when it fails.
    """
    if options.peers is None:
        return [None] * len(amounts)
    asked, answer = folder / "question.npz", folder / "answer.npz"
    np.savez(asked, **question)
    environment = {**os.environ, **dict.fromkeys(THREADS_OF_PEERS, str(options.threads))}
    environment.pop("PYTHONPATH", None)  # see train_sentence_transformers.py
    try:
        subprocess.run([options.peers, PEERS / script, asked, answer, *arguments], check=True, env=environment)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"{script} did not run: {error}; --peers takes the python of an environment with {PEERS / 'requirements.txt'}"
        ) from error
    with np.load(answer) as found:
        started, epoch = found["started"].tolist(), found["epoch"].tolist()
        return [Steps(started, epoch, found[amount].tolist()).rate() for amount in amounts]


def deepctr_steps(model: Any, features: train_reranker.ListFeatures, lists: int) -> Steps:
    """The steps of deepctr-torch's own `fit`, `lists` lists a step, on the rows of so many lists as `PEER_STEPS` take at most."""
    positive = features.lists.positive
    which = np.arange(min(len(positive), lists * PEER_STEPS))
    parts = [which[start : start + lists] for start in range(0, len(which), lists)]
    rows = torch.cat([deepfm_input(features.batch(part)) for part in parts]).numpy()
    answers = positive[which].ravel().astype(np.float32)
    # The last step of each epoch does not count.
    epochs = -(-PEER_STEPS // max(1, len(parts) - 1))
    steps = Steps()
    model.compile("adam", F.binary_cross_entropy_with_logits)
    hook = model.register_forward_pre_hook(
        lambda _, inputs: steps.note(len(steps.started) // len(parts), len(inputs[0]))
    )
    with contextlib.redirect_stdout(io.StringIO()):  # it says where it computes
        model.fit([rows], answers, batch_size=lists * positive.shape[1], epochs=epochs, verbose=0)
    hook.remove()
    return steps


def rows_of(comparisons: Sequence[Comparison], products: int, command: str) -> list[performance.Row]:
    """What was compared, for docs/performance.json: a library that was not asked leaves its rows as they are."""
    now = commit()
    return [
        performance.Row("train", products, one.metric, one.ours, one.theirs, one.ours / one.theirs, now, command)
        for one in comparisons
        if one.theirs is not None
    ]


def main(options: BenchmarkOptions) -> None:
    torch.set_num_threads(options.threads)
    with threadpool_limits(options.threads), tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)  # the embedded server of root runs as another user, who must get in
        comparisons = list(Bench(options, Path(name)).comparisons())
    print(
        f"{options.products:,} products; each side with threads: {options.threads}, items or shoppers a step: "
        f"{options.batch_size}, lists a step: {options.lists}"
    )
    for one in comparisons:
        beside = "not asked" if one.theirs is None else f"{one.theirs:,.0f}, ratio {one.ours / one.theirs:.2f}"
        print(f"{one.metric}: ours {one.ours:,.0f}, theirs {beside}")
    if options.write:
        # The place of another environment says nothing to a reader.
        peers = " --peers PYTHON" if options.peers else ""
        sizes = "".join(
            f" --{name.replace('_', '-')} {getattr(options, name)}"
            for name in ("products", "batch_size", "lists", "threads")
            if getattr(options, name) != BenchmarkOptions.model_fields[name].default
        )
        performance.save(rows_of(comparisons, options.products, f"python -m benchmarks.train{peers}{sizes}"))


if __name__ == "__main__":
    run_script(BenchmarkOptions, main)
