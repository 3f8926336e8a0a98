"""From raw products to ranked answers, on a small shop: every stage real, every script as a person runs it."""

from __future__ import annotations

import json
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import psycopg
import pytest

import build_index
import extract_features
import train_user
from build_index import IndexCheck, IndexedTable
from catalog import Event, Product, RawProduct
from datasets import sample_shop
from loaded_release import UnavailableError
from recommender import CANDIDATES, Answer, Recommender, Request
from release import USER_TOWER_HOLDOUT, ItemEncoder, Release
from settings import UserError
from shop_data import Requests, ShopData
from store import Filters, Found, ItemRows, Store, UserState, vectors
from tests.conftest import TINY_SHOP
from tests.releases import copy_release
from tests.serving import eventually
from tests.tiny import tiny_text_encoder
from text_encoder import TextEncoder

NOW = sample_shop.NOW.timestamp()


@pytest.fixture
def asked(shop):
    """The store and the pipeline over the trained shop."""
    with Store.open(shop) as store:
        yield store, Recommender(store, shop, TextEncoder.load(shop))


def test_the_release_is_live_and_complete(shop):
    release = Release.open(shop.models_dir)
    assert Release.current(shop.models_dir) == release.name
    assert set(release.manifest["files"]) == {
        "encoder_stage1.pth", "user_tower.pth", "user_tower_holdout.pth", "reranker_deepfm.pth",
        "search_space.pth",
    }  # fmt: skip
    assert release.manifest["index"]["items"] == 200
    assert release.manifest["index"]["recall"] > 0.95
    assert release.manifest["index"]["new_recall"] > 0.95
    assert not list(release.folder.glob("*.checkpoint.pt"))


def test_the_release_remembers_its_text_encoder_and_refuses_another(shop, tmp_path):
    release, own = Release.open(shop.models_dir), TextEncoder.load(shop)
    assert release.manifest["item_tower"]["text_encoder"] == {"name": shop.text_encoder, "fingerprint": own.fingerprint}
    moved = shop.model_copy(update={"text_encoder": str(tiny_text_encoder(tmp_path / "moved"))})
    ItemEncoder(release, TextEncoder.load(moved))  # the same encoder in another place

    other = shop.model_copy(update={"text_encoder": str(tiny_text_encoder(tmp_path / "other", seed=1))})
    back = r"set TEXT_ENCODER \(or TEXT_ENCODER_LAYERS\) back, or train"
    said = f"trained with text encoder '{shop.text_encoder}'.*'{other.text_encoder}'.*{back}"
    with pytest.raises(UserError, match=said):
        ItemEncoder(release, TextEncoder.load(other))
    with pytest.raises(UserError, match=said):  # nor are later stages trained on top of it
        train_user.main(train_user.UserOptions(**other.model_dump()))


def test_days_that_the_item_tower_learned_from_are_not_held_out(shop):
    with pytest.raises(UserError, match="learned from events that would be held out here; give both the same"):
        train_user.main(train_user.UserOptions(**shop.model_dump(), validation_share=0.5))


def test_products_that_nobody_met_have_their_share_of_the_candidates(new_shop):
    """Thirty of them: the best ten take the places of the last of the others, and keep the scores they have."""
    with new_shop() as shop, Store.open(shop) as store:
        recommender = Recommender(store, shop, TextEncoder.load(shop))
        new = [RawProduct(product_id=f"new{number:02}", title=f"Sock number {number}") for number in range(30)]
        reader = extract_features.make_reader(extract_features.ReaderSettings(_env_file=None), store.cache)
        assert not recommender.put_products(new, reader).refused
        loaded, request = recommender.live(), Request(context="office", k=100, now=NOW)

        def candidates() -> Found:
            nobody = UserState.empty(loaded.user_tower.config.row_width)
            return recommender._candidates(loaded, recommender.query(request)[0], request, nobody)

        with_share = candidates()
        loaded.new_goods = 0.0
        without = candidates()
    column = loaded.untouched_column
    reserved = [name for name, row in zip(with_share.product_ids, with_share.vectors, strict=True) if row[column]]
    assert len(with_share.product_ids) == 100
    assert len(reserved) == 10
    met = [name for name, row in zip(without.product_ids, without.vectors, strict=True) if not row[column]]
    assert len(met) > 90  # popularity outweighs what the others are like
    assert [name for name in with_share.product_ids if name not in reserved] == met[:90]
    assert (np.diff(with_share.scores) <= 0).all()


