"""The training loop: killed runs continue exactly, diverging ones stop in time, and two processes learn what one does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from pytorch_metric_learning.losses import SupConLoss
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F

import train_simcse
from catalog import FeatureSchema, Product, RawProduct
from release import RERANKER, USER_TOWER, Release
from settings import UserError
from tests.serving import ROOT, environment_of
from tests.tiny import tiny_text_encoder
from train_simcse import SimcseOptions, gather_views, nt_xent
from training import FitReport, TrainOptions, check_checkpoint, fit, shuffled_batches

EXAMPLES = np.arange(12)
INPUTS = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
ANSWERS = INPUTS.sum(1, keepdim=True)
STEPS = 3  # of an epoch

Loss = Callable[[nn.Module, np.ndarray], Tensor]


def options(**changes: Any) -> TrainOptions:
    given = {"epochs": 3, "batch_size": 4, "warmup_steps": 2, "checkpoint_seconds": 0, **changes}
    return TrainOptions(_env_file=None, **given)


def network(width: int = 8) -> nn.Module:
    """With dropout: without the same random numbers a continued run ends elsewhere."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, width), nn.Dropout(0.5), nn.Linear(width, 1))


def first_weight(model: nn.Module) -> Tensor:
    return next(model.parameters())


def squared_error(model: nn.Module, rows: np.ndarray) -> Tensor:
    return F.mse_loss(model(INPUTS[rows]), ANSWERS[rows])


def validate(model: nn.Module) -> dict[str, float]:
    return {"accuracy": -squared_error(model, EXAMPLES).item()}


def train(
    folder: Path, loss: Loss = squared_error, model: nn.Module | None = None, judge: Any = validate, **changes: Any
):
    given = options(**changes)
    trained = network() if model is None else model
    report = fit(
        trained, lambda epoch: shuffled_batches(EXAMPLES, given.batch_size, given.seed, epoch), loss, judge, "accuracy",
        given, folder, "tiny",
    )  # fmt: skip
    return trained, report


class KilledError(BaseException):
    pass


def killed() -> None:
    raise KilledError


def failing(step: int, fail: Callable[[], Any]) -> Loss:
    """The loss, but its call number `step`, counted from 1, is `fail`'s."""
    calls = count(1)
    return lambda model, rows: fail() if next(calls) == step else squared_error(model, rows)


def assert_same_run(ours: tuple[nn.Module, FitReport], expected: tuple[nn.Module, FitReport]) -> None:
    (model, report), (expected_model, expected_report) = ours, expected
    for name, weight in expected_model.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    assert {**vars(report), "seconds": 0} == {**vars(expected_report), "seconds": 0}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, FitReport]:
    return train(tmp_path_factory.mktemp("uninterrupted"))


# --------------------------------------------------------------------------------------------------------- exact resume
@pytest.mark.parametrize(
    ("steps", "checkpoint_seconds"),
    [
        ([2], 0),
        ([STEPS + 1], 0),  # between two epochs
        ([2, 2, 3], 0),  # again and again
        ([STEPS + 2], 3600),  # long after the last checkpoint
    ],
)
def test_a_run_killed_and_run_again_ends_like_an_uninterrupted_one(tmp_path, uninterrupted, steps, checkpoint_seconds):
    for step in steps:
        with pytest.raises(KilledError):
            train(tmp_path, failing(step, killed), checkpoint_seconds=checkpoint_seconds)
    assert_same_run(train(tmp_path, checkpoint_seconds=checkpoint_seconds), uninterrupted)


def die(folder: Path) -> None:
    train(folder, failing(STEPS + 2, lambda: os.kill(os.getpid(), signal.SIGKILL)))


