"""The service as a real process over HTTP, before any release exists: alive, honest, and gone without a trace."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.serving import assert_fits, serving


@pytest.fixture(scope="module")
def service():
    """A server on an empty folder: a client of it."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        environment = {"DATA_DIR": f"{folder}/data", "MODELS_DIR": f"{folder}/models", "DATABASE_URL": ""}
        with serving(environment) as (_, client):
            yield client


def test_a_server_imports_nothing_that_only_others_use():
    """Each of these takes a good part of a second, and a process that is to take over from another has to be there soon."""
    others = {
        "accelerate", "huggingface_hub", "openai", "polars", "pytorch_metric_learning", "scipy", "sklearn", "sympy", "transformers",
    }  # fmt: skip
    command = f"import sys, api_controller.app; print(sorted({others} & set(sys.modules)))"
    folder = Path(__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", command], cwd=folder, capture_output=True, text=True).stdout == "[]\n"


def test_alive_but_not_ready_without_a_release(service):
    assert service.get("/health").json()["status"] == "ok"
    answer = service.get("/ready")
    assert answer.status_code == 503
    assert "no release is live yet" in answer.json()["reason"]


def test_recommend_without_a_release_is_a_clear_503(service):
    answer = service.post("/recommend", json={})
    assert answer.status_code == 503
    assert answer.headers["retry-after"]
    assert "no release is live yet" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"k": 0}, "k"),
        ({"k": 101}, "k"),
        ({"user_id": "a\x00b"}, "user_id"),
        ({"profile": {"height_cm": "tall"}}, "height_cm"),
        ({"profile": {"height_cm": True}}, "height_cm"),
        ({"filters": {"max_price": True}}, "max_price"),
        ({"surprise": 1}, "surprise"),
        ({"filters": {"min_price": -1}}, "min_price"),
    ],
)
def test_a_bad_value_is_a_422_that_names_the_field(service, body, field):
    answer = service.post("/recommend", json=body)
    assert answer.status_code == 422
    assert field in {part for error in answer.json()["detail"] for part in error["loc"]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "not valid JSON: Expecting property name"),
        (b'{"profile": {"height_cm": NaN}}', "a finite number"),
        (b"[" * 100_000, "not valid JSON: it is nested too deeply"),
        (b'{"context": "\xff"}', "not valid JSON: it is not UTF-8"),
    ],
)
def test_broken_json_is_a_422_that_says_why(service, content, reason):
    answer = service.post("/recommend", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert reason in answer.json()["detail"][0]["msg"]


def chunks():
    for _ in range(40):
        yield b" " * 65_536


@pytest.mark.parametrize("content", [b" " * (2**20 + 1), chunks])
def test_a_body_over_one_megabyte_is_a_413(service, content):
    answer = service.post("/recommend", content=content() if callable(content) else content)
    assert answer.status_code == 413


def test_events_on_products_that_are_not_there_are_refused_and_nothing_is_stored(service):
    event = {"user_id": "u", "product_id": "ghost", "kind": "view", "at": "2026-01-01T00:00:00Z"}
    answer = service.post("/events", json=[event])
    assert answer.status_code == 200
    refused = [{"index": 0, "what": "product_id", "reason": "unknown product"}]
    assert answer.json() == {"stored": 0, "duplicates": 0, "refused": refused}


def test_an_event_that_has_not_happened_is_refused_but_a_clock_may_be_ahead_or_in_another_zone(service):
    """One from another century would leave the next training nothing to learn from."""
    ahead = datetime.now(UTC) + timedelta(hours=14)
    events = [{"user_id": "u", "product_id": "ghost", "at": at} for at in ("2099-01-01T00:00:00Z", ahead.isoformat())]
    refused = service.post("/events", json=events).json()["refused"]
    assert [(row["index"], row["what"]) for row in refused] == [(0, "at"), (1, "product_id")]
    assert "2099-01-01 00:00 UTC is more than a day ahead of this machine's clock" in refused[0]["reason"]


def test_the_description_is_whole_and_its_examples_fit_it(service):
    """What generators of clients need: every model that is named is there, and none by two names."""
    described = service.get("/openapi.json").json()
    models = described["components"]["schemas"]
    named = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(described)))
    assert {"Event", "RawProduct"} <= named <= models.keys()
    titles = [model.get("title", name) for name, model in models.items()]
    assert len(titles) == len(set(titles))
    bodies = [
        route["requestBody"]
        for path in described["paths"].values()
        for route in path.values()
        if "requestBody" in route
    ]
    for body in bodies:
        form = body["content"]["application/json"]["schema"]
        for example in form.get("examples", []):
            assert_fits(example, form, described)


def test_a_row_of_a_nest_too_deep_to_be_written_is_refused_like_any_other(service):
    deep = "[" * 500 + "]" * 500
    ghost = '{"user_id": "u", "product_id": "ghost", "at": "2026-01-01T00:00:00Z"}'
    answer = service.post("/events", content=f'[{{"user_id": {deep}}}, {ghost}]')
    assert answer.status_code == 200
    assert [row["index"] for row in answer.json()["refused"]] == [0, 1]


def test_products_before_there_is_a_schema_are_a_503_that_says_so(service):
    answer = service.put("/products", json={"product_id": "p", "title": "Dress"})
    assert answer.status_code == 503
    assert "no feature schema yet" in answer.json()["detail"]


def test_a_profile_is_stored(service):
    answer = service.put("/users/u1", json={"profile": {"height_cm": 172}})
    assert answer.status_code == 200
    assert answer.json() == {"user_id": "u1", "profile": {"height_cm": 172.0}}


@pytest.mark.parametrize("path", ["/items/ghost", "/nowhere"])
def test_what_is_not_there_is_a_404(service, path):
    assert service.get(path).status_code == 404


def test_metrics_count_requests_and_ids_come_back(service):
    answer = service.get("/health", headers={"X-Request-ID": "abc"})
    assert answer.headers["x-request-id"] == "abc"
    assert 'styletower_requests_total{route="/health",status="200"}' in service.get("/metrics").text
