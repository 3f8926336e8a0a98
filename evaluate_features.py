"""Judge a reader of product text on products whose features are known, and write docs/results.json.

    python evaluate_features.py myntra FOLDER                       # title and description
    python evaluate_features.py myntra FOLDER --text title          # the title alone
    python evaluate_features.py myntra FOLDER --reader embedded     # after `make llm`; also --reader endpoint
    python evaluate_features.py ae-110k FOLDER --reader embedded    # FOLDER: train.jsonl and test.jsonl; also oa-mine

The reader sees text only. **Myntra**: every field is closed, a choice among the values that the catalogue has for it; a field of a
product counts where the catalogue says something about it. **AE-110k and OA-Mine** (Brinkmann et al. 2024, "ExtractGPT",
arXiv:2310.12537, whose splits and measure are used): fields are open, values are words of the title; a field that the product
does not have ("n/a") counts against whoever gives it a value. Exact match, but for case.

By default the reader may learn from the set's other products, as it does in a shop (`--no-learn`: it knows nothing of them).
Beside it stand plain lines: the most frequent value of each field, the lexicon alone, the lexicon and the other products
without a model, and the value whose name is nearest in meaning (text_encoder.py, no training).
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field
from pydantic_settings import CliPositionalArg
from tqdm import tqdm

import datasets.myntra
from catalog import FeatureSchema, RawProduct
from extract_features import extract, make_reader
from lexicon import Lexicon, LexiconFile, fold, plain_text, says
from neighbours import Neighbours
from readers import LexiconReader, ModelReader, Reader, ReaderSettings
from results import Row, commit, save
from settings import UserError, run_script
from store import Store
from text_encoder import TextEncoder
from vocab import normalise

BOOTSTRAPS = 1000
MICRO = "micro"  # all fields together
# What every product has, and what some have.
MYNTRA_ALWAYS = ("gender", "category", "colour", "season", "usage")
MYNTRA_FIELDS = (*MYNTRA_ALWAYS, "fabric", "pattern", "fit", "neck", "sleeve_length")
RAREST = 5  # products that a value must have to be a choice; rarer ones are slips of the keyboard
NOT_THERE = "n/a"
MAX_FIELDS = 20  # shown one by one

Values = dict[str, list[str]]  # of one product: field -> values
Line = Callable[[RawProduct, FeatureSchema], Values]


class FeatureEvaluation(ReaderSettings):
    """Judge a reader of product text on products whose features are known."""

    what: CliPositionalArg[Literal["myntra", "ae-110k", "oa-mine"]] = Field(description="set to judge on")
    folder: CliPositionalArg[Path] = Field(description="folder of the data set")
    text: Literal["title", "full"] = Field("full", description="Myntra: the title alone, or the description too")
    products: int = Field(300, ge=1, description="products judged at most, drawn with --seed")
    learn: bool = Field(True, description="the reader may learn from the set's other products")
    write: bool = Field(True, description="put the figures into docs/results.json")


@dataclass(frozen=True)
class Gold:
    """Products as a reader may see them, and what is true of each."""

    asked: list[FeatureSchema]  # of each product
    raws: list[RawProduct]
    values: list[Values]  # an empty list: the product does not have the field
    others: list[tuple[RawProduct, Values]]  # that a reader may learn from
    most_frequent: Values  # of the other products


def myntra(options: FeatureEvaluation) -> Gold:
    """`options.products` random products that have every field of MYNTRA_ALWAYS."""
    products = [row for row in datasets.myntra.read(options.folder).products if isinstance(row, RawProduct)]
    values = [{name: found for name in MYNTRA_FIELDS if (found := p.attributes.get(name))} for p in products]
    choices: dict[str, list[str]] = {}
    for name in MYNTRA_FIELDS:
        counts = Counter(value for row in values for value in row.get(name, ()))
        choices[name] = [value for value, count in counts.most_common() if count >= RAREST]
    full = [number for number, row in enumerate(values) if all(name in row for name in MYNTRA_ALWAYS)]
    if len(full) < options.products or not all(choices.values()):
        raise UserError(
            f"{options.folder} has {len(full)} products with {', '.join(MYNTRA_ALWAYS)}; {options.products} are to be judged"
        )
    chosen = np.random.default_rng(options.seed).choice(full, options.products, replace=False)

    def seen(number: int) -> RawProduct:
        raw, whole = products[number], options.text == "full"
        return RawProduct(product_id=raw.product_id, title=raw.title, description=raw.description if whole else "")

    judged = set(chosen.tolist())
    return Gold(
        [FeatureSchema(std=choices, re=[])] * len(chosen),
        [seen(number) for number in chosen],
        [values[number] for number in chosen],
        [(seen(number), values[number]) for number in range(len(products)) if number not in judged],
        {name: found[:1] for name, found in choices.items()},
    )


def titles(options: FeatureEvaluation) -> Gold:
    """AE-110k and OA-Mine: the products of test.jsonl to judge, those of train.jsonl to learn from."""
    judged = _titles(options.folder / "test.jsonl")
    others = _titles(options.folder / "train.jsonl")
    if len(judged) > options.products:
        chosen = np.random.default_rng(options.seed).choice(len(judged), options.products, replace=False)
        judged = [judged[number] for number in sorted(chosen)]
    frequent: dict[str, Counter[str]] = {}
    for _, values in others:
        for name, said in values.items():
            frequent.setdefault(name, Counter()).update(said or [NOT_THERE])
    most = {name: found.most_common(1)[0][0] for name, found in frequent.items()}
    return Gold(
        [FeatureSchema(std={}, re=list(values)) for _, values in judged],
        [raw for raw, _ in judged],
        [values for _, values in judged],
        others,
        {name: [value] for name, value in most.items() if value != NOT_THERE},
    )


def _titles(file: Path) -> list[tuple[RawProduct, Values]]:
    """One {"input": title, "target_scores": {field: {value: 1}}} a line."""
    found = []
    try:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines()):
            row = json.loads(line)
            values = {name: [one for one in said if one != NOT_THERE] for name, said in row["target_scores"].items()}
            found.append((RawProduct(product_id=f"{file.stem}-{number}", title=row["input"]), values))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{file} is not a file of titles with target_scores: {error!r}") from error
    return found


def by_reader(reader: Reader) -> Line:
    def read(raw: RawProduct, schema: FeatureSchema) -> Values:
        evidence = extract(raw, schema, reader).evidence
        closed = {name: [one.value for one in said] for name, said in evidence.items() if name in schema.std}
        # An open value as it stands in the text, as a whole: "Black, White" is one value to these sets.
        return closed | {
            name: [", ".join(dict.fromkeys(one.words for one in said))]
            for name, said in evidence.items()
            if name in schema.re
        }

    return read


def by_catalogue(lexicon: Lexicon, neighbours: Neighbours) -> Line:
    """What a reader knows before it asks its model: lexicon and the other products' votes."""

    def read(raw: RawProduct, schema: FeatureSchema) -> Values:
        (reading,) = LexiconReader(lexicon).read([raw], [{}], schema)
        values = {name: [one.value for one in said] for name, said in reading.found.items()}
        for name in schema.std:
            votes = neighbours.votes(raw, name)
            if name not in values and votes:
                values[name] = [max(votes, key=lambda value: votes[value])]
        return values

    return read


