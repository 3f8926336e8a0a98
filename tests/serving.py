"""The service as a real process, as `uvicorn api_controller.app:app` starts it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import httpx
import jsonschema

from api_controller.app import app
from settings import Settings

ROOT = Path(__file__).parent.parent
FRESH = {"Connection": "close"}  # headers; with a connection for each request the workers take turns
DEADLINE = 90.0  # seconds; a cold start makes the text encoder and the database


def environment_of(shop: Settings) -> dict[str, str]:
    """What a process needs to serve `shop`."""
    return {
        "DATABASE_URL": shop.database_url, "DATA_DIR": str(shop.data_dir), "MODELS_DIR": str(shop.models_dir),
        "TEXT_ENCODER": shop.text_encoder,
    }  # fmt: skip


@contextmanager
def serving(environment: Mapping[str, str], *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    """A server that listens: its process and a client. At the end it is asked to stop, unless it has ended."""
    port = _free_port()
    command = [sys.executable, "-m", "uvicorn", "api_controller.app:app", "--port", str(port), "--log-level", "warning"]
    process = subprocess.Popen([*command, *arguments], cwd=ROOT, env={**os.environ, **environment})
    try:
        hooks = {"response": [assert_described]}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=DEADLINE, event_hooks=hooks) as client:
            eventually(lambda: _listens(process, client))
            yield process, client
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(DEADLINE)


@lru_cache(1)
def description() -> tuple[dict[str, Any], dict[str, re.Pattern[str]]]:
    """What the API says of itself, and how the addresses of its routes look; those without a name in them first."""
    described = app.openapi()
    paths = sorted(described["paths"], key=lambda path: path.count("{"))
    return described, {path: re.compile(re.sub(r"\{\w+\}", "[^/]+", path)) for path in paths}


def assert_described(response: httpx.Response) -> None:
    """The API's description has this answer of this route, its status and its form: whoever made a client of it can read it."""
    described, paths = description()
    asked = response.request
    path = next(
        (path for path, form in paths.items() if form.fullmatch(asked.url.raw_path.decode().partition("?")[0])), None
    )
    route = described["paths"].get(path, {}).get(asked.method.lower())
    if route is None:  # there is no such route
        return
    answers = route["responses"]
    assert str(response.status_code) in answers, (
        f"{asked.method} {path} answered {response.status_code}: {response.read()!r}"
    )
    form = answers[str(response.status_code)].get("content", {}).get("application/json", {}).get("schema")
    if form and response.headers["content-type"] == "application/json":
        assert_fits(json.loads(response.read()), form, described)


def assert_fits(value: Any, form: dict[str, Any], described: dict[str, Any]) -> None:
    """A value has a form of the API's description."""
    whole = {**form, "components": described["components"]}
    jsonschema.validate(value, whole, jsonschema.Draft202012Validator)


def recommend(client: httpx.Client, **body: Any) -> dict[str, Any]:
    """The answer of a request for a list that is answered, by whichever worker takes it."""
    answer = client.post("/recommend", json=body, headers=FRESH)
    assert answer.status_code == 200, answer.text
    return answer.json()


def ids(answer: dict[str, Any]) -> list[str]:
    return [item["product_id"] for item in answer["items"]]


def metric(client: httpx.Client, name: str) -> float:
    """The sum of the lines of /metrics that begin so: of whichever worker answers."""
    lines = [line for line in client.get("/metrics", headers=FRESH).text.splitlines() if line.startswith(name)]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def eventually(condition: Callable[[], bool]) -> None:
    """Ask again until it holds."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.05)


def _listens(process: subprocess.Popen[bytes], client: httpx.Client) -> bool:
    assert process.poll() is None, "the server ended"
    try:
        return client.get("/health").is_success
    except httpx.TransportError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
