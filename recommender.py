"""The pipeline: embed the shopper, find candidates, rerank, explain. The API, the evaluation and batch scoring call this one.

A request is answered by one release from start to end, even if another goes live meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import numpy as np
import orjson
import psycopg
import torch

import list_kinds
from catalog import SESSION, ListKind, Product, RawProduct, Rejected
from explain import Reason, explain, general_reason
from extract_features import extract_many, fingerprints, is_changed
from loaded_release import LoadedRelease, LoadedReleases, UnavailableError
from readers import LexiconReader
from rule_search import Limits, RuleSearch, Search, limits_of, ranked_of
from rules import DEFAULT, Effect, HideMet, NamedRules, Placed, Ranked, RuleSet, apply, filtered, seed_of
from settings import Settings, UserError
from store import Filters, Found, History, ItemRows, Store, UserState
from tensors import (
    KIND_IDS,
    Candidates,
    Past,
    UserBatch,
    log_age,
    rerank_batch,
)
from text_encoder import TextEncoder
from vocab import UNKNOWN, normalise, spellings

CANDIDATES = 100  # that retrieval hands to the reranker
FALLBACK_ITEMS = 200  # popular items kept in memory for when the database is away
REHEARSED = 20  # items that somebody met for whom nobody waits
NOBODY = "nobody"  # their id; nothing is noted under it
CONTEXT_CACHE = 10_000  # context texts whose vectors are remembered
AWAY_SECONDS = 1.0  # for so long after a failure nobody waits for a database that is known to be away
# Products embedded and indexed at once when catching up: whoever puts one of them waits so long.
INDEX_BATCH = 100
NO_RULES = RuleSet([])


@dataclass(frozen=True)
class Request:
    """One question. Every part may be missing; `now` is epoch seconds, None for the clock."""

    user_id: str | None = None
    history: Sequence[str] = ()  # product ids, oldest first, added after what is stored for the user
    context: str = ""
    profile: dict[str, float] = field(default_factory=dict)  # overrides what is stored
    filters: Filters = field(default_factory=Filters)
    exclude: Sequence[str] = ()
    exclude_history: bool = True  # do not offer what the shopper already met
    k: int = 20
    now: float | None = None
    rules: NamedRules | None = None
    kind: ListKind = "for_you"
    product_id: str | None = None  # that a list of kind "similar" or "because" is about
    cart: Sequence[str] = ()  # that a list of kind "basket" completes
    explain: bool = True  # off saves the time
    release: str | None = None  # to answer from; the live one if None, or if this one cannot be used

    @property
    def moment(self) -> float:
        """As of when to answer, epoch seconds."""
        return time.time() if self.now is None else self.now


@dataclass(frozen=True)
class Recommended:
    product_id: str
    title: str
    price: float | None
    rank: int  # from 1
    score: float  # of the stage: a logit, a cosine ("similar"), ...; comparable within one answer only
    stage: str  # what put it there: "reranker", "retrieval" (none was asked), "trending", "again", "popular" (fallback)
    retrieval_rank: int
    reasons: list[Reason]
    placed_by: str = ""  # the rule to which it owes its place


@dataclass(frozen=True)
class RulesUsed:
    """By which rules an answer was arranged (`version` is None where they were only tried), and what each did."""

    name: str
    version: int | None
    effects: list[Effect]
    problem: str = ""  # why they cannot be read: the answer was arranged by none


@dataclass(frozen=True)
class Answer:
    items: list[Recommended]
    release: str
    plan: str  # how candidates were found: "hnsw", "hnsw-iterative", "exact", "cache"
    milliseconds: dict[str, float]  # by stage, and "total"
    warnings: list[str]
    degraded: bool = False
    rules: RulesUsed | None = None
    kind: ListKind = "for_you"  # of this list, whatever was asked for
    anchor: list_kinds.Anchor | None = None  # the product that it is about


@dataclass(frozen=True)
class PutProducts:
    refused: list[
        tuple[int, Rejected]
    ]  # values that the schema does not allow, with the place of their product among those given
    embedded: int  # products that got a new vector


@dataclass(frozen=True)
class Popular:
    """What answers while the database is away."""

    items: list[Recommended]
    ranked: Ranked  # the same, for rules


class Recommender:
    """Answers requests with the live release. Safe to call from several threads."""

    def __init__(self, store: Store, settings: Settings, text_encoder: TextEncoder) -> None:
        self.store, self.settings, self.text_encoder = store, settings, text_encoder
        self.releases = LoadedReleases(store, settings.models_dir, text_encoder, self._warm_up)
        self._popular = Popular([], Ranked([], np.zeros(0), np.zeros((0, 0))))
        self._away_until = 0.0  # of time.monotonic()
        self.lists = list_kinds.ListKinds(store, settings)
        self._catching_up = threading.Lock()
        self._context = lru_cache(CONTEXT_CACHE)(lambda text: text_encoder.brief(text))

    def contexts_asked(self) -> tuple[int, int]:
        """Of how many texts of contexts the vector was still known, and of how many it was not."""
        asked = self._context.cache_info()
        return asked.hits, asked.misses

    # ---------------------------------------------------------------------------------------------------------- releases
    def live(self) -> LoadedRelease:
        """The live release. Raises UnavailableError when nothing is live."""
        return self.releases.live()

    def refresh(self) -> None:
        """The popular items and the trends in memory as they are now; the same as before when the database is away. Contexts can be
        read at once from then on, if nobody gave one yet."""
        with suppress(UnavailableError):
            self._warm_up(self.live())
            self.refresh_lists()
            self.live().context_words.prepare()

    def refresh_lists(self) -> None:
        """The same of the trends, which take long to read."""
        with suppress(psycopg.Error):
            self.lists.refresh()

    def _warm_up(self, loaded: LoadedRelease) -> None:
        """Answer once for nobody: the first real request then finds everything in place, and the fallback is known."""
        with suppress(psycopg.Error):
            answer = self._answer(loaded, Request(k=FALLBACK_ITEMS, explain=False))
            fetched = self.store.vectors.fetch(loaded.name, [item.product_id for item in answer.items])
            items = {item.product_id: item for item in answer.items}
            found = [items[product_id] for product_id in fetched.product_ids]
            rows, ranked = ranked_of(
                self.store, fetched.product_ids, np.array([item.score for item in found]), fetched.vectors,
                loaded.item_width, loaded.untouched_column,
            )  # fmt: skip
            reasons = [general_reason("popular")]
            self._popular = Popular(
                [replace(found[row], score=0.0, stage="popular", reasons=reasons) for row in rows], ranked
            )
            self.store.rules.live(DEFAULT)

    def rehearse(self) -> None:
        """Answer as if for somebody who met some popular items, and forget it."""
        met = [item.product_id for item in self._popular.items[:REHEARSED]]
        self.recommend(Request(NOBODY, history=met, explain=False))

    def rules(self, name: str) -> NamedRules | None:
        """The live rules of a name, or None when there are none; while the database is away those that were live last."""
        if time.monotonic() >= self._away_until:
            try:
                return self.store.rules.live(name)
            except psycopg.OperationalError:
                self._away_until = time.monotonic() + AWAY_SECONDS
        return self.store.rules.last_live(name)

    # ----------------------------------------------------------------------------------------------------------- answers
    def recommend(self, request: Request) -> Answer:
        """A ranked list of `k` items, fewer only when the filters leave fewer, or fewer were bought of what to buy again.

        Raises UnavailableError when nothing can be said, RequestError for a request that lacks what its kind of list needs,
        UnknownProductError when the product that the list is about is not there. If the database is away, an unfiltered request
        for a list of a kind that popular items can stand for is answered from those in memory, marked `degraded`.
        """
        list_kinds.check(request)
        loaded = live = self.live()
        if time.monotonic() < self._away_until:
            return self._fallback(live, request)
        try:
            loaded, warnings = (live, []) if request.release is None else self.releases.named(request.release)
            answer = self._answer(loaded, request)
            return replace(answer, warnings=[*warnings, *answer.warnings])
        except psycopg.errors.QueryCanceled:
            return self._fallback(live, request)
        except psycopg.errors.UndefinedTable:
            if request.release is None or loaded.name == live.name:
                return self._fallback(live, request)
            self.releases.note_gone(loaded.name)
            return self.recommend(request)
        except psycopg.OperationalError:
            self._away_until = time.monotonic() + AWAY_SECONDS
            return self._fallback(live, request)

    def _fallback(self, loaded: LoadedRelease, request: Request) -> Answer:
        popular = self._popular
        if not popular.items or request.filters != Filters() or request.kind not in ("for_you", "trending"):
            raise UnavailableError("the database does not answer")
        unwanted = set(_limits(request).left_out)
        warnings = ["the database does not answer; this is the list of popular items"]
        rows = [row for row, item in enumerate(popular.items) if item.product_id not in unwanted]
        placed, used = [Placed(row) for row in rows[: request.k]], None
        if request.rules is not None:
            placed, used = _popular_by_rules(request, request.rules, popular.ranked, rows)
            warnings += _unread(used) or [
                "rules were applied to these items, by their prices and stock when the database last answered"
            ]
            if request.rules.rules.of(HideMet):
                warnings.append("rules that hide what a shopper met were not applied")
        items = [
            replace(popular.items[one.row], rank=rank, placed_by=one.by) for rank, one in enumerate(placed, start=1)
        ]
        return Answer(items, loaded.name, "cache", {"total": 0.0}, warnings, degraded=True, rules=used)

    def _answer(self, loaded: LoadedRelease, request: Request) -> Answer:
        clock = _Clock()
        now = request.moment
        with clock("user"):
            if request.user_id is not None and request.user_id.startswith(SESSION):
                request = replace(request, user_id=self.store.sessions.owner(request.user_id))
            state, warnings = self._state(loaded, request)
            plan = self.lists.plan(loaded, request, state, now)
            request = plan.request
        with clock("embed"):
            past, batch, query = self._user_tensors(loaded, request, plan.state, now)
        with clock("search"):
            usual = list_kinds.Usual(
                partial(self._search, loaded), partial(self._candidates, loaded), partial(self._untouched, loaded)
            )
            count = max(request.k, CANDIDATES)
            source = self.lists.source(loaded, query[0], plan, now, usual, _limits(request), count)
            found = source.candidates()
        named = request.rules
        if named is None or not named.rules.root:
            with clock("rerank"):
                sought = source.finished(found)
                order, scores = self._rerank(loaded, query, sought, past)
            placed = [Placed(int(row)) for row in order[: request.k]]
            used = None if named is None else RulesUsed(named.name, named.version, [], named.problem)
            warnings += _unread(used)
        else:
            sought, scores, placed, used = self._by_rules(loaded, query, request, named, source, past, found, clock)
        if len(placed) < request.k and plan.kind != "again":  # few things are bought again
            warnings.append(
                f"{len(placed)} of {request.k} places: rules, filters, exclusions and what the shopper met leave no more to show"
            )
        with clock("explain"):
            chosen = np.array([one.row for one in placed], dtype=np.int64)
            reasons: list[list[Reason]] = [[] for _ in placed]
            if request.explain:
                reasons = explain(
                    self.store, loaded, plan, sought, scores, chosen, past, batch, now, self.lists.kind_weights
                )
            found = sought.found
            items = [
                Recommended(
                    found.product_ids[one.row], found.titles[one.row], _known(found.price[one.row]), rank,
                    float(scores[one.row]), sought.stages[one.row] if sought.stages else "reranker", one.row + 1, why, one.by,
                )
                for rank, (one, why) in enumerate(zip(placed, reasons, strict=True), start=1)
            ]  # fmt: skip
        return Answer(
            items, loaded.name, found.plan, clock.milliseconds(), [*warnings, *plan.warnings], rules=used, kind=plan.kind,
            anchor=plan.anchor,
        )  # fmt: skip

    def query(self, request: Request) -> np.ndarray:
        """What the live release's user tower makes of a request, in the coordinates of item rows: float32 [1, D]."""
        loaded = self.live()
        state, _ = self._state(loaded, request)
        return self._user_tensors(loaded, request, state, request.moment)[2]

    def _by_rules(
        self, loaded: LoadedRelease, query: np.ndarray, request: Request, named: NamedRules, source: list_kinds.Source,
        past: Past, found: Found, clock: _Clock,
    ) -> tuple[list_kinds.Sought, np.ndarray, list[Placed], RulesUsed]:  # fmt: skip
        """The candidates reranked and arranged by rules, which may ask for more of them; the candidates that there were in the end
        and their scores [N]."""
        with clock("rules"):
            ruling = RuleSearch(
                named.rules, _limits(request), self.store, source.search, source.new_goods,
                source.query, loaded.item_width, loaded.untouched_column, request.k, request.user_id, request.moment,
            )  # fmt: skip
            found = ruling.supplemented(found)
        while True:
            with clock("rerank"):
                sought = source.finished(found)
                _, scores = self._rerank(loaded, query, sought, past)
            with clock("rules"):
                outcome = ruling.arranged(sought.found, scores)
                more = ruling.more(sought.found, outcome)
                if more is None:
                    used = RulesUsed(named.name, named.version, ruling.effects(outcome))
                    return sought, scores, outcome.placed, used
                found = more

    def _state(self, loaded: LoadedRelease, request: Request) -> tuple[UserState, list[str]]:
        """What is stored for the user, with the request's own history behind it."""
        warnings = loaded.scaler.doubts(request.profile)
        length = loaded.user_tower.config.history
        state = UserState.empty(loaded.user_tower.config.row_width)
        if request.user_id is not None:
            state = self.store.users.state(loaded.name, request.user_id, length)
            if not state.known:
                who = f"user {request.user_id!r}"
                if request.user_id.startswith(SESSION):
                    who = f"session {request.user_id.removeprefix(SESSION)!r}"
                warnings.append(f"{who} is unknown; answered from the rest of the request")
        if request.history:
            given = self.store.vectors.fetch(loaded.name, list(dict.fromkeys(request.history)))
            there = set(given.product_ids)
            unknown = [product_id for product_id in request.history if product_id not in there]
            warnings += [f"item {product_id!r} in history is unknown; ignored" for product_id in unknown]
            now = request.moment
            state = state.extended(given, kind="view", at=now, limit=length)
        return state, warnings

    def _user_tensors(
        self, loaded: LoadedRelease, request: Request, state: UserState, now: float
    ) -> tuple[Past, UserBatch, np.ndarray]:
        """The history, what the user tower reads, and the query that it makes of it, float32 [1, D]."""
        config, layout = loaded.user_tower.config, loaded.encoder.layout
        self._know_words(loaded, state.re_ids)
        count = max(1, len(state.product_ids))
        rows = np.zeros((1, count, config.row_width), dtype=np.float32)
        mask = np.zeros((1, count), dtype=bool)
        age = np.zeros((1, count), dtype=np.float32)
        kind = np.zeros((1, count), dtype=np.int64)
        std = np.zeros((1, count, layout.std_width), dtype=np.int64)
        re = np.zeros((1, count, layout.re_slots), dtype=np.int64)
        price = np.full((1, count), np.nan)
        if state.product_ids:
            rows[0], mask[0] = state.vectors, True
            age[0] = log_age(now, state.at)
            kind[0] = [KIND_IDS.get(name, 0) for name in state.kinds]
            std[0], re[0], price[0] = state.std_ids, state.re_ids, state.price
        profile = loaded.scaler.transform([{**state.profile, **request.profile}])
        context = np.zeros((1, self.text_encoder.width), dtype=np.float32)
        if request.context.strip():
            context[0] = self._context(request.context.strip())
        unit = rows[:, :, : config.item_width]
        batch = UserBatch(
            history=torch.from_numpy(unit),
            collaborative=torch.from_numpy(rows[:, :, config.item_width + config.popularity_width :]),
            kind=torch.from_numpy(kind),
            age=torch.from_numpy(age),
            history_mask=torch.from_numpy(mask),
            context=torch.from_numpy(context),
            profile=torch.from_numpy(profile),
        )
        return Past(unit, mask, std, re, price, profile), batch, loaded.fused_tower(batch).numpy()

    def _candidates(self, loaded: LoadedRelease, query: np.ndarray, request: Request, state: UserState) -> Found:
        """The best by inner product and links, and among them a share of products that nobody met yet: without one they would
        stay so, since popularity outweighs whatever they are like. `train_user.retrieve` finds the same by exact search, all that
        is linked looked at."""
        count = max(request.k, CANDIDATES)
        new = round(loaded.new_goods * count)
        return self._find(loaded, request, _links(loaded, state), query, count, _limits(request), new)

    def _untouched(
        self, loaded: LoadedRelease, query: np.ndarray, request: Request, state: UserState, limit: int
    ) -> Found:
        """The best products that nobody met yet."""
        return self._find(loaded, request, _links(loaded, state), query, 0, _limits(request), limit)

    def _search(self, loaded: LoadedRelease, request: Request, history: History | None) -> Search:
        """Finds by inner product and by the links from a history, what passes the request's filters."""

        return lambda query, limit, limits: self._find(loaded, request, history, query, limit, limits)

    def _find(
        self, loaded: LoadedRelease, request: Request, history: History | None, query: np.ndarray, limit: int,
        limits: Limits, new: int = 0,
    ) -> Found:  # fmt: skip
        return self.store.vectors.search(
            loaded.name, query, limit, limits.filters(request.filters, request.moment), limits.left_out,
            loaded.ef_search, limits.met_by, history, limits.hides, loaded.search_space.query(query), new,
        )  # fmt: skip

    def _rerank(
        self, loaded: LoadedRelease, query: np.ndarray, sought: list_kinds.Sought, past: Past
    ) -> tuple[np.ndarray, np.ndarray]:
        """Order of what was found (rows, best first) and its scores [N]: logits, or the list's own of a kind that asks no
        reranker."""
        found = sought.found
        self._know_words(loaded, found.re_ids)
        if sought.scores is not None or not found.product_ids:
            return np.arange(len(found.product_ids)), np.zeros(0) if sought.scores is None else sought.scores
        candidates = Candidates(
            query, found.vectors[None], found.scores[None], found.together[None], found.variant[None],
            found.std_ids[None], found.re_ids[None], found.price[None],
        )  # fmt: skip
        batch = rerank_batch(candidates, past, loaded.prices, loaded.item_width, loaded.popularity_width)
        with torch.inference_mode():
            scores = loaded.reranker(batch)[0].numpy()
        if sought.bonus is not None:
            scores = scores + sought.bonus
        # Stable, so that equal scores keep retrieval's order and an answer can be repeated.
        return np.argsort(-scores, kind="stable"), scores

    def _know_words(self, loaded: LoadedRelease, re_ids: np.ndarray) -> None:
        """Catch up with RE words that another worker added, before an id of theirs reaches a model."""
        if re_ids.size and int(re_ids.max()) >= len(loaded.encoder.re_vocab):
            with self.releases.lock:
                loaded.learn_words(self.store.releases.words(loaded.name))

    def allowed_values(self, named: Mapping[str, Sequence[str]]) -> dict[str, dict[str, str]]:
        """What a filter may name: field -> normalised spelling -> the schema's. As the live release knows it, or where that does
        not know all that is `named`, as the shop's schema is by now: products may have values that came after training."""
        allowed = self.live().allowed_values
        if all(normalise(value) in allowed.get(field, {}) for field, values in named.items() for value in values):
            return allowed
        with suppress(UserError):  # no schema any more
            allowed = spellings(self.store.schema())
        return allowed

    # ------------------------------------------------------------------------------------------------------------- items
    def similar(self, product_id: str, k: int) -> Answer:
        """The `k` items nearest to one by cosine, itself left out, by the shop's rules. Raises as `recommend` does."""
        return self.recommend(
            Request(kind="similar", product_id=product_id, k=k, explain=False, rules=self.rules(DEFAULT))
        )

    def put_products(
        self, products: Sequence[RawProduct], reader: LexiconReader, releases: Sequence[str] = ()
    ) -> PutProducts:
        """Store products, and make those whose words are new or changed searchable at once, without retraining, in the live
        release and in `releases`, which answer beside it: a price, a stock or an arrival is only noted.

        All or none. Values that were refused are in quarantine too. A new RE word gets its id and, until the next training, a
        vector projected from its text. Without a live release the products wait for the next index.
        """
        loaded = self._answering(releases)
        try:
            put = self._put_products(products, reader, loaded)
        except psycopg.errors.UndefinedTable:  # an experiment was stopped and its release deleted, a moment ago
            there = [release for release in loaded if self.store.vectors.exists(release.name)]
            if len(there) == len(loaded) or loaded[0] not in there:
                raise
            for release in loaded:
                if release not in there:
                    self.releases.note_gone(release.name)
            put = self._put_products(products, reader, there)
        # One may have gone live meanwhile, and whoever made it so have caught up before this was committed.
        if any(release not in loaded for release in self._answering()):
            self.catch_up()
        return put

    def _answering(self, beside: Sequence[str] = ()) -> list[LoadedRelease]:
        """The live release, if there is one, and then those of the names `beside` that can answer."""
        try:
            live = self.live()
        except UnavailableError:
            return []
        named = [self.releases.named(name) for name in dict.fromkeys(beside)]
        others = [release for release, warnings in named if not warnings]
        return list({release.name: release for release in [live, *others]}.values())

    def _put_products(
        self, products: Sequence[RawProduct], reader: LexiconReader, loaded: Sequence[LoadedRelease]
    ) -> PutProducts:
        schema = self.store.schema()
        marks = fingerprints(products, schema, reader)
        place_of = {product.product_id: place for place, product in enumerate(products)}  # of one id the last counts
        with self.store.products.changing(list(place_of), [release.name for release in loaded]) as change:
            before = change.before
            due = [
                place
                for product_id, place in place_of.items()
                if is_changed(before.get(product_id), products[place], marks[place])
            ]
            extractions = extract_many([products[place] for place in due], schema, reader)
            change.put(products)
            change.put_features(
                [extraction.product for extraction in extractions],
                [marks[place] for place in due],
                [orjson.dumps(extraction.evidence).decode() for extraction in extractions],
            )
            read = {extraction.product.product_id: extraction.product for extraction in extractions}
            embedded = [*read.values()] + [
                standing.product
                for product_id, standing in before.items()
                if product_id not in read and standing.product is not None and not standing.indexed
            ]
            for release in loaded if embedded else ():
                change.put_vectors(release.name, self._rows(release, embedded))
        refused = [
            (place, value) for place, extraction in zip(due, extractions, strict=True) for value in extraction.rejected
        ]
        self.store.quarantine.add_refused([value for _, value in refused])
        return PutProducts(refused, len(embedded) if loaded else 0)

    def delete_products(self, ids: Sequence[str]) -> set[str]:
        """Take products out of every answer at once; those that were there. The popular items in another worker's memory, which
        answer only while the database is away, forget them with its next `refresh`."""
        deleted = self.store.products.delete(ids)
        popular = self._popular
        kept = [row for row, item in enumerate(popular.items) if item.product_id not in deleted]
        self._popular = Popular([popular.items[row] for row in kept], popular.ranked.take(kept))
        return deleted

    def catch_up(self, releases: Sequence[str] = ()) -> int:
        """Index the products of which the live release, or one of `releases` that can answer, has no vector, or that of what they
        were: they came or changed while it was built, or while it stood aside. How many vectors that made.

        Who asks while another thread is at it waits, and does what is left: together they would do it twice, and more slowly.
        """
        with self._catching_up:
            there = [loaded for loaded in self._answering(releases) if self.store.vectors.exists(loaded.name)]
            return sum(self.index(loaded, self.store.vectors.outdated(loaded.name)) for loaded in there)

    def index(self, loaded: LoadedRelease, ids: Sequence[str]) -> int:
        """Embed products as they stand now, and put their rows into a release: searches find them at once. Ids of products that are
        not there, were not read yet, or have their vector do nothing. How many vectors that made.

        They are read under the lock that `put_products` holds: read before it, a product that somebody puts or deletes meanwhile
        would get the vector of what it was.
        """
        made = 0
        for start in range(0, len(ids), INDEX_BATCH):
            with self.store.products.changing(ids[start : start + INDEX_BATCH], [loaded.name]) as change:
                standing = change.before.values()
                products = [one.product for one in standing if one.product is not None and not one.indexed]
                if products:
                    change.put_vectors(loaded.name, self._rows(loaded, products))
                    made += len(products)
        return made

    def _rows(self, loaded: LoadedRelease, products: Sequence[Product]) -> ItemRows:
        """What a release holds of products."""
        encoder = loaded.encoder
        vocab = encoder.re_vocab
        words = {word for product in products for word in vocab.words_of(product.re) if vocab.id(*word) == UNKNOWN}
        if words:
            with self.releases.lock:
                known = self.store.releases.add_words(loaded.name, sorted(words), first_id=loaded.trained_re_words)
                loaded.learn_words(known)
        features = encoder.features(products)
        config = loaded.user_tower.config
        rows = np.zeros((len(products), config.row_width), dtype=np.float32)
        made = (encoder.vectors(features, progress=False), features.std, features.re)
        with torch.inference_mode():
            rows[:, : config.item_width] = loaded.user_tower.adapted(*map(torch.from_numpy, made)).numpy()
        # A new item has no past: no counts, no collaborative coordinates, and the flag that says so.
        rows[:, loaded.untouched_column] = 1.0
        before = self.store.vectors.fetch(loaded.name, features.product_ids)
        old = dict(zip(before.product_ids, before.vectors, strict=True))
        for row, product_id in enumerate(features.product_ids):
            if product_id in old:
                rows[row, config.item_width :] = old[product_id][config.item_width :]
        return ItemRows(features.product_ids, rows, features.std, features.re, *loaded.search_space.place(rows))


