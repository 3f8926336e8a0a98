"""The plain way to answer, which the service is compared with: `uvicorn benchmarks.plain:app --factory`.

The same release and shop, as a first straightforward version of this design would answer: a `def` endpoint in FastAPI's own pool of
threads, a validated body in and out, a pool of connections, one query a lookup (the profile, the events, each product of the
history, the nearest items, each candidate), the user tower as it was trained, deepctr-torch's own `predict` on the candidates,
PyTorch with its own number of threads.

It leaves out what would make it slower: reasons, links between items, the share of products that nobody met, rules, filters,
contexts, sessions, experiments, the log of lists, keys, metrics. Its index is the release's, and so are its queries' coordinates.
Without links and that share the service's lists are the same.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI
from pgvector import HalfVector
from pgvector.psycopg import register_vector
from psycopg import Connection, sql
from psycopg_pool import ConnectionPool

from api_controller.schemas import ItemBody, RecommendAnswer, RecommendBody
from model_reranker import build_deepfm, deepfm_input
from release import RERANKER, Release
from settings import Settings, UserError
from store import Store
from store.vectors import PARTS, table_of
from tensors import KIND_IDS, POSITION, Candidates, Past, PriceScale, UserBatch, log_age, rerank_batch

CANDIDATES = 100
CONNECTIONS = 10


class Plain:
    """Answers requests of known shoppers by the live release."""

    def __init__(self, store: Store, release: Release) -> None:
        self.release = release
        self.tower = release.user_tower()
        self.config = release.reranker_config()
        self.deepfm = build_deepfm(self.config)
        release.load_weights(RERANKER, self.deepfm)
        self.scaler, self.space = release.profile_scaler(), release.search_space()
        self.prices = PriceScale(**release.manifest["reranker"]["prices"])
        settings = {
            "hnsw.ef_search": release.manifest["index"]["ef_search"], "hnsw.iterative_scan": "relaxed_order",
            "enable_seqscan": "off",  # of a small catalogue the planner would rather sort everything
        }  # fmt: skip
        options = " ".join(f"-c {name}={value}" for name, value in settings.items())
        self.pool: ConnectionPool[Connection[Any]] = ConnectionPool(
            store.url, min_size=1, max_size=CONNECTIONS, kwargs={"autocommit": True, "options": options},
            configure=register_vector, open=True,
        )  # fmt: skip
        table = table_of(release.name)
        self._item = sql.SQL(
            "SELECT vector, std_ids, re_ids, price, title FROM {} JOIN products USING (product_id) WHERE product_id = %s"
        ).format(table)
        nearest = sql.SQL(
            "(SELECT product_id, vector FROM {} WHERE part = {}"
            " AND product_id NOT IN (SELECT product_id FROM events WHERE user_id = %(user_id)s)"
            " ORDER BY placed <#> %(placed)s LIMIT %(limit)s)"
        )
        parts = sql.SQL(" UNION ALL ").join(nearest.format(table, sql.Literal(part)) for part in range(PARTS))
        self._nearest = sql.SQL(
            "SELECT product_id, -(vector <#> %(query)s) AS score FROM ({}) AS near ORDER BY score DESC, product_id LIMIT %(limit)s"
        ).format(parts)

    def answer(self, user_id: str, k: int) -> RecommendAnswer:
        """The best `k` items for a shopper with at least one event."""
        started = time.perf_counter()
        with self.pool.connection() as connection, connection.cursor(binary=True) as cursor:
            profile = cursor.execute("SELECT profile FROM users WHERE user_id = %s", (user_id,)).fetchone()
            events = cursor.execute(
                "SELECT product_id, kind, extract(epoch FROM at)::float8 FROM events WHERE user_id = %s"
                " ORDER BY at DESC, product_id DESC LIMIT %s",
                (user_id, self.tower.config.history),
            ).fetchall()[::-1]
            met = [self._row(cursor, product_id) for product_id, _, _ in events]
            body = self.scaler.transform([profile[0] if profile else {}])
            with torch.no_grad():
                query = self.tower(self._user(events, met, body)).numpy()
            found = cursor.execute(
                self._nearest,
                {
                    "query": query[0], "placed": HalfVector(self.space.query(query[0])), "user_id": user_id, "limit": CANDIDATES,
                },
            ).fetchall()  # fmt: skip
            candidates = [self._row(cursor, product_id) for product_id, _ in found]
        scores = self._scores(query, np.array([score for _, score in found], np.float32), candidates, met, body)
        order = np.argsort(-scores, kind="stable")[:k]
        items = [
            ItemBody(
                product_id=found[row][0], title=candidates[row][4], price=candidates[row][3], rank=rank,
                score=float(scores[row]), stage="reranker", retrieval_rank=int(row) + 1, reasons=[],
            )
            for rank, row in enumerate(order, start=1)
        ]  # fmt: skip
        return RecommendAnswer(
            items=items, release=self.release.name, plan="hnsw", warnings=[], degraded=False, kind="for_you", anchor=None,
            milliseconds={"total": 1000 * (time.perf_counter() - started)}, list_id="", experiment=None, arm=None,
        )  # fmt: skip

    def _row(self, cursor: Any, product_id: str) -> tuple[np.ndarray, list[int], list[int], float | None, str]:
        vector, std, re, price, title = cursor.execute(self._item, (product_id,)).fetchone()
        return vector.to_numpy(), std, re, price, title

    def _user(self, events: list[Any], met: list[Any], body: np.ndarray) -> UserBatch:
        config = self.tower.config
        rows = np.stack([row[0] for row in met])
        now = time.time()
        return UserBatch(
            history=torch.from_numpy(rows[None, :, : config.item_width]),
            collaborative=torch.from_numpy(rows[None, :, config.item_width + config.popularity_width :]),
            kind=torch.tensor([[KIND_IDS.get(kind, 0) for _, kind, _ in events]]),
            age=torch.from_numpy(log_age(now, np.array([[at for _, _, at in events]]))),
            history_mask=torch.ones(1, len(events), dtype=torch.bool),
            context=torch.zeros(1, config.text_width),
            profile=torch.from_numpy(body),
        )

    def _scores(
        self, query: np.ndarray, retrieval: np.ndarray, candidates: list[Any], met: list[Any], body: np.ndarray
    ) -> np.ndarray:
        config = self.tower.config

        def column(rows: list[Any], number: int, kind: type) -> np.ndarray:
            return np.array([[row[number] for row in rows]], dtype=kind)

        none = np.zeros((1, len(candidates)), dtype=np.float32)
        past = Past(
            column(met, 0, np.float32)[:, :, : config.item_width], np.ones((1, len(met)), dtype=bool),
            column(met, 1, np.int64), column(met, 2, np.int64), column(met, 3, np.float64), body,
        )  # fmt: skip
        given = Candidates(
            query, column(candidates, 0, np.float32), retrieval[None], none, none, column(candidates, 1, np.int64),
            column(candidates, 2, np.int64), column(candidates, 3, np.float64),
        )  # fmt: skip
        batch = rerank_batch(given, past, self.prices, config.item_width, config.popularity_width)
        if POSITION in self.config.item_dense:
            batch = replace(batch, position=torch.zeros(1, len(candidates)))
        # `predict` gives float64.
        own = torch.from_numpy(self.deepfm.predict([deepfm_input(batch).numpy()])).float().view(1, -1)
        return self.config.trusted(own, self.config.retrieval_of(batch), batch.user_dense)[0].numpy()


def app() -> FastAPI:
    settings = Settings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        name = Release.current(settings.models_dir)
        if name is None:
            raise UserError(f"no release is live in {settings.models_dir}")
        with Store.open(settings) as store:
            app.state.plain = Plain(store, Release.open(settings.models_dir, name))
            with app.state.plain.pool:
                yield

    service = FastAPI(lifespan=lifespan)

    @service.get("/ready")
    def ready() -> dict[str, str]:
        return {}

    @service.post("/recommend")
    def recommend(body: RecommendBody) -> RecommendAnswer:
        plain: Plain = service.state.plain
        return plain.answer(str(body.user_id), body.k)

    return service
