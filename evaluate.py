"""Judge a live release on a standard split, by asking the same pipeline that serves, and write docs/results.json.

    python evaluate.py hm-week FOLDER          # FOLDER: the H&M tables
    python evaluate.py rtr-warm FOLDER         # FOLDER: the Rent the Runway rentals; also rtr-cold
    python evaluate.py sample-week             # the last week of the sample shop
    python evaluate.py page                    # docs/results.md from docs/results.json

The database must hold the split's training events only (`import_data.py ... --until`); the test events are read from the files
here and nowhere else. docs/results.json is a list of rows {split, model, stage, metric, slice, value, low, high, n, commit,
command}; low and high bound 95 % of bootstrap resamples over shoppers.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from pydantic import Field
from pydantic_settings import CliPositionalArg
from tqdm import tqdm

import datasets.hm
import datasets.rent_the_runway
import datasets.sample_shop
from baselines import BASELINES, PEER_SCRIPTS, Split, peer_lists
from catalog import Rejected
from recommender import Recommender, Request, UnavailableError
from settings import Settings, UserError, run_script
from store import Store
from tensors import Histories
from text_encoder import TextEncoder

RETRIEVED = 100
BOOTSTRAPS = 1000
HM_CUT = datetime(2020, 9, 21, tzinfo=UTC)
RTR_CUT = datetime(2017, 7, 1, tzinfo=UTC)
SAMPLE_CUT = datetime(2026, 6, 23, tzinfo=UTC)
SESSION = timedelta(hours=1)  # of the sample shop: what a shopper does within it belongs together
RESULTS = Path("docs/results.json")
STEPS = Path("docs/steps.json")  # written by run_split.py


class EvaluateOptions(Settings):
    what: CliPositionalArg[Literal["hm-week", "rtr-warm", "rtr-cold", "sample-week", "page"]] = Field(
        description="split to judge, or page"
    )
    folder: CliPositionalArg[Path | None] = Field(None, description="folder of the data set")
    model: str = Field("styletower", description="what to call the release in the tables")
    baselines: bool = Field(True, description="measure the plain lines beside the release")
    peers: Path | None = Field(
        None, description="python of the environment of benchmarks/peers/requirements.txt: measure these libraries too"
    )
    limit: int = Field(0, ge=0, description="judge only so many shoppers (0: all); nothing is written then")


@dataclass(frozen=True)
class Row:
    """One figure of docs/results.json."""

    split: str
    model: str
    stage: str  # "retrieval" or "reranked"
    metric: str
    slice: str  # "all", or targets that had training events ("warm") or had none ("cold")
    value: float
    low: float
    high: float
    n: int  # targets for recall@100, shoppers for the others
    commit: str
    command: str


@dataclass(frozen=True)
class Case:
    """One shopper of the test: who, what they said, when, and what they then took."""

    user_id: str
    context: str
    at: float
    targets: list[str]


# ---------------------------------------------------------------------------------------------------------------- splits
def hm_cases(path: Path, known: set[str], seen: dict[str, set[str]]) -> list[Case]:
    """hm-week: what shoppers with a training purchase bought on the test days and had not bought before."""
    events = _events(datasets.hm.read(path)).filter(pl.col("at") >= HM_CUT)
    cases = []
    for (user_id,), rows in events.group_by("user_id", maintain_order=True):
        targets = sorted(set(rows["product_id"]) - seen.get(str(user_id), set()))
        if user_id in known and targets:
            cases.append(Case(str(user_id), "", HM_CUT.timestamp(), targets))
    return sorted(cases, key=lambda case: case.user_id)


def rtr_cases(path: Path, known: set[str], seen: dict[str, set[str]], warm: bool) -> list[Case]:
    """rtr-warm / rtr-cold: the first rental after the cut of an item the shopper had not rented before.

    Rentals of one day have no order; the lowest item id is the target, as in every published line on this split.
    """
    events = _events(datasets.rent_the_runway.read(path)).filter(pl.col("at") >= RTR_CUT)
    events = events.with_columns(number=pl.col("product_id").cast(pl.Int64)).sort("at", "user_id", "number")
    cases: dict[str, Case] = {}
    for user_id, product_id, at, context in events.select("user_id", "product_id", "at", "context").iter_rows():
        if (user_id in known) == warm and user_id not in cases and product_id not in seen.get(user_id, set()):
            cases[user_id] = Case(user_id, context, at.timestamp(), [product_id])
    return sorted(cases.values(), key=lambda case: case.user_id)


def sample_cases(known: set[str], seen: dict[str, set[str]]) -> list[Case]:
    """sample-week: what shoppers with a history met in their first session after the cut, and had not met before."""
    events = _events(datasets.sample_shop.read(None)).filter(pl.col("at") >= SAMPLE_CUT).sort("at", "user_id")
    first: dict[str, tuple[str, datetime]] = {}
    met: dict[str, dict[str, None]] = {}
    for user_id, product_id, at, context in events.select("user_id", "product_id", "at", "context").iter_rows():
        _, start = first.setdefault(user_id, (context, at))
        if user_id in known and at < start + SESSION and product_id not in seen.get(user_id, set()):
            met.setdefault(user_id, {})[product_id] = None
    return [
        Case(user, first[user][0], first[user][1].timestamp(), sorted(targets)) for user, targets in sorted(met.items())
    ]


def _events(source: datasets.Source) -> pl.DataFrame:
    return pl.concat([frame for frame in source.events if not isinstance(frame, Rejected)])


# --------------------------------------------------------------------------------------------------------------- metrics
@dataclass(frozen=True)
class Measured:
    """Per-shopper counts, from which every metric and its interval follow. Arrays over shoppers."""

    hits: dict[str, np.ndarray]  # by slice: targets among the first 100
    targets: dict[str, np.ndarray]  # by slice: targets
    recall_short: np.ndarray  # recall@short of each shopper
    ndcg_short: np.ndarray


def measure(lists: list[list[str]], cases: list[Case], warm_items: set[str], short: int) -> Measured:
    """Counts of ranked lists (product ids, best first) against what each shopper took."""
    hits = {name: np.zeros(len(cases)) for name in ("all", "warm", "cold")}
    targets = {name: np.zeros(len(cases)) for name in ("all", "warm", "cold")}
    recall_short, ndcg_short = np.zeros(len(cases)), np.zeros(len(cases))
    discount = 1.0 / np.log2(np.arange(short) + 2)
    for number, (ranked, case) in enumerate(zip(lists, cases, strict=True)):
        position = {product_id: place for place, product_id in enumerate(ranked[:RETRIEVED])}
        gained = 0.0
        for target in case.targets:
            place = position.get(target, RETRIEVED)
            for name in ("all", "warm" if target in warm_items else "cold"):
                targets[name][number] += 1
                hits[name][number] += place < RETRIEVED
            if place < short:
                gained += discount[place]
                recall_short[number] += 1 / len(case.targets)
        ndcg_short[number] = gained / discount[: len(case.targets)].sum()
    return Measured(hits, targets, recall_short, ndcg_short)


def figures(measured: Measured, short: int, seed: int = 0) -> list[tuple[str, str, float, float, float, int]]:
    """(metric, slice, value, low, high, n) of everything measured; bounds by bootstrap over shoppers."""
    random = np.random.default_rng(seed)
    shoppers = len(measured.ndcg_short)
    draws = random.integers(0, shoppers, size=(BOOTSTRAPS, shoppers), dtype=np.int32)
    found = []
    for name, hits in measured.hits.items():
        targets = measured.targets[name]
        if targets.sum() == 0:
            continue
        # A resample may draw no target of a rare slice; it then says nothing about it.
        drawn = targets[draws].sum(1)
        ratios = hits[draws].sum(1)[drawn > 0] / drawn[drawn > 0]
        low, high = np.quantile(ratios, [0.025, 0.975])
        found.append((f"recall@{RETRIEVED}", name, hits.sum() / targets.sum(), low, high, int(targets.sum())))
    for metric, values in ((f"recall@{short}", measured.recall_short), (f"ndcg@{short}", measured.ndcg_short)):
        low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
        found.append((metric, "all", values.mean(), low, high, shoppers))
    return found


# ------------------------------------------------------------------------------------------------------------------ main
def main(options: EvaluateOptions) -> None:
    if options.what == "page":
        if not RESULTS.exists():
            raise UserError(f"there is no {RESULTS} here yet; judge a split first")
        write_page(json.loads(RESULTS.read_text(encoding="utf-8")))
        return
    if options.folder is None and options.what != "sample-week":
        raise UserError(f"{options.what} needs the folder of the data set")
    torch.set_num_threads(1)  # one small forward a request: more threads only wait for each other
    cut, short = {"hm-week": (HM_CUT, 12), "sample-week": (SAMPLE_CUT, 10)}.get(options.what, (RTR_CUT, 10))
    with Store.open(options) as store:
        split = _training_side(store, cut)
        known = set(split.histories.user_ids)
        seen = {
            user_id: {split.product_ids[item] for item in split.items_of(user_id)}
            for user_id in split.histories.user_ids
        }
        if options.folder is None:
            cases = sample_cases(known, seen)
        elif options.what == "hm-week":
            cases = hm_cases(options.folder, known, seen)
        else:
            cases = rtr_cases(options.folder, known, seen, warm=options.what == "rtr-warm")
        if not cases:
            raise UserError(
                f"no shopper of {options.folder} can be judged on {options.what}; is this the data set's folder?"
            )
        if options.limit:
            cases = cases[: options.limit]
        warm_items = {split.product_ids[item] for item in np.unique(split.histories.item)}

        lists: dict[tuple[str, str], list[list[str]]] = {}
        recommender = Recommender(store, options, TextEncoder.load(options))
        retrieved, reranked = [], []
        for case in tqdm(cases, desc=options.what, unit="shopper"):
            # What the shopper met before the cut is not offered: the pipeline's own rule.
            try:
                answer = recommender.recommend(Request(case.user_id, context=case.context, k=RETRIEVED, now=case.at))
            except UnavailableError as error:
                raise UserError(str(error)) from error
            if answer.degraded:  # popular items, given in place of what was asked: no figure of ours
                raise UserError("the database did not answer in time; run this again when the machine is less busy")
            reranked.append([item.product_id for item in answer.items])
            retrieved.append([item.product_id for item in sorted(answer.items, key=lambda item: item.retrieval_rank)])
        lists[options.model, "retrieval"] = retrieved
        lists[options.model, "reranked"] = reranked
        if options.baselines:
            for name, score in BASELINES.items():
                found = _baseline_lists(split, cases, score)
                if found is not None:
                    lists[name, "retrieval"] = found
        if options.peers:
            for name, script in PEER_SCRIPTS.items():
                found = peer_lists(options.peers, script, split, [case.user_id for case in cases], RETRIEVED)
                if found is not None:
                    lists[name, "retrieval"] = found

    command = f"python evaluate.py {options.what}" + (" FOLDER" if options.folder else "")
    if options.model != "styletower":
        command += f" --model '{options.model}'"
    rows = [
        Row(options.what, model, stage, metric, part, float(value), float(low), float(high), n, commit(), command)
        for (model, stage), ranked in lists.items()
        for metric, part, value, low, high, n in figures(measure(ranked, cases, warm_items, short), short)
    ]
    for row in rows:
        print(
            f"{row.model:28s} {row.stage:10s} {row.metric:11s} {row.slice:5s} {row.value:.4f} [{row.low:.4f}, {row.high:.4f}]"
        )
    if not options.limit:
        save(rows)


def _training_side(store: Store, cut: datetime) -> Split:
    """The training events as arrays. Raises UserError when the database holds test events too."""
    products = store.products.read_features()
    log = store.events.read()
    if len(log.at) == 0:
        raise UserError("the database holds no events; import the split with --until first")
    if log.at.max() >= cut.timestamp():
        raise UserError(
            f"the database holds events from {cut.date()} on, which the test asks about; import with --until"
        )
    ids = [product.product_id for product in products]
    commerce = store.products.read_commerce()
    group_of = dict(zip(commerce.product_ids, commerce.group_id, strict=True))
    groups = [group_of[product_id] for product_id in ids]
    return Split(ids, products, Histories.build(log, ids), cut.timestamp(), groups)


def _baseline_lists(
    split: Split, cases: list[Case], prepare: Callable[[Split], Callable[[np.ndarray], np.ndarray] | None]
) -> list[list[str]] | None:
    """Ranked lists of one plain line: score every item, leave out what was met, ties by product order."""
    score = prepare(split)
    if score is None:
        return None
    lists = []
    for case in cases:
        met = split.items_of(case.user_id)
        scores = score(met).astype(np.float64)
        scores[met] = -np.inf
        top = (
            np.argpartition(-scores, RETRIEVED)[: RETRIEVED + 1] if len(scores) > RETRIEVED else np.arange(len(scores))
        )
        # Everything that ties with the last place competes for it in product order: no tie is decided by chance.
        tied = np.flatnonzero((scores >= scores[top].min()) & (scores > -np.inf))
        order = tied[np.lexsort((tied, -scores[tied]))][:RETRIEVED]
        lists.append([split.product_ids[item] for item in order])
    return lists


def save(rows: list[Row]) -> None:
    """Replace these models' rows on their split and stage in docs/results.json, and draw the page anew."""
    RESULTS.parent.mkdir(exist_ok=True)
    old = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    replaced = {(row.split, row.model, row.stage) for row in rows}
    kept = [row for row in old if (row["split"], row["model"], row["stage"]) not in replaced]
    every = sorted(kept + [asdict(row) for row in rows], key=lambda row: (row["split"], row["model"], row["stage"]))
    RESULTS.write_text(json.dumps(every, indent=1) + "\n", encoding="utf-8")
    write_page(every)


