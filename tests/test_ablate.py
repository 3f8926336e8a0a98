"""Ablations: which steps of which variant run, what becomes of their figures; and a variant, really trained, that serves."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

import ablate
import build_index
import evaluate
import run_split
import train_reranker
import train_simcse
import train_user
from ablate import AblateOptions, main
from catalog import Event
from datasets import Source, sample_shop
from datasets.events import event_frame
from recommender import Recommender, Request
from release import Release
from settings import UserError, run_script
from store import Store
from text_encoder import TextEncoder

# What the real ones leave: a part of the release's manifest, with a report; and each shopper's share of the figures.
STEP = """
import json, os, pathlib, sys
name = pathlib.Path(sys.argv[0]).name
print(name, *sys.argv[1:], file=open("log", "a"))
file = pathlib.Path(os.environ["MODELS_DIR"], "split", "manifest.json")
part = {"train_simcse.py": "item_tower", "train_user.py": "user_tower", "train_reranker.py": "reranker"}.get(name)
if part:
    file.parent.mkdir(exist_ok=True)
    manifest = json.loads(file.read_text()) if file.exists() else {"name": "split", "created_at": "2024"}
    history = [{"epoch": 0, "ndcg@12": 0.1}, {"epoch": 1, "loss": 2.0, "ndcg@12": 0.2}]
    manifest[part] = {"made": sys.argv[1:], "report": {"metric": "ndcg@12", "best_epoch": 1, "history": history}}
    file.write_text(json.dumps(manifest))
"""
EVALUATE = (
    f"""{STEP}
sys.path.insert(0, {str(Path(run_split.__file__).parent)!r})
"""
    + """
import numpy as np
from metrics import Ratio, write_ratios
made = json.loads(file.read_text())
gain = 0.5 if "--no-context" in made["user_tower"]["made"] else 0.7
seed = int(sys.argv[sys.argv.index("--seed") + 1])
one = Ratio(np.array([gain + seed / 10, 0.2]), np.ones(2))
short = "ndcg@12" if sys.argv[1] == "hm-week" else "ndcg@10"
figures = {("retrieval", short, "all"): one, ("reranked", short, "all"): one, ("reranked", "mrr", "all"): one}
write_ratios(pathlib.Path(sys.argv[sys.argv.index("--per-shopper") + 1]), figures)
"""
)
STEPS = ["import_data.py", "train_simcse.py", "train_user.py", "train_reranker.py", "build_index.py"]


@pytest.fixture
def run(tmp_path, monkeypatch, capfd, exit_code):
    """Runs `ablate.py SPLIT FOLDER` with these scripts; gives exit code, stderr, and the steps that ran."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rentals").mkdir()
    steps = [["import_data.py", "{folder}"], *([step] for step in STEPS[1:])]
    for pipeline, splits in (("rtr", ["rtr-warm", "rtr-cold"]), ("hm-week", ["hm-week"])):
        judged = [["evaluate.py", split, "{folder}"] for split in splits]
        monkeypatch.setitem(run_split.PIPELINES, pipeline, steps + judged)
    for name in STEPS:
        (tmp_path / name).write_text(STEP)
    (tmp_path / "evaluate.py").write_text(EVALUATE)

    def call(*arguments, split="rtr"):
        (tmp_path / "log").write_text("")
        code = exit_code(AblateOptions, main, "ablate.py", split, "rentals", "--data-dir", "data", *arguments)
        ran = [line.partition(" --per-shopper")[0] for line in (tmp_path / "log").read_text().splitlines()]
        return code, capfd.readouterr().err, ran

    return call


def rows_of(folder):
    rows = json.loads((folder / "docs/results.json").read_text())
    return {(row["split"], row["model"], row["stage"], row["metric"]): row["value"] for row in rows}


ALL = ["train_simcse.py", "train_user.py", "train_reranker.py", "build_index.py"]
JUDGED = ["evaluate.py rtr-warm rentals --seed 0", "evaluate.py rtr-cold rentals --seed 0"]