def test_searches_are_as_wide_as_the_index_needs(asked, shop, monkeypatch):
    """Rows turned about stand for an index that finds the wrong items: of the best 100, only what is near the middle."""
    monkeypatch.setattr(build_index, "CHECKED_NEW", 2)  # of so few
    table, _ = table_of(asked, shop)
    options = build_index.IndexOptions(**shop.model_dump())
    ef_search, recall = build_index.search_width(table, options)
    assert ef_search == build_index.SEARCH_WIDTHS[0]
    assert recall >= 0.99
    assert table.new_recall(ef_search) >= 0.99
    unmet = table.space.unmet(table.rows)
    turned = -table.rows
    turned[:, int(table.space.untouched)] = unmet
    table = replace(table, rows=turned)
    ef_search, recall = build_index.search_width(table, options)
    assert ef_search == build_index.SEARCH_WIDTHS[-1]
    assert recall < 0.5
    assert table.new_recall(ef_search) < 0.5
    assert replace(table, rows=table.rows * ~unmet[:, None]).new_recall(ef_search) == 1.0  # there is nothing to find


def table_of(asked, shop) -> tuple[IndexedTable, ItemRows]:
    """The release's table, with 20 queries, and what was copied into it."""
    store, recommender = asked
    release = Release.open(shop.models_dir)
    data = ShopData.of_release(store, recommender.live().encoder, release)
    rows, ids = build_index.index_rows(data, release), data.items.product_ids
    queries = build_index.queries_of_shoppers(data, release, data.links(data.now), rows, 20)
    table = IndexedTable(store, release.name, rows, ids, release.search_space(), queries)
    return table, ItemRows(ids, rows, data.items.std, data.items.re)


def test_a_graph_that_finds_too_little_is_built_anew_once(asked, shop, monkeypatch, capsys):
    released, items = table_of(asked, shop)
    store, space, rows = released.store, released.space, released.rows
    table = store.vectors.begin(released.name, rows.shape[1])
    build_index.copy_rows(store, table, items, space, lambda row: ([], []))

    # Those alike are not neighbours in the table, from which the graph is built in order, though the others are by their length.
    with store.pool.connection() as connection:
        found = connection.execute(f'SELECT product_id, part FROM "item_vectors_{table}" ORDER BY ctid').fetchall()
    placed, part = space.place(rows)
    length = dict(zip(items.product_ids, np.linalg.norm(placed[:, :-1], axis=1), strict=True))
    for one, in_order in ((vectors.USUAL, True), (vectors.OUTSTANDING, False), (vectors.UNTOUCHED, False)):
        lengths = [length[name] for name, its_part in found if its_part == one]
        assert len(lengths) == (part == one).sum() > 2
        assert (lengths == sorted(lengths, reverse=True)) == in_order

    monkeypatch.setattr(vectors, "CAREFUL_ROWS", -1)  # as if those that nobody met were many

    def build(found: list[float], found_new: list[float]) -> tuple[IndexCheck, list[int], list[str]]:
        """What is found, the numbers that the indexes of the parts have in the database, and how that of the unmet was made."""
        answers, new_answers = iter(found), iter(found_new)
        monkeypatch.setattr(IndexedTable, "recall", lambda *given: next(answers))
        monkeypatch.setattr(IndexedTable, "new_recall", lambda *given: next(new_answers))
        options = build_index.IndexOptions(**shop.model_dump())
        result = build_index.build_graph(replace(released, name=table), options)
        assert not [*answers, *new_answers]
        with store.pool.connection() as connection:
            made = connection.execute(
                "SELECT oid, reloptions FROM pg_class WHERE starts_with(relname, %s) ORDER BY relname",
                (f"item_vectors_{table}_hnsw",),
            ).fetchall()
            connection.execute("DROP INDEX " + ", ".join(f'"item_vectors_{table}_hnsw{n}"' for n in range(3)))
        return result, [number for number, _ in made], made[vectors.UNTOUCHED][1]

    too_little = [0.9] * 6  # at all widths but the last
    usual, careful = ["m=16", "ef_construction=64"], ["m=48", "ef_construction=256"]
    check, numbers, how = build([0.9, 0.996], [0.92])
    assert check == IndexCheck(140, 0.996, 0.92)
    assert numbers == sorted(numbers)  # one after the other
    assert how == usual
    check, numbers, how = build([*too_little, 0.96, 1.0], [0.92])
    assert check == IndexCheck(100, 1.0, 0.92)
    assert max(numbers) == numbers[vectors.OUTSTANDING]
    assert how == usual
    check, _, _ = build([*too_little, 0.96, *too_little, 0.97], [0.92])  # hard, not unlucky
    assert check == IndexCheck(800, 0.97, 0.92)
    assert "nobody met" not in capsys.readouterr().out
    check, _, how = build([0.9, 0.996], [0.5, 0.98])
    assert check == IndexCheck(140, 0.996, 0.98)
    assert how == careful
    said = capsys.readouterr().out
    assert "finds 0.500 of the best that nobody met" in said
    assert "still" not in said
    assert f"over {space.unmet(rows).sum()} items" in said
    check, _, _ = build([1.0], [0.5, 0.6])  # no reason to have no index at all
    assert check == IndexCheck(100, 1.0, 0.6)
    assert "still finds only 0.600 of the best 10 items that nobody met (0.9 wanted)" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"finds only 0\.900 .*raise --hnsw-m"):
        build([0.9] * 14, [])
    store.vectors.drop(table)


