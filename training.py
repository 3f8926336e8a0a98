"""The one training loop. HuggingFace Accelerate runs it, so a CPU, one GPU or several take the same command.

A stage gives its model, its batches and its loss; the loop gives AdamW with warm-up and cosine decay, progress, curves
(TensorBoard and PNG), early stopping on a validation metric, and checkpoints from which a killed run continues exactly: the
same batches, the same random numbers, the same weights in the end as if nothing had happened. (With several processes only
the first one's random numbers are kept.)
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful
from tqdm import tqdm

from settings import Settings, UserError

MAX_GRADIENT_NORM = 1.0


class TrainOptions(Settings):
    """Options that every training stage has."""

    release: str = Field("", description="release to work on; empty is the newest one")
    epochs: int = Field(10, ge=1, le=10_000, description="passes over the training data at most")
    batch_size: int = Field(256, ge=2, le=65_536, description="examples a step, over all processes")
    learning_rate: float = Field(1e-3, gt=0, le=1, description="of AdamW, after warm-up")
    weight_decay: float = Field(0.01, ge=0, le=1, description="of AdamW")
    warmup_steps: int = Field(100, ge=0, description="steps of linear warm-up; a tenth of all at most")
    patience: int = Field(2, ge=1, description="epochs without a better validation metric before stopping")
    checkpoint_seconds: float = Field(30.0, ge=0, description="a checkpoint at least this often")
    fresh: bool = Field(False, description="start over instead of continuing an interrupted run")


@dataclass
class FitReport:
    """What a training run did; goes into the release's manifest."""

    metric: str
    best: float
    best_epoch: int  # counted from 1; 0 when the untrained model was best
    epochs: int
    steps: int
    seconds: float
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass
class _Progress:
    epoch: int = 0  # epochs finished
    step: int = 0  # steps finished in the current epoch
    total_steps: int = 0
    loss_sum: float = 0.0
    stale: int = 0
    done: bool = False
    seconds: float = 0.0
    best: float = -math.inf
    best_epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


