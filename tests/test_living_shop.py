"""A trained shop behind a real server process while it lives: events in bulk, sessions, forgetting, goods that change and go."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from store import Store
from tests.serving import FRESH, environment_of, eventually, ids, metric, recommend, serving

T0 = datetime(2026, 6, 29, 10, tzinfo=UTC)


@pytest.fixture(scope="module")
def workers(shop):
    """Two workers on the same shop."""
    with serving(environment_of(shop), "--workers", "2") as (_, client):
        eventually(lambda: client.get("/ready").is_success)
        yield client


@pytest.fixture(scope="module")
def goods(shop) -> list[str]:
    with Store.open(shop) as store:
        return [product.product_id for product in store.products.read_features()]


def event(item: str, minutes: float = 0, **rest) -> dict:
    return {"product_id": item, "at": (T0 + timedelta(minutes=minutes)).isoformat(), **rest}


def counted(client, what: str, outcome: str) -> float:
    return metric(client, f'styletower_rows_total{{outcome="{outcome}",what="{what}"}}')


# --- events -----------------------------------------------------------------------------------------------------------


def test_a_bad_row_costs_the_others_nothing(shop, client, goods):
    before = [counted(client, "event", outcome) for outcome in ("stored", "duplicate", "refused")]
    rows = [
        event(goods[0], user_id="partly"),
        event(goods[1], user_id="partly", kind="Bad Kind"),
        event("ghost", user_id="partly"),
        "no event at all",
        event(goods[1]),
        event(goods[2], -600, user_id="partly", kind="skip"),
        event(goods[0], user_id="partly"),
    ]
    answer = client.post("/events", json=rows)
    assert answer.status_code == 200
    assert (answer.json()["stored"], answer.json()["duplicates"]) == (2, 1)
    assert [(row["index"], row["what"]) for row in answer.json()["refused"]] == [
        (1, "kind"), (2, "product_id"), (3, "row"), (4, "user_id"),
    ]  # fmt: skip
    assert answer.json()["refused"][1]["reason"] == "unknown product"
    assert client.get("/users/partly").json()["events"] == {"view": 1, "skip": 1}
    after = [counted(client, "event", outcome) for outcome in ("stored", "duplicate", "refused")]
    assert [new - old for new, old in zip(after, before, strict=True)] == [2, 1, 4]
    with Store.open(shop) as store:
        kept = {row.line: row for row in store.quarantine.read("api") if row.file == "POST /events"}
    assert {2, 3, 4, 5} <= set(kept)
    assert json.loads(kept[3].raw) == rows[2]
    assert kept[3].reason == "product_id: unknown product"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('{"product_id": "p", "at": "2026-01-01"}', "user_id"),
        ('{"user_id": "session:1", "product_id": "p", "at": "2026-01-01"}', "session_id"),
        ('{"session_id": "", "product_id": "p", "at": "2026-01-01"}', "session_id"),
        ('{"user_id": "u", "product_id": "p", "at": "2026-01-01", "surprise": 1}', "surprise"),
        ("7", "dictionary"),
        ("{", "JSON"),
        ("[" * 100_000, "JSON"),
        ("", "JSON"),
        ("[" + ",".join(["1"] * 10_001) + "]", "at most 10,000"),
    ],
)
def test_a_single_bad_event_and_a_bad_body_are_a_422(client, content, named):
    answer = client.post("/events", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert named in answer.text


def test_ten_thousand_events_in_one_call(client, goods):
    context = "a dinner by the sea " * 10
    rows = [event(goods[n % len(goods)], n, user_id=f"many-{n % 100}", context=context) for n in range(10_000)]
    assert len(json.dumps(rows)) > 2**20  # more than other routes take
    assert client.post("/events", json=rows).json() == {"stored": 10_000, "duplicates": 0, "refused": []}
    assert client.post("/events", json=rows[::-1]).json() == {"stored": 0, "duplicates": 10_000, "refused": []}
    assert client.get("/users/many-7").json()["last_seen"] == rows[9907]["at"].replace("+00:00", "Z")
    assert client.post("/events", content=b" " * (8 * 2**20 + 1)).status_code == 413
    assert client.put("/products", content=b" " * (16 * 2**20 + 1)).status_code == 413


def test_what_was_acknowledged_outlives_the_server_and_what_is_too_old_does_not_come_back(shop, goods):
    now = datetime.now(UTC)
    rows = [
        event(goods[n % 7], user_id="durable") | {"at": (now - timedelta(days=n)).isoformat()} for n in (0, 29, 31, 400)
    ]
    with serving({**environment_of(shop), "EVENT_RETENTION_DAYS": "30"}) as (process, client):
        answer = client.post("/events", json=rows)
        process.kill()
        process.wait()
    assert answer.json()["stored"] == 2
    assert [(row["index"], row["what"]) for row in answer.json()["refused"]] == [(2, "at"), (3, "at")]
    assert "not kept" in answer.json()["refused"][0]["reason"]
    with Store.open(shop) as store:
        assert store.users.summary("durable").events == {"view": 2}
        assert not any("durable" in row.raw for row in store.quarantine.read("api"))  # else it would be kept after all


def test_the_same_events_sent_by_two_clients_to_two_workers_count_once(workers, goods):
    rows = [event(goods[n % len(goods)], n, user_id=f"twice-{n % 10}") for n in range(1_000)]

    def send(order: int) -> int:
        answers = [workers.post("/events", json=rows[start::10][::order], headers=FRESH) for start in range(10)]
        return sum(answer.json()["stored"] for answer in answers)

    with ThreadPoolExecutor(4) as threads:
        assert sum(threads.map(send, (1, -1, 1, -1))) == 1_000
    assert workers.get("/users/twice-3").json()["events"] == {"view": 100}


# --- sessions ---------------------------------------------------------------------------------------------------------


def test_a_session_is_a_shopper_and_then_a_user_s(client, goods):
    nobody = recommend(client, session_id="browser-1", k=20)
    assert nobody["warnings"] == ["session 'browser-1' is unknown; answered from the rest of the request"]
    seen = ids(nobody)[0]
    assert client.post("/events", json=event(seen, session_id="browser-1", kind="cart")).json()["stored"] == 1
    known = recommend(client, session_id="browser-1", k=20)
    assert not known["warnings"]
    assert seen not in ids(known)
    assert client.get("/users/login-1").status_code == 404

    assert client.post("/users/login-1/merge", json={"session_id": "browser-1"}).json() == {"moved": 1}
    assert client.post("/users/login-1/merge", json={"session_id": "browser-1"}).json() == {"moved": 0}
    assert client.post("/events", json=event(ids(known)[0], 1, session_id="browser-1")).json()["stored"] == 1
    assert client.get("/users/login-1").json() == {
        "user_id": "login-1", "profile": {}, "events": {"cart": 1, "view": 1}, "last_seen": "2026-06-29T10:01:00Z",
    }  # fmt: skip
    by_user, by_session = recommend(client, user_id="login-1", k=20), recommend(client, session_id="browser-1", k=20)
    assert ids(by_user) == ids(by_session)
    taken = client.post("/users/login-2/merge", json={"session_id": "browser-1"})
    assert taken.status_code == 409
    assert "begin a new one" in taken.json()["detail"]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "/users/session:1", {"profile": {}}),
        ("GET", "/users/session:1", None),
        ("DELETE", "/users/session:1", None),
        ("POST", "/recommend", {"user_id": "session:1"}),
    ],
)
def test_no_user_goes_by_the_name_of_a_session(client, method, path, body):
    answer = client.request(method, path, json=body)
    assert answer.status_code == 422
    assert "kept for sessions" in answer.text


def test_a_login_while_events_arrive_at_two_workers_loses_none(workers, goods):
    stop = threading.Event()
    sent = [0, 0]

    def send(sender: int) -> None:
        while not stop.is_set():
            rows = [event(goods[n], sent[sender] + n / 10, session_id="late", event_id=f"late-{sender}-{sent[sender]}-{n}")
                    for n in range(5)]  # fmt: skip
            assert workers.post("/events", json=rows, headers=FRESH).json()["stored"] == 5
            sent[sender] += 5

    with ThreadPoolExecutor(3) as threads:
        senders = [threads.submit(send, number) for number in (0, 1)]
        try:
            eventually(lambda: min(sent) > 10)
            merges = [threads.submit(workers.post, "/users/late-user/merge", json={"session_id": "late"}) for _ in "ab"]
            assert all(merge.result().status_code == 200 for merge in merges)
            then = list(sent)
            eventually(lambda: min(new - old for new, old in zip(sent, then, strict=True)) > 10)
        finally:
            stop.set()
        for sender in senders:
            sender.result()
    assert workers.get("/users/late-user").json()["events"] == {"view": sum(sent)}


# --- being forgotten --------------------------------------------------------------------------------------------------


def test_a_shopper_is_forgotten_over_http(shop, client, goods):
    client.put("/users/gone", json={"profile": {"height_cm": 172}})
    client.post("/events", json=[event(goods[0], user_id="gone"), event(goods[1], session_id="gone-browser")])
    client.post("/users/gone/merge", json={"session_id": "gone-browser"})
    assert client.get("/users/gone").json()["profile"] == {"height_cm": 172}
    recommend(client, user_id="gone")
    recommend(client, session_id="gone-browser")
    removed = client.delete("/users/gone").json()["removed"]  # at once: the lists are hardly written yet
    assert removed.pop("impressions") <= 2
    assert removed == {"events": 2, "merged_sessions": 1, "users": 1, "quarantine": 0}
    assert client.get("/users/gone").status_code == 404
    last = recommend(client, user_id="after-gone")["list_id"]
    with psycopg.connect(shop.database_url, autocommit=True) as connection:
        written = "SELECT list_id FROM impressions WHERE list_id = %s"
        eventually(
            lambda: connection.execute(written, (last,)).fetchone() is not None
        )  # so all before it are, or never will be
        lists = connection.execute("SELECT user_id FROM impressions WHERE user_id ~ 'gone'").fetchall()
    assert lists == [("after-gone",)]
    assert "unknown" in recommend(client, user_id="gone")["warnings"][0]
    assert client.delete("/users/gone").json()["removed"]["events"] == 0


def test_a_session_is_forgotten_over_http(client, goods):
    client.post("/events", json=[event(goods[0], session_id="a visit"), event("ghost", session_id="a visit")])
    assert client.delete("/sessions/a%20visit").json()["removed"] | {"impressions": 0} == {
        "events": 1, "impressions": 0, "merged_sessions": 0, "users": 0, "quarantine": 1,
    }  # fmt: skip
    assert "unknown" in recommend(client, session_id="a visit")["warnings"][0]
    client.post("/users/owner/merge", json={"session_id": "owned"})
    refused = client.delete("/sessions/owned")
    assert refused.status_code == 409
    assert "DELETE /users/owner removes both" in refused.json()["detail"]


def test_what_is_too_old_goes_by_itself(new_shop):
    with new_shop() as shop, psycopg.connect(shop.database_url, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO merged_sessions VALUES ('session:old', 'u', now() - interval '401 days'),"
            " ('session:new', 'u', now() - interval '399 days')"
        )
        connection.execute(
            "INSERT INTO tombstones VALUES ('old', now() - interval '3 days'), ('new', now() - interval '1 day')"
        )
        left = "SELECT array_agg(session_id), (SELECT array_agg(digest) FROM tombstones) FROM merged_sessions"
        with serving(environment_of(shop)):
            eventually(lambda: connection.execute(left).fetchone() == (["session:new"], [b"new"]))


def test_forgetting_while_events_arrive_is_whole(workers, goods):
    """Whatever comes after stays, whatever came before goes; and in the end nothing is left."""
    stop, sent = threading.Event(), []

    def send() -> None:
        while not stop.is_set():
            rows = [event(goods[n], len(sent) + n / 10, user_id="leaving") for n in range(5)]
            assert workers.post("/events", json=rows, headers=FRESH).json()["stored"] == 5
            sent.append(5)

    with ThreadPoolExecutor(1) as threads:
        sender = threads.submit(send)
        try:
            eventually(lambda: len(sent) > 3)
            removed = [workers.delete("/users/leaving", headers=FRESH).json()["removed"]["events"] for _ in range(5)]
        finally:
            stop.set()
        sender.result()
    assert removed[0] > 0
    assert all(count % 5 == 0 for count in removed)  # a call is one transaction: all of its events or none
    rest = workers.delete("/users/leaving").json()["removed"]["events"]
    assert sum(removed) + rest == sum(sent)
    assert workers.get("/users/leaving").status_code == 404


# --- goods ------------------------------------------------------------------------------------------------------------


def product(product_id: str, **rest) -> dict:
    return {"product_id": product_id, "title": "Linen wrap dress", "attributes": {"category": ["dress"]}, **rest}


def test_a_bad_product_costs_the_others_nothing(client):
    rows = [
        product("good-1"),
        product("bad", price=-1),
        {"title": "nameless"},
        product("good-2", attributes={"category": "spaceship"}),
    ]
    answer = client.put("/products", json=rows).json()
    assert answer["stored"] == 2
    assert [(row["index"], row["what"]) for row in answer["refused"]] == [(1, "price"), (2, "product_id")]
    assert [(row["index"], row["what"]) for row in answer["refused_values"]] == [(3, "category")]
    assert client.get("/items/good-1").status_code == client.get("/items/good-2").status_code == 200
    assert client.get("/items/bad").status_code == 404
    alone = client.put("/products", json=rows[1])
    assert alone.status_code == 422
    assert alone.json()["detail"][0]["loc"] == ["body", "price"]


def test_a_price_a_stock_or_an_arrival_is_not_read_or_embedded_again(client):
    given = product("priced", price=77_000_001.0)
    embedded = counted(client, "product", "embedded")
    client.put("/products", json=given)
    assert counted(client, "product", "embedded") == embedded + 1
    for change in ({"price": 77_000_002.0}, {"in_stock": False}, {"arrived_at": "2026-06-01"}, {}):
        given |= change
        assert client.put("/products", json=given).json()["stored"] == 1
    assert counted(client, "product", "embedded") == embedded + 1
    found = recommend(client, filters={"min_price": 77_000_002.0, "in_stock": False})
    assert ids(found) == ["priced"]
    given["attributes"]["style"] = ["minimal"]
    client.put("/products", json=given)
    assert counted(client, "product", "embedded") == embedded + 2
    assert client.get("/items/priced").json()["re"]["style"] == ["minimal"]


def test_a_deleted_product_is_in_no_answer(client):
    given = [product(f"short-lived-{n}", price=66_000_001.0) for n in range(3)]
    client.put("/products", json=given)
    now = datetime.now(UTC).isoformat()
    looks = [{"user_id": f"fan-{n}", "product_id": "short-lived-0", "at": now, "kind": "purchase"} for n in range(50)]
    client.post("/events", json=looks)
    lists = [
        {"kind": "trending"},
        {"kind": "again", "user_id": "fan-1"},
        {"kind": "similar", "product_id": "short-lived-1"},
    ]
    for body in lists:
        assert "short-lived-0" in ids(recommend(client, **body, k=100)), body
    assert len(recommend(client, filters={"min_price": 66_000_001.0, "max_price": 66_000_001.0})["items"]) == 3
    assert client.delete("/products/short-lived-0").json() == {"deleted": 1, "unknown": []}
    assert client.delete("/products/short-lived-0").status_code == 404
    left = recommend(client, filters={"min_price": 66_000_001.0, "max_price": 66_000_001.0})
    assert sorted(ids(left)) == ["short-lived-1", "short-lived-2"]
    for body in lists:
        assert "short-lived-0" not in ids(recommend(client, **body, k=100)), body
    assert client.get("/items/short-lived-0").status_code == 404
    assert client.get("/items/short-lived-0/similar").status_code == 404
    near = client.get("/items/short-lived-1/similar", params={"k": 100}).json()
    assert "short-lived-0" not in [neighbour["product_id"] for neighbour in near]
    assert client.get("/users/fan-1").json()["events"] == {"purchase": 1}
    many = {"product_ids": ["short-lived-1", "nobody", "short-lived-2"]}
    assert client.post("/products/delete", json=many).json() == {"deleted": 2, "unknown": ["nobody"]}
    assert client.put("/products", json=given[0]).json()["stored"] == 1  # it may come back
    assert ids(recommend(client, filters={"min_price": 66_000_001.0, "max_price": 66_000_001.0})) == ["short-lived-0"]


def test_a_deleted_product_is_not_in_the_fallback_list_either(new_shop):
    with new_shop() as shop, serving(environment_of(shop)) as (_, client):
        popular = ids(recommend(client, k=5))
        assert client.delete(f"/products/{popular[0]}").status_code == 200
        address = conninfo_to_dict(shop.database_url)
        name = sql.Identifier(str(address["dbname"]))
        with psycopg.connect(shop.database_url, dbname="postgres", autocommit=True) as admin:
            admin.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(name))
            admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (address["dbname"],)
            )
            away = recommend(client, k=5)
            assert away["degraded"]
            assert ids(away)[0] == popular[1]
            assert popular[0] not in ids(away)
            admin.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS true").format(name))


def test_two_workers_that_put_one_product_at_once_leave_it_whole(workers):
    """Whoever was last, text, features and vector are of one put."""
    kinds = ["dress", "coat"]

    def put(kind: str) -> int:
        body = product("contested", title=f"A {kind}", attributes={"category": [kind]}, price=55_000_001.0)
        return max(workers.put("/products", json=body, headers=FRESH).status_code for _ in range(10))

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(put, kinds)) == [200, 200]
    stored = workers.get("/items/contested").json()
    kind = stored["std"]["category"][0]
    assert stored["title"] == f"A {kind}"
    vector = workers.get("/items/contested/similar", params={"k": 100}).json()
    assert workers.put(
        "/products", json=product("reference", title=f"A {kind}", attributes={"category": [kind]})
    ).is_success
    likeness = {
        row["product_id"]: row["score"] for row in workers.get("/items/reference/similar", params={"k": 100}).json()
    }
    assert vector
    assert likeness["contested"] == pytest.approx(1.0, abs=1e-5)


def test_an_event_needs_no_content_type(client, goods):
    """The beacon of a web page sends none."""
    assert client.post("/events", content=json.dumps(event(goods[0], user_id="plain"))).json()["stored"] == 1
