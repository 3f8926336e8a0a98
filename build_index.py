"""Stage 4: put a release's item vectors into PostgreSQL, build the HNSW index, check, and make the release live.

    python build_index.py                      # the newest release
    python build_index.py --release 20260101-120000 --no-live

An item's row is `[unit vector ; popularity coordinates ; collaborative coordinates]`, with its links to other items beside it, and
once more as the index has it (search_space.py). The
release goes live only when every check passes; the one that was live serves until then, and its vectors stay for a way back. A
release that is indexed again, even the live one, answers by its old rows until the new ones are there.
Exit code 3: it is indexed, but foresees the newest events, which neither learned from, worse than the live one, which stays
(compare_releases.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, partial

import numpy as np
import torch
from pydantic import Field
from tqdm import tqdm

from compare_releases import compare
from item_links import ItemLinks
from model_user import UserTower
from recommender import Recommender
from release import SEARCH_SPACE, ItemEncoder, Release
from search_space import SearchSpace
from settings import Settings, UserError, run_script
from shop_data import ShopData, validation_start
from store import ItemRows, Store
from store.vectors import OUTSTANDING, UNTOUCHED, USUAL, BuildCost
from tensors import KIND_IDS, UserBatch
from text_encoder import TextEncoder
from train_user import item_keys, retrieve

FITTED_QUERIES = 200  # by which the search space is made
CHECKED_QUERIES = 200  # others
CHECKED_AT = 100
CHECKED_NEW = 10  # of what nobody met, as many as a list looks for
COPY_BATCH = 10_000
SEARCH_WIDTHS = (100, 140, 200, 280, 400, 560, 800)  # hnsw.ef_search: twice as wide costs about 1.6 times as much


class IndexOptions(Settings):
    release: str = Field("", description="release to index; empty is the newest one")
    live: bool = Field(True, description="make the release live when every check passes")
    recall: float = Field(
        0.995, ge=0, le=1, description="searches are widened until the index finds so much of exact search"
    )
    min_recall: float = Field(0.95, ge=0, le=1, description="an index that finds less, however wide, does not go live")
    new_recall: float = Field(
        0.9,
        ge=0,
        le=1,
        description="where the index finds less of the best that nobody met, their graph is built once more, with more care",
    )
    margin: float = Field(
        0.1,
        ge=0,
        le=1,
        description="share by which it may be worse than the live release on the same newest events",
    )
    hnsw_m: int = Field(16, ge=4, le=100, description="links of an HNSW node")
    ef_construction: int = Field(64, ge=8, le=1000, description="candidates while an HNSW node is linked")


class WorseError(UserError):
    """The release that is live is better; it stays."""

    exit_code = 3


def index_rows(shop: ShopData, release: Release) -> np.ndarray:
    """Rows of every item as of now, float32 [N, row_width]. Raises UserError when one is not a sound vector."""
    tower = release.aligned_user_tower(shop.items.product_ids)
    with torch.no_grad():
        rows = item_keys(tower, shop, shop.popularity_as_of(shop.now)).numpy()
    norms = np.linalg.norm(rows[:, : shop.vectors.shape[1]], axis=1)
    bad = np.flatnonzero(~np.isfinite(rows).all(1) | (np.abs(norms - 1.0) > 1e-3))
    if len(bad):
        raise UserError(
            f"{len(bad)} item vectors are not finite or not of unit length (first: {shop.items.product_ids[bad[0]]!r}); "
            "train the encoder again"
        )
    return rows


def queries_of_shoppers(shop: ShopData, release: Release, links: ItemLinks, rows: np.ndarray, count: int) -> np.ndarray:
    """Real queries to check the index of `rows` with: the newest requests, [<= count, row_width]; where there are none, those of
    shoppers who looked at one product each."""
    tower = release.aligned_user_tower(shop.items.product_ids)
    requests = shop.requests(validation_start(shop.histories.at, 0.1), shop.now, shop.now)
    if not len(requests):
        return _queries_after_a_look(release, tower, rows, count)
    chosen = np.random.default_rng(0).permutation(len(requests))[:count]
    profiles = release.profile_scaler().transform(shop.profiles)
    return retrieve(tower, shop, links, requests.take(chosen), profiles, tower.config.history, 1).queries


@torch.no_grad()
def _queries_after_a_look(release: Release, tower: UserTower, rows: np.ndarray, count: int) -> np.ndarray:
    config = tower.config
    # Histories hold what index rows hold.
    looked_at = torch.from_numpy(rows[np.random.default_rng(0).permutation(len(rows))[:count, None]])
    shoppers = len(looked_at)
    profile = torch.from_numpy(release.profile_scaler().transform([{}]))
    return tower(
        UserBatch(
            history=looked_at[..., : config.item_width],
            collaborative=looked_at[..., config.untouched_column + 1 :],
            kind=torch.full((shoppers, 1), KIND_IDS["view"]),
            age=torch.zeros(shoppers, 1),
            history_mask=torch.ones(shoppers, 1, dtype=torch.bool),
            context=torch.zeros(shoppers, config.text_width),
            profile=profile.expand(shoppers, -1),
        )
    ).numpy()


def copy_rows(
    store: Store, table: str, rows: ItemRows, space: SearchSpace, linked: Callable[[int], tuple[list[str], list[float]]]
) -> None:
    """Into a table that was begun; `linked` gives the links of a row, and how strong they are."""
    placed, part = space.place(rows.vectors)
    # The long ones first: the graph grows around what many searches end at. Not so outside the usual part: of the outstanding one
    # is as good a start as another, and of those that nobody met many are the same. Where such come one after the other, they are
    # linked to each other and to nothing else.
    length = np.linalg.norm(placed[:, :-1], axis=1)
    chance = np.random.default_rng(0).random(len(length))
    order = np.argsort(np.where(part == USUAL, -length, chance), kind="stable")
    for start in tqdm(range(0, len(order), COPY_BATCH), desc="copying vectors", unit="batch", leave=False):
        batch = order[start : start + COPY_BATCH]
        links = [linked(row) for row in batch.tolist()]
        store.vectors.copy(
            table,
            ItemRows(
                [rows.product_ids[row] for row in batch],
                rows.vectors[batch],
                rows.std_ids[batch],
                rows.re_ids[batch],
                placed[batch],
                part[batch],
                [others for others, _ in links],
                [strengths for _, strengths in links],
                [rows.features_at[row] for row in batch] if rows.features_at else (),
            ),
        )


def foreseen(cost: BuildCost) -> str:
    """What to expect of an index build, before it begins."""
    time = "less than a minute" if cost.seconds < 60 else f"about {cost.seconds / 60:.1f} minutes"
    memory = f"{cost.megabytes:,.0f} MB of the database server's memory"
    if not cost.fits:
        memory += ", in which not all of the graph fits, so that it may take several times as long"
    return f"building an HNSW index over {cost.rows:,} items: {time}, {memory}"


@dataclass(frozen=True)
class IndexCheck:
    """How wide an index has to be searched, and what it then finds of the exact best: of all, and of those that nobody met."""

    ef_search: int
    recall: float
    new_recall: float

    def __str__(self) -> str:
        return (
            f"recall@{CHECKED_AT} of the index {self.recall:.4f} at ef_search {self.ef_search}, recall@{CHECKED_NEW} of what "
            f"nobody met {self.new_recall:.4f}"
        )


@dataclass(frozen=True)
class IndexedTable:
    """A table of vectors under test: the exact rows float32 [N, D] behind it, their ids, and real queries [M, D]."""

    store: Store
    name: str
    rows: np.ndarray
    ids: list[str]
    space: SearchSpace
    queries: np.ndarray

    def recall(self, ef_search: int) -> float:
        """The share of the exact best items that the index finds, over the queries, in searches of that width."""
        return self._recall(self._best, ef_search, new=False)

    def new_recall(self, ef_search: int) -> float:
        """The same of the best that nobody met; 1.0 where there are none."""
        return self._recall(self._best_new, ef_search, new=True)

    # These are made once for all widths: over a million rows exact search takes longer than the searches.
    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {product_id: row for row, product_id in enumerate(self.ids)}

    @cached_property
    def _best(self) -> tuple[int, list[float]]:
        return _exact_best(self.rows, self.queries, CHECKED_AT)

    @cached_property
    def _best_new(self) -> tuple[int, list[float]]:
        return _exact_best(self.rows[self.space.unmet(self.rows)], self.queries, CHECKED_NEW)

    def _recall(self, best: tuple[int, list[float]], ef_search: int, new: bool) -> float:
        count, least = best
        if not count:
            return 1.0
        found = 0
        for query, score in zip(self.queries, least, strict=True):
            answer = self.store.vectors.search(
                self.name, query, 0 if new else count, ef_search=ef_search, placed=self.space.query(query),
                new=count if new else 0,
            )  # fmt: skip
            scores = self.rows[[self._row_of[product_id] for product_id in answer.product_ids]] @ query
            found += int((scores >= score).sum())
        return found / (count * len(self.queries))


def _exact_best(rows: np.ndarray, queries: np.ndarray, count: int) -> tuple[int, list[float]]:
    """How many the best `count` of the rows [N, D] are, and for each query [M, D] the least score of one of them."""
    count = min(count, len(rows))
    # Items tied with the last one are as good.
    return count, [float(np.partition(rows @ query, -count)[-count]) - 1e-4 for query in queries] if count else []


def search_width(table: IndexedTable, options: IndexOptions) -> tuple[int, float]:
    """The least of SEARCH_WIDTHS that finds enough, and what it finds. How wide a search must be depends on the data: items in
    tight clusters, as of a catalogue of few attributes, need more."""
    for ef_search in SEARCH_WIDTHS:
        recall = table.recall(ef_search)
        if recall >= options.recall:
            break
    return ef_search, recall


def build_graph(table: IndexedTable, options: IndexOptions) -> IndexCheck:
    """Build the index over a table's rows, and check it.

    Where even the widest searches find too little, chance may have cut off a crowd of the outstanding, and where they find too
    little of what nobody met, one of that (see store.vectors): that part's graph is built once more. Raises UserError when the
    index then finds less than it must of all; finding too little of what nobody met is said.
    """
    _build(table, options, None)
    ef_search, recall = search_width(table, options)
    if recall < options.recall:
        _build(table, options, OUTSTANDING)
        ef_search, recall = search_width(table, options)
    if recall < options.min_recall:
        raise UserError(
            f"the index finds only {recall:.3f} of the exact best {CHECKED_AT} items (at least {options.min_recall} "
            "asked); raise --hnsw-m or --ef-construction"
        )
    # Of them a list holds few: searches, which look for all, are not made wider for their sake.
    new_recall = table.new_recall(ef_search)
    if new_recall < options.new_recall:
        print(f"the index finds {new_recall:.3f} of the best that nobody met; with more care:")
        _build(table, options, UNTOUCHED)
        new_recall = table.new_recall(ef_search)
    if new_recall < options.new_recall:
        print(
            f"the index still finds only {new_recall:.3f} of the best {CHECKED_NEW} items that nobody met "
            f"({options.new_recall} wanted); a higher --hnsw-m or --ef-construction finds more"
        )
    return IndexCheck(ef_search, recall, new_recall)


def _build(table: IndexedTable, options: IndexOptions, anew: int | None) -> None:
    """All of the index, or the graph of one part in the place of the one it has; first how long that takes."""
    vectors = table.store.vectors
    print(foreseen(vectors.build_cost(table.name, options.hnsw_m, options.ef_construction, anew)))
    with tqdm(total=100, desc="building the HNSW index", unit="%", leave=False) as bar:
        vectors.build_index(table.name, options.hnsw_m, options.ef_construction, partial(_tell, bar), anew)


def _tell(bar: tqdm, share: float) -> None:
    bar.update(round(100 * share) - bar.n)


def check_not_worse(
    store: Store, shop: ShopData, release: Release, options: IndexOptions, text_encoder: TextEncoder
) -> None:
    """Raises WorseError when the live release foresees the same events better than this one by more than the margin and chance,
    UserError when this one is damaged. A live one that cannot be compared keeps nobody out, and that is said."""
    name = Release.current(options.models_dir)
    if name is None or name == release.name or name not in Release.names(options.models_dir):
        return
    release.check_files()  # or it would pass for a live one that cannot be compared
    try:
        live = Release.open(options.models_dir, name)
        if live.learned_from_events and not release.learned_from_events:
            raise WorseError(
                f"release {release.name} learned nothing from events, as the live {name} did; it stays as it is, indexed but not "
                "live; are all events still there?"
            )
        comparison = compare(store, shop, release, live, text_encoder)
    except WorseError:
        raise
    except UserError as error:
        print(f"release {release.name} is not compared with the live {name}, and may take its place: {error}")
        return
    if comparison.worse(options.margin):
        raise WorseError(
            f"release {release.name} is worse than the live {name}: {comparison}; it stays as it is, indexed but not live "
            f"(--margin {options.margin} decides)"
        )
    print(f"release {release.name} is compared with the live {name}: {comparison}")


def main(options: IndexOptions) -> None:
    started = time.monotonic()
    release = Release.open(options.models_dir, options.release)
    for needed in ("item_tower", "user_tower", "reranker"):
        if needed not in release.manifest:
            raise UserError(f"release {release.name} has no {needed} yet; run the training script that makes it")
    encoder = ItemEncoder(release, TextEncoder.load(options))
    with Store.open(options) as store:
        # Before the features: what changes in between is then seen to be outdated, and made once more than it need be.
        features_at = store.products.features_at()
        encoder.learn_words(store.releases.words(release.name))  # of goods that came since it was trained
        shop = ShopData.of_release(store, encoder, release)
        rows = index_rows(shop, release)
        links = shop.links(shop.now)
        queries = queries_of_shoppers(shop, release, links, rows, FITTED_QUERIES + CHECKED_QUERIES)
        fitted = min(FITTED_QUERIES, (len(queries) + 1) // 2)
        untouched = shop.vectors.shape[1] + shop.popularity.width - 1  # UserTowerConfig.untouched_column
        space = SearchSpace.fit(rows, queries[:fitted], untouched)
        table = store.vectors.begin(release.name, rows.shape[1])
        ids = shop.items.product_ids

        def linked(row: int) -> tuple[list[str], list[float]]:
            others, strengths = links.of(row)
            return [ids[other] for other in others], strengths.tolist()

        made_of = [features_at.get(product_id) for product_id in ids]
        copy_rows(store, table, ItemRows(ids, rows, shop.items.std, shop.items.re, features_at=made_of), space, linked)
        checked = queries[fitted:] if len(queries) > 1 else queries
        check = build_graph(IndexedTable(store, table, rows, ids, space, checked), options)
        store.vectors.finish(release.name)
        release.record(
            "index", items=len(ids), dimensions=rows.shape[1], **asdict(check),
            seconds=time.monotonic() - started, options=options.model_dump(mode="json", exclude={"database_url"}),
        )  # fmt: skip
        # Last, with the rows in place: by this file workers see that a release was indexed anew.
        release.save_weights(SEARCH_SPACE, space)
        store.releases.record(release.name, release.manifest)
        print(f"release {release.name}: {len(ids)} items indexed, {check}")
        if options.live:
            check_not_worse(store, shop, release, options, encoder.text_encoder)
            release.make_live()
            print(f"release {release.name} is live")
        # What the API put meanwhile, it put into the release that was live then, or, if this one answers in an experiment, into the
        # table that it had.
        if count := Recommender(store, options, encoder.text_encoder).catch_up([release.name]):
            print(f"{count} products that came or changed meanwhile are indexed too")


if __name__ == "__main__":
    run_script(IndexOptions, main)
