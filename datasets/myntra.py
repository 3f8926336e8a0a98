"""Myntra (Kaggle, Fashion Product Images): product records with HTML text and hand-entered attributes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from catalog import FeatureSchema, RawProduct, Rejected
from datasets import Source
from datasets.reading import find_file, need_file, parse_object, read_objects, readable, validated

ORIGIN = "the public original is on Kaggle: 'Fashion Product Images Dataset' (its folder styles)"
ENDINGS = (".jsonl", ".jsonl.gz")

STD_FIELDS = {
    "brand": "brandName",
    "gender": "gender",
    "age_group": "ageGroup",
    "colour": "baseColour",
    "season": "season",
    "usage": "usage",
    "category": "articleType",
    "sub_category": "subCategory",
    "master_category": "masterCategory",
}
FIELDS = {
    "product_id": "id",
    "title": "productDisplayName",
    "price": "price",
    "arrived_at": "catalogAddDate",
    "description": "productDescriptors",
    "attributes": "articleAttributes",
}


def read(path: Path | None) -> Source:
    """A folder with styles.jsonl(.gz), or with the public folder styles/*.json (or that folder itself)."""
    return Source(schema=_schema(path), products=_products(path))


def _schema(path: Path | None) -> FeatureSchema | None:
    closed: dict[str, set[str]] = {name: set() for name in STD_FIELDS}
    open_fields: dict[str, None] = {}
    for product in _products(path):
        if isinstance(product, RawProduct):
            for name, values in product.attributes.items():
                if name in closed:
                    closed[name].update(values)
                else:
                    open_fields[name] = None
    std = {name: sorted(values) for name, values in closed.items() if values}
    return FeatureSchema(std=std, re=list(open_fields)) if std else None


def _products(path: Path | None) -> Iterator[RawProduct | Rejected]:
    for record in _records(path):
        if isinstance(record, Rejected):
            yield record
            continue
        file, line, row = record
        values = {name: row.get(key) for name, key in FIELDS.items()}
        descriptors = values["description"] or {}
        if isinstance(descriptors, dict):
            texts = (_inner(value, "value") for value in descriptors.values())
            values["description"] = "\n".join(text for text in texts if isinstance(text, str))
        given = values["attributes"] or {}
        if isinstance(given, dict):
            values["attributes"] = _attributes(row, given)
        yield validated(RawProduct, values, file, line, row, FIELDS)


def _attributes(row: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    attributes = {name: _inner(row.get(key), "typeName") for name, key in STD_FIELDS.items()}
    for name, value in given.items():
        field = re.sub(r"\W+", "_", name.lower()).strip("_")
        # "Brand" stands among the article's attributes too, with another meaning (a line of the brand).
        attributes[f"article_{field}" if field in STD_FIELDS else field] = value
    return {name: value for name, value in attributes.items() if value not in (None, "", "NA")}


def _inner(value: Any, key: str) -> Any:
    """The public original wraps values: {"typeName": "Shirts"}, {"descriptorType": "style_note", "value": "<p>"}."""
    return value.get(key) if isinstance(value, dict) else value


def _records(path: Path | None) -> Iterator[tuple[str, int, dict[str, Any]] | Rejected]:
    folder = path if path is None or path.name == "styles" else path / "styles"
    if folder is not None and folder.is_dir() and find_file(folder.parent, ["styles"], ENDINGS) is None:
        for file in sorted(folder.glob("*.json")):
            with readable(file):
                record = parse_object(file.read_bytes(), file.name, 1)
            yield record if isinstance(record, Rejected) else (file.name, 1, _unwrapped(record))
        return
    file = need_file(path, ["styles"], ENDINGS, ORIGIN)
    for row in read_objects(file):
        yield row if isinstance(row, Rejected) else (file.name, row[0], _unwrapped(row[1]))


def _unwrapped(record: dict[str, Any]) -> dict[str, Any]:
    data = record.get("data")
    return data if isinstance(data, dict) else record
