"""What a person should see of a release beside its figures: how it learned, where its items lie, and lists that it really made.

`evaluate.py` saves these while a release is at hand; the page is drawn from the saved files alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from catalog import Product

CURVES = Path("docs/curves.json")
MAPS = Path("docs/maps")
EXAMPLES = Path("docs/examples")

PARTS = {"item_tower": "item tower", "user_tower": "user tower", "reranker": "reranker"}
MAPPED = 1500  # items drawn at most
DRAWN_FROM = 200  # requests among which the examples are sought
EACH = 5  # of the best, and of the worst
SHOWN = 10  # items of a history or a list
TITLE = 40  # characters shown of a title that is somebody else's
SEED = 0  # of what is drawn

Curve = dict[str, Any]


@dataclass(frozen=True)
class Shown:
    """One request of the test: product ids of the history (the latest first), of what was taken, and of the answer."""

    context: str
    history: Sequence[str]
    targets: Sequence[str]
    ranked: Sequence[str]


@dataclass(frozen=True)
class Example:
    """A request in words, and how good its answer is."""

    ndcg: float
    context: str
    history: list[str]  # the latest first
    history_length: int
    recommended: list[str]
    taken_places: list[int]  # of the recommended, from 1
    taken: list[str]
    places: list[int | None]  # of what was taken, from 1; None where the list does not hold it


# ---------------------------------------------------------------------------------------------------------------- curves
def learning_curves(manifest: dict[str, Any], parts: Iterable[str] = PARTS) -> list[Curve]:
    """Of each part of a release that learned: loss and validation metric by epoch, 0 being what it started from."""
    curves = []
    for part in parts:
        report = manifest[part].get("report")
        if report is None:
            continue
        points = [[int(row["epoch"]), row.get("loss"), row[report["metric"]]] for row in report["history"]]
        curves.append({"part": part, "metric": report["metric"], "best_epoch": report["best_epoch"], "points": points})
    return curves


def save_curves(splits: Sequence[str], model: str, curves: Sequence[Curve]) -> None:
    """Replace the model's curves on these splits in docs/curves.json."""
    kept = [curve for curve in read_curves() if curve["split"] not in splits or curve["model"] != model]
    kept += [{"split": split, "model": model, **curve} for split in splits for curve in curves]
    kept.sort(key=lambda curve: (curve["split"], curve["model"], list(PARTS).index(curve["part"])))
    _write(CURVES, "[\n" + ",\n".join(json.dumps(curve) for curve in kept) + "\n]")


def read_curves() -> list[Curve]:
    return json.loads(CURVES.read_text(encoding="utf-8")) if CURVES.exists() else []


# ------------------------------------------------------------------------------------------------------------------- map
def item_map(vectors: np.ndarray, products: Sequence[Product]) -> dict[str, Any]:
    """The first two principal components of item vectors [N, D], for at most MAPPED items drawn at random.

    "shares" of the variance of all items that each component has; "points" of x, y and the item's category.
    """
    centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    variances, directions = np.linalg.eigh(centred.T @ centred)  # ascending
    axes = directions[:, [-1, -2]]
    # Of either sign an axis is the same; one of them is kept, so that a map drawn again looks as before.
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), [0, 1]])
    rows = np.sort(np.random.default_rng(SEED).permutation(len(products))[:MAPPED])
    places = (centred[rows] @ axes).round(4).tolist()
    return {
        "items": len(products),
        "shares": (variances[[-1, -2]] / max(variances.sum(), 1e-12)).round(4).tolist(),
        "points": [[x, y, category_of(products[row])] for (x, y), row in zip(places, rows.tolist(), strict=True)],
    }


def category_of(product: Product) -> str:
    """Its category; of a shop without that field, its first value in the first field that it has."""
    values = product.std.get("category") or next((values for values in product.std.values() if values), [])
    return values[0] if values else ""


def save_map(split: str, model: str, found: dict[str, Any]) -> None:
    points = ",\n".join(json.dumps(point, ensure_ascii=False) for point in found["points"])
    head = json.dumps({"model": model, "items": found["items"], "shares": found["shares"]})
    _write(MAPS / f"{split}.json", f'{head[:-1]}, "points": [\n{points}\n]}}')


