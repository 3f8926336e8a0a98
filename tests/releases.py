"""Releases as a test wants them."""

from __future__ import annotations

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


def copy_vectors(store: Store, of: str, to: str, ids: Sequence[str]) -> None:
    """Rows of one release's table into that of another, just as they are."""
    copy = sql.SQL("INSERT INTO {} SELECT * FROM {} WHERE product_id = ANY(%s::text[])")
    with store.pool.connection() as connection:
        connection.execute(copy.format(table_of(to), table_of(of)), (list(ids),))