def by_typed_words(others: list[tuple[RawProduct, Values]]) -> Line:
    """The longest value of the field among the other products that the title holds."""
    typed: dict[str, dict[str, None]] = {}
    for _, values in others:
        for name, said in values.items():
            typed.setdefault(name, {}).update(dict.fromkeys(said))

    def read(raw: RawProduct, schema: FeatureSchema) -> Values:
        text = normalise(fold(plain_text(raw.title)))
        held = {name: [value for value in typed.get(name, ()) if says(text, value)] for name in schema.re}
        return {name: [max(values, key=len)] for name, values in held.items() if values}

    return read


def by_meaning(encoder: TextEncoder, schema: FeatureSchema) -> Line:
    """The value of each field whose name lies nearest to the text, by cosine."""

    def unit(texts: list[str]) -> np.ndarray:
        vectors = encoder.pooled(texts)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    names = {name: unit([f"{name.replace('_', ' ')}: {value}" for value in schema.std[name]]) for name in schema.std}

    def read(raw: RawProduct, schema: FeatureSchema) -> Values:
        text = unit([f"{raw.title} {raw.description}".strip()])[0]
        return {name: [schema.std[name][int((vectors @ text).argmax())]] for name, vectors in names.items()}

    return read


def counts(said: list[Values], gold: Gold) -> dict[str, np.ndarray]:
    """By field and MICRO: right, wrong and missed values of each product, int [products, 3]."""
    names = dict.fromkeys(name for values in gold.values for name in values)
    table = {name: np.zeros((len(said), 3)) for name in names}
    for number, (found, true) in enumerate(zip(said, gold.values, strict=True)):
        for name in true:
            truth, answer = ({normalise(value) for value in side.get(name, ())} for side in (true, found))
            table[name][number] = len(truth & answer), len(answer - truth), len(truth - answer)
    return {**table, MICRO: np.sum(list(table.values()), axis=0)}


