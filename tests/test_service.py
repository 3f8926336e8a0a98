"""A trained shop behind a real server process: what a client sees when things happen, and what is left when it dies."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from api_controller.schemas import RecommendAnswer
from api_controller.service import FALLBACK_SECONDS, RETRY_SECONDS, THREADS, Service
from catalog import Product, RawProduct, User
from recommender import Recommender
from release import Release
from settings import ServiceSettings, Settings
from store import Store
from tests.releases import copy_release
from tests.serving import FRESH, ROOT, environment_of, eventually, ids, metric, recommend, serving
from tests.tiny import tiny_text_encoder


def shopper(shop) -> str:
    with Store.open(shop) as store:
        return store.events.read().user_ids[0]


# --- answers ----------------------------------------------------------------------------------------------------------


def test_an_answer_says_what_why_and_how_long(shop, client):
    answer = recommend(client, user_id=shopper(shop), k=7)
    assert [item["rank"] for item in answer["items"]] == [1, 2, 3, 4, 5, 6, 7]
    assert answer["release"] == Release.current(shop.models_dir)
    assert set(answer["milliseconds"]) == {"user", "embed", "search", "rerank", "explain", "total"}
    assert not answer["warnings"]
    for item in answer["items"]:
        product = client.get(f"/items/{item['product_id']}").json()
        assert (item["title"], item["price"]) == (product["title"], product["price"])
        assert item["stage"] == "reranker"
        assert item["reasons"]


def test_an_answer_has_the_fields_that_the_api_promises(shop, client):
    """It is sent as the pipeline made it; no model of the API looks at it on the way."""
    rules = [{"kind": "filter", "keep": {"in_stock": True}}]
    answer = recommend(client, kind="because", user_id=shopper(shop), rules=rules, k=3)
    assert answer["anchor"]
    assert answer["rules"]["effects"]
    assert all(item["reasons"] for item in answer["items"])
    assert RecommendAnswer.model_validate(answer).model_dump() == answer


def test_every_body_has_an_example_and_the_example_works(client):
    routes = client.get("/openapi.json").json()
    bodies = 0
    for path, methods in routes["paths"].items():
        for method, route in methods.items():
            if "requestBody" not in route:
                continue
            schema = route["requestBody"]["content"]["application/json"]["schema"]
            if "$ref" in schema:
                schema = routes["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
            assert schema["examples"], path
            for example in schema["examples"]:
                answer = client.request(method, path.format(user_id="example", version=1, name="example"), json=example)
                assert answer.status_code == 200, answer.text
            bodies += 1
    assert bodies == 11


def test_an_event_changes_the_next_answer(client):
    before = ids(recommend(client, user_id="new-here", k=20))
    event = {"user_id": "new-here", "product_id": before[0], "kind": "purchase", "at": "2026-06-30T10:00:00Z"}
    assert client.post("/events", json=event).json() == {"stored": 1, "duplicates": 0, "refused": []}
    assert client.post("/events", json=[event]).json()["duplicates"] == 1
    after = recommend(client, user_id="new-here", k=20)
    assert before[0] not in ids(after)
    assert ids(after)[:-1] != before[1:]  # the list moved, it did not only close the gap


def test_what_was_met_long_ago_is_not_offered_again(shop, client):
    """The tower reads the latest ten events; the rest is still known."""
    everything = ids(recommend(client, k=100))
    start = datetime(2026, 6, 1, tzinfo=UTC)
    events = [
        {"user_id": "regular", "product_id": product_id, "at": (start + timedelta(hours=number)).isoformat()}
        for number, product_id in enumerate(everything[:60])
    ]
    assert client.post("/events", json=events).json()["stored"] == 60
    assert not set(ids(recommend(client, user_id="regular", k=100))) & set(everything[:60])


def test_a_put_product_is_found_by_the_next_request(client):
    product = {
        "product_id": "put-1",
        "title": "Linen wrap dress",
        "attributes": {"category": ["dress"]},
        "price": 98765432.0,
    }
    assert client.put("/products", json=product).json() == {"stored": 1, "refused": [], "refused_values": []}
    found = recommend(client, filters={"min_price": 98765432.0})
    assert ids(found) == ["put-1"]
    assert (found["items"][0]["title"], found["items"][0]["price"]) == ("Linen wrap dress", 98765432.0)
    neighbours = client.get("/items/put-1/similar", params={"k": 3}).json()
    assert len(neighbours) == 3
    assert all(neighbour["title"] for neighbour in neighbours)


def test_a_value_outside_the_schema_is_refused_aloud_and_quarantined(shop, client):
    product = {"product_id": "put-2", "title": "Thing", "attributes": {"category": ["spaceship"]}}
    answer = client.put("/products", json=[product]).json()
    assert answer["stored"] == 1
    assert not answer["refused"]
    (refused,) = answer["refused_values"]
    assert (refused["index"], refused["what"]) == (0, "category")
    assert "spaceship" in refused["reason"]
    with Store.open(shop) as store:
        assert any("spaceship" in row.raw for row in store.quarantine.read("api"))


def test_a_value_that_came_to_the_schema_after_training_can_be_put_and_asked_for(shop, client):
    with Store.open(shop) as store:
        before = store.schema()
        store.put_schema(
            before.model_copy(update={"std": {**before.std, "category": [*before.std["category"], "Cape"]}})
        )
        try:
            capes = [
                {"product_id": product_id, "title": "Wool cape", "attributes": {"category": ["cape"]}}
                for product_id in ("put-3", "put-4")
            ]
            assert not client.put("/products", json=capes).json()["refused_values"]
            assert set(ids(recommend(client, filters={"std": {"category": ["CAPE"]}}))) == {"put-3", "put-4"}
            assert not {"put-3", "put-4"} & set(
                ids(recommend(client, filters={"std_none": {"category": ["cape"]}}, k=100))
            )
            beside = recommend(client, kind="basket", cart=["put-3"], k=100)  # the release has no word for what it is
            assert beside["warnings"] == []
            assert "put-4" not in ids(beside)
        finally:
            store.put_schema(before)
            store.products.delete(["put-3", "put-4"])


@pytest.mark.parametrize(
    ("filters", "named"),
    [({"std": {"planet": ["mars"]}}, "planet"), ({"std": {"category": ["spaceship"]}}, "spaceship")],
)
def test_a_filter_that_names_nothing_is_a_422(client, filters, named):
    answer = client.post("/recommend", json={"filters": filters})
    assert answer.status_code == 422
    assert named in answer.text


# --- releases ---------------------------------------------------------------------------------------------------------


def test_a_promotion_under_load_never_mixes_releases(new_shop):
    """The second release knows every other product only: an answer in its name that holds another one is a mixture."""
    with new_shop() as shop:
        first = Release.open(shop.models_dir)
        with Store.open(shop) as store:
            every = [product.product_id for product in store.products.read_features()]
            half = every[::2]
            copy_release(store, first, "second", half)
        with serving(environment_of(shop)) as (_, client):
            answers: list[dict] = []
            stop = threading.Event()

            def ask() -> None:
                while not stop.is_set():
                    answers.append(recommend(client, k=100))

            threads = [threading.Thread(target=ask) for _ in range(4)]
            for thread in threads:
                thread.start()
            try:
                eventually(lambda: len(answers) > 10)
                for name in ("second", first.name, "second"):
                    Release.open(shop.models_dir, name).make_live()
                    eventually(lambda name=name: answers[-1]["release"] == name)
            finally:
                stop.set()
                for thread in threads:
                    thread.join()
        releases = {answer["release"] for answer in answers}
        assert releases == {first.name, "second"}
        for answer in answers:
            found = set(ids(answer))
            assert len(found) == 100
            assert found <= set(half if answer["release"] == "second" else every)
            assert answer["release"] == "second" or found - set(half)


def test_a_damaged_release_never_takes_a_healthy_one_down(new_shop):
    with new_shop() as shop:
        first = Release.open(shop.models_dir)
        broken = shutil.copytree(first.folder, shop.models_dir / "zzz-broken")
        (broken / "user_tower.pth").write_bytes(b"nothing")
        with serving(environment_of(shop)) as (_, client):
            assert recommend(client, k=3)["release"] == first.name
            Release.open(shop.models_dir, "zzz-broken").make_live()
            assert recommend(client, k=3)["release"] == first.name


def test_a_release_of_another_text_encoder_is_not_served_and_the_reason_is_said(shop, tmp_path):
    other = shop.model_copy(update={"text_encoder": str(tiny_text_encoder(tmp_path / "other", seed=1))})
    with serving(environment_of(other)) as (_, client):
        for answer in (client.get("/ready"), client.post("/recommend", json={})):
            assert answer.status_code == 503
            assert f"trained with text encoder '{shop.text_encoder}'" in answer.text
            assert "set TEXT_ENCODER (or TEXT_ENCODER_LAYERS) back" in answer.text


# --- when things die --------------------------------------------------------------------------------------------------


def test_without_the_database_a_popular_list_answers_and_it_comes_back(new_shop):
    with new_shop() as shop, serving(environment_of(shop)) as (_, client):
        assert not recommend(client, k=5)["degraded"]
        address = conninfo_to_dict(shop.database_url)
        name = sql.Identifier(str(address["dbname"]))
        with psycopg.connect(shop.database_url, dbname="postgres", autocommit=True) as admin:
            admin.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(name))
            admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (address["dbname"],)
            )
            away = recommend(client, k=5, exclude=["nobody"])
            assert away["degraded"]
            assert len(away["items"]) == 5
            assert all(item["title"] for item in away["items"])
            assert "database" in away["warnings"][0]
            assert client.post("/recommend", json={"filters": {"max_price": 1}}).status_code == 503
            assert client.get("/ready").status_code == 503
            admin.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS true").format(name))
        eventually(lambda: not recommend(client, k=5)["degraded"])
        assert client.get("/ready").status_code == 200


def test_a_database_that_comes_late_is_found_without_being_asked_for(new_shop):
    with new_shop() as shop:
        address = conninfo_to_dict(shop.database_url)
        name = sql.Identifier(str(address["dbname"]))
        with psycopg.connect(shop.database_url, dbname="postgres", autocommit=True) as admin:
            admin.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(name))
            with serving(environment_of(shop)) as (_, client):
                assert client.post("/recommend", json={}).status_code == 503
                admin.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS true").format(name))
                eventually(lambda: client.post("/recommend", json={}).status_code == 200)


def test_two_workers_agree_on_new_words_and_one_that_is_killed_is_replaced(new_shop):
    with new_shop() as shop, serving(environment_of(shop), "--workers", "2") as (process, client):
        eventually(lambda: client.get("/ready").is_success)
        product = {
            "product_id": "put-3",
            "title": "Dress",
            "attributes": {"category": ["dress"], "style": ["zigzagcore"]},
        }
        assert client.put("/products", json=product).status_code == 200
        answers = [
            client.post("/recommend", json={"history": ["put-3"], "k": 50}, headers=FRESH).json() for _ in range(20)
        ]
        assert len({tuple(ids(answer)) for answer in answers}) == 1
        assert not any(answer["warnings"] for answer in answers)

        kill_a_worker(process, client)


def test_workers_that_share_a_folder_count_together_and_a_killed_one_is_not_forgotten(shop, tmp_path):
    environment = {**environment_of(shop), "PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "counted")}
    with serving(environment, "--workers", "2") as (process, client):
        eventually(lambda: client.get("/ready").is_success)

        def counted() -> set[tuple[float, float]]:
            """What is said, over and over, of questions for the root and of live releases."""
            root = 'styletower_requests_total{route="/",status="200"}'
            return {(metric(client, root), metric(client, "styletower_live_release{")) for _ in range(10)}

        def ask() -> None:
            for _ in range(10):
                assert client.get("/", headers=FRESH).is_success

        ask()
        eventually(lambda: counted() == {(10.0, 1.0)})  # a request is counted when its answer is on its way
        kill_a_worker(process, client)
        ask()
        eventually(lambda: counted() == {(20.0, 1.0)})


@pytest.mark.parametrize(
    ("folder", "said"), [("{}/file", "workers cannot count together in {}/file ("), ("", "no folder is named; ")]
)
def test_a_folder_to_count_in_that_cannot_be_one_ends_the_start_with_a_line_for_people(tmp_path, folder, said):
    (tmp_path / "file").write_text("")
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": folder.format(tmp_path)}
    command = [sys.executable, "-m", "uvicorn", "api_controller.app:app", "--port", "0"]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode != 0
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"PROMETHEUS_MULTIPROC_DIR: {said.format(tmp_path)}")


def test_a_context_that_was_read_before_is_counted_as_known(client):
    def counted() -> list[float]:
        name = "styletower_context_texts_total"
        return [metric(client, f'{name}{{outcome="{outcome}"}}') for outcome in ("new", "cached")]

    new, cached = counted()
    for context in ("a dinner by the sea", "a dinner by the sea", "a walk in the rain", "a dinner by the sea"):
        recommend(client, context=context)
    assert counted() == [new + 2, cached + 2]


def kill_a_worker(process: subprocess.Popen[bytes], client: httpx.Client) -> None:
    """And wait until another one has taken its place."""
    workers = children(process.pid)
    os.kill(workers[-1], signal.SIGKILL)
    eventually(lambda: workers[-1] not in children(process.pid) and len(children(process.pid)) == len(workers))
    eventually(lambda: all(client.get("/ready", headers=FRESH).is_success for _ in range(10)))


def children(pid: int) -> list[int]:
    """Live children of a process, oldest first."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            number, rest = status.read_text().split(" ", 1)
        except OSError:
            continue  # it ended between the two looks
        state, parent = rest.rsplit(")", 1)[1].split()[:2]
        if int(parent) == pid and state != "Z":
            found.append(int(number))
    return sorted(found)


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_embedded_server_stops_with_the_service_and_the_data_stay(data_dir, stop):
    environment = {
        "DATA_DIR": str(data_dir), "MODELS_DIR": str(data_dir / "models"), "DATABASE_URL": "",
        "TEXT_ENCODER": str(tiny_text_encoder(data_dir / "text")),
    }  # fmt: skip
    with serving(environment) as (process, client):
        assert client.put("/users/u1", json={"profile": {"height_cm": 172}}).status_code == 200
        servers = children(process.pid)
        assert servers
        process.send_signal(stop)
        process.wait(90)
        eventually(lambda: not any(Path(f"/proc/{server}").exists() for server in servers))
    with Store.open(Settings(database_url="", data_dir=data_dir, _env_file=None)) as store:
        assert store.users.get("u1") == User(user_id="u1", profile={"height_cm": 172.0})


