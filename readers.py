"""Who reads the words of a product, and what every reader by model has in common.

A reader fills the fields that the seller left open. `LexiconReader` looks words up. The readers by model (endpoint_reader.py,
embedded_reader.py) ask only for what neither the lexicon nor the shop's other products (neighbours.py) say, and about open fields
only where a word of the text is left that nothing has read, since an open value must stand in the text. Answers are checked and
cached by what was asked; of every value is kept who said it, by which words, and how sure.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field, SecretStr

from catalog import FeatureSchema, RawProduct, Rejected
from embedded_llm import EmbeddedSettings
from lexicon import LEXICON, WORD_FIELD, Lexicon, fold, plain_text, says
from neighbours import Neighbours
from store.cache import Cache
from vocab import normalise

log = logging.getLogger(__name__)

PROMPT_VERSION = "3"  # part of the cache key: raise it with any change to a prompt
CACHE_KIND = "extract"
MAX_OPEN_VALUES = 12  # of one open field in a model's answer
MAX_OPEN_LENGTH = 60  # characters; a longer "value" is a sentence
AGREEMENT = 0.8  # share of the votes that settles a closed field: right 19 times of 20, and a small model is not right more often

UNSAID = frozenset({"", "none", "null", "n a", "na", "unknown", "unspecified", "not specified", "not mentioned"})


class ReaderSettings(EmbeddedSettings):
    """Which reader fills what the seller left open, and how to reach a model."""

    reader: Literal["seller", "lexicon", "endpoint", "embedded"] = Field(
        "lexicon", description="who reads titles and descriptions; seller: nobody, attributes alone count"
    )
    lexicon: Path = Field(LEXICON, description="the words of the shop's features")
    extract_url: str = Field("", description="OpenAI-compatible endpoint, such as http://127.0.0.1:8080/v1")
    extract_model: str = Field("", description="model name as that endpoint knows it")
    extract_key: SecretStr = Field(SecretStr(""), description="API key, if the endpoint wants one")
    extract_timeout: float = Field(120.0, gt=0, description="seconds one request may take")
    extract_retries: int = Field(4, ge=0, description="new tries after a lost connection, 429 or 5xx, with back-off")
    extract_concurrency: int = Field(4, ge=1, le=256, description="requests to the endpoint at one time")
    extract_examples: int = Field(
        3, ge=0, le=20, description="nearest products with seller's values, shown to the model with each question"
    )
    extract_confidence: float = Field(
        0.0, ge=0, le=1, description="a model's value of a closed field that it is less sure of is left out"
    )
    extract_price_in: float = Field(0.0, ge=0, description="money a million prompt tokens")
    extract_price_out: float = Field(0.0, ge=0, description="money a million answer tokens")


# --- what a reader says -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evidence:
    """A value, who says so, and how sure. The seller, the lexicon and the catalogue (what other products' sellers call by
    this word) go by what is written: 1.0; a model by its own probability, None if its endpoint does not tell.
    `words`: those of the text that say it, empty if none do."""

    value: str
    source: Literal["seller", "lexicon", "catalogue", "model"]
    confidence: float | None = 1.0
    words: str = ""


@dataclass
class Reading:
    """What a reader found in one product's words: field -> values, and what had to be refused."""

    found: dict[str, list[Evidence]]
    rejected: list[Rejected] = field(default_factory=list)


@dataclass
class Usage:
    """What the questions cost so far."""

    asked: int = 0  # of a model, repairs included
    cached: int = 0  # answered from the cache
    prompt_tokens: int = 0
    answer_tokens: int = 0

    def cost(self, settings: ReaderSettings) -> float:
        return (
            self.prompt_tokens * settings.extract_price_in + self.answer_tokens * settings.extract_price_out
        ) / 1_000_000


Known = Mapping[str, list[str]]  # field -> values that the seller gave
Answer = dict[str, Any]  # a model's, as it is cached; {"error", "answer"} if it failed the check


class Reader(Protocol):
    """Reads products' words. `identity` names everything that decides the outcome: kind, model, prompt, lexicon."""

    name: str
    identity: str
    lexicon: Lexicon
    usage: Usage
    answers: dict[str, Answer]  # of a model, that were used so far, by cache key
    batch: int  # products to hand over at a time: written together, and a step of the progress bar

    def learn(self, products: Iterable[tuple[RawProduct, Known]]) -> None:
        """Take in the shop's products with their sellers' values, as examples of how this shop fills its fields."""
        ...

    def read(self, raws: Sequence[RawProduct], known: Sequence[Known], schema: FeatureSchema) -> list[Reading]:
        """One reading a product, of the fields not `known`. Raises UserError if the reader cannot work at all."""
        ...

    def estimate(self, raws: Sequence[RawProduct], known: Sequence[Known], schema: FeatureSchema) -> Usage:
        """What `read` would ask, without asking; tokens by the length of the texts."""
        ...


