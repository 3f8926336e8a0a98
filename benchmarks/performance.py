"""docs/performance.json, one row a figure of speed beside what it has to reach, and the page made from it.

python -m benchmarks.performance           # docs/performance.md and its chart
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from charts import PALETTE, STYLE
from settings import UserError
from store.vectors import MOST_INDEX_MEMORY

FILE = Path("docs/performance.json")
PAGE, CHART = Path("docs/performance.md"), Path("docs/charts/performance-serve.svg")
FLOOR = "floor: "  # what the metrics of floors begin with
GROWING = ("p50, ms", "floor of an answer, ms", "CPU of the server, ms a request", "CPU of PostgreSQL, ms a request")
GROWN = (
    "p50, ms", "CPU of the server, ms a request", "CPU of PostgreSQL, ms a request", "index build and check, s",
    "memory of an index build, MB", "size of the index, MB", "memory of PostgreSQL, MB", "memory of a worker, MB",
    "throughput, answers a second",
)  # fmt: skip
# Where one node ends: a figure that nobody would have worse, and what it is.
LIMITS = {
    "p50, ms": (100.0, "what a page can wait for"),
    "index build and check, s": (8 * 3600.0, "a night"),
    "memory of an index build, MB": (
        MOST_INDEX_MEMORY / 1024,
        "all that a build takes; beyond, it is several times as slow",
    ),
    "size of the index, MB": (65_536.0, "the memory of a node of 64 GB, in which it has to stay"),
    "throughput, answers a second": (10.0, "too few to run a node for"),
}
BETTER_MORE = {"throughput, answers a second"}
FORETOLD = 100  # times the largest catalogue that was measured: of what lies beyond, the same growth says nothing
HEAD = """# Speed