def fit(
    model: nn.Module,
    batches: Callable[[int], Sequence[np.ndarray]],
    loss: Callable[[nn.Module, np.ndarray], Tensor],
    validate: Callable[[nn.Module], dict[str, float]],
    metric: str,
    options: TrainOptions,
    folder: Path,
    name: str,
    *,
    keep_best: bool = True,
    parameters: Callable[[nn.Module], list[dict[str, Any]]] | None = None,
    state: Stateful | None = None,
) -> FitReport:
    """Train `model` in place; when `keep_best`, it ends with the weights of its best epoch.

    batches(epoch): index arrays of one epoch, a function of the epoch alone, so that a resumed run sees the same.
    loss(model, indices): mean loss of one batch; its randomness must come from torch's global generator.
    validate(model): metrics after an epoch; `metric` (higher is better) decides early stopping.
    state: what `loss` draws on besides the model and changes as training goes on; checkpoints keep it too.
    folder: curves and checkpoints go to `folder/name.*`. Raises UserError when the loss stops being finite.
    """
    accelerator = Accelerator()
    set_seed(options.seed)
    groups = parameters(model) if parameters else [{"params": [p for p in model.parameters() if p.requires_grad]}]
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, weight_decay=options.weight_decay)
    schedule_steps = max(1, options.epochs * len(batches(0)))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _warmup_cosine(options.warmup_steps, schedule_steps))
    model.to(accelerator.device)
    wrapped, optimizer = accelerator.prepare(model, optimizer)

    parts: dict[str, Stateful] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    if state is not None:
        parts["state"] = state
    checkpoint = _Checkpoint(folder / f"{name}.checkpoint.pt", parts, _identity(options, name))
    progress = _Progress()
    if options.fresh:
        checkpoint.path.unlink(missing_ok=True)
    else:
        progress = checkpoint.load() or progress
        if progress.total_steps and accelerator.is_main_process:
            tqdm.write(f"{name}: continuing at epoch {progress.epoch + 1}, step {progress.step}")
    best_state = checkpoint.best_state
    writer = _writer(folder / "tensorboard" / name) if accelerator.is_main_process else None
    started, saved = time.monotonic() - progress.seconds, time.monotonic()

    def judge(epoch: int) -> None:
        """Validate, note the row, and keep the weights if they are the best so far."""
        nonlocal best_state
        model.eval()
        with torch.no_grad():
            metrics = validate(model)
        row = {"epoch": float(epoch), "step": float(progress.total_steps)}
        if progress.step:
            row["loss"] = progress.loss_sum / progress.step
        progress.history.append({**row, **metrics})
        if metrics[metric] > progress.best:
            progress.best, progress.best_epoch, progress.stale = metrics[metric], epoch, 0
            if keep_best:
                best_state = {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
        else:
            progress.stale += 1
        if writer is not None:
            report_row = progress.history[-1]
            tqdm.write(f"{name} " + "  ".join(f"{key} {value:.4g}" for key, value in report_row.items()))
            for key, value in report_row.items():
                writer.add_scalar(f"{name}/{key}", value, progress.total_steps)
            writer.flush()
            draw_curves(progress.history, folder / f"{name}.png", name)

    def save() -> None:
        progress.seconds = time.monotonic() - started
        if accelerator.is_main_process:
            checkpoint.save(progress, best_state)

    if not progress.history and keep_best:
        judge(0)  # where training starts from: nothing worse is ever kept
    while progress.epoch < options.epochs and not progress.done:
        epoch_batches = batches(progress.epoch)
        model.train()
        bar = tqdm(
            total=len(epoch_batches), initial=progress.step, desc=f"{name} epoch {progress.epoch + 1}/{options.epochs}",
            unit="step", disable=not accelerator.is_main_process, leave=False,
        )  # fmt: skip
        for indices in epoch_batches[progress.step :]:
            value = loss(wrapped, _shard(indices, accelerator))
            optimizer.zero_grad()
            accelerator.backward(value)
            norm = accelerator.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
            # A loss may be finite and its gradient not; neither ever reaches the weights, and so no checkpoint. (With
            # float16 Accelerate's scaler skips such a step and goes on.)
            if not torch.isfinite(value) or (accelerator.scaler is None and not torch.isfinite(norm)):
                raise UserError(
                    f"{name}: the loss became {value.item()} (its gradient's norm {norm.item()}) at epoch {progress.epoch + 1}, "
                    f"step {progress.step + 1}; try a smaller --learning-rate or a higher temperature, with --fresh"
                )
            optimizer.step()
            scheduler.step()
            progress.step += 1
            progress.total_steps += 1
            progress.loss_sum += value.item()
            bar.update()
            bar.set_postfix(loss=f"{progress.loss_sum / progress.step:.4f}", refresh=False)
            if time.monotonic() - saved > options.checkpoint_seconds:
                save()
                saved = time.monotonic()
        bar.close()

        judge(progress.epoch + 1)
        progress.epoch, progress.step, progress.loss_sum = progress.epoch + 1, 0, 0.0
        progress.done = keep_best and progress.stale >= options.patience
        save()

    if best_state is not None:
        model.load_state_dict(best_state)
    model.to("cpu").eval()
    seconds = time.monotonic() - started if progress.total_steps else 0.0
    accelerator.wait_for_everyone()
    if writer is not None:
        writer.close()
    return FitReport(
        metric, progress.best, progress.best_epoch, progress.epoch, progress.total_steps, seconds, progress.history
    )


def is_main_process() -> bool:
    """Whether this is the one process that writes and speaks. Joins those that train together; alone, that does nothing.
    Accelerate's PartialState, asked before an Accelerator was made, would take each process on a CPU for the only one."""
    return bool(Accelerator().is_main_process)


def check_checkpoint(options: TrainOptions, folder: Path, name: str) -> None:
    """For who has long work to do before `fit`: raises UserError, as that would, for a checkpoint that it cannot continue."""
    if not options.fresh:
        _Checkpoint(folder / f"{name}.checkpoint.pt", {}, _identity(options, name)).read()


def finish(folder: Path, name: str) -> None:
    """Delete a stage's checkpoint, once its result is saved: the next run starts anew."""
    (folder / f"{name}.checkpoint.pt").unlink(missing_ok=True)


def draw_curves(history: list[dict[str, float]], path: Path, title: str) -> None:
    """One small panel a curve, over epochs, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    keys = [key for key in history[-1] if key not in ("epoch", "step")]
    figure, axes = pyplot.subplots(1, len(keys), figsize=(3.2 * len(keys), 2.6), squeeze=False)
    for axis, key in zip(axes[0], keys, strict=True):
        rows = [row for row in history if key in row]
        axis.plot([row["epoch"] for row in rows], [row[key] for row in rows], marker="o", markersize=3)
        axis.set_title(key, fontsize=9)
        axis.set_xlabel("epoch", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def shuffled_batches(examples: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """A new order each epoch, the same for the same seed. A last batch of one is dropped: it has no negatives."""
    order = np.random.default_rng([seed, epoch]).permutation(examples)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [batch for batch in batches if len(batch) > 1]


def _shard(indices: np.ndarray, accelerator: Accelerator) -> np.ndarray:
    """This process's part of a batch; every process gets the same number, as collective operations need."""
    size = len(indices) // accelerator.num_processes
    if size == 0:
        return indices
    return indices[accelerator.process_index * size : (accelerator.process_index + 1) * size]


def _warmup_cosine(warmup: int, total: int) -> Callable[[int], float]:
    warmup = min(warmup, total // 10)

    def scale(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))

    return scale


def _identity(options: TrainOptions, name: str) -> str:
    """What must be equal for a checkpoint to be continued: everything but where things lie and how often to save."""
    kept = options.model_dump(
        mode="json", exclude={"database_url", "data_dir", "models_dir", "checkpoint_seconds", "fresh"}
    )
    return json.dumps({"name": name, **kept}, sort_keys=True)


def _writer(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))


