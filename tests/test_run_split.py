"""The steps of a split one after the other, with scripts of a line in place of hours of training."""

from __future__ import annotations

import json
import sys

import pytest

import run_split
from run_split import SplitOptions, main
from settings import run_script

# What the real one leaves: a release whose manifest has the part.
TRAIN = """
import json, os, pathlib
print("train", file=open("log", "a"))
folder = pathlib.Path(os.environ["MODELS_DIR"], "split")
folder.mkdir(exist_ok=True)
(folder / "manifest.json").write_text(json.dumps({"name": "split", "created_at": "2024", "item_tower": {}}))
"""
SCRIPTS = {
    "import_data.py": "import sys; print('import', *sys.argv[1:], file=open('log', 'a'))",
    "train_simcse.py": TRAIN,
    "evaluate.py": "print('evaluate', file=open('log', 'a')); bytearray(100 * 2**20)",
}
FAILING = "import sys; print('evaluate', file=open('log', 'a')); sys.exit(3)"


@pytest.fixture
def run(tmp_path, monkeypatch, capfd, exit_code):
    """Runs `run_split.py rtr FOLDER` in a folder with these scripts; gives exit code, stderr, and the steps that ran."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rentals").mkdir()
    steps = [["import_data.py", "{folder}", "--until", "2017-07-01"], ["train_simcse.py"], ["evaluate.py"]]
    monkeypatch.setitem(run_split.PIPELINES, "rtr", steps)
    for name, text in SCRIPTS.items():
        (tmp_path / name).write_text(text)

    def call(*arguments):
        (tmp_path / "log").write_text("")
        code = exit_code(SplitOptions, main, "run_split.py", "rtr", "rentals", "--data-dir", "data", *arguments)
        return code, capfd.readouterr().err, (tmp_path / "log").read_text().splitlines()

    return call


def noted(folder):
    return [(row["split"], row["step"]) for row in json.loads((folder / "docs/steps.json").read_text())]


IMPORT = ("rtr", "import_data.py FOLDER --until 2017-07-01")


def test_every_step_runs_in_order_and_its_time_and_memory_are_noted(run, tmp_path):
    assert run() == (0, "", ["import rentals --until 2017-07-01", "train", "evaluate"])
    assert noted(tmp_path) == [IMPORT, ("rtr", "train_simcse.py"), ("rtr", "evaluate.py")]
    training, evaluation = json.loads((tmp_path / "docs/steps.json").read_text())[1:]
    assert 100 <= evaluation["megabytes"] < 200  # the script takes a hundred, an interpreter ten
    assert training["megabytes"] < 100  # and nothing of this process, which holds more
    assert evaluation["seconds"] >= 0


def test_a_failing_step_stops_the_run_which_goes_on_where_it_was(run, tmp_path):
    (tmp_path / "evaluate.py").write_text(FAILING)
    code, said, ran = run()
    assert (code, ran[1:]) == (2, ["train", "evaluate"])
    assert said == "run_split.py: evaluate.py ended with status 3; mend it and run this again\n"
    assert noted(tmp_path) == [IMPORT, ("rtr", "train_simcse.py")]

    (tmp_path / "evaluate.py").write_text(SCRIPTS["evaluate.py"])
    code, said, ran = run()
    assert (code, said) == (0, "")
    assert "train" not in ran
    assert ran[-1] == "evaluate"
    assert noted(tmp_path) == [IMPORT, ("rtr", "train_simcse.py"), ("rtr", "evaluate.py")]


def test_a_step_killed_by_a_signal_is_a_failure_too(run, tmp_path):
    (tmp_path / "import_data.py").write_text("import os; os.kill(os.getpid(), 9)")
    assert run() == (2, "run_split.py: import_data.py ended with status -9; mend it and run this again\n", [])
    assert not (tmp_path / "docs").exists()


def test_fresh_starts_over_but_keeps_the_text_encoder(run, tmp_path):
    run()
    database = tmp_path / "elsewhere"  # as root, the database is a link to where the server's user may enter
    database.mkdir()
    (tmp_path / "data/rtr/postgres").symlink_to(database)
    (tmp_path / "data/text_encoder/weights").write_text("large")
    code, _, ran = run("--fresh")
    assert (code, ran[1:]) == (0, ["train", "evaluate"])
    assert not database.exists()
    assert (tmp_path / "data/rtr/text_encoder/weights").read_text() == "large"
    assert len(noted(tmp_path)) == 3


def test_a_folder_that_is_not_there_is_named_before_anything_starts(run, tmp_path):
    (tmp_path / "rentals").rmdir()
    code, said, ran = run()
    assert (code, ran) == (2, [])
    assert said.startswith("run_split.py: rentals is not a folder")
    assert not (tmp_path / "data").exists()


def test_the_sample_shop_needs_no_folder(run, tmp_path, monkeypatch):
    monkeypatch.setitem(run_split.PIPELINES, "sample-lexicon", [["import_data.py", "sample"], ["evaluate.py"]])
    monkeypatch.setattr(sys, "argv", ["run_split.py", "sample-lexicon", "--data-dir", "data"])
    (tmp_path / "log").write_text("")
    run_script(SplitOptions, main)
    assert (tmp_path / "log").read_text().splitlines() == ["import sample", "evaluate"]
    assert noted(tmp_path) == [("sample-lexicon", "import_data.py sample"), ("sample-lexicon", "evaluate.py")]
