"""Judging readers of product text, on a catalogue of hand-written Myntra records whose right answers are known."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import evaluate_features
import results
from catalog import FeatureSchema, RawProduct
from evaluate_features import (
    FeatureEvaluation,
    Gold,
    by_catalogue,
    by_reader,
    by_typed_words,
    counts,
    measures,
    myntra,
    rows_of,
    titles,
)
from lexicon import Lexicon
from neighbours import Neighbours
from readers import LexiconReader
from settings import UserError
from text_encoder import TextEncoder

ROOT = Path(__file__).parents[1]


def record(number: int, colour: str, kind: str, **attributes: str) -> dict[str, object]:
    return {
        "id": number, "productDisplayName": f"Acme Women {colour} {kind}", "gender": "Women", "articleType": kind,
        "baseColour": colour, "season": "Summer", "usage": "Casual", "price": 10, "catalogAddDate": 1418330925,
        "articleAttributes": {"Fabric": "Cotton", "Pattern": "Solid", "Fit": "Regular Fit", "Neck": "Round Neck", **attributes},
        "productDescriptors": {"description": "<p>Made of cotton</p>"},
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve red dresses and eight blue shirts; one more record has no colour."""
    records = [record(n, "Red", "Dresses", **{"Sleeve Length": "Sleeveless"}) for n in range(12)]
    records += [record(n, "Blue", "Shirts") for n in range(12, 20)]
    records.append({**record(20, "Red", "Dresses"), "baseColour": "NA"})
    (tmp_path / "styles.jsonl").write_text("\n".join(json.dumps(row) for row in records))
    return tmp_path


def options(folder: Path, **given: object) -> FeatureEvaluation:
    return FeatureEvaluation.model_validate({"what": "myntra", "folder": folder, "products": 20, **given})


def test_the_catalogue_gives_choices_and_truth_but_the_reader_sees_text_only(folder: Path):
    gold = myntra(options(folder, products=15))
    assert gold.asked[0].std["colour"] == ["Red", "Blue"]  # the most frequent first
    assert gold.most_frequent["category"] == ["Dresses"]
    assert len(gold.raws) == len(gold.asked) == 15
    assert len(gold.others) == 6  # the one that has no colour is not judged, but may be learned from
    assert not {raw.product_id for raw in gold.raws} & {raw.product_id for raw, _ in gold.others}
    assert not any(raw.attributes for raw in gold.raws)
    assert all("cotton" in raw.description for raw in gold.raws)
    dress = next(n for n, raw in enumerate(gold.raws) if "Dresses" in raw.title)
    assert gold.values[dress]["sleeve_length"] == ["Sleeveless"]
    assert not any(raw.description for raw in myntra(options(folder, text="title")).raws)


def test_the_same_products_are_drawn_again(folder: Path):
    def drawn(seed: int) -> list[str]:
        return [raw.product_id for raw in myntra(options(folder, products=5, seed=seed)).raws]

    assert drawn(0) == drawn(0) != drawn(1)


def test_too_few_products_are_refused(folder: Path):
    with pytest.raises(UserError, match=r"has 20 products with gender, .*; 21 are to be judged"):
        myntra(options(folder, products=21))


def test_counts_and_measures_by_hand():
    truth = [{"colour": ["Red"], "fit": ["slim"]}, {"colour": ["blue"]}, {"colour": ["red", "blue"]}]
    said = [{"colour": ["red"]}, {"colour": ["red"], "fit": ["slim"]}, {"colour": ["red"]}]
    table = counts(said, Gold([], [], truth, [], {}))
    np.testing.assert_array_equal(table["colour"], [[1, 0, 0], [0, 1, 1], [1, 0, 1]])
    np.testing.assert_array_equal(table["fit"], [[0, 0, 1], [0, 0, 0], [0, 0, 0]])  # nobody knows the second's fit
    found = measures(table["micro"].sum(0))
    assert found == {"precision": 2 / 3, "recall": 2 / 5, "f1": 4 / 8}
    assert measures(np.zeros(3)) == {"precision": 0, "recall": 0, "f1": 0}