def _popular_by_rules(
    request: Request, named: NamedRules, popular: Ranked, rows: Sequence[int]
) -> tuple[list[Placed], RulesUsed]:
    """What rules make of these rows of the popular items."""
    now = request.moment
    passed, removed = filtered(named.rules, [popular.facts[row] for row in rows], now)
    kept = [rows[row] for row in passed]
    outcome = apply(named.rules, popular.take(kept), request.k, now, seed_of(request.user_id or "", now))
    effects = [
        replace(effect, removed=removed.get(number, effect.removed)) for number, effect in enumerate(outcome.effects)
    ]
    placed = [replace(one, row=kept[one.row]) for one in outcome.placed]
    return placed, RulesUsed(named.name, named.version, effects, named.problem)


def _unread(used: RulesUsed | None) -> list[str]:
    """The warning that rules were skipped, if they were."""
    if used is None or not used.problem:
        return []
    return [f"version {used.version} of the rules {used.name!r} cannot be read and was not applied: {used.problem}"]


def _limits(request: Request) -> Limits:
    """What rules, the shopper's past and the request itself do not let be shown."""
    rules = NO_RULES if request.rules is None else request.rules.rules
    return limits_of(rules, request.user_id, request.history, request.exclude, request.exclude_history, request.moment)


def _links(loaded: LoadedRelease, state: UserState) -> History:
    """The links from what the shopper met."""
    return list_kinds.linked(list(dict.fromkeys(state.product_ids)), loaded.link_weights)


def _known(price: float) -> float | None:
    return None if np.isnan(price) else float(price)


class _Clock:
    """Milliseconds by stage."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.stages: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.stages[stage] = self.stages.get(stage, 0.0) + 1000 * (time.perf_counter() - start)

    def milliseconds(self) -> dict[str, float]:
        stages = {**self.stages, "total": 1000 * (time.perf_counter() - self.started)}
        return {stage: round(value, 3) for stage, value in stages.items()}
