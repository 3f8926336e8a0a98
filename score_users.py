"""The lists of all shoppers, as the API would answer them, into one Parquet file: for e-mails, or to look at.

    python score_users.py lists.parquet
    python score_users.py lists.parquet --users ids.txt -k 10

Columns: user_id, rank (from 1), product_id, score, release. One release and the live rules answer for everybody, as of one moment.
Killed, it goes on where it was when it is run again within 20 hours with the same options; what is done stands in
`lists.parquet.parts/`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import polars as pl
import torch
from pydantic import Field
from pydantic_settings import CliPositionalArg
from tqdm import tqdm

from loaded_release import UnavailableError
from recommender import Answer, Recommender, Request
from release import Release
from rules import DEFAULT, NamedRules
from settings import Settings, UserError, run_script
from store import Store
from text_encoder import TextEncoder

RESUMED_WITHIN = 20 * 3600.0  # seconds; less than from one night to the next
SCHEMA = {
    "user_id": pl.String(),
    "rank": pl.Int32(),
    "product_id": pl.String(),
    "score": pl.Float64(),
    "release": pl.String(),
}


class ScoreOptions(Settings):
    """The lists of all shoppers into one Parquet file."""

    out: CliPositionalArg[Path] = Field(description="the Parquet file to write")
    users: Path | None = Field(
        None, description="text file of the shoppers to score, an id a line; else all with a profile or an event"
    )
    k: int = Field(20, ge=1, le=100, description="items of each list")
    rule_set: str = Field(DEFAULT, description="by whose live rules the lists are arranged")
    release: str = Field("", description="release that answers; empty is the live one")
    part_users: int = Field(1000, ge=1, description="shoppers between two savings")
    threads: int = Field(2, ge=1, le=8, description="shoppers scored at once")


class Parts:
    """A run's plan and what is done of it, in a folder beside the result."""

    def __init__(self, options: ScoreOptions, release: str, rules: NamedRules | None) -> None:
        self.folder = options.out.with_name(options.out.name + ".parts")
        self.asked = {
            "rules": [options.rule_set, rules.version if rules else None],
            "release": release,
            "k": options.k,
            "part_users": options.part_users,
            "users": _digest(options.users),
        }
        self.now = time.time()

    def begin(self, users: Sequence[str]) -> list[str]:
        """Everybody to score: those of the interrupted run if it may go on, else `users`."""
        plan = self._plan()
        if plan and plan["asked"] == self.asked and time.time() - plan["now"] < RESUMED_WITHIN:
            self.now = plan["now"]
            print(f"goes on with what {self.folder} holds")
            return plan["user_ids"]
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        # Ids, and no digest of them: who came meanwhile would shift everybody behind.
        _replace(
            self.folder / "plan.json",
            lambda path: path.write_text(json.dumps({"asked": self.asked, "now": self.now, "user_ids": list(users)})),
        )
        return list(users)

    def _plan(self) -> dict[str, Any] | None:
        try:
            plan: dict[str, Any] = json.loads((self.folder / "plan.json").read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return plan

    def path(self, number: int) -> Path:
        return self.folder / f"{number:06}.parquet"

    def join(self, count: int, out: Path) -> None:
        """All parts as one file, in place at once."""
        lists = pl.scan_parquet([self.path(number) for number in range(count)])
        _replace(out, lists.sink_parquet)
        shutil.rmtree(self.folder)


def _replace(path: Path, write: Any) -> None:
    """`write` the file whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    write(temporary)
    os.replace(temporary, path)


def _digest(users: Path | None) -> str:
    try:
        return "" if users is None else hashlib.sha256(users.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{users} cannot be read: {error.strerror}") from error


def asked_users(options: ScoreOptions, store: Store) -> list[str]:
    if options.users is None:
        users = store.users.read_ids()
    else:
        try:
            lines = options.users.read_text(encoding="utf-8").splitlines()
        except ValueError as error:
            raise UserError(f"{options.users} is no text in UTF-8: {error}") from error
        users = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not users:
        raise UserError(f"there is nobody to score in {options.users or 'the database'}")
    return users


def rows_of(user_ids: Sequence[str], answers: Sequence[Answer]) -> pl.DataFrame:
    rows = [
        (user_id, item.rank, item.product_id, item.score, answer.release)
        for user_id, answer in zip(user_ids, answers, strict=True)
        for item in answer.items
    ]
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def main(options: ScoreOptions) -> None:
    torch.set_num_threads(1)  # one small forward a request: more threads only wait for each other
    release = options.release or Release.current(options.models_dir) or ""
    Release.open(options.models_dir, release)
    text_encoder = TextEncoder.load(options)
    with Store.open(options) as store, ThreadPoolExecutor(options.threads) as threads:
        recommender = Recommender(store, options, text_encoder)
        rules = recommender.rules(options.rule_set)
        if rules is None and options.rule_set != DEFAULT:
            raise UserError(f"no rules of the name {options.rule_set!r} are live")
        if rules is not None and rules.problem:
            raise UserError(
                f"version {rules.version} of the rules {rules.name!r} cannot be read ({rules.problem}); "
                "PUT /rules with what it should be"
            )
        parts = Parts(options, release, rules)
        users = parts.begin(asked_users(options, store))

        def asked(user_id: str) -> Request:
            return Request(user_id, k=options.k, now=parts.now, rules=rules, explain=False, release=release)

        def answer(user_id: str) -> Answer:
            try:
                given = recommender.recommend(asked(user_id))
            except UnavailableError as error:
                raise UserError(f"{error}; run the same command again to go on") from error
            if given.degraded:  # a popular list is no answer to keep
                raise UserError("the database does not answer; run the same command again to go on")
            if given.release != release:
                raise UserError(given.warnings[0])
            return given

        starts = range(0, len(users), options.part_users)
        with tqdm(total=len(users), desc="lists", unit="shopper") as bar:
            for number, start in enumerate(starts):
                some = users[start : start + options.part_users]
                if not parts.path(number).exists():
                    answers = list(threads.map(answer, some))
                    _replace(parts.path(number), rows_of(some, answers).write_parquet)
                bar.update(len(some))
        strangers = len(set(users).difference(store.users.read_ids()))
    parts.join(len(starts), options.out)
    unknown = f", {strangers} of them nobody the shop knows" if strangers else ""
    print(f"{options.out}: lists of {len(users)} shoppers{unknown}, release {release}")


if __name__ == "__main__":
    run_script(ScoreOptions, main)
