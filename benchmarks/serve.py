"""How fast lists are answered, and how fast they could be: `python -m benchmarks.serve --items 10000 --items 100000`

For each size a shop is made (big_shop.py), the real server started on it and asked by another process: for a known shopper of 20
events, 20 items, with no context. One request at a time gives the latency, eight at a time the throughput, requests at half of that
rate at moments of their own, whatever the server does, the tail (an open loop: waiting counts). Then the same requests are put to
the plain way (plain.py), and both are asked once more with as many workers as there are processors.

In the same run the floors: an HTTP server that answers as much without work, the bare SQL of one shopper and of 100 candidates, the
bare forward passes. Their sum is what an answer costs at least; the ratio to it is what this program adds. Each floor is measured
over and over, by itself, with all that it needs in the processor's caches. No answer finds it there: what the same parts cost one
after the other, PAUSE after they ran last (HTTP as before), stands beside it.

Everything shares the machine: server, PostgreSQL and whoever asks. Rows go to docs/performance.json.
"""

from __future__ import annotations

import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import psutil
import torch
from fastapi import FastAPI
from pydantic import Field

from api_controller.metrics import TOGETHER
from api_controller.schemas import ItemBody, ReasonBody, RecommendAnswer, RecommendBody
from benchmarks import big_shop
from benchmarks.big_shop import DEAREST, RELEASE, SHOPPERS, base_shop, open_shop
from benchmarks.performance import FLOOR, Row, save
from build_index import IndexedTable
from model_user import FusedUserTower
from release import Release
from results import commit
from settings import Settings, run_script
from store import Store
from store.vectors import table_of
from tensors import MAX_HISTORY_IDS, RerankBatch, UserBatch

WARM_UP = 50  # requests before any is counted
CANDIDATES = 100
K = 20
AT_ONCE = 8
FILTERS = {"10 %": 0.1, "1 %": 0.01, "0.1 %": 0.001}  # shares of the products that a bound on the price keeps
PAUSE = 0.01  # seconds, about as long as an answer takes
CHECKED = 100  # queries whose lists are compared with exact search


class ServeOptions(Settings):
    items: list[int] = Field([10_000, 100_000], description="sizes of catalogue")
    requests: int = Field(500, ge=50, description="asked one at a time")
    seconds: float = Field(20.0, gt=0, description="of each load")


# ------------------------------------------------------------------------------------------------------------ who asks
def bodies(count: int, seed: int, **more: Any) -> list[bytes]:
    random = np.random.default_rng(seed)
    return [
        orjson.dumps({"user_id": f"u{number}", "k": K, **more})
        for number in random.integers(0, SHOPPERS, count).tolist()
    ]


def one_at_a_time(address: str, asked: Sequence[bytes]) -> list[float]:
    """Seconds of each."""
    with httpx.Client(base_url=address, timeout=30) as client:
        return [_ask(client, body) for body in asked]


def at_once(address: str, asked: Sequence[bytes], seconds: float) -> float:
    """Answers a second, AT_ONCE requests under way at any moment."""
    until = time.perf_counter() + seconds

    def one(number: int) -> int:
        answered = 0
        with httpx.Client(base_url=address, timeout=30) as client:
            while time.perf_counter() < until:
                _ask(client, asked[(number + AT_ONCE * answered) % len(asked)])
                answered += 1
        return answered

    with ThreadPoolExecutor(AT_ONCE) as threads:
        started = time.perf_counter()
        return sum(threads.map(one, range(AT_ONCE))) / (time.perf_counter() - started)


def at_moments(address: str, asked: Sequence[bytes], rate: float, seconds: float) -> list[float]:
    """Seconds from when each request was due until its answer, at `rate` a second, moments at random (Poisson)."""
    random = np.random.default_rng(0)
    due = np.cumsum(random.exponential(1.0 / rate, int(rate * seconds)))
    start = time.perf_counter() + 0.1

    def one(number: int) -> float:
        moment = start + due[number]
        time.sleep(max(0.0, moment - time.perf_counter()))
        _ask(client, asked[number % len(asked)])
        return time.perf_counter() - moment

    limits = httpx.Limits(max_connections=64, max_keepalive_connections=64)
    with httpx.Client(base_url=address, timeout=30, limits=limits) as client, ThreadPoolExecutor(64) as threads:
        return list(threads.map(one, range(len(due))))


