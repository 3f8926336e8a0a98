"""What a release refuses to load: each damage is named, with its file and what to do, and harms no other release."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import release as releases
from catalog import FeatureSchema
from model_reranker import RerankerConfig
from release import PARTS, PROMOTIONS, SEARCH_SPACE, USER_TOWER, Release
from search_space import SearchSpace
from settings import UserError
from vocab import ReVocab, StdVocab

MEND = "restore it, train again, or use another release"
SCHEMA = FeatureSchema(std={"colour": ["red", "blue"]}, re=["fit"])


def network() -> nn.Module:
    return nn.Linear(3, 2)


@pytest.fixture
def saved(tmp_path) -> Release:
    release = Release.create(tmp_path, "saved")
    release.save_weights(USER_TOWER, network())
    release.save_vocabularies(SCHEMA, StdVocab(SCHEMA), ReVocab(SCHEMA.re))
    return release


def test_what_was_saved_is_what_is_loaded(saved):
    torch.manual_seed(1)
    first, second = network(), network()
    saved.save_weights(USER_TOWER, first)
    Release.open(saved.folder.parent).load_weights(USER_TOWER, second)
    assert torch.equal(first.weight, second.weight)
    assert not second.training
    assert saved.schema() == SCHEMA
    assert saved.vocabularies()[0].words == StdVocab(SCHEMA).words


def test_a_reranker_of_an_earlier_version_is_trusted_alike_with_everybody(saved):
    config = RerankerConfig(12, 9, {"colour": 1}, 4, 5, [], [], hidden=(16, 8), trust=0.25, stranger_trust=0.75)
    saved.record("reranker", config=config)
    assert Release.open(saved.folder.parent).reranker_config() == config
    del saved.manifest["reranker"]["config"]["stranger_trust"]
    saved.save_manifest()
    assert Release.open(saved.folder.parent).reranker_config() == replace(config, stranger_trust=0.25)


def refused(release: Release, file: str, said: str) -> None:
    with pytest.raises(UserError) as stopped:
        release.load_weights(file, network())
    assert str(release.folder / file) in str(stopped.value)
    assert said in str(stopped.value)
    assert MEND in str(stopped.value)


def test_a_weight_file_with_one_bit_changed_is_refused(saved):
    content = bytearray((saved.folder / USER_TOWER).read_bytes())
    content[len(content) // 2] ^= 1
    (saved.folder / USER_TOWER).write_bytes(content)
    refused(saved, USER_TOWER, "sha256 differs")


def test_a_weight_file_of_another_release_is_refused(saved):
    other = Release.create(saved.folder.parent, "other")
    other.save_weights(USER_TOWER, network())
    (saved.folder / USER_TOWER).write_bytes((other.folder / USER_TOWER).read_bytes())
    refused(saved, USER_TOWER, "sha256 differs")


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"weight": torch.full((2, 3), float("nan")), "bias": torch.zeros(2)}, "'weight' is not finite"),
        ({"weight": torch.zeros(2, 3), "bias": torch.tensor([0.0, -float("inf")])}, "'bias' is not finite"),
        ({"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}, "size mismatch for weight"),
        ({"weight": torch.zeros(2, 3)}, 'Missing key(s) in state_dict: "bias"'),
        ([1, 2], "cannot be loaded"),
        (Path("/"), "cannot be loaded"),  # an object that only running code could make: never unpickled
    ],
)
def test_weights_that_do_not_fit_are_refused_even_with_the_right_checksum(saved, state: Any, said):
    torch.save(state, saved.folder / USER_TOWER)
    saved.manifest["files"][USER_TOWER] = hashlib.sha256((saved.folder / USER_TOWER).read_bytes()).hexdigest()
    refused(saved, USER_TOWER, said)


def test_a_file_beyond_any_model_is_refused_before_it_is_read(saved, monkeypatch):
    monkeypatch.setattr(releases, "MAX_CHECKPOINT_BYTES", 100)
    monkeypatch.setattr(releases, "_sha256", None)  # reading it would call this
    refused(saved, USER_TOWER, "more than any model of ours")


def test_a_missing_weight_file_is_named(saved):
    (saved.folder / USER_TOWER).unlink()
    with pytest.raises(UserError, match=r"release saved has no user_tower\.pth; run the training script"):
        saved.load_weights(USER_TOWER, network())


def test_the_search_space_comes_back_and_a_release_indexed_without_one_says_what_to_do(saved):
    saved.record("index", dimensions=4)
    with pytest.raises(
        UserError, match=r"indexed by an earlier version of this program; run build_index\.py --release saved"
    ):
        saved.search_space()
    random = np.random.default_rng(0)
    space = SearchSpace.fit(random.normal(size=(50, 4)), random.normal(size=(20, 4)), -1)
    saved.save_weights(SEARCH_SPACE, space)
    rows = random.normal(size=(3, 4))
    np.testing.assert_array_equal(saved.search_space().place(rows)[0], space.place(rows)[0])


def test_weights_that_diverged_are_not_saved(saved):
    model = network()
    nn.init.constant_(model.bias, float("inf"))
    before = (saved.folder / USER_TOWER).read_bytes()
    with pytest.raises(UserError, match=r"training of user_tower\.pth diverged: 'bias'.*--learning-rate"):
        saved.save_weights(USER_TOWER, model)
    assert (saved.folder / USER_TOWER).read_bytes() == before


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff\xfe", b'{"fields": ["colour"]}'])
@pytest.mark.parametrize("file", ["schema.json", "std_vocab.json", "re_vocab.json"])
def test_a_damaged_vocabulary_or_schema_is_named(saved, file, content):
    if content is None:
        (saved.folder / file).unlink()
    else:
        (saved.folder / file).write_bytes(content)
    with pytest.raises(UserError) as stopped:
        saved.schema() if file == "schema.json" else saved.vocabularies()
    assert f"{saved.folder / file} is missing or damaged; {MEND}" in str(stopped.value)


@pytest.mark.parametrize("content", [b"", b'{"name": "brok', b"[]", b"{}", b"\xff\xfe"])
def test_a_damaged_manifest_is_named_and_the_other_releases_open(saved, content):
    folder = Release.create(saved.folder.parent, "zzz-broken").folder
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(UserError) as stopped:
        Release.open(saved.folder.parent, "zzz-broken")
    assert f"{folder / 'manifest.json'} is missing or damaged; {MEND}" in str(stopped.value)
    assert Release.names(saved.folder.parent) == ["saved"]
    assert Release.open(saved.folder.parent, "saved").manifest == saved.manifest
    assert Release.open(saved.folder.parent).name == "saved"


def test_a_release_that_is_not_there_is_said_with_those_that_are(saved, tmp_path):
    with pytest.raises(UserError, match=r"no release 'ghost' in .*\(there are: saved\)"):
        Release.open(tmp_path, "ghost")
    with pytest.raises(UserError, match="run train_simcse"):
        Release.open(tmp_path / "empty")


def test_releases_are_listed_by_age(tmp_path):
    (tmp_path / "no-release").mkdir()
    for name, created_at in (("b", "2024-01-02"), ("c", "2024-01-01"), ("a", "2024-01-03")):
        release = Release.create(tmp_path, name)
        release.manifest["created_at"] = created_at
        release.save_manifest()
    assert Release.names(tmp_path) == ["c", "b", "a"]
    assert Release.open(tmp_path).name == "a"
    assert json.loads((tmp_path / "a/manifest.json").read_text())["name"] == "a"


# --- what was live ----------------------------------------------------------------------------------------------------


def complete(models_dir: Path, name: str) -> Release:
    release = Release.create(models_dir, name)
    for part in PARTS:
        release.record(part)
    return release


def test_the_way_back_goes_one_release_further_each_time(tmp_path):
    for name in ("a", "b", "c"):
        complete(tmp_path, name).make_live()
    assert Release.past(tmp_path) == ["a", "b", "c"]
    Release.open(tmp_path, "b").make_live(back=True)
    assert (Release.current(tmp_path), Release.past(tmp_path), Release.previous(tmp_path)) == ("b", ["a", "b"], "a")
    Release.open(tmp_path, "a").make_live(back=True)
    assert Release.previous(tmp_path) is None
    complete(tmp_path, "d").make_live()
    assert Release.previous(tmp_path) == "a"


def test_there_is_no_way_back_where_nothing_ever_was(tmp_path):
    with pytest.raises(UserError, match="MODELS_DIR says where"):
        releases.rollback(None, tmp_path / "nowhere")
    with pytest.raises(UserError, match="no release that was live before"):
        releases.rollback(None, tmp_path)


def test_a_release_that_was_deleted_is_passed_over_on_the_way_back(tmp_path):
    for name in ("a", "b", "c"):
        complete(tmp_path, name).make_live()
    shutil.rmtree(tmp_path / "b")
    assert Release.previous(tmp_path) == "a"


def test_what_is_deleted_while_it_is_checked_does_not_go_live(tmp_path):
    complete(tmp_path, "a").make_live()
    late = complete(tmp_path, "b")
    shutil.rmtree(tmp_path / "b")
    with pytest.raises(UserError, match="no release 'b'"):
        late.make_live()
    assert (Release.current(tmp_path), Release.past(tmp_path)) == ("a", ["a"])


@pytest.mark.parametrize("name", ["", "-a", "Summer", "2026.1", "x" * 41, "../a"])
def test_a_name_that_no_table_can_have_is_refused_before_anything_is_trained(tmp_path, name):
    with pytest.raises(UserError, match="is no release name"):
        Release.create(tmp_path, name)
    assert not list(tmp_path.iterdir())


def test_what_was_live_before_anything_was_written_down_counts_too(tmp_path):
    complete(tmp_path, "a")
    (tmp_path / "current").write_text("a\n")
    complete(tmp_path, "b").make_live()
    assert Release.previous(tmp_path) == "a"


def test_a_line_cut_short_costs_that_line_alone(tmp_path):
    for name in ("a", "b"):
        complete(tmp_path, name).make_live()
    with (tmp_path / PROMOTIONS).open("a") as log:
        log.write('{"release": "c", "ba\n')
    assert Release.previous(tmp_path) == "a"


def test_a_release_that_is_not_complete_does_not_go_live(tmp_path):
    complete(tmp_path, "a").make_live()
    unfinished = Release.create(tmp_path, "b")
    unfinished.record("item_tower")
    with pytest.raises(UserError, match=r"not complete \(missing: user_tower, reranker, index\)"):
        unfinished.make_live()
    assert Release.past(tmp_path) == ["a"]
