"""docs/results.json, one row a figure, and the page and charts that are drawn from it and from what portrait.py saved.

`evaluate.py`, `evaluate_features.py` and `ablate.py` save rows; a comparison of two models is a row of its own (`is_comparison`),
and so is each run of an ablation (`ablation_model`).
"""

from __future__ import annotations

import json
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from catalog import ListKind
from charts import draw_charts, lines_of
from metrics import HISTORIES, RETRIEVED, TOP, verdict
from portrait import read_curves, read_maps, write_examples_page

RESULTS = Path("docs/results.json")
STEPS = Path("docs/steps.json")  # written by run_split.py
ABLATION, FULL, NO_TRANSFER = "ablation: ", "full model", "no transfer"
# See ceiling.py.
ORACLE, ORACLE_OF_CONTENTS = "oracle, taught by the test days", "oracle of the contents of cold items"
BESIDE: tuple[ListKind, ...] = ("similar", "because", "basket")  # lists beside a product: stages of rows of their own
PLAIN_BESIDE = "beside a product"  # the stage of a plain line that is asked about a product
SINGLE_RUN = "Of a model that was run once, the interval knows other shoppers, not what another seed would make of it."


@dataclass(frozen=True)
class Row:
    """One figure of docs/results.json."""

    split: str
    model: str
    stage: str  # "retrieval" or "reranked"; beside a product, the kind of list; of a features row, what was read
    metric: str  # as in metrics.py
    slice: str
    value: float
    low: float
    high: float
    n: int  # targets for recall@100, shoppers for the others, products for features
    commit: str
    command: str


def short_of(split: str) -> int:
    """The length of a short list: 12 on H&M, whose competition judged so many, else 10."""
    return 12 if split == "hm-week" else 10


def is_comparison(metric: str) -> bool:
    """Whether a row's value is the difference of two models, or the p of one."""
    return metric.endswith((" difference", " p"))


def ablation_model(name: str, seed: int | None = None) -> str:
    """What rows call a variant of an ablation, or one of its runs."""
    return f"{ABLATION}{name}" if seed is None else f"{ABLATION}{name}, seed {seed}"


def ablation_figures(split: str) -> list[tuple[str, str, str]]:
    """(stage, metric, slice) of the figures that ablations are judged by. The sample shop is small: a list of 100 holds a third of
    what is taken next whatever the model, so there the first 10 count."""
    recall = f"recall@{TOP if split == 'sample-week' else RETRIEVED}"
    short = f"ndcg@{short_of(split)}"
    return [
        ("retrieval", recall, "all"),
        ("retrieval", f"recall@{RETRIEVED}", "cold"),
        ("retrieval", short, "all"),
        ("reranked", short, "all"),
        ("similar", recall, "all"),
    ]


def commit() -> str:
    """The commit of this checkout, "unknown" outside of one."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def save(rows: list[Row]) -> None:
    """Replace these models' rows on their split and stage in docs/results.json, their comparisons too, and draw the page anew."""
    RESULTS.parent.mkdir(exist_ok=True)
    old = read_rows()
    replaced = {(row.split, _subject(row.model), row.stage) for row in rows}
    kept = [row for row in old if (row["split"], _subject(row["model"]), row["stage"]) not in replaced]
    every = sorted(kept + [asdict(row) for row in rows], key=lambda row: (row["split"], row["model"], row["stage"]))
    RESULTS.write_text(json.dumps(every, indent=1) + "\n", encoding="utf-8")
    write_page(every)


def read_rows() -> list[dict[str, Any]]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []


def _subject(model: str) -> str:
    """Whose figures a row's are: those of "EASE" are EASE's; those of "styletower against EASE" are styletower's."""
    return model.partition(" against ")[0].removesuffix(" reranked")


