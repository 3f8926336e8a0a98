"""Stage 0: raw products (title, HTML or plain text, seller's attributes) to structured, schema-checked `Product`s.

What the seller typed into attributes counts first; a reader (readers.py) then fills the fields that are still missing from the
words of the product. Whatever it says, a closed field takes allowed values only, and for each value is kept who said it, by which
words, and how sure.

    python extract_features.py --reader endpoint --extract-url http://127.0.0.1:8080/v1 --extract-model qwen2.5
    python extract_features.py --reader embedded            # after `make llm`
    python extract_features.py --reader endpoint --dry-run  # how many questions, tokens and how much money, without asking

The answers of a model can be made on one machine and used on another: `--save-answers FILE` there, `--answers FILE` here. Those
of the sample shop are in datasets/sample_shop_answers.jsonl.gz, made after `python import_data.py sample` by

    python extract_features.py --reader embedded --extract-examples 0 --save-answers datasets/sample_shop_answers.jsonl.gz
"""

from __future__ import annotations

import gzip
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TextIO

import orjson
from pydantic import Field
from tqdm import tqdm

from catalog import FeatureSchema, Product, RawProduct, Rejected
from lexicon import BoundLexicon, Lexicon
from readers import (
    CACHE_KIND,
    Answer,
    Evidence,
    LexiconReader,
    Reader,
    ReaderSettings,
    SellerReader,
    Usage,
    digest,
)
from settings import UserError, run_script
from store import Standing, Store
from store.cache import Cache

PLAIN_READERS: dict[str, type[SellerReader] | type[LexiconReader]] = {
    reader.name: reader for reader in (SellerReader, LexiconReader)
}
MODEL_READERS = ("endpoint", "embedded")


def make_reader(settings: ReaderSettings, cache: Cache) -> Reader:
    """The reader that the settings name. Raises UserError on a bad lexicon, or an endpoint that is not named."""
    lexicon = Lexicon.load(settings.lexicon)
    if settings.reader in PLAIN_READERS:
        return PLAIN_READERS[settings.reader](lexicon)
    # Imported here, because a server reads by the lexicon alone, and their clients take a second.
    from embedded_reader import EmbeddedReader
    from endpoint_reader import EndpointReader

    by_model: type[EndpointReader] | type[EmbeddedReader] = (
        EndpointReader if settings.reader == EndpointReader.name else EmbeddedReader
    )
    return by_model(lexicon, settings, cache)


class ExtractOptions(ReaderSettings):
    """Read the features of the shop's products. By default of those that are new or changed since the last run, or
    whose reader, lexicon or schema changed; features that came with an import stay as they are."""

    limit: int | None = Field(None, ge=1, description="read at most this many products")
    only_new: bool = Field(False, description="only products that have no features yet")
    all: bool = Field(False, description="every product, read before or not")
    answers: Path | None = Field(
        None, description="a model's answers from another run (--save-answers), put into the cache first"
    )
    save_answers: Path | None = Field(
        None, description="write every answer of the model that this run used to this file (.jsonl, .jsonl.gz)"
    )
    dry_run: bool = Field(False, description="say what it would ask and cost, and do nothing")


@dataclass(frozen=True)
class Extraction:
    product: Product
    evidence: dict[str, list[Evidence]]  # of every value of the product, in the same order
    rejected: list[Rejected]


# --- from raw to structured -------------------------------------------------------------------------------------------


def extract(raw: RawProduct, schema: FeatureSchema, reader: Reader) -> Extraction:
    """The structured form of one product; values that the schema does not allow are in `rejected`."""
    return extract_many([raw], schema, reader)[0]


def extract_many(raws: Sequence[RawProduct], schema: FeatureSchema, reader: Reader) -> list[Extraction]:
    """`extract` of each, in order. Raises UserError if the reader cannot work at all (endpoint down)."""
    bound = reader.lexicon.bind(schema)
    sellers = [_read_attributes(raw, bound) for raw in raws]
    readings = reader.read(raws, [values for values, _ in sellers], schema)
    allowed = {name: frozenset(values) for name, values in schema.std.items()}
    extractions = []
    for raw, (seller, strangers), reading in zip(raws, sellers, readings, strict=True):
        found = reading.found | {name: [Evidence(value, "seller") for value in seller[name]] for name in seller}
        # The last gate before the store, whichever reader spoke.
        evidence = {
            name: kept
            for name in [*schema.std, *schema.re]
            if (kept := [one for one in found.get(name, ()) if name not in allowed or one.value in allowed[name]])
        }
        values = {name: [one.value for one in said] for name, said in evidence.items()}
        product = Product(
            product_id=raw.product_id,
            title=raw.title,
            std={name: values[name] for name in schema.std if name in values},
            re={name: values[name] for name in schema.re if name in values},
        )
        extractions.append(Extraction(product, evidence, strangers + reading.rejected))
    return extractions