def test_an_answer_has_k_distinct_ranked_items_with_reasons(asked):
    store, recommender = asked
    user = store.events.read().user_ids[0]
    answer = recommender.recommend(Request(user, k=20, now=NOW))
    assert len({item.product_id for item in answer.items}) == 20
    assert [item.rank for item in answer.items] == list(range(1, 21))
    assert [item.score for item in answer.items] == sorted((item.score for item in answer.items), reverse=True)
    assert all(item.reasons for item in answer.items)
    assert not answer.warnings
    assert not answer.degraded


def test_the_same_question_has_the_same_answer(asked):
    request = Request(context="beach vacation", profile={"height_cm": 165.0}, now=NOW)
    assert asked[1].recommend(request).items == asked[1].recommend(request).items


@pytest.mark.parametrize(
    "change",
    [{"context": "결혼식 하객룩"}, {"profile": {"height_cm": 150.0, "weight_kg": 90.0}}, {"history": ["given"]}],
)
def test_context_body_and_history_each_move_the_scores(asked, change):
    store, recommender = asked
    if "history" in change:
        change = {"history": store.events.read().product_ids[:3]}
    plain = {item.product_id: item.score for item in recommender.recommend(Request(k=100, now=NOW)).items}
    moved = {item.product_id: item.score for item in recommender.recommend(Request(k=100, now=NOW, **change)).items}
    both = plain.keys() & moved.keys()
    assert any(abs(plain[item] - moved[item]) > 1e-4 for item in both)


def test_context_body_and_history_each_bring_what_the_shopper_wants(asked):
    """The sample shop knows the truth: how much a shopper wants an item, given the occasion they name."""
    store, recommender = asked
    truth = sample_shop.generate(**TINY_SHOP)
    log = store.events.read()
    contexts = [context for context in log.contexts if context]
    profiles = store.users.read_profiles()
    shoppers = [user for user in log.user_ids if user in profiles]

    def first(**told) -> list[str]:
        answer = recommender.recommend(Request(k=10, now=NOW, exclude_history=False, explain=False, **told))
        return [item.product_id for item in answer.items]

    told_nothing = first()
    told_occasion = {context: first(context=context) for context in contexts}
    told_body = {user: first(profile=profiles[user]) for user in shoppers}
    told_history = {user: first(user_id=user) for user in shoppers}

    def worth(items: Callable[[str, str], list[str]]) -> float:
        """Mean utility of ten items over all shoppers with each occasion in mind."""
        wanted = [(user, context) for user in shoppers for context in contexts]
        return float(
            np.mean([truth.affinity(user, item, context) for user, context in wanted for item in items(user, context)])
        )

    nothing = worth(lambda user, context: told_nothing)
    gains = {
        "context": worth(lambda user, context: told_occasion[context]) - nothing,
        "body": worth(lambda user, context: told_body[user]) - nothing,
        "history": worth(lambda user, context: told_history[user]) - nothing,
    }
    assert min(gains.values()) > 0.1, gains


