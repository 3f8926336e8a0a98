"""Charts of the standard splits: SVG files from the rows of docs/results.json, the same bytes for the same rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metrics import RECALL_AT, RETRIEVED

# Without a salt of its own matplotlib names what it draws at random. Words stay words, in the reader's own typeface.
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "styletower",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
SHADES = matplotlib.colormaps["tab20"](range(20))
PALETTE = [*SHADES[::2], *SHADES[1::2]]  # the strong ones first
WARM, COLD = "#c0392b", "#2980b9"

Rows = list[dict[str, Any]]


def draw_charts(rows: Rows, folder: Path) -> dict[str, dict[str, str]]:
    """Files in `folder` of every split whose rows have the figures: split -> name of the file -> what it shows."""
    drawn: dict[str, dict[str, str]] = {}
    for split in dict.fromkeys(row["split"] for row in rows):
        own = [row for row in rows if row["split"] == split]
        for name, says, draw in (
            ("recall", "Recall against the length of the list", _recall),
            ("warm-cold", f"Recall@{RETRIEVED} of warm and cold items", _warm_and_cold),
        ):
            if _draw(draw, own, f"{split}: {says[0].lower()}{says[1:]}", folder / f"{split}-{name}.svg"):
                drawn.setdefault(split, {})[f"{split}-{name}.svg"] = says
    return drawn


def lines_of(rows: Rows) -> list[tuple[str, str]]:
    """(model, stage) in the order in which tables and charts show them: ours last, its reranked lists after what it retrieved."""
    found = {(row["model"], row["stage"]) for row in rows}
    return sorted(found, key=lambda pair: (pair[0].startswith("styletower"), pair[0], pair[1] == "reranked"))


def _draw(draw: Callable[[Axes, Rows], bool], rows: Rows, title: str, path: Path) -> bool:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 4.5), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title, loc="left")
        if not draw(axes, rows):
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
        return True


def _recall(axes: Axes, rows: Rows) -> bool:
    """Means over shoppers only: recall@100 is one over targets."""
    value = {(row["model"], row["stage"], row["metric"]): row["value"] for row in rows if row["slice"] == "all"}
    lines = [line for line in lines_of(rows) if all((*line, f"recall@{k}") in value for k in RECALL_AT)]
    if not lines:
        return False
    models = list(dict.fromkeys(model for model, _ in reversed(lines)))  # ours first: they get the strongest colours
    colour = dict(zip(models, itertools.cycle(PALETTE), strict=False))
    for model, stage in lines:
        ours = model.startswith("styletower")
        axes.plot(
            RECALL_AT, [value[model, stage, f"recall@{k}"] for k in RECALL_AT], marker="o", markersize=3,
            label=f"{model}, {stage}" if ours else model, linewidth=2.2 if ours else 1.0,
            color=colour[model], linestyle="--" if ours and stage == "retrieval" else "-",
        )  # fmt: skip
    axes.set_xticks(RECALL_AT)
    axes.set_xlabel("k")
    axes.set_ylabel("recall@k, mean over shoppers")
    axes.set_ylim(bottom=0)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return True


def _warm_and_cold(axes: Axes, rows: Rows) -> bool:
    """Of retrieved candidates: a reranker does not change which they are."""
    figure = {
        (row["model"], row["slice"]): row
        for row in rows
        if row["metric"] == f"recall@{RETRIEVED}" and row["stage"] == "retrieval"
    }
    models = [model for model, stage in lines_of(rows) if stage == "retrieval"]
    for part, shift, colour in (("warm", -0.2, WARM), ("cold", 0.2, COLD)):
        bars = [(place + shift, figure[model, part]) for place, model in enumerate(models) if (model, part) in figure]
        if not bars:
            return False
        value = [row["value"] for _, row in bars]
        below, above = [row["value"] - row["low"] for _, row in bars], [row["high"] - row["value"] for _, row in bars]
        axes.barh([place for place, _ in bars], value, height=0.38, color=colour, label=part)
        axes.errorbar(
            value, [place for place, _ in bars], xerr=[below, above], fmt="none", ecolor="black", elinewidth=0.8
        )
    axes.set_yticks(range(len(models)), models)
    axes.invert_yaxis()  # ours last, like the table
    axes.set_xlabel(f"recall@{RETRIEVED}, 95 % of bootstrap resamples")
    axes.legend(loc="best", frameon=False)
    return True
