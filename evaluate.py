"""Judge a live release on a standard split, by asking the same pipeline that serves, and write docs/results.json.

    python evaluate.py hm-week FOLDER          # FOLDER: the H&M tables
    python evaluate.py rtr-warm FOLDER         # FOLDER: the Rent the Runway rentals; also rtr-cold
    python evaluate.py s3rec-beauty FOLDER     # FOLDER: Amazon Beauty as of S3-Rec
    python evaluate.py sample-week             # the last week of the sample shop
    python evaluate.py page                    # docs/results.md, examples.md and charts from what was saved

Judged are the list for a shopper, retrieved and reranked, and the lists beside a product (similar, because, basket).
The database must hold the split's training events only (`import_data.py ... --until`); the test events are read from the files
here and nowhere else. The figures are those of metrics.py, the rows those of results.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import torch
from pydantic import Field
from pydantic_settings import CliPositionalArg
from tqdm import tqdm

import datasets.hm
import datasets.rent_the_runway
import datasets.s3rec
import datasets.sample_shop
import portrait
from baselines import BASELINES, PEER_SCRIPTS, Case, Score, Split, content_vectors, peer_lists
from catalog import ListKind, Rejected
from ceiling import Answers, Oracle
from loaded_release import LoadedRelease, UnavailableError
from metrics import RETRIEVED, Catalogue, Figure, Ratio, compare, coverage, figures, measure, write_ratios
from recommender import Recommended, Recommender, Request
from release import Release
from results import BESIDE, ORACLE, ORACLE_OF_CONTENTS, PLAIN_BESIDE, RESULTS, Row, commit, save, short_of, write_page
from settings import Settings, UserError, run_script
from store import Store
from tensors import Histories
from text_encoder import TextEncoder

CUTS = {
    "hm-week": datetime(2020, 9, 21, tzinfo=UTC),
    "rtr-warm": datetime(2017, 7, 1, tzinfo=UTC),
    "rtr-cold": datetime(2017, 7, 1, tzinfo=UTC),
    "s3rec-beauty": datasets.s3rec.LAST_DAY,
    "sample-week": datetime(2026, 6, 23, tzinfo=UTC),
}
SOURCES = {  # modules, each with a `read`
    "hm-week": datasets.hm,
    "rtr-warm": datasets.rent_the_runway,
    "rtr-cold": datasets.rent_the_runway,
    "s3rec-beauty": datasets.s3rec,
    "sample-week": datasets.sample_shop,
}
SESSION = timedelta(hours=1)  # of the sample shop: what a shopper does within it belongs together
TOGETHER = timedelta(days=1)  # what a shopper takes within it goes with what was taken first
SAME_BESIDE = ("rtr-cold",)  # asks after the days of rtr-warm, where it is judged already what went with a product then
BESIDE_SHOPPERS = 4000  # at most, drawn at random: a week of H&M has three times as many, and every line takes its time

Line = tuple[str, str]  # a model and stage
Lists = dict[Line, list[list[str]]]  # ranked product ids of each shopper
Measured = dict[Line, dict[tuple[str, str], Ratio]]  # by metric and slice


class EvaluateOptions(Settings):
    what: CliPositionalArg[Literal["hm-week", "rtr-warm", "rtr-cold", "s3rec-beauty", "sample-week", "page"]] = Field(
        description="split to judge, or page"
    )
    folder: CliPositionalArg[Path | None] = Field(None, description="folder of the data set")
    model: str = Field("styletower", description="what to call the release in the tables")
    baselines: bool = Field(True, description="measure the plain lines beside the release")
    peers: Path | None = Field(
        None, description="python of the environment of benchmarks/peers/requirements.txt: measure these libraries too"
    )
    peer: list[str] = Field([], description=f"of these alone; of {', '.join(PEER_SCRIPTS)}")
    ceiling: bool = Field(
        False, description="measure too what an oracle finds that other shoppers of the test days teach (ceiling.py)"
    )
    limit: int = Field(0, ge=0, description="judge only so many shoppers (0: all); nothing is written then")
    shown: bool = Field(True, description="save example lists, learning curves and a map of the items for the page too")
    per_shopper: Path | None = Field(
        None, description="write each shopper's part of the release's figures into this .npz file, and nothing else"
    )


# ---------------------------------------------------------------------------------------------------------------- splits
def hm_cases(taken: pl.DataFrame, known: set[str], seen: dict[str, set[str]]) -> list[Case]:
    """hm-week: what shoppers with a training purchase bought on the test days and had not bought before."""
    cases = []
    for (user_id,), rows in taken.group_by("user_id", maintain_order=True):
        targets = sorted(set(rows["product_id"]) - seen.get(str(user_id), set()))
        if user_id in known and targets:
            cases.append(Case(str(user_id), "", CUTS["hm-week"].timestamp(), targets))
    return sorted(cases, key=lambda case: case.user_id)


def rtr_cases(taken: pl.DataFrame, known: set[str], seen: dict[str, set[str]], warm: bool) -> list[Case]:
    """rtr-warm / rtr-cold: the first rental after the cut of an item the shopper had not rented before.

    Rentals of one day have no order; the lowest item id is the target, as in every published line on this split.
    """
    events = taken.with_columns(number=pl.col("product_id").cast(pl.Int64)).sort("at", "user_id", "number")
    cases: dict[str, Case] = {}
    for user_id, product_id, at, context in events.select("user_id", "product_id", "at", "context").iter_rows():
        if (user_id in known) == warm and user_id not in cases and product_id not in seen.get(user_id, set()):
            cases[user_id] = Case(user_id, context, at.timestamp(), [product_id])
    return sorted(cases.values(), key=lambda case: case.user_id)


def s3rec_cases(taken: pl.DataFrame, known: set[str], seen: dict[str, set[str]]) -> list[Case]:
    """s3rec-beauty, leave one out: the last item of every shopper.

    Published on it, with the item before the last kept out for validation (arXiv:2508.06450 and its repository): recall@10 and
    NDCG@10 of .0928 and .0523 for eSASRec, .0921 and .0531 for SASRec with the same loss.
    """
    return [
        Case(user_id, "", CUTS["s3rec-beauty"].timestamp(), [product_id])
        for user_id, product_id in taken.sort("user_id").select("user_id", "product_id").iter_rows()
        if user_id in known and product_id not in seen.get(user_id, set())
    ]


def sample_cases(taken: pl.DataFrame, known: set[str], seen: dict[str, set[str]]) -> list[Case]:
    """sample-week: what shoppers with a history met in their first session after the cut, and had not met before."""
    events = taken.sort("at", "user_id")
    first: dict[str, tuple[str, datetime]] = {}
    met: dict[str, dict[str, None]] = {}
    for user_id, product_id, at, context in events.select("user_id", "product_id", "at", "context").iter_rows():
        _, start = first.setdefault(user_id, (context, at))
        if user_id in known and at < start + SESSION and product_id not in seen.get(user_id, set()):
            met.setdefault(user_id, {})[product_id] = None
    return [
        Case(user, first[user][0], first[user][1].timestamp(), sorted(targets)) for user, targets in sorted(met.items())
    ]


CASES: dict[str, Callable[[pl.DataFrame, set[str], dict[str, set[str]]], list[Case]]] = {
    "hm-week": hm_cases,
    "rtr-warm": partial(rtr_cases, warm=True),
    "rtr-cold": partial(rtr_cases, warm=False),
    "s3rec-beauty": s3rec_cases,
    "sample-week": sample_cases,
}


def beside_cases(taken: pl.DataFrame, group_of: Mapping[str, str | None], seen: dict[str, set[str]]) -> list[Case]:
    """What goes with a product: the first one of the catalogue that a shopper took after the cut, stranger or not, and what else
    they took within a day. What they had met before is no target, nor are the product's own colours and sizes, which no list has
    to guess. Of products taken in one instant the lowest id is first. Of more than BESIDE_SHOPPERS so many are drawn.
    `group_of` has every product of the catalogue.
    """
    first: dict[str, Case] = {}
    until: dict[str, datetime] = {}
    events = taken.sort("at", "user_id", "product_id").select("user_id", "product_id", "at", "context")
    for user_id, product_id, at, context in events.iter_rows():
        if user_id not in first:
            if product_id in group_of:
                first[user_id] = Case(user_id, context, at.timestamp(), [], about=product_id)
                until[user_id] = at + TOGETHER
            continue
        case = first[user_id]
        group = group_of.get(product_id)
        is_variant = product_id == case.about or (group is not None and group == group_of[case.about])
        is_new = product_id not in seen.get(user_id, set()) and product_id not in case.targets
        if at < until[user_id] and is_new and not is_variant:
            case.targets.append(product_id)
    cases = sorted((case for case in first.values() if case.targets), key=lambda case: case.user_id)
    drawn = np.random.default_rng(0).permutation(len(cases))[:BESIDE_SHOPPERS]
    return [cases[number] for number in np.sort(drawn)]


def after_cut(split: str, folder: Path | None) -> pl.DataFrame:
    """What everybody took in the test days, read from the files."""
    events = [frame for frame in SOURCES[split].read(folder).events if not isinstance(frame, Rejected)]
    return pl.concat(events).filter(pl.col("at") >= CUTS[split])


# ------------------------------------------------------------------------------------------------------------------ main
def main(options: EvaluateOptions) -> None:
    if options.what == "page":
        if not RESULTS.exists():
            raise UserError(f"there is no {RESULTS} here yet; judge a split first")
        write_page(json.loads(RESULTS.read_text(encoding="utf-8")))
        return
    if options.folder is None and options.what != "sample-week":
        raise UserError(f"{options.what} needs the folder of the data set")
    if unknown := [name for name in options.peer if name not in PEER_SCRIPTS]:
        raise UserError(f"there is no peer {unknown[0]!r}; there are: {', '.join(PEER_SCRIPTS)}")
    if options.peer and options.peers is None:
        raise UserError("--peer needs the python of the peers' environment; give --peers too")
    torch.set_num_threads(1)  # one small forward a request: more threads only wait for each other
    cut = CUTS[options.what]
    text_encoder = TextEncoder.load(options)
    with Store.open(options) as store:
        split = replace(_training_side(store, cut), text_encoder=text_encoder)
        known = set(split.histories.user_ids)
        seen = {
            user_id: {split.product_ids[item] for item in split.items_of(user_id)}
            for user_id in split.histories.user_ids
        }
        taken = after_cut(options.what, options.folder)
        cases = CASES[options.what](taken, known, seen)
        groups = split.groups or [None] * len(split.product_ids)
        group_of = dict(zip(split.product_ids, groups, strict=True))
        beside = [] if options.what in SAME_BESIDE else beside_cases(taken, group_of, seen)
        if not cases:
            raise UserError(
                f"no shopper of {options.folder} can be judged on {options.what}; is this the data set's folder?"
            )
        if options.limit:
            cases, beside = cases[: options.limit], beside[: options.limit]
        recommender = Recommender(store, options, text_encoder)
        lists = _our_lists(options, recommender, cases)
        lists_beside = _our_lists_beside(options, recommender, beside)
        if options.ceiling and not options.per_shopper:
            oracle = _oracle(options, recommender, split, cases, lists[options.model, "reranked"], taken)
            lists[ORACLE, "retrieval"] = oracle.recommend()
            lists[ORACLE_OF_CONTENTS, "retrieval"] = oracle.recommend_contents()
    catalogue = catalogue_of(split)

    def measured(lists: Lists, cases: list[Case]) -> Measured:
        history = np.array([len(seen.get(case.user_id, ())) for case in cases])
        targets = [case.targets for case in cases]
        return {line: measure(ranked, targets, history, catalogue) for line, ranked in lists.items()}

    if options.per_shopper:
        ours: dict[tuple[str, ...], Ratio] = {
            (stage, *key): ratio
            for (_, stage), ratios in (measured(lists, cases) | measured(lists_beside, beside)).items()
            for key, ratio in ratios.items()
        }
        write_ratios(options.per_shopper, ours)
        return
    if options.baselines:
        for name, prepare in BASELINES.items():
            score = prepare(split)
            if score is not None:
                lists[name, "retrieval"] = _baseline_lists(split, cases, score)
                if beside:
                    lists_beside[name, PLAIN_BESIDE] = _baseline_lists(split, beside, score)
    if options.peers:
        for name in options.peer or PEER_SCRIPTS:
            found = peer_lists(
                options.peers, PEER_SCRIPTS[name], split, [case.user_id for case in cases], RETRIEVED,
                options.data_dir / "peers",
            )  # fmt: skip
            if found is not None:
                lists[name, "retrieval"] = found

    rows = _rows(options, lists, measured(lists, cases), catalogue)
    rows += _rows(options, lists_beside, measured(lists_beside, beside), catalogue)
    for row in rows:
        print(
            f"{row.model:40s} {row.stage:10s} {row.metric:21s} {row.slice:12s} "
            f"{row.value:.4f} [{row.low:.4f}, {row.high:.4f}]"
        )
    if options.limit:
        return
    if options.shown:
        _show(options, recommender.live(), split, cases, lists[options.model, "reranked"])
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


def _our_lists(options: EvaluateOptions, recommender: Recommender, cases: list[Case]) -> Lists:
    """What the release answers, as it is and in the order of retrieval. What a shopper met before the cut is not offered: the
    pipeline's own rule. Raises UserError when there is no answer to judge."""
    retrieved, reranked = [], []
    for case in tqdm(cases, desc=options.what, unit="shopper"):
        items = _items(
            recommender, Request(case.user_id, context=case.context, k=RETRIEVED, now=case.at, explain=False)
        )
        reranked.append([item.product_id for item in items])
        retrieved.append([item.product_id for item in sorted(items, key=lambda item: item.retrieval_rank)])
    return {(options.model, "retrieval"): retrieved, (options.model, "reranked"): reranked}


