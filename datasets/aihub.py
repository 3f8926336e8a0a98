"""AI-Hub-style JSON: clothes with structured features, closed (`clothes`) and open (`reinforced_feature_value`)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from catalog import FeatureSchema, Identifier, Product, RawProduct, Rejected, Values
from datasets import Source
from datasets.reading import need_file, raw_text, read_objects, validated
from vocab import normalise, split_values

ORIGIN = "the clothes come from AI-Hub, Korea's public AI data service"
NUMBER = re.compile(r"\d+(\.\d+)?")


class _Garment(BaseModel):
    """One row of the file, checked, with nested objects flattened."""

    given: dict[str, Any]
    clothes: dict[Identifier, Values]
    reinforced_feature_value: dict[Identifier, Values]

    @cached_property
    def std(self) -> dict[str, list[str]]:
        """`clothes` without its numbers: these are measurements in centimetres, no choice from a list."""
        return _split({name: values for name, values in self.clothes.items() if not NUMBER.fullmatch(values[0])})

    @cached_property
    def re(self) -> dict[str, list[str]]:
        return _split(self.reinforced_feature_value)


def read(path: Path | None) -> Source:
    """products.jsonl(.gz) of {"product_id", "feature_data": {"clothes", "reinforced_feature_value"}}, or its folder."""
    file = need_file(path, ["products"], (".jsonl", ".jsonl.gz"), ORIGIN)
    spellings: dict[str, dict[str, str]] = {}
    open_fields: dict[str, None] = {}
    for row in _garments(file):
        if not isinstance(row, Rejected):
            open_fields.update(dict.fromkeys(row[1].re))
            for field, values in row[1].std.items():
                for value in values:
                    spellings.setdefault(field, {}).setdefault(normalise(value), value)
    std = {field: sorted(seen.values()) for field, seen in spellings.items()}
    schema = FeatureSchema(std=std, re=[_open_name(name, std) for name in open_fields]) if std else None
    return Source(schema=schema, products=_products(file), features=_features(file, spellings))


def _products(file: Path) -> Iterator[RawProduct | Rejected]:
    for row in _garments(file):
        yield row if isinstance(row, Rejected) else _product(file, *row)


def _product(file: Path, line: int, garment: _Garment) -> RawProduct | Rejected:
    values = {"product_id": garment.given.get("product_id"), "title": _title(garment), "attributes": garment.clothes}
    return validated(RawProduct, values, file.name, line, garment.given)


def _features(file: Path, spellings: Mapping[str, Mapping[str, str]]) -> Iterator[Product]:
    """Of the rows that are products; `_products` has reported the others."""
    for row in _garments(file):
        product = row if isinstance(row, Rejected) else _product(file, *row)
        if not isinstance(row, Rejected) and not isinstance(product, Rejected):
            yield Product(
                product_id=product.product_id,
                title=product.title,
                std={
                    name: [spellings[name][normalise(value)] for value in values] for name, values in row[1].std.items()
                },
                re={_open_name(name, spellings): values for name, values in row[1].re.items()},
            )


def _garments(file: Path) -> Iterator[tuple[int, _Garment] | Rejected]:
    for found in read_objects(file):
        if isinstance(found, Rejected):
            yield found
            continue
        line, given = found
        data = given.get("feature_data") or {}
        if not isinstance(data, dict):
            yield Rejected(file.name, line, "feature_data: not a JSON object", raw_text(given))
            continue
        halves = {name: _flat(data.get(name) or {}) for name in ("clothes", "reinforced_feature_value")}
        garment = validated(_Garment, {"given": given, **halves}, file.name, line, given)
        yield garment if isinstance(garment, Rejected) else (line, garment)


def _open_name(name: str, std: Mapping[str, Any]) -> str:
    """Both halves have `category` and `season`; a field is closed or open, so the open one takes another name."""
    return f"reinforced.{name}" if name in std else name


def _title(garment: _Garment) -> str:
    """The set has no titles: "long h-line blazer, Polyester Lightweight" from the category and the fabric."""
    category = garment.re.get("category") or garment.std.get("category", [])
    fabric = garment.re.get("fabric.feature") or garment.std.get("fiber_composition", [])
    words = (re.sub(r"(^|_)\d+", " ", value).replace("_", " ") for value in (*category[:1], *fabric))
    return ", ".join(" ".join(text.split()) for text in words)


def _flat(values: Any, prefix: str = "") -> Any:
    """{"a": {"b": 1}} to {"a.b": 1}; null and empty count as absent. What is no object stays as it is."""
    if not isinstance(values, dict):
        return values
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        elif value not in (None, "", []):
            flat[prefix + name] = value
    return flat


def _split(values: Mapping[str, list[str]]) -> dict[str, list[str]]:
    split = {name: split_values(texts) for name, texts in values.items()}
    return {name: parts for name, parts in split.items() if parts}
