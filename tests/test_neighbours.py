"""What sellers typed into other products: votes, examples and words, on catalogues so small that the answer is known."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catalog import RawProduct
from neighbours import Neighbours


def product(title: str, product_id: str = "p", price: float | None = None) -> RawProduct:
    return RawProduct(product_id=product_id, title=title, price=price)


SHIRTS = [(product(f"blue oxford shirt {n}", f"s{n}"), {"usage": ["formal"], "fit": ["slim"]}) for n in range(4)]
BOOTS = [(product(f"brown trail boots {n}", f"b{n}"), {"usage": ["outdoor"]}) for n in range(8)]


def test_near_copies_decide_and_the_rest_of_the_shop_hardly_counts():
    shop = Neighbours([*SHIRTS, *BOOTS])
    votes = shop.votes(product("blue oxford shirt"), "usage")
    assert votes["formal"] > 0.95
    assert sum(votes.values()) == pytest.approx(1.0)


def test_without_a_common_word_the_whole_shop_votes():
    votes = Neighbours([*SHIRTS, *BOOTS]).votes(product("teapot"), "usage")
    assert votes == pytest.approx({"formal": 4.5 / 13, "outdoor": 8.5 / 13})


def test_one_distant_neighbour_is_no_agreement():
    shop = Neighbours([(product("red evening gown with silk lining", "a"), {"usage": ["party"]}), *BOOTS])
    assert shop.votes(product("red flannel pyjamas for winter nights"), "usage")["party"] < 0.9


def test_a_like_price_is_nearer():
    dear = [(product("coat", f"d{n}", 900.0), {"band": ["luxury"]}) for n in range(3)]
    cheap = [(product("coat", f"c{n}", 30.0), {"band": ["budget"]}) for n in range(3)]
    shop = Neighbours([*dear, *cheap])
    for price, band in ((800.0, "luxury"), (25.0, "budget")):
        votes = shop.votes(product("coat", price=price), "band")
        assert max(votes, key=lambda value: votes[value]) == band
    assert 0.3 < shop.votes(product("coat"), "band")["luxury"] < 0.7


def test_a_field_that_no_seller_filled_in_has_no_votes():
    assert Neighbours(SHIRTS).votes(product("blue oxford shirt"), "season") == {}
    assert Neighbours([]).votes(product("blue oxford shirt"), "usage") == {}
    assert Neighbours([(product("silent"), {})]).votes(product("silent"), "usage") == {}


def test_examples_are_the_nearest_with_the_asked_fields_the_nearest_last():
    shop = Neighbours([*SHIRTS, *BOOTS])
    found = shop.examples(product("brown trail boots 3", "new"), ["usage"], 2)
    assert found[-1][0].product_id == "b3"
    assert found[-1][1] == {"usage": ["outdoor"]}
    assert [values for _, values in shop.examples(product("brown trail boots"), ["fit"], 9)] == [{"fit": ["slim"]}] * 4
    assert "b3" not in [raw.product_id for raw, _ in shop.examples(product("brown trail boots 3", "b3"), ["usage"], 20)]
    assert shop.examples(product("boots"), ["usage"], 0) == []


def test_words_that_sellers_typed_twice_into_one_field_only():
    typed = [
        (product("a", "1"), {"style": ["old money"], "fit": ["boxy"]}),
        (product("b", "2"), {"style": ["old money"], "fit": ["boxy"], "material": ["once"]}),
        (product("c", "3"), {"style": ["boxy"]}),  # two of three say it is a fit
    ]
    shop = Neighbours(typed)
    assert shop.words(["money", "boxy", "once"], ["style", "fit", "material"]) == [("style", "old money")]
    assert shop.words(["money"], ["fit"]) == []


@given(
    st.lists(st.tuples(st.text(min_size=1, max_size=12), st.sampled_from(["x", "y"])), max_size=6),
    st.text(min_size=1, max_size=12),
)
def test_any_title_gets_shares_that_sum_to_one(titles, asked):
    titles = [(title, value) for title, value in titles if "\x00" not in title]
    shop = Neighbours((product(title, str(n)), {"f": [value]}) for n, (title, value) in enumerate(titles))
    votes = shop.votes(RawProduct.model_construct(product_id="q", title=asked, price=None), "f")
    assert set(votes) == {value for _, value in titles}
    if votes:
        assert sum(votes.values()) == pytest.approx(1.0)