def seller_values(raws: Iterable[RawProduct], bound: BoundLexicon) -> Iterator[tuple[RawProduct, dict[str, list[str]]]]:
    """Each product with what its seller's attributes say in the schema's fields."""
    for raw in raws:
        yield raw, _read_attributes(raw, bound)[0]


def _read_attributes(raw: RawProduct, bound: BoundLexicon) -> tuple[dict[str, list[str]], list[Rejected]]:
    """What the seller's attributes say, and what had to be refused. Names that mean no field of the schema are left alone."""
    found: dict[str, list[str]] = {}
    rejected: list[Rejected] = []
    for attribute, written in raw.attributes.items():
        name = bound.field_of(attribute)
        if name is None:
            continue
        said: list[str] = []
        for value in written:
            if name in bound.schema.std:
                allowed, strangers = bound.closed_values(name, value)
                said += allowed
                rejected += [_stranger(raw, name, stranger) for stranger in strangers]
            else:
                said += bound.open_values(name, value)
        if said:
            found[name] = list(dict.fromkeys([*found.get(name, ()), *said]))
    return found, rejected


def _stranger(raw: RawProduct, name: str, value: str) -> Rejected:
    row = json.dumps({"product_id": raw.product_id, "field": name, "value": value}, ensure_ascii=False)
    return Rejected(file=raw.product_id, line=0, reason=f"{name}: the schema does not allow this value", raw=row)


# --- the whole shop ---------------------------------------------------------------------------------------------------


@dataclass
class Summary:
    read: int = 0
    skipped: int = 0
    covered: Counter[str] = field(default_factory=Counter)  # field -> products that have a value
    sources: Counter[str] = field(default_factory=Counter)  # who said it -> values
    rejected: Counter[str] = field(default_factory=Counter)  # reason -> values or answers

    def lines(self, fields: Iterable[str]) -> list[str]:
        """A report for people."""
        if not self.read:
            return [f"products read: 0, unchanged: {self.skipped:,}"]
        return [
            f"products read: {self.read:,}, unchanged: {self.skipped:,}",
            *(f"  {name:<20} {self.covered[name] / self.read:6.1%}" for name in fields),
            f"values: {self.sources.total():,}",
            *(f"  {count:,} by the {source}" for source, count in self.sources.most_common()),
            f"quarantined: {self.rejected.total():,}",
            *(f"  {count:,} x {reason}" for reason, count in self.rejected.most_common()),
        ]


def usage_line(usage: Usage, options: ReaderSettings) -> str:
    """What a model was asked, for people."""
    money = f", cost {usage.cost(options):,.2f}" if options.extract_price_in or options.extract_price_out else ""
    tokens = f", {usage.prompt_tokens:,} + {usage.answer_tokens:,} tokens" if usage.prompt_tokens else ""
    return f"questions to the model: {usage.asked:,}, answered from the cache: {usage.cached:,}{tokens}{money}"


def fingerprints(raws: Iterable[RawProduct], schema: FeatureSchema, reader: Reader) -> list[str]:
    """What the features of each product depend on, as one `origin`: equal fingerprints mean equal features."""
    common = digest(schema.model_dump_json(), reader.identity)

    def attributes(raw: RawProduct) -> str:
        """In the order in which PostgreSQL keeps the names of a JSON object, so that a product has one mark wherever it is read."""
        ordered = sorted(raw.attributes, key=lambda name: (len(name.encode()), name.encode()))
        return orjson.dumps({name: raw.attributes[name] for name in ordered}).decode()

    return [f"{reader.name}:{digest(common, raw.title, raw.description, attributes(raw))}" for raw in raws]


def is_changed(standing: Standing | None, raw: RawProduct, fingerprint: str) -> bool:
    """Whether a product that is given must be read again. What somebody else read, an importer or a model, stays until the text
    changes; a price is no text."""
    if standing is None or standing.origin is None or standing.text != (raw.title, raw.description, raw.attributes):
        return True
    ours = standing.origin.partition(":")[0] == fingerprint.partition(":")[0]
    return ours and standing.origin != fingerprint


