"""The command line of every script: what `run_script` accepts, refuses and prints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, Field, ValidationError
from pydantic_settings import CliPositionalArg

from settings import Settings, UserError


class Options(Settings):
    """Bake bread.

    A second paragraph.
    """

    flour: CliPositionalArg[Literal["rye", "wheat"]] = Field(description="which flour")
    folder: CliPositionalArg[Path | None] = Field(None, description="where the loaf goes")
    loaves: int = Field(1, ge=1, description="how many")


@pytest.fixture
def run(monkeypatch, tmp_path, capsys, exit_code):
    """Runs the script with arguments in an empty folder; gives (exit code, options, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    for name in ("FLOUR", "FOLDER", "LOAVES", "SEED", "DATABASE_URL", "DATA_DIR"):
        monkeypatch.delenv(name, raising=False)

    def _run(*arguments, main=None):
        seen: list[Options] = []
        code = exit_code(Options, main or seen.append, "/somewhere/bake.py", *arguments)
        out, err = capsys.readouterr()
        return code, seen[0] if seen else None, out, err

    return _run


def test_positional_and_named_options(run):
    code, options, _, _ = run("rye", "out", "--loaves", "3", "--data-dir", "db")
    assert code == 0
    assert (options.flour, options.folder, options.loaves, options.data_dir) == ("rye", Path("out"), 3, Path("db"))


def test_a_named_option_may_stand_between_positional_ones(run):
    _, options, _, _ = run("--seed", "4", "rye", "--loaves", "3", "out")
    assert (options.flour, options.folder, options.loaves, options.seed) == ("rye", Path("out"), 3, 4)


def test_optional_positional_argument_may_be_left_out(run):
    assert run("wheat")[1].folder is None


def test_environment_and_env_file_give_options_and_the_command_line_wins(run, monkeypatch):
    Path(".env").write_text("LOAVES=2\nSEED=7\n# a comment\nUNKNOWN=1\n")
    assert run("rye")[1].loaves == 2
    monkeypatch.setenv("LOAVES", "5")
    assert run("rye")[1].loaves == 5
    options = run("rye", "--loaves", "6")[1]
    assert (options.loaves, options.seed) == (6, 7)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["spelt"], "flour: Input should be 'rye' or 'wheat' (got 'spelt')"),
        ([], "FLOUR"),
        (["rye", "--yeast", "1"], "unrecognized arguments: --yeast"),
        (["rye", "--loaves", "many"], "loaves: Input should be a valid integer"),
        (["rye", "--loaves", "0"], "loaves: Input should be greater than or equal to 1 (got '0')"),
        (["rye", "--loaves"], "--loaves: expected one argument"),
        (["rye", "out", "again"], "unrecognized arguments: again"),
        (["rye", "--seed", "-1"], "seed: Input should be greater than or equal to 0"),
    ],
)
def test_a_bad_option_is_one_line_and_exit_code_2(run, arguments, said):
    code, options, out, err = run(*arguments)
    assert (code, options, out) == (2, None, "")
    assert err.startswith("bake.py: ")
    assert said in err
    assert err.endswith("see bake.py --help\n")
    assert err.count("\n") == 1


def test_a_bad_environment_variable_is_one_line_too(run, monkeypatch):
    monkeypatch.setenv("SEED", "dice")
    code, _, _, err = run("rye")
    assert code == 2
    assert err.startswith("bake.py: seed: ")
    assert err.count("\n") == 1


def test_help_shows_every_option_with_its_description_and_exits_0(run):
    code, options, out, err = run("--help")
    assert (code, options, err) == (0, None, "")
    assert "Bake bread.\n\nA second paragraph.\n" in out
    for text in ("FLOUR", "which flour", "[FOLDER]", "--loaves", "how many", "--data-dir", "--seed", "--database-url"):
        assert text in out


def test_what_the_person_can_mend_is_one_line_and_exit_code_2(run):
    def no_oven(options):
        raise UserError("no oven\n  in the kitchen")

    code, _, _, err = run("rye", main=no_oven)
    assert (code, err) == (2, "bake.py: no oven in the kitchen\n")


def test_ctrl_c_exits_130(run):
    def interrupted(options):
        raise KeyboardInterrupt

    assert run("rye", main=interrupted)[0] == 130


def test_a_script_whose_output_nobody_reads_any_more_ends_quietly(tmp_path):
    script = tmp_path / "bake.py"
    script.write_text(
        "from settings import Settings, run_script\n"
        "def main(options):\n"
        "    print('dough')\n"
        "    for _ in range(100_000):\n"
        "        print('a loaf of bread')\n"
        "run_script(Settings, main)\n"
    )
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "dough\n"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_a_bug_in_the_script_is_not_blamed_on_the_options(run):
    class Loaf(BaseModel):
        weight: int

    with pytest.raises(ValidationError):
        run("rye", main=lambda options: Loaf(weight="heavy"))
