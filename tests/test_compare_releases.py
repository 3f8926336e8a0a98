"""Whether a new release takes the live one's place: by the same events, whatever each said of itself."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

import build_index
from build_index import IndexOptions, WorseError
from compare_releases import Comparison, both_know, compare
from metrics import Ratio
from release import USER_TOWER_HOLDOUT, ItemEncoder, Release
from settings import Settings, UserError
from shop_data import ShopData
from store import Store
from store.vectors import BuildCost
from tests.releases import spoil
from text_encoder import TextEncoder


@pytest.fixture
def shop(new_shop):
    with new_shop() as settings:
        yield settings


def newer(shop: Settings) -> Release:
    """A copy of the live release, as if trained the night after."""
    live = Release.open(shop.models_dir)
    copy = Release(shutil.copytree(live.folder, shop.models_dir / "newer"))
    copy.manifest["created_at"] = "2999-01-01"
    copy.save_manifest()
    return copy


def say(release: Release, best: float) -> None:
    for part in ("user_tower", "reranker"):
        release.manifest[part]["report"]["best"] = best
    release.save_manifest()


def index(shop: Settings, margin: float) -> None:
    build_index.main(IndexOptions(**shop.model_dump(), margin=margin, _env_file=None))


def test_figures_of_other_days_decide_nothing(shop, capsys):
    say(Release.open(shop.models_dir), 0.99)  # an easy week
    say(newer(shop), 0.01)
    index(shop, margin=0.0)
    assert Release.current(shop.models_dir) == "newer"
    said = capsys.readouterr().out
    assert "which neither learned from" in said
    items = Release.open(shop.models_dir).manifest["index"]["items"]
    assert (
        f"building an HNSW index over {items} items: less than a minute, 64 MB of the database server's memory\n"
        in said
    )


def test_what_foresees_the_same_events_worse_stays_out_however_well_it_speaks_of_itself(shop):
    live = Release.open(shop.models_dir)
    say(live, 0.01)
    worse = newer(shop)
    spoil(worse)
    say(worse, 0.99)
    with pytest.raises(WorseError, match=r"recall@100 0\.\d+ against 0\.\d+, on the same \d+ requests since 20"):
        index(shop, margin=0.05)
    assert Release.current(shop.models_dir) == live.name
    index(shop, margin=1.0)
    assert Release.current(shop.models_dir) == "newer"


def test_both_are_judged_by_what_came_after_the_later_of_their_days(shop):
    live, new = Release.open(shop.models_dir), newer(shop)
    own = live.manifest["user_tower"]["validation_start"]
    encoder = ItemEncoder(live, TextEncoder.load(shop))
    with Store.open(shop) as store:
        data = ShopData.of_release(store, encoder, live)
        later = own + (data.now - own) / 2
        for first, second in ((new, live), (live, new)):
            first.manifest["user_tower"]["validation_start"] = later
            second.manifest["user_tower"]["validation_start"] = own
            found = compare(store, data, new, live, encoder.text_encoder)
            assert (found.since, len(found.new.numerator)) == (later, len(data.requests(later, data.now, later)))
            assert found.new.numerator.tolist() == found.live.numerator.tolist()
            assert found.new.denominator.tolist() == found.live.denominator.tolist()
            assert 0 < found.new.numerator.sum() < found.new.denominator.sum()
        new.manifest["user_tower"]["validation_start"] = data.now + 1.0
        with pytest.raises(UserError, match="no shopper met anything new"):
            compare(store, data, new, live, encoder.text_encoder)


def test_requests_mean_the_same_in_both_shops_and_what_one_does_not_know_is_left_out(shop):
    release = Release.open(shop.models_dir)
    encoder = ItemEncoder(release, TextEncoder.load(shop))
    start = release.manifest["user_tower"]["validation_start"]
    with Store.open(shop) as store:
        before = ShopData.of_release(store, encoder, release)
        requests = before.requests(start, before.now, start)
        gone = before.items.product_ids[requests.answers[0][0]]
        store.products.delete([gone])
        store.users.forget(before.histories.user_ids[requests.users[1]])
        after = ShopData.of_release(store, encoder, release)
    asked, again = both_know(requests, before, after)

    def named(data: ShopData, given) -> list[tuple[str, str, list[str]]]:
        return [
            (
                data.histories.user_ids[user],
                data.histories.contexts[context],
                [data.items.product_ids[i] for i in answer],
            )
            for user, context, answer in zip(given.users, given.contexts, given.answers, strict=True)
        ]

    assert named(before, asked) == named(after, again)
    assert 0 < len(asked) < len(requests)
    assert gone not in np.concatenate([names for _, _, names in named(after, again)])


def test_a_live_release_that_cannot_be_judged_keeps_nobody_out_and_that_is_said(shop, capsys):
    newer(shop)
    (Release.open(shop.models_dir, Release.current(shop.models_dir)).folder / USER_TOWER_HOLDOUT).write_bytes(b"")
    index(shop, margin=0.0)
    assert Release.current(shop.models_dir) == "newer"
    assert "is not compared with the live" in capsys.readouterr().out


def test_a_new_release_that_cannot_be_judged_stays_out(shop):
    live = Release.current(shop.models_dir)
    (newer(shop).folder / USER_TOWER_HOLDOUT).write_bytes(b"")
    with pytest.raises(UserError, match=f"{USER_TOWER_HOLDOUT} is missing or not the file"):
        index(shop, margin=1.0)
    assert Release.current(shop.models_dir) == live


@pytest.mark.parametrize(
    ("cost", "said"),
    [
        (BuildCost(200, 0.0, 64.0, True), "over 200 items: less than a minute, 64 MB of the database server's memory"),
        (BuildCost(1_000_000, 270.0, 1834.4, True), "over 1,000,000 items: about 4.5 minutes, 1,834 MB of"),
        (
            BuildCost(9_000_000, 6000.0, 4096.0, False),
            "in which not all of the graph fits, so that it may take several",
        ),
    ],
)
def test_what_a_build_takes_is_said_first(cost, said):
    assert said in build_index.foreseen(cost)


def test_it_takes_enough_shoppers_to_be_worse():
    """Of every ten, the live one finds what five took, the new one what four of them took."""

    def found(shoppers: int, hits: int) -> Ratio:
        return Ratio((np.arange(shoppers) % 10 < hits).astype(float), np.ones(shoppers))

    few, many = (Comparison(found(shoppers, 4), found(shoppers, 5), 0.0) for shoppers in (10, 1000))
    assert not few.worse(0.1)
    assert many.worse(0.1)
    assert not many.worse(0.2)
    assert (
        str(few)
        == "recall@100 0.4000 against 0.5000, on the same 10 requests since 1970-01-01, which neither learned from"
    )
