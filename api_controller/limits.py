"""The largest body that is read, counted as it comes: a length that nobody announced is bounded too.

The routes with larger ones ask for a body only after the key was checked, so that nobody without one makes the service read much.
"""

from __future__ import annotations

import orjson
from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MB = 2**20
MAX_BODY = 1 * MB  # bytes
LARGER = {
    "/events": 8 * MB,  # ten thousand events, of 800 bytes each
    "/products": 16 * MB,  # a thousand products, of 16 KB each: long descriptions
}


class BodyLimit:
    """ASGI middleware: 413 as soon as a body passes what its route takes."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        most = LARGER.get(scope["path"], MAX_BODY)
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > most:
            await _refuse(send, most)
            return
        whole: Message | None = None

        async def read() -> Message:
            """The whole body, as soon as the application asks for it."""
            nonlocal whole
            if whole is not None:
                return await receive()
            # Joined as it comes: a sender of single bytes must not cost hundreds for each.
            body = bytearray()
            message: Message = {"more_body": True}
            while message.get("more_body", False):
                message = await receive()
                body += message.get("body", b"")
                if len(body) > most:
                    raise HTTPException(413, _too_large(most))
            whole = {"type": "http.request", "body": bytes(body), "more_body": False}
            return message if message["type"] == "http.disconnect" else whole

        await self.app(scope, read, send)


def _too_large(most: int) -> str:
    return f"the body is larger than {most // MB} MB; send it in several calls"


async def _refuse(send: Send, most: int) -> None:
    refusal = orjson.dumps({"detail": _too_large(most)})
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(refusal)).encode())]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": refusal})
