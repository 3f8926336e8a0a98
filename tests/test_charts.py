"""The charts of the page, drawn from rows made up here."""

from __future__ import annotations

import pytest

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
    assert list(drawn["rtr-warm"]) == ["rtr-warm-recall.svg", "rtr-warm-warm-cold.svg"]
    for name in drawn["rtr-warm"]:
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
    assert list(draw_charts(old, tmp_path)["rtr-warm"]) == ["rtr-warm-warm-cold.svg"]
    assert draw_charts([row for row in old if row["slice"] == "warm"], tmp_path / "none") == {}
    assert not (tmp_path / "none").exists()


def test_ours_comes_last_and_reranked_after_retrieved():
    rows = [row("styletower", "mrr", 1.0, stage=stage) for stage in ("reranked", "retrieval")]
    assert lines_of([*rows, row("EASE", "mrr", 1.0), row("zebra", "mrr", 1.0)]) == [
        ("EASE", "retrieval"), ("zebra", "retrieval"), ("styletower", "retrieval"), ("styletower", "reranked"),
    ]  # fmt: skip