def extract_all(store: Store, reader: Reader, options: ExtractOptions) -> Summary:
    """Read the shop's products as `options` say, batch by batch: what is written stays if the run stops."""
    schema = store.schema()
    summary = Summary()
    total = store.products.count()
    with tqdm(total=min(total, options.limit or total), desc="extract", unit="product", disable=None) as progress:
        for raws, marks, skipped in _due(store, reader, options, schema):
            summary.skipped += skipped
            extractions = extract_many(raws, schema, reader)
            # Quarantine first: once its fingerprint is written a product is not looked at again.
            rejected = [row for extraction in extractions for row in extraction.rejected]
            store.quarantine.add(f"extract/{reader.name}", rejected)
            store.products.put_features(
                [extraction.product for extraction in extractions],
                marks,
                [orjson.dumps(extraction.evidence).decode() for extraction in extractions],
            )
            summary.read += len(raws)
            summary.rejected.update(row.reason for row in rejected)
            for extraction in extractions:
                summary.covered.update(list(extraction.evidence))
                summary.sources.update(one.source for said in extraction.evidence.values() for one in said)
            progress.update(len(raws) + (skipped if options.limit is None else 0))
            if reader.usage.asked:
                progress.set_postfix_str(usage_line(reader.usage, options))
    return summary


def estimate_all(store: Store, reader: Reader, options: ExtractOptions) -> Usage:
    """What `extract_all` would ask."""
    schema = store.schema()
    usage = Usage()
    for raws, _, _ in _due(store, reader, options, schema):
        known = [values for _, values in seller_values(raws, reader.lexicon.bind(schema))]
        found = reader.estimate(raws, known, schema)
        for name in vars(usage):
            setattr(usage, name, getattr(usage, name) + getattr(found, name))
    return usage


def load_answers(path: Path, cache: Cache) -> int:
    """Put a file's answers into the cache; how many. Raises UserError, with the line, if it is no such file."""
    count = 0
    try:
        with _opened(path, "rt") as file:
            for line in file:
                count += 1
                row = orjson.loads(line)
                cache.put_many(CACHE_KIND, {row["key"]: dict(row["value"])})
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; --answers names a file of answers") from error
    except (ValueError, KeyError, TypeError, EOFError) as error:
        raise UserError(
            f"{path}: line {count} is no answer with its key ({error}); write it with --save-answers"
        ) from error
    return count


def save_answers(path: Path, answers: Mapping[str, Answer]) -> None:
    """The same answers give the same file, byte for byte."""
    with _opened(path, "wt") as file:
        for key in sorted(answers):
            file.write(orjson.dumps({"key": key, "value": answers[key]}).decode() + "\n")


def _opened(path: Path, mode: Literal["rt", "wt"]) -> TextIO:
    if path.suffix != ".gz":
        return path.open(mode, encoding="utf-8")
    binary = gzip.GzipFile(path, mode[0] + "b", mtime=0)  # no time of writing in the file
    return io.TextIOWrapper(binary, encoding="utf-8")


def _due(
    store: Store, reader: Reader, options: ExtractOptions, schema: FeatureSchema
) -> Iterator[tuple[list[RawProduct], list[str], int]]:
    """The products to read, batch by batch: raw, fingerprint, and how many of the batch are left as they are."""
    if options.only_new and options.all:
        raise UserError("--only-new and --all exclude each other; give one of them, or none to read what changed")
    bound = reader.lexicon.bind(schema)
    if reader.name in MODEL_READERS:
        reader.learn(seller_values((raw for raws in store.products.iter_raw() for raw in raws), bound))
    origins = store.products.origins()
    left = options.limit
    for raws in store.products.iter_raw(reader.batch):
        marks = fingerprints(raws, schema, reader)
        due = [
            (raw, mark)
            for raw, mark in zip(raws, marks, strict=True)
            if options.all or _is_due(origins.get(raw.product_id), mark, options.only_new)
        ]
        skipped = len(raws) - len(due)
        due = due[:left]
        yield [raw for raw, _ in due], [mark for _, mark in due], skipped
        if left is not None:
            left -= len(due)
            if left == 0:
                return


def _is_due(origin: str | None, fingerprint: str, only_new: bool) -> bool:
    """`origin` None: never read. An origin that no reader wrote: the features came with an import and are kept."""
    if origin is None or only_new:
        return origin is None
    return origin != fingerprint and origin.partition(":")[0] in (*PLAIN_READERS, *MODEL_READERS)


def main(options: ExtractOptions) -> None:
    with Store.open(options) as store:
        reader = make_reader(options, store.cache)
        if options.answers is not None:
            print(f"answers taken from {options.answers}: {load_answers(options.answers, store.cache):,}")
        if options.dry_run:
            print("would ask " + usage_line(estimate_all(store, reader, options), options))
            return
        summary = extract_all(store, reader, options)
        schema = store.schema()
    if options.save_answers is not None:
        save_answers(options.save_answers, reader.answers)
    print("\n".join(summary.lines([*schema.std, *schema.re])))
    if reader.name in MODEL_READERS:
        print(usage_line(reader.usage, options))


if __name__ == "__main__":
    run_script(ExtractOptions, main)
