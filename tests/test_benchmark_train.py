"""benchmarks/train.py and the file its figures go to: what is counted, what is kept, what is said when a library does not run; and,
where TEST_PEERS names the python of their environment (benchmarks/peers/requirements.txt), what the libraries answer."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from benchmarks import performance
from benchmarks.performance import Row, save
from benchmarks.train import WARM_UP, BenchmarkOptions, Comparison, Steps, ask_peer, clocked, main, rows_of
from settings import UserError
from tests.tiny import tiny_text_encoder

ROW = Row("train", 3000, "items/s", 10.0, 5.0, 2.0, "abc", "python -m benchmarks.train")


# ------------------------------------------------------------------------------------------------- docs/performance.json
def test_a_row_takes_the_place_of_the_one_that_it_measures_again_and_all_stand_sorted(tmp_path):
    file = tmp_path / "docs" / "performance.json"
    other = [replace(ROW, bench="serve"), replace(ROW, items=200), replace(ROW, metric="a")]
    save([ROW, *other], file)
    again = replace(ROW, value=12.0, ratio=2.4, commit="def")
    save([again], file)
    serve, few, a = other
    assert json.loads(file.read_text()) == [asdict(row) for row in (serve, few, a, again)]


@pytest.mark.parametrize("text", ["{", '{"rows": []}', '[{"bench": "train"}]', "[1]"])
def test_a_file_of_something_else_is_left_as_it_is(tmp_path, text):
    file = tmp_path / "performance.json"
    file.write_text(text)
    with pytest.raises(UserError, match=r"performance\.json"):
        save([ROW], file)
    assert file.read_text() == text


def test_a_figure_that_is_no_number_is_not_written(tmp_path):
    file = tmp_path / "performance.json"
    save([ROW], file)
    before = file.read_text()
    with pytest.raises(ValueError, match="JSON"):
        save([replace(ROW, value=float("nan"))], file)
    assert file.read_text() == before


def test_a_library_that_was_not_asked_has_no_row():
    rows = rows_of([Comparison("a", 30.0, 20.0), Comparison("b", 30.0, None)], 3000, "command")
    assert [(row.metric, row.items, row.value, row.floor, row.ratio) for row in rows] == [("a", 3000, 30.0, 20.0, 1.5)]


# ----------------------------------------------------------------------------------------------------------------- rates
def steps_of(seconds: list[float], epochs: list[int], amount: int = 8) -> Steps:
    """Steps that took so long each, and one more whose end nobody noted."""
    started = np.concatenate([[0.0], np.cumsum(seconds)])
    return Steps(started.tolist(), epochs, [amount] * len(epochs))


def test_the_first_steps_and_what_lies_between_epochs_do_not_count():
    warm_up = [100.0] * WARM_UP
    # Ten steps of two seconds; one of them is followed by a long validation, which starts no new step.
    seconds = [*warm_up, *[2.0] * 5, 1000.0, *[2.0] * 5]
    epochs = [0] * (WARM_UP + 6) + [1] * 6
    assert steps_of(seconds, epochs).rate() == 4.0


def test_a_rate_is_the_median_of_stretches_so_one_disturbed_stretch_does_not_move_it():
    seconds = [0.0] * WARM_UP + [1.0, 1.0, 1.0, 1.0, 50.0]
    assert steps_of(seconds, [0] * (len(seconds) + 1)).rate() == 8.0


def test_steps_too_few_to_measure_are_said_to_be():
    with pytest.raises(UserError, match="4 steps are too few"):
        steps_of([1.0] * (WARM_UP + 4), [0] * (WARM_UP + 5)).rate()


def test_a_stage_is_clocked_step_by_step_and_is_as_before_afterwards():
    stage = ModuleType("stage")

    def fit(model, batches, loss, metric, state=None):
        return [loss(model, rows) for epoch in range(2) for rows in batches(epoch)], metric

    stage.fit = fit
    batches = {0: [np.arange(3), np.arange(2)], 1: [np.arange(4)]}
    with clocked(stage) as training:
        answer = stage.fit("model", batches.get, lambda model, rows: len(rows), "recall", state="state")
    assert answer == ([3, 2, 4], "recall")
    assert (training.model, training.state) == ("model", "state")
    assert (training.steps.epoch, training.steps.amount) == ([0, 0, 1], [3, 2, 4])
    assert stage.fit is fit


# ----------------------------------------------------------------------------------------------------------------- peers
def test_without_peers_nothing_is_asked(tmp_path):
    assert ask_peer(BenchmarkOptions(_env_file=None), tmp_path, "none.py", amounts=["a", "b"]) == [None, None]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("python", ["false", "no/such/python"])
def test_a_library_that_does_not_run_is_named(tmp_path, python):
    options = BenchmarkOptions(_env_file=None, peers=Path(python))
    with pytest.raises(UserError, match=r"train_rectools_sasrec\.py did not run.*requirements\.txt"):
        ask_peer(options, tmp_path, "train_rectools_sasrec.py", amounts=["targets"], user=np.zeros(1))


@pytest.mark.skipif(
    "TEST_PEERS" not in os.environ, reason="TEST_PEERS does not name the python of the peers' environment"
)
@pytest.mark.parametrize(
    ("script", "variant", "counted"),
    [
        ("train_sentence_transformers.py", "frozen", {"items": 4}),
        ("train_sentence_transformers.py", "whole", {"items": 4}),
        # Shoppers of three events: the last two of each are targets.
        ("train_rectools_sasrec.py", "", {"sequences": 4, "targets": 8}),
    ],
)
def test_a_library_says_what_each_step_worked_on(tmp_path, script, variant, counted):
    options = BenchmarkOptions(_env_file=None, peers=Path(os.environ["TEST_PEERS"]))
    ask_peer(
        options, tmp_path, script, variant, amounts=list(counted), encoder=str(tiny_text_encoder(tmp_path / "encoder")),
        titles=[f"dress {number}" for number in range(16)], max_tokens=8, temperature=0.1,
        user=np.arange(16).repeat(3), item=np.arange(48) % 7, length=5, heads=2, blocks=1, dropout=0.1, negatives=4,
        width=8, batch=4, learning_rate=0.001, seed=0, steps=16,
    )  # fmt: skip
    with np.load(tmp_path / "answer.npz") as answer:
        for name, amount in counted.items():
            assert answer[name].tolist() == [amount] * len(answer["started"])
        assert answer["epoch"].tolist() == np.repeat(np.arange(4), 4).tolist()


# ----------------------------------------------------------------------------------------------------------------- whole
def test_every_stage_is_measured_and_what_was_compared_is_written(tmp_path, monkeypatch, capsys):
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    options = BenchmarkOptions(
        _env_file=None, text_encoder=str(tiny_text_encoder(tmp_path / "encoder")), products=150, batch_size=16, lists=2
    )
    try:
        main(options)
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr().out
    for stage in ("item tower", "user tower", "reranker"):
        assert f"\n{stage}, " in said
    (row,) = [Row(**found) for found in json.loads(performance.FILE.read_text())]
    assert (row.bench, row.items, row.metric) == ("train", 150, "reranker, rows/s; deepctr-torch's fit")
    assert row.value > 0
    assert row.ratio == pytest.approx(row.value / row.floor)
    assert row.command == "python -m benchmarks.train --products 150 --batch-size 16 --lists 2"
