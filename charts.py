"""Charts of the standard splits: SVG files from the rows of docs/results.json and what portrait.py saved, the same bytes for the
same rows."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from metrics import RECALL_AT, RETRIEVED, verdict

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
LOSS, OTHER = "#8a8a8a", "#c8c8c8"
VERDICTS = {"helps": "#1e8449", "no difference seen": LOSS, "hurts": WARM}
CATEGORIES = 12  # that have a colour of their own on a map

Rows = Sequence[dict[str, Any]]


def draw_charts(
    rows: Rows, folder: Path, ablations: Rows = (), curves: Rows = (), maps: dict[str, Any] | None = None
) -> dict[str, dict[str, tuple[str, str]]]:
    """Files in `folder` of every split that has what they show: split -> kind -> (name of the file, what it shows).

    rows: figures of models; ablations: differences of variants to the full model; curves and maps: as portrait.py reads them.
    """
    drawn: dict[str, dict[str, tuple[str, str]]] = {}
    for split in dict.fromkeys(row["split"] for row in (*rows, *ablations)):
        figures, differences, learned = (
            [row for row in part if row["split"] == split] for part in (rows, ablations, curves)
        )
        runs = [curve for curve in learned if curve["model"].startswith("ablation: ")]
        for kind, says, draw, data in (
            ("recall", "Recall against the length of the list", _recall, figures),
            ("warm-cold", f"Recall@{RETRIEVED} of warm and cold items", _warm_and_cold, figures),
            ("curves", "How each stage learned", _curves, [curve for curve in learned if curve not in runs]),
            ("map", "Item vectors by category", _map, (maps or {}).get(split)),
            ("ablation", "What the model loses without each idea", _ablation, differences),
            ("transfer", "The reranker with and without the item tower's tables", _transfer, runs),
        ):
            name = f"{split}-{kind}.svg"
            if data and _draw(draw, data, f"{split}: {says[0].lower()}{says[1:]}", folder / name):
                drawn.setdefault(split, {})[kind] = (name, says)
    return drawn


def lines_of(rows: Rows) -> list[tuple[str, str]]:
    """(model, stage) in the order in which tables and charts show them: ours last, its reranked lists after what it retrieved."""
    found = {(row["model"], row["stage"]) for row in rows}
    return sorted(found, key=lambda pair: (pair[0].startswith("styletower"), pair[0], pair[1] == "reranked", pair[1]))


def _draw(draw: Callable[[Figure, Any], bool], data: Any, title: str, path: Path) -> bool:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 4.5), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        if not draw(figure, data):
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
        return True


def _recall(figure: Figure, rows: Rows) -> bool:
    """Means over shoppers only: recall@100 is one over targets."""
    value = {(row["model"], row["stage"], row["metric"]): row["value"] for row in rows if row["slice"] == "all"}
    lines = [line for line in lines_of(rows) if all((*line, f"recall@{k}") in value for k in RECALL_AT)]
    if not lines:
        return False
    axes = figure.add_subplot()
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


def _warm_and_cold(figure: Figure, rows: Rows) -> bool:
    """Of retrieved candidates: a reranker does not change which they are."""
    axes = figure.add_subplot()
    value_of = {
        (row["model"], row["slice"]): row
        for row in rows
        if row["metric"] == f"recall@{RETRIEVED}" and row["stage"] == "retrieval"
    }
    models = [model for model, stage in lines_of(rows) if stage == "retrieval"]
    for part, shift, colour in (("warm", -0.2, WARM), ("cold", 0.2, COLD)):
        bars = [
            (place + shift, value_of[model, part]) for place, model in enumerate(models) if (model, part) in value_of
        ]
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


def _curves(figure: Figure, curves: Rows) -> bool:
    """A panel a stage: its loss in grey, on the left, and its validation figure in colour, on the right. Of several models one line
    each, in the same colours."""
    parts = list(dict.fromkeys(curve["part"] for curve in curves))
    figure.set_size_inches(9, 3.2)
    for axes, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        right = axes.twinx()
        right.spines["right"].set_visible(True)
        for curve in (curve for curve in curves if curve["part"] == part):
            trained = [(epoch, loss) for epoch, loss, _ in curve["points"] if loss is not None]
            axes.plot(*zip(*trained, strict=True), color=LOSS, linewidth=1.2) if trained else None
            epochs, _, values = zip(*curve["points"], strict=True)
            right.plot(epochs, values, color=COLD, marker="o", markersize=3)
            right.axvline(curve["best_epoch"], color=COLD, linewidth=0.8, linestyle=":")
        axes.set_title(f"{part.replace('_', ' ')}: {curve['metric']}", loc="left", fontsize=9, color=COLD)
        axes.set_xlabel("epoch; dotted: the one kept")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(axis="y", colors=LOSS)
        right.tick_params(axis="y", colors=COLD)
    figure.axes[0].set_ylabel("training loss", color=LOSS)
    return True


def _map(figure: Figure, found: dict[str, Any]) -> bool:
    axes = figure.add_subplot()
    figure.set_size_inches(9, 6)
    counts = Counter(category for _, _, category in found["points"])
    named = [category for category, _ in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])) if category]
    groups: dict[str, list[tuple[float, float]]] = {category: [] for category in ("other", *named[:CATEGORIES])}
    for x, y, category in found["points"]:
        groups["other" if category not in groups else category].append((x, y))
    for (category, places), colour in zip(groups.items(), (OTHER, *PALETTE), strict=False):
        if places:
            x, y = zip(*places, strict=True)
            axes.scatter(x, y, s=9, linewidths=0, color=colour, label=f"{category} ({len(places)})")
    first, second = found["shares"]
    axes.set_xlabel(f"first principal component, {first:.0%} of the variance")
    axes.set_ylabel(f"second, {second:.0%}")
    axes.set_aspect("equal")
    axes.legend(
        loc="center left",
        bbox_to_anchor=(1, 0.5),
        frameon=False,
        markerscale=2,
        title=f"{len(found['points'])} of {found['items']} items",
    )
    return True


def _ablation(figure: Figure, rows: Rows) -> bool:
    """A panel a figure, a line a variant: below zero the model is worse without the idea."""
    panels = list(dict.fromkeys((row["metric"], row["slice"], row["stage"]) for row in rows))
    panels.sort(key=lambda panel: (panel[2] == "reranked", panel[0].startswith("ndcg"), panel))
    names = sorted({row["model"] for row in rows})
    figure.set_size_inches(10, 1.4 + 0.28 * len(names))
    for axes, (metric, part, stage) in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True
    ):
        axes.axvline(0, color="black", linewidth=0.8)
        for row in rows:
            if (row["metric"], row["slice"], row["stage"]) == (metric, part, stage):
                place, colour = names.index(row["model"]), VERDICTS[verdict(row["low"], row["high"])]
                axes.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=1.5)
                axes.plot(row["value"], place, color=colour, marker="o", markersize=5)
        axes.set_title(f"{metric.removesuffix(' difference')} {part}\n{stage}", fontsize=9)
        axes.locator_params(axis="x", nbins=4)
        axes.tick_params(axis="x", labelsize=7)
    short = [name.removeprefix("ablation: ").partition(" against ")[0] for name in names]
    figure.axes[0].set_yticks(range(len(names)), short)
    figure.axes[0].invert_yaxis()
    figure.supxlabel(
        "without the idea less the full model; green: it helps, red: it hurts, grey: no difference seen",
        fontsize=8,
    )
    return True


def _transfer(figure: Figure, curves: Rows) -> bool:
    """A line a run: the reranker's validation figure, epoch by epoch."""
    axes = figure.add_subplot()
    for kind, colour in (("full model", COLD), ("no transfer", WARM)):
        runs = [curve for curve in curves if curve["model"].startswith(f"ablation: {kind}, seed ")]
        for number, curve in enumerate(runs):
            epochs, _, values = zip(*curve["points"], strict=True)
            axes.plot(
                epochs, values, color=colour, marker="o", markersize=3, linewidth=1.2, label="" if number else kind
            )
        if not runs:
            return False
    axes.set_xlabel("epoch")
    axes.set_ylabel(f"{curve['metric']}, validation")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    return True
