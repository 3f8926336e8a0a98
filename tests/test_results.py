"""What is kept of docs/results.json, and the tables of the page, on rows made up here."""

from __future__ import annotations

import json

import pytest

from catalog import Product
from portrait import Shown, examples, save_curves, save_examples, save_map
from results import (
    FULL,
    NO_TRANSFER,
    Row,
    ablation_figures,
    ablation_model,
    is_comparison,
    read_rows,
    save,
    short_of,
    write_page,
)


@pytest.fixture
def docs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "docs"


def row(split: str, model: str, value: float, part: str = "all", metric: str = "recall@100", stage: str = "retrieval"):
    return Row(split, model, stage, metric, part, value, value - 0.01, value + 0.01, 7, "c0ffee", "python")


def page(docs) -> str:
    return (docs / "results.md").read_text()


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


# --- ablations


def ablation(name: str, seed: int, value: float, metric: str = "ndcg@10", stage: str = "retrieval", part: str = "all"):
    return row("sample-week", ablation_model(name, seed), value, part, metric, stage)


def against(name: str, value: float, low: float, high: float):
    model = f"{ablation_model(name)} against the {FULL}"
    return Row("sample-week", model, "retrieval", "ndcg@10 difference", "all", value, low, high, 7, "c0ffee", "python")


def test_ablations_have_their_own_tables_by_hand_and_no_place_in_the_others(docs):
    runs = [
        ablation(FULL, 0, 0.10),
        ablation(FULL, 1, 0.14),
        ablation("no title", 0, 0.08),
        ablation("no title", 1, 0.08),
    ]
    runs += [ablation("no luck", 0, 0.1), ablation("no RE", 0, 0.15), ablation(FULL, 0, 0.3, "recall@100", part="cold")]
    others = [
        against("no title", -0.04, -0.06, -0.02),
        against("no RE", 0.05, -0.01, 0.11),
        against("no luck", 0, 0, 0),
    ]
    save([row("sample-week", "EASE", 0.5), *runs, *others])
    plain, values, differences = tables(docs)
    assert plain[2:] == ["| EASE | retrieval | 0.5000 [0.4900, 0.5100] |"]
    assert values == [
        "| model | runs | recall@100 cold, retrieval | ndcg@10 all, retrieval |",
        "|---|---|---|---|",
        "| full model | 2 | 0.3000 | 0.1200 ± 0.0283 |",  # sqrt((.02^2 + .02^2) / 1)
        "| no RE | 1 |  | 0.1500 |",
        "| no luck | 1 |  | 0.1000 |",
        "| no title | 2 |  | 0.0800 ± 0.0000 |",
    ]
    assert differences == [
        "| without, or in its place | recall@100 cold, retrieval | ndcg@10 all, retrieval |",
        "|---|---|---|",
        "| no RE |  | no difference seen +0.0500 [-0.0100, +0.1100] |",
        "| no luck |  | the same |",
        "| no title |  | **helps** -0.0400 [-0.0600, -0.0200] |",
    ]
    assert "![What the model loses without each idea](charts/sample-week-ablation.svg)" in page(docs)
    assert "not what another seed would make of it" in page(docs)


def test_the_page_warns_of_single_runs_only_where_there_are_some(docs):
    save([ablation(name, seed, value) for name, value in ((FULL, 0.1), ("no title", 0.2)) for seed in (0, 1)])
    save([against("no title", 0.1, 0, 0.2)])
    assert "not what another seed" not in page(docs)


def test_a_variants_difference_and_runs_replace_their_own(docs):
    save([ablation(FULL, 0, 0.1), ablation("no title", 0, 0.2), against("no title", 0.1, 0, 0.2)])
    save([ablation("no title", 1, 0.3), against("no title", 0.15, 0, 0.3)])
    save([ablation("no title", 0, 0.4)])
    rows = [(row["model"], row["value"]) for row in json.loads((docs / "results.json").read_text())]
    assert rows == [
        ("ablation: full model, seed 0", 0.1), ("ablation: no title against the full model", 0.15),
        ("ablation: no title, seed 0", 0.4), ("ablation: no title, seed 1", 0.3),
    ]  # fmt: skip


