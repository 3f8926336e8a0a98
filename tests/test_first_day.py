"""A shop that opens with products alone: it goes live, and learns when there is something to learn from."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest

import build_index
import extract_features
import train_reranker
import train_simcse
import train_user
from build_index import WorseError
from datasets import sample_shop
from recommender import Recommender, Request
from release import Release, report_metrics
from settings import Settings
from store import Store
from tests.conftest import TINY_SHOP
from tests.tiny import tiny_text_encoder
from text_encoder import TextEncoder


def trained(common: dict[str, Any], release: str) -> None:
    """The three trainings and the index, as a user runs them."""
    train_simcse.main(train_simcse.SimcseOptions(**common, release=release, epochs=4, batch_size=64))
    train_user.main(train_user.UserOptions(**common, release=release, epochs=2, history=10))
    train_reranker.main(train_reranker.RerankerOptions(**common, release=release, epochs=1))
    build_index.main(build_index.IndexOptions(**common, release=release))


@pytest.fixture
def common(database_url, data_dir) -> dict[str, Any]:
    return {
        "database_url": database_url, "data_dir": data_dir / "data", "models_dir": data_dir / "models",
        "text_encoder": str(tiny_text_encoder(data_dir / "text")), "_env_file": None,
    }  # fmt: skip


def test_a_shop_opens_without_a_single_event_and_learns_when_there_are_some(common, capsys):
    settings, made = Settings(**common), sample_shop.generate(**TINY_SHOP)
    every, new = [product.product_id for product in made.products], {p.product_id for p in made.products[::15]}
    today = datetime.now(UTC)

    def arrived(product_id: str) -> datetime:
        return today if product_id in new else today - timedelta(days=365)

    with Store.open(settings) as store, store.importing("sample") as batch:
        batch.schema(made.schema)
        batch.products(p.model_copy(update={"arrived_at": arrived(p.product_id)}) for p in made.products)
    extract_features.main(extract_features.ExtractOptions(**common))
    trained(common, "first")
    said = capsys.readouterr().out
    assert "user_tower.pth learned nothing: there is no event on a product yet" in said
    assert "learned nothing, and lists keep retrieval's order: user_tower.pth learned nothing either" in said
    assert "--validation-share" not in said  # of no event at all no share helps
    release = Release.open(settings.models_dir)
    assert (Release.current(settings.models_dir), release.learned_from_events) == ("first", False)
    assert report_metrics(release.manifest).keys() == {"item_tower"}

    with Store.open(settings) as store:
        recommender = Recommender(store, settings, TextEncoder.load(settings))
        width = recommender.live().item_width
        vectors = dict(zip(every, store.vectors.fetch("first", every).vectors[:, :width], strict=True))
        met = made.products[1].product_id

        def likeness(**asked: Any) -> float:
            answer = recommender.recommend(Request(k=10, **asked))
            return float(np.mean([vectors[item.product_id] @ vectors[met] for item in answer.items]))

        stranger = recommender.recommend(Request(k=10))
        assert {item.product_id for item in stranger.items} <= new
        assert likeness(history=[met]) > likeness() + 0.1
        assert likeness(kind="similar", product_id=met) > likeness() + 0.1

    with Store.open(settings) as store, store.importing("sample") as batch:
        batch.users(made.users)
        batch.events(made.events)
    trained(common, "second")
    assert (Release.current(settings.models_dir), Release.open(settings.models_dir).learned_from_events) == (
        "second",
        True,
    )


@pytest.mark.parametrize(
    ("left", "lacking"),
    [
        ("false", "there is no event on a product yet"),
        ("at < (SELECT min(at) FROM events) + interval '12 hours'", "fewer than 2 events to learn from before"),
        ("user_id = (SELECT min(user_id) FROM events)", "no shopper meets anything new in the held-out days"),
    ],
)
def test_where_the_log_is_lost_the_release_that_learned_from_it_stays_live(new_shop, capsys, left, lacking):
    with new_shop() as shop:
        live = Release.current(shop.models_dir)
        with Store.open(shop) as store, store.pool.connection() as connection:
            connection.execute(f"DELETE FROM events WHERE NOT ({left})")
            # Of one shopper: everything once more at the end, so that nothing is new to them.
            connection.execute(
                "INSERT INTO events (event_id, user_id, product_id, kind, at, context)"
                " SELECT 'again' || event_id, user_id, product_id, kind, (SELECT max(at) FROM events) + interval '9 days',"
                " context FROM events WHERE %s",
                ("min(user_id)" in left,),
            )
        common = {
            **shop.model_dump(include={"database_url", "data_dir", "models_dir", "text_encoder"}),
            "_env_file": None,
        }
        with pytest.raises(WorseError, match="learned nothing from events, as the live"):
            trained(common, "later")
        assert lacking in capsys.readouterr().out
        assert Release.current(shop.models_dir) == live