def test_an_unknown_user_and_an_unknown_item_are_said_and_answered(asked):
    answer = asked[1].recommend(Request("nobody", history=["ghost"], k=5, now=NOW))
    assert len(answer.items) == 5
    assert any("nobody" in warning for warning in answer.warnings)
    assert any("ghost" in warning for warning in answer.warnings)


def test_filters_and_exclusions_hold(asked):
    store, recommender = asked
    category = next(iter(store.products.read_features()[0].std["category"]))
    answer = recommender.recommend(Request(filters=Filters({"category": [category]}), k=10, now=NOW))
    found = [item.product_id for item in answer.items]
    for product_id in found:
        product = store.products.get(product_id).product
        assert category in product.std["category"]
    again = recommender.recommend(Request(filters=Filters({"category": [category]}), exclude=found[:1], k=10, now=NOW))
    assert found[0] not in {item.product_id for item in again.items}


def test_a_list_that_is_shorter_than_asked_says_why(asked):
    store, recommender = asked
    every = [product.product_id for product in store.products.read_features()]
    answer = recommender.recommend(Request(exclude=every[3:], k=5, now=NOW))
    assert {item.product_id for item in answer.items} == set(every[:3])
    assert answer.warnings == [
        "3 of 5 places: rules, filters, exclusions and what the shopper met leave no more to show"
    ]


def test_an_event_changes_the_next_answer(asked):
    store, recommender = asked
    before = recommender.recommend(Request("fresh-shopper", k=20, now=NOW))
    seen = before.items[0].product_id
    store.events.put([Event(user_id="fresh-shopper", product_id=seen, kind="purchase", at=sample_shop.NOW)])
    after = recommender.recommend(Request("fresh-shopper", k=20, now=NOW))
    assert seen not in {item.product_id for item in after.items}
    assert not after.warnings


def test_a_new_product_with_a_new_word_is_found_at_once(asked, shop):
    store, recommender = asked
    reader = extract_features.make_reader(extract_features.ReaderSettings(_env_file=None), store.cache)
    twin = store.products.get(store.products.read_features()[0].product_id).raw
    new = RawProduct.model_validate(
        {**twin.model_dump(), "product_id": "brand-new", "attributes": {**twin.attributes, "style": ["zigzagcore"]}}
    )
    assert recommender.put_products([new], reader).refused == []
    assert "zigzagcore" in store.products.get("brand-new").product.re["style"]
    # Read once is enough: the next extract_features.py leaves it alone.
    assert store.products.origins()["brand-new"] == extract_features.fingerprints([new], store.schema(), reader)[0]
    near = [item.product_id for item in recommender.similar(twin.product_id, 10).items]
    assert "brand-new" in near
    # Another worker, with its own copy of the release, meets the new word in what the database returns.
    other = Recommender(store, shop, TextEncoder.load(shop))
    answer = other.recommend(Request(history=["brand-new"], k=5, now=NOW))
    assert not answer.warnings
    assert np.isfinite([item.score for item in answer.items]).all()


def attributes_of(store: Store, recommender: Recommender, product_id: str, field: str) -> list[str]:
    """The words of a field that the live release's row of a product holds."""
    loaded = recommender.live()
    row = store.vectors.fetch(loaded.name, [product_id]).re_ids[0]
    words = [loaded.encoder.re_vocab.word(word_id) for word_id in row if word_id]
    return [value for name, value in words if name == field]


def test_catching_up_beside_a_put_leaves_the_vector_of_what_was_put_last(new_shop, monkeypatch):
    """The put comes when the products to index have been read and their rows are made: it waits, or has the last word."""
    with new_shop() as shop, Store.open(shop) as store:
        reader = extract_features.make_reader(extract_features.ReaderSettings(_env_file=None), store.cache)
        recommender = Recommender(store, shop, TextEncoder.load(shop))
        other = Recommender(store, shop, TextEncoder.load(shop))  # as of another worker
        old, new = (
            RawProduct(product_id="p", title="t", attributes={"style": [word]}) for word in ("oldcore", "newcore")
        )
        waiting = RawProduct(product_id="q", title="t")
        other.put_products([old, waiting], reader)
        with store.pool.connection() as connection:
            vectors.delete(connection, ["p", "q"])  # they came while another release was live
        made, threads = recommender._rows, []

        def rows(loaded, products):
            answer = made(loaded, products)
            for work in (lambda: other.put_products([new], reader), lambda: other.delete_products(["q"])):
                threads.append(threading.Thread(target=work))
                threads[-1].start()
            eventually(lambda: all(not thread.is_alive() for thread in threads) or blocked(store) == 2)
            return answer

        monkeypatch.setattr(recommender, "_rows", rows)
        assert recommender.catch_up() == 2
        for thread in threads:
            thread.join()
        assert attributes_of(store, other, "p", "style") == ["newcore"]
        assert store.vectors.fetch(other.live().name, ["q"]).product_ids == []


