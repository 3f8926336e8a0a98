"""How libraries are asked and tuned, on events written by hand; and, where TEST_PEERS names the python of their environment
(benchmarks/peers/requirements.txt), what each library makes of a checkerboard."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from baselines import PEER_SCRIPTS, peer_lists
from benchmarks.peers import tuning
from benchmarks.peers.tuning import MOST_TRIALS, Question, answer, choose, held_out, recall
from catalog import Product
from tests.test_baselines import split_of

NONE = np.zeros(0, dtype=np.int64)


def question(events: list[tuple[int, int, float]], judged=(0,), count: int = 1) -> Question:
    """Of (shopper, item, time), in time order."""
    user, item, at = (np.array(column) for column in zip(*events, strict=True))
    return Question(user, item, at.astype(float), (6, 9), np.array(judged), count, NONE, NONE)


EVENTS = [
    (0, 1, 10), (0, 2, 20), (0, 3, 30), (0, 1, 30), (0, 4, 30),  # a basket last; 1 is nothing new in it
    (1, 5, 30),  # no earlier instant
    (2, 6, 10), (2, 6, 40),  # nothing new at last
    (3, 7, 50), (3, 8, 60),
]  # fmt: skip


def test_the_last_instant_is_held_out_whole_and_what_was_new_in_it_is_the_target():
    rest, targets = held_out(question(EVENTS))
    assert rest.judged.tolist() == [0, 3]
    assert [taken.tolist() for taken in targets] == [[3, 4], [8]]
    kept = [*EVENTS[:2], *EVENTS[5:9]]
    assert list(zip(rest.user, rest.item, rest.at, strict=True)) == kept


def test_a_sample_of_shoppers_is_held_out_and_the_others_stay_whole(monkeypatch):
    monkeypatch.setattr(tuning, "HELD_OUT_SHOPPERS", 1)
    rest, targets = held_out(question(EVENTS))
    assert len(rest.judged) == len(targets) == 1
    gone = 3 if rest.judged[0] == 0 else 1
    assert len(rest.user) == len(EVENTS) - gone
    assert held_out(question(EVENTS))[0].judged == rest.judged  # the same for every library


def test_recall_counts_targets_not_shoppers():
    assert recall(np.array([[3, 9], [8, -1]]), [np.array([3, 4]), np.array([8])]) == 2 / 3
    assert recall(np.zeros((0, 2)), []) == 0.0


# Lists for shoppers 0 and 3 that hold so many of the three held-out items.
LISTS = {0: [[0, 0], [0, 0]], 1: [[3, 0], [0, 0]], 2: [[3, 4], [0, 0]], 3: [[3, 4], [8, 0]]}


class Scripted:
    """A library whose lists hit as often as told, setting by setting and stage by stage; what it fits is kept."""

    def __init__(self, hits: dict[str, list[int]]) -> None:
        self.hits = hits
        self.fitted: list[tuple[str, int, int]] = []

    def __call__(self, asked: Question, setting: str) -> Iterator:
        for stage, hits in enumerate(self.hits[setting]):
            self.fitted.append((setting, stage, len(asked.user)))
            yield lambda hits=hits: np.array(LISTS[hits])


def test_the_best_setting_and_stage_are_chosen_and_a_trial_ends_when_it_gets_no_better(tmp_path, capsys):
    library = Scripted({"a": [1, 2, 2, 3], "b": [0, 1, 3, 2], "c": [3]})
    chosen = choose(question(EVENTS, count=2), ["a", "b", "c"], library, tmp_path / "tried")
    assert chosen == ("b", 2)  # c is no better: the first stays
    assert [(setting, stage) for setting, stage, _ in library.fitted] == [
        ("a", 0), ("a", 1), ("a", 2),  # and not the third, which would have been the best
        ("b", 0), ("b", 1), ("b", 2), ("b", 3), ("c", 0),
    ]  # fmt: skip
    assert {events for *_, events in library.fitted} == {len(EVENTS) - 4}
    assert capsys.readouterr().out.endswith("chosen of 3 trials on 2 shoppers: b, stage 2\n")


def test_without_anyone_to_hold_out_the_first_setting_is_taken(tmp_path):
    library = Scripted({"a": [0], "b": [3]})
    assert choose(question(EVENTS[5:8]), ["a", "b"], library, tmp_path / "tried") == ("a", 0)
    assert library.fitted == []


def test_who_is_stopped_in_a_trial_does_not_repeat_the_ones_before(tmp_path):
    class Stopped(Scripted):
        def __call__(self, asked: Question, setting: str) -> Iterator:
            for stage, lists in enumerate(super().__call__(asked, setting)):
                if (setting, stage) == ("b", 1):
                    raise KeyboardInterrupt
                yield lists

    hits = {"a": [1, 2, 2], "b": [1, 3, 3], "c": [0, 0]}
    with pytest.raises(KeyboardInterrupt):
        choose(question(EVENTS, count=2), ["a", "b", "c"], Stopped(hits), tmp_path / "tried")
    library = Scripted(hits)
    assert choose(question(EVENTS, count=2), ["a", "b", "c"], library, tmp_path / "tried") == ("b", 1)
    assert [(setting, stage) for setting, stage, _ in library.fitted] == [
        ("b", 0), ("b", 1), ("b", 2), ("c", 0), ("c", 1),
    ]  # fmt: skip
    hits["b"] = [0]  # of a trial that is known nobody asks again, nor of what was chosen
    assert choose(question(EVENTS, count=2), ["a", "b", "c"], library, tmp_path / "tried") == ("b", 1)


def test_no_library_gets_more_trials_than_another(tmp_path):
    with pytest.raises(ValueError, match="7 settings"):
        choose(question(EVENTS), ["a"] * (MOST_TRIALS + 1), Scripted({}), tmp_path / "tried")


def test_the_answer_is_of_a_fit_on_everything_up_to_the_chosen_stage(tmp_path, monkeypatch):
    asked = question(EVENTS, count=2)
    fields = {name: getattr(asked, name) for name in Question.__dataclass_fields__}
    np.savez(tmp_path / "question.npz", **fields)
    monkeypatch.setattr(sys, "argv", ["peer.py", str(tmp_path / "question.npz"), str(tmp_path / "answer.npz")])
    library = Scripted({"a": [0, 0], "b": [1, 2, 1]})
    answer(["a", "b"], library)
    found = np.load(tmp_path / "answer.npz")
    assert (found["lists"].tolist(), found["trials"]) == ([[3, 4], [0, 0]], 2)
    assert library.fitted[-2:] == [("b", 0, len(EVENTS)), ("b", 1, len(EVENTS))]
    assert {path.name for path in tmp_path.iterdir()} == {"question.npz", "answer.npz"}


@pytest.mark.skipif(
    "TEST_PEERS" not in os.environ, reason="TEST_PEERS does not name the python of the peers' environment"
)
@pytest.mark.parametrize("name", PEER_SCRIPTS)
def test_every_library_completes_a_checkerboard(name, tmp_path):
    """Shoppers of even number take even items, all but one; that one is right for each, and nothing else is as likely."""
    products = [
        Product(product_id=f"{i:02}", title="x", std={"colour": ["black", "white"][i % 2 : i % 2 + 1]})
        for i in range(20)
    ]
    random = np.random.default_rng(0)
    events = []
    for shopper in range(120):
        left_out = 2 * (shopper // 2 % 10) + shopper % 2
        own = [item for item in range(shopper % 2, 20, 2) if item != left_out]
        events += [(f"{shopper:03}", f"{item:02}", float(day)) for day, item in enumerate(random.permutation(own))]
    split = replace(split_of(events, products), cut=0.0)
    peers = Path(os.environ["TEST_PEERS"])
    lists = peer_lists(peers, PEER_SCRIPTS[name], split, split.histories.user_ids, 1, tmp_path)
    assert lists is not None
    right = [f"{2 * (shopper // 2 % 10) + shopper % 2:02}" for shopper in range(120)]
    assert np.mean([found == [item] for found, item in zip(lists, right, strict=True)]) > 0.9