def _our_lists_beside(options: EvaluateOptions, recommender: Recommender, cases: list[Case]) -> Lists:
    """What the release answers beside each case's product, by kind of list; without `basket` where products have no category.
    Raises UserError when there is no answer to judge."""
    if not cases:
        return {}
    found: dict[ListKind, list[list[str]]] = {kind: [] for kind in BESIDE}
    if options.list_category_field not in recommender.live().std_fields:
        found.pop("basket")
    for case in tqdm(cases, desc=f"{options.what}, beside a product", unit="shopper"):
        asked = Request(case.user_id, context=case.context, k=RETRIEVED, now=case.at, explain=False)
        for kind, lists in found.items():
            about = replace(asked, cart=[case.about]) if kind == "basket" else replace(asked, product_id=case.about)
            lists.append([item.product_id for item in _items(recommender, replace(about, kind=kind))])
    return {(options.model, kind): lists for kind, lists in found.items()}


def _items(recommender: Recommender, request: Request) -> list[Recommended]:
    """A release's answer to one request. Raises UserError when there is none to judge."""
    try:
        answer = recommender.recommend(request)
    except UnavailableError as error:
        raise UserError(str(error)) from error
    if answer.degraded:  # popular items, given in place of what was asked: no figure of ours
        raise UserError("the database did not answer in time; run this again when the machine is less busy")
    return answer.items