def test_callers_that_all_wait_for_a_server_to_open_do_not_keep_it_from_opening(shop):
    service = Service(ServiceSettings(**shop.model_dump(), _env_file=None))
    try:
        checks = [service.checks.submit(service.check) for _ in range(THREADS)]
        assert service.check() == ""  # as at the start, while the first is on its way
        assert [check.result(timeout=60) for check in checks] == [""] * THREADS
    finally:
        service.close()


def run_python(source: str, shop: Settings) -> subprocess.CompletedProcess[str]:
    """In a process of its own, whose service is of `shop`."""
    environment = {**os.environ, **environment_of(shop)}
    return subprocess.run([sys.executable, "-c", source], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_what_is_kept_in_memory_is_made_anew_soon_after_the_start_and_then_by_the_minute_whatever_fails(
    shop, monkeypatch
):
    """Contexts are read from then on at once: no start waits for it, and nobody's first context either."""
    service = Service(ServiceSettings(**shop.model_dump(), _env_file=None))
    refreshed, slept = [], []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 4:
            raise asyncio.CancelledError

    def refresh() -> None:
        refreshed.append(service.recommender)
        if len(refreshed) == 1:
            raise RuntimeError("of the first time")

    monkeypatch.setattr("api_controller.service.asyncio.sleep", sleep)
    try:
        service.open()
        monkeypatch.setattr(service.recommender, "refresh", refresh)
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(service.keep_current())
    finally:
        service.close()
    assert slept == [RETRY_SECONDS, FALLBACK_SECONDS, FALLBACK_SECONDS, FALLBACK_SECONDS]
    assert len(refreshed) == 3


def test_what_was_to_be_indexed_when_the_last_process_ended_is_indexed_after_the_start_whatever_fails(
    shop, monkeypatch
):
    monkeypatch.setattr("api_controller.service.LEFT_SECONDS", 0.0)
    monkeypatch.setattr("api_controller.service.CATCH_UP_SECONDS", 0.0)
    attempts, catch_up = [], Recommender.catch_up

    def fail_at_first(self, releases):
        attempts.append(releases)
        if len(attempts) == 1:
            raise psycopg.OperationalError("away")
        return catch_up(self, releases)

    monkeypatch.setattr(Recommender, "catch_up", fail_at_first)
    service = Service(ServiceSettings(**shop.model_dump(), _env_file=None))
    with Store.open(shop) as store:
        store.products.put([RawProduct(product_id="left", title="Wool coat")])
        store.products.put_features([Product(product_id="left", title="Wool coat")], "test")
        try:
            service.open()
            live = Release.current(shop.models_dir)
            eventually(lambda: store.vectors.fetch(live, ["left"]).product_ids == ["left"])
        finally:
            service.close()
            store.products.delete(["left"])
    assert attempts == [[], []]


def test_a_server_that_is_ready_looks_for_garbage_again(shop):
    """It does not while it starts."""
    started = """
import asyncio, gc
from api_controller.app import app, lifespan
async def start():
    async with lifespan(app):
        print(app.state.service.rehearsed, gc.isenabled())
print(gc.isenabled())
asyncio.run(start())
"""
    ended = run_python(started, shop)
    assert ended.stdout == "True\nTrue True\n", ended.stderr


def test_the_api_is_put_together_before_the_first_request(shop):
    """FastAPI does it a router at a time, when somebody asks it."""
    started = """
import asyncio
import httpx
from api_controller.app import app, lifespan
from fastapi import routing
async def start():
    async with lifespan(app), httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
        made, make = [], routing.get_dependant
        routing.get_dependant = lambda **given: made.append(given["path"]) or make(**given)
        asked = [await client.post("/recommend", json={}), await client.get("/experiments"), await client.get("/nothing")]
        print([answer.status_code for answer in asked], made)
asyncio.run(start())
"""
    ended = run_python(started, shop)
    assert ended.stdout == "[200, 200, 404] []\n", ended.stderr
