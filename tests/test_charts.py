"""The charts of the page, drawn from rows made up here."""

from __future__ import annotations

import pytest

import charts
from charts import draw_charts, lines_of

RECALL = {10: 0.11, 12: 0.13, 20: 0.2, 50: 0.35}


def row(model: str, metric: str, value: float, part: str = "all", stage: str = "retrieval"):
    return {
        "split": "rtr-warm", "model": model, "stage": stage, "metric": metric, "slice": part, "value": value,
        "low": value * 0.9, "high": value * 1.1,
    }  # fmt: skip


@pytest.fixture
def rows():
    own = [row(model, f"recall@{k}", value) for model in ("EASE", "styletower") for k, value in RECALL.items()]
    return own + [row(model, "recall@100", 0.4, part) for model in ("EASE", "styletower") for part in ("warm", "cold")]


def test_each_split_gets_both_charts_the_same_bytes_each_time(rows, tmp_path):
    drawn = draw_charts(rows, tmp_path / "one")
    assert drawn == draw_charts(rows, tmp_path / "two")
    names = [name for name, _ in drawn["rtr-warm"].values()]
    assert names == ["rtr-warm-recall.svg", "rtr-warm-warm-cold.svg"]
    for name in names:
        svg = (tmp_path / "one" / name).read_bytes()
        assert svg == (tmp_path / "two" / name).read_bytes()
        assert b">EASE<" in svg
        assert b"<dc:date>" not in svg


def test_a_figure_more_is_another_chart(rows, tmp_path):
    draw_charts(rows, tmp_path / "one")
    draw_charts([*rows, *(row("popularity", f"recall@{k}", value) for k, value in RECALL.items())], tmp_path / "two")
    assert b">popularity<" not in (tmp_path / "one/rtr-warm-recall.svg").read_bytes()
    assert b">popularity<" in (tmp_path / "two/rtr-warm-recall.svg").read_bytes()


def test_rows_without_the_figures_of_a_chart_leave_it_out(rows, tmp_path):
    old = [row for row in rows if row["metric"] == "recall@100"]
    assert list(draw_charts(old, tmp_path)["rtr-warm"]) == ["warm-cold"]
    assert draw_charts([row for row in old if row["slice"] == "warm"], tmp_path / "none") == {}
    assert not (tmp_path / "none").exists()


def difference(name: str, value: float, metric: str = "ndcg@10"):
    return {
        **row(f"ablation: {name} against the full model", f"{metric} difference", value), "low": value - 0.02,
        "high": value + 0.02,
    }  # fmt: skip


def curve(model: str, part: str, values: list[float]):
    points = [[epoch, None if epoch == 0 else 5.0 - epoch, value] for epoch, value in enumerate(values)]
    return {"split": "rtr-warm", "model": model, "part": part, "metric": "ndcg@12", "best_epoch": 1, "points": points}


def test_what_portraits_and_ablations_saved_is_drawn_the_same_bytes_each_time(tmp_path):
    ablations = [difference("no title", -0.1), difference("mean pooling", 0.1), difference("no RE", 0.01)]
    curves = [curve("styletower", part, [0.1, 0.3, 0.2]) for part in ("item_tower", "user_tower")]
    curves += [curve(f"ablation: {name}, seed 1", "reranker", [0.1, 0.2]) for name in ("full model", "no transfer")]
    points = [[number / 10, 0.5, f"kind {number % 15}"] for number in range(60)]
    maps = {"rtr-warm": {"items": 90, "shares": [0.25, 0.125], "points": points}}
    drawn = draw_charts([], tmp_path / "one", ablations, curves, maps)
    assert drawn == draw_charts([], tmp_path / "two", ablations, curves, maps)
    svg = {kind: (tmp_path / "one" / name).read_text() for kind, (name, _) in drawn["rtr-warm"].items()}
    assert list(svg) == ["curves", "map", "ablation", "transfer"]
    for kind, (name, _) in drawn["rtr-warm"].items():
        assert svg[kind] == (tmp_path / "two" / name).read_text()
    for told in (
        ">first principal component, 25% of the variance<",
        ">60 of 90 items<",
        ">kind 0 (4)<",
        ">other (12)<",
    ):
        assert told in svg["map"]
    for colour in charts.VERDICTS.values():  # one of the three helps, one hurts, of one nothing is seen
        assert f"stroke: {colour}" in svg["ablation"]
    assert ">no title<" in svg["ablation"]
    assert ">user tower: ndcg@12<" in svg["curves"]
    assert draw_charts([], tmp_path / "none", ablations, curves[:-1])["rtr-warm"].keys() == {"curves", "ablation"}


def test_ours_comes_last_and_reranked_after_retrieved():
    rows = [row("styletower", "mrr", 1.0, stage=stage) for stage in ("reranked", "retrieval")]
    assert lines_of([*rows, row("EASE", "mrr", 1.0), row("zebra", "mrr", 1.0)]) == [
        ("EASE", "retrieval"), ("zebra", "retrieval"), ("styletower", "retrieval"), ("styletower", "reranked"),
    ]  # fmt: skip
