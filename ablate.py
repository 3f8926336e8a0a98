"""Which ideas of the design earn their place: a split again and again, each time without one of them, beside the full model.

    python ablate.py sample-week
    python ablate.py rtr FOLDER --seeds 3 --only "mean pooling" --only "no context"
    python ablate.py hm-week FOLDER --seeds 1 --only "no title"

What comes before the first step that a variant changes is that of the full model of the same seed. Each variant is judged by
evaluate.py's own code and written into docs/results.json when it is done; a stopped run goes on where it was. Everything lies in
a database and releases of its own under DATA_DIR/ablation-<split>.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import CliPositionalArg

from metrics import compare_runs, figures, read_ratios
from portrait import learning_curves, save_curves
from release import Release
from results import FULL, NO_TRANSFER, Row, ablation_figures, ablation_model, commit, read_rows, save
from run_split import CATCHING_UP, MODELS, PARTS, PIPELINES, is_done, open_home, run_step
from settings import Settings, UserError, run_script

PIPELINE_OF = {"sample-week": "sample-embedded", "rtr": "rtr", "hm-week": "hm-week"}
# What each leaves out or puts in its place: the first step that it changes, and how.
VARIANTS: dict[str, tuple[str, list[str]]] = {
    "self-attention": ("train_simcse.py", ["--fusion", "self"]),
    "mean pooling": ("train_simcse.py", ["--fusion", "mean"]),
    "no RE": ("train_simcse.py", ["--no-re"]),
    "no title": ("train_simcse.py", ["--no-title"]),
    "no orthogonal start": ("train_simcse.py", ["--no-orthogonal"]),
    "no SimCSE": ("train_simcse.py", ["--epochs", "0"]),
    "no pairs": ("train_simcse.py", ["--pairs", "0"]),
    "no behaviour": ("train_user.py", ["--no-behaviour"]),
    "no context": ("train_user.py", ["--no-context"]),
    "no profile": ("train_user.py", ["--no-profile"]),
    "no height and weight": ("train_user.py", ["--unread-figures", "height_cm,weight_kg"]),
    "no popularity": ("train_user.py", ["--no-popularity"]),
    "no collaborative": ("train_user.py", ["--collaborative", "0"]),
    "no adapter": ("train_user.py", ["--no-adapter"]),
    NO_TRANSFER: ("train_reranker.py", ["--no-transfer"]),
}


class AblateOptions(Settings):
    split: CliPositionalArg[Literal["sample-week", "rtr", "hm-week"]] = Field(description="split to judge on")
    folder: CliPositionalArg[Path | None] = Field(None, description="folder of the data set")
    seeds: int = Field(3, ge=1, le=100, description="runs of each variant, of as many seeds from --seed on")
    only: list[str] = Field([], description=f"variants to run, beside the full model; of {', '.join(VARIANTS)}")
    fresh: bool = Field(False, description="start over, from an empty database")


def main(options: AblateOptions) -> None:
    if unknown := [name for name in options.only if name not in VARIANTS]:
        raise UserError(f"there is no variant {unknown[0]!r}; there are: {', '.join(VARIANTS)}")
    steps = PIPELINES[PIPELINE_OF[options.split]]
    home = options.data_dir / f"ablation-{options.split}"
    environment = open_home(home, steps, options.folder, options.fresh)
    splits = [step[1] for step in steps if step[0] == "evaluate.py"]
    runs = [
        (name, seed)
        for seed in range(options.seed, options.seed + options.seeds)
        for name in (FULL, *(options.only or VARIANTS))
    ]
    unfinished = [run for run in runs if not _finished(home, splits, *run)]
    if unfinished:
        for step in steps:
            if step[0] in CATCHING_UP:
                run_step(step, options.folder, home, environment)
    for name, seed in runs:
        if (name, seed) in unfinished:
            print(f"== {ablation_model(name, seed)}", flush=True)
            _run(steps, name, seed, options.folder, home, environment)
        known = {(row["split"], row["model"]) for row in read_rows()}
        if (name, seed) in unfinished or any((split, ablation_model(name, seed)) not in known for split in splits):
            _save(options, home, splits, name, seed)


def _run(
    steps: list[list[str]], name: str, seed: int, folder: Path | None, home: Path, environment: dict[str, str]
) -> None:
    """Train what the variant does not share with the full model, index it, and judge it."""
    changed, change = VARIANTS.get(name, ("", []))
    models = _models(home, name, seed)
    if not models.exists():
        _start(models, _models(home, FULL, seed), changed)
    own = {**environment, "MODELS_DIR": str(models)}
    for step in steps:
        if step[0] in CATCHING_UP:
            continue
        command = [*step, *(change if step[0] == changed else []), "--seed", str(seed)]
        if step[0] == "evaluate.py":
            command += ["--per-shopper", str(_judged(home, step[1], name, seed))]
        elif step[0] != "build_index.py" and is_done(step, models):
            continue  # an index is made again: all variants' have one name in the database
        run_step(command, folder, home, own)


def _start(models: Path, full: Path, changed: str) -> None:
    """A variant's release before its first own step: the full model's, as far as it goes unchanged."""
    stages = list(PARTS)
    kept = stages[: stages.index(changed)] if changed else []
    if not kept:
        models.mkdir(parents=True)
        return
    temporary = models.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(
        full, temporary, ignore=shutil.ignore_patterns("current", "tensorboard", "*.png", "*.checkpoint.pt")
    )
    release = Release.open(temporary, "split")
    for stage in stages[len(kept) :]:
        release.manifest.pop(PARTS[stage], None)
    release.save_manifest()
    temporary.rename(models)


def _save(options: AblateOptions, home: Path, splits: list[str], name: str, seed: int) -> None:
    """Rows of one run, the variant's difference to the full model over all seeds that both have, and how they learned."""
    command = f"python ablate.py {options.split}{' FOLDER' if options.folder else ''} --seeds {options.seeds}"
    now, rows = commit(), []
    seeds = [
        both
        for both in range(options.seed, options.seed + options.seeds)
        if _finished(home, splits, name, both) and _finished(home, splits, FULL, both)
    ]
    for split in splits:
        own = read_ratios(_judged(home, split, name, seed))
        pairs = [[read_ratios(_judged(home, split, model, both)) for model in (name, FULL)] for both in seeds]
        for key in ablation_figures(split):
            if key not in own:  # nobody took such an item, or another split judges it
                continue
            stage, metric, part = key
            (figure,) = figures({(metric, part): own[key]})
            rows.append(Row(split, ablation_model(name, seed), stage, **asdict(figure), commit=now, command=command))
            if name != FULL:
                value, low, high = compare_runs([(ours[key], full[key]) for ours, full in pairs])
                model = f"{ablation_model(name)} against the {FULL}"
                named = f"{metric} difference"
                rows.append(Row(split, model, stage, named, part, value, low, high, figure.n, now, command))
    if name in (FULL, NO_TRANSFER):  # how much faster does a reranker learn that need not learn what words mean?
        manifest = Release.open(_models(home, name, seed), "split").manifest
        save_curves(splits, ablation_model(name, seed), learning_curves(manifest, ["reranker"]))
    save(rows)


def _models(home: Path, name: str, seed: int) -> Path:
    return home / MODELS / f"{name.replace(' ', '-')}-{seed}"


def _judged(home: Path, split: str, name: str, seed: int) -> Path:
    """Each shopper's part of the figures of one run."""
    return home / "judged" / f"{split}-{name.replace(' ', '-')}-{seed}.npz"


def _finished(home: Path, splits: list[str], name: str, seed: int) -> bool:
    """Whether a run is judged, and the full model's still there for others to build on."""
    judged = all(_judged(home, split, name, seed).exists() for split in splits)
    return judged and (name != FULL or is_done(["train_reranker.py"], _models(home, FULL, seed)))


if __name__ == "__main__":
    run_script(AblateOptions, main)
