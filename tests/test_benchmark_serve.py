"""What the service is compared with: as good an answer, only made the plain way."""

from __future__ import annotations

import numpy as np
import pytest

import recommender
from benchmarks.performance import Row, page
from benchmarks.plain import Plain
from recommender import Recommender, Request
from release import Release
from store import Store
from store.vectors import MAX_EF_SEARCH
from text_encoder import TextEncoder


def test_the_plain_way_makes_the_lists_of_the_service_but_for_links_and_new_goods(
    shop, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(recommender, "_links", lambda *_: None)
    with Store.open(shop) as store:
        service = Recommender(store, shop, TextEncoder.load(shop))
        live = service.live()
        live.new_goods = 0.0
        release = Release.open(shop.models_dir, live.name)
        release.manifest["index"]["ef_search"] = MAX_EF_SEARCH  # of so few products the service sorts all
        plain = Plain(store, release)
        with plain.pool:
            for user_id in store.events.read().user_ids[:5]:
                ours = service.recommend(Request(user_id=user_id, k=100, explain=False)).items
                theirs = plain.answer(user_id, 100).items
                assert [item.product_id for item in theirs] == [item.product_id for item in ours]
                assert [item.retrieval_rank for item in theirs] == [item.retrieval_rank for item in ours]
                np.testing.assert_allclose([item.score for item in theirs], [item.score for item in ours], atol=1e-4)


def served(items: int, **figures: float) -> list[Row]:
    return [
        Row("serve", items, metric.replace("_", " ").replace("  ", ", "), value, None, None, "c", "command")
        for metric, value in figures.items()
    ]


def test_the_page_says_what_the_next_tenfold_costs_and_where_one_node_ends():
    rows = [
        *served(1_000, p50__ms=2.5, index_build_and_check__s=10.0, throughput__answers_a_second=400.0),
        *served(10_000, p50__ms=5.0, index_build_and_check__s=28.8, throughput__answers_a_second=200.0),
        *served(100_000, p50__ms=10.0, index_build_and_check__s=288.0, throughput__answers_a_second=200.0),
    ]
    text = page(rows, "chart.svg")
    assert "| p50, ms | 10 | 20 |" in text
    assert "| index build and check, s | 288 | 2,880 |" in text
    # A hundred times as long a build at ten to the second more. Ten times p50 at twice per tenfold is 10 ** (1 / log10(2)) = 2,100
    # times the catalogue, of which nobody knows.
    assert "- index build and check, s 28,800 (a night): at about 10,000,000 products" in text
    later = "p50, ms 100 (what a page can wait for); throughput, answers a second 10 (too few to run a node for)."
    assert f"Not up to 10,000,000 products, beyond which nothing is foretold: {later}" in text
    assert "Beyond" not in page(served(1_000, p50__ms=2.5), "chart.svg")


def test_a_limit_that_is_behind_is_reached_at_the_size_that_was_measured():
    text = page([*served(1_000, p50__ms=80.0), *served(10_000, p50__ms=160.0)], "chart.svg")
    assert "at about 10,000 products" in text


def test_the_page_has_half_precision_beside_single():
    rows = [Row("index", 10_000, "size, MB", 60.0, 80.0, 0.75, "c", "command")]
    assert "| size, MB | 60 | 80 | 0.75 |" in page(rows, "chart.svg")
