"""From new products to a new live release, as one command fit for cron.

    python retrain.py
    python retrain.py --keep 5 --train-user "--epochs 20 --learning-rate 0.002" --build-index=--no-live

Each stage is its own script, run with the options that the live release was made with. On top of them comes what the shop says now
(EVENT_WEIGHTS and the like, in the environment, `.env` or at the keyboard), and on top of that what is given for a stage. Reading
features takes the options of the environment. A stage prints its warnings, and one line with its time and its result; the last line
says what happened, and so does the exit code:

    0    the new release is live
    2    something is missing, or a stage failed; the old release stays
    3    the new release is worse on the same newest events by more than the margin (build_index.py --margin); the old one stays
    4    another retrain.py is at work
    130  interrupted

Killed, it goes on where it was when it is run again within 20 hours with the same options. At the end the newest `--keep` releases
are kept, and always the live one and the one before it; older ones are deleted, however they were made.
"""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import psycopg
from pydantic import AfterValidator, Field

from release import PARTS, Release, delete
from settings import WARNING, Settings, UserError, run_script
from store import Store
from store.embedded import PR_SET_PDEATHSIG

# Each stage and the part of the release that it makes.
STAGES = {
    "extract_features": "",
    "train_simcse": "item_tower",
    "train_user": "user_tower",
    "train_reranker": "reranker",
    "build_index": "index",
}
RESUMED_WITHIN = timedelta(hours=20)  # less than from one night to the next, which is to learn from all of the day
WORSE = 3  # exit code of build_index.py
# Of a release's options, those that say where things are and not how it was made.
PLACES = {"database_url", "data_dir", "models_dir", "text_encoder", "release", "fresh", "live"}
TAIL = 4000  # bytes of a stage's last words


def _words(options: str) -> str:
    shlex.split(options)  # ValueError for a quotation mark that is never closed: before any work is done
    return options


StageOptions = Annotated[str, AfterValidator(_words)]


class RetrainOptions(Settings):
    """Read new products, train, index, and go live unless the live release is better."""

    extract_features: StageOptions = Field(
        "", description='options of extract_features.py, in quotes: "--reader lexicon"; a single word with =: =--fresh'
    )
    train_simcse: StageOptions = Field("", description="options of train_simcse.py, before those of the live release")
    train_user: StageOptions = Field("", description="of train_user.py")
    train_reranker: StageOptions = Field("", description="of train_reranker.py")
    build_index: StageOptions = Field("", description='of build_index.py, for instance "--margin 0"')
    keep: int = Field(3, ge=1, description="releases that are kept, the newest ones")

    def given(self) -> dict[str, str]:
        return {stage: getattr(self, stage) for stage in STAGES}

    def of_the_shop(self) -> dict[str, Any]:
        """What every part of the system shares, as far as somebody set it: a release's own, older ones must not win over it."""
        said = self.model_fields_set.intersection(Settings.model_fields).difference(PLACES)
        return self.model_dump(mode="json", include=said)


class BusyError(UserError):
    """Another process retrains."""

    exit_code = 4


class KeptError(UserError):
    """The new release is worse; the old one stays live."""

    exit_code = 3


def begin(options: RetrainOptions) -> Release:
    """The release to work on: one that was interrupted and may go on, else a new one. Its options stand in its manifest: what is
    live may change before a resumed run goes on."""
    names = Release.names(options.models_dir)
    if unfinished := [name for name in names if is_unfinished(options.models_dir, name)]:
        release = Release.open(options.models_dir, unfinished[-1])
        plan = release.manifest["retrain"]
        young = datetime.now(UTC) - datetime.fromisoformat(plan["started_at"]) < RESUMED_WITHIN
        if young and (plan["given"], plan.get("shop")) == (options.given(), options.of_the_shop()):
            say(f"goes on with release {release.name}, begun {plan['started_at']}")
            return release
    live = Release.current(options.models_dir)
    manifest = Release.open(options.models_dir, live).manifest if live in names and live else {}
    release = Release.create(options.models_dir, Release.new_name())
    release.record(
        "retrain",
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        given=options.given(),
        shop=options.of_the_shop(),
        options={
            stage: {name: value for name, value in manifest[part]["options"].items() if name not in PLACES}
            for stage, part in STAGES.items()
            if part in manifest
        },
        outcome="",
    )
    say(f"release {release.name}, with the options of {live if manifest else 'nobody: no release is live'}")
    return release


def is_unfinished(models_dir: Path, name: str) -> bool:
    plan = Release.open(models_dir, name).manifest.get("retrain")
    return plan is not None and not plan["outcome"]