def test_the_lexicon_is_right_about_plain_words_and_the_figures_say_so(folder: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "docs" / "results.json")
    monkeypatch.setattr(results, "STEPS", tmp_path / "docs" / "steps.json")
    asked = options(folder)
    gold = myntra(asked)
    read = by_reader(LexiconReader(Lexicon.load(ROOT / "lexicon.json")))
    said = [read(raw, schema) for raw, schema in zip(gold.raws, gold.asked, strict=True)]
    rows = rows_of(said, gold, asked, "lexicon", [0.05, 0.15], cost=0.5)
    value = {(row.metric, row.slice): row for row in rows}
    for field in ("colour", "category", "gender", "fabric"):
        assert value["f1", field].value == 1.0
        assert value["f1", field].low == 1.0
    assert value["recall", "season"].value == 0.0  # no word of it
    assert 0 < value["recall", "micro"].low <= value["recall", "micro"].value <= value["recall", "micro"].high < 1
    assert value["f1", "sleeve_length"].n == 12
    assert value["seconds", "micro"].value == 0.1
    assert value["cost", "micro"].value == 0.025

    results.save(rows)
    page = (tmp_path / "docs" / "results.md").read_text()
    assert "read from title and description, 20 products" in page
    line = next(line for line in page.splitlines() if line.startswith("| lexicon |"))
    assert line.endswith("| 0.100 | 0.025000 |")


def test_nearest_in_meaning_chooses_one_value_of_each_field(folder: Path, new_shop):
    gold = myntra(options(folder))
    with new_shop() as settings:
        encoder = TextEncoder.load(settings)
    schema = gold.asked[0]
    said = evaluate_features.by_meaning(encoder, schema)(RawProduct(product_id="1", title="red dress"), schema)
    assert said["colour"] == ["Red"]
    assert {name: len(values) for name, values in said.items()} == dict.fromkeys(schema.std, 1)


def test_the_other_products_fill_what_the_lexicon_leaves_open(folder: Path):
    gold = myntra(options(folder, products=15, text="title"))
    read = by_catalogue(Lexicon.load(ROOT / "lexicon.json"), Neighbours(gold.others))
    said = read(RawProduct(product_id="1", title="Acme Women Red Dresses"), gold.asked[0])
    assert said["colour"] == ["Red"]  # by the lexicon
    assert said["season"] == ["Summer"]  # no word of it


@pytest.fixture
def lures(tmp_path: Path) -> Path:
    """Titles with the values of open fields, in the form of AE-110k and OA-Mine."""

    def line(title: str, **values: str) -> str:
        return json.dumps({"input": title, "category": "Lure", "target_scores": {k: {v: 1} for k, v in values.items()}})

    train = [
        line("ACME spoon 85mm, Red/Black", Brand="ACME", Length="85mm"),
        line("Zed spoon", Brand="Zed", Length="n/a"),
    ]
    test = [line("Zed ACME lure 85mm", Brand="ACME", Length="85mm"), line("Spoon", Brand="n/a", Length="n/a")]
    (tmp_path / "train.jsonl").write_text("\n".join(train))
    (tmp_path / "test.jsonl").write_text("\n".join(test))
    return tmp_path


def test_titles_with_open_fields_and_fields_that_are_not_there(lures: Path):
    gold = titles(options(lures, what="ae-110k"))
    assert gold.values == [{"Brand": ["ACME"], "Length": ["85mm"]}, {"Brand": [], "Length": []}]
    assert gold.asked[0] == FeatureSchema(std={}, re=["Brand", "Length"])
    assert gold.most_frequent == {"Brand": ["ACME"], "Length": ["85mm"]}
    said = [by_typed_words(gold.others)(raw, schema) for raw, schema in zip(gold.raws, gold.asked, strict=True)]
    assert said == [{"Brand": ["ACME"], "Length": ["85mm"]}, {}]
    # A value where there is none is wrong, as in the published measure.
    np.testing.assert_array_equal(counts([gold.most_frequent] * 2, gold)["micro"], [[2, 0, 0], [0, 2, 0]])


def test_a_file_that_holds_no_titles_is_named(tmp_path: Path):
    (tmp_path / "test.jsonl").write_text('{"input": "x"}')
    with pytest.raises(UserError, match=r"test\.jsonl is not a file of titles"):
        titles(options(tmp_path, what="oa-mine"))


def test_a_folder_that_is_none_is_said_in_one_line(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, ROOT / "evaluate_features.py", "myntra", tmp_path / "none"],
        env=os.environ | {"DATA_DIR": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "is not a folder" in done.stderr
