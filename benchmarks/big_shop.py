"""A shop of any size to measure on: the sample shop and its release, its products drawn out to N.

The release is trained by the project's own scripts, once. A product of the big shop lies between two of the sample shop's, with
noise, so that vectors keep the clusters of a real catalogue; its feature values, popularity and collaborative coordinates are a
sample product's. Every shop stays in a folder of its own and is used again by the next run.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from build_index import CHECKED_QUERIES, FITTED_QUERIES, IndexedTable, IndexOptions, build_graph, copy_rows
from catalog import Event, Product, RawProduct, User
from release import SEARCH_SPACE, Release
from run_split import MODELS, is_done, open_home, run_step
from search_space import SearchSpace
from settings import Settings
from store import ItemRows, Store
from tensors import UserBatch

RELEASE = "split"  # the name that run_split.py looks for
STEPS = [
    ["import_data.py", "sample"],
    ["extract_features.py", "--reader", "seller"],
    ["train_simcse.py", "--release", RELEASE, "--epochs", "4", "--batch-size", "256"],
    ["train_user.py", "--release", RELEASE, "--epochs", "2"],
    ["train_reranker.py", "--release", RELEASE],
    ["build_index.py", "--release", RELEASE],
]
SHOPPERS, EVENTS = 5_000, 20  # events of each
LINKS = 20  # of a product
UNTOUCHED = 0.02  # share of products that nobody met yet
NOISE = 0.35  # length of the noise that is added to a unit vector
BATCH = 20_000  # products made at once
DEAREST = 1000.0  # prices are uniform up to here, so that a bound on them keeps a known share
NOW = 1_782_864_000  # epoch seconds, 2026-07-01
DAY = 86_400


@dataclass(frozen=True)
class Base:
    """The sample shop, as its release holds it. M products."""

    home: Path
    products: list[Product]
    rows: ItemRows
    item_width: int
    untouched: int  # column of a row that says that nobody met the product; collaborative coordinates follow


def settings_of(home: Path) -> Settings:
    """Of the shop in that folder, whatever the environment says."""
    return Settings(data_dir=home, models_dir=home / MODELS, database_url="", _env_file=None)


def base_shop(folder: Path) -> Base:
    """Trained in `folder` if it is not there yet."""
    home = folder / "base"
    environment = open_home(home, STEPS, None, fresh=False)
    models = home / MODELS
    for step in STEPS:
        if not is_done(STEPS[-1], models) and not is_done(step, models):
            run_step(step, None, home, environment)
    release = Release.open(models, RELEASE)
    with Store.open(settings_of(home)) as store:
        products = store.products.read_features()
        rows = store.vectors.fetch(RELEASE, [product.product_id for product in products])
    config = release.user_tower().config
    width = config.item_width
    return Base(home, products, rows, width, width + config.popularity_width - 1)


def open_shop(base: Base, items: int) -> tuple[Settings, Store]:
    """The shop of so many products, live. Close the store."""
    home = base.home.parent / str(items)
    finished = home / "finished"
    if not finished.exists():
        open_home(home, [], None, fresh=True)
        shutil.copytree(base.home / MODELS, home / MODELS, dirs_exist_ok=True)
    settings = settings_of(home)
    store = Store.open(settings)
    if not finished.exists():
        with Store.open(settings_of(base.home)) as sample:
            store.put_schema(sample.schema())
        release = Release.open(settings.models_dir, RELEASE)
        _fill(store, base, release, items)
        release.make_live()
        finished.touch()
    return settings, store


def _fill(store: Store, base: Base, release: Release, items: int) -> None:
    random = np.random.default_rng(items)
    like = random.integers(len(base.products), size=items)
    for start in tqdm(range(0, items, BATCH), desc=f"importing {items:,} products", unit="batch"):
        part = like[start : start + BATCH]
        with store.importing("benchmark") as batch:
            batch.products(_products(base, random, part, start))
            batch.features(_features(base, part, start))
    with store.importing("benchmark") as batch:
        batch.users(_users(random))
        batch.events(_events(random, items))
    with store.pool.connection() as connection:
        connection.execute("VACUUM (ANALYZE)")

    rows = _rows(base, random, like)
    # Else the server would take all of them for changed, and embed them anew while it is measured.
    made_of = store.products.features_at()
    rows = replace(rows, features_at=[made_of[product_id] for product_id in rows.product_ids])
    started = time.monotonic()
    queries = queries_of(release, base, rows.vectors, random, FITTED_QUERIES + CHECKED_QUERIES)
    space = SearchSpace.fit(rows.vectors, queries[:FITTED_QUERIES], base.untouched)
    release.save_weights(SEARCH_SPACE, space)
    table = store.vectors.begin(RELEASE, rows.vectors.shape[1])

    def linked(row: int) -> tuple[list[str], list[float]]:
        strengths = np.sort(random.exponential(0.05, LINKS))[::-1]
        return [name_of(number) for number in random.integers(items, size=LINKS).tolist()], strengths.tolist()

    copy_rows(store, table, rows, space, linked)
    indexed = IndexedTable(store, table, rows.vectors, rows.product_ids, space, queries[FITTED_QUERIES:])
    check = build_graph(indexed, IndexOptions(_env_file=None))
    seconds = time.monotonic() - started
    store.vectors.finish(RELEASE)
    release.record("index", **{**release.manifest["index"], **asdict(check), "seconds": seconds})


def shoppers_batch(
    release: Release, base: Base, vectors: np.ndarray, random: np.random.Generator, text_width: int
) -> UserBatch:
    """One shopper of EVENTS events on products drawn from `vectors`, and a body."""
    row = torch.from_numpy(vectors[random.choice(len(vectors), EVENTS, replace=False)])[None]
    profile = release.profile_scaler().transform(
        [{"height_cm": random.normal(168, 9), "weight_kg": random.normal(64, 11)}]
    )
    return UserBatch(
        history=row[..., : base.item_width],
        collaborative=row[..., base.untouched + 1 :],
        kind=torch.zeros(1, EVENTS, dtype=torch.int64),
        age=torch.ones(1, EVENTS),
        history_mask=torch.ones(1, EVENTS, dtype=torch.bool),
        context=torch.zeros(1, text_width),
        profile=torch.from_numpy(profile),
    )


def queries_of(
    release: Release, base: Base, vectors: np.ndarray, random: np.random.Generator, count: int
) -> np.ndarray:
    """Queries of the user tower for so many shoppers: float32 [count, D]."""
    tower = release.user_tower().eval()
    width = tower.config.text_width
    with torch.inference_mode():
        return np.concatenate(
            [tower(shoppers_batch(release, base, vectors, random, width)).numpy() for _ in range(count)]
        )


def name_of(number: int) -> str:
    return f"p{number:07d}"


def _products(base: Base, random: np.random.Generator, like: np.ndarray, start: int) -> Iterator[RawProduct]:
    prices = random.uniform(0, DEAREST, len(like)).round(2).tolist()
    stock = (random.random(len(like)) < 0.9).tolist()
    for place, number in enumerate(like.tolist()):
        yield RawProduct.model_construct(
            product_id=name_of(start + place), title=f"{base.products[number].title} {start + place}", description="",
            attributes={}, price=prices[place], in_stock=stock[place], group_id=f"g{(start + place) // 4}",
            arrived_at=datetime.fromtimestamp(NOW - DAY * (start + place) % (365 * DAY), UTC),
        )  # fmt: skip


def _features(base: Base, like: np.ndarray, start: int) -> Iterator[Product]:
    for place, number in enumerate(like.tolist()):
        product = base.products[number]
        yield Product.model_construct(product_id=name_of(start + place), title="", std=product.std, re=product.re)


def _rows(base: Base, random: np.random.Generator, like: np.ndarray) -> ItemRows:
    vectors = np.empty((len(like), base.rows.vectors.shape[1]), dtype=np.float32)
    width = base.item_width
    for start in range(0, len(like), BATCH):
        rows = base.rows.vectors[like[start : start + BATCH]]
        count = len(rows)
        share = random.uniform(0.6, 1.0, (count, 1))
        other = base.rows.vectors[random.integers(len(base.products), size=count), :width]
        noise = random.normal(size=(count, width)) * NOISE / np.sqrt(width)
        mixed = share * rows[:, :width] + (1.0 - share) * other + noise
        rows[:, :width] = mixed / np.linalg.norm(mixed, axis=1, keepdims=True)
        # No two are equally popular, or ties would make one answer as good as another.
        rows[:, width : base.untouched] *= random.uniform(0.8, 1.0, (count, 1))
        new = random.random(count) < UNTOUCHED
        rows[new, width:] = 0.0
        rows[:, base.untouched] = new
        vectors[start : start + count] = rows
    ids = [name_of(number) for number in range(len(like))]
    return ItemRows(ids, vectors, base.rows.std_ids[like], base.rows.re_ids[like])


def _users(random: np.random.Generator) -> Iterator[User]:
    for number in range(SHOPPERS):
        height, weight = random.normal(168, 9), random.normal(64, 11)
        yield User(user_id=f"u{number}", profile={"height_cm": float(height), "weight_kg": float(weight)})


def _events(random: np.random.Generator, items: int) -> Iterator[Event]:
    for number in range(SHOPPERS):
        for place, item in enumerate(random.choice(items, EVENTS, replace=False).tolist()):
            kind = ("view", "view", "cart", "purchase")[place % 4]
            at = datetime.fromtimestamp(NOW - DAY * (EVENTS - place) - number, UTC)
            yield Event(event_id=f"e{number}-{place}", user_id=f"u{number}", product_id=name_of(item), kind=kind, at=at)