def blocked(store: Store) -> int:
    """How many connections wait for a lock."""
    with store.pool.connection() as connection:
        row = connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        ).fetchone()
    assert row is not None
    return int(row[0])


def test_workers_that_catch_up_at_once_make_each_vector_once(new_shop, monkeypatch):
    with new_shop() as shop, Store.open(shop) as store:
        workers = [Recommender(store, shop, TextEncoder.load(shop)) for _ in range(2)]
        name = workers[0].live().name
        gone = [product.product_id for product in store.products.read_features()][::4]
        with store.pool.connection() as connection:
            vectors.delete(connection, gone)
        made, outdated, all_know = [], store.vectors.outdated, threading.Barrier(2, timeout=60)

        def noted(rows):
            def note(loaded, products):
                made.extend(product.product_id for product in products)
                return rows(loaded, products)

            return note

        def known_to_both(release):
            found = outdated(release)
            all_know.wait()
            return found

        monkeypatch.setattr(store.vectors, "outdated", known_to_both)
        for worker in workers:
            monkeypatch.setattr(worker, "_rows", noted(worker._rows))
        with ThreadPoolExecutor(2) as threads:
            assert sum(threads.map(Recommender.catch_up, workers)) == len(gone)
        assert sorted(made) == sorted(gone)
        assert outdated(name) == []


def test_of_one_worker_one_thread_catches_up_at_a_time(new_shop, monkeypatch):
    """However often a promotion is asked for: each would hold a connection, and requests would find none."""

    class Turn:
        """A lock that says when somebody comes to it."""

        def __init__(self) -> None:
            self.came, self._lock = threading.Semaphore(0), threading.Lock()

        def __enter__(self) -> None:
            self.came.release()
            self._lock.acquire()

        def __exit__(self, *_: object) -> None:
            self._lock.release()

    with new_shop() as shop, Store.open(shop) as store, ThreadPoolExecutor(1) as thread:
        recommender, turn = Recommender(store, shop, TextEncoder.load(shop)), Turn()
        gone = [product.product_id for product in store.products.read_features()][:3]
        with store.pool.connection() as connection:
            vectors.delete(connection, gone)
        made, outdated = recommender._rows, store.vectors.outdated
        looks, others = [], []

        def looked(release):
            looks.append(outdated(release))
            return looks[-1]

        def rows(loaded, products):
            assert turn.came.acquire(timeout=60)  # its own
            others.append(thread.submit(recommender.catch_up))
            assert turn.came.acquire(timeout=60)  # the other one is there,
            assert looks == [gone]  # and does not look for itself
            return made(loaded, products)

        monkeypatch.setattr(recommender, "_catching_up", turn)
        monkeypatch.setattr(store.vectors, "outdated", looked)
        monkeypatch.setattr(recommender, "_rows", rows)
        assert recommender.catch_up() == 3
        assert [other.result(timeout=60) for other in others] == [0]
        assert looks == [gone, []]


def test_a_put_that_ends_after_another_release_went_live_is_in_that_one_too(new_shop, monkeypatch):
    with new_shop() as shop, Store.open(shop) as store:
        first = Release.open(shop.models_dir)
        ids = [product.product_id for product in store.products.read_features()]
        copy_release(store, first, "second", ids)
        recommender = Recommender(store, shop, TextEncoder.load(shop))
        reader = extract_features.make_reader(extract_features.ReaderSettings(_env_file=None), store.cache)
        made = recommender._rows

        def rows(loaded, products):
            if loaded.name == first.name:  # another worker promotes, and catches up with what is there: nothing yet
                Release.open(shop.models_dir, "second").make_live()
                assert store.vectors.outdated("second") == []
            return made(loaded, products)

        monkeypatch.setattr(recommender, "_rows", rows)
        recommender.put_products([RawProduct(product_id="p", title="t")], reader)
        assert store.vectors.fetch("second", ["p"]).product_ids == ["p"]