def test_a_variant_shares_what_it_does_not_change_and_differs_in_what_it_does(run, tmp_path):
    code, said, ran = run("--seeds", "1", "--only", "no context", "--only", "mean pooling", "--only", "no transfer")
    assert (code, said) == (0, "")
    full = [f"{step} --seed 0" for step in ALL]
    assert ran == [
        "import_data.py rentals", *full, *JUDGED,
        "train_user.py --no-context --seed 0", *full[2:], *JUDGED,
        "train_simcse.py --fusion mean --seed 0", *full[1:], *JUDGED,
        "train_reranker.py --no-transfer --seed 0", full[3], *JUDGED,
    ]  # fmt: skip
    models = tmp_path / "data/ablation-rtr/saved_models"
    assert {folder.name for folder in models.iterdir()} == {
        "full-model-0", "no-context-0", "mean-pooling-0", "no-transfer-0",
    }  # fmt: skip


def test_figures_of_each_run_and_differences_of_both_seeds_are_saved(run, tmp_path):
    run("--seeds", "2", "--only", "no context")
    found = rows_of(tmp_path)
    for split in ("rtr-warm", "rtr-cold"):
        assert found[split, "ablation: full model, seed 0", "retrieval", "ndcg@10"] == pytest.approx(0.45)
        assert found[split, "ablation: no context, seed 1", "reranked", "ndcg@10"] == pytest.approx(0.40)
        against = (split, "ablation: no context against the full model", "reranked", "ndcg@10 difference")
        assert found[against] == pytest.approx(-0.1)
    assert not any(metric == "mrr" for *_, metric in found)
    page = (tmp_path / "docs/results.md").read_text()
    assert "| no context | 2 | 0.3750 ± 0.0354 | 0.3750 ± 0.0354 |" in page
    curves = json.loads((tmp_path / "docs/curves.json").read_text())
    assert {(curve["model"], curve["part"]) for curve in curves} == {
        ("ablation: full model, seed 0", "reranker"), ("ablation: full model, seed 1", "reranker"),
    }  # fmt: skip


def test_another_split_has_figures_and_runs_of_its_own(run, tmp_path):
    code, said, ran = run("--seeds", "1", "--only", "no title", split="hm-week")
    assert (code, said) == (0, "")
    then = [*(f"{step} --seed 0" for step in ALL[1:]), "evaluate.py hm-week rentals --seed 0"]
    full, without = "train_simcse.py --seed 0", "train_simcse.py --no-title --seed 0"
    assert ran == ["import_data.py rentals", full, *then, without, *then]
    assert rows_of(tmp_path)["hm-week", "ablation: no title, seed 0", "reranked", "ndcg@12"] == pytest.approx(0.45)
    assert (tmp_path / "data/ablation-hm-week").is_dir()


def test_what_is_finished_is_not_run_again_and_a_stopped_run_goes_on(run, tmp_path):
    run("--seeds", "1", "--only", "no context")
    before = (tmp_path / "docs/results.json").read_bytes()
    assert run("--seeds", "1", "--only", "no context") == (0, "", [])
    assert (tmp_path / "docs/results.json").read_bytes() == before
    (tmp_path / "docs/results.json").unlink()
    assert run("--seeds", "1", "--only", "no context") == (0, "", [])
    assert (tmp_path / "docs/results.json").read_bytes() == before

    (tmp_path / "train_reranker.py").write_text("import sys; sys.exit(3)")
    code, said, ran = run("--seeds", "1", "--only", "no profile")
    assert (code, said) == (2, "ablate.py: train_reranker.py ended with status 3; mend it and run this again\n")
    assert ran == ["import_data.py rentals", "train_user.py --no-profile --seed 0"]
    (tmp_path / "train_reranker.py").write_text(STEP)
    assert run("--seeds", "1", "--only", "no profile")[2] == [
        "import_data.py rentals", "train_reranker.py --seed 0", "build_index.py --seed 0", *JUDGED,
    ]  # fmt: skip


def test_an_unknown_variant_or_folder_is_named_before_anything_starts(run, tmp_path):
    code, said, ran = run("--only", "no luck")
    assert (code, ran) == (2, [])
    assert said.startswith("ablate.py: there is no variant 'no luck'; there are: self-attention, mean pooling, ")
    (tmp_path / "rentals").rmdir()
    assert run()[1].startswith("ablate.py: rentals is not a folder")
    assert not (tmp_path / "data").exists()


OPTIONS = {
    "train_simcse.py": train_simcse.SimcseOptions,
    "train_user.py": train_user.UserOptions,
    "train_reranker.py": train_reranker.RerankerOptions,
}