def measures(totals: np.ndarray) -> dict[str, np.ndarray]:
    """precision, recall and F1 of [..., 3] right, wrong and missed; 0 where nothing was said or there was nothing to say."""
    right, wrong, missed = np.moveaxis(totals, -1, 0)
    return {
        "precision": right / np.maximum(right + wrong, 1),
        "recall": right / np.maximum(right + missed, 1),
        "f1": 2 * right / np.maximum(2 * right + wrong + missed, 1),
    }


def rows_of(
    said: list[Values], gold: Gold, options: FeatureEvaluation, model: str, seconds: list[float], cost: float = 0.0
) -> list[Row]:
    """Every figure of one line, with 95 % of bootstrap resamples over products; `seconds` of those that were timed, and
    the money of all, a product."""
    stage = options.text if options.what == "myntra" else "title"
    command = f"python evaluate_features.py {options.what} FOLDER --text {stage} --reader {options.reader}"
    command += f" --products {options.products} --extract-examples {options.extract_examples}"
    if not options.learn:
        command += " --no-learn"
    now = commit()

    def row(metric: str, part: str, value: Any, low: Any, high: Any, n: int) -> Row:
        return Row(options.what, model, stage, metric, part, float(value), float(low), float(high), n, now, command)

    draws = np.random.default_rng(options.seed).integers(0, len(said), size=(BOOTSTRAPS, len(said)))
    rows = []
    tables = counts(said, gold)
    if len(tables) > MAX_FIELDS:  # of dozens of rare fields, the sum says more
        tables = {MICRO: tables[MICRO]}
    for name, table in tables.items():
        values, resampled = measures(table.sum(0)), measures(table[draws].sum(1))
        judged = int((table.sum(1) > 0).sum())
        for metric, value in values.items():
            low, high = np.quantile(resampled[metric], [0.025, 0.975])
            rows.append(row(metric, name, float(value), low, high, judged))
    if seconds:
        rows.append(row("seconds", MICRO, np.mean(seconds), min(seconds), max(seconds), len(seconds)))
    a_product = cost / len(said)
    rows.append(row("cost", MICRO, a_product, a_product, a_product, len(said)))
    return rows


def lines_of(options: FeatureEvaluation, gold: Gold, reader: Reader) -> dict[str, Line]:
    """The plain lines and the reader, by the name that the table gives each."""
    lines: dict[str, Line] = {"most frequent value": lambda raw, schema: gold.most_frequent}
    if options.what == "myntra":
        lexicon = Lexicon.load(options.lexicon)
        lines["lexicon"] = by_reader(LexiconReader(lexicon))
        lines["nearest in meaning"] = by_meaning(TextEncoder.load(options), gold.asked[0])
        lines["lexicon + other products"] = by_catalogue(lexicon, Neighbours(gold.others))
        label = "lexicon"
    else:
        lexicon, label = Lexicon(LexiconFile(fields={})), "no lexicon"
        lines["values of other products"] = by_typed_words(gold.others)
    if isinstance(reader, ModelReader):
        reader.lexicon = lexicon
        if options.learn:
            reader.learn(gold.others)
        lines[f"{reader.model} + {label}" + (" + other products" if options.learn else "")] = by_reader(reader)
    return lines


def main(options: FeatureEvaluation) -> None:
    if not options.folder.is_dir():
        raise UserError(f"{options.folder} is not a folder; give the one that holds the data set's files")
    gold = myntra(options) if options.what == "myntra" else titles(options)
    rows = []
    with Store.open(options) as store:  # the readers' answers are cached there
        reader = make_reader(options, store.cache)
        for model, read in lines_of(options, gold, reader).items():
            read(gold.raws[0], gold.asked[0])  # whatever is prepared once is not a product's time
            before = reader.usage.cost(options)
            said, seconds = [], []
            pairs = zip(gold.raws, gold.asked, strict=True)
            for raw, schema in tqdm(pairs, desc=model, unit="product", total=len(gold.raws), leave=False):
                cached, started = reader.usage.cached, time.perf_counter()
                said.append(read(raw, schema))
                if reader.usage.cached == cached:  # an answer of an earlier run says nothing about the time it takes
                    seconds.append(time.perf_counter() - started)
            rows += rows_of(said, gold, options, model, seconds, reader.usage.cost(options) - before)
    for row in rows:
        if row.metric == "f1" or row.slice == MICRO:
            print(
                f"{row.model:58s} {row.metric:10s} {row.slice:14s} {row.value:.3f} [{row.low:.3f}, {row.high:.3f}] {row.n}"
            )
    if options.write:
        save(rows)


if __name__ == "__main__":
    run_script(FeatureEvaluation, main)