class SellerReader:
    """Reads nothing: what sellers typed into attributes is all there is. The measure of what reading is worth."""

    name = "seller"
    batch = 500

    def __init__(self, lexicon: Lexicon) -> None:
        self.lexicon = lexicon  # of what sellers call fields and values
        self.identity = f"{self.name}/{lexicon.digest}"
        self.usage = Usage()
        self.answers: dict[str, Answer] = {}

    def learn(self, products: Iterable[tuple[RawProduct, Known]]) -> None:
        """There is nothing to learn for."""

    def read(self, raws: Sequence[RawProduct], known: Sequence[Known], schema: FeatureSchema) -> list[Reading]:
        return [Reading({}) for _ in raws]

    def estimate(self, raws: Sequence[RawProduct], known: Sequence[Known], schema: FeatureSchema) -> Usage:
        return Usage()


class LexiconReader:
    """Finds the lexicon's words in title and description. Thousands of products a second, nothing leaves the machine."""

    name = "lexicon"
    batch = 500

    def __init__(self, lexicon: Lexicon) -> None:
        self.lexicon = lexicon
        self.identity = f"{self.name}/{lexicon.digest}"
        self.usage = Usage()
        self.answers: dict[str, Answer] = {}

    def learn(self, products: Iterable[tuple[RawProduct, Known]]) -> None:
        """A lexicon learns from its editor only."""

    def read(self, raws: Sequence[RawProduct], known: Sequence[Known], schema: FeatureSchema) -> list[Reading]:
        bound = self.lexicon.bind(schema)
        readings = []
        for raw, given in zip(raws, known, strict=True):
            wanted = [name for name in [*schema.std, *schema.re] if name not in given]
            said = bound.read(raw.title, raw.description, wanted)
            readings.append(
                Reading({name: [Evidence(one.value, "lexicon", 1.0, one.words) for one in said[name]] for name in said})
            )
        return readings

    def estimate(self, raws: Sequence[RawProduct], known: Sequence[Known], schema: FeatureSchema) -> Usage:
        return Usage()


# --- readers by model -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """What a model is asked about one product."""

    raw: RawProduct
    known: dict[str, list[str]]  # the seller's values and the lexicon's
    closed: list[str]  # fields that take one of the schema's values
    open: list[str]  # fields that take words of the text
    unread: frozenset[str]  # words that nothing has read

    @property
    def names(self) -> list[str]:
        return [*self.closed, *self.open]


