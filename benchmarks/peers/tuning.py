"""How libraries to compare with are asked, tuned and answer: the same for all, so that none wins by effort.

    python PEER.py QUESTION.npz ANSWER.npz [ARGUMENT]     # evaluate.py --peers calls it so

QUESTION holds the fields of `Question`. ANSWER: `lists` int64 [J, count], items that the shopper had not met, best first, -1 where
there are no more; `trials`, the number of settings tried. A trial can take an hour: what came of each stands beside the ANSWER
(`.trials.json`) until that is written, and who is stopped and asked again does not try it again.

A peer names at most `MOST_TRIALS` settings. What shoppers took last in training is held out (`held_out`), each setting is fitted on
the rest, and the one with the best recall there is fitted again on everything. The test is never seen.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

MOST_TRIALS = 6
HELD_OUT_SHOPPERS = 2_000  # at most: a recall of .1 is then known to within .007
SEED = 0


@dataclass(frozen=True)
class Question:
    """The training events of a shop, and whom to recommend to."""

    user: np.ndarray  # int64 [E]; events in time order, those of one instant in an order of chance
    item: np.ndarray  # int64 [E]
    at: np.ndarray  # float64 [E], epoch seconds
    shape: tuple[int, int]  # shoppers, items
    judged: np.ndarray  # int64 [J], distinct shoppers to answer for
    count: int  # items for each of them
    attribute_item: np.ndarray  # int64 [A]: this item ...
    attribute: np.ndarray  # int64 [A]: ... has this attribute

    @classmethod
    def read(cls, path: str) -> Question:
        with np.load(path) as found:
            shoppers, items = found["shape"].tolist()
            arrays = {name: found[name] for name in ("user", "item", "at", "judged", "attribute_item", "attribute")}
            return cls(shape=(shoppers, items), count=int(found["count"]), **arrays)


# A fit in stages, each a function that gives the lists [J, count] by what is learned up to there. A model that is fitted at one
# blow has one stage; one that trains by epochs has several, and the stage to stop at is chosen with the setting.
Stages = Iterator[Callable[[], np.ndarray]]
Setting = TypeVar("Setting")


def held_out(question: Question) -> tuple[Question, list[np.ndarray]]:
    """The question without the last instant of a sample of shoppers, who are judged, and what each newly took then.

    The whole instant goes: a basket's other items would give its item away. Shoppers who have no earlier instant, or took nothing
    new in their last, cannot be in the sample.
    """
    shoppers, items = question.shape
    newest = np.full(shoppers, -np.inf)
    np.maximum.at(newest, question.user, question.at)
    last = question.at == newest[question.user]
    pair = question.user * items + question.item
    new = last & ~np.isin(pair, pair[~last])
    able = np.intersect1d(question.user[new], question.user[~last])
    sample = np.sort(np.random.default_rng(SEED).permutation(able)[:HELD_OUT_SHOPPERS])
    gone = last & np.isin(question.user, sample)
    rest = replace(question, user=question.user[~gone], item=question.item[~gone], at=question.at[~gone], judged=sample)
    taken = np.unique(pair[new & gone])
    return rest, [taken[taken // items == shopper] % items for shopper in sample]


def recall(lists: np.ndarray, targets: Sequence[np.ndarray]) -> float:
    """Share of all targets that are in the list [count] of their shopper; 0 without targets."""
    hits = sum(int(np.isin(taken, row).sum()) for row, taken in zip(lists, targets, strict=True))
    return hits / max(1, sum(map(len, targets)))


def answer(trials: Sequence[Setting], fit: Callable[[Question, Setting], Stages]) -> None:
    """Choose a setting and its stage, fit it on everything, and write the answer that the command line asks for."""
    question, tried = Question.read(sys.argv[1]), Path(sys.argv[2]).with_suffix(".trials.json")
    setting, stage = choose(question, trials, fit, tried)
    stages = fit(question, setting)
    for _ in range(stage):
        next(stages)
    np.savez(sys.argv[2], lists=next(stages)().astype(np.int64), trials=len(trials))
    tried.unlink(missing_ok=True)


def choose(
    question: Question, trials: Sequence[Setting], fit: Callable[[Question, Setting], Stages], tried: Path
) -> tuple[Setting, int]:
    """The setting and stage (from 0) with the best recall of what is held out. A trial ends at its first stage that is no better
    than the one before. Those that the file `tried` has are not repeated, and it gets the others."""
    if not 0 < len(trials) <= MOST_TRIALS:
        raise ValueError(f"{len(trials)} settings; every peer gets 1 to {MOST_TRIALS}")
    rest, targets = held_out(question)
    recalls: dict[str, list[float]] = json.loads(tried.read_text()) if tried.exists() else {}
    best, chosen = -1.0, (trials[0], 0)
    for setting in trials if targets else ():
        if str(setting) not in recalls:
            recalls[str(setting)] = _trial(rest, setting, fit, targets)
            unfinished = tried.with_suffix(".tmp")
            unfinished.write_text(json.dumps(recalls))
            unfinished.replace(tried)  # whole, or as it was
        for stage, found in enumerate(recalls[str(setting)]):
            if found > best:
                best, chosen = found, (setting, stage)
    print(f"chosen of {len(trials)} trials on {len(targets)} shoppers: {chosen[0]}, stage {chosen[1]}", flush=True)
    return chosen


def _trial(
    rest: Question, setting: Setting, fit: Callable[[Question, Setting], Stages], targets: Sequence[np.ndarray]
) -> list[float]:
    """Recall after each stage."""
    found: list[float] = []
    for stage, lists in enumerate(fit(rest, setting)):
        found.append(recall(lists(), targets))
        print(f"{setting}, stage {stage}: recall@{rest.count} {found[-1]:.4f}", flush=True)
        if stage and found[-1] <= found[-2]:
            break
    return found
