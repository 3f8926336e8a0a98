"""Running a shop: keys, releases over HTTP, retraining, lists of everybody, and the client, against real servers."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import httpx
import numpy as np
import polars as pl
import pytest

import keys
import release as releases
from api_controller.schemas import ExperimentBody, RecommendBody, RulesBody, RulesLiveBody, ViewBody
from catalog import Event, Product, RawProduct, User
from client import StyleTower, StyleTowerError, sign_shopper
from experiments import Arm
from release import PARTS, Release, _promotions, delete
from rules import RuleSet
from settings import Settings, UserError
from store import Store
from tests.releases import copy_release, spoil
from tests.serving import ROOT, environment_of, eventually, serving
from tests.tiny import tiny_text_encoder


@pytest.fixture(scope="module")
def made(shop) -> dict[str, str]:
    """A key of each kind, and one that was revoked."""
    with Store.open(shop) as store:
        made = {kind: keys.add(store, kind, f"the {kind} one") for kind in ("admin", "public")}
        made["revoked"] = keys.add(store, "admin", "lost")
        assert store.keys.revoke(keys.id_of(keys.digest_of(made["revoked"])))
    return made


@pytest.fixture(scope="module")
def web(shop, made):
    with serving(environment_of(shop), "--workers", "2") as (_, client):
        eventually(lambda: client.get("/ready").is_success)
        yield client


@pytest.fixture(scope="module")
def admin(web, made):
    with StyleTower(str(web.base_url), made["admin"], timeout=60) as client:
        yield client


def run(script: str, shop: Settings, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, script, *arguments], cwd=ROOT, env={**os.environ, **environment_of(shop), **more},
        capture_output=True, text=True,
    )  # fmt: skip


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["X-API-Key", "Authorization"])
@pytest.mark.parametrize(
    ("method", "path", "statuses"),  # without a key, with a revoked, a public, an admin one
    [
        ("POST", "/recommend", (401, 401, 200, 200)),
        ("POST", "/events", (401, 401, 422, 422)),
        ("GET", "/items/ghost", (401, 401, 404, 404)),
        ("PUT", "/products", (401, 401, 403, 422)),
        ("PUT", "/users/u1", (401, 401, 403, 422)),
        ("GET", "/releases", (401, 401, 403, 200)),
        ("POST", "/releases/ghost/live", (401, 401, 403, 404)),
        ("GET", "/metrics", (401, 401, 403, 200)),
        ("GET", "/health", (200, 200, 200, 200)),
        ("GET", "/ready", (200, 200, 200, 200)),
        ("GET", "/openapi.json", (200, 200, 200, 200)),
    ],
)
def test_who_may_do_what(web, made, how, method, path, statuses):
    for kind, status in zip(("", "revoked", "public", "admin"), statuses, strict=True):
        given = {} if not kind else {how: made[kind] if how == "X-API-Key" else f"Bearer {made[kind]}"}
        answer = web.request(method, path, headers=given, json={} if method != "GET" else None)
        assert answer.status_code == status, (kind, answer.text)
        if status == 401:
            assert answer.headers["www-authenticate"] == "Bearer"
            assert ("revoked" if kind else "X-API-Key") in answer.json()["detail"]
        if status == 403:
            assert "needs an admin key" in answer.json()["detail"]


def test_no_public_key_does_away_with_the_rules_of_the_shop(web, made):
    body = {"k": 1, "rules": []}
    refused = web.post("/recommend", json=body, headers={"X-API-Key": made["public"]})
    assert refused.status_code == 403
    assert "needs an admin key" in refused.json()["detail"]
    assert web.post("/recommend", json=body, headers={"X-API-Key": made["admin"]}).json()["rules"]["name"] == "tried"


@pytest.mark.parametrize("key", ["", "x", "styletower_admin_", "ключ", "a" * 8000])
def test_what_is_no_key_opens_nothing(web, key):
    answer = web.get("/releases", headers={"X-API-Key": key.encode()})
    assert answer.status_code == 401


@pytest.mark.parametrize(
    ("method", "path", "key", "status"),
    [
        ("POST", "/events", "", 401),
        ("POST", "/events", "wrong", 401),
        ("PUT", "/products", "", 401),
        ("PUT", "/products", "public", 403),
    ],
)
def test_a_large_body_is_not_waited_for_before_the_key_is_right(web, made, method, path, key, status):
    """The body is announced and never sent."""
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: shop\r\nContent-Length: 5000000\r\nX-API-Key: {made.get(key, key)}\r\n\r\n"
    )
    with socket.create_connection((web.base_url.host, web.base_url.port), timeout=60) as connection:
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(f"HTTP/1.1 {status} ".encode())


def test_a_body_of_unknown_length_that_is_too_large_is_a_413(web, made):
    pieces = (b" " * 2**20 for _ in range(17))
    answer = web.put("/products", content=pieces, headers={"X-API-Key": made["admin"]})
    assert (answer.status_code, "16 MB" in answer.json()["detail"]) == (413, True)


def test_a_thousand_products_with_long_texts_fit_into_one_call(web, made):
    text = "A long linen dress. " * 500  # 10 KB
    rows = [{"product_id": f"long-{n}", "title": f"dress {n}", "description": text, "price": -1} for n in range(1000)]
    answer = web.put("/products", json=rows, headers={"X-API-Key": made["admin"]})
    # Their price is wrong, so that none has to be embedded here: what matters is that all were read.
    assert (answer.status_code, len(answer.json()["refused"])) == (200, 1000)


def test_nothing_that_is_stored_is_a_key(shop, made):
    with Store.open(shop) as store:
        stored = store.keys.read()
    assert [(key.kind, key.note, key.revoked_at is None) for key in stored] == [
        ("admin", "the admin one", True), ("public", "the public one", True), ("admin", "lost", False),
    ]  # fmt: skip
    assert not any(made["admin"].encode() in repr(key).encode() for key in stored)


def test_with_a_secret_a_public_key_names_only_the_shopper_whom_a_token_is_for(shop, made):
    secret = "0123456789abcdef" * 2
    with Store.open(shop) as store:
        product_id = store.events.read().product_ids[0]
        known = store.users.read_ids()[:2]
    soon, past = (datetime.now(UTC) + timedelta(hours=hours) for hours in (1, -1))
    token = sign_shopper(secret, known[0], soon)

    def event(**who: str) -> dict[str, str]:
        return {**who, "product_id": product_id, "at": datetime.now(UTC).isoformat()}

    with serving({**environment_of(shop), "SHOPPER_SECRET": secret}) as (_, client):
        eventually(lambda: client.get("/ready").is_success)

        def ask(path: str, body: object, token: str = "", key: str = "public") -> tuple[int, str]:
            given = {"X-API-Key": made[key], **({"X-Shopper-Token": token} if token else {})}
            answer = client.post(path, json=body, headers=given)
            return answer.status_code, answer.text

        of_known = [("/recommend", {"user_id": known[0], "k": 1}), ("/events", event(user_id=known[0]))]
        for path, body in of_known:
            status, words = ask(path, body)
            assert (status, "X-Shopper-Token" in words, "sign_shopper" in words) == (403, True, True)
            assert ask(path, body, token)[0] == 200
            for wrong, said in (
                (sign_shopper(secret, known[1], soon), "not made for this user_id"),
                (sign_shopper(secret[::-1], known[0], soon), "not made for this user_id"),
                (sign_shopper(secret, known[0], past), "has expired"),
            ):
                status, words = ask(path, body, wrong)
                assert (status, said in words) == (403, True)
            assert ask(path, body, key="admin")[0] == 200
        of_both = [event(user_id=known[0]), event(user_id=known[1])]
        assert ask("/events", of_both, token)[0] == 403
        assert ask("/events", [event(user_id=known[0]), event(session_id="s1")], token)[0] == 200
        assert ask("/events", event(session_id="s1"))[0] == ask("/recommend", {"session_id": "s1", "k": 1})[0] == 200
        assert ask("/recommend", {"context": "office", "k": 1})[0] == 200
        with StyleTower(str(client.base_url), made["public"], token=token) as page:
            assert page.recommend(RecommendBody(user_id=known[0], k=1)).items
        refused = client.get("/metrics", headers={"X-API-Key": made["admin"]}).text
        assert 'styletower_refused_total{reason="shopper token"} 9.0' in refused
    with Store.open(shop) as store, store.pool.connection() as connection:
        rows = connection.execute(
            "SELECT count(*) FROM events WHERE user_id = %s AND at > now() - interval '1 day'", (known[1],)
        )
        assert rows.fetchone() == (0,)  # of the call of both nothing was stored


def empty(settings: Settings, tmp_path) -> Settings:
    """A shop with nothing in it."""
    text_encoder = tiny_text_encoder(tmp_path / "text")
    return settings.model_copy(
        update={"models_dir": tmp_path / "models", "data_dir": tmp_path / "data", "text_encoder": str(text_encoder)}
    )


def test_open_to_others_is_said_aloud_until_a_key_is_made_and_never_open_again(settings, tmp_path, capfd):
    new = empty(settings, tmp_path)
    with serving({**environment_of(new), "UVICORN_HOST": "0.0.0.0"}) as (_, client):
        assert client.get("/metrics").is_success
        assert "styletower_open_to_others 1.0" in client.get("/metrics").text
        assert "no API key was ever made" in client.get("/ready").json()["warnings"][0]
        assert "no API key was ever made" in capfd.readouterr().err

        added = run("keys.py", new, "add", "--kind", "admin", "--note", "back office")
        assert added.returncode == 0, added.stderr
        key = added.stdout.strip()
        eventually(lambda: client.get("/metrics").status_code == 401)
        assert client.get("/ready").json()["warnings"] == []
        answer = client.get("/metrics", headers={"X-API-Key": key})
        assert "styletower_open_to_others 0.0" in answer.text
        assert 'styletower_refused_total{reason="no key"}' in answer.text

        key_id = run("keys.py", new, "list").stdout.split()[0]
        revoked = run("keys.py", new, "revoke", key_id)
        assert "no key is in force" in revoked.stdout
        eventually(lambda: client.get("/metrics", headers={"X-API-Key": key}).status_code == 401)
        assert client.get("/metrics").status_code == 401
        again = run("keys.py", new, "revoke", key_id)
        assert (again.returncode, key_id in again.stderr) == (2, True)


def test_a_key_that_asks_too_often_waits_others_do_not_and_no_key_is_in_the_log(settings, tmp_path, capfd):
    new = empty(settings, tmp_path)
    with Store.open(new) as store:
        first, second = (keys.add(store, "admin", "") for _ in range(2))
    limits = {"RATE_LIMIT": "0.01", "RATE_BURST": "3", "CORS_ORIGINS": "https://shop.example, http://localhost:3000"}
    with serving({**environment_of(new), **limits}, "--log-level", "info") as (_, client):
        asked = [client.get("/releases", headers={"X-API-Key": first}) for _ in range(4)]
        assert [answer.status_code for answer in asked] == [200, 200, 200, 429]
        assert 0 < int(asked[3].headers["Retry-After"]) <= 100
        assert client.get("/releases", headers={"Authorization": f"Bearer {second}"}).status_code == 200
        assert client.get("/health", headers={"X-API-Key": first}).status_code == 200

        # A page of the shop may call, and read refusals; others may not.
        preflight = {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "x-api-key,content-type",
        }
        for origin, allowed in (
            ("https://shop.example", True),
            ("http://localhost:3000", True),
            ("https://evil.example", False),
        ):
            answer = client.options("/recommend", headers={"Origin": origin, **preflight})
            assert answer.is_success == allowed
            answer = client.post("/recommend", json={}, headers={"Origin": origin})
            assert answer.status_code == 401
            assert (answer.headers.get("access-control-allow-origin") == origin) == allowed
    logged = "".join(capfd.readouterr())
    assert "/releases" in logged
    assert first not in logged
    assert second not in logged


def test_without_origins_no_page_of_another_site_may_call(web):
    answer = web.get("/health", headers={"Origin": "https://shop.example"})
    assert "access-control-allow-origin" not in answer.headers


# --- releases ---------------------------------------------------------------------------------------------------------


def twin(shop: Settings, name: str, rows: int | None = None) -> Release:
    """A copy of the trained release under another name, with the first `rows` of its vectors."""
    first = trained(shop)
    with Store.open(shop) as store:
        ids = [product.product_id for product in store.products.read_features()]
        copy_release(store, first, name, ids[:rows])
    return Release(shop.models_dir / name)


def trained(shop: Settings) -> Release:
    return Release.open(shop.models_dir, Release.names(shop.models_dir)[0])


def test_a_release_goes_live_and_back_for_all_workers(shop, web, admin):
    first = trained(shop)
    first.make_live()
    twin(shop, "second")
    said = {release.name: release for release in admin.releases()}
    assert (said[first.name].live, said["second"].live) == (True, False)
    assert said["second"].parts == list(PARTS)
    assert said["second"].items == first.manifest["index"]["items"]
    assert said["second"].metrics["user_tower"] == {"recall@100": first.manifest["user_tower"]["report"]["best"]}

    assert admin.promote("second").live
    assert {admin.recommend(RecommendBody(k=3)).release for _ in range(20)} == {"second"}
    assert admin.rollback().name == first.name
    assert {admin.recommend(RecommendBody(k=3)).release for _ in range(20)} == {first.name}
    with Store.open(shop) as store:
        delete(store, shop.models_dir, "second")


def test_what_cannot_go_live_is_refused_with_the_reason_and_the_live_one_stays(shop, admin):
    first = trained(shop)
    first.make_live()
    unfinished = Release.create(shop.models_dir, "zz-unfinished")
    damaged = twin(shop, "zz-damaged")
    (damaged.folder / "user_tower.pth").write_bytes(b"nothing")
    twin(shop, "zz-empty", rows=0)
    foreign = twin(shop, "zz-foreign")
    foreign.manifest["item_tower"]["text_encoder"]["fingerprint"] = "another"
    foreign.save_manifest()
    for name, status, words in (
        ("ghost", 404, "no release 'ghost'"),
        (unfinished.name, 409, "not complete .missing: item_tower"),
        (damaged.name, 409, "user_tower.pth is missing or not the file"),
        ("zz-empty", 409, "build_index.py --release zz-empty"),
        (foreign.name, 409, "text encoder"),
    ):
        with pytest.raises(StyleTowerError, match=words) as raised:
            admin.promote(name)
        assert raised.value.status == status
    assert Release.current(shop.models_dir) == first.name
    with Store.open(shop) as store:
        for name in ("zz-unfinished", "zz-damaged", "zz-empty", "zz-foreign"):
            delete(store, shop.models_dir, name)


def test_a_release_that_answers_in_an_experiment_is_not_deleted(shop, admin):
    trained(shop).make_live()
    twin(shop, "fifth")
    arms = [Arm(name="old", share=0.5), Arm(name="new", share=0.5, release="fifth")]
    assert admin.start_experiment("twins", ExperimentBody(arms=arms)).version == 1
    answer = admin.recommend(RecommendBody(user_id="by-client", k=5))
    assert admin.add_views([ViewBody(list_id=answer.list_id, positions=[1, 2])]).stored == 1
    with Store.open(shop) as store:
        with pytest.raises(UserError, match="answers in the experiment 'twins'; stop that first"):
            delete(store, shop.models_dir, "fifth")
        assert [arm.arm for arm in admin.report("twins").report] == ["old", "new"]
        assert admin.stop_experiment("twins").stopped_at is not None
        assert [one.name for one in admin.experiments()] == ["twins"]
        delete(store, shop.models_dir, "fifth")
    # A worker may not know yet that it was stopped: that is no reason to refuse what is put into the other one.
    assert admin.put_products([RawProduct(product_id="after-twins", title="Dress")]).stored == 1


def test_a_release_that_stood_aside_knows_what_came_meanwhile_when_its_experiment_starts(shop, admin):
    trained(shop).make_live()
    twin(shop, "ninth")
    admin.put_products([RawProduct(product_id="before-start", title="Linen wrap dress", price=76543210.0)])
    arms = [Arm(name="old", share=0.001), Arm(name="new", share=0.999, release="ninth")]
    admin.start_experiment("aside", ExperimentBody(arms=arms))
    body = RecommendBody.model_validate({"user_id": "of-new", "filters": {"min_price": 76543210.0}})

    def answered() -> tuple[str, list[str]]:
        answer = admin.recommend(body)
        return answer.release, [item.product_id for item in answer.items]

    eventually(lambda: answered() == ("ninth", ["before-start"]))
    admin.stop_experiment("aside")
    with Store.open(shop) as store:
        delete(store, shop.models_dir, "ninth")


def test_what_came_or_changed_while_another_release_was_live_is_known_after_the_way_back(shop, admin):
    first = trained(shop)
    first.make_live()
    admin.put_products([RawProduct(product_id="changed", title="Wool coat")])
    twin(shop, "third")
    admin.promote("third")
    admin.put_products([RawProduct(product_id="late-1", title="Linen wrap dress", price=87654321.0)])
    admin.put_products([RawProduct(product_id="changed", title="Silk party dress")])
    body = RecommendBody.model_validate({"filters": {"min_price": 87654321.0}})
    assert [item.product_id for item in admin.recommend(body).items] == ["late-1"]
    admin.rollback()
    eventually(lambda: [item.product_id for item in admin.recommend(body).items] == ["late-1"])
    assert admin.recommend(body).release == first.name
    with Store.open(shop) as store:

        def vector_in(release: str) -> np.ndarray:
            return store.vectors.fetch(release, ["changed"]).vectors[0]

        eventually(lambda: np.allclose(vector_in(first.name), vector_in("third"), atol=1e-5))
        # Only these: what was there when a release was indexed has its vector, whoever read it when.
        eventually(lambda: store.vectors.outdated(first.name) == [])
        store.products.put_features(
            [Product(product_id="late-1", title="", std={}, re={"style": ["latecore"]})], "test"
        )
        assert store.vectors.outdated(first.name) == ["late-1"]
        delete(store, shop.models_dir, "third")


def test_a_rollback_that_says_what_it_leaves_is_done_once(shop, web, made, admin):
    """Somebody moves the pointer for longer than a call may take: nobody hears that it was done."""
    first = trained(shop)
    first.make_live()
    for name in ("sixth", "seventh"):
        twin(shop, name).make_live()
    admin.put_products([RawProduct(product_id="late-7", title="Linen wrap dress", price=76543210.0)])
    headers = {"X-API-Key": made["admin"]}

    def asked(path: str) -> httpx.Response:
        return web.post(f"/releases/{path}", headers=headers)

    with _promotions(shop.models_dir):
        unheard = asked("rollback?from=seventh")
    assert unheard.status_code == 503
    assert "GET /releases says which release is live" in unheard.json()["detail"]
    eventually(lambda: Release.current(shop.models_dir) == "sixth")
    with Store.open(shop) as store:  # what came while the other one was live is indexed, though nobody heard
        eventually(lambda: store.vectors.fetch("sixth", ["late-7"]).product_ids == ["late-7"])
    # Another call that had read the pointer before it was moved comes second.
    Release.open(shop.models_dir, "sixth").make_live(back=True, expected="seventh")
    for _ in range(2):
        again = asked("rollback?from=seventh")
        assert (again.status_code, again.json()["name"]) == (200, "sixth")
    refused = asked(f"{first.name}/live?from=seventh")
    assert (refused.status_code, refused.json()["detail"]) == (
        409, "release sixth is live, not seventh: nothing was changed",
    )  # fmt: skip
    assert asked(f"{first.name}/live?from=sixth").status_code == 200
    assert asked(f"{first.name}/live?from=sixth").status_code == 200  # it is what it was asked to be
    refused = asked("rollback?from=seventh")
    assert (refused.status_code, first.name in refused.json()["detail"]) == (409, True)
    assert Release.current(shop.models_dir) == first.name
    with Store.open(shop) as store:
        for name in ("sixth", "seventh"):
            delete(store, shop.models_dir, name)


def test_releases_at_the_keyboard(shop, capsys):
    def typed(action: str, name: str = "") -> list[str]:
        releases.main(releases.ReleaseOptions(**shop.model_dump(), action=action, name=name, _env_file=None))
        return capsys.readouterr().out.splitlines()

    first = trained(shop)
    first.make_live()
    twin(shop, "fourth")
    assert typed("promote", "fourth")[0] == "release fourth is live"
    with pytest.raises(UserError, match="is live; promote another one first"):
        typed("delete", "fourth")
    assert [line.split()[0] for line in typed("list") if " live " in line] == ["fourth"]
    assert typed("rollback")[0] == f"release {first.name} is live"
    assert typed("delete", "fourth") == ["release fourth is deleted"]
    with Store.open(shop) as store:
        assert "fourth" not in store.vectors.releases()
        assert "fourth" not in {release.name for release in store.releases.read()}
        with pytest.raises(UserError, match="no release 'fourth'"):
            delete(store, shop.models_dir, "fourth")
        with pytest.raises(UserError, match="no release"):
            delete(store, shop.models_dir, "../models")
    assert "fourth" not in Release.names(shop.models_dir)


# --- the client -------------------------------------------------------------------------------------------------------


def test_the_client_reaches_every_route_of_its_own(shop, admin, made, web):
    trained(shop).make_live()
    assert admin.health().status == "ok"
    assert admin.ready().release == trained(shop).name
    found = admin.recommend(RecommendBody(k=2))
    assert [item.rank for item in found.items] == [1, 2]
    first = found.items[0].product_id
    assert admin.item(first).title == found.items[0].title
    assert len(admin.similar(first, k=3)) == 3
    assert admin.put_user("by-client", {"height_cm": 170}).profile == {"height_cm": 170.0}
    event = Event(user_id="by-client", product_id=first, kind="purchase", at=datetime.now(UTC))
    assert admin.add_events([event]).stored == 1
    assert admin.add_events([event]).duplicates == 1
    assert first not in [item.product_id for item in admin.recommend(RecommendBody(user_id="by-client")).items]
    assert admin.add_events([Event(session_id="by-browser", product_id=first, at=datetime.now(UTC))]).stored == 1
    assert admin.merge_session("by-client", "by-browser").moved == 1
    assert admin.user("by-client").events == {"purchase": 1, "view": 1}
    assert admin.forget_user("by-client").removed["events"] == 2
    assert admin.add_events([Event(session_id="by-nobody", product_id=first, at=datetime.now(UTC))]).stored == 1
    assert admin.forget_session("by-nobody").removed["events"] == 1
    assert admin.put_products([RawProduct(product_id="by-client", title="Sock")]).stored == 1
    assert admin.delete_products(["by-client", "ghost"]).unknown == ["ghost"]
    assert "styletower_requests_total" in admin.metrics()
    with (
        StyleTower(str(web.base_url), made["public"]) as page,
        pytest.raises(StyleTowerError, match="403: a public API key may not"),
    ):
        page.releases()


# --- lists of everybody -----------------------------------------------------------------------------------------------


def test_a_batch_that_was_killed_ends_with_the_answers_of_the_api(shop, admin, tmp_path):
    trained(shop).make_live()
    with Store.open(shop) as store:
        users = store.users.read_ids()
    assert len(users) > 50
    out = tmp_path / "lists.parquet"
    arguments = [str(out), "-k", "5", "--part-users", "10", "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "score_users.py", *arguments], cwd=ROOT, env={**os.environ, **environment_of(shop)},
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    parts = tmp_path / "lists.parquet.parts"
    eventually(lambda: (parts / "000001.parquet").exists())
    process.kill()
    process.wait()
    assert not out.exists()
    written = {path.name: path.stat().st_mtime_ns for path in parts.glob("00000[01].parquet")}
    (parts / "000000.parquet").write_bytes((parts / "000001.parquet").read_bytes())  # to see that it is not made again
    ended = run("score_users.py", shop, *arguments)
    assert ended.returncode == 0, ended.stderr
    assert len(written) == 2
    assert "goes on with" in ended.stdout
    lists = pl.read_parquet(out)
    assert lists["user_id"].unique(maintain_order=True).to_list() == users[10:20] + users[20:]
    assert not parts.exists()

    # By the rules that are live, as the API.
    rules = RuleSet.model_validate([{"kind": "at_most", "n": 1, "std": "category"}])
    version = admin.put_rules(RulesBody(rules=rules)).version

    def all_workers_know(version: int) -> bool:
        used = [admin.recommend(RecommendBody(k=1)).rules for _ in range(10)]
        return {rules.version for rules in used if rules} == {version} and all(used)

    eventually(lambda: all_workers_know(version))
    fresh = run("score_users.py", shop, *arguments)
    assert fresh.returncode == 0, fresh.stderr
    lists = pl.read_parquet(out)
    assert lists["user_id"].unique(maintain_order=True).to_list() == users
    assert set(lists["release"]) == {trained(shop).name}
    for user in users[::7]:
        own = lists.filter(user_id=user)
        answer = admin.recommend(RecommendBody(user_id=user, k=5))
        assert own["product_id"].to_list() == [item.product_id for item in answer.items]
        assert own["rank"].to_list() == [1, 2, 3, 4, 5]
        assert own["score"].to_list() == pytest.approx([item.score for item in answer.items], abs=1e-3)
        categories = [str(admin.item(product_id).std.get("category")) for product_id in own["product_id"]]
        assert len(set(categories)) == len(categories)
    after = admin.put_rules(RulesBody(rules=RuleSet([]))).version
    eventually(lambda: all_workers_know(after))
    assert [turn.version for turn in admin.rules().history][:2] == [after, version]
    assert admin.rules_version(version).rules == rules
    assert admin.make_rules_live(after, RulesLiveBody(note="still nothing")).live
    assert not admin.check_rules(rules).warnings


def test_a_batch_of_named_shoppers_says_who_is_unknown(shop, tmp_path):
    with Store.open(shop) as store:
        known = store.users.read_ids()[0]
    (tmp_path / "ids.txt").write_text(f"{known}\n\nnobody\n{known}\n", encoding="utf-8")
    out = tmp_path / "some.parquet"
    done = run("score_users.py", shop, str(out), "--users", str(tmp_path / "ids.txt"), "-k", "2")
    assert done.returncode == 0, done.stderr
    assert "lists of 2 shoppers, 1 of them nobody the shop knows" in done.stdout
    assert pl.read_parquet(out)["user_id"].to_list() == [known, known, "nobody", "nobody"]


# --- retraining -------------------------------------------------------------------------------------------------------


def test_one_retraining_at_a_time(shop):
    with Store.open(shop) as store, store.releases.retraining() as alone:
        assert alone
        before = Release.names(shop.models_dir)
        second = run("retrain.py", shop)
    assert second.returncode == 4
    assert "another retrain.py is at work" in second.stderr
    assert Release.names(shop.models_dir) == before


@pytest.mark.timeout(900)  # eight processes, each with torch to load
def test_retraining_goes_on_after_a_kill_promotes_keeps_out_what_is_worse_and_cleans_up(new_shop):
    with new_shop() as shop:
        first = trained(shop)
        arguments = ["--train-reranker", "--epochs 1", "--build-index", "--margin 1", "--keep", "1"]
        process = subprocess.Popen(
            [sys.executable, "retrain.py", *arguments], cwd=ROOT, env={**os.environ, **environment_of(shop)},
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        eventually(lambda: len(Release.names(shop.models_dir)) == 2)
        second = Release.names(shop.models_dir)[1]
        eventually(lambda: "item_tower" in Release.open(shop.models_dir, second).manifest)
        process.kill()
        process.wait()
        with Store.open(shop) as store:
            store.users.put([User(user_id="in-metres", profile={"height_cm": 1.65})])
            product_id = store.products.read_features()[0].product_id
            store.events.put([Event(user_id="in-metres", product_id=product_id, at=datetime(2026, 6, 1, tzinfo=UTC))])
        assert Release.current(shop.models_dir) == first.name
        encoder = (shop.models_dir / second / "encoder_stage1.pth").stat().st_mtime_ns

        done = run("retrain.py", shop, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"goes on with release {second}" in done.stdout
        assert "train_simcse: done before" in done.stdout
        assert "train_user: warning: 1 values of height_cm" in done.stdout
        assert f"promoted: release {second} is live" in done.stdout
        assert Release.current(shop.models_dir) == second
        assert (shop.models_dir / second / "encoder_stage1.pth").stat().st_mtime_ns == encoder
        # As the live release was made, but for what was given.
        made = Release.open(shop.models_dir, second).manifest
        for part, other in (("item_tower", {}), ("user_tower", {}), ("reranker", {"epochs": 1})):
            alike = {"release": "", "fresh": False, "data_dir": None, "models_dir": None}
            assert {**made[part]["options"], **alike} == {**first.manifest[part]["options"], **alike, **other}

        # Another night: trained to the end, and found worse.
        third = Release(shutil.copytree(shop.models_dir / second, shop.models_dir / "third"))
        spoil(third)
        third.manifest["created_at"] = "2999-01-01"
        del third.manifest["index"]
        given = {**third.manifest["retrain"]["given"], "build_index": "--margin 0.05"}
        third.record("retrain", **{**third.manifest["retrain"], "given": given, "outcome": ""})
        old = twin(shop, "old")
        old.manifest["created_at"] = "2000-01-01"
        old.save_manifest()
        worse = run("retrain.py", shop, *arguments[:2], "--build-index", "--margin 0.05", "--keep", "1")
        assert worse.returncode == 3, worse.stdout + worse.stderr
        assert f"release {second} stays live" in worse.stderr
        assert "which neither learned from" in worse.stderr
        assert Release.current(shop.models_dir) == second
        # The newest, the live one, and the one before it stay.
        assert Release.names(shop.models_dir) == [first.name, second, "third"]
        with Store.open(shop) as store:
            assert store.vectors.releases() == [first.name, second, "third"]


def test_a_stage_that_fails_is_named_with_its_own_words_and_nothing_changes(settings, tmp_path):
    new = empty(settings, tmp_path)
    failed = run("retrain.py", new)
    assert failed.returncode == 2
    assert (
        "extract_features failed with exit code 2: extract_features.py: the shop has no feature schema" in failed.stderr
    )
    assert Release.current(new.models_dir) is None
