"""Item vectors: what a search finds is what numpy finds, and as much as was asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial

import numpy as np
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from catalog import Event, Product, RawProduct, User
from settings import Settings
from store import Filters, History, ItemRows, Store, UserState, vectors
from store.products import put_features
from tests.serving import eventually

RELEASE = "20260101-120000"
N, D = 600, 8
IDS = [f"p{number:03d}" for number in range(N)]
LIMIT = 40
FEW = 50  # products that a filter may keep and be answered exactly
RANDOM = np.random.default_rng(0)
CENTRES = RANDOM.normal(size=(12, D))
CLUSTER = np.arange(N) % 12
VECTORS = (CENTRES[CLUSTER] + 0.3 * RANDOM.normal(size=(N, D))).astype(np.float32)
QUERIES = (CENTRES[:6] + 0.1 * RANDOM.normal(size=(6, D))).astype(np.float32)
STD_IDS = np.stack([CLUSTER, np.zeros(N, dtype=int)], axis=1).astype(np.int32)
RE_IDS = np.arange(3 * N, dtype=np.int32).reshape(N, 3)

LINKED = "linked"
OTHERS = np.stack([RANDOM.permutation(np.delete(np.arange(N), i))[:12] for i in range(N)])
STRENGTH = RANDOM.random(OTHERS.shape).astype(np.float32)
WEIGHTS = (8.0, 3.0)  # of log(1 + SCALE * strength), of a variant
SCALE = 5.0


def rows(numbers) -> ItemRows:
    numbers = list(numbers)
    return ItemRows([IDS[number] for number in numbers], VECTORS[numbers], STD_IDS[numbers], RE_IDS[numbers])


def with_links(numbers) -> ItemRows:
    names = [[IDS[other] for other in OTHERS[number]] for number in numbers]
    return replace(rows(numbers), linked=names, link_strength=STRENGTH[list(numbers)].tolist())


def import_products(store: Store, numbers) -> None:
    """Product i costs i (every tenth has no price), is in stock if i is even, and carries its cluster as a feature."""
    with store.importing(source="test") as batch:
        batch.products(
            RawProduct(product_id=IDS[i], title="t", price=None if i % 10 == 9 else i, in_stock=i % 2 == 0)
            for i in numbers
        )
        batch.features(
            Product(product_id=IDS[i], title="t", std={"cluster": [f"c{CLUSTER[i]}"], "all": ["yes"]}) for i in numbers
        )


def open_url(url: str) -> Store:
    return Store.open(Settings(database_url=url, _env_file=None))


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(vectors, "EXACT_FACTOR", FEW / math.sqrt(LIMIT * N))


@pytest.fixture(scope="module")
def template(new_database) -> Iterator[str]:
    """The name of a database with N products with vectors."""
    with new_database("empty_store") as url:
        with open_url(url) as store:
            import_products(store, range(N))
            store.vectors.create(RELEASE, D)
            store.vectors.copy(RELEASE, rows(range(0, N, 2)))
            store.vectors.copy(RELEASE, rows(range(1, N, 2)))
        yield str(conninfo_to_dict(url)["dbname"])


@pytest.fixture(scope="module")
def indexed_template(template, new_database) -> Iterator[str]:
    with new_database(template) as url:
        with open_url(url) as store:
            store.vectors.build_index(RELEASE)
        yield str(conninfo_to_dict(url)["dbname"])


@pytest.fixture(scope="module")
def linked_template(template, new_database) -> Iterator[str]:
    """The first half of the products are variants of each other, three by three; release LINKED has links as well."""
    with new_database(template) as url:
        with open_url(url) as store:
            with store.pool.connection() as connection:
                for i in range(N // 2):
                    connection.execute(
                        "UPDATE products SET group_id = %s WHERE product_id = %s", (f"g{i // 3}", IDS[i])
                    )
            store.vectors.create(LINKED, D)
            store.vectors.copy(LINKED, with_links(range(N)))
        yield str(conninfo_to_dict(url)["dbname"])


@pytest.fixture
def linked(linked_template, new_database) -> Iterator[Store]:
    """N products with vectors, links and variants, not indexed."""
    with new_database(linked_template) as url, open_url(url) as store:
        yield store


@pytest.fixture
def shop(template, new_database) -> Iterator[Store]:
    """N products with vectors, not indexed."""
    with new_database(template) as url, open_url(url) as store:
        yield store


@pytest.fixture
def indexed(indexed_template, new_database) -> Iterator[Store]:
    """N products with vectors and their index."""
    with new_database(indexed_template) as url, open_url(url) as store:
        yield store


def best(query: np.ndarray, numbers) -> list[str]:
    numbers = np.array(list(numbers), dtype=int)
    scores = VECTORS[numbers] @ query
    return [IDS[number] for number in numbers[np.argsort(-scores)][:LIMIT]]


def push(store: Store, *settings: str) -> None:
    """Change server settings for the connections to come."""
    with store.pool.connection() as connection:
        for setting in settings:
            connection.execute(f"ALTER DATABASE {connection.info.dbname} SET {setting}")


def scores_of(found, query) -> np.ndarray:
    return VECTORS[[IDS.index(product_id) for product_id in found.product_ids]] @ query


# --- rows -------------------------------------------------------------------------------------------------------------


def test_rows_are_fetched_in_the_order_asked(shop):
    found = shop.vectors.fetch(RELEASE, ["p005", "nobody", "p001", "p300"])
    assert found.product_ids == ["p005", "p001", "p300"]
    np.testing.assert_array_equal(found.vectors, VECTORS[[5, 1, 300]])
    np.testing.assert_array_equal(found.std_ids, STD_IDS[[5, 1, 300]])
    np.testing.assert_array_equal(found.re_ids, RE_IDS[[5, 1, 300]])
    assert (found.vectors.dtype, found.std_ids.dtype) == (np.float32, np.int32)
    assert shop.vectors.fetch(RELEASE, ["nobody"]).product_ids == []


def test_rows_may_have_no_ids_at_all(shop):
    none = np.zeros((N, 0), dtype=np.int32)
    shop.vectors.create("bare", D)
    shop.vectors.copy("bare", ItemRows(IDS, VECTORS, none, none))
    assert shop.vectors.fetch("bare", IDS[:3]).re_ids.shape == (3, 0)
    assert shop.vectors.search("bare", QUERIES[0], LIMIT).std_ids.shape == (LIMIT, 0)


@pytest.mark.parametrize("dimensions", [232, 600])
def test_vectors_stay_in_their_rows_however_long_the_links_are(shop, dimensions):
    """Read from elsewhere, each would cost a search twice as much."""
    vectors = np.tile(VECTORS, math.ceil(dimensions / D))[:, :dimensions]
    ids = np.zeros((N, 3), dtype=np.int32)
    for digits in (4, 13, 36):
        linked = [[f"{50 * number + place:0{digits}}" for place in range(50)] for number in range(N)]
        shop.vectors.create("wide", dimensions)
        shop.vectors.copy("wide", ItemRows(IDS, vectors, ids, ids, linked=linked, link_strength=[[0.5] * 50] * N))
        with shop.pool.connection() as connection:
            stored = connection.execute(
                "SELECT count(*), count(pg_column_toast_chunk_id(vector)), count(pg_column_toast_chunk_id(placed))"
                " FROM item_vectors_wide"
            ).fetchone()
        assert stored == (N, 0, 0)
        np.testing.assert_array_equal(shop.vectors.fetch("wide", IDS[:3]).vectors, vectors[:3])


def test_upserted_rows_replace_and_are_found_at_once(indexed):
    changed = ItemRows([IDS[7]], 9 * QUERIES[:1], np.array([[1, 2]]), np.array([[3, 4, 5]]))
    indexed.vectors.upsert(RELEASE, changed)
    assert indexed.vectors.count(RELEASE) == N
    found = indexed.vectors.search(RELEASE, QUERIES[0], LIMIT)
    assert found.product_ids[0] == IDS[7]
    assert (found.std_ids[0].tolist(), found.re_ids[0].tolist()) == ([1, 2], [3, 4, 5])


@pytest.mark.parametrize("filters", [Filters(), Filters(min_price=0.0)])
def test_what_a_shopper_met_is_left_out_however_much_it_is(indexed, filters):
    met = best(QUERIES[0], range(N))
    at = datetime(2026, 1, 1, tzinfo=UTC)
    indexed.events.put([Event(user_id="u", product_id=product_id, kind="view", at=at) for product_id in met])
    found = indexed.vectors.search(RELEASE, QUERIES[0], LIMIT, filters, met_by="u")
    assert len(found.product_ids) == LIMIT
    assert not set(found.product_ids) & set(met)
    assert found.titles == ["t"] * LIMIT
    assert set(indexed.vectors.search(RELEASE, QUERIES[0], LIMIT, filters, met_by="other").product_ids) & set(met)


def test_a_new_product_is_found_at_once(indexed):
    indexed.products.put([RawProduct(product_id="new", title="t")])
    indexed.products.put_features([Product(product_id="new", title="t", std={"cluster": ["c0"]})], origin="o")
    indexed.vectors.upsert(RELEASE, ItemRows(["new"], 9 * QUERIES[:1], STD_IDS[:1], RE_IDS[:1]))
    for filters in (Filters(), Filters(std={"cluster": ["c0"]})):
        assert indexed.vectors.search(RELEASE, QUERIES[0], LIMIT, filters).product_ids[0] == "new"


def test_a_vector_is_outdated_until_it_is_made_of_the_features_as_they_are(shop):
    """Whoever looks at the clock alone misses what a long transaction commits late: its moment is one before others looked."""
    assert shop.vectors.outdated(RELEASE) == IDS  # nobody knows what they were made of
    shop.vectors.upsert(RELEASE, rows(range(N)))
    assert shop.vectors.outdated(RELEASE) == []
    changed = Product(product_id=IDS[3], title="t", std={"cluster": ["c5"]})
    with shop.pool.connection() as connection, connection.transaction():
        put_features(connection, [changed], "late")
        read_at = shop.products.features_at()
        shop.vectors.create("built", D)
        shop.vectors.copy("built", replace(rows(range(1, N)), features_at=[read_at[name] for name in IDS[1:]]))
        assert shop.vectors.outdated("built") == IDS[:1]
    assert shop.vectors.outdated("built") == [IDS[0], IDS[3]]
    assert shop.vectors.outdated(RELEASE) == [IDS[3]]
    shop.products.put([RawProduct(product_id=IDS[3], title="t", price=1e6)])  # no feature
    shop.vectors.upsert(RELEASE, rows([3]))
    assert shop.vectors.outdated(RELEASE) == []


def test_the_look_for_what_is_outdated_may_take_longer_than_other_statements(settings):
    with (
        Store.open(settings, statement_seconds=2.0) as store,
        ThreadPoolExecutor(1) as thread,
        psycopg.connect(settings.database_url) as held,
        psycopg.connect(settings.database_url, autocommit=True) as watching,
    ):
        store.vectors.create(RELEASE, D)
        held.execute("LOCK products")
        look = thread.submit(store.vectors.outdated, RELEASE)
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND now() - query_start > '3 s'"
        waiting += " AND datname = current_database()"
        eventually(lambda: watching.execute(waiting).fetchone() == (1,))
        held.rollback()
        assert look.result(timeout=60) == []


def test_a_build_begins_empty_whatever_a_crashed_one_left(shop):
    shop.vectors.create(RELEASE, D + 1)
    assert shop.vectors.count(RELEASE) == 0


def test_releases_are_listed_until_dropped(shop):
    shop.vectors.create("20250101-000000", 2)
    assert shop.vectors.releases() == ["20250101-000000", RELEASE]
    shop.vectors.drop("20250101-000000")
    shop.vectors.drop("20250101-000000")
    assert shop.vectors.releases() == [RELEASE]


def test_what_is_built_anew_answers_by_its_old_rows_until_the_new_ones_are_there(indexed):
    def best() -> list[str]:
        return indexed.vectors.search(RELEASE, QUERIES[0], 3).product_ids

    before = best()
    table = indexed.vectors.begin(RELEASE, D)
    assert best() == before
    few = rows([1, 2, 3])
    indexed.vectors.copy(table, few)
    indexed.vectors.build_index(table)
    assert indexed.vectors.releases() == [RELEASE]
    indexed.vectors.begin(RELEASE, D)  # the build was stopped; another begins
    indexed.vectors.copy(table, few)
    indexed.vectors.build_index(table)
    assert best() == before
    indexed.vectors.finish(RELEASE)
    assert sorted(best()) == sorted(few.product_ids)
    indexed.vectors.copy(indexed.vectors.begin(RELEASE, D), few)  # its index has a name of its own again
    indexed.vectors.build_index(table)
    indexed.vectors.finish(RELEASE)
    assert sorted(best()) == sorted(few.product_ids)
    indexed.vectors.begin(RELEASE, D)
    indexed.vectors.drop_all(RELEASE)
    indexed.vectors.drop_all("No.Table")
    assert not indexed.vectors.exists(table)
    assert not indexed.vectors.exists(RELEASE)


def test_a_product_goes_though_an_index_is_being_built(shop):
    gone = shop.vectors.search(RELEASE, QUERIES[0], 1).product_ids
    with shop.pool.connection() as builder, builder.transaction():
        builder.execute(f'LOCK TABLE "item_vectors_{RELEASE}" IN SHARE MODE')  # as CREATE INDEX does
        assert shop.products.delete(gone) == set(gone)
        assert shop.vectors.search(RELEASE, QUERIES[0], 1).product_ids != gone
        assert shop.vectors.count(RELEASE) == N
    with shop.pool.connection() as connection:
        assert connection.execute("SHOW lock_timeout").fetchone() == ("0",)


@pytest.mark.parametrize("name", ["", "Upper", 'a"; DROP TABLE products; --', "x" * 41, "-a"])
def test_what_is_no_release_name_is_refused(store, name):
    with pytest.raises(ValueError, match="is no release name"):
        store.vectors.create(name, 2)


def test_the_build_tells_its_progress(shop):
    shares = []
    shop.vectors.build_index(RELEASE, progress=shares.append)
    assert shares[-1] == 1.0
    assert all(0.0 <= share <= 1.0 for share in shares)


def test_what_a_build_takes_is_foreseen_from_a_few_rows(shop, monkeypatch):
    few = shop.vectors.build_cost(RELEASE)
    assert (few.rows, few.seconds, few.fits) == (N, 0.0, True)
    monkeypatch.setattr(vectors, "SAMPLED_ROWS", N // 2)
    sampled = shop.vectors.build_cost(RELEASE)
    assert 0.0 < sampled.seconds < 60.0
    assert sampled.megabytes == few.megabytes > 0
    monkeypatch.setattr(vectors, "MOST_INDEX_MEMORY", 64 * 1024)
    assert not shop.vectors.build_cost(RELEASE).fits
    of_none = shop.vectors.build_cost(RELEASE, anew=vectors.UNTOUCHED)
    assert (of_none.rows, of_none.seconds, of_none.fits) == (0, 0.0, False)
    shop.vectors.build_index(RELEASE)  # nothing of it stands in the way


def test_a_second_index_is_an_error_that_leaves_the_store_usable(indexed):
    with pytest.raises(Exception, match="already exists"):
        indexed.vectors.build_index(RELEASE)
    assert len(indexed.vectors.search(RELEASE, QUERIES[0], LIMIT).product_ids) == LIMIT


# --- search -----------------------------------------------------------------------------------------------------------


def test_without_an_index_the_search_is_exact(shop):
    for query in QUERIES:
        found = shop.vectors.search(RELEASE, query, LIMIT)
        assert found.product_ids == best(query, range(N))
        assert found.plan == "exact"


def test_the_index_finds_nearly_what_numpy_finds_in_order(indexed):
    for query in QUERIES:
        found = indexed.vectors.search(RELEASE, query, LIMIT)
        assert found.plan == "hnsw"
        np.testing.assert_allclose(found.scores, scores_of(found, query), rtol=1e-5)
        assert (np.diff(found.scores) <= 0).all()
        assert len(set(found.product_ids) & set(best(query, range(N)))) >= 0.95 * LIMIT


def test_a_search_brings_all_of_the_row(indexed):
    found = indexed.vectors.search(RELEASE, QUERIES[0], LIMIT)
    numbers = [IDS.index(product_id) for product_id in found.product_ids]
    np.testing.assert_array_equal(found.vectors, VECTORS[numbers])
    np.testing.assert_array_equal(found.std_ids, STD_IDS[numbers])
    np.testing.assert_array_equal(found.re_ids, RE_IDS[numbers])
    np.testing.assert_array_equal(found.price, [np.nan if i % 10 == 9 else i for i in numbers])


@pytest.mark.parametrize("kept", [0, 1, 10, 39, 40, 45, 50, 51, 60, 90, 100, 150, 300, 540])
def test_a_filter_always_leaves_as_many_as_there_are(indexed, kept):
    """`kept` products are cheap enough; up to FEW the answer is exact."""
    numbers = [i for i in range(N) if i % 10 != 9][:kept]
    highest = float(numbers[-1]) if numbers else -1.0
    for query in QUERIES:
        found = indexed.vectors.search(RELEASE, query, LIMIT, Filters(max_price=highest))
        assert len(found.product_ids) == min(kept, LIMIT)
        assert set(found.product_ids) <= {IDS[i] for i in numbers}
        assert (np.diff(found.scores) <= 0).all()
        if kept <= FEW:
            assert found.plan == "exact"
        if found.plan == "exact":
            assert found.product_ids == best(query, numbers)
    if kept >= 300:
        assert found.plan == "hnsw-iterative"


def test_the_exact_plan_does_not_touch_the_index(indexed):
    """Even if the planner is pushed to it: with ef_search 1 it would miss most of what is asked for."""
    numbers = [i for i in range(N) if CLUSTER[i] == 3]
    push(indexed, "enable_sort = off", "enable_seqscan = off", "enable_hashjoin = off", "hnsw.ef_search = 1")
    with open_url(indexed.url) as pushed:
        found = pushed.vectors.search(RELEASE, QUERIES[0], LIMIT, Filters(std={"cluster": ["c3"]}), ef_search=1)
    assert found.plan == "exact"
    assert found.product_ids == best(QUERIES[0], numbers)


def test_when_the_index_gives_up_the_answer_is_exact(indexed):
    """Far from the query and more than FEW: the index search ends before it meets enough of them."""
    query = QUERIES[0]
    far = np.argsort(VECTORS @ query)[:70].tolist()
    indexed.products.put_features(
        [Product(product_id=IDS[i], title="t", std={"far": ["yes"]}) for i in far], origin="test"
    )
    with indexed.pool.connection() as connection:
        connection.execute("ANALYZE products")
    push(indexed, "hnsw.max_scan_tuples = 1")
    with open_url(indexed.url) as with_limit:
        found = with_limit.vectors.search(RELEASE, query, LIMIT, Filters(std={"far": ["yes"]}))
    assert found.plan == "exact"
    assert found.product_ids == best(query, far)


@pytest.mark.parametrize(
    ("filters", "keeps"),
    [
        (Filters(std={"cluster": ["c1", "c2"]}), lambda i: CLUSTER[i] in (1, 2)),
        (Filters(std={"cluster": ["c1"], "all": ["yes", "no"]}), lambda i: CLUSTER[i] == 1),
        (Filters(std={"cluster": ["c1"], "all": ["no"]}), lambda i: False),
        (Filters(std={"cluster": []}), lambda i: False),
        (Filters(min_price=100, max_price=110), lambda i: 100 <= i <= 110 and i % 10 != 9),
        (Filters(min_price=590), lambda i: i >= 590 and i % 10 != 9),
        (Filters(in_stock=True, max_price=20), lambda i: i % 2 == 0 and i <= 20),
        (Filters(in_stock=False, max_price=20), lambda i: i % 2 == 1 and i <= 20 and i % 10 != 9),
        (Filters(std={"cluster": ["c4"]}, max_price=300), lambda i: CLUSTER[i] == 4 and i <= 300 and i % 10 != 9),
    ],
)
def test_filters_mean_what_they_say(indexed, filters, keeps):
    numbers = [i for i in range(N) if keeps(i)]
    found = indexed.vectors.search(RELEASE, QUERIES[0], N, filters)
    assert sorted(found.product_ids) == [IDS[i] for i in numbers]


@pytest.mark.parametrize("filters", [Filters(), Filters(std={"all": ["yes"]}), Filters(max_price=45)])
def test_what_is_excluded_deleted_or_unread_never_appears(indexed, filters):
    ranking = best(QUERIES[0], [i for i in range(N) if filters.max_price is None or (i <= 45 and i % 10 != 9)])
    excluded, deleted = ranking[:5], ranking[5:10]
    indexed.products.delete(deleted)
    with indexed.pool.connection() as connection:
        connection.execute("UPDATE products SET std = NULL WHERE product_id = %s", (ranking[10],))
    found = indexed.vectors.search(RELEASE, QUERIES[0], 20, filters, exclude=excluded)
    assert len(found.product_ids) == 20
    assert not set(found.product_ids) & set(ranking[:11])


def test_the_index_makes_up_for_what_is_excluded(indexed):
    ranking = best(QUERIES[0], range(N))
    found = indexed.vectors.search(RELEASE, QUERIES[0], LIMIT, exclude=ranking, ef_search=LIMIT)
    assert found.plan == "hnsw"
    assert len(set(found.product_ids) - set(ranking)) == LIMIT


def test_all_come_back_when_more_are_asked_for_than_there_are(indexed):
    for filters in (Filters(), Filters(std={"all": ["yes"]})):
        assert sorted(indexed.vectors.search(RELEASE, QUERIES[0], N + 5, filters).product_ids) == IDS


def given(placed: np.ndarray) -> dict[str, object]:
    """The parameters of a search for QUERIES[0], which stands there in the coordinates of the index, by nobody."""
    return {
        "query": QUERIES[0], "placed": np.append(placed, np.float32(0)), "exclude": [], "met_by": None, "history": [],
        "together": 0.0, "variant": 0.0, "scale": 0.0,
    }  # fmt: skip


def test_a_search_leaves_the_connection_as_it_was(indexed):
    names = (
        "enable_seqscan",
        "enable_sort",
        "max_parallel_workers_per_gather",
        "hnsw.ef_search",
        "hnsw.iterative_scan",
        "plan_cache_mode",
    )
    with indexed.pool.connection() as connection:
        vectors._query(
            connection,
            vectors._plain(RELEASE, 1, 0, vectors._Unmet(1, 33)),
            given(QUERIES[0]),
            vectors._hnsw_settings(77),
            True,
        )
        values = [connection.execute(f"SHOW {name}").fetchone()[0] for name in names]
    assert values == ["on", "on", "2", "40", "off", "auto"]


def test_a_search_without_filters_is_planned_once_a_connection(indexed):
    for query in QUERIES:
        indexed.vectors.search(RELEASE, query, LIMIT)
    with indexed.pool.connection() as connection:
        plans = connection.execute(
            "SELECT custom_plans, generic_plans FROM pg_prepared_statements WHERE statement LIKE '%near AS MATERIALIZED%'"
        ).fetchall()
    [(anew, once)] = plans
    assert anew == 0
    assert once > 1


def test_many_searches_on_one_connection_stay_right(indexed):
    """Statements are prepared after a few runs; the plan must stay."""
    for query in list(QUERIES) * 3:
        assert indexed.vectors.search(RELEASE, query, LIMIT).plan == "hnsw"
        narrow = indexed.vectors.search(RELEASE, query, LIMIT, Filters(max_price=20))
        assert narrow.product_ids == best(query, [i for i in range(21) if i % 10 != 9])


# --- parts ----------------------------------------------------------------------------------------------------------------


# Every third item is of the outstanding, every seventh of the untouched.
PART = np.where(np.arange(N) % 7 == 0, vectors.UNTOUCHED, (np.arange(N) % 3 == 0) * vectors.OUTSTANDING)


def fill_parts(shop: Store, part: np.ndarray) -> np.ndarray:
    """A table "parts" of all items, whose graph holds turned rows; returns how they are turned."""
    turn = np.linalg.qr(RANDOM.normal(size=(D, D)))[0].astype(np.float32)
    shop.vectors.create("parts", D)
    shop.vectors.copy("parts", replace(rows(range(N)), placed=np.pad(VECTORS @ turn, ((0, 0), (0, 1))), part=part))
    return turn


@pytest.mark.parametrize("filters", [Filters(), Filters(min_price=0.0), Filters(max_price=25.0)])
@pytest.mark.parametrize("with_index", [True, False])
def test_the_parts_of_an_index_answer_as_one_and_the_untouched_have_their_share(shop, filters, with_index):
    turn = fill_parts(shop, PART)
    if with_index:
        shop.vectors.build_index("parts")
    costs = {i: None if i % 10 == 9 else i for i in range(N)}
    bound = N if filters.max_price is None else filters.max_price
    passing = [i for i in range(N) if filters == Filters() or (costs[i] is not None and costs[i] <= bound)]
    for query in QUERIES:
        turned = np.append(query @ turn, np.float32(0))
        search = partial(shop.vectors.search, "parts", query, filters=filters, placed=turned)
        assert search(LIMIT).product_ids == best(query, passing)
        untouched = best(query, [i for i in passing if PART[i] == vectors.UNTOUCHED])
        found = search(LIMIT, new=LIMIT // 2)
        assert [i for i in found.product_ids if i in untouched][: LIMIT // 2] == untouched[: LIMIT // 2]
        others = [i for i in best(query, passing) if i not in untouched[: LIMIT // 2]]
        assert [i for i in found.product_ids if i not in untouched[: LIMIT // 2]] == others[: LIMIT - LIMIT // 2]
        assert (np.diff(found.scores) <= 0).all()
        assert search(0, new=5).product_ids == untouched[:5]


@pytest.mark.parametrize("every", [1, 2, 7])
def test_few_of_the_untouched_are_asked_for_and_more_where_all_of_these_are_in_the_list(shop, every, monkeypatch):
    statements: list[int] = []
    needed: set[int] = set()
    query_as_it_is = vectors._query
    monkeypatch.setattr(vectors, "_query", lambda *given: (statements.append(1), query_as_it_is(*given))[1])
    part = np.where(np.arange(N) % every == 0, vectors.UNTOUCHED, PART * (PART != vectors.UNTOUCHED))
    turn = fill_parts(shop, part)
    shop.vectors.build_index("parts")
    new = LIMIT // 8
    for query in QUERIES:
        statements.clear()
        found = shop.vectors.search("parts", query, LIMIT, placed=np.append(query @ turn, np.float32(0)), new=new)
        untouched = best(query, np.flatnonzero(part == vectors.UNTOUCHED))
        others = best(query, [i for i in range(N) if IDS[i] not in untouched[:new]])
        assert sorted(found.product_ids) == sorted(untouched[:new] + others[: LIMIT - new])
        assert (np.diff(found.scores) <= 0).all()
        of_untouched = sum(i in untouched for i in found.product_ids)
        assert len(statements) == (1 if of_untouched < 2 * new else 2)
        needed.add(len(statements))
    assert needed == {7: {1}, 2: {1, 2}, 1: {2}}[every]


@pytest.mark.parametrize(
    ("limit", "new", "ef_search", "asked"),
    [
        (100, 10, 200, [(20, 60), (100, 200)]),
        (100, 10, 40, [(20, 40), (100, 40)]),  # never wider than the others
        (100, 60, 200, [(100, 200)]),  # twice the share is more than the list
        (100, 0, 200, [(100, 200)]),
        (0, 10, 200, [(10, 60)]),  # nothing else is asked for
        (0, 300, 300, [(300, 300)]),
    ],
)
def test_what_nobody_met_is_asked_for_by_its_share_of_the_list(limit, new, ef_search, asked):
    assert vectors._shares(limit, new, ef_search) == [vectors._Unmet(*one) for one in asked]


def test_only_what_nobody_met_is_searched_less_wide(shop):
    turn = fill_parts(shop, PART)
    shop.vectors.build_index("parts")
    statement = vectors._plain("parts", LIMIT, 2, vectors._Unmet(4, 33))
    of_part = [statement.index(f"v.part = {part}") for part in (vectors.USUAL, vectors.OUTSTANDING, vectors.UNTOUCHED)]
    assert of_part[:2] == sorted(of_part[:2])
    assert of_part[1] < statement.index("hnsw.ef_search") < of_part[2]  # a plan goes through them in this order
    with shop.pool.connection() as connection, connection.transaction():
        for name, value in vectors._hnsw_settings(77).items():
            connection.execute("SELECT set_config(%s, %s, true)", (name, value))
        connection.execute(statement, given(QUERIES[0] @ turn))
        assert connection.execute("SHOW hnsw.ef_search").fetchone() == ("33",)


@pytest.mark.parametrize(("given", "careful"), [((8, 40), (24, 160)), ((60, 400), (100, 1000))])
@pytest.mark.parametrize("untouched_rows_at_most", [vectors.CAREFUL_ROWS, -1])
def test_what_may_hold_crowds_is_linked_with_more_care_within_what_pgvector_takes(
    shop, given, careful, untouched_rows_at_most, monkeypatch
):
    monkeypatch.setattr(vectors, "CAREFUL_ROWS", untouched_rows_at_most)
    shop.vectors.build_index(RELEASE, *given)
    with shop.pool.connection() as connection:
        found = connection.execute(
            "SELECT reloptions FROM pg_class WHERE relname LIKE '%hnsw_' ORDER BY relname"  # of the parts, in order
        ).fetchall()
    of_untouched = given if untouched_rows_at_most < 0 else careful
    expected = {vectors.USUAL: given, vectors.OUTSTANDING: careful, vectors.UNTOUCHED: of_untouched}
    assert [set(options) for (options,) in found] == [
        {f"m={m}", f"ef_construction={ef}"} for _, (m, ef) in sorted(expected.items())
    ]


# --- links ------------------------------------------------------------------------------------------------------------


def history(*numbers: int, weights: tuple[float, float] = WEIGHTS) -> History:
    return History([IDS[number] for number in numbers], *weights, SCALE)


def gains(met: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Strength of the links and whether it is a variant, of every product: [N] each."""
    together = np.zeros(N)
    np.add.at(together, OTHERS[met], STRENGTH[met])
    groups = {number // 3 for number in met if number < N // 2}
    variant = [number < N // 2 and number // 3 in groups and number not in met for number in range(N)]
    return together, np.array(variant, dtype=float)


HISTORIES = [[5], [450], [0, 1, 2], [599, 300, 7, 450], list(range(0, 90, 3))]


@pytest.mark.parametrize("limit", [1, LIMIT, N])
@pytest.mark.parametrize("met", HISTORIES)
def test_with_a_history_links_count_as_much_as_inner_products(linked, met, limit):
    together, variant = gains(met)
    for query in QUERIES:
        scores = VECTORS @ query + WEIGHTS[0] * np.log1p(SCALE * together) + WEIGHTS[1] * variant
        order = np.argsort(-scores)[:limit]
        found = linked.vectors.search(LINKED, query, limit, history=history(*met))
        assert found.product_ids == [IDS[number] for number in order]
        np.testing.assert_allclose(found.scores, scores[order], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found.together, together[order], rtol=1e-5)
        np.testing.assert_array_equal(found.variant, variant[order])
        np.testing.assert_array_equal(found.vectors, VECTORS[order])
        np.testing.assert_array_equal(found.std_ids, STD_IDS[order])
        np.testing.assert_array_equal(found.re_ids, RE_IDS[order])
        np.testing.assert_array_equal(found.price, [np.nan if i % 10 == 9 else i for i in order])


@pytest.mark.parametrize("indexed_first", [False, True])
@pytest.mark.parametrize(
    ("filters", "keeps"),
    [
        (Filters(std={"cluster": ["c1", "c2"]}), lambda i: CLUSTER[i] in (1, 2)),
        (Filters(in_stock=True, max_price=200), lambda i: i % 2 == 0 and i <= 200),
        (Filters(min_price=10), lambda i: i >= 10 and i % 10 != 9),
        (Filters(std={"cluster": []}), lambda i: False),
    ],
)
def test_links_lead_to_nothing_that_is_filtered_excluded_or_met(linked, indexed_first, filters, keeps):
    met, excluded, seen = [5, 450, 33], list(OTHERS[5][:4]), [*OTHERS[450][:4], 4]
    at = datetime(2026, 1, 1, tzinfo=UTC)
    linked.events.put([Event(user_id="u", product_id=IDS[number], kind="view", at=at) for number in seen])
    if indexed_first:
        linked.vectors.build_index(LINKED)
    together, variant = gains(met)
    scores = VECTORS @ QUERIES[0] + WEIGHTS[0] * np.log1p(SCALE * together) + WEIGHTS[1] * variant
    left = [i for i in np.argsort(-scores) if keeps(i) and i not in excluded and i not in seen]
    found = linked.vectors.search(
        LINKED, QUERIES[0], LIMIT, filters, [IDS[number] for number in excluded], met_by="u", history=history(*met)
    )
    numbers = [IDS.index(product_id) for product_id in found.product_ids]
    assert len(numbers) == min(LIMIT, len(left))
    assert set(numbers) <= set(left)
    if found.plan == "exact":
        assert numbers == left[:LIMIT]
    assert_linked_come_first(numbers, left[:LIMIT], together + variant)


def assert_linked_come_first(numbers: list[int], expected: list[int], gain: np.ndarray) -> None:
    """An index may miss an item here and there, but none that is linked: those stand in their order, and others below fill up."""
    linked = [number for number in expected if gain[number]]
    assert [number for number in numbers if gain[number]][: len(linked)] == linked


def test_with_an_index_too_the_linked_come_where_they_belong(linked):
    linked.vectors.build_index(LINKED)
    met = HISTORIES[-1]
    together, variant = gains(met)
    for query in [*QUERIES, *QUERIES]:  # the statement is prepared meanwhile
        scores = VECTORS @ query + WEIGHTS[0] * np.log1p(SCALE * together) + WEIGHTS[1] * variant
        found = linked.vectors.search(LINKED, query, LIMIT, history=history(*met))
        numbers = [IDS.index(product_id) for product_id in found.product_ids]
        assert found.plan == "hnsw"
        np.testing.assert_allclose(found.scores, scores[numbers], rtol=1e-5, atol=1e-5)
        assert (np.diff(found.scores) <= 0).all()
        assert_linked_come_first(numbers, np.argsort(-scores)[:LIMIT].tolist(), together + variant)


def test_of_very_many_linked_the_strongest_are_looked_up_and_with_a_filter_all(linked, monkeypatch):
    linked.vectors.build_index(LINKED)
    monkeypatch.setattr(vectors, "LEAST_LINKED", 1)
    monkeypatch.setattr(vectors, "_plain", vectors._plain.__wrapped__)  # what it made before has the number in it
    met, few = HISTORIES[-1], 4
    together, variant = gains(met)
    gain = WEIGHTS[0] * np.log1p(SCALE * together) + WEIGHTS[1] * variant
    assert (gain > 0).sum() > 100
    missed = 0
    for query in QUERIES:
        near = [IDS.index(product_id) for product_id in linked.vectors.search(LINKED, query, few).product_ids]
        strongest = [number for number in np.argsort(-gain) if number not in near][: 2 * few]
        looked_up = np.array([*near, *strongest])
        scores = VECTORS @ query + gain
        best_of, best_of_all = looked_up[np.argsort(-scores[looked_up])][:few], np.argsort(-scores)[:few]
        missed += best_of.tolist() != best_of_all.tolist()
        found = linked.vectors.search(LINKED, query, few, history=history(*met))
        assert found.product_ids == [IDS[number] for number in best_of]
        found = linked.vectors.search(LINKED, query, few, Filters(std={"all": ["yes"]}), history=history(*met))
        assert_linked_come_first([IDS.index(id_) for id_ in found.product_ids], best_of_all.tolist(), gain)
    assert missed


def test_what_is_equally_good_comes_by_id(linked):
    """Vectors alike; what the only item of the history is linked to comes first, all equally strongly."""
    alike = replace(rows(range(N)), vectors=np.ones((N, D), dtype=np.float32))
    linked.vectors.create("alike", D)
    others = [["p500", "p200", "p300"], *[[]] * (N - 1)]
    linked.vectors.copy("alike", replace(alike, linked=others, link_strength=[[0.5] * 3, *[[]] * (N - 1)]))
    for limit in (2, 4, 7):
        found = linked.vectors.search(
            "alike",
            np.ones(D, dtype=np.float32),
            limit,
            history=replace(history(0, weights=(1.0, 1.0)), scale=2 * (np.e - 1)),
        )
        assert found.product_ids == ["p001", "p002", "p200", "p300", "p500", "p000", "p003"][:limit]
        assert found.scores.tolist() == [D + 1.0, D + 1.0, D + 1.0, D + 1.0, D + 1.0, D, D][:limit]
        assert found.together.tolist() == [0.0, 0.0, 0.5, 0.5, 0.5, 0.0, 0.0][:limit]
        assert found.variant.tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0][:limit]


def test_a_history_without_links_and_one_of_unknown_items_change_nothing(linked):
    plain = linked.vectors.search(LINKED, QUERIES[0], LIMIT)
    for release, given in [
        (LINKED, History([], *WEIGHTS, SCALE)),
        (LINKED, History(["nobody", ""], *WEIGHTS, SCALE)),
        (RELEASE, history(450)),  # of a release that has none, an item without variants
    ]:
        found = linked.vectors.search(release, QUERIES[0], LIMIT, history=given)
        assert found.product_ids == plain.product_ids
        assert found.plan == "exact"
        np.testing.assert_array_equal(found.scores, plain.scores)
        assert not found.together.any()
        assert not found.variant.any()
    mixed = linked.vectors.search(
        LINKED, QUERIES[0], LIMIT, history=History(["nobody", IDS[5], IDS[5]], *WEIGHTS, SCALE)
    )
    alone = linked.vectors.search(LINKED, QUERIES[0], LIMIT, history=history(5))
    assert mixed.product_ids == alone.product_ids
    np.testing.assert_array_equal(mixed.scores, alone.scores)


def test_links_to_what_is_deleted_unread_or_without_a_vector_lead_nowhere(linked):
    deleted, unread, bare = (IDS[number] for number in OTHERS[450][:3])
    variant = IDS[4]
    linked.products.delete([deleted, variant])
    with linked.pool.connection() as connection:
        connection.execute("UPDATE products SET std = NULL WHERE product_id = %s", (unread,))
        connection.execute(f"DELETE FROM item_vectors_{LINKED} WHERE product_id = %s", (bare,))
    found = linked.vectors.search(LINKED, QUERIES[0], N, history=history(450, 3))
    assert len(found.product_ids) == N - 4
    assert not {deleted, unread, bare, variant} & set(found.product_ids)


def test_links_from_what_is_sold_out_still_count_and_from_what_is_deleted_no_more(linked):
    linked.products.put([RawProduct(product_id=IDS[450], title="t", in_stock=False)])
    found = linked.vectors.search(LINKED, QUERIES[0], N, exclude=[IDS[450]], history=history(450))
    assert sum(found.together > 0) == len(OTHERS[450])
    linked.products.delete([IDS[450]])
    assert not linked.vectors.search(LINKED, QUERIES[0], N, history=history(450)).together.any()


def test_a_new_variant_is_one_at_once(linked):
    linked.products.put([RawProduct(product_id="new", title="t", group_id="g1")])
    linked.products.put_features([Product(product_id="new", title="t", std={"all": ["yes"]})], origin="o")
    linked.vectors.upsert(LINKED, ItemRows(["new"], -QUERIES[:1], STD_IDS[:1], RE_IDS[:1]))
    for filters in (Filters(), Filters(std={"all": ["yes"]})):
        found = linked.vectors.search(LINKED, QUERIES[0], LIMIT, filters, history=history(3, weights=(0.1, 1000.0)))
        assert set(found.product_ids[:3]) == {IDS[4], IDS[5], "new"}
        assert found.variant.tolist() == [1.0] * 3 + [0.0] * (LIMIT - 3)


def test_upserting_an_item_keeps_its_links(linked):
    before = linked.vectors.search(LINKED, QUERIES[0], N, history=history(450))
    linked.vectors.upsert(LINKED, rows([450]))
    after = linked.vectors.search(LINKED, QUERIES[0], N, history=history(450))
    assert before.together.any()
    np.testing.assert_array_equal(before.together, after.together)


def test_of_a_product_of_endless_variants_only_some_are_looked_at(linked, monkeypatch):
    monkeypatch.setattr(vectors, "MOST_VARIANTS", 5)
    with linked.pool.connection() as connection:
        connection.execute("UPDATE products SET group_id = 'slip'")
    found = linked.vectors.search(LINKED, QUERIES[0], N, history=history(450))
    assert found.variant.sum() == 5


# --- the state of a shopper -------------------------------------------------------------------------------------------


def event(user: str, number: int, minute: int, **rest) -> Event:
    return Event(user_id=user, product_id=IDS[number], at=f"2024-01-01T00:{minute:02d}:00Z", **rest)


def test_the_state_is_the_latest_events_oldest_first(shop):
    shop.users.put([User(user_id="u", profile={"height_cm": 170})])
    shop.events.put([event("u", 9, 3), event("u", 2, 1), event("u", 3, 2, kind="cart"), event("v", 4, 5)])
    state = shop.users.state(RELEASE, "u", limit=2)
    assert (state.known, state.profile) == (True, {"height_cm": 170.0})
    assert (state.product_ids, state.kinds) == ([IDS[3], IDS[9]], ["cart", "view"])
    assert state.at.tolist() == [1704067320.0, 1704067380.0]
    np.testing.assert_array_equal(state.vectors, VECTORS[[3, 9]])
    np.testing.assert_array_equal(state.std_ids, STD_IDS[[3, 9]])
    np.testing.assert_array_equal(state.re_ids, RE_IDS[[3, 9]])
    np.testing.assert_array_equal(state.price, [3.0, np.nan])


def test_events_without_a_vector_in_the_release_take_no_room(shop):
    shop.vectors.create("small", D)
    shop.vectors.copy("small", rows([1, 2]))
    shop.events.put([event("u", 1, 1), event("u", 2, 2), event("u", 3, 3)])
    assert shop.users.state("small", "u", limit=2).product_ids == [IDS[1], IDS[2]]


def test_who_is_known(shop):
    shop.users.put([User(user_id="profile")])
    shop.vectors.create("empty", D)
    shop.events.put([event("events", 1, 1)])
    for user, known in [("profile", True), ("events", True), ("nobody", False)]:
        state = shop.users.state("empty", user, limit=5)
        assert (state.known, state.profile, state.product_ids, state.at.shape) == (known, {}, [], (0,))


def test_inline_history_comes_behind_what_is_stored(shop):
    shop.events.put([event("u", 1, 1), event("u", 2, 2)])
    state = shop.users.state(RELEASE, "u", limit=3).extended(rows([7, 8]), kind="view", at=5.0, limit=3)
    assert state.product_ids == [IDS[2], IDS[7], IDS[8]]
    assert state.kinds == ["view"] * 3
    assert state.at.tolist() == [1704067320.0, 5.0, 5.0]
    np.testing.assert_array_equal(state.vectors, VECTORS[[2, 7, 8]])
    np.testing.assert_array_equal(state.re_ids, RE_IDS[[2, 7, 8]])
    np.testing.assert_array_equal(state.price, [2.0, np.nan, np.nan])


def test_history_may_be_all_there_is(shop):
    for start in (UserState.empty(D), shop.users.state(RELEASE, "nobody", limit=3)):
        state = start.extended(rows([7, 8, 9]), kind="cart", at=5.0, limit=2)
        assert (state.known, state.product_ids, state.vectors.shape) == (False, [IDS[8], IDS[9]], (2, D))
    assert UserState.empty(D).vectors.shape == (0, D)
    assert UserState.empty(D).extended(rows([]), kind="cart", at=5.0, limit=2).product_ids == []