def run_stage(stage: str, release: Release, options: RetrainOptions, fresh: bool = False) -> tuple[int, str]:
    """Run one script on the release; its exit code and the last line it said. It ends with this process, however that ends."""
    plan = release.manifest["retrain"]
    places = options.model_dump(mode="json", include={"database_url", "data_dir", "models_dir", "text_encoder"})
    # By the environment: a command line, with the database's password in it, is there for everybody to read.
    told = as_environment(
        {
            **plan["options"].get(stage, {}),
            **plan["shop"],
            **places,
            "release": release.name,
            "fresh": fresh,
            "live": True,
        }
    )
    command = [sys.executable, str(Path(__file__).with_name(f"{stage}.py")), *shlex.split(plan["given"][stage])]
    last_words = b""
    with tempfile.TemporaryFile() as said:
        with subprocess.Popen(
            command, env={**os.environ, **told}, stdout=said, stderr=subprocess.PIPE, preexec_fn=_dies_with(os.getpid())
        ) as process:  # fmt: skip
            assert process.stderr is not None
            while chunk := os.read(process.stderr.fileno(), TAIL):
                last_words = (last_words + chunk)[-TAIL:]
                if sys.stderr.isatty():  # progress bars are for people
                    sys.stderr.buffer.write(chunk)
                    sys.stderr.flush()
        said.seek(0)
        results = said.read()
    for line in results.decode(errors="replace").splitlines():
        if line.startswith(WARNING):
            say(f"{stage}: {line}")
    code = process.returncode
    lines = [line.strip() for line in (last_words if code else results).decode(errors="replace").splitlines()]
    if code not in (0, WORSE, UserError.exit_code) and not sys.stderr.isatty():
        sys.stderr.write(last_words.decode(errors="replace"))  # a trace
    return code, next((line for line in reversed(lines) if line), f"exit code {code}, without a word")


def as_environment(options: Mapping[str, Any]) -> dict[str, str]:
    """Options as the scripts read them from the environment."""
    return {
        name.upper(): value if isinstance(value, str) else json.dumps(value)
        for name, value in options.items()
        if value is not None
    }


def _dies_with(parent: int) -> Callable[[], None] | None:
    """What a child does first, so that it does not go on training when this process is killed (Linux)."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)

    def ask_for_a_signal() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return ask_for_a_signal


def work(release: Release, options: RetrainOptions) -> None:
    """Every stage that is not done yet. Raises KeptError when the new release is worse, UserError when a stage fails."""
    resumed = PARTS[0] in release.manifest or any(release.folder.glob("*.checkpoint.pt"))
    for stage, part in STAGES.items():
        if part in release.manifest and stage != "build_index":  # whether it may go live is asked each time
            say(f"{stage}: done before")
            continue
        started = time.monotonic()
        code, said = run_stage(stage, release, options)
        if code == UserError.exit_code and resumed and stage.startswith("train_"):
            say(f"{stage}: {said}; it starts over")  # the shop changed since it was interrupted
            code, said = run_stage(stage, release, options, fresh=True)
        say(f"{stage}: {time.monotonic() - started:.0f} s, {said}")
        release = Release.open(options.models_dir, release.name)
        if code == WORSE:
            finish(release, "worse")
            raise KeptError(f"release {Release.current(options.models_dir)} stays live: {said}")
        if code:
            raise UserError(f"{stage} failed with exit code {code}: {said}; run retrain.py again to go on from here")
    live = Release.current(options.models_dir) == release.name
    finish(release, "promoted" if live else "indexed")
    say(
        f"promoted: release {release.name} is live"
        if live
        else f"release {release.name} is indexed; --no-live was given"
    )


def finish(release: Release, outcome: str) -> None:
    release.record("retrain", **{**release.manifest["retrain"], "outcome": outcome})


def clean(store: Store, options: RetrainOptions, at_work: str) -> None:
    """Delete what is older than the newest `keep` complete releases, and what an earlier run began and nobody will finish."""
    models_dir = options.models_dir
    names = Release.names(models_dir)
    complete = [name for name in names if PARTS[-1] in Release.open(models_dir, name).manifest]
    old = complete[: -options.keep] + [name for name in names if is_unfinished(models_dir, name)]
    for name in dict.fromkeys(old):
        if name in (at_work, Release.current(models_dir), Release.previous(models_dir)):
            continue
        try:
            delete(store, models_dir, name)
            say(f"release {name} is deleted")
        except (UserError, OSError, psycopg.Error) as error:  # tomorrow is early enough
            say(f"release {name} could not be deleted: {' '.join(str(error).split())}")


def say(line: str) -> None:
    print(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {line}", flush=True)


def main(options: RetrainOptions) -> None:
    options.models_dir.mkdir(parents=True, exist_ok=True)
    # Open all the time: it holds the lock, and the embedded server that the stages use.
    with Store.open(options) as store, store.releases.retraining() as alone:
        if not alone:
            raise BusyError("another retrain.py is at work on this database; nothing was done")
        release = begin(options)
        try:
            work(release, options)
        finally:
            clean(store, options, release.name)


if __name__ == "__main__":
    run_script(RetrainOptions, main)
