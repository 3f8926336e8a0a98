"""Who is let in, how often, and who can come at all: the rules alone, and that every route has one."""

from __future__ import annotations

import asyncio
import threading

import pytest
from fastapi import HTTPException
from fastapi.routing import APIRoute, iter_route_contexts
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from api_controller.access import ADMIN, OPEN, PUBLIC, Buckets, beyond_this_machine, told_to_listen
from api_controller.app import app
from api_controller.service import Service
from settings import ServiceSettings

LEVELS = {OPEN.dependency: "open", PUBLIC.dependency: "public", ADMIN.dependency: "admin"}
# FastAPI's own pages: they show what can be asked, and nothing of the shop.
PAGES = {"/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"}


def levels() -> dict[tuple[str, str], list[str]]:
    found: dict[tuple[str, str], list[str]] = {}
    for route in iter_route_contexts(app.routes):
        assert isinstance(route.original_route, APIRoute) or route.path in PAGES, route.path
        if isinstance(route.original_route, APIRoute):
            calls = [dependency.call for dependency in route.dependant.dependencies]
            for method in route.methods or ():
                found[method, str(route.path)] = [LEVELS[call] for call in calls if call in LEVELS]
    return found


def test_every_route_names_exactly_one_level():
    for route, named in levels().items():
        assert len(named) == 1, f"{route} names {named}: give it one of OPEN, PUBLIC, ADMIN (api_controller/access.py)"


def test_what_a_web_page_may_do_and_what_not():
    found = {route: named[0] for route, named in levels().items()}
    assert {route for route, level in found.items() if level == "open"} == {
        ("GET", "/"), ("GET", "/health"), ("GET", "/ready"),
    }  # fmt: skip
    assert found["POST", "/recommend"] == found["POST", "/events"] == "public"
    for route in (
        ("PUT", "/products"),
        ("PUT", "/users/{user_id}"),
        ("GET", "/metrics"),
        ("POST", "/releases/rollback"),
        ("PUT", "/rules"),
        ("PUT", "/experiments/{name}"),
    ):
        assert found[route] == "admin"


@given(
    rate=st.floats(0.1, 100),
    burst=st.integers(1, 50),
    pauses=st.lists(st.floats(0, 5), min_size=1, max_size=200),
)
def test_nobody_gets_more_than_burst_and_rate_allow_and_who_waits_as_told_is_let_in(rate, burst, pauses):
    now = 0.0
    buckets = Buckets(rate, burst, clock=lambda: now)
    allowed = 0
    for pause in pauses:
        now += pause
        wait = buckets.take("a")
        allowed += wait == 0
        assert allowed <= burst + rate * now + 1e-6
    while (wait := buckets.take("a")) == 0:
        pass
    now += wait * (1 + 1e-9) + 1e-9
    assert buckets.take("a") == 0


def test_each_has_a_bucket_of_its_own():
    buckets = Buckets(0.001, 1, clock=lambda: 0.0)
    assert buckets.take("a") == 0 < buckets.take("a")
    assert buckets.take("b") == 0


def test_the_buckets_that_are_remembered_are_bounded_and_the_busiest_stay():
    buckets = Buckets(0.001, 1, most=3, clock=lambda: 0.0)
    for stranger in range(100):
        buckets.take("busy")
        buckets.take(f"stranger {stranger}")
    assert len(buckets.left) == 3
    assert buckets.take("busy") > 0


def test_the_keys_are_looked_at_again_after_an_error_that_nobody_foresaw(monkeypatch):
    monkeypatch.setattr("api_controller.service.KEY_SECONDS", 0.0)
    service = Service(ServiceSettings(_env_file=None))

    async def watched() -> None:
        loop, again, looks = asyncio.get_running_loop(), asyncio.Event(), iter((1, 2))

        def refresh(_: object) -> None:
            if next(looks, 3) == 1:
                raise RuntimeError("of no kind that was foreseen")
            loop.call_soon_threadsafe(again.set)

        monkeypatch.setattr(service.access, "refresh", refresh)
        task = asyncio.create_task(service.watch_keys())
        await asyncio.wait_for(again.wait(), 30)
        task.cancel()

    asyncio.run(watched())
    service.close()


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.168.1.5", "203.0.113.9", "fe80::1%eth0", "::ffff:10.0.0.1"])
def test_addresses_that_others_can_come_by(address):
    assert beyond_this_machine(address)


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1", "localhost", "", "/run/shop.sock"]
)
def test_addresses_of_this_machine_alone(address):
    assert not beyond_this_machine(address)


@pytest.mark.parametrize("origins", ["", "*", "https://shop.example", "http://localhost:3000 , https://a.b"])
def test_origins_that_pages_may_come_from(origins):
    assert ServiceSettings(cors_origins=origins, _env_file=None).cors_origins == origins


@pytest.mark.parametrize(
    "origins", ["shop.example", "https://shop.example/", "https://*.example", "*, https://a.b", "null"]
)
def test_what_is_no_origin_is_refused_at_the_start(origins):
    with pytest.raises(ValidationError, match="cors_origins"):
        ServiceSettings(cors_origins=origins, _env_file=None)


@pytest.mark.parametrize(
    ("arguments", "environment", "host"),
    [
        (["uvicorn", "app", "--host", "0.0.0.0", "--port", "1"], {}, "0.0.0.0"),
        (["uvicorn", "app", "--host=::"], {"UVICORN_HOST": "127.0.0.1"}, "::"),
        (["uvicorn", "app"], {"UVICORN_HOST": "10.0.0.1"}, "10.0.0.1"),
        (["uvicorn", "app", "--host"], {}, ""),
        (["pytest"], {}, ""),
    ],
)
def test_the_host_that_the_server_was_told(arguments, environment, host):
    assert told_to_listen(arguments, environment) == host


def test_work_that_takes_longer_than_it_may_is_a_503_and_each_may_take_its_own_time():
    service = Service(ServiceSettings(_env_file=None))
    gate = threading.Event()
    with pytest.raises(HTTPException, match="no answer within 0 s") as refused:
        asyncio.run(service.run(gate.wait, seconds=0.01))
    assert refused.value.status_code == 503
    gate.set()
    assert asyncio.run(service.run(gate.wait, seconds=30))
    service.close()