def _ask(client: httpx.Client, body: bytes) -> float:
    started = time.perf_counter()
    answer = client.post("/recommend", content=body, headers={"Content-Type": "application/json"})
    answer.raise_for_status()
    return time.perf_counter() - started


# ------------------------------------------------------------------------------------------------------------- servers
@contextmanager
def serving(app: str, environment: dict[str, str], *arguments: str) -> Iterator[tuple[psutil.Process, str, float]]:
    """A server process, its address, and how long it took until it was ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", app, "--port", str(port), "--log-level", "error", *arguments]
    started = time.perf_counter()
    process = subprocess.Popen(command, env={**os.environ, **environment})
    address = f"http://127.0.0.1:{port}"
    try:
        # One client for all looks: to make one takes a processor as long as a good part of a start.
        with httpx.Client(base_url=address, timeout=30) as client:
            while not _ready(client):
                assert process.poll() is None, "the server ended"
                time.sleep(0.01)
        yield psutil.Process(process.pid), address, time.perf_counter() - started
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def _ready(client: httpx.Client) -> bool:
    try:
        return client.get("/ready").is_success
    except httpx.TransportError:
        return False


def _postgres(data_dir: Path) -> list[psutil.Process]:
    """The database server of a shop and its backends."""
    pid = int((data_dir / "postgres" / "postmaster.pid").read_text().splitlines()[0])
    server = psutil.Process(pid)
    return [server, *server.children(recursive=True)]


def _cpu(processes: Sequence[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes if process.is_running())


def _memory(processes: Sequence[psutil.Process]) -> float:
    """Megabytes; what processes share is counted once."""
    return sum(process.memory_full_info().pss for process in processes if process.is_running()) / 2**20


# -------------------------------------------------------------------------------------------------------------- floors
def echo() -> FastAPI:
    """The cheapest service that reads such a request and answers as much."""
    app = FastAPI()
    reason = ReasonBody(kind="history", weight=1.0, text={"en": "you viewed it", "ko": "보셨어요"})
    items = [
        ItemBody.model_construct(
            product_id=f"p{rank:07d}", title="Linen dress with a belt", price=100.0, rank=rank, score=1.0, stage="reranker",
            retrieval_rank=rank, reasons=[reason], placed_by="",
        )
        for rank in range(1, K + 1)
    ]  # fmt: skip
    answer = RecommendAnswer.model_construct(
        items=items, release="r", plan="hnsw", milliseconds={"total": 1.0}, warnings=[], degraded=False, rules=None,
        kind="for_you", anchor=None, list_id="0" * 32, experiment=None, arm=None,
    )  # fmt: skip

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        return {}

    @app.post("/recommend")
    async def recommend(body: RecommendBody) -> RecommendAnswer:
        return answer

    return app


def floors(store: Store, release: Release, base: big_shop.Base, queries: np.ndarray) -> tuple[dict[str, float], float]:
    """Median milliseconds of the physical parts of an answer: of each over and over, with all that it needs in the processor's
    caches, and of all as an answer needs them, in turn and PAUSE after the last time."""
    torch.set_num_threads(1)
    tower, reranker = FusedUserTower(release.user_tower()), release.reranker()
    batch, ranked = forward_inputs(release, base)
    table = table_of(RELEASE).as_string(None)
    ef_search = release.manifest["index"]["ef_search"]
    space = release.search_space()
    shopper = (
        "SELECT product_id, kind, at, vector_send(vector), array_send(std_ids), array_send(re_ids), price FROM events"
        f" JOIN {table} USING (product_id) JOIN products USING (product_id) WHERE user_id = %b ORDER BY at DESC LIMIT 30"
    )
    nearest = (
        "SELECT product_id, vector_send(vector), array_send(std_ids), array_send(re_ids), price, title"
        f" FROM (SELECT * FROM {table} WHERE part = 0 ORDER BY placed <#> %b::halfvec LIMIT {CANDIDATES}) AS near"
        " JOIN products USING (product_id)"
    )
    with store.pool.connection() as connection:
        connection.execute(f"SET hnsw.ef_search = {ef_search}")
        connection.execute("SET enable_seqscan = off")
        with connection.cursor(binary=True) as cursor:

            def ask(statement: str, value: Any) -> None:
                cursor.execute(statement, (value,), prepare=True).fetchall()

            parts: dict[str, Callable[[int], object]] = {
                "SQL of a shopper": lambda n: ask(shopper, f"u{n * 7 % SHOPPERS}"),
                "user tower": lambda n: tower(batch),
                "SQL of candidates": lambda n: ask(nearest, space.query(queries[n % len(queries)])),
                "reranker": lambda n: reranker(ranked),
            }
            with torch.inference_mode():
                alone = {name: _median(part) for name, part in parts.items()}
                in_turn = _median(lambda n: [part(n) for part in parts.values()], PAUSE)
        connection.execute("RESET hnsw.ef_search")
        connection.execute("RESET enable_seqscan")
    return alone, in_turn


def forward_inputs(release: Release, base: big_shop.Base) -> tuple[UserBatch, RerankBatch]:
    """One shopper, and 100 candidates."""
    random = np.random.default_rng(0)
    tower, config = release.user_tower(), release.reranker_config()
    batch = big_shop.shoppers_batch(release, base, base.rows.vectors, random, tower.config.text_width)

    def ids(rows: int, *shape: int) -> torch.Tensor:
        return torch.from_numpy(random.integers(1, rows, shape))

    ranked = RerankBatch(
        user_std=ids(config.std_rows, 1, MAX_HISTORY_IDS),
        user_re=ids(config.re_rows, 1, MAX_HISTORY_IDS),
        user_dense=torch.zeros(1, len(config.user_dense)),
        item_std=ids(config.std_rows, 1, CANDIDATES, sum(config.std_slots.values())),
        item_re=ids(config.re_rows, 1, CANDIDATES, config.re_slots),
        item_dense=torch.zeros(1, CANDIDATES, len(config.item_dense)),
    )
    return batch, ranked


def _median(run: Callable[[int], object], pause: float = 0.0, times: int = 300) -> float:
    for number in range(WARM_UP):
        run(number)
    found = []
    for number in range(times):
        if pause:
            time.sleep(pause)
        started = time.perf_counter()
        run(WARM_UP + number)
        found.append(time.perf_counter() - started)
    return 1000 * statistics.median(found)


# ----------------------------------------------------------------------------------------------------------- the whole
def main(options: ServeOptions) -> None:
    command = f"python -m benchmarks.serve {' '.join(f'--items {items}' for items in options.items)}"
    base = base_shop(options.data_dir / "benchmark")
    for items in options.items:
        settings, store = open_shop(base, items)
        with store:
            save(measure(options, base, settings, store, items, command))


def measure(
    options: ServeOptions, base: big_shop.Base, settings: Settings, store: Store, items: int, command: str
) -> list[Row]:
    release = Release.open(settings.models_dir, RELEASE)
    now = commit()
    figures: list[Row] = []

    def note(metric: str, value: float, floor: float | None = None) -> None:
        ratio = value / floor if floor else None
        figures.append(Row("serve", items, metric, value, floor, ratio, now, command))
        print(f"{items:>9,} {metric:58s} {value:10.3f}" + (f"  floor {floor:.3f}  x {ratio:.2f}" if ratio else ""))

    environment = {"DATA_DIR": str(settings.data_dir), "MODELS_DIR": str(settings.models_dir), "DATABASE_URL": ""}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as asker:

        def ask(address: str, asked: Sequence[bytes]) -> np.ndarray:
            """Milliseconds of each."""
            return 1000 * np.array(asker.submit(one_at_a_time, address, asked).result())

        load = bodies(2000, 7, explain=False)

        def throughput(address: str, seconds: float = options.seconds) -> float:
            return asker.submit(at_once, address, load, seconds).result()

        rows = store.vectors.fetch(RELEASE, [big_shop.name_of(number) for number in range(items)])
        queries = big_shop.queries_of(release, base, rows.vectors, np.random.default_rng(1), CHECKED)
        space, ef_search = release.search_space(), int(release.manifest["index"]["ef_search"])
        indexed = IndexedTable(store, RELEASE, rows.vectors, rows.product_ids, space, queries)
        note("recall@100 of the index", indexed.recall(ef_search))
        note("recall@10 of the index, of what nobody met", indexed.new_recall(ef_search))
        note("hnsw.ef_search", ef_search)
        note("index build and check, s", release.manifest["index"]["seconds"])
        note("memory of an index build, MB", store.vectors.build_cost(RELEASE).megabytes)
        with store.pool.connection() as connection:
            size = connection.execute("SELECT pg_indexes_size(%s::regclass)", (table_of(RELEASE).as_string(None),))
            note("size of the index, MB", float(size.fetchall()[0][0]) / 2**20)

        with serving("benchmarks.serve:echo", {}, "--factory") as (_, address, _):
            ask(address, bodies(WARM_UP, 0))
            http = float(np.median(ask(address, bodies(options.requests, 1))))
        parts, in_turn = floors(store, release, base, queries)
        parts = {"HTTP": http, **parts}
        for name, value in parts.items():
            note(f"{FLOOR}{name}, ms", value)
        floor = sum(parts.values())
        note("floor of an answer, ms", floor)
        note("floor of an answer, its parts in turn and after a pause, ms", http + in_turn, floor)

        with serving("api_controller.app:app", environment) as (server, address, ready):
            first = ask(address, bodies(20, 2, explain=False))
            note("a cold process is ready after, s", ready)
            note("slowest of the first 20 requests, ms", float(first.max()))
            ask(address, bodies(WARM_UP, 3, explain=False))
            database = _postgres(settings.data_dir)
            used = _cpu([server]), _cpu(database)
            alone = ask(address, bodies(options.requests, 4, explain=False))
            after = _cpu([server]), _cpu(_postgres(settings.data_dir))
            p50 = float(np.median(alone))
            note("p50, ms", p50, floor)
            for rank in (95, 99):
                note(f"p{rank}, one request at a time, ms", float(np.percentile(alone, rank)))
            note("CPU of the server, ms a request", 1000 * (after[0] - used[0]) / options.requests)
            note("CPU of PostgreSQL, ms a request", 1000 * (after[1] - used[1]) / options.requests)
            note("p50 with reasons, ms", float(np.median(ask(address, bodies(options.requests, 5)))), floor)
            for name, share in FILTERS.items():
                asked = bodies(
                    options.requests // 2, 6, explain=False, filters={"max_price": round(DEAREST * share, 2)}
                )
                ask(address, asked[:WARM_UP])
                note(f"p50, a filter that keeps {name}, ms", float(np.median(ask(address, asked))), p50)
            texts = [bodies(1, n, explain=False, context=f"a dinner by the sea, table {n}")[0] for n in range(100)]
            note("p50 with a context text that is new, ms", float(np.median(ask(address, texts))), p50)
            most = throughput(address)
            waited = 1000 * np.array(asker.submit(at_moments, address, load, most / 2, options.seconds).result())
            note("p50 at half the throughput, ms", float(np.percentile(waited, 50)))
            note("p99 at half the throughput, ms", float(np.percentile(waited, 99)), float(np.percentile(waited, 50)))
            note("memory of a worker, MB", _memory([server]))
            note("memory of PostgreSQL, MB", _memory(_postgres(settings.data_dir)))

        environment["OMP_NUM_THREADS"] = str(os.cpu_count())  # as many threads as PyTorch takes by itself
        with serving("benchmarks.plain:app", environment, "--factory") as (_, address, _):
            ask(address, bodies(WARM_UP, 3, explain=False))
            alone = ask(address, bodies(options.requests, 4, explain=False))
            plain = throughput(address)
        note("p50, the plain way, ms", float(np.median(alone)), p50)
        note("throughput, the plain way, answers a second", plain)
        note("throughput, answers a second", most, plain)

        # A processor for each: the plain way's threads would only wait for each other.
        workers, environment["OMP_NUM_THREADS"] = ("--workers", str(os.cpu_count())), "1"
        environment[TOGETHER] = str(settings.data_dir / "counted")  # as several workers are deployed
        with serving("api_controller.app:app", environment, *workers) as (server, address, _):
            throughput(address, options.seconds / 2)  # until all are ready
            note("throughput of a worker a processor, answers a second", throughput(address), plain)
            note("memory of a worker a processor, MB", _memory([server, *server.children(recursive=True)]))
        with serving("benchmarks.plain:app", environment, "--factory", *workers) as (_, address, _):
            throughput(address, options.seconds / 2)
            note("throughput of a worker a processor, the plain way, answers a second", throughput(address), plain)
    return figures


if __name__ == "__main__":
    run_script(ServeOptions, main)
