"""What is kept of docs/results.json, and the tables of the page, on rows made up here."""

from __future__ import annotations

import json

import pytest

from results import Row, is_comparison, save, short_of, write_page


@pytest.fixture
def docs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "docs"


def row(split: str, model: str, value: float, part: str = "all", metric: str = "recall@100", stage: str = "retrieval"):
    return Row(split, model, stage, metric, part, value, value - 0.01, value + 0.01, 7, "c0ffee", "python")


def tables(docs) -> list[list[str]]:
    """Each table of the page as its lines."""
    blocks = (docs / "results.md").read_text().split("\n\n")
    return [block.strip().splitlines() for block in blocks if block.startswith("|")]


def test_saving_replaces_the_rows_of_the_same_split_and_model_only(docs):
    save([row("hm-week", "EASE", 0.1), row("hm-week", "EASE", 0.2, "cold"), row("hm-week", "popularity", 0.3)])
    save([row("rtr-warm", "EASE", 0.4)])
    save([row("hm-week", "EASE", 0.5)])
    rows = json.loads((docs / "results.json").read_text())
    assert [(row["split"], row["model"], row["value"]) for row in rows] == [
        ("hm-week", "EASE", 0.5), ("hm-week", "popularity", 0.3), ("rtr-warm", "EASE", 0.4),
    ]  # fmt: skip


def test_a_release_judged_again_takes_its_old_comparisons_along(docs):
    """They are about lists that are gone, also when the other line is not measured this time."""
    ours, other = "styletower", "styletower, features by hand"
    metric = "ndcg@10 difference"
    save(
        [
            row("rtr-warm", ours, 0.1), row("rtr-warm", f"{ours} against EASE", 0.2, metric=metric),
            row("rtr-warm", ours, 0.1, stage="reranked"),
            row("rtr-warm", f"{ours} reranked against its retrieval", 0.3, metric=metric, stage="reranked"),
            row("rtr-warm", f"{other} against EASE", 0.4, metric=metric), row("rtr-warm", "EASE", 0.5),
        ]
    )  # fmt: skip
    save([row("rtr-warm", ours, 0.6), row("rtr-warm", ours, 0.7, stage="reranked")])
    rows = json.loads((docs / "results.json").read_text())
    assert {(row["model"], row["value"]) for row in rows} == {
        (ours, 0.6), (ours, 0.7), (f"{other} against EASE", 0.4), ("EASE", 0.5),
    }  # fmt: skip


def test_rows_of_before_the_new_metrics_draw_one_table_and_a_missing_figure_is_left_empty(docs):
    ours = [row("rtr-cold", "styletower", 0.5), row("rtr-cold", "styletower", 0.125, "cold")]
    save([row("rtr-cold", "popularity", 0.25), *ours])
    assert tables(docs) == [
        [
            "| model | stage | recall@100 all | recall@100 cold |",
            "|---|---|---|---|",
            "| popularity | retrieval | 0.2500 [0.2400, 0.2600] |  |",
            "| **styletower** | retrieval | 0.5000 [0.4900, 0.5100] | 0.1250 [0.1150, 0.1350] |",
        ]
    ]
    assert "Targets: 7 (all), 7 (cold)." in (docs / "results.md").read_text()
    write_page([])
    assert "|" not in (docs / "results.md").read_text()


@pytest.mark.parametrize(
    ("split", "short", "other"), [("hm-week", 12, 10), ("rtr-warm", 10, 12), ("sample-week", 10, 12)]
)
def test_the_first_table_has_the_splits_own_short_list(docs, split, short, other):
    assert short_of(split) == short
    metrics = [f"{name}@{k}" for name in ("ndcg", "recall") for k in (short, other)]
    save([row(split, "EASE", 0.5), *(row(split, "EASE", 0.25, metric=metric) for metric in metrics)])
    (table,) = tables(docs)
    assert table[0] == f"| model | stage | recall@100 all | ndcg@{short} all | recall@{short} all |"


def test_the_second_table_says_what_else_lists_are_and_whom_they_serve(docs):
    beyond = [row("rtr-warm", "EASE", 0.75, metric=name) for name in ("popularity@10", "mrr", "novelty@10")]
    served = [
        row("rtr-warm", "EASE", 0.1, part, metric) for part in ("history 10+", "history 1-2") for metric in ("ndcg@10",)
    ]
    save([*beyond, *served, row("rtr-warm", "EASE", 0.2, "history 1-2", "ndcg@12"), row("rtr-warm", "EASE", 0.5)])
    first, second = tables(docs)
    assert first[0] == "| model | stage | recall@100 all |"
    assert second == [
        "| model | stage | mrr all | novelty@10 all | popularity@10 all | ndcg@10 history 1-2 | ndcg@10 history 10+ |",
        "|---|---|---|---|---|---|---|",
        "| EASE | retrieval | 0.7500 | 0.7500 | 0.7500 | 0.1000 | 0.1000 |",
    ]
    assert "Shoppers: 7 (history 1-2), 7 (history 10+)." in (docs / "results.md").read_text()


def test_comparisons_have_a_table_of_their_own(docs):
    name = "styletower against EASE"
    save(
        [
            row("rtr-warm", "EASE", 0.5), row("rtr-warm", "styletower", 0.6),
            row("rtr-warm", name, -0.02, metric="recall@100 difference"), row("rtr-warm", name, 0.03, metric="recall@100 p"),
            row("rtr-warm", name, 0.1, metric="ndcg@10 difference"), row("rtr-warm", name, 0.0001, metric="ndcg@10 p"),
        ]
    )  # fmt: skip
    first, second = tables(docs)
    assert not any("against" in line for line in first)
    assert second == [
        "| comparison | stage | recall@100 difference | p | ndcg@10 difference | p |",
        "|---|---|---|---|---|---|",
        f"| {name} | retrieval | -0.0200 [-0.0300, -0.0100] | 0.0300 | +0.1000 [+0.0900, +0.1100] | 0.0001 |",
    ]


def test_a_comparison_is_told_by_its_metric():
    assert [is_comparison(metric) for metric in ("ndcg@10 difference", "ndcg@10 p", "mrr", "hit@10")] == [
        True, True, False, False,
    ]  # fmt: skip
