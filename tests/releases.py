"""Releases as a test wants them."""

from __future__ import annotations

import torch

from release import USER_TOWER_HOLDOUT, Release


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