class _Checkpoint:
    """Everything a run needs to go on, in one file that is replaced whole or not at all."""

    def __init__(self, path: Path, parts: dict[str, Stateful], identity: str) -> None:
        self.path, self.parts, self.identity = path, parts, identity
        self.best_state: dict[str, Tensor] | None = None

    def save(self, progress: _Progress, best_state: dict[str, Tensor] | None) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        torch.save(
            {
                "identity": self.identity, "progress": asdict(progress), "random": torch.get_rng_state(), "best": best_state,
                "parts": {name: part.state_dict() for name, part in self.parts.items()},
            },
            temporary,
        )  # fmt: skip
        os.replace(temporary, self.path)

    def read(self) -> dict[str, Any] | None:
        """What the file holds, if it belongs to a run with these options; one with others is left alone."""
        if not self.path.exists():
            return None
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            of_this_run = saved["identity"] == self.identity
        except Exception as error:  # a damaged file raises anything
            raise self._damaged(error) from error
        if not of_this_run:
            raise UserError(
                f"{self.path} is from an interrupted run with other options; "
                "run with the same options to continue it, or pass --fresh to start over"
            )
        return dict(saved)

    def load(self) -> _Progress | None:
        """Continue from the file, if there is one."""
        saved = self.read()
        if saved is None:
            return None
        try:
            for name, part in self.parts.items():
                part.load_state_dict(saved["parts"][name])
            torch.set_rng_state(saved["random"])
            self.best_state = saved["best"]
            return _Progress(**saved["progress"])
        except Exception as error:  # a model of other shapes raises RuntimeError, an incomplete file KeyError
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> UserError:
        return UserError(
            f"{self.path} cannot be continued: it is damaged or the data changed since; "
            f"pass --fresh to start over ({error})"
        )
