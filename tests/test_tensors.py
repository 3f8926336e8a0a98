"""Products, histories and profiles as tensors, on data small enough to know every number."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from catalog import FeatureSchema, Product
from item_links import SHRINKAGE, ItemLinks
from store import EventLog
from tensors import (
    DAY,
    ITEM_DENSE,
    LINK_SCALE,
    MOST_OF_A_DAY,
    Candidates,
    Histories,
    ItemLayout,
    LinkWeights,
    Past,
    Popularity,
    PriceScale,
    ProfileScaler,
    TextScaler,
    distinct,
    item_dense_names,
    item_features,
    log_strength,
    most_common_ids,
    re_row,
    rerank_batch,
    std_row,
)
from text_encoder import Ragged
from vocab import ReVocab, StdVocab

SCHEMA = FeatureSchema(std={"category": ["shirt", "dress"], "colour": ["white", "navy", "red"]}, re=["fit", "material"])
SHIRT = Product(
    product_id="s",
    title="linen shirt",
    std={"category": ["shirt"], "colour": ["navy", "red"]},
    re={"material": ["linen"]},
)
DRESS = Product(product_id="d", title="", std={"category": ["dress"]}, re={})


def vocabularies() -> tuple[StdVocab, ReVocab]:
    std, re = StdVocab(SCHEMA), ReVocab(SCHEMA.re)
    re.grow_from([SHIRT, DRESS])
    return std, re


def log(events):
    """An event log from (user, product, kind, day)."""
    events = sorted(events, key=lambda event: (event[3], event[0], event[1]))
    columns = [sorted({event[column] for event in events}) for column in range(3)]
    numbers = [
        np.array([columns[column].index(event[column]) for event in events], dtype=np.int32) for column in range(3)
    ]
    at = np.array([event[3] * DAY for event in events])
    return EventLog(
        columns[0],
        columns[1],
        columns[2],
        [""],
        *numbers[:2],
        numbers[2].astype(np.int8),
        at,
        np.zeros(len(events), dtype=np.int32),
    )


# --------------------------------------------------------------------------------------------------------------- items
def test_a_row_has_a_slot_for_every_field_and_zeros_where_nothing_is():
    std, re = vocabularies()
    layout = ItemLayout.fit([SHIRT, DRESS], std, re)
    assert layout.std_slots == {"category": 1, "colour": 2}
    assert std_row(SHIRT, std, layout) == [
        std.id("category", "shirt"),
        std.id("colour", "navy"),
        std.id("colour", "red"),
    ]
    assert std_row(DRESS, std, layout) == [std.id("category", "dress"), 0, 0]
    assert re_row(DRESS, re, layout) == [0]


def test_a_value_that_is_read_as_several_words_has_a_slot_for_each():
    std, _ = vocabularies()
    re = ReVocab(SCHEMA.re, {("material", "Linen"): ["flax", "cool"]})
    re.grow_from([SHIRT])
    layout = ItemLayout.fit([SHIRT], std, re)
    assert re_row(SHIRT, re, layout) == [re.id("material", "flax"), re.id("material", "cool")]


def test_a_batch_drops_padding_columns_and_masks_missing_tokens():
    std, re = vocabularies()
    layout = ItemLayout.fit([SHIRT, DRESS], std, re)
    titles = Ragged(np.arange(8, dtype=np.float16).reshape(4, 2), np.array([0, 3, 3]))
    features = item_features([SHIRT, DRESS, DRESS], std, re, layout, titles, np.array([0, 1, 1]))
    batch = features.batch(np.array([1, 0]))
    assert batch.std.shape == (2, 3)
    assert batch.tokens.shape == (2, 3, 2)
    assert batch.token_mask.tolist() == [[False] * 3, [True] * 3]
    assert batch.tokens[1].tolist() == [[0, 1], [2, 3], [4, 5]]
    alone = features.batch(np.array([1]))
    assert alone.std.shape == (1, 1)
    assert alone.token_mask.tolist() == [[False]]


@given(st.lists(st.text(max_size=3), max_size=12))
def test_distinct_gives_each_text_its_row(texts):
    unique, rows = distinct(texts)
    assert [unique[row] for row in rows] == texts
    assert len(set(unique)) == len(unique)


# ------------------------------------------------------------------------------------------------------------ profiles
def test_z_scores_use_training_statistics_and_flag_what_is_missing():
    scaler = ProfileScaler.fit([{"height_cm": 160.0, "weight_kg": 50.0}, {"height_cm": 180.0, "weight_kg": 70.0}])
    assert scaler.fields == ["height_cm", "weight_kg"]
    rows = scaler.transform([{"height_cm": 180.0}, {}, {"height_cm": 9999.0, "shoe": 42.0}])
    assert rows.tolist() == [[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0], [4.0, 0.0, 0.0, 1.0]]


def test_a_typing_error_leaves_the_statistics_of_all_others_as_they_are():
    heights = [{"height_cm": float(height)} for height in range(150, 191)]
    scaler = ProfileScaler.fit([*heights, {"height_cm": 16500.0}, {"height_cm": 1.65}])
    assert scaler == ProfileScaler.fit(heights)
    rarely = ProfileScaler.fit([*[{"bust": 36.0}] * 5, {"bust": 38.0}])  # most are the same: nobody knows what is far
    assert rarely.mean[0] > 36.0


def test_what_of_a_profile_will_not_count_as_it_is_meant_is_said():
    scaler = ProfileScaler.fit([{"height_cm": 160.0, "weight_kg": 50.0}, {"height_cm": 180.0, "weight_kg": 70.0}])
    assert scaler.doubts({"height_cm": 210.0, "weight_kg": 20.0}) == []
    assert scaler.doubts({"height_cm": 1.65, "height": 165.0}) == [
        "profile field 'height_cm': 1.65 is far from what shoppers have (170 on average) and counts as 130; is it in another unit?",
        "profile field 'height' is unknown to the release, and ignored; it knows height_cm, weight_kg",
    ]
    assert scaler.far_off([{"height_cm": 1.65}, {"height_cm": 165.0, "weight_kg": 900.0}, {"height_cm": 17.0}]) == {
        "height_cm": [1.65, 17.0], "weight_kg": [900.0],
    }  # fmt: skip
    assert ProfileScaler.fit([]).doubts({"height_cm": 165.0}) == [
        "profile field 'height_cm' is unknown to the release, and ignored; it knows no field"
    ]


def test_a_constant_field_says_nothing_and_divides_by_nothing():
    scaler = ProfileScaler.fit([{"age": 30.0}, {"age": 30.0}])
    assert scaler.transform([{"age": 30.0}]).tolist() == [[0.0, 0.0]]


@given(st.lists(st.dictionaries(st.sampled_from(["a", "b"]), st.floats(-1e6, 1e6)), max_size=6))
def test_scaled_profiles_are_always_finite(profiles):
    rows = ProfileScaler.fit(profiles).transform(profiles)
    assert rows.shape[0] == len(profiles)
    assert np.isfinite(rows).all()


# ---------------------------------------------------------------------------------------------------------- popularity
def test_texts_in_a_narrow_cone_are_told_apart_after_scaling():
    torch.manual_seed(0)
    texts = torch.nn.functional.normalize(1.0 + 0.1 * torch.randn(20, 16), dim=1)
    assert (texts @ texts.T).min() > 0.9
    scaler = TextScaler(16)
    scaler.fit(texts)
    scaled = torch.nn.functional.normalize(scaler(texts), dim=1)
    assert (scaled @ scaled.T).mean() == pytest.approx(0.0, abs=0.1)
    assert scaler(texts).std(0).mean() == pytest.approx(1.0)


@pytest.mark.parametrize("texts", [torch.zeros(0, 4), torch.ones(1, 4), torch.ones(5, 4)])
def test_texts_that_do_not_differ_are_left_as_they_are(texts):
    scaler = TextScaler(4)
    scaler.fit(texts)
    assert torch.equal(scaler(texts), texts)


def test_counts_are_of_the_window_before_the_moment():
    item = np.array([0, 0, 0, 1])
    at = np.array([0.0, 5.0, 9.0, 9.0]) * DAY
    popularity = Popularity.fit(item, at, np.full(3, np.nan), [(2.0, 0.0), (100.0, 0.0)])
    assert popularity.counts(np.arange(3), 10 * DAY, 2.0).tolist() == [1, 1, 0]
    assert popularity.counts(np.arange(3), 10 * DAY, 100.0).tolist() == [3, 1, 0]
    assert popularity.counts(np.arange(3), 9 * DAY, 100.0).tolist() == [2, 0, 0]  # the moment itself is not past
    assert popularity.counts(np.arange(3), 10 * DAY, 100.0, 2.0).tolist() == [2, 0, 0]  # what the two windows differ by
    assert popularity.counts(np.arange(3), -50 * DAY, 1.0).tolist() == [0, 0, 0]
    assert popularity.counts(np.arange(3), 9999 * DAY, 1.0).tolist() == [0, 0, 0]


def test_the_last_coordinate_says_that_nothing_happened_yet():
    popularity = Popularity.fit(np.array([0]), np.array([5.0 * DAY]), np.array([np.nan, 4 * DAY]), [(7.0, 0.0)])
    assert popularity.coordinates(np.arange(2), 5 * DAY)[:, -1].tolist() == [1.0, 1.0]
    later = popularity.coordinates(np.arange(2), 6 * DAY)
    assert later[:, -1].tolist() == [0.0, 1.0]
    assert later[1, 1] == pytest.approx(np.log1p(2.0) / 6.0)  # the known arrival, two days ago


@given(
    hnp.arrays(np.int64, st.integers(0, 30), elements=st.integers(0, 4)),
    st.data(),
    st.integers(-3 * 4, 40 * 4).map(
        lambda quarters: quarters / 4
    ),  # of a day: exact as floats, so that no edge is a matter of rounding
    st.integers(1, 20 * 4).map(lambda quarters: quarters / 4),
)
def test_counts_equal_plain_counting(item, data, as_of, days):
    at = np.array(data.draw(st.lists(st.integers(0, 30), min_size=len(item), max_size=len(item)))) * DAY
    popularity = Popularity.fit(item, at, np.full(5, np.nan), [(days, 0.0)])
    inside = (at < as_of * DAY) & (at >= (as_of - days) * DAY)
    assert (
        popularity.counts(np.arange(5), as_of * DAY, days).tolist() == np.bincount(item[inside], minlength=5).tolist()
    )


# ----------------------------------------------------------------------------------------------------------- histories
EVENTS = [
    ("u", "a", "view", 1),
    ("u", "b", "view", 2),
    ("u", "c", "purchase", 2),
    ("u", "a", "purchase", 3),
    ("v", "a", "view", 1),
]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=20),
    st.lists(st.integers(0, 3), max_size=5), st.integers(0, 6),
)  # fmt: skip
def test_every_event_of_some_users_is_given_one_after_the_other(events, asked, day):
    everybody = [*events, *((user, 9) for user in range(4))]
    histories = Histories.build(log([(f"u{user}", "a", "view", at) for user, at in everybody]), ["a"])
    moment = day * DAY
    of, row = histories.of_users(np.array(asked, dtype=np.int64), moment)
    expected = [
        (place, int(number))
        for place, user in enumerate(asked)
        for number in np.flatnonzero((histories.user == user) & (histories.at < moment))
    ]
    assert list(zip(of.tolist(), row.tolist(), strict=True)) == expected


def test_history_is_what_came_strictly_before():
    histories = Histories.build(log(EVENTS), ["a", "b", "c"])
    assert histories.item.tolist() == [0, 1, 2, 0, 0]
    index = histories.before(np.array([0, 1, 2, 3]), length=10)
    assert index.mask.sum(1).tolist() == [0, 1, 1, 3]  # b and c share a day: neither is history of the other


def test_a_basket_stands_in_each_others_history_without_the_item_itself():
    histories = Histories.build(log(EVENTS), ["a", "b", "c"])
    index = histories.before(np.array([1, 2]), length=10, with_basket=True)
    seen = [histories.item[row][mask].tolist() for row, mask in zip(index.index, index.mask, strict=True)]
    assert seen == [[0, 2], [0, 1]]


def test_histories_keep_the_latest_events():
    histories = Histories.build(log([("u", f"p{n}", "view", n) for n in range(6)]), [f"p{n}" for n in range(6)])
    index = histories.before(np.array([5]), length=3)
    assert histories.item[index.index[0]].tolist() == [2, 3, 4]


def test_first_meetings_and_the_strongest_kind():
    histories = Histories.build(log(EVENTS), ["a", "b", "c"])
    assert histories.first_meeting.tolist() == [True, True, True, False, True]
    assert histories.weight.tolist() == [4.0, 1.0, 4.0, 4.0, 1.0]


SKIPPED = [
    ("u", "a", "skip", 1),
    ("u", "a", "purchase", 2),
    ("u", "b", "skip", 3),
    ("u", "c", "wishlist", 4),
    ("u", "c", "view", 5),
]


def test_a_skip_is_history_but_no_sign_of_interest():
    histories = Histories.build(log(SKIPPED), ["a", "b", "c"])
    assert histories.item.tolist() == [0, 0, 1, 2, 2]
    assert histories.kind.tolist() == [5, 4, 5, 0, 1]  # a skip has a kind of its own, for the tower to read
    assert histories.worth.tolist() == [0.0, 1.0, 0.0, 1.0, 1.0]
    assert histories.first_meeting.tolist() == [False, True, False, True, False]  # a skip is no meeting
    assert histories.weight.tolist() == [4.0, 4.0, 0.0, 1.0, 1.0]
    nowhere = Popularity.fit(histories.item, histories.at, np.full(3, np.nan), [(99.0, 0.0)], histories.worth)
    assert nowhere.counts(np.arange(3), 100 * DAY, 100.0).tolist() == [1, 0, 2]
    assert nowhere.coordinates(np.arange(3), 100 * DAY)[:, -1].tolist() == [0.0, 1.0, 0.0]  # b was never wanted


def test_a_page_that_one_shopper_loads_in_a_loop_is_no_crowd():
    loop = [("robot", "a", "view", 1 + minute / 1440) for minute in range(300)]
    others = [
        ("robot", "a", "view", 2),
        ("robot", "a", "purchase", 1.5),
        ("robot", "b", "view", 1.5),
        ("v", "a", "view", 1),
    ]
    histories = Histories.build(log([*loop, *others]), ["a", "b"])
    popularity = Popularity.fit(histories.item, histories.at, np.full(2, np.nan), [(99.0, 0.0)], histories.worth)
    assert popularity.counts(np.arange(2), 100 * DAY, 100.0).tolist() == [MOST_OF_A_DAY + 3, 1]
    assert histories.first_meeting.sum() == 3


def test_a_skip_links_nothing():
    """Both shoppers had a and b before them; one of them skipped b, and took it in the end."""
    events = [
        ("u", "a", "view", 1),
        ("u", "b", "view", 2),
        ("v", "a", "view", 1),
        ("v", "b", "skip", 2),
        ("v", "b", "cart", 9),
    ]
    histories = Histories.build(log(events), ["a", "b"])
    strengths = [ItemLinks.before(histories, day * DAY, np.arange(2)).together[0, 1] for day in (3, 10)]
    np.testing.assert_allclose(
        strengths, [1 / np.sqrt((2 + SHRINKAGE) * (1 + SHRINKAGE)), 2 / (2 + SHRINKAGE)], rtol=1e-6
    )


def test_what_a_kind_counts_can_be_said():
    weights = {"wishlist": 3.0, "view": 0.0, "skip": -1.0}
    histories = Histories.build(log(SKIPPED), ["a", "b", "c"], weights)
    assert histories.worth.tolist() == [-1.0, 1.0, -1.0, 3.0, 0.0]
    assert histories.first_meeting.tolist() == [False, True, False, True, False]
    assert histories.weight.tolist() == [4.0, 4.0, 0.0, 3.0, 3.0]
    popularity = Popularity.fit(histories.item, histories.at, np.full(3, np.nan), [(99.0, 0.0)], histories.worth)
    assert popularity.counts(np.arange(3), 100 * DAY, 100.0).tolist() == [1, 0, 3]
    assert popularity.counts(np.arange(3), 5 * DAY, 2.0).tolist() == [0, 0, 3]


@given(
    st.lists(
        st.tuples(
            *[
                st.sampled_from("uvw"),
                st.sampled_from("abc"),
                st.sampled_from(["view", "cart", "own"]),
                st.integers(0, 9),
            ]
        ),
        min_size=1,
    ),
    st.integers(0, 10),
)
def test_without_skips_everything_is_as_if_kinds_had_no_worth(events, as_of):
    """Every event counts one: first meetings, counts and coordinates are those of plain counting."""
    histories = Histories.build(log(events), ["a", "b", "c"])
    met = set()
    for row in range(len(histories.item)):
        pair = (int(histories.user[row]), int(histories.item[row]))
        assert histories.first_meeting[row] == (pair not in met)
        met.add(pair)
    popularity = Popularity.fit(histories.item, histories.at, np.full(3, np.nan), [(5.0, 0.0)], histories.worth)
    inside = (histories.at < as_of * DAY) & (histories.at >= (as_of - 5) * DAY)
    counts = np.bincount(histories.item[inside], minlength=3)
    found = popularity.coordinates(np.arange(3), as_of * DAY)[:, 0]
    assert found.tobytes() == (np.log1p(counts) / 4.0).astype(np.float32).tobytes()


def test_events_on_products_without_features_are_left_out():
    histories = Histories.build(log(EVENTS), ["b"])
    assert histories.item.tolist() == [0]
    assert histories.starts.tolist() == [0, 1, 1]


# ----------------------------------------------------------------------------------------------------------- reranking
def test_most_common_ids_by_count_then_id():
    assert most_common_ids(np.array([[0, 5, 4, 5, 0, 9], [0, 0, 0, 0, 0, 0]]), 4).tolist() == [
        [5, 4, 9, 0],
        [0, 0, 0, 0],
    ]
    assert most_common_ids(np.zeros((1, 0), dtype=np.int64), 2).tolist() == [[0, 0]]


@given(hnp.arrays(np.int64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.integers(0, 6)))
def test_most_common_ids_are_those_of_a_count(ids: np.ndarray):
    for row, found in zip(ids, most_common_ids(ids, 4), strict=True):
        times = Counter(row[row > 0].tolist())
        expected = sorted(times, key=lambda one: (-times[one], one))[:4]
        assert found.tolist() == expected + [0] * (4 - len(expected))


def test_an_unknown_price_is_the_centre():
    prices = PriceScale.fit(np.array([10.0, 20.0, np.nan]))
    assert prices.transform(np.array([np.nan]))[0] == 0.0
    assert prices.transform(np.array([10.0]))[0] == pytest.approx(-1.0)


def test_the_price_of_a_product_that_nobody_met_is_not_used():
    """And retrieval's score is a logit, less the mean of its list, never stretched."""
    one = np.ones((1, 2, 1), dtype=np.int64)
    rows = np.zeros((1, 2, 3), dtype=np.float32)
    rows[0, 1, 1] = 1.0  # the last popularity coordinate of the second: untouched
    none = np.zeros((1, 2), dtype=np.float32)
    candidates = Candidates(rows[:, 0], rows, np.array([[5.0, -1.0]]), none, none, one, one, np.full((1, 2), np.e - 1))
    past = Past(
        np.zeros((1, 1, 1), dtype=np.float32), np.ones((1, 1), dtype=bool), one[:, :1], one[:, :1], np.array([[0.0]]),
        np.zeros((1, 0), dtype=np.float32),
    )  # fmt: skip
    dense = rerank_batch(candidates, past, PriceScale(0.0, 1.0), item_width=1, popularity_width=1).item_dense.numpy()
    names = item_dense_names(1)
    assert dense[0, :, names.index("log_price")].tolist() == [1.0, 0.0]
    assert dense[0, :, names.index("price_gap")].tolist() == [1.0, 0.0]
    assert dense[0, :, names.index("retrieval")].tolist() == [3.0, -3.0]


