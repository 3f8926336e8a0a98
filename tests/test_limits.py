"""Bodies of requests, as they come in pieces."""

from __future__ import annotations

import asyncio

import pytest
from fastapi import HTTPException
from starlette.types import Message, Receive, Scope, Send

from api_controller.limits import MB, BodyLimit


def sent(*given: Message, path: str = "/recommend", length: int = 0) -> tuple[list[Message], list[Message]]:
    """What the application behind the limit receives, and what the sender gets from the limit, of these messages."""
    received, answered = [], []
    coming = iter(given)

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        received.append(await receive())

    async def receive() -> Message:
        return next(coming)

    async def send(message: Message) -> None:
        answered.append(message)

    headers = [(b"content-length", b"%d" % length)] if length else []
    asyncio.run(BodyLimit(application)({"type": "http", "path": path, "headers": headers}, receive, send))
    return received, answered


def piece(body: bytes, more: bool = True) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


def test_a_body_of_many_pieces_is_one():
    received, answered = sent(*[piece(b"a")] * 1000, piece(b"b", more=False))
    assert received == [piece(b"a" * 1000 + b"b", more=False)]
    assert answered == []


def test_a_sender_who_leaves_midway_is_no_request():
    received, _ = sent(piece(b"a"), {"type": "http.disconnect"})
    assert received == [{"type": "http.disconnect"}]


@pytest.mark.parametrize(
    ("path", "most"),
    [("/recommend", MB), ("/events", 8 * MB), ("/products", 16 * MB), ("/products/delete", MB), ("/nowhere", MB)],
)
def test_a_body_may_be_as_large_as_the_limit_of_its_route_and_no_larger(path, most):
    start = piece(b" " * (most - 1))
    assert len(sent(start, piece(b" ", more=False), path=path)[0]) == 1
    with pytest.raises(HTTPException) as refused:
        sent(start, piece(b" "), piece(b" ", more=False), path=path)
    assert (refused.value.status_code, f"{most // MB} MB" in refused.value.detail) == (413, True)
    received, answered = sent(path=path, length=most + 1)  # announced: nothing of it is read
    assert (received, answered[0]["status"]) == ([], 413)


def test_nothing_is_read_before_the_application_asks():
    async def unasking(scope: Scope, receive: Receive, send: Send) -> None:
        return None

    async def never() -> Message:
        raise AssertionError("read")

    async def send(message: Message) -> None:
        raise AssertionError("answered")

    asyncio.run(BodyLimit(unasking)({"type": "http", "path": "/events", "headers": []}, never, send))
