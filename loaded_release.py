"""Releases in memory, ready to answer: which is live now, and which stand beside it because requests name them.

A release takes seconds to read, so it is read once; one that cannot be used is not read again by each request.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from catalog import ListKind
from context_words import ContextWords
from model_user import FusedUserTower
from release import SEARCH_SPACE, ItemEncoder, Release
from settings import UserError
from store import Store
from tensors import LinkWeights, PriceScale
from text_encoder import TextEncoder
from vocab import spellings

MAX_RELEASES = 3  # loaded at once beside the live one
# For so long after a release could not be used nobody tries again: reading it takes seconds.
DAMAGED_SECONDS = 30.0


class UnavailableError(Exception):
    """Nothing can be answered now: no live release, or the database is away and no fallback fits. Retry later."""


class LoadedRelease:
    """One release's models, ready to answer."""

    def __init__(self, release: Release, text_encoder: TextEncoder) -> None:
        self.name = release.name
        self._space_file = release.folder / SEARCH_SPACE
        self._indexed_at = self._space_written_at()  # before the rest is read: what changes meanwhile is noticed
        self.encoder = ItemEncoder(release, text_encoder)
        self.user_tower = release.user_tower()
        self.fused_tower = FusedUserTower(self.user_tower)  # of one shopper
        self.link_weights = self.user_tower.link_weights
        self._basket_weights = self.user_tower.basket_weights
        self.scale = float(self.user_tower.log_scale.detach().exp())  # of a query's unit part
        self.reranker = release.reranker()
        self.scaler = release.profile_scaler()
        self.prices = PriceScale(**release.manifest["reranker"]["prices"])
        self.trained_re_words = len(self.encoder.re_vocab)
        self.new_goods = float(release.manifest["reranker"]["options"]["new_goods"])
        self.search_space = release.search_space()
        self.ef_search = int(release.manifest["index"]["ef_search"])  # what the index's recall was measured with
        schema = release.schema()
        self.allowed_values = spellings(schema)
        self.context_words = ContextWords.of_schema(schema)

    @property
    def is_current(self) -> bool:
        """Not so once the release was indexed anew: its items lie elsewhere then, and queries by the space of before find few."""
        return self._space_written_at() in (self._indexed_at, None)

    def weights_of(self, kind: ListKind) -> LinkWeights:
        """What links add to the scores of a list of this kind."""
        return self._basket_weights if kind == "basket" else self.link_weights

    def _space_written_at(self) -> int | None:
        """Nanoseconds; None if the file is gone, as of a release that was deleted."""
        try:
            return self._space_file.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    @property
    def item_width(self) -> int:
        return self.user_tower.config.item_width

    @property
    def popularity_width(self) -> int:
        return self.user_tower.config.popularity_width

    @property
    def std_fields(self) -> list[str]:
        return list(self.encoder.layout.std_slots)

    @property
    def untouched_column(self) -> int:
        return self.user_tower.config.untouched_column

    def learn_words(self, words: dict[tuple[str, str], int]) -> None:
        """Add RE words that came after training, under the ids the database gave them (dense, in order)."""
        try:
            self.encoder.learn_words(words, self.reranker.grow)
        except UserError as error:
            raise UnavailableError(str(error)) from error


class LoadedReleases:
    """The live release and those that requests name. Safe to call from several threads.

    warm_up: called once with a release that has just become the live one, before it answers the first request.
    """

    def __init__(
        self, store: Store, models_dir: Path, text_encoder: TextEncoder, warm_up: Callable[[LoadedRelease], None]
    ) -> None:
        self.store, self.models_dir, self.text_encoder, self._warm_up = store, models_dir, text_encoder, warm_up
        self.lock = threading.RLock()  # warming up a release may learn its words
        self._live: LoadedRelease | None = None
        self._others: dict[str, LoadedRelease] = {}  # named by requests, the one used last at the end
        self._damaged: dict[str, tuple[float, str]] = {}  # until when (time.monotonic()), and why

    def live(self) -> LoadedRelease:
        """The live release, reloaded when the pointer has moved or it was indexed anew. Raises UnavailableError when nothing is
        live."""
        name = Release.current(self.models_dir)
        loaded = self._live
        if loaded is not None and loaded.name == name and loaded.is_current:
            return loaded
        if name is None:
            raise UnavailableError("no release is live yet; run build_index.py")
        with self.lock:
            if self._live is not None and time.monotonic() < self._damaged.get(name, (0.0, ""))[0]:
                return self._live
            if self._live is None or self._live.name != name or not self._live.is_current:
                try:
                    fresh = self._taken_out(name) or LoadedRelease(
                        Release.open(self.models_dir, name), self.text_encoder
                    )
                except UserError as error:
                    if self._live is None:
                        raise UnavailableError(str(error)) from error
                    self._note_damaged(name, str(error))
                    return self._live  # a damaged new release never takes a healthy one down
                self._live = fresh
                self._warm_up(fresh)
            return self._live

    def named(self, name: str | None) -> tuple[LoadedRelease, list[str]]:
        """The release of that name, else the live one and a warning why. Raises UnavailableError when nothing is live."""
        live = self.live()
        if name is None or name == live.name:
            return live, []
        with self.lock:
            until, why = self._damaged.get(name, (0.0, ""))
            if time.monotonic() >= until:
                try:
                    loaded = self._taken_out(name) or self._load(name)
                except UserError as error:
                    why = self._note_damaged(name, str(error))
                else:
                    self._others[name] = loaded
                    while len(self._others) > MAX_RELEASES:
                        del self._others[next(iter(self._others))]
                    return loaded, []
        return live, [f"release {name!r} cannot be used, the live one answers: {why}"]

    def _taken_out(self, name: str) -> LoadedRelease | None:
        """Of those beside the live one, if it is there and as it was."""
        loaded = self._others.pop(name, None)
        return loaded if loaded is not None and loaded.is_current else None

    def _load(self, name: str) -> LoadedRelease:
        """A release that answers beside the live one. Raises UserError when it cannot."""
        release = Release.open(self.models_dir, name)
        release.check_complete()
        if not self.store.vectors.exists(name):
            raise UserError(
                f"release {name} has no vectors in the database; run build_index.py --release {name} --no-live"
            )
        return LoadedRelease(release, self.text_encoder)

    def _note_damaged(self, name: str, why: str) -> str:
        self._others.pop(name, None)
        self._damaged[name] = (time.monotonic() + DAMAGED_SECONDS, why)
        return why

    def note_gone(self, name: str) -> None:
        """A release's vectors turned out to be gone: for a while nobody asks it again."""
        with self.lock:
            self._note_damaged(name, "its vectors are gone from the database")

    def check(self, name: str) -> None:
        """Raises UserError when the release of that name cannot answer requests, whatever was known before."""
        with self.lock:
            self._damaged.pop(name, None)
            _, warnings = self.named(name)
        if warnings:
            raise UserError(warnings[0])