@given(st.lists(st.floats(0.0, 50.0), min_size=1, max_size=6), st.floats(0.0, 9.0), st.floats(0.0, 9.0))
def test_links_gain_by_the_logarithm_of_their_strength(strengths, together, variant):
    strength = np.array([strengths], dtype=np.float32)
    of_variant = (np.arange(len(strengths)) % 2).astype(np.float32)[None]
    expected = together * np.log1p(LINK_SCALE * strength) + variant * of_variant
    gain = LinkWeights(together, variant).gain(strength, of_variant)
    assert gain.dtype == np.float32
    np.testing.assert_allclose(gain, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(log_strength(strength), np.log1p(LINK_SCALE * strength), rtol=1e-5)


def test_links_reach_the_reranker_under_their_names():
    """Two lists of three candidates; strengths by their logarithm, so that strong ones do not drown the rest."""
    one = np.ones((2, 3, 1), dtype=np.int64)
    together = np.array([[0.0, 0.1, 0.7], [0.3, 0.0, 0.0]], dtype=np.float32)
    variant = np.array([[0.0, 1.0, 0.0], [1.0, 1.0, 0.0]], dtype=np.float32)
    rows = np.zeros((2, 3, 4), dtype=np.float32)
    candidates = Candidates(rows[:, 0], rows, np.zeros((2, 3)), together, variant, one, one, np.full((2, 3), np.nan))
    past = Past(
        np.zeros((2, 1, 2), dtype=np.float32), np.zeros((2, 1), dtype=bool), one[:, :1], one[:, :1], np.full((2, 1), np.nan),
        np.zeros((2, 0), dtype=np.float32),
    )  # fmt: skip
    dense = rerank_batch(candidates, past, PriceScale(0.0, 1.0), item_width=2, popularity_width=1).item_dense.numpy()
    names = item_dense_names(1)
    assert dense.shape == (2, 3, len(names))
    np.testing.assert_allclose(dense[:, :, names.index("together")], np.log1p(LINK_SCALE * together), rtol=1e-6)
    np.testing.assert_array_equal(dense[:, :, names.index("variant")], variant)
    others = [number for number, name in enumerate(names) if name not in ("together", "variant", "log_rank")]
    assert not dense[:, :, others].any()
    assert set(names) > set(ITEM_DENSE)