@pytest.mark.parametrize("live", [True, False])
def test_what_is_put_while_an_index_is_built_is_in_it(new_shop, monkeypatch, capsys, live):
    with new_shop() as shop, Store.open(shop) as store:
        before = Release.current(shop.models_dir)
        shutil.copytree(Release.open(shop.models_dir).folder, shop.models_dir / "zz-second")
        recommender = Recommender(store, shop, TextEncoder.load(shop))
        reader = extract_features.make_reader(extract_features.ReaderSettings(_env_file=None), store.cache)
        copied = build_index.copy_rows

        def put_and_copy(*given):
            recommender.put_products([RawProduct(product_id="p", title="t")], reader)
            copied(*given)

        monkeypatch.setattr(build_index, "copy_rows", put_and_copy)
        build_index.main(build_index.IndexOptions(**shop.model_dump(), release="zz-second", margin=1.0, live=live))
        assert Release.current(shop.models_dir) == ("zz-second" if live else before)
        assert "\n1 products that came or changed meanwhile are indexed too" in capsys.readouterr().out
        assert store.vectors.fetch("zz-second", ["p"]).product_ids == ["p"]


def test_a_put_during_which_the_first_release_goes_live_is_in_that_one(new_shop, monkeypatch):
    with new_shop() as shop, Store.open(shop) as store:
        first = Release.open(shop.models_dir)
        (shop.models_dir / "current").unlink()
        recommender = Recommender(store, shop, TextEncoder.load(shop))
        reader = extract_features.make_reader(extract_features.ReaderSettings(_env_file=None), store.cache)
        put = recommender._put_products

        def put_slowly(*given):
            first.make_live()
            return put(*given)

        monkeypatch.setattr(recommender, "_put_products", put_slowly)
        recommender.put_products([RawProduct(product_id="p", title="t")], reader)
        assert store.vectors.fetch(first.name, ["p"]).product_ids == ["p"]


def test_a_product_put_later_is_read_by_the_aliases_its_release_was_trained_with(new_shop):
    with new_shop() as shop, Store.open(shop) as store:
        file = Release.open(shop.models_dir).folder / "re_vocab.json"
        saved = json.loads(file.read_text())
        known = [value for field, value in saved["words"] if field == "style"][:2]
        saved["aliases"] = [["style", "plainzigcore", known], ["style", "farzigcore", ["novelcore"]]]
        file.write_text(json.dumps(saved))
        recommender = Recommender(store, shop, TextEncoder.load(shop))
        loaded = recommender.live()
        vocab, trained = loaded.encoder.re_vocab, len(loaded.encoder.re_vocab)
        new = Product(product_id="p", title="t", re={"style": ["PlainZigcore", "farzigcore"]})
        store.products.put([RawProduct(product_id="p", title="t")])
        store.products.put_features([new], origin="test")
        recommender.index(loaded, ["p"])
        assert store.releases.words(loaded.name) == {("style", "novelcore"): trained}
        assert len(vocab) == trained + 1
        row = store.vectors.fetch(loaded.name, ["p"]).re_ids[0]
        assert [vocab.word(word_id) for word_id in row if word_id] == [
            *(("style", value) for value in known),
            ("style", "novelcore"),
        ]


def test_similar_items_of_something_unknown_is_a_lookup_error(asked):
    with pytest.raises(LookupError):
        asked[1].similar("ghost", 5)


# ---------------------------------------------------------------------------------------------------------------- links
def note_candidates(recommender: Recommender, monkeypatch) -> list[Found]:
    """A list that the candidates of every request from here on are added to."""
    found, candidates = [], recommender._candidates

    def noted(*given):
        found.append(candidates(*given))
        return found[-1]

    monkeypatch.setattr(recommender, "_candidates", noted)
    return found


def test_a_release_serves_histories_and_links_as_far_as_its_held_out_days_bear_them_out(new_shop):
    with new_shop() as shop, Store.open(shop) as store:
        release, loaded = Release.open(shop.models_dir), Recommender(store, shop, TextEncoder.load(shop)).live()
        data = ShopData.of_release(store, loaded.encoder, release)
        start = release.manifest["user_tower"]["validation_start"]
        tower = release.aligned_user_tower(data.items.product_ids, USER_TOWER_HOLDOUT)
        trusted = train_user.trusted_config(
            tower, data, data.links(start), data.requests(start, data.now, start),
            release.profile_scaler().transform(data.profiles), tower.config.history, train_user.RETRIEVED,
        )  # fmt: skip
        assert loaded.user_tower.config.history_trust == trusted.history_trust
        assert loaded.link_weights.together == pytest.approx(trusted.link_trust * loaded.weights_of("basket").together)


