"""A standard split from files to figures: import, extract, train three stages, index, evaluate; with time and memory of each.

    python run_split.py hm-week FOLDER
    python run_split.py rtr FOLDER             # one system, judged on rtr-warm and rtr-cold
    python run_split.py s3rec-beauty FOLDER
    python run_split.py sample-lexicon         # the sample shop with features by its lexicon; also sample-seller, sample-embedded
    python run_split.py hm-seller FOLDER       # H&M with its sellers' attributes alone

Everything lies in its own database and releases under DATA_DIR/<split>, so a shop's own are never touched. Trainings and
indexes that are done are not done again: a stopped run goes on where it was (`--fresh` starts over).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import CliPositionalArg

from release import Release
from results import STEPS
from settings import Settings, UserError, run_script

# Chosen on the held-out days before each cut (train_user.py's validation), never on the test days.
SELLER = ["extract_features.py", "--reader", "seller"]
EMBEDDED = ["extract_features.py", "--reader", "embedded", "--extract-examples", "0"]
EMBEDDED += ["--answers", "datasets/sample_shop_answers.jsonl.gz"]
SELLER_NAME = "styletower, sellers' attributes alone"
HALF_YEAR = ["--validation-share", "0.2"]  # of Rent the Runway held out: as long as the test
MODELS = "saved_models"  # of each pipeline's own folder


def _hm(extract: list[str], *evaluate: str) -> list[list[str]]:
    # Two of the five days are held out: one has too few shoppers with a past for the reranker to learn from.
    held_out = ["--validation-share", "0.35"]
    tower = ["--epochs", "2", "--collaborative", "0", "--forget-links", "0.9"]
    return [
        ["import_data.py", "hm", "{folder}", "--until", "2020-09-21"],
        extract,
        ["train_simcse.py", "--release", "split", "--epochs", "3", "--temperature", "0.05", *held_out],
        ["train_user.py", "--release", "split", *tower, *held_out],
        ["train_reranker.py", "--release", "split"],
        ["build_index.py", "--release", "split"],
        ["evaluate.py", "hm-week", "{folder}", *evaluate],
    ]


def _sample(extract: list[str], name: str, *evaluate: str) -> list[list[str]]:
    """The sample shop's last week, trained as `make demo` does, with features by one reader."""
    return [
        ["import_data.py", "sample", "--until", "2026-06-23"],
        extract,
        ["train_simcse.py", "--release", "split", "--epochs", "6", "--batch-size", "256"],
        ["train_user.py", "--release", "split", "--epochs", "3", "--learning-rate", "0.002", "--history", "20"],
        ["train_reranker.py", "--release", "split"],
        ["build_index.py", "--release", "split"],
        ["evaluate.py", "sample-week", "--model", name, *evaluate],
    ]


# The page shows one model of a split; the others stand in its tables.
PIPELINES: dict[str, list[list[str]]] = {
    "hm-week": _hm(["extract_features.py"], "--ceiling"),
    "hm-seller": _hm(SELLER, "--no-baselines", "--no-shown", "--model", SELLER_NAME),
    "sample-seller": _sample(SELLER, SELLER_NAME, "--no-shown"),
    "sample-lexicon": _sample(["extract_features.py"], "styletower, features by the lexicon", "--no-shown"),
    "sample-embedded": _sample(EMBEDDED, "styletower, features by the embedded model"),
    "rtr": [
        ["import_data.py", "rent-the-runway", "{folder}", "--until", "2017-07-01"],
        ["extract_features.py"],
        ["train_simcse.py", "--release", "split", *HALF_YEAR],
        # The set knows days, not hours: what stands beside a rental on its day is mostly the same order, and tells more than an
        # earlier one will. Four years of so few rentals foretell the held-out ones better than the usual year and a half.
        ["train_user.py", "--release", "split", "--epochs", "5", "--train-days", "1500", "--no-baskets", *HALF_YEAR],
        # The test asks up to seven months after the cut: so long after, or half so, ask the requests that the reranker learns from.
        ["train_reranker.py", "--release", "split", "--moments", "2"],
        ["build_index.py", "--release", "split"],
        ["evaluate.py", "rtr-warm", "{folder}", "--ceiling"],
        ["evaluate.py", "rtr-cold", "{folder}", "--ceiling"],
    ],
    "s3rec-beauty": [
        ["import_data.py", "s3rec", "{folder}", "--until", "2000-01-01"],
        SELLER,  # attributes are all there is to read
        ["train_simcse.py", "--release", "split"],
        ["train_user.py", "--release", "split", "--epochs", "6", "--learning-rate", "0.003", "--collaborative", "64"],
        ["train_reranker.py", "--release", "split"],
        ["build_index.py", "--release", "split"],
        ["evaluate.py", "s3rec-beauty", "{folder}"],
    ],
}
# What a finished training step leaves in the manifest.
PARTS = {
    "train_simcse.py": "item_tower",
    "train_user.py": "user_tower",
    "train_reranker.py": "reranker",
    "build_index.py": "index",
}
# Runs a step and writes down how it ended and its peak memory. A process of its own, and a small one: Linux counts what the
# parent held at the moment of the fork into a child's peak, and this script has PyTorch in memory.
MEASURED = """
import json, resource, subprocess, sys
path, *command = sys.argv[1:]
try:
    code = subprocess.call(command)
except KeyboardInterrupt:  # the step and this script's parent got it too, and say so
    sys.exit(130)
with open(path, "w") as file:
    json.dump([code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss], file)
"""
# Run again these find little to do: the figures of their first run are the ones that say something.
CATCHING_UP = ("import_data.py", "extract_features.py")


