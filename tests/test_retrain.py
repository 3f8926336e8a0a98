"""What a retraining is done with: the options of the live release, what the shop says now, what is given for a stage."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from release import PARTS, Release
from retrain import RetrainOptions, begin


@pytest.fixture
def live(tmp_path) -> Path:
    """A folder with a live release, which was trained when a cart counted 2 and with a seed of 7."""
    release = Release.create(tmp_path, "old")
    for part in PARTS:
        release.record(
            part, options={"event_weights": {"cart": 2.0}, "seed": 7, "epochs": 3, "models_dir": "elsewhere"}
        )
    release.make_live()
    return tmp_path


def asked(models_dir: Path, **options: object) -> RetrainOptions:
    return RetrainOptions(models_dir=models_dir, _env_file=None, **options)  # type: ignore[arg-type]


def test_what_nobody_says_anew_is_as_in_the_live_release(live):
    plan = begin(asked(live)).manifest["retrain"]
    assert plan["shop"] == {}
    assert plan["options"]["train_user"] == {"event_weights": {"cart": 2.0}, "seed": 7, "epochs": 3}


def test_what_the_shop_says_now_wins_and_a_run_that_was_begun_otherwise_does_not_go_on(live, monkeypatch):
    begin(asked(live))
    monkeypatch.setenv("EVENT_WEIGHTS", '{"cart": 5}')
    second = begin(asked(live, seed=8))
    assert second.manifest["retrain"]["shop"] == {"event_weights": {"cart": 5.0}, "seed": 8}
    resumed = begin(asked(live, seed=8))
    assert (resumed.name, resumed.manifest) == (second.name, second.manifest)


def test_a_quotation_mark_that_is_never_closed_stops_it_before_any_work():
    with pytest.raises(ValidationError, match="No closing quotation"):
        RetrainOptions(train_user="--epochs '5", _env_file=None)