def test_a_process_killed_without_warning_continues_too(tmp_path, uninterrupted):
    process = multiprocessing.get_context("spawn").Process(target=die, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    seen: list[int] = []

    def counted(model: nn.Module, rows: np.ndarray) -> Tensor:
        seen.append(len(rows))
        return squared_error(model, rows)

    assert_same_run(train(tmp_path, counted), uninterrupted)
    assert len(seen) == 2 * STEPS - 1  # what was done is not done again


def test_a_finished_run_is_not_run_again(tmp_path, uninterrupted):
    train(tmp_path)
    assert_same_run(train(tmp_path, failing(1, killed)), uninterrupted)


# -------------------------------------------------------------------------------------------------- checkpoints refused
def interrupt(folder: Path) -> Path:
    with pytest.raises(KilledError):
        train(folder, failing(STEPS + 2, killed))
    return folder / "tiny.checkpoint.pt"


def test_a_checkpoint_of_other_options_is_refused_and_fresh_starts_over(tmp_path, uninterrupted):
    checkpoint = interrupt(tmp_path)
    before = checkpoint.read_bytes()
    with pytest.raises(UserError, match=r"tiny\.checkpoint\.pt .*other options.*--fresh"):
        train(tmp_path, learning_rate=1e-4)
    assert checkpoint.read_bytes() == before
    # Whoever asks beforehand hears the same, and what random numbers follow is as if nobody had asked.
    state = torch.get_rng_state()
    with pytest.raises(UserError, match=r"tiny\.checkpoint\.pt .*other options.*--fresh"):
        check_checkpoint(options(learning_rate=1e-4), tmp_path, "tiny")
    check_checkpoint(options(learning_rate=1e-4, fresh=True), tmp_path, "tiny")
    check_checkpoint(options(learning_rate=1e-4), tmp_path / "nowhere", "tiny")
    check_checkpoint(options(), tmp_path, "tiny")
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_run(train(tmp_path, fresh=True), uninterrupted)


def damaged(content: bytes) -> Iterator[bytes]:
    yield b""
    yield b"not a checkpoint"
    yield content[: len(content) // 2]


def test_a_damaged_checkpoint_is_refused(tmp_path):
    checkpoint = interrupt(tmp_path)
    for content in damaged(checkpoint.read_bytes()):
        checkpoint.write_bytes(content)
        with pytest.raises(UserError, match=r"tiny\.checkpoint\.pt cannot be continued.*--fresh"):
            train(tmp_path)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    """The options are the same, but the catalogue grew since, and with it the model's tables."""
    interrupt(tmp_path)
    with pytest.raises(UserError, match=r"tiny\.checkpoint\.pt cannot be continued.*--fresh"):
        train(tmp_path, model=network(width=9))


# ------------------------------------------------------------------------------------------------------------ divergence
def not_a_number() -> Tensor:
    return torch.tensor(float("nan"), requires_grad=True)


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(tmp_path, uninterrupted):
    with pytest.raises(UserError, match=r"tiny: the loss became nan .*epoch 2, step 1;.*--learning-rate.*--fresh"):
        train(tmp_path, failing(STEPS + 1, not_a_number))
    # Nothing of it was kept: if it was an accident, the same command ends as if it had not happened.
    assert_same_run(train(tmp_path), uninterrupted)


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path, uninterrupted):
    def loss(model: nn.Module, rows: np.ndarray) -> Tensor:
        return (first_weight(model) * 0).sum().sqrt()  # 0, but infinitely steep

    with pytest.raises(UserError, match=r"tiny: the loss became 0\.0 .*gradient.*nan.*epoch 1, step 1"):
        train(tmp_path, loss)
    assert_same_run(train(tmp_path), uninterrupted)


# -------------------------------------------------------------------------------------- early stopping, curves, best one
def scripted(accuracies: list[float], weights: list[Tensor]) -> Callable[[nn.Module], dict[str, float]]:
    """Validation that says these, one an epoch, and notes the weights it saw."""

    def judge(model: nn.Module) -> dict[str, float]:
        weights.append(first_weight(model).detach().clone())
        return {"accuracy": accuracies[len(weights) - 1]}

    return judge


def test_training_stops_after_patience_epochs_and_keeps_the_best_weights(tmp_path):
    weights: list[Tensor] = []
    accuracies = [0.1, 0.3, 0.2, 0.5, 0.5, 0.4, 0.9]  # of the untrained model, then of each epoch
    model, report = train(tmp_path, judge=scripted(accuracies, weights), epochs=6, patience=2)
    assert (report.epochs, report.best_epoch, report.best) == (5, 3, 0.5)
    assert [row["accuracy"] for row in report.history] == accuracies[:6]
    assert torch.equal(first_weight(model), weights[3])
    assert not torch.equal(weights[3], weights[5])


def test_a_model_that_training_only_harms_stays_as_it_was(tmp_path):
    weights: list[Tensor] = []
    model, report = train(tmp_path, judge=scripted([0.9, float("nan"), 0.1], weights), patience=2)
    assert (report.epochs, report.best_epoch, report.best) == (2, 0, 0.9)
    assert torch.equal(first_weight(model), weights[0])


def test_curves_are_written_as_png_and_for_tensorboard(tmp_path):
    _, report = train(tmp_path)
    assert (tmp_path / "tiny.png").read_bytes().startswith(b"\x89PNG")
    written = EventAccumulator(str(tmp_path / "tensorboard" / "tiny")).Reload()
    points = [(event.step, event.value) for event in written.Scalars("tiny/accuracy")]
    assert points == [(row["step"], pytest.approx(row["accuracy"])) for row in report.history]
    assert len(written.Scalars("tiny/loss")) == 3


# --------------------------------------------------------------------------------------------------- several processes
def contrastive_step(folder: Path) -> dict[str, Any]:
    """One step of NT-Xent over all twelve items, three of them one product: the loss, and the gradient it left."""
    torch.manual_seed(2)
    model = nn.Linear(4, 3).double()
    views = torch.randn(2, 12, 4, dtype=torch.float64)
    groups = torch.tensor([0, 0, 0, *range(1, 10)])

    def loss(wrapped: nn.Module, rows: np.ndarray) -> Tensor:
        embedded = F.normalize(wrapped(views[:, rows].flatten(0, 1)), dim=-1)
        return nt_xent(*gather_views(embedded, groups[rows].repeat(2)), SupConLoss(temperature=2.0))

    report = fit(
        model, lambda epoch: [EXAMPLES], loss, lambda model: {"accuracy": 0.0}, "accuracy", options(epochs=1), folder, "pair"
    )  # fmt: skip
    return {"loss": report.history[-1]["loss"], "gradient": model.weight.grad}


def two_processes(folder: Path, database_url: str) -> None:
    """What each of two processes does: the step above, and the first stage as its script does it."""
    rank = int(os.environ["RANK"])
    torch.save(contrastive_step(folder / "two"), folder / f"{rank}.pt")
    # Clocks differ, and the release is named by the clock.
    with patch.object(Release, "new_name", lambda: f"by-{rank}"):
        train_simcse.main(
            SimcseOptions(
                _env_file=None, database_url=database_url, data_dir=folder, models_dir=folder / "models",
                text_encoder=str(folder / "text"), epochs=1, batch_size=8, fresh=True,
            )
        )  # fmt: skip


def torchrun(*script: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What `ACCELERATE_USE_CPU=true torchrun --standalone --nproc-per-node 2 SCRIPT` does, as the README says. (`accelerate launch
    --cpu` starts one process only, unless there is an MPI.)"""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *script],
        cwd=ROOT, env={**os.environ, "ACCELERATE_USE_CPU": "true", **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_two_processes_learn_what_one_does(store, tmp_path):
    """In-batch negatives come from both processes' items, the gradient is that of the whole batch, the release is one."""
    store.put_schema(FeatureSchema(std={"colour": ["red", "blue"]}, re=["fit"]))
    products = [RawProduct(product_id=str(number), title="red shirt") for number in range(20)]
    store.products.put(products)
    store.products.put_features([Product(product_id=p.product_id, title=p.title) for p in products], "test")
    tiny_text_encoder(tmp_path / "text")
    done = torchrun("--module", "tests.test_training", tmp_path, store.url)
    assert done.returncode == 0, done.stderr
    one = contrastive_step(tmp_path / "one")
    for rank in range(2):
        two = torch.load(tmp_path / f"{rank}.pt")
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-9)
        torch.testing.assert_close(two["gradient"], one["gradient"], atol=1e-9, rtol=0)
    # Beyond a norm of 1 the gradient is clipped, and a wrong length would not be seen.
    assert 1e-3 < one["gradient"].norm() < 0.99
    assert Release.names(tmp_path / "models") == ["by-0"]
    Release.open(tmp_path / "models").item_tower()  # its weights are those of its manifest
    assert done.stdout.count("encoder_stage1.pth") == 1


def test_two_processes_train_the_later_stages_and_one_of_them_writes(new_shop):
    with new_shop() as shop:
        before = Release.open(shop.models_dir)
        towers, rerankers = [before.user_tower()], [before.reranker()]
        for script, weights in (("train_user.py", USER_TOWER), ("train_reranker.py", RERANKER)):
            done = torchrun(script, "--epochs", "2", "--learning-rate", "0.01", **environment_of(shop))
            assert done.returncode == 0, done.stderr
            assert done.stdout.count(f"release {before.name}: {weights}, ") == 1
        after = Release.open(shop.models_dir)
        assert Release.names(shop.models_dir) == [before.name]
        towers.append(after.user_tower())
        rerankers.append(after.reranker())
    for old, new in (towers, rerankers):
        assert any(not torch.equal(old.state_dict()[name], weight) for name, weight in new.state_dict().items())


if __name__ == "__main__":
    two_processes(Path(sys.argv[1]), sys.argv[2])