@pytest.mark.parametrize("name", ablate.VARIANTS)
def test_every_variant_is_a_change_that_its_script_knows(name, monkeypatch):
    script, change = ablate.VARIANTS[name]
    told = {}

    def options(*arguments):
        monkeypatch.setattr(sys, "argv", [script, "--epochs", "6", *arguments])
        run_script(OPTIONS[script], lambda options: told.update(options.model_dump()))
        return dict(told)

    assert options() != options(*change)


# --- on a small shop, really trained

NOW = sample_shop.NOW


@pytest.fixture(scope="module")
def shop(new_shop):
    """The trained shop, and beside its live release one with everything ablated that can be at once, live in its place."""
    with new_shop() as settings:
        given = {**settings.model_dump(), "release": "ablated", "_env_file": None}
        train_simcse.main(
            train_simcse.SimcseOptions(**given, epochs=0, fusion="self", re=False, title=False, orthogonal=False)
        )
        train_user.main(
            train_user.UserOptions(
                **given, epochs=1, batch_size=128, history=10, behaviour=False, context=False, profile=False,
                popularity=False, unread_figures=["height_cm", "weight_kg"],
            )
        )  # fmt: skip
        train_reranker.main(train_reranker.RerankerOptions(**given, epochs=1, transfer=False))
        build_index.main(build_index.IndexOptions(**given, margin=1.0))
        yield settings


def test_an_ablated_release_loads_again_and_serves(shop):
    release = Release.open(shop.models_dir, "ablated")
    assert release.manifest["item_tower"]["report"]["epochs"] == 0
    assert release.item_tower().config.fusion == "self"
    assert release.profile_scaler().fields == ["age"]
    with Store.open(shop) as store:
        recommender = Recommender(store, shop, TextEncoder.load(shop))

        def retrieved(**request):
            answer = recommender.recommend(Request(k=100, now=NOW.timestamp(), exclude_history=False, **request))
            assert (answer.release, answer.degraded, len(answer.items)) == ("ablated", False, 100)
            return [item.product_id for item in sorted(answer.items, key=lambda item: item.retrieval_rank)]

        stranger = retrieved()
        assert retrieved(user_id=store.events.read().user_ids[0]) == stranger
        assert retrieved(context="beach vacation", profile={"age": 20.0}) == stranger


def test_figures_that_nobody_has_are_refused(shop):
    given = {**shop.model_dump(), "release": "ablated", "_env_file": None}
    with pytest.raises(
        UserError, match=r"no profile has \['waist_cm'\]; there are \['age', 'height_cm', 'weight_kg'\]"
    ):
        train_user.main(train_user.UserOptions(**given, unread_figures=["waist_cm"]))


def test_a_judged_release_leaves_lists_curves_and_a_map_for_the_page(shop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(evaluate.CUTS, "sample-week", NOW)
    with Store.open(shop) as store:
        log = store.events.read()
    random = np.random.default_rng(0)
    later = [
        Event(
            user_id=user, product_id=str(random.choice(log.product_ids)), at=NOW + timedelta(hours=1), context="office"
        )
        for user in log.user_ids[:30]
    ]
    monkeypatch.setattr(sample_shop, "read", lambda path: Source(events=[event_frame(later)]))
    given = evaluate.EvaluateOptions(**shop.model_dump(), what="sample-week", baselines=False, _env_file=None)
    evaluate.main(given)
    docs = tmp_path / "docs"
    saved = json.loads((docs / "examples/sample-week.json").read_text())
    assert [len(saved[part]) for part in ("best", "worst")] == [5, 5]
    assert min(example["ndcg"] for example in saved["best"]) >= max(example["ndcg"] for example in saved["worst"])
    assert all(len(example["recommended"]) == 10 and example["history"] for example in saved["best"])
    drawn = json.loads((docs / "maps/sample-week.json").read_text())
    assert len(drawn["points"]) == drawn["items"] == 200
    assert 0 < sum(drawn["shares"]) <= 1
    curves = json.loads((docs / "curves.json").read_text())
    assert [(curve["part"], len(curve["points"])) for curve in curves] == [
        ("item_tower", 1), ("user_tower", 2), ("reranker", 2),
    ]  # fmt: skip

    before = {file: file.read_bytes() for file in docs.rglob("*.*")}
    names = {file.name for file in before}
    assert {"results.md", "examples.md", "sample-week-curves.svg", "sample-week-map.svg"} <= names
    evaluate.main(given.model_copy(update={"what": "page"}))
    assert {file: file.read_bytes() for file in docs.rglob("*.*")} == before
