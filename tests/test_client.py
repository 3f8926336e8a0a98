"""The client against a server that answers as told: what it repeats, what it does not, and whose words it raises."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

import client
from api_controller.schemas import RecommendBody
from catalog import Event
from client import StyleTower, StyleTowerError
from tests.serving import ROOT

STORED = {"stored": 1, "duplicates": 0, "refused": []}
EVENT = Event(user_id="u", product_id="p", at=datetime(2026, 6, 30, tzinfo=UTC))
BUSY = (503, {"detail": "too many requests are waiting"}, {"Retry-After": "0"})
HANG_UP: tuple[int, object, dict[str, str]] = (0, {}, {})


class Script:
    """Answers in turn: status (0 hangs up), body, headers. What was asked stands in `asked`."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, object, dict[str, str]]] = []
        self.asked: list[tuple[str, str, str | None, bytes]] = []


@pytest.fixture
def script() -> Iterator[Script]:
    script = Script()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            script.asked.append((self.command, self.path, self.headers.get("X-API-Key"), content))
            status, body, headers = script.answers.pop(0)
            if status == 0:
                self.close_connection = True
                return
            said = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(said))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(said)

        do_GET = do_POST = do_PUT = answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        script.url = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
        yield script
        server.shutdown()


@pytest.fixture
def shop(script, monkeypatch) -> Iterator[StyleTower]:
    monkeypatch.setattr(client, "FIRST_WAIT", 0.0)
    with StyleTower(script.url, key="secret") as shop:
        yield shop


def test_it_is_light():
    """A script that asks for a list does not wait for models to be imported."""
    command = "import sys, client; print(sorted({'torch', 'transformers', 'psycopg', 'polars'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize("trouble", [BUSY, HANG_UP, (429, {"detail": "too many"}, {"Retry-After": "0"})])
def test_a_call_that_may_be_repeated_is_and_events_carry_the_same_id(script, shop, trouble):
    script.answers = [trouble, trouble, (200, STORED, {})]
    assert shop.add_events([EVENT]).stored == 1
    assert len(script.asked) == 3
    assert len({(method, path, content) for method, path, _, content in script.asked}) == 1
    assert json.loads(script.asked[0][3])[0]["event_id"] == EVENT.event_id != ""


RELEASE = {"name": "old", "created_at": "", "parts": [], "metrics": {}, "items": 1, "live": True}


@pytest.mark.parametrize("trouble", [BUSY, HANG_UP])
def test_a_rollback_says_what_it_leaves_and_may_then_be_repeated(script, shop, trouble):
    every = [RELEASE | {"live": False}, RELEASE | {"name": "new"}]
    script.answers = [(200, every, {}), trouble, (200, RELEASE, {})]
    assert shop.rollback().name == "old"
    assert [(method, path) for method, path, _, _ in script.asked] == [
        ("GET", "/releases"), ("POST", "/releases/rollback?from=new"), ("POST", "/releases/rollback?from=new"),
    ]  # fmt: skip


def test_a_rollback_from_nothing_known_is_not_repeated(script, shop):
    script.answers = [(200, [], {}), BUSY]
    with pytest.raises(StyleTowerError):
        shop.rollback()
    assert script.asked[-1][1] == "/releases/rollback"
    assert not script.answers


def test_patience_ends(script, shop):
    script.answers = [BUSY] * client.TRIES
    with pytest.raises(StyleTowerError, match="503: too many requests are waiting"):
        shop.health()
    assert not script.answers


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((401, {"detail": "this API key is not known"}, {}), "this API key is not known"),
        ((422, {"detail": [{"loc": ["body", "k"], "msg": "too large"}]}, {}), "body.k: too large"),
        ((503, {"status": "not ready", "reason": "no release is live yet"}, {}), "no release is live yet"),
        ((503, {"detail": "closed for the night"}, {"Retry-After": "30000"}), "closed for the night"),
        ((502, b"<html>Bad Gateway</html>", {}), "<html>Bad Gateway</html>"),
    ],
)
def test_a_refusal_is_raised_at_once_in_the_servers_words(script, shop, answer, words):
    script.answers = [answer]
    with pytest.raises(StyleTowerError) as raised:
        shop.health()
    assert (raised.value.status, raised.value.words) == (answer[0], words)


def test_nobody_there_is_said_with_the_address():
    with (
        StyleTower("http://127.0.0.1:1", tries=1) as shop,
        pytest.raises(StyleTowerError, match="no answer from http://127"),
    ):
        shop.health()


def test_only_what_was_set_is_sent_with_the_key_and_ids_are_one_part_of_the_path(script, shop):
    script.answers = [(422, {}, {}), (404, {}, {})]
    with pytest.raises(StyleTowerError):
        shop.recommend(RecommendBody(k=5))
    with pytest.raises(StyleTowerError):
        shop.item("red dress?/ü")
    assert script.asked == [
        ("POST", "/recommend", "secret", b'{"k":5}'),
        ("GET", "/items/red%20dress%3F%2F%C3%BC", "secret", b""),
    ]
