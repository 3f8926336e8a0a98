"""What a context names comes first, in both languages, as far as there is any of it; and what names nothing changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catalog import FeatureSchema, RawProduct
from context_words import CLOSED_LIFT, NOTHING, OPEN_LIFT, ContextWords, Named
from lexicon import LEXICON, Lexicon
from readers import LexiconReader
from recommender import Answer, Recommender, Request
from settings import Settings
from store import Filters, Store
from tests.test_list_kinds import NOW, categories, ids
from text_encoder import TextEncoder
from vocab import ReVocab, StdVocab

SCHEMA = FeatureSchema(
    std={"category": ["coat", "dress", "sneakers", "jeans"], "colour": ["black", "white", "grey"], "gender": ["men", "women"]},
    re=["material", "occasion"],
)  # fmt: skip
WORDS = ContextWords(SCHEMA)


# --- reading
@pytest.mark.parametrize(
    ("context", "std", "re"),
    [
        ("black wool coat", {"category": ["coat"], "colour": ["black"]}, {"material": ["wool"]}),
        ("흰색 운동화", {"category": ["sneakers"], "colour": ["white"]}, {}),
        ("남자 청바지를 찾아요", {"category": ["jeans"], "gender": ["men"]}, {"material": ["denim"]}),
        ("Something in GREY?", {"colour": ["grey"]}, {}),
        ("a dress in white or black, or a coat", {"category": ["dress", "coat"], "colour": ["white", "black"]}, {}),
        ("원피스나 코트", {"category": ["dress", "coat"]}, {}),
        ("a black coat dress", {"category": ["dress"], "colour": ["black"]}, {}),  # which is a dress, as of a product
    ],
)
def test_values_are_named_in_korean_and_english_and_spelt_as_the_schema_does(context, std, re):
    assert WORDS.named(context) == Named(std, re)


@pytest.mark.parametrize(
    "context",
    ["", "  ", "wedding guest", "linen", "no black please", "anything but a coat", "검정 말고 아무거나", "운동화 빼고"],
)
def test_a_context_without_a_closed_value_or_with_what_is_not_wanted_names_nothing(context):
    assert not WORDS.named(context)
    assert WORDS.named(context) == NOTHING


@given(st.text(max_size=80))
def test_any_text_can_be_read(context):
    named = WORDS.named(context)
    assert all(set(values) <= set(SCHEMA.std[name]) for name, values in named.std.items())
    assert bool(named) or named == NOTHING


def test_the_lift_counts_what_a_product_has_and_the_category_more_than_the_rest():
    std, re = StdVocab(SCHEMA), ReVocab(SCHEMA.re)
    re.grow("material", "wool")
    have = [
        {"category": ["coat"], "colour": ["black"]}, {"category": ["coat"], "colour": ["grey"]},
        {"category": ["dress"], "colour": ["black"]}, {"category": ["dress"], "colour": ["white"]}, {},
    ]  # fmt: skip
    std_ids = np.array([[*std.ids(product), 0, 0][:2] for product in have])
    re_ids = np.array([[re.id("material", "wool")], [0], [0], re.ids({"material": ["wool"]}), [0]])
    named = WORDS.named("black wool coat")
    lift = named.lift(std_ids, re_ids, std, re, "category")
    assert lift.tolist() == [3 * CLOSED_LIFT + OPEN_LIFT, 2 * CLOSED_LIFT, CLOSED_LIFT, OPEN_LIFT, 0.0]
    assert named.but(["category"]).lift(std_ids, re_ids, std, re, "category")[1] == 0.0
    unknown = Named({"category": ["hat"]}, {"material": ["silk"]})  # an id that says "unknown" is nobody's
    assert not unknown.lift(np.full((5, 2), 1), np.full((5, 1), 1), std, re, "category").any()


def test_a_schema_is_compiled_once_for_all_its_releases_and_before_anybody_asks(asked, monkeypatch):
    store, recommender = asked
    schema, loaded = store.schema(), recommender.live()
    assert loaded.context_words is ContextWords.of_schema(FeatureSchema(std=schema.std, re=schema.re))
    assert loaded.context_words is not ContextWords.of_schema(SCHEMA)
    monkeypatch.setattr(loaded, "context_words", ContextWords(schema))
    recommender.refresh()
    monkeypatch.setattr(Lexicon, "load", lambda path: pytest.fail("compiled by a request"))
    assert loaded.context_words.named(schema.std["category"][0])


# --- lists
@pytest.fixture(scope="module")
def asked(shop: Settings) -> Iterator[tuple[Store, Recommender]]:
    with Store.open(shop) as store:
        yield store, Recommender(store, shop, TextEncoder.load(shop))


def having(store: Store, answer: Answer, **wanted: str) -> list[bool]:
    of = {product.product_id: product.std for product in store.products.read_features()}
    return [all(value in of[item].get(name, []) for name, value in wanted.items()) for item in ids(answer)]


def common(store: Store, *fields: str) -> dict[str, str]:
    """The values of these fields that most products have together."""
    of = [product.std for product in store.products.read_features()]
    together = [tuple(std[name][0] for name in fields) for std in of if all(std.get(name) for name in fields)]
    values = max(sorted(set(together)), key=together.count)
    return dict(zip(fields, values, strict=True))


def test_all_that_has_what_is_named_comes_first_and_the_list_is_full_all_the_same(asked):
    store, recommender = asked
    wanted = common(store, "category", "colour")
    answer = recommender.recommend(Request(context=" ".join(wanted.values()), k=100, now=NOW))
    assert len(answer.items) == 100
    both = having(store, answer, **wanted)
    there = sum(
        all(value in product.std.get(name, []) for name, value in wanted.items())
        for product in store.products.read_features()
    )
    assert sum(both) == there
    assert both == sorted(both, reverse=True)
    # What is of the category alone follows before what is of the colour alone.
    of_category = having(store, answer, category=wanted["category"])
    assert of_category == sorted(of_category, reverse=True)
    reason = next(reason for reason in answer.items[0].reasons if reason.kind == "context")
    assert (reason.field, reason.value) == ("category", wanted["category"])
    assert reason.weight > CLOSED_LIFT


def test_a_context_that_names_nothing_and_a_shop_that_does_not_want_it_are_answered_as_ever(asked, shop):
    store, recommender = asked
    without = Recommender(store, shop.model_copy(update={"context_words": False}), recommender.text_encoder)
    category = common(store, "category")["category"]
    for context, same in (("a day by the sea", True), (category, False)):
        request = Request(context=context, k=20, now=NOW)
        assert (ids(without.recommend(request)) == ids(recommender.recommend(request))) == same


def test_a_filter_on_the_field_says_more_than_the_context(asked, shop):
    store, recommender = asked
    named = common(store, "category")["category"]
    other = next(value for value in sorted(store.schema().std["category"]) if value != named)
    request = Request(context=named, filters=Filters(std={"category": [other]}), k=10, now=NOW)
    answer = recommender.recommend(request)
    assert answer.items
    assert all(having(store, answer, category=other))
    either = replace(request, filters=Filters(std={"category": [named, other]}))
    without = Recommender(store, shop.model_copy(update={"context_words": False}), recommender.text_encoder)
    assert ids(recommender.recommend(either)) == ids(without.recommend(either))


def test_because_of_a_product_what_is_named_comes_first_too(asked):
    store, recommender = asked
    of = categories(store)
    named = common(store, "category")["category"]
    anchor = next(product_id for product_id in sorted(of) if named not in of[product_id])
    request = Request(kind="because", product_id=anchor, k=10, now=NOW)
    plain, told = recommender.recommend(request), recommender.recommend(replace(request, context=named))
    assert all(having(store, told, category=named))
    assert not all(having(store, plain, category=named))
    weights = {reason.kind: reason.weight for item in told.items for reason in item.reasons}
    assert weights["because"] < CLOSED_LIFT < weights["context"]  # each is told what it did, and no more
    likeness = recommender.recommend(replace(request, kind="similar", context=named))
    assert ids(likeness) == ids(recommender.recommend(replace(request, kind="similar")))


def test_a_product_put_a_moment_ago_is_found_by_what_is_named(new_shop):
    with new_shop() as shop, Store.open(shop) as store:
        recommender = Recommender(store, shop, TextEncoder.load(shop))
        schema = store.schema()
        rare = min(schema.std["category"], key=lambda value: sum(value in of for of in categories(store).values()))
        raw = RawProduct(product_id="just-in", title="Just in", attributes={"category": rare})
        recommender.put_products([raw], LexiconReader(Lexicon.load(LEXICON)))
        answer = recommender.recommend(Request(context=rare, k=100))
        assert "just-in" in ids(answer)[: sum(having(store, answer, category=rare))]
