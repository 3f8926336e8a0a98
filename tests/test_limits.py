"""Bodies of requests, as they come in pieces."""

from __future__ import annotations

import asyncio

import pytest
from starlette.types import Message, Receive, Scope, Send

from api_controller.limits import MB, BodyLimit


def sent(*given: Message) -> tuple[list[Message], list[Message]]:
    """What the application behind the limit receives, and what the sender gets from the limit, of these messages."""
    received, answered = [], []
    coming = iter(given)

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        received.append(await receive())

    async def receive() -> Message:
        return next(coming)

    async def send(message: Message) -> None:
        answered.append(message)

    asyncio.run(BodyLimit(application)({"type": "http", "path": "/recommend", "headers": []}, receive, send))
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


@pytest.mark.parametrize(("size", "passes"), [(MB, True), (MB + 1, False)])
def test_a_body_may_be_as_large_as_the_limit_and_no_larger(size, passes):
    received, answered = sent(piece(b" " * (size - 1)), piece(b" ", more=False))
    assert bool(received) == passes
    assert [message.get("status") for message in answered] == ([] if passes else [413, None])