def _oracle(
    options: EvaluateOptions, recommender: Recommender, split: Split, cases: list[Case],
    answered: list[list[str]], taken: pl.DataFrame,
) -> Oracle:  # fmt: skip
    """Who is not judged teaches too, if they said anything when they came; if not, their counts tell all that they could."""
    judged = {case.user_id for case in cases}
    firsts = taken.sort("at", maintain_order=True).group_by("user_id", maintain_order=True).first()
    others = [
        Case(user_id, context, at.timestamp(), [product_id])
        for user_id, product_id, at, context in firsts.select("user_id", "product_id", "at", "context").iter_rows()
        if context and user_id not in judged
    ]
    every = [*cases, *others]
    requests = [Request(case.user_id, context=case.context, now=case.at) for case in every]
    queries = np.concatenate([recommender.query(request) for request in requests])
    rows = recommender.store.vectors.fetch(recommender.live().name, split.product_ids)
    ranked = [*answered, *_our_lists(options, recommender, others)[options.model, "reranked"]]
    return Oracle(split, every, len(cases), Answers(queries, rows.vectors, ranked), taken)


def _baseline_lists(split: Split, cases: list[Case], score: Score) -> list[list[str]]:
    """Ranked lists of one plain line: score every item by what was met, or by the product that a list is about; leave out both,
    ties by product order."""
    row_of = {product_id: row for row, product_id in enumerate(split.product_ids)}
    lists = []
    for case in cases:
        met = split.items_of(case.user_id)
        about = np.array([row_of[case.about]]) if case.about else met
        scores = score(about).astype(np.float64)
        scores[met] = scores[about] = -np.inf
        top = (
            np.argpartition(-scores, RETRIEVED)[: RETRIEVED + 1] if len(scores) > RETRIEVED else np.arange(len(scores))
        )
        # Everything that ties with the last place competes for it in product order: no tie is decided by chance.
        tied = np.flatnonzero((scores >= scores[top].min()) & (scores > -np.inf))
        order = tied[np.lexsort((tied, -scores[tied]))][:RETRIEVED]
        lists.append([split.product_ids[item] for item in order])
    return lists