class ModelReader:
    """The lexicon first, then what the catalogue's other products leave no doubt about, then a model for the rest.

    Subclasses say how to ask it and how to understand its answer.
    """

    name: str
    batch = 100
    description_length = 4_000  # characters of a description that a prompt takes in
    knows_words = True  # whether it is asked which allowed value a seller's own word means ("eggshell": ivory)

    def __init__(self, lexicon: Lexicon, settings: ReaderSettings, cache: Cache, model: str) -> None:
        self.lexicon = lexicon
        self.model = model
        self.usage = Usage()
        self.answers: dict[str, Answer] = {}
        self.settings = settings
        self.identity = f"{self.name}/{PROMPT_VERSION}/{model}/{settings.extract_confidence}/{lexicon.digest}"
        self._cache = cache
        self.neighbours = Neighbours(())

    def learn(self, products: Iterable[tuple[RawProduct, Known]]) -> None:
        self.neighbours = Neighbours(products)

    def read(self, raws: Sequence[RawProduct], known: Sequence[Known], schema: FeatureSchema) -> list[Reading]:
        readings = LexiconReader(self.lexicon).read(raws, known, schema)
        questions = self._questions(raws, known, readings, schema)
        keys = [self._cache_key(question, schema) for question in questions]
        answers = self._cached(questions, keys)
        self.usage.cached += sum(key in answers for key in keys)
        due = {
            key: question
            for key, question in zip(keys, questions, strict=True)
            if question.names and key not in answers
        }
        answers |= self._ask_all(due, schema)
        for question, key, reading in zip(questions, keys, readings, strict=True):
            if question.names:
                self._take(question, answers[key], reading, schema)
        self.answers |= answers
        return readings

    def estimate(self, raws: Sequence[RawProduct], known: Sequence[Known], schema: FeatureSchema) -> Usage:
        questions = self._questions(raws, known, LexiconReader(self.lexicon).read(raws, known, schema), schema)
        keys = [self._cache_key(question, schema) for question in questions]
        answers = self._cached(questions, keys)
        usage = Usage(cached=sum(key in answers for key in keys))
        for key, question in dict(zip(keys, questions, strict=True)).items():
            if question.names and key not in answers:
                usage.asked += 1
                usage.prompt_tokens += _tokens(self._prompt_text(question, schema))
                usage.answer_tokens += 8 * len(question.names)  # a name and a value or two
        return usage

    def _questions(
        self, raws: Sequence[RawProduct], known: Sequence[Known], readings: Sequence[Reading], schema: FeatureSchema
    ) -> list[Question]:
        questions = []
        for raw, given, reading in zip(raws, known, readings, strict=True):
            unread = self._by_catalogue(raw, given, reading, schema)
            # Without the neighbours' votes: they change with every product that comes, and what is asked should not.
            said = {
                name: [one.value for one in found]
                for name, found in reading.found.items()
                if name != WORD_FIELD and (name in schema.re or found[0].source == "lexicon")
            }
            closed = [name for name in schema.std if name not in given and name not in reading.found]
            if not self.knows_words:
                closed = [name for name in closed if not self._is_strange(raw, name, schema)]
            open_names = [name for name in schema.re if name not in given and name != WORD_FIELD]
            # An open value must stand in the text, and what stands there is read already unless words are left.
            questions.append(Question(raw, {**given, **said}, closed, open_names if unread else [], unread))
        return questions

    def _by_catalogue(self, raw: RawProduct, given: Known, reading: Reading, schema: FeatureSchema) -> frozenset[str]:
        """Add what the shop's other products say for certain, and return the words of the text that are left unread."""
        unread = set(self.lexicon.bind(schema).unread(raw.title, raw.description))
        text = _text(raw)
        # The longest first: where "biblical sandals" stands, "sandals" is read with it.
        typed = sorted(self.neighbours.words(unread, schema.re), key=lambda pair: (-len(pair[1]), pair))
        for name, value in typed:
            if unread.isdisjoint(value.split()) or not says(text, value):
                continue
            unread -= set(value.split())
            found = reading.found.get(name, [])
            if name not in given and all(one.value != value for one in found):
                reading.found[name] = [*found, Evidence(value, "catalogue", 1.0, value)]
        for name in schema.std:
            if name not in given and name not in reading.found:
                votes = self._votes(raw, name, schema)
                best = max(votes, key=lambda value: votes[value], default=None)
                if best is not None and votes[best] >= AGREEMENT:
                    reading.found[name] = [Evidence(best, "catalogue", round(votes[best], 4))]
        return frozenset(unread)

    def _votes(self, raw: RawProduct, name: str, schema: FeatureSchema) -> dict[str, float]:
        """The neighbours' votes on a closed field that is not known yet."""
        if self._is_strange(raw, name, schema):
            return {}
        return {value: share for value, share in self.neighbours.votes(raw, name).items() if value in schema.std[name]}

    def _is_strange(self, raw: RawProduct, name: str, schema: FeatureSchema) -> bool:
        """Whether the seller wrote something into a field that is not known yet: it is no value of the field, and only who can
        read it knows what was meant."""
        bound = self.lexicon.bind(schema)
        return any(bound.field_of(attribute) == name for attribute in raw.attributes)

    def _cached(self, questions: Sequence[Question], keys: Sequence[str]) -> dict[str, Answer]:
        wanted = [key for key, question in zip(keys, questions, strict=True) if question.names]
        return self._cache.get_many(CACHE_KIND, wanted)

    def _cache_key(self, question: Question, schema: FeatureSchema) -> str:
        """Of what is asked. Which examples are shown beside it does not count: they change with every new product."""
        return digest(
            PROMPT_VERSION, self.name, self.model, str(self.settings.extract_examples),
            self._system_prompt(schema), self._product_prompt(question),
        )  # fmt: skip

    def _take(self, question: Question, answer: Answer, reading: Reading, schema: FeatureSchema) -> None:
        """Put an answer's values into the lexicon's reading, or what is wrong with it into its rejected rows."""
        raw = question.raw
        if "error" in answer:
            reading.rejected.append(self._rejected(raw, "the model's answer failed the check", answer))
            return
        for name, evidence in self._understand(question, answer, schema).items():
            if name in schema.std:
                sure = [
                    one
                    for one in evidence
                    if one.confidence is None or one.confidence >= self.settings.extract_confidence
                ]
                if sure:
                    reading.found[name] = sure
                continue
            for one in evidence:
                self._take_open(question, name, one, reading, schema)

    def _take_open(
        self, question: Question, name: str, said: Evidence, reading: Reading, schema: FeatureSchema
    ) -> None:
        """An open value counts if the product's text holds its words, one of which nothing else has read."""
        text = _text(question.raw)
        for value in self.lexicon.bind(schema).open_values(name, said.value):
            found = reading.found.setdefault(name, [])
            if any(one.value == value for one in found):
                continue
            if not says(text, said.value):
                row = {"field": name, "value": said.value}
                reading.rejected.append(self._rejected(question.raw, f"{name}: the text does not say this", row))
            elif any(letter.isdigit() for letter in value) or any(
                says(normalise(value), word) for word in question.unread
            ):
                found.append(Evidence(value, "model", said.confidence, said.value))
        if not reading.found.get(name):
            reading.found.pop(name, None)

    def _rejected(self, raw: RawProduct, reason: str, row: Mapping[str, Any]) -> Rejected:
        content = json.dumps({"product_id": raw.product_id, "model": self.model, **row}, ensure_ascii=False)
        return Rejected(file=raw.product_id, line=0, reason=reason, raw=content)

    def _product(self, raw: RawProduct) -> dict[str, Any]:
        """A product as a prompt shows it."""
        shown: dict[str, Any] = {"title": plain_text(raw.title).strip()}
        description = " ".join(plain_text(raw.description).split())[: self.description_length]
        if description:
            shown["description"] = description
        if raw.attributes:
            shown["seller says"] = {name: ", ".join(values) for name, values in raw.attributes.items()}
        if raw.price is not None:
            shown["price"] = raw.price
        return shown

    def _prompt_text(self, question: Question, schema: FeatureSchema) -> str:
        """All that a question sends, for an estimate."""
        examples = self.neighbours.examples(question.raw, question.names, self.settings.extract_examples)
        return " ".join([self._system_prompt(schema), self._product_prompt(question), *map(str, examples)])

    # What a subclass says:

    def _system_prompt(self, schema: FeatureSchema) -> str:
        """The same for every product of a shop, so that a model can keep it in its prompt cache."""
        raise NotImplementedError

    def _product_prompt(self, question: Question) -> str:
        raise NotImplementedError

    def _answer(self, key: str, question: Question, schema: FeatureSchema) -> Answer:
        """Asks, and keeps the answer before its thread asks anything else: an answer costs seconds or money, a row neither."""
        answer = self._ask(question, schema)
        self._cache.put_many(CACHE_KIND, {key: answer})
        return answer

    def _ask(self, question: Question, schema: FeatureSchema) -> Answer:
        raise NotImplementedError

    def _ask_all(self, due: Mapping[str, Question], schema: FeatureSchema) -> dict[str, Answer]:
        """`_answer` of each, by cache key. Raises UserError when the model cannot be asked; what it answered is kept."""
        raise NotImplementedError

    def _understand(self, question: Question, answer: Answer, schema: FeatureSchema) -> dict[str, list[Evidence]]:
        raise NotImplementedError


def open_values(values: list[str]) -> list[str]:
    kept = [value for value in values if normalise(value) not in UNSAID and len(value) <= MAX_OPEN_LENGTH]
    if any("\x00" in value for value in kept):
        raise ValueError("a value holds a NUL byte")
    return kept[:MAX_OPEN_VALUES]


def digest(*parts: str) -> str:
    return hashlib.blake2b("\x1f".join(parts).encode(), digest_size=16).hexdigest()


def _text(raw: RawProduct) -> str:
    """All words of a product, as `lexicon.says` wants them."""
    attributes = [word for name, values in raw.attributes.items() for word in (name, *values)]
    return normalise(fold(" ".join([plain_text(raw.title), plain_text(raw.description), *attributes])))


def _tokens(text: str) -> int:
    """About how many tokens a text is: four Latin letters are one, and so are one and a half Korean syllables."""
    latin = sum(letter.isascii() for letter in text)
    return math.ceil(latin / 4 + (len(text) - latin) / 1.5)