def write_page(rows: list[dict[str, Any]]) -> None:
    """docs/results.md, docs/examples.md and docs/charts from the rows of docs/results.json and what else was saved beside it."""
    curves = read_curves()
    examples = write_examples_page()
    lines = [
        "# Results",
        "",
        "Made by `python evaluate.py page` from `results.json` (every figure, with its 95 % bootstrap interval, commit and",
        "command) and `steps.json`; `metrics.py` says what each metric is. Run it again with",
        "`make results HM=folder RTR=folder BEAUTY=folder`, the features of products with",
        "`python evaluate_features.py SET FOLDER`; what features are worth to the lists with",
        "`python run_split.py sample-lexicon` and its like; what each idea is worth with `python ablate.py SPLIT FOLDER`.",
    ]
    if examples:
        lines += ["Lists that were really made, good and bad: [examples.md](examples.md)."]
    ablations = [row for row in rows if row["model"].startswith(ABLATION)]
    rows = [row for row in rows if not row["model"].startswith(ABLATION)]
    beside = [row for row in rows if row["stage"] in (*BESIDE, PLAIN_BESIDE)]
    rows = [row for row in rows if row["stage"] not in (*BESIDE, PLAIN_BESIDE)]
    charts = draw_charts(
        [row for row in rows if not is_comparison(row["metric"])], RESULTS.parent / "charts",
        [row for row in ablations if is_comparison(row["metric"])], curves, read_maps(),
    )  # fmt: skip
    for split in sorted({row["split"] for row in (*rows, *ablations)}):
        own = [row for row in rows if row["split"] == split]
        if any(row["metric"] == "f1" for row in own):
            lines += _features_section(split, own)
            continue
        lines += ["", f"## {split}"]
        plain = [row for row in own if not is_comparison(row["metric"])]
        lines += _lists_section(plain, short_of(split))
        drawn = charts.get(split, {})
        lines += _pictures(drawn, "recall", "warm-cold")
        lines += _beyond_section(plain, short_of(split))
        lines += _comparisons_section([row for row in own if is_comparison(row["metric"])])
        lines += _beside_section(split, [row for row in beside if row["split"] == split])
        lines += _pictures(drawn, "curves", "map")
        lines += _ablations_section(split, [row for row in ablations if row["split"] == split])
        lines += _pictures(drawn, "ablation", "transfer")
        lines += _transfer_section([curve for curve in curves if curve["split"] == split])
    if STEPS.exists():
        lines += [
            "",
            "## Time and memory of each step",
            "",
            "| split | step | seconds | peak MB |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {row['split']} | `{row['step']}` | {row['seconds']:.0f} | {row['megabytes']} |"
            for row in json.loads(STEPS.read_text(encoding="utf-8"))
        ]
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _lists_section(rows: list[dict[str, Any]], short: int) -> list[str]:
    """Whether lists hold what was taken: recall of candidates, and the short list."""
    lines = _found_section(rows, short)
    if any(row["model"] == ORACLE for row in rows):
        lines += [
            "The oracle is told what no system can know at the cut (`ceiling.py`): it shows how far lists could go. "
            "That of contents keeps StyleTower's lists, but in cold items' places stand those whose contents others took oftenest."
        ]
    return lines


def _found_section(rows: list[dict[str, Any]], short: int) -> list[str]:
    recall = f"recall@{RETRIEVED}"
    columns = [
        (recall, "all"),
        (recall, "warm"),
        (recall, "cold"),
        (f"ndcg@{short}", "all"),
        (f"recall@{short}", "all"),
    ]
    targets = {row["slice"]: row["n"] for row in rows if row["metric"] == recall}
    counts = [f"{targets[part]} ({part})" for part in ("all", "warm", "cold") if part in targets]
    return [*_table(rows, columns, bounds=True), "", "Targets: " + ", ".join(counts) + "."]


def _beside_section(split: str, rows: list[dict[str, Any]]) -> list[str]:
    """Whether lists beside a product hold what was taken with it."""
    if not rows:
        return []
    return [
        "",
        f"### {split}: beside a product",
        "",
        "A shopper's first product of the test days is asked about; what else that shopper took within a day, new to them and not",
        "the same product in another colour or size, is the target; of very many shoppers 4,000 were drawn. A line a kind of list,",
        "and plain lines asked about the product alone. A list of kind `basket` offers nothing of the product's own category,",
        "whatever was taken.",
        *_found_section([row for row in rows if not is_comparison(row["metric"])], short_of(split)),
        *_comparisons_section([row for row in rows if is_comparison(row["metric"])]),
    ]