def test_a_shopper_is_served_what_training_retrieves_for_them(new_shop, monkeypatch):
    """Candidates, order, scores, links and the share of new goods, through the database and without it."""
    with new_shop() as shop, Store.open(shop) as store:
        recommender = Recommender(store, shop, TextEncoder.load(shop))
        release, loaded = Release.open(shop.models_dir), recommender.live()
        data = ShopData.of_release(store, loaded.encoder, release)
        tower = release.aligned_user_tower(data.items.product_ids)
        users = np.flatnonzero(np.diff(data.histories.starts) > 3)[:20]
        no_context = np.full(len(users), data.histories.contexts.index(""))
        retrieved = train_user.retrieve(
            tower, data, data.links(data.now), Requests(users, no_context, [users] * len(users), data.now),
            release.profile_scaler().transform(data.profiles), tower.config.history, CANDIDATES,
            round(loaded.new_goods * CANDIDATES),
        )  # fmt: skip
        found = note_candidates(recommender, monkeypatch)
        for row, user in enumerate(users):
            answer = recommender.recommend(Request(data.histories.user_ids[user], k=CANDIDATES, now=data.now))
            ids = [data.items.product_ids[number] for number in retrieved.rows[row]]
            served = [item.product_id for item in sorted(answer.items, key=lambda item: item.retrieval_rank)]
            assert sorted(served) == sorted(ids)
            order = [ids.index(name) for name in served]
            # Scores that differ by a rounding only may stand in either order.
            assert (np.diff(retrieved.scores[row][order]) <= 1e-5).all()
            np.testing.assert_allclose(found[-1].scores, retrieved.scores[row][order], atol=1e-3)
            np.testing.assert_allclose(found[-1].together, retrieved.together[row][order], atol=1e-5)
            np.testing.assert_array_equal(found[-1].variant, retrieved.variant[row][order])
        assert retrieved.together.any(axis=1).all()
        assert retrieved.variant.any(axis=1).sum() > len(users) / 2


def test_links_count_whether_or_not_what_was_met_may_come_again(asked, monkeypatch):
    store, recommender = asked
    commerce = store.products.read_commerce()
    groups = [group for group in commerce.group_id if group is not None and commerce.group_id.count(group) > 1]
    recommender.live()
    found = note_candidates(recommender, monkeypatch)
    for exclude_history in (True, False):
        again = 0
        for group in dict.fromkeys(groups):
            met, *variants = (
                name for name, of in zip(commerce.product_ids, commerce.group_id, strict=True) if of == group
            )
            recommender.recommend(Request(history=[met], k=100, now=NOW, exclude_history=exclude_history))
            names = found[-1].product_ids
            expected = [float(name in variants) for name in names]  # nothing is a variant of itself
            assert found[-1].variant.tolist() == expected
            again += met in names
        assert bool(again) is not exclude_history
        assert any(answer.together.any() for answer in found)
        assert any(answer.variant.any() for answer in found)
        found.clear()


def put_bare(store: Store, recommender: Recommender, product_id: str, group_id: str | None = None) -> None:
    """A product that costs next to nothing and of which nothing is known but its name."""
    store.products.put([RawProduct(product_id=product_id, title=product_id, price=1.0, group_id=group_id)])
    bare = Product(product_id=product_id, title=product_id)
    store.products.put_features([bare], origin="test")
    recommender.index(recommender.live(), [product_id])


def reasons(answer: Answer) -> dict[str, list[str]]:
    """Kinds, of each item."""
    return {item.product_id: [reason.kind for reason in item.reasons] for item in answer.items}


