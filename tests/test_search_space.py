"""The coordinates of the index: products with queries stay, lengths are one, and a real index finds more in them."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from search_space import SearchSpace
from store.vectors import OUTSTANDING, UNTOUCHED, USUAL


def catalogue(seed: int, items: int, dimensions: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose last column says that nobody met the item, and queries that weigh a few directions much."""
    random = np.random.default_rng(seed)
    rows = random.normal(size=(items, dimensions)).astype(np.float32)
    rows[:, -1] = random.random(items) < 0.2
    queries = random.normal(size=(40, dimensions)) * np.geomspace(1.0, 30.0, dimensions) + random.normal(
        size=dimensions
    )
    return rows, queries.astype(np.float32)


@given(st.integers(0, 1000), st.integers(2, 200), st.integers(2, 12))
def test_products_with_queries_stay_but_for_one_number(seed, items, dimensions):
    rows, queries = catalogue(seed, items, dimensions)
    space = SearchSpace.fit(rows, queries, dimensions - 1)
    placed, part = space.place(rows)
    assert placed.shape == (items, space.dimensions) == (items, dimensions + 1)
    np.testing.assert_array_equal(part == UNTOUCHED, rows[:, -1] > 0)
    for query in queries[:5]:
        difference = placed @ space.query(query) - rows @ query
        np.testing.assert_allclose(difference, difference[0], atol=1e-3 * np.linalg.norm(query))
    for one in (USUAL, OUTSTANDING, UNTOUCHED):
        lengths = np.linalg.norm(placed[part == one], axis=1)
        np.testing.assert_allclose(lengths, lengths[:1].repeat(len(lengths)), rtol=1e-3)


def test_the_longest_are_a_part_of_their_own_and_later_ones_join_them():
    rows, queries = catalogue(0, 1000, 8)
    rows[:, -1] = 0.0
    space = SearchSpace.fit(rows, queries, -1)
    placed, part = space.place(rows)
    assert (part == OUTSTANDING).sum() == 30
    length = np.linalg.norm(placed[:, :-1], axis=1)
    assert length[part == OUTSTANDING].min() >= length[part == USUAL].max()
    later, its_part = space.place(100 * rows[:1])
    assert its_part.tolist() == [OUTSTANDING]
    assert later[0, -1] == 0.0


def test_queries_alike_or_few_do_not_flatten_what_they_never_asked():
    rows, queries = catalogue(1, 50, 6)
    for few in (queries[:1], np.repeat(queries[:1], 9, axis=0)):
        space = SearchSpace.fit(rows, few, -1)
        placed, _ = space.place(rows)
        query = np.arange(6, dtype=np.float32)
        np.testing.assert_array_equal(np.argsort(placed @ space.query(query)), np.argsort(rows @ query))


def test_a_fresh_space_leaves_rows_as_they_are():
    rows, queries = catalogue(2, 20, 5)
    space = SearchSpace(5)
    placed, part = space.place(rows)
    np.testing.assert_array_equal(placed, np.pad(rows, ((0, 0), (0, 1))))
    np.testing.assert_array_equal(space.query(queries[0]), np.append(queries[0], 0.0))
    assert not part.any()