def _beyond_section(rows: list[dict[str, Any]], short: int) -> list[str]:
    """What else the lists are, and for whom they work."""
    columns = [("mrr", "all")]
    columns += [(f"{name}@{TOP}", "all") for name in ("hit", "coverage", "novelty", "diversity", "popularity")]
    columns += [(metric, part) for metric in (f"recall@{RETRIEVED}", f"ndcg@{short}") for part in HISTORIES]
    table = _table(rows, columns, bounds=False)
    if not table:
        return []
    shoppers = {
        row["slice"]: row["n"] for row in rows if row["metric"] == f"ndcg@{short}" and row["slice"] in HISTORIES
    }
    counts = ", ".join(f"{shoppers[part]} ({part})" for part in HISTORIES if part in shoppers)
    says = "Beyond accuracy, and who it serves; history is the distinct items of a shopper's training events."
    return ["", says, *table, *(["", f"Shoppers: {counts}."] if counts else [])]


def _table(rows: list[dict[str, Any]], columns: Sequence[tuple[str, str]], bounds: bool) -> list[str]:
    """A line a model and stage, without the columns that nobody has a figure for; nothing when that leaves none."""
    figure = {(row["model"], row["stage"], row["metric"], row["slice"]): row for row in rows}
    columns = [column for column in columns if any(key[2:] == column for key in figure)]
    if not columns:
        return []
    names = [f"{metric} {part}" for metric, part in columns]
    lines = ["", "| model | stage | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(columns)]
    for model, stage in lines_of(rows):
        cells = []
        for column in columns:
            row = figure.get((model, stage, *column))
            cell = "" if row is None else f"{row['value']:.4f}"
            cells.append(f"{cell} [{row['low']:.4f}, {row['high']:.4f}]" if row and bounds else cell)
        name = f"**{model}**" if model.startswith("styletower") else model
        lines.append(f"| {name} | {stage} | " + " | ".join(cells) + " |")
    return lines


def _comparisons_section(rows: list[dict[str, Any]]) -> list[str]:
    """Differences of models on the same shoppers, with interval and p."""
    if not rows:
        return []
    figure = {(row["model"], row["stage"], row["metric"]): row for row in rows}
    metrics = list(dict.fromkeys(row["metric"].removesuffix(" difference").removesuffix(" p") for row in rows))
    lines = [
        "",
        "Differences on the same shoppers, with 95 % of a paired bootstrap, and p of a randomisation test, each by itself:",
        "it is not corrected for the number of comparisons.",
        "",
        "| comparison | stage | " + " | ".join(f"{metric} difference | p" for metric in metrics) + " |",
        "|---|---|" + "---|---|" * len(metrics),
    ]
    for model, stage in dict.fromkeys((row["model"], row["stage"]) for row in rows):
        cells = []
        for metric in metrics:
            row, p = figure.get((model, stage, f"{metric} difference")), figure.get((model, stage, f"{metric} p"))
            cells.append("" if row is None else f"{row['value']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]")
            cells.append("" if p is None else f"{p['value']:.4f}")
        lines.append(f"| {model} | {stage} | " + " | ".join(cells) + " |")
    return lines


def _pictures(drawn: dict[str, tuple[str, str]], *kinds: str) -> list[str]:
    return [line for kind in kinds if kind in drawn for line in ("", f"![{drawn[kind][1]}](charts/{drawn[kind][0]})")]


def _ablations_section(split: str, rows: list[dict[str, Any]]) -> list[str]:
    """What the model is without each of its ideas: the mean of its runs, and the difference to the full model."""
    if not rows:
        return []
    values: dict[tuple[str, str, str, str], list[float]] = defaultdict(list)
    difference: dict[tuple[str, str, str, str], dict[str, Any]] = {}
    for row in rows:
        name = row["model"].removeprefix(ABLATION)
        if is_comparison(row["metric"]):
            metric = row["metric"].removesuffix(" difference")
            difference[name.partition(" against ")[0], row["stage"], metric, row["slice"]] = row
        else:
            values[name.rpartition(", seed ")[0], row["stage"], row["metric"], row["slice"]].append(row["value"])
    columns = [key for key in ablation_figures(split) if (FULL, *key) in values]
    head = " | ".join(f"{metric} {part}, {stage}" for stage, metric, part in columns)
    names = sorted({name for name, *_ in values} - {FULL})
    lines = [
        "",
        f"### {split}: what each idea is worth",
        "",
        "The full model and the model without one idea: mean and standard deviation of their runs, each with a seed of its own.",
        "",
        f"| model | runs | {head} |",
        "|---|---|" + "---|" * len(columns),
    ]
    for name in (FULL, *names):
        found = [values.get((name, *key), []) for key in columns]
        lines.append(f"| {name} | {max(map(len, found))} | " + " | ".join(map(_mean_and_deviation, found)) + " |")
    if not difference:
        return lines
    lines += [
        "",
        "Without the idea less the full model, of the same seeds and on the same shoppers, with 95 % of bootstrap resamples over",
        "both; what it says of the idea, each figure by itself: it **helps** where the model is worse without it.",
        *([SINGLE_RUN] if any(len(found) == 1 for found in values.values()) else []),
        "",
        f"| without, or in its place | {head} |",
        "|---|" + "---|" * len(columns),
    ]
    for name in names:
        cells = []
        for key in columns:
            found_row = difference.get((name, *key))
            cells.append("" if found_row is None else _worth(found_row))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _mean_and_deviation(values: list[float]) -> str:
    if not values:
        return ""
    deviation = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{deviation}"


def _worth(row: dict[str, Any]) -> str:
    if row["value"] == row["low"] == row["high"] == 0:
        return "the same"  # a figure that the idea has no part in
    says = verdict(row["low"], row["high"])
    return f"{says if says == 'no difference seen' else f'**{says}**'} {row['value']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"


def _transfer_section(curves: list[dict[str, Any]]) -> list[str]:
    """After how many epochs the reranker with transferred tables is as good as the one without ever gets."""
    points = {curve["model"]: curve["points"] for curve in curves}
    found = []
    for model, without in points.items():
        seed = model.removeprefix(ablation_model(f"{NO_TRANSFER}, seed "))
        if seed == model or (with_tables := points.get(ablation_model(FULL, int(seed)))) is None:
            continue
        best = max(value for _, _, value in without)
        epoch_of = [next((epoch for epoch, _, value in own if value >= best), None) for own in (with_tables, without)]
        found.append((int(seed), *epoch_of))
    if not found:
        return []
    told = [f"{'never' if ours is None else ours} against {theirs}" for _, ours, theirs in sorted(found)]
    return [
        "",
        "Epochs until the reranker's validation figure is as good as it ever gets without the item tower's tables, with them",
        f"against without, seed by seed: {'; '.join(told)}.",
    ]


def _features_section(split: str, rows: list[dict[str, Any]]) -> list[str]:
    """What readers of product text find (evaluate_features.py): F1 of each field, one table for each text they were given."""
    lines = ["", f"## {split}: features read from text"]
    for stage, read in (("title", "the title alone"), ("full", "title and description")):
        own = [row for row in rows if row["stage"] == stage]
        if not own:
            continue
        figure = {(row["model"], row["metric"], row["slice"]): row for row in own}
        fields = sorted(dict.fromkeys(row["slice"] for row in own), key=lambda field: field != "micro")
        products = max(row["n"] for row in own)
        lines += [
            "",
            f"F1 of the features read from {read}, {products} products; in brackets under a field, the products that have it.",
            "",
            "| reader | " + " | ".join(fields) + " | precision | recall | seconds a product | cost a product |",
            "|---|" + "---|" * (len(fields) + 4),
        ]
        models = list(dict.fromkeys(row["model"] for row in own))
        having = [str(figure[models[0], "f1", field]["n"]) for field in fields]
        lines.append("| | " + " | ".join(f"({count})" for count in having) + " | | | | |")
        for model in models:
            cells = [f"{figure[model, 'f1', field]['value']:.3f}" for field in fields]
            overall = figure[model, "f1", "micro"]
            cells[0] += f" [{overall['low']:.3f}, {overall['high']:.3f}]"
            for metric, form in (("precision", ".3f"), ("recall", ".3f"), ("seconds", ".3f"), ("cost", ".6f")):
                row = figure.get((model, metric, "micro"))
                cells.append(format(row["value"], form) if row else "")
            lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return lines
