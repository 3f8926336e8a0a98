"""Words to ids: one spelling, one id; STD is closed, RE grows."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catalog import FeatureSchema, Product
from vocab import FIRST_WORD, UNKNOWN, ReVocab, StdVocab, normalise, resolve_aliases, split_values

SCHEMA = FeatureSchema(std={"category": ["shirt", "dress"], "colour": ["Navy Blue", "white"]}, re=["fit", "material"])


@pytest.mark.parametrize(
    ("spelling", "same"),
    [
        ("Relaxed", "relaxed"),
        ("  A-line ", "a_line"),
        ("ＬＩＮＥＮ", "linen"),
        ("오버핏", "오버핏"),
        ("Off\tWhite", "off-white"),
    ],
)
def test_variants_of_a_value_are_one_word(spelling, same):
    assert normalise(spelling) == normalise(same)


def test_different_values_stay_different():
    assert len({normalise(value) for value in ("린넨", "면", "A-line", "H-line", "V-neck")}) == 5


@given(st.text(max_size=40))
def test_normalise_is_idempotent(text):
    assert normalise(normalise(text)) == normalise(text)


def test_joined_values_are_split_once_each_in_order():
    assert split_values(["Cotton, Linen", "cotton", "", "면、폴리"]) == ["Cotton", "Linen", "면", "폴리"]


@given(st.lists(st.text(max_size=20), max_size=8))
def test_split_values_never_repeats_a_spelling(values):
    spellings = [normalise(value) for value in split_values(values)]
    assert len(spellings) == len(set(spellings))
    assert "" not in spellings


def test_std_ids_are_dense_after_the_special_ones():
    vocab = StdVocab(SCHEMA)
    assert [vocab.id("category", "shirt"), vocab.id("category", "Dress"), vocab.id("colour", "navy-blue")] == [3, 4, 5]
    assert len(vocab) == FIRST_WORD + 4
    assert vocab.fields == [0, 0, 0, 1, 1, 2, 2]


def test_a_value_outside_the_schema_is_unknown_and_never_an_id():
    vocab = StdVocab(SCHEMA)
    assert vocab.id("category", "spaceship") == UNKNOWN
    assert vocab.ids({"category": ["spaceship", "shirt"], "planet": ["mars"]}) == [3]


def test_the_same_value_in_two_fields_has_two_ids():
    vocab = ReVocab(["fit", "material"])
    assert vocab.grow("fit", "soft") != vocab.grow("material", "soft")


def test_re_grows_at_once_and_spelling_variants_share_the_id():
    vocab = ReVocab(["fit"])
    [first] = vocab.grow("fit", "Oversized")
    assert vocab.id("fit", "oversized") == first
    assert vocab.grow("fit", "OVERSIZED") == [first]
    assert vocab.grow("fit", "cropped") == [first + 1]
    assert vocab.word(first) == ("fit", "oversized")


@pytest.mark.parametrize(("field", "value"), [("colour", "red"), ("fit", " - ")])
def test_re_refuses_unknown_fields_and_empty_words(field, value):
    with pytest.raises(ValueError, match=field):
        ReVocab(["fit"]).grow(field, value)


def test_grow_from_counts_products_not_mentions():
    products = [
        Product(product_id=str(n), title="t", re={"fit": values})
        for n, values in enumerate([["slim", "Slim"], ["loose"], ["loose"]])
    ]
    vocab = ReVocab(["fit"])
    assert vocab.grow_from(products, min_count=2) == 1
    assert vocab.id("fit", "loose") == FIRST_WORD
    assert vocab.id("fit", "slim") == UNKNOWN


def test_two_threads_growing_the_same_words_agree():
    vocab, words = ReVocab(["fit"]), [f"word{n}" for n in range(300)]
    threads = [threading.Thread(target=lambda: [vocab.grow("fit", word) for word in words]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(vocab) == FIRST_WORD + len(words)
    assert all(vocab.word(vocab.id("fit", word)) == ("fit", word) for word in words)


@given(st.lists(st.tuples(st.sampled_from(["fit", "material"]), st.text(min_size=1, max_size=12)), max_size=20))
def test_save_and_load_keep_every_id(tmp_path_factory, words):
    vocab = ReVocab(["fit", "material"])
    for field, value in words:
        if normalise(value):
            vocab.grow(field, value)
    path = tmp_path_factory.mktemp("vocab") / "re.json"
    vocab.save(path)
    loaded = ReVocab.load(path)
    assert loaded.words == vocab.words
    assert loaded.grow("fit", "after loading") == [len(vocab)]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"fields": ["a"]}',
        '{"fields": ["a"], "words": [["b", "x"]]}',
        '{"fields": ["a"], "words": [["a", "x"], ["a", "X"]]}',
    ],
)
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "std.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"std\.json"):
        StdVocab.load(path)


# --- aliases ----------------------------------------------------------------------------------------------------------

ALIASES = {("fit", "Over-sized"): ["oversized"], ("fit", "long h line blazer"): ["Long", "h-line", "blazer"]}


def product(number: int, *values: str) -> Product:
    return Product(product_id=str(number), title="t", re={"fit": list(values)})


def test_chains_are_followed_to_their_ends_and_repeats_dropped():
    aliases = {("f", "A"): ["b"], ("f", "b"): ["c", "d"], ("f", "d"): ["C"], ("g", "b"): ["x"]}
    assert resolve_aliases(aliases) == {
        ("f", "a"): ("c",),
        ("f", "b"): ("c",),
        ("f", "d"): ("c",),
        ("g", "b"): ("x",),
    }


def test_a_chain_may_be_longer_than_the_stack_of_python():
    resolved = resolve_aliases({("f", f"w{n}"): [f"w{n + 1}"] for n in range(5000)})
    assert set(resolved.values()) == {("w5000",)}


@pytest.mark.parametrize(
    ("aliases", "told"),
    [
        ({("f", "a"): ["A"]}, "a -> a goes in a circle"),
        ({("f", "x"): ["a"], ("f", "a"): ["y", "b"], ("f", "b"): ["a"]}, "a -> b -> a goes in a circle"),
        ({("f", "a"): []}, "'a' or what it would become"),
        ({("f", "a"): ["b", " - "]}, "'a' or what it would become"),
        ({("f", "-"): ["b"]}, "'-' or what it would become"),
        ({("f", "a"): ["b"], ("f", "A"): ["c"]}, "'A' becomes two different things"),
    ],
)
def test_aliases_that_cannot_be_are_refused_with_field_and_value(aliases, told):
    with pytest.raises(ValueError, match=f"f: {told}"):
        resolve_aliases(aliases)


@given(
    st.dictionaries(
        st.tuples(st.sampled_from("fg"), st.sampled_from("abcdefgh")),
        st.lists(st.sampled_from("abcdefghxyz"), min_size=1, max_size=3),
    )
)
def test_resolved_aliases_never_point_at_an_alias_and_resolve_to_themselves(aliases):
    try:
        resolved = resolve_aliases(aliases)
    except ValueError:
        return  # a circle: nothing else can be wrong with these
    assert resolved.keys() == aliases.keys()
    assert not {(field, target) for (field, _), targets in resolved.items() for target in targets} & resolved.keys()
    assert resolve_aliases(resolved) == resolved


@given(st.dictionaries(st.integers(0, 8), st.lists(st.integers(1, 4), min_size=1, max_size=3)))
def test_aliases_that_only_go_forward_are_no_circle(steps):
    aliases = {("f", f"w{at}"): [f"w{at + step}" for step in forward] for at, forward in steps.items()}
    assert resolve_aliases(aliases).keys() == aliases.keys()


def test_a_value_with_an_alias_gets_the_ids_of_what_it_stands_for_and_none_of_its_own():
    vocab = ReVocab(["fit"], ALIASES)
    ids = vocab.grow("fit", "LONG H-LINE BLAZER")
    assert [vocab.word(word_id) for word_id in ids] == [("fit", "long"), ("fit", "h line"), ("fit", "blazer")]
    assert vocab.grow("fit", "long h line blazer") == ids
    assert vocab.id("fit", "long h line blazer") == UNKNOWN
    assert vocab.ids({"fit": ["blazer", "long h line blazer", "oversized"]}) == [ids[2], ids[0], ids[1]]
    assert vocab.words_of({"fit": ["over sized", "new", ""]}) == [("fit", "oversized"), ("fit", "new")]


def test_grow_from_counts_a_product_once_for_all_spellings_of_a_word():
    vocab = ReVocab(["fit"], ALIASES)
    vocab.grow_from([product(1, "over sized", "oversized"), product(2, "long h line blazer"), product(3, "long")], 2)
    assert vocab.words[FIRST_WORD:] == [("fit", "long")]


def test_aliases_of_fields_that_left_the_schema_are_left_out():
    assert ReVocab(["material"], ALIASES).aliases == {}


def test_save_and_load_keep_the_aliases_and_a_file_without_them_loads(tmp_path):
    vocab, path = ReVocab(["fit"], ALIASES), tmp_path / "re.json"
    vocab.save(path)
    assert ReVocab.load(path).aliases == vocab.aliases
    path.write_text('{"fields": ["fit"], "words": [["fit", "long"]]}')
    assert ReVocab.load(path).ids({"fit": ["long"]}) == [FIRST_WORD]
    path.write_text('{"fields": ["fit"], "words": [], "aliases": [["fit", "a", ["a"]]]}')
    with pytest.raises(ValueError, match=r"re\.json.*circle"):
        ReVocab.load(path)