def test_lists_beside_a_product_have_a_section_of_their_own(docs):
    ours, kinds = "styletower", ("similar", "because", "basket")
    metric = "recall@100 difference"
    save(
        [
            row("rtr-warm", ours, 0.5), row("rtr-warm", "EASE", 0.25), row("rtr-warm", "EASE", 0.125, stage="beside a product"),
            row("rtr-warm", f"{ours} against EASE", 0.0625, metric=metric, stage="similar"),
            *(row("rtr-warm", ours, 0.75, stage=kind) for kind in kinds),
        ]
    )  # fmt: skip
    of_shoppers, beside, compared = tables(docs)
    assert [line.split(" | ")[:2] for line in of_shoppers[2:]] == [
        ["| EASE", "retrieval"],
        ["| **styletower**", "retrieval"],
    ]
    assert beside[2:] == [
        "| EASE | beside a product | 0.1250 [0.1150, 0.1350] |",
        *(f"| **styletower** | {kind} | 0.7500 [0.7400, 0.7600] |" for kind in sorted(kinds)),
    ]
    assert compared[2].startswith("| styletower against EASE | similar | +0.0625")
    before = page(docs)
    assert before.count("### rtr-warm: beside a product") == 1
    save([row("rtr-warm", ours, 0.5)])  # judged again without them: they stay
    assert page(docs) == before


def test_the_small_shop_is_judged_by_shorter_lists():
    assert ablation_figures("sample-week")[0] == ("retrieval", "recall@10", "all")
    assert ablation_figures("rtr-cold")[0] == ("retrieval", "recall@100", "all")
    assert ablation_figures("rtr-cold")[-2:] == [("reranked", "ndcg@10", "all"), ("similar", "recall@100", "all")]


def test_the_page_says_how_much_sooner_a_reranker_with_tables_is_as_good(docs):
    def learned(name: str, seed: int, values: list[float]):
        points = [[epoch, None, value] for epoch, value in enumerate(values)]
        curve = {"part": "reranker", "metric": "ndcg@12", "best_epoch": 1, "points": points}
        save_curves(["rtr-warm"], ablation_model(name, seed), [curve])

    learned(FULL, 0, [0.1, 0.2, 0.4])
    learned(NO_TRANSFER, 0, [0.1, 0.1, 0.15, 0.3])
    learned(FULL, 1, [0.1, 0.2])
    learned(NO_TRANSFER, 1, [0.1, 0.3, 0.2])
    learned(NO_TRANSFER, 2, [0.1, 0.3])
    save([row("rtr-warm", "EASE", 0.5)])
    assert "seed by seed: 2 against 3; never against 1." in page(docs)
    assert "charts/rtr-warm-transfer.svg" in page(docs)


def test_the_page_shows_what_portraits_saved_and_is_the_same_each_time(docs):
    save_map(
        "rtr-warm", "styletower", {"items": 2, "shares": [0.6, 0.3], "points": [[0.0, 1.0, "gown"], [1.0, 0.0, ""]]}
    )
    save_curves(
        ["rtr-warm"], "styletower",
        [{"part": "reranker", "metric": "ndcg@12", "best_epoch": 1, "points": [[0, None, 0.1], [1, 3.0, 0.2]]}],
    )  # fmt: skip
    requests = [Shown("", [], ["p1"], ["p1"]), Shown("", [], ["p2"], ["p1"])]
    save_examples("rtr-warm", "styletower", examples(requests, [Product(product_id="p1", title="gown")], 10, True))
    save([row("rtr-warm", "EASE", 0.5)])
    for told in ("charts/rtr-warm-curves.svg", "charts/rtr-warm-map.svg", "[examples.md](examples.md)"):
        assert told in page(docs)
    before = {file: file.read_bytes() for file in docs.rglob("*.*")}
    assert {"examples.md", "rtr-warm-map.svg", "curves.json", "rtr-warm.json"} <= {file.name for file in before}
    write_page(read_rows())
    assert {file: file.read_bytes() for file in docs.rglob("*.*")} == before
