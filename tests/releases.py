"""Releases as a test wants them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

import torch
from psycopg import sql

from release import USER_TOWER_HOLDOUT, Release
from store import Store
from store.vectors import table_of


def spoil(release: Release) -> None:
    """Its held-out user tower looks away from what it learned to look for."""
    tower = release.user_tower(USER_TOWER_HOLDOUT)
    with torch.no_grad():
        for weights in (
            tower.history_gain,
            *tower.to_item.parameters(),
            *tower.to_popularity.parameters(),
            *tower.to_collaborative.parameters(),
        ):
            weights.neg_()
    release.save_weights(USER_TOWER_HOLDOUT, tower)


def copy_release(store: Store, of: Release, to: str, ids: Sequence[str]) -> None:
    """Another release beside it, just the same, but that it knows of these products only."""
    shutil.copytree(of.folder, of.folder.parent / to)
    store.vectors.create(to, of.manifest["index"]["dimensions"])
    copy = sql.SQL("INSERT INTO {} SELECT * FROM {} WHERE product_id = ANY(%s::text[])")
    with store.pool.connection() as connection:
        connection.execute(copy.format(table_of(to), table_of(of.name)), (list(ids),))
    store.releases.record(to, of.manifest)
    if words := store.releases.words(of.name):  # rows may hold their ids
        store.releases.add_words(to, list(words), first_id=min(words.values()))
