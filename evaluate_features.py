"""Judge a reader of product text on products whose features are known, and write docs/results.json.

    python evaluate_features.py myntra FOLDER                       # title and description
    python evaluate_features.py myntra FOLDER --text title          # the title alone
    python evaluate_features.py myntra FOLDER --reader embedded     # after `make llm`; also --reader endpoint

The reader sees text only. Every field is closed: a choice among the values that the catalogue has for it. A field of a product
counts where the catalogue says something about it; elsewhere nobody knows whether an answer is right. Beside the reader stand
three plain lines: the most frequent value of each field, the lexicon alone, and the value whose name is nearest in meaning
(text_encoder.py, no training).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field
from pydantic_settings import CliPositionalArg
from tqdm import tqdm

import datasets.myntra
from catalog import FeatureSchema, RawProduct
from evaluate import Row, commit, save
from extract_features import EndpointReader, LexiconReader, Reader, ReaderSettings, extract, make_reader
from lexicon import Lexicon
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

Values = dict[str, list[str]]  # of one product: field -> values
Line = Callable[[RawProduct], Values]


class FeatureEvaluation(ReaderSettings):
    """Judge a reader of product text on products whose features are known."""

    what: CliPositionalArg[Literal["myntra"]] = Field(description="set to judge on")
    folder: CliPositionalArg[Path] = Field(description="folder of the data set")
    text: Literal["title", "full"] = Field("full", description="what is read: the title, or the description too")
    products: int = Field(300, ge=1, description="products judged, drawn with --seed")
    write: bool = Field(True, description="put the figures into docs/results.json")


@dataclass(frozen=True)
class Gold:
    """Products as a reader may see them, and what is true of each."""

    schema: FeatureSchema
    raws: list[RawProduct]
    values: list[Values]
    most_frequent: Values  # the first choice of each field, over the whole catalogue


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
    whole = options.text == "full"
    raws = [
        RawProduct(
            product_id=products[number].product_id,
            title=products[number].title,
            description=products[number].description if whole else "",
        )
        for number in chosen
    ]
    return Gold(
        FeatureSchema(std=choices, re=[]),
        raws,
        [values[number] for number in chosen],
        {name: found[:1] for name, found in choices.items()},
    )


def by_reader(reader: Reader, schema: FeatureSchema) -> Line:
    return lambda raw: extract(raw, schema, reader).product.std


def by_meaning(encoder: TextEncoder, schema: FeatureSchema) -> Line:
    """The value of each field whose name lies nearest to the text, by cosine."""

    def unit(texts: list[str]) -> np.ndarray:
        vectors = encoder.pooled(texts)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    names = {name: unit([f"{name.replace('_', ' ')}: {value}" for value in schema.std[name]]) for name in schema.std}

    def read(raw: RawProduct) -> Values:
        text = unit([f"{raw.title} {raw.description}".strip()])[0]
        return {name: [schema.std[name][int((vectors @ text).argmax())]] for name, vectors in names.items()}

    return read


def counts(said: list[Values], gold: Gold) -> dict[str, np.ndarray]:
    """By field and MICRO: right, wrong and missed values of each product, int [products, 3]."""
    table = {name: np.zeros((len(said), 3)) for name in gold.schema.std}
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


def rows_of(said: list[Values], gold: Gold, options: FeatureEvaluation, model: str, seconds: float) -> list[Row]:
    """Every figure of one line, with 95 % of bootstrap resamples over products."""
    command = f"python evaluate_features.py {options.what} FOLDER --text {options.text} --reader {options.reader}"
    now = commit()

    def row(metric: str, part: str, value: float, low: float, high: float, n: int) -> Row:
        return Row(
            options.what, model, options.text, metric, part, float(value), float(low), float(high), n, now, command
        )

    draws = np.random.default_rng(options.seed).integers(0, len(said), size=(BOOTSTRAPS, len(said)))
    rows = []
    for name, table in counts(said, gold).items():
        values, resampled = measures(table.sum(0)), measures(table[draws].sum(1))
        judged = int((table.sum(1) > 0).sum())
        for metric, value in values.items():
            low, high = np.quantile(resampled[metric], [0.025, 0.975])
            rows.append(row(metric, name, float(value), low, high, judged))
    a_product = seconds / len(said)
    rows.append(row("seconds", MICRO, a_product, a_product, a_product, len(said)))
    return rows


def main(options: FeatureEvaluation) -> None:
    if not options.folder.is_dir():
        raise UserError(f"{options.folder} is not a folder; give the one that holds the data set's files")
    gold = myntra(options)
    with Store.open(options) as store:  # the readers' answers are cached there
        lines: dict[str, Line] = {
            "most frequent value": lambda raw: gold.most_frequent,
            "lexicon": by_reader(LexiconReader(Lexicon.load(options.lexicon)), gold.schema),
            "nearest in meaning": by_meaning(TextEncoder.load(options), gold.schema),
        }
        if options.reader != LexiconReader.name:
            reader = make_reader(options, store.cache)
            model = reader.model if isinstance(reader, EndpointReader) else reader.name
            lines[f"{model} + lexicon"] = by_reader(reader, gold.schema)
        rows = []
        for model, read in lines.items():
            read(gold.raws[0])  # whatever is prepared once is not a product's time
            started = time.perf_counter()
            said = [read(raw) for raw in tqdm(gold.raws, desc=model, unit="product", leave=False)]
            rows += rows_of(said, gold, options, model, time.perf_counter() - started)
    for row in rows:
        if row.metric == "f1" or row.slice == MICRO:
            print(
                f"{row.model:34s} {row.metric:10s} {row.slice:14s} {row.value:.3f} [{row.low:.3f}, {row.high:.3f}] {row.n}"
            )
    if options.write:
        save(rows)


if __name__ == "__main__":
    run_script(FeatureEvaluation, main)