def catalogue_of(split: Split) -> Catalogue:
    """What the lists are judged by. Only the plain lines by content rank in this content space: their diversity is low by
    design."""
    histories, items = split.histories, len(split.product_ids)
    return Catalogue(
        split.product_ids,
        events=np.bincount(histories.item, minlength=items),
        met_by=np.bincount(histories.item[histories.first_meeting], minlength=items),
        shoppers=len(histories.user_ids),
        content=content_vectors(split.products),
    )


def _show(
    options: EvaluateOptions, loaded: LoadedRelease, split: Split, cases: list[Case], ranked: list[list[str]]
) -> None:
    """Save what the page shows of a release beside its figures."""
    manifest = Release.open(options.models_dir, loaded.name).manifest
    portrait.save_curves([options.what], options.model, portrait.learning_curves(manifest))
    encoder, products = loaded.encoder, split.products
    vectors = encoder.cached_vectors(encoder.features(products))
    portrait.save_map(options.what, options.model, portrait.item_map(vectors, products))
    requests = [
        portrait.Shown(case.context, _history(split, case.user_id), case.targets, answer)
        for case, answer in zip(cases, ranked, strict=True)
    ]
    examples = portrait.examples(requests, products, short_of(options.what), whole_titles=options.what == "sample-week")
    portrait.save_examples(options.what, options.model, examples)


