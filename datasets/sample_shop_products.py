"""The goods of the sample shop: what each item is, drawn from tables of what goes with what (no wool swimsuits).

`draw_group` gives an item in its colours with gold features, price and listing; `suitability` says which occasions an
item is right for.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from catalog import FeatureSchema
from datasets.sample_shop_listings import Features, Listing, write_listing
from datasets.sample_shop_words import BRANDS, RE_FIELDS, STD_FIELDS, WORDS, Brand

SCHEMA = FeatureSchema(std={name: list(WORDS[name]) for name in STD_FIELDS}, re=list(RE_FIELDS))

_PRICE_BANDS = {"budget": 30_000, "mid": 80_000, "premium": 200_000, "luxury": float("inf")}  # KRW, upper ends
_TIER_PRICE = (0.55, 1.0, 1.9, 4.0)  # what a brand of tier 0..3 asks for the same item


@dataclass(frozen=True)
class _Category:
    """What a category allows. A value that stands twice is drawn twice as often."""

    shares: list[int]  # women's, men's, unisex items
    price: int  # KRW at a mid-tier brand
    seasons: list[str]  # alternatives such as "spring+summer"
    materials: list[str]
    styles: list[str]
    fits: list[str] = field(default_factory=list)
    details: list[str] = field(default_factory=list)
    functions: list[str] = field(default_factory=list)
    necklines: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Occasion:
    """An item suits an occasion by its category, the more by style, and by any of the further values."""

    categories: list[str]
    styles: list[str]
    further: list[str]


_GOODS = tomllib.loads(Path(__file__).with_name("sample_shop_goods.toml").read_text(encoding="utf-8"))
_CATEGORIES = {name: _Category(**table) for name, table in _GOODS["categories"].items()}
_OCCASIONS = {name: _Occasion(**table) for name, table in _GOODS["occasions"].items()}
OCCASIONS = tuple(_OCCASIONS)

_PRINTED = {"t-shirt", "shirt", "blouse", "skirt", "dress", "swimwear", "sweater", "jumpsuit"}  # prints are common
_WOMEN_ONLY = {"petite", "cropped", "a line", "halter", "ruffle", "bow", "pearl", "lace", "puff sleeve", "square neck"}
_WARM = {"wool", "cashmere", "fleece", "down", "corduroy", "tweed", "turtleneck", "warm"}
_COOL = {"linen", "cooling", "mesh", "uv protection", "breathable", "chiffon"}
_BLENDED = {"cotton", "linen", "wool", "cashmere", "silk", "polyester", "nylon", "rayon", "tencel"}  # woven together
_LOUD = {"animal", "graphic", "paisley"}
_SOBER_OCCASIONS = {"office", "interview"}
_STYLE_MOODS = {
    "minimal": "modern calm", "casual": "calm youthful", "street": "hip youthful", "classic": "elegant luxurious",
    "romantic": "lovely elegant", "sporty": "youthful hip", "vintage": "cosy hip", "preppy": "youthful chic",
    "bohemian": "calm lovely", "outdoor": "hip modern",
}  # fmt: skip
# Colours that sell in any shop, then the rest.
_COLOUR_SHARES = dict.fromkeys(WORDS["colour"], 2) | {
    "black": 12,
    "white": 8,
    "ivory": 7,
    "beige": 7,
    "grey": 6,
    "navy": 7,
}


def suitability(features: Features) -> list[float]:
    """How well an item suits each of `OCCASIONS`: 0 for what nobody wears there, else 0.3 to 1."""
    values = {value for values in features.values() for value in values}
    return [
        0.3 + 0.4 * bool(values & {*occasion.styles}) + 0.3 * bool(values & {*occasion.further})
        if features["category"][0] in occasion.categories and not (values & _LOUD and name in _SOBER_OCCASIONS)
        else 0.0
        for name, occasion in _OCCASIONS.items()
    ]


@dataclass(frozen=True)
class Item:
    """One product before it has ids and times."""

    features: Features
    price: int  # KRW
    listing: Listing


def draw_group(rng: np.random.Generator) -> list[Item]:
    """One item in one to four colours, each with its own listing."""
    base, brand, category = _draw_item(rng)
    variants = int(rng.choice([1, 2, 3, 4], p=[0.62, 0.18, 0.13, 0.07]))
    shares = np.array(list(_COLOUR_SHARES.values()), dtype=float)
    if base["material"] == ["denim"]:
        shares[list(_COLOUR_SHARES).index("blue")] *= 20
    colours = rng.choice(list(_COLOUR_SHARES), size=variants, replace=False, p=shares / shares.sum())
    price = category.price * _TIER_PRICE[brand.tier] * float(np.exp(rng.normal(0.0, 0.25)))
    price = max(5_000, round(price / 1_000) * 1_000) - 100  # sellers end a price in 900
    korean = bool(rng.random() < 0.5)
    items = []
    for colour in colours:
        features = {name: list(values) for name, values in base.items()}
        features["colour"] = [str(colour)]
        features["price_band"] = [next(band for band, end in _PRICE_BANDS.items() if price < end)]
        items.append(Item(features, price, write_listing(rng, features, korean)))
    return items


def _draw_item(rng: np.random.Generator) -> tuple[Features, Brand, _Category]:
    sizes = np.array([sum(category.shares) for category in _CATEGORIES.values()], dtype=float)
    name = list(_CATEGORIES)[rng.choice(len(sizes), p=sizes / sizes.sum())]
    category = _CATEGORIES[name]
    gender = str(rng.choice(["women", "men", "unisex"], p=np.array(category.shares) / sum(category.shares)))
    fitting = np.array([0.1 + sum(style in category.styles for style in brand.styles) for brand in BRANDS])
    brand = BRANDS[rng.choice(len(BRANDS), p=fitting / fitting.sum())]
    seasons = category.seasons[rng.integers(len(category.seasons))].split("+")
    barred: set[str] = set() if gender == "women" else set(_WOMEN_ONLY)
    if seasons[0] == "summer":
        barred |= _WARM
    elif seasons[-1] == "winter" and len(seasons) < 4:
        barred |= _COOL

    def some(values: Sequence[str], shares: Sequence[float]) -> list[str]:
        """Distinct values, `shares[n]` the chance of taking n of them; what clashes with gender or season is left."""
        fair = [value for value in values if value not in barred]
        count = int(rng.choice(len(shares), p=shares))
        taken: list[str] = []
        while fair and len(taken) < count:
            taken.append(fair[rng.integers(len(fair))])
            fair = [value for value in fair if value != taken[-1]]
        return taken

    own_styles = [style for style in brand.styles if style in category.styles]
    styles = some(own_styles * 2 + category.styles, [0, 0.65, 0.35])
    materials = some(category.materials, [0, 1])
    if materials[0] in _BLENDED and rng.random() < 0.4:
        materials += some([value for value in category.materials if value in _BLENDED - {*materials}], [0, 1])
    features = {
        "category": [name],
        "gender": [gender],
        "brand": [brand.name],
        "season": seasons,
        "pattern": some(["striped", "checked", "floral", "dotted", "animal", "graphic", "paisley"], [0.55, 0.45])
        if name in _PRINTED
        else [],
        "material": materials,
        "fit": some(category.fits, [0.05, 0.95]),
        "style": styles,
        "detail": some(category.details, [0.1, 0.5, 0.4]),
        "function": some(category.functions, [0.3, 0.5, 0.2]),
        "neckline": some(category.necklines, [0.25, 0.75]),
        "mood": some(" ".join(_STYLE_MOODS[style] for style in styles).split(), [0.3, 0.7]),
    }
    if not features["pattern"]:
        features["pattern"] = ["solid"]
    if features["pattern"] == ["floral"] and gender == "men":
        features["pattern"] = ["striped"]
    suited = [
        occasion
        for occasion, score in zip(OCCASIONS, suitability(features), strict=True)
        if rng.random() < (0.0, 0.1, 0.75)[(score >= 0.7) + (score > 0)]
    ]
    features["occasion"] = some(suited, [0, 0.5, 0.5]) or (
        ["daily"] if name != "swimwear" and rng.random() < 0.6 else []
    )
    return features, brand, category