class SplitOptions(Settings):
    split: CliPositionalArg[
        Literal["hm-week", "rtr", "s3rec-beauty", "hm-seller", "sample-seller", "sample-lexicon", "sample-embedded"]
    ] = Field(description="split to run")
    folder: CliPositionalArg[Path | None] = Field(
        None, description="folder of the data set; the sample shop needs none"
    )
    fresh: bool = Field(False, description="start over, from an empty database")


def main(options: SplitOptions) -> None:
    home = options.data_dir / options.split
    environment = open_home(home, PIPELINES[options.split], options.folder, options.fresh)
    for step in PIPELINES[options.split]:
        if is_done(step, home / MODELS):
            print(f"{' '.join(step)}: done before")
            continue
        seconds, memory = run_step(step, options.folder, home, environment)
        _note(options.split, step, seconds, memory, options.fresh)


def open_home(home: Path, steps: list[list[str]], folder: Path | None, fresh: bool) -> dict[str, str]:
    """Make the folder in which a pipeline has its database and releases, and give the environment of its steps. Raises UserError
    when a step reads `folder` and it is not there."""
    if any("{folder}" in step for step in steps) and (folder is None or not folder.is_dir()):
        raise UserError(f"{folder} is not a folder; give the one that holds the data set's files")
    if fresh:
        # The database may be a link to where the server's user may enter (see store/embedded.py).
        for old in ((home / "postgres").resolve(), home):
            shutil.rmtree(old, ignore_errors=True)
    (home / MODELS).mkdir(parents=True, exist_ok=True)
    for shared in ("text_encoder", "text_cache"):  # the same for every pipeline
        (home.parent / shared).mkdir(parents=True, exist_ok=True)
        if not (home / shared).exists():
            (home / shared).symlink_to((home.parent / shared).resolve())
    return {**os.environ, "DATA_DIR": str(home), "MODELS_DIR": str(home / MODELS), "DATABASE_URL": ""}


def run_step(step: list[str], folder: Path | None, home: Path, environment: dict[str, str]) -> tuple[float, int]:
    """Run a step; gives its seconds and peak memory in bytes. Raises UserError when it fails."""
    command = [sys.executable, *(part.format(folder=folder) for part in step)]
    print(f"== {' '.join(step)}", flush=True)
    started = time.monotonic()
    code, memory = _run(command, environment, home / "measured.json")
    if code != 0:
        raise UserError(f"{step[0]} ended with status {code}; mend it and run this again")
    return time.monotonic() - started, memory


def _run(command: list[str], environment: dict[str, str], measured: Path) -> tuple[int, int]:
    """Exit code (negative: the signal) and peak memory in bytes of a command."""
    measured.unlink(missing_ok=True)
    done = subprocess.run([sys.executable, "-S", "-c", MEASURED, str(measured), *command], env=environment, check=False)
    if not measured.exists():  # ended together with its step, by Ctrl-C say
        return done.returncode, 0
    code, peak = json.loads(measured.read_text())
    # ru_maxrss is in kilobytes on Linux, in bytes on macOS.
    return code, peak * (1 if sys.platform == "darwin" else 1024)


def is_done(step: list[str], models: Path) -> bool:
    """Whether a training or an index is in the release already."""
    part = PARTS.get(step[0])
    return part is not None and "split" in Release.names(models) and part in Release.open(models, "split").manifest


def _note(split: str, step: list[str], seconds: float, memory: int, fresh: bool) -> None:
    """Put a step's figures into docs/steps.json, in the order of the pipeline."""
    noted = json.loads(STEPS.read_text(encoding="utf-8")) if STEPS.exists() else []
    rows = {(row["split"], row["step"]): row for row in noted}
    name = " ".join(part.replace("{folder}", "FOLDER") for part in step)
    if step[0] in CATCHING_UP and (split, name) in rows and not fresh:
        return
    figures = {"seconds": round(seconds, 1), "megabytes": round(memory / 2**20)}
    rows[split, name] = {"split": split, "step": name, **figures}  # one run again keeps its place
    STEPS.parent.mkdir(exist_ok=True)
    STEPS.write_text(json.dumps(list(rows.values()), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_script(SplitOptions, main)