Made by `python -m benchmarks.performance` from [performance.json](performance.json), whose rows say which command and commit they
are of. A ratio is the value over what it is held against: of serving the *floor*, what the physical parts of an answer cost by
themselves in the same run (an HTTP server that answers as much without work, the bare SQL of a shopper and of 100 candidates, the
bare forward passes, each over and over, so that the processor's caches are its own); of throughput the plain way to make the same
lists (`benchmarks/plain.py`); of training the rate of another library at the same work. No answer finds the caches so: the same
parts one after the other, 10 ms after they ran last (HTTP as before), are the floor *after a pause*. Times are those of a machine
of two cores at that hour, shared by server, database and whoever asks; ratios are of one run, and carry over.
"""


@dataclass(frozen=True)
class Row:
    bench: str  # which benchmark
    items: int  # in the catalogue
    metric: str  # what was measured, with its unit
    value: float  # ours
    floor: float | None  # what ours is held against: another library's figure, or a bound; None: nothing
    ratio: float | None  # value / floor
    commit: str
    command: str  # that makes this row again

    @property
    def key(self) -> tuple[str, int, str]:
        return self.bench, self.items, self.metric


def read(file: Path = FILE) -> list[Row]:
    """Raises UserError when the file holds something else; no rows when there is none."""
    if not file.exists():
        return []
    try:
        return [Row(**found) for found in json.loads(file.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} is not a list of rows of speed ({error}); mend it or delete it") from error


def save(rows: Sequence[Row], file: Path = FILE) -> None:
    """Put rows into the file, in the place of those with the same benchmark, items and metric; all stand sorted by these.

    Raises UserError, and leaves the file as it is, when it holds something else.
    """
    kept = {row.key: row for row in [*read(file), *rows]}
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps([asdict(kept[key]) for key in sorted(kept)], indent=1, ensure_ascii=False, allow_nan=False)
    file.write_text(text + "\n", encoding="utf-8")


def page(rows: Sequence[Row], chart: str) -> str:
    """The page's text: of each benchmark a table, and of serving how much a tenfold catalogue costs."""
    parts = [HEAD]
    served = [row for row in rows if row.bench == "serve"]
    if served:
        sizes = sorted({row.items for row in served})
        by = {(row.items, row.metric): row for row in served}
        metrics = list(dict.fromkeys(row.metric for row in served))
        parts += ["## Answering", f"![p50 of an answer and its floor]({chart})"]
        lines = ["| |" + "".join(f" {size:,} products |" for size in sizes), "|---|" + "---|" * len(sizes)]
        for metric in metrics:
            lines.append(f"| {metric} |" + "".join(f" {_cell(by.get((size, metric)))} |" for size in sizes))
        parts.append("\n".join(lines))
        if len(sizes) > 1:
            parts.append("Ten times the catalogue costs so many times as much (from the smallest to the largest here):")
            parts.append(
                "\n".join(
                    f"- {metric}: {_tenfold(by, sizes, metric)}" for metric in GROWING if (sizes[0], metric) in by
                )
            )
            parts += _beyond(by, sizes)
    parts += _index_kinds([row for row in rows if row.bench == "index"])
    trained = [row for row in rows if row.bench == "train"]
    if trained:
        lines = ["| | ours | theirs | ratio |", "|---|---|---|---|"]
        lines += [
            f"| {row.metric} | {_number(row.value)} | {_number(row.floor)} | {row.ratio or math.nan:.2f} |"
            for row in trained
        ]
        parts += [f"## Training ({trained[0].items:,} products)", "\n".join(lines)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _beyond(by: dict[tuple[int, str], Row], sizes: Sequence[int]) -> list[str]:
    """What the next tenfold costs, and where one node ends, if all goes on growing as between the two largest sizes."""
    before, last = sizes[-2:]
    power = {
        metric: math.log(by[last, metric].value / by[before, metric].value) / math.log(last / before)
        for metric in GROWN
        if all(by.get((size, metric)) and by[size, metric].value > 0 for size in (before, last))
    }
    if not power:
        return []
    lines = [f"| | {last:,} products | {10 * last:,} products |", "|---|---|---|"]
    lines += [
        f"| {metric} | {_number(by[last, metric].value)} | {_number(by[last, metric].value * 10**exponent)} |"
        for metric, exponent in power.items()
    ]
    ends, later = [], []
    for metric, (limit, what) in LIMITS.items():
        if metric not in power:
            continue
        sign = -1 if metric in BETTER_MORE else 1
        growth, left = sign * power[metric], sign * math.log(limit / by[last, metric].value)
        if left <= 0:
            ends.append((float(last), metric, limit, what))
        elif growth > 0 and left / growth <= math.log(FORETOLD):
            ends.append((last * math.exp(left / growth), metric, limit, what))
        else:
            later.append(f"{metric} {_number(limit)} ({what})")
    parts = [
        "## Beyond",
        f"The next tenfold, if it costs as much more as from {before:,} to {last:,} products. Nobody measured it:",
        "\n".join(lines),
    ]
    if ends:
        parts.append("One node ends, by the same growth, where the first of these is reached:")
        parts.append(
            "\n".join(
                f"- {metric} {_number(limit)} ({what}): at {_rough(size)} products"
                for size, metric, limit, what in sorted(ends)
            )
        )
    if later:
        parts.append(f"Not up to {FORETOLD * last:,} products, beyond which nothing is foretold: {'; '.join(later)}.")
    return parts


def _rough(size: float) -> str:
    """Two digits: nobody knows more."""
    step = 10 ** (math.floor(math.log10(size)) - 1)
    return f"about {round(size / step) * step:,.0f}"


def _index_kinds(rows: Sequence[Row]) -> list[str]:
    """Half precision in the index beside single, at each size."""
    parts = []
    for size in sorted({row.items for row in rows}):
        lines = ["| | halfvec | vector | ratio |", "|---|---|---|---|"]
        lines += [
            f"| {row.metric} | {_number(row.value)} | {_number(row.floor)} | {row.ratio or math.nan:.2f} |"
            for row in rows
            if row.items == size
        ]
        parts += [f"## Half precision in the index ({size:,} products)", "\n".join(lines)]
    return parts


def _tenfold(by: dict[tuple[int, str], Row], sizes: Sequence[int], metric: str) -> str:
    first, last = by[sizes[0], metric].value, by[sizes[-1], metric].value
    return f"{(last / first) ** (1 / math.log10(sizes[-1] / sizes[0])):.2f}"


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    return _number(row.value) + (f" (x {row.ratio:.2f} of {_number(row.floor)})" if row.ratio else "")


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def draw(rows: Sequence[Row], path: Path) -> None:
    """The floors of an answer, stacked, beside its p50, by size of catalogue."""
    served = [row for row in rows if row.bench == "serve"]
    sizes = sorted({row.items for row in served})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 3.2), layout="constrained")
        axes = figure.subplots()
        for place, size in enumerate(sizes):
            bottom = 0.0
            floors = [row for row in served if row.items == size and row.metric.startswith(FLOOR)]
            for row, colour in zip(floors, PALETTE, strict=False):
                label = row.metric.removeprefix(FLOOR).removesuffix(", ms") if place == 0 else None
                axes.barh(place + 0.2, row.value, 0.35, left=bottom, color=colour, label=label)
                bottom += row.value
            for row in served:
                if row.items == size and row.metric == "p50, ms":
                    axes.barh(place - 0.2, row.value, 0.35, color="#555555", label="an answer" if place == 0 else None)
        axes.set_yticks(range(len(sizes)), [f"{size:,} products" for size in sizes])
        axes.set_xlabel("milliseconds, median")
        axes.legend(frameon=False, fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> None:
    rows = read()
    draw(rows, CHART)
    PAGE.write_text(page(rows, str(CHART.relative_to(PAGE.parent))), encoding="utf-8")


if __name__ == "__main__":
    main()
