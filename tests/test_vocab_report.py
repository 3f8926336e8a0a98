"""Merges of RE values: what is suggested, what is never merged, and that nothing happens before a person says so."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import train_simcse
import vocab_report
from catalog import FeatureSchema, Product, RawProduct
from lexicon import Lexicon
from release import Release
from settings import UserError, run_script
from tests.tiny import tiny_text_encoder
from vocab import UNKNOWN, ReVocab, resolve_aliases
from vocab_report import (
    Knowledge,
    Splitter,
    Suggestion,
    VocabOptions,
    compounds,
    differ_in_meaning,
    field_report,
    one_edit_apart,
    read_suggestions,
    similar,
    spellings,
    write_suggestions,
)

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def knowledge():
    return Knowledge(Lexicon.load(ROOT / "lexicon.json"))


def products(*values: str, field: str = "kind") -> list[Product]:
    return [Product(product_id=f"p{n}", title="t", re={field: [value]}) for n, value in enumerate(values)]


def vectors(*degrees: float) -> np.ndarray:
    """Unit vectors at these angles."""
    radians = np.radians(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


# --- what must not be merged ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("long coat", "short coat"),
        ("cotton", "wool"),
        ("black knit", "navy knit"),
        ("sleeveless", "sleeved"),
        ("lined", "unlined"),
        ("stretch", "nonstretch"),
        ("slip", "non slip"),
        ("collar", "no collar"),
        ("100 denier", "40 denier"),
        ("short", "shorts"),  # a length and a garment
        ("린넨", "면"),
    ],
)
def test_contrasts_differ_in_meaning(knowledge, one, other):
    assert differ_in_meaning(one, other, knowledge)
    assert differ_in_meaning(other, one, knowledge)


@pytest.mark.parametrize(
    ("one", "other"), [("crop", "cropped"), ("v neck", "vneck"), ("t shirt", "tshirt"), ("zigcore", "zigcores")]
)
def test_spellings_do_not_differ_in_meaning(knowledge, one, other):
    assert not differ_in_meaning(one, other, knowledge)


# --- compounds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("long h line blazer", ["long", "h line", "blazer"]),
        ("oversized v neck cotton cardigan", ["oversized", "v neck", "cotton", "cardigan"]),
        ("high rise wide leg pants", ["high rise", "wide leg", "pants"]),
        ("fleece lined stand collar jumper", ["fleece lined", "stand collar", "jumper"]),
        ("cotton light stretch", ["cotton", "light stretch"]),
        ("3 4 sleeve tee", ["3 4 sleeve", "tee"]),
        ("linen shirt dress", ["linen", "shirt dress"]),  # neither a shirt nor two things
        ("long wool coat", ["long", "wool", "coat"]),
        ("sleeveless", ["sleeveless"]),
        ("오버핏 린넨 셔츠", ["오버핏", "린넨", "셔츠"]),
    ],
)
def test_a_value_comes_apart_where_its_meaning_does(knowledge, value, parts):
    assert Splitter({value: 1}, knowledge).parts(value) == parts


@given(
    st.lists(
        st.sampled_from(["long", "v", "neck", "wool", "coat", "high", "rise", "no", "dress", "3", "petal", "shirt"]),
        min_size=1,
    )
)
def test_the_parts_joined_are_the_value(knowledge, words):
    value = " ".join(words)
    assert " ".join(Splitter({value: 1}, knowledge).parts(value)) == value


def test_words_that_never_stand_apart_stay_together(knowledge):
    counts = {"peter pan dress": 3, "peter pan blouse": 3, "wool peter pan coat": 1}
    assert Splitter(counts, knowledge).parts("wool peter pan coat") == ["wool", "peter pan", "coat"]


def test_two_garments_in_one_name_are_one_part_where_that_name_is_usual(knowledge):
    counts = {"long shirt jacket": 5, "long hoodie skirt": 1, "bomber jacket": 5}
    splitter = Splitter(counts, knowledge)
    assert splitter.parts("long shirt jacket") == ["long", "shirt jacket"]
    assert splitter.parts("long hoodie skirt") == ["long", "hoodie", "skirt"]


def test_words_nobody_else_uses_stay_together_and_are_kept(knowledge):
    found = compounds({"long norfolk harbour coat": 1, "norfolk harbour": 1, "zig zag zug zog coat": 1}, knowledge, 5)
    assert found == {"long norfolk harbour coat": (["long", "norfolk harbour", "coat"], 0.5)}


@pytest.mark.parametrize("value", ["no collar coat", "wool (lined) coat", "coat", "3 coat", "단추 없는 코트"])
def test_negations_structure_and_single_words_are_left_whole(knowledge, value):
    assert compounds({value: 9}, knowledge, 1) == {}


# --- spelling ---------------------------------------------------------------------------------------------------------


def test_rarer_spellings_go_to_the_most_frequent_one(knowledge):
    counts = {
        "v neck": 9, "vneck": 2, "v necks": 1,  # spaces, plural
        "normal cotton": 5, "cotton normal": 4,  # order
        "viscose": 9, "viscos": 2, "viscsoe": 1,  # typos
    }  # fmt: skip
    found = {value: target for value, (target, _) in spellings(counts, knowledge).items()}
    assert found == {
        "vneck": "v neck",
        "v necks": "v neck",
        "cotton normal": "normal cotton",
        "viscos": "viscose",
        "viscsoe": "viscose",
    }


@pytest.mark.parametrize(
    "counts",
    [
        {"dress shirt": 9, "shirt dress": 1},  # the last noun is the thing
        {"denim short": 1, "denim shorts": 9},
        {"high rise low stretch": 9, "low rise high stretch": 1},
        {"sleeve type 1": 9, "sleeve type 2": 1},
        {"padded": 9, "paddle": 1},  # short
        {"trimmer": 9, "trimmed": 1},  # another ending
        {"xlined": 9, "lined": 1},  # another beginning
        {"bathing": 2, "batwing": 1},  # not so much more frequent
        {"+": 1, "++": 9},
    ],
)
def test_words_that_only_look_alike_stay_apart(knowledge, counts):
    assert spellings(counts, knowledge) == {}


@given(st.text("abc", max_size=5), st.text("abc", max_size=5))
def test_one_edit_apart_is_what_editing_once_can_reach(one, other):
    def once(word):
        for at in range(len(word) + 1):
            yield word[:at] + word[at + 1 :]
            for letter in "abc":
                yield word[:at] + letter + word[at:]
                yield word[:at] + letter + word[at + 1 :]
            if at + 1 < len(word):
                yield word[:at] + word[at + 1] + word[at] + word[at + 2 :]

    assert one_edit_apart(one, other) == (one != other and other in set(once(one)))


# --- similar ----------------------------------------------------------------------------------------------------------


def test_mutual_neighbours_merge_the_rarer_into_the_more_frequent(knowledge):
    counts = {"check": 3, "checked": 9, "print": 4, "printed": 4}
    found = similar(counts, vectors(0, 5, 90, 95), knowledge, 0.9)
    assert {value: target for value, (target, _) in found.items()} == {"check": "checked", "printed": "print"}
    assert found["check"][1] == pytest.approx(np.cos(np.radians(5)), abs=1e-4)
    assert similar(counts, vectors(0, 5, 90, 95), knowledge, 0.999) == {}


def test_names_of_one_thing_in_the_lexicon_may_share_no_word(knowledge):
    found = similar({"polo tee": 1, "pique shirt": 2}, vectors(0, 1), knowledge, 0.9)
    assert found["polo tee"][0] == "pique shirt"


def test_who_has_a_nearer_neighbour_is_not_merged(knowledge):
    counts = {"pleat": 1, "pleated": 9, "zigcore": 3}
    assert similar(counts, vectors(0, 10, 14), knowledge, 0.9) == {}


@pytest.mark.parametrize(
    "pair",
    [
        ("thin", "thick"),  # no lexicon says so, and no encoder either
        ("wool blend", "wool"),
        ("early summer", "summer"),
        ("cotton", "linen"),
        ("sleeveless", "sleeved"),
        ("5 pocket", "6 pocket"),
    ],
)
def test_closeness_alone_merges_nothing(knowledge, pair):
    assert similar(dict.fromkeys(pair, 1), vectors(0, 0), knowledge, 0.9) == {}


def test_one_value_or_none_has_no_neighbours(knowledge):
    assert similar({"a": 1}, vectors(0), knowledge, -1) == {}
    assert similar({}, np.zeros((0, 2), np.float32), knowledge, -1) == {}


# --- a field ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def many(monkeypatch):
    """Fields of a few values count as large."""
    monkeypatch.setattr(vocab_report, "COMPOUND_FROM", 1)


VALUES = ["v neck cotton cardigan"] * 3 + ["vneck wool cardigan", "long cardigan", "sleeveless dress", "v neck"]


def test_a_small_field_is_not_taken_apart(knowledge):
    report = field_report("kind", products(*VALUES), {}, knowledge, None, kinds=["compound"])
    assert report.suggestions == []
    assert report.counts == report.after == Counter(VALUES)


def test_the_report_says_what_the_vocabulary_would_become(knowledge, many):
    catalogue = products(*VALUES)
    report = field_report("kind", catalogue, {}, knowledge, None, kinds=["spelling", "compound"])
    becomes = {line.value: (line.kind, line.becomes, line.products) for line in report.suggestions}
    assert becomes == {
        "vneck": ("spelling", ["v neck"], 1),
        "v neck cotton cardigan": ("compound", ["v neck", "cotton", "cardigan"], 3),
        "vneck wool cardigan": ("compound", ["vneck", "wool", "cardigan"], 1),
        "long cardigan": ("compound", ["long", "cardigan"], 1),
        "sleeveless dress": ("compound", ["sleeveless", "dress"], 1),
    }
    assert report.after == {
        "v neck": 5, "cotton": 3, "cardigan": 5, "wool": 1, "long": 1, "sleeveless": 1, "dress": 1,
    }  # fmt: skip
    # With all of them in force there is nothing left to say.
    again = field_report("kind", catalogue, vocab_report._as_aliases(report.suggestions), knowledge, None)
    assert again.suggestions == []
    assert again.counts == report.after


def test_what_is_in_force_is_not_turned_round(knowledge, many):
    """A shop that prefers the rarer spelling keeps it."""
    report = field_report("kind", products(*VALUES), {("kind", "v neck"): ["vneck"]}, knowledge, None)
    assert "vneck" not in {line.value for line in report.suggestions}
    assert report.after["vneck"] == 5


def test_new_words_are_those_the_live_release_does_not_have(knowledge):
    trained = ReVocab(["kind"], {("kind", "vneck"): ["v neck"]})
    trained.grow("kind", "v neck")
    report = field_report("kind", products("vneck", "zigcore", "zigcore", "zag"), {}, knowledge, None, trained)
    assert report.new == ["zigcore", "zag"]
    assert "zigcore, zag" in "\n".join(vocab_report.new_word_lines([report], "r1"))
    assert "no release is live" in vocab_report.new_word_lines([report], None)[0]


WORDS = st.sampled_from(
    [
        "v",
        "neck",
        "vneck",
        "long",
        "crop",
        "cropped",
        "shirt",
        "shirts",
        "dress",
        "wool",
        "woolen",
        "no",
        "high",
        "rise",
        "3",
    ]
)


@given(st.lists(st.lists(WORDS, min_size=1, max_size=4).map(" ".join), min_size=1, max_size=12))
def test_suggestions_are_never_a_circle_and_lose_no_product(knowledge, values):
    class Alike:
        def cached_pooled(self, texts):
            return vectors(*(0.1 * n for n in range(len(texts))))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocab_report, "COMPOUND_FROM", 1)
        catalogue = products(*values)
        report = field_report("kind", catalogue, {}, knowledge, Alike(), min_products=1)
    aliases = resolve_aliases(vocab_report._as_aliases(report.suggestions))
    vocab = ReVocab(["kind"], aliases)
    assert all(vocab.words_of(product.re) for product in catalogue)
    assert set(report.after) == {value for product in catalogue for _, value in vocab.words_of(product.re)}


# --- the file ---------------------------------------------------------------------------------------------------------

LINE = Suggestion(field="kind", value="vneck", becomes=["v neck"], kind="spelling", products=2)


def test_a_file_reads_back_and_is_never_overwritten(tmp_path):
    path = tmp_path / "s.jsonl"
    write_suggestions([LINE], path)
    assert read_suggestions(path, ["kind"]) == [LINE]
    with pytest.raises(UserError, match=r"s\.jsonl is there already"):
        write_suggestions([], path)
    path.write_text('\n{"field": "kind", "value": "V-Neck", "becomes": "Plunging"}\n\n')
    assert read_suggestions(path, ["kind"]) == [
        Suggestion(field="kind", value="v neck", becomes=["plunging"], kind="own")
    ]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("not json", "line 2: Invalid JSON"),
        ('{"field": "kind", "value": "a"}', "line 2: becomes: Field required"),
        ('{"field": "kind", "value": "a", "becomes": ["b"], "colour": 1}', "line 2: colour: Extra inputs"),
        ('{"field": "planet", "value": "a", "becomes": ["b"]}', "line 2: 'planet' is no open field.*there are: kind"),
        ('{"field": "kind", "value": "a", "becomes": []}', "line 2: value and becomes must say something"),
        ('{"field": "kind", "value": "a", "becomes": ["b", " "]}', "line 2: value and becomes must say something"),
        ('{"field": "kind", "value": "A", "becomes": ["a", "b"]}', "line 2: 'a' would become itself"),
        ('{"field": "kind", "value": "VNECK", "becomes": ["x"]}', "line 2: 'vneck' becomes something else"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, told):
    path = tmp_path / "s.jsonl"
    path.write_text(LINE.model_dump_json() + "\n" + line)
    with pytest.raises(UserError, match=told):
        read_suggestions(path, ["kind"])


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.jsonl: No such file"):
        read_suggestions(tmp_path / "nowhere.jsonl", ["kind"])
    (tmp_path / "s").write_bytes(b"\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        read_suggestions(tmp_path / "s", ["kind"])


# --- the script -------------------------------------------------------------------------------------------------------

SCHEMA = FeatureSchema(std={"category": ["shirt", "dress"]}, re=["kind", "style"])


@pytest.fixture
def shop(store, settings, tmp_path):
    """Settings of a shop with a few products, a tiny encoder and no release."""
    store.put_schema(SCHEMA)
    catalogue = products(*VALUES, "print", "printed")
    store.products.put([RawProduct(product_id=product.product_id, title="t") for product in catalogue])
    store.products.put_features(catalogue, origin="test")
    return settings.model_copy(
        update={
            "data_dir": tmp_path / "data",
            "models_dir": tmp_path / "models",
            "text_encoder": str(tiny_text_encoder(tmp_path / "text")),
        }
    )


def run(shop, action: str, file: Path | None = None, **options) -> None:
    vocab_report.main(VocabOptions(**shop.model_dump(), action=action, file=file, _env_file=None, **options))


def test_a_report_changes_nothing_and_its_file_can_be_applied_and_undone(shop, store, tmp_path, capsys, many):
    features, file = store.products.read_features(), tmp_path / "s.jsonl"
    run(shop, "report", file, sample=2)
    told = capsys.readouterr().out
    assert "no release is live" in told
    assert "0 aliases in force; 5 suggestions" in told
    assert told.count(" -> ") == 2
    assert store.aliases.read() == {}

    run(shop, "apply", file)
    assert "application 1: 5 new aliases, 0 changed" in capsys.readouterr().out
    assert store.aliases.read()["kind", "long cardigan"] == ["long", "cardigan"]
    run(shop, "apply", file)
    assert "nothing to do: all 5 aliases" in capsys.readouterr().out
    run(shop, "list")
    listed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {"field": "kind", "value": "vneck", "becomes": ["v neck"], "kind": "spelling"} in listed
    assert store.products.read_features() == features

    run(shop, "undo")
    assert "5 aliases taken back; 0 in force" in capsys.readouterr().out
    assert store.aliases.read() == {}


def test_what_list_prints_is_a_file_to_apply_and_to_undo(shop, store, tmp_path, capsys):
    file = tmp_path / "s.jsonl"
    write_suggestions([LINE, Suggestion(field="kind", value="a", becomes=["b"])], file)
    run(shop, "apply", file)
    capsys.readouterr()
    run(shop, "list")
    listed = tmp_path / "listed.jsonl"
    listed.write_text(capsys.readouterr().out.splitlines()[0])
    run(shop, "undo", listed)
    assert store.aliases.read() == {("kind", "vneck"): ["v neck"]}


def test_a_report_can_be_of_one_field_and_one_kind(shop, tmp_path, capsys, many):
    file = tmp_path / "s.jsonl"
    run(shop, "report", file, field="kind", kind="compound")
    assert {line.kind for line in read_suggestions(file, ["kind"])} == {"compound"}
    assert "style" not in capsys.readouterr().out
    with pytest.raises(UserError, match="'planet' is no open field"):
        run(shop, "report", tmp_path / "other.jsonl", field="planet")
    with pytest.raises(UserError, match="is there already"):
        run(shop, "report", file)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["apply"], "apply needs the file"),
        (["apply", "nowhere.jsonl"], "nowhere.jsonl: No such file"),
        (["apply", "circle.jsonl"], "kind: a -> b -> a goes in a circle; nothing was applied"),
        (["mend"], "action"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(shop, store, tmp_path, monkeypatch, capsys, arguments, told):
    monkeypatch.chdir(tmp_path)
    Path("circle.jsonl").write_text(
        '{"field": "kind", "value": "a", "becomes": ["b"]}\n{"field": "kind", "value": "b", "becomes": ["a"]}'
    )
    monkeypatch.setattr(sys, "argv", ["vocab_report.py", *arguments, "--database-url", shop.database_url])
    with pytest.raises(SystemExit) as stop:
        run_script(VocabOptions, vocab_report.main)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert store.aliases.read() == {}


def test_training_reads_values_by_the_aliases_and_its_release_keeps_them(shop, store, tmp_path, many):
    file = tmp_path / "s.jsonl"
    run(shop, "report", file)
    run(shop, "apply", file)
    options = {**shop.model_dump(), "epochs": 1, "batch_size": 8, "embedding_dim": 8, "output": 16, "min_count": 1}
    train_simcse.main(train_simcse.SimcseOptions(**options, _env_file=None))
    store.aliases.undo()  # what a release was trained with does not change any more
    release = Release.open(shop.models_dir)
    _, vocab = release.vocabularies()
    assert vocab.id("kind", "v neck cotton cardigan") == UNKNOWN
    ids = vocab.ids({"kind": ["v neck cotton cardigan"]})
    assert [vocab.word(word_id)[1] for word_id in ids] == ["v neck", "cotton", "cardigan"]
    assert vocab.ids({"kind": ["vneck"]}) == ids[:1]
    assert release.item_layout().re_slots == 3