def read_maps() -> dict[str, dict[str, Any]]:
    """By split."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(MAPS.glob("*.json"))}


# -------------------------------------------------------------------------------------------------------------- examples
def examples(
    requests: Sequence[Shown], products: Sequence[Product], short: int, whole_titles: bool
) -> dict[str, list[Example]]:
    """Of DRAWN_FROM requests drawn at random the best and the worst by NDCG@short; of equals, those drawn first.

    whole_titles: show them as they are. Those of other people's data sets are cut to a few words.
    """
    product_of = {product.product_id: product for product in products}
    drawn = [requests[row] for row in np.random.default_rng(SEED).permutation(len(requests))[:DRAWN_FROM]]
    scores = [_ndcg(request, short) for request in drawn]
    order = sorted(range(len(drawn)), key=lambda place: -scores[place])
    worst_first = sorted(range(len(drawn)), key=lambda place: scores[place])

    def told(product_id: str) -> str:
        return described(product_of[product_id], whole_titles) if product_id in product_of else "(not in the catalogue)"

    def example(place: int) -> Example:
        request = drawn[place]
        place_of = {product_id: rank for rank, product_id in enumerate(request.ranked, start=1)}
        places = [place_of.get(product_id) for product_id in request.targets]
        return Example(
            ndcg=round(scores[place], 4),
            context=request.context,
            history=[told(product_id) for product_id in request.history[:SHOWN]],
            history_length=len(request.history),
            recommended=[told(product_id) for product_id in request.ranked[:SHOWN]],
            taken_places=sorted(rank for rank in places if rank is not None and rank <= SHOWN),
            taken=[told(product_id) for product_id in request.targets[:SHOWN]],
            places=places[:SHOWN],
        )

    half = min(EACH, len(drawn) // 2)
    return {
        "best": [example(place) for place in order[:half]],
        "worst": [example(place) for place in worst_first[:half]],
    }


def _ndcg(request: Shown, count: int) -> float:
    """NDCG@count as in metrics.py, of one list."""
    discount = 1.0 / np.log2(np.arange(count) + 2)
    found = np.array([product_id in set(request.targets) for product_id in request.ranked[:count]], dtype=bool)
    return float(discount[: len(found)][found].sum() / discount[: len(request.targets)].sum())


def described(product: Product, whole_title: bool) -> str:
    """A product in a few words: title, and what it is and looks like unless the title says so."""
    title = product.title if whole_title or len(product.title) <= TITLE else product.title[: TITLE - 1].rstrip() + "…"
    about = [category_of(product), *product.std.get("colour", [])[:1], *product.re.get("colour", [])[:1]]
    unsaid = [value for value in dict.fromkeys(about) if value and value.casefold() not in title.casefold()]
    return f"{title} ({', '.join(unsaid)})" if unsaid else title


def save_examples(split: str, model: str, found: dict[str, list[Example]]) -> None:
    content = {"model": model, **{part: [asdict(example) for example in own] for part, own in found.items()}}
    _write(EXAMPLES / f"{split}.json", json.dumps(content, ensure_ascii=False, indent=1))


def write_examples_page() -> bool:
    """docs/examples.md from docs/examples/*.json; whether there is anything to show."""
    files = sorted(EXAMPLES.glob("*.json"))
    lines = [
        "# Example lists",
        "",
        f"Made by `python evaluate.py page`. Of {DRAWN_FROM} requests of each test drawn at random, the {EACH} with the best NDCG",
        f"of the short list and the {EACH} with the worst (of equals, those drawn first): what the shopper had met, what was",
        "recommended, and what they then took. Nothing here was chosen by hand.",
    ]
    for file in files:
        saved = json.loads(file.read_text(encoding="utf-8"))
        lines += ["", f"## {file.stem}, {saved['model']}"]
        for part in ("best", "worst"):
            for number, example in enumerate(saved[part], start=1):
                lines += [
                    "",
                    f"### {file.stem}: {part} {number}, NDCG {example['ndcg']:.3f}",
                    *_told(Example(**example)),
                ]
    if files:
        _write(EXAMPLES.with_suffix(".md"), "\n".join(lines))
    return bool(files)


def _told(example: Example) -> list[str]:
    lines = ["", f"Asked for: {_plain(example.context)}"] if example.context else []
    earlier = example.history_length - len(example.history)
    more = f", and {earlier} earlier" if earlier else ""
    met = "; ".join(map(_plain, example.history)) + more if example.history else "nothing"
    lines += ["", f"Met before, the latest first: {met}.", "", "| place | recommended | taken |", "|---|---|---|"]
    lines += [
        f"| {place} | {_plain(text)} | {'**yes**' if place in example.taken_places else ''} |"
        for place, text in enumerate(example.recommended, start=1)
    ]
    taken = [
        f"{_plain(text)} ({'not in the list' if place is None else f'place {place}'})"
        for text, place in zip(example.taken, example.places, strict=True)
    ]
    return [*lines, "", "What was taken: " + "; ".join(taken) + "."]


def _plain(text: str) -> str:
    """Text in Markdown that means what it says, whatever a seller typed."""
    return re.sub(r"([\\`*_<|\[\]])", r"\\\1", text)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")
