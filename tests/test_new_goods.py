"""New goods with a word that nobody ever saw reach the shoppers whose hidden taste they fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import build_index
import extract_features
import train_reranker
import train_simcse
import train_user
from catalog import RawProduct
from datasets import sample_shop
from recommender import Recommender, Request
from settings import Settings
from store import Store
from tests.tiny import tiny_text_encoder
from text_encoder import TextEncoder


def unseen_style(made: sample_shop.SampleShop, product: RawProduct) -> RawProduct:
    """What a seller would put up next: like something that is sold, but of a style that no model has a word for."""
    gold = made.gold[product.product_id]
    attributes = {**gold.std, **gold.re, "style": ["zigzagcore"]}
    return RawProduct(
        product_id=f"new-{product.product_id}", title=product.title, attributes=attributes, price=product.price
    )


@pytest.mark.timeout(900)  # trains a shop, better than the one that most tests share: that one has no taste yet
def test_new_goods_of_an_unseen_style_reach_those_whose_taste_they_fit(database_url, data_dir):
    made = sample_shop.generate(seed=1, products=200, shoppers=200, events=8000, days=40)
    common: dict[str, Any] = {
        "database_url": database_url, "data_dir": data_dir / "data", "models_dir": data_dir / "models",
        "text_encoder": str(tiny_text_encoder(data_dir / "text")), "_env_file": None,
    }  # fmt: skip
    settings = Settings(**common)
    with Store.open(settings) as store, store.importing("sample") as batch:
        batch.schema(made.schema)
        batch.products(made.products)
        batch.users(made.users)
        batch.events(made.events)
    extract_features.main(extract_features.ExtractOptions(**common))
    train_simcse.main(
        train_simcse.SimcseOptions(**common, epochs=20, patience=20, batch_size=32, learning_rate=3e-3, pairs=0.2)
    )
    train_user.main(
        train_user.UserOptions(
            **common, epochs=9, patience=9, batch_size=128, learning_rate=3e-3, history=10, collaborative=8, refit=False
        )
    )
    train_reranker.main(train_reranker.RerankerOptions(**common, epochs=2))
    build_index.main(build_index.IndexOptions(**common))

    models = made.products[::4]
    with Store.open(settings) as store:
        recommender = Recommender(store, settings, TextEncoder.load(settings))
        reader = extract_features.make_reader(extract_features.ReaderSettings(_env_file=None), store.cache)
        assert recommender.put_products([unseen_style(made, product) for product in models], reader).embedded == 50
        shoppers = store.events.read().user_ids
        now = sample_shop.NOW.timestamp()
        lists = [recommender.recommend(Request(shopper, k=100, now=now)).items for shopper in shoppers]

        # The daily index of the same release knows their words too.
        release, new = recommender.live().name, [f"new-{product.product_id}" for product in models]
        width = recommender.live().item_width
        before = store.vectors.fetch(release, new)
        build_index.main(build_index.IndexOptions(**common))
        after = store.vectors.fetch(release, new)
    assert after.product_ids == before.product_ids == new
    assert (after.re_ids == before.re_ids).all()
    assert np.allclose(after.vectors[:, :width], before.vectors[:, :width], atol=1e-5)
    offered = [{item.product_id for item in items} for items in lists]
    seen = np.array(
        [[f"new-{product.product_id}" in ids for product in models] for ids in offered]
    )  # (shoppers, goods)
    liking = np.array([[made.affinity(shopper, product.product_id) for product in models] for shopper in shoppers])

    # Of each product, the quarter of the shoppers who would like it most, and the quarter who would like it least.
    most, least = (np.quantile(liking, share, axis=0) for share in (0.75, 0.25))
    assert seen[liking >= most].mean() > 1.5 * seen[liking <= least].mean()
    wears = np.array([made.tastes[shopper].wears for shopper in shoppers])
    gender = np.array([made.gold[product.product_id].std["gender"][0] for product in models])
    own, others = (
        np.mean([seen[np.ix_(wears == one, gender == other)].mean() for one, other in pairs])
        for pairs in ([("women", "women"), ("men", "men")], [("women", "men"), ("men", "women")])
    )
    assert own > 1.5 * others
