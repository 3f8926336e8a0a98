"""How many events a second `POST /events` takes, as a shop would send them: `python -m benchmarks.events`

A real server process over HTTP on an embedded PostgreSQL in a temporary folder, with the disk's waits as in production: 10,000
products, then calls of 10,000 events each from one client, from two at once, and the same once more, which must store nothing.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import orjson

from catalog import RawProduct
from settings import Settings
from store import Store

PRODUCTS, SHOPPERS, CALLS, EVENTS = 10_000, 50_000, 20, 10_000
START = 1_767_225_600  # 2026-01-01, epoch seconds


def bodies() -> list[bytes]:
    random = np.random.default_rng(0)
    found = []
    for _ in range(CALLS):
        columns = (
            random.integers(0, SHOPPERS, EVENTS),
            random.integers(0, PRODUCTS, EVENTS),
            random.choice(["view", "cart", "purchase", "skip"], EVENTS),
            START + random.integers(0, 90 * 86_400, EVENTS) + random.integers(0, 1000, EVENTS) / 1000,
        )
        rows = [
            {"user_id": f"u{user}", "product_id": f"p{item}", "kind": str(kind), "at": at, "context": ""}
            for user, item, kind, at in zip(*map(np.ndarray.tolist, columns), strict=True)
        ]
        found.append(orjson.dumps(rows))
    return found


def send(address: str, calls: Sequence[bytes], clients: int) -> tuple[float, int]:
    """Seconds, and events that were new."""

    def one(body: bytes) -> int:
        answer = client.post(f"{address}/events", content=body, headers={"Content-Type": "application/json"})
        answer.raise_for_status()
        assert not answer.json()["refused"]
        return int(answer.json()["stored"])

    with httpx.Client(timeout=60) as client, ThreadPoolExecutor(clients) as threads:
        started = time.perf_counter()
        stored = sum(threads.map(one, calls))
        return time.perf_counter() - started, stored


def main() -> None:
    calls = bodies()
    with tempfile.TemporaryDirectory() as name, socket.socket() as probe:
        os.chmod(name, 0o755)  # the embedded server of root runs as another user, who must get in
        settings = Settings(database_url="", data_dir=Path(name) / "data", models_dir=Path(name), _env_file=None)
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
        probe.close()
        with Store.open(settings) as store:
            store.products.put([RawProduct(product_id=f"p{number}", title="t") for number in range(PRODUCTS)])
        environment = {"DATA_DIR": str(settings.data_dir), "MODELS_DIR": name, "DATABASE_URL": ""}
        command = [sys.executable, "-m", "uvicorn", "api_controller.app:app", "--port", port, "--log-level", "error"]
        server = subprocess.Popen(command, env={**os.environ, **environment})
        address = f"http://127.0.0.1:{port}"
        try:
            while not _answers(address):
                assert server.poll() is None, "the server ended"
                time.sleep(0.2)
            half = CALLS // 2
            for what, part, clients in (
                ("one client", calls[:half], 1), ("two clients", calls[half:], 2), ("the same again", calls[:half], 1),
            ):  # fmt: skip
                seconds, stored = send(address, part, clients)
                rate = len(part) * EVENTS / seconds
                print(
                    f"{what}: {len(part)} calls of {EVENTS:,} events in {seconds:.1f} s, {rate:,.0f} a second; {stored:,} new"
                )
        finally:
            server.terminate()
            server.wait()


def _answers(address: str) -> bool:
    try:
        # Until the database and the text encoder are there, an event is answered by 503.
        return httpx.post(f"{address}/events", json=[], timeout=60).is_success
    except httpx.TransportError:
        return False


if __name__ == "__main__":
    main()