def write_page(rows: list[dict[str, Any]]) -> None:
    """docs/results.md from the rows of docs/results.json and docs/steps.json."""
    lines = [
        "# Results",
        "",
        "Made by `python evaluate.py page` from `results.json` (every figure, with its 95 % bootstrap interval, commit and",
        "command) and `steps.json`. Run it again with `make results HM=folder RTR=folder`; the features of products with",
        "`python evaluate_features.py SET FOLDER`; what features are worth to the lists with `python run_split.py sample-lexicon`",
        "and its like.",
    ]
    for split in dict.fromkeys(row["split"] for row in rows):
        own = [row for row in rows if row["split"] == split]
        if any(row["metric"] == "f1" for row in own):
            lines += _features_section(split, own)
            continue
        recalls = [f"recall@{RETRIEVED} {part}" for part in ("all", "warm", "cold")]
        others = sorted({f"{row['metric']} all" for row in own} - {recalls[0]})
        figure = {(row["model"], row["stage"], f"{row['metric']} {row['slice']}"): row for row in own}
        columns = [column for column in [*recalls, *others] if any(key[2] == column for key in figure)]
        lines += [
            "",
            f"## {split}",
            "",
            "| model | stage | " + " | ".join(columns) + " |",
            "|---|---|" + "---|" * len(columns),
        ]
        lines_of = {(row["model"], row["stage"]) for row in own}
        ours_last = sorted(
            lines_of, key=lambda pair: (pair[0].startswith("styletower"), pair[0], pair[1] == "reranked")
        )
        for model, stage in ours_last:
            cells = []
            for column in columns:
                row = figure.get((model, stage, column))
                cells.append("" if row is None else f"{row['value']:.4f} [{row['low']:.4f}, {row['high']:.4f}]")
            name = f"**{model}**" if model.startswith("styletower") else model
            lines.append(f"| {name} | {stage} | " + " | ".join(cells) + " |")
        targets = {row["slice"]: row["n"] for row in own if row["metric"] == f"recall@{RETRIEVED}"}
        counts = [f"{targets[part]} ({part})" for part in ("all", "warm", "cold") if part in targets]
        lines += ["", "Targets: " + ", ".join(counts) + "."]
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


def commit() -> str:
    """The commit of this checkout, "unknown" outside of one."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    run_script(EvaluateOptions, main)