def test_an_item_that_shares_no_word_is_there_as_a_variant_or_as_taken_together(new_shop):
    with new_shop() as shop, Store.open(shop) as store:
        recommender = Recommender(store, shop, TextEncoder.load(shop))
        name, cheap = recommender.live().name, Filters(max_price=1.0)
        for product_id, group in [("red", "colours"), ("blue", "colours"), ("belt", None), ("trousers", None)]:
            put_bare(store, recommender, product_id, group)
        linked = replace(store.vectors.fetch(name, ["trousers"]), product_ids=["jeans"], linked=[["belt"]])
        store.vectors.upsert(name, replace(linked, link_strength=[[0.9]]))
        store.products.put([RawProduct(product_id="jeans", title="Jeans")])
        of_red = reasons(recommender.recommend(Request(history=["red"], filters=cheap, now=NOW)))
        assert of_red.keys() == {"blue", "belt", "trousers"}
        assert of_red["blue"][0] == "variant"
        assert not {"variant", "taken_together"} & {*of_red["belt"], *of_red["trousers"]}
        of_jeans = reasons(recommender.recommend(Request(history=["jeans"], filters=cheap, now=NOW)))
        assert of_jeans["belt"][0] == "taken_together"
        assert not {"variant", "taken_together"} & {*of_jeans["red"], *of_jeans["trousers"]}


def test_nothing_is_taken_together_with_nothing(asked):
    for context in ("", "beach vacation"):
        answer = asked[1].recommend(Request(context=context, k=100, now=NOW))
        kinds = {kind for of_item in reasons(answer).values() for kind in of_item}
        assert not kinds & {"taken_together", "variant"}
        assert len(kinds) > 1


def test_a_damaged_new_release_is_not_read_again_by_every_request(asked, monkeypatch):
    _, recommender = asked
    healthy = recommender.live().name
    opened = []

    def damaged(models_dir, name):
        opened.append(name)
        raise UserError("damaged")

    monkeypatch.setattr(Release, "current", lambda models_dir: "broken")
    monkeypatch.setattr(Release, "open", damaged)
    assert {recommender.recommend(Request(k=1, now=NOW)).release for _ in range(3)} == {healthy}
    assert opened == ["broken"]


def test_where_trends_take_too_long_to_read_the_popular_list_is_there_all_the_same(asked, monkeypatch):
    store, recommender = asked

    def too_long(*given):
        raise psycopg.errors.QueryCanceled

    monkeypatch.setattr(store.events, "trending", too_long)
    answer = recommender.recommend(Request(kind="trending", k=5))
    assert (answer.degraded, len(answer.items)) == (True, 5)


def test_without_the_database_the_popular_list_answers_and_a_filter_cannot(asked):
    store, recommender = asked
    recommender.live()
    store.pool.close()
    answer = recommender.recommend(Request(k=5, now=NOW))
    assert answer.degraded
    assert len(answer.items) == 5
    with pytest.raises(UnavailableError):
        recommender.recommend(Request(filters=Filters(max_price=1.0), now=NOW))
    first = answer.items[0].product_id
    assert first not in [item.product_id for item in recommender.recommend(Request(history=[first], k=5)).items]
    again = recommender.recommend(Request(history=[first], exclude_history=False, k=5))
    assert again.items[0].product_id == first


def test_a_list_costs_two_round_trips_and_each_model_once(asked, monkeypatch):
    """What a request costs must not grow unseen: reasons take one round trip more, and one pass of the user tower."""
    store, recommender = asked
    user = store.events.read().user_ids[0]
    loaded = recommender.live()
    counts: Counter[str] = Counter()

    def counted(name, call):
        def wrapper(*args, **kwargs):
            counts[name] += 1
            return call(*args, **kwargs)

        return wrapper

    monkeypatch.setattr(store.pool, "connection", counted("round trips", store.pool.connection))
    monkeypatch.setattr(loaded, "fused_tower", counted("user tower", loaded.fused_tower))
    monkeypatch.setattr(loaded.reranker, "forward", counted("reranker", loaded.reranker.forward))
    for explain, round_trips, passes in ((False, 2, 1), (True, 3, 2)):
        counts.clear()
        answer = recommender.recommend(Request(user, k=20, now=NOW, explain=explain))
        assert answer.plan == "hnsw"
        assert counts == {"round trips": round_trips, "user tower": passes, "reranker": 1}


def test_a_release_that_is_indexed_anew_is_read_anew(new_shop):
    """Its items lie elsewhere then, and a query by the space of before finds the wrong ones."""
    with new_shop() as shop, Store.open(shop) as store:
        recommender = Recommender(store, shop, TextEncoder.load(shop))
        before = recommender.live()
        assert recommender.live() is before
        build_index.main(build_index.IndexOptions(**shop.model_dump()))
        after = recommender.live()
        assert after is not before
        assert recommender.live() is after