def _history(split: Split, user_id: str) -> list[str]:
    """Distinct items that a shopper met, the latest first."""
    rows = split.events_of(user_id)[::-1]
    return [split.product_ids[row] for row in dict.fromkeys(rows.tolist())]


def _rows(options: EvaluateOptions, lists: Lists, measured: Measured, catalogue: Catalogue) -> list[Row]:
    """Every figure of every line, then the release against itself before reranking, and against every other line."""
    if not lists:
        return []
    command = f"python evaluate.py {options.what}" + (" FOLDER" if options.folder else "")
    if options.model != "styletower":
        command += f" --model '{options.model}'"
    if options.ceiling:
        command += " --ceiling"
    now = commit()

    def row(model: str, stage: str, figure: Figure) -> Row:
        return Row(options.what, model, stage, **asdict(figure), commit=now, command=command)

    rows = [
        row(*line, figure)
        for line, ratios in measured.items()
        for figure in [*figures(ratios), coverage(lists[line], catalogue)]
    ]
    ours = [line for line in lists if line[0] == options.model]
    others = [line for line in lists if line[0] != options.model]
    pairs = [(f"{options.model} against {other[0]}", line, other) for line in ours for other in others]
    if (options.model, "reranked") in ours:
        one, other = (options.model, "reranked"), (options.model, "retrieval")
        pairs.insert(0, (f"{options.model} reranked against its retrieval", one, other))
    metrics = (f"recall@{RETRIEVED}", f"ndcg@{short_of(options.what)}")
    compared = [(name, one, other, metric) for name, one, other in pairs for metric in metrics]
    found = compare(
        [(measured[one][metric, "all"], measured[other][metric, "all"]) for _, one, other, metric in compared]
    )
    for (name, (_, stage), _, metric), it in zip(compared, found, strict=True):
        rows.append(row(name, stage, Figure(f"{metric} difference", "all", it.difference, it.low, it.high, it.n)))
        rows.append(row(name, stage, Figure(f"{metric} p", "all", it.p, it.p, it.p, it.n)))
    return rows


if __name__ == "__main__":
    run_script(EvaluateOptions, main)
