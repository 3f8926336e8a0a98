"""The largest body that is read, counted as it comes: a length that nobody announced is bounded too."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

MB = 2**20
MAX_BODY = 1 * MB  # bytes
LARGER = {"/events": 8 * MB}  # ten thousand events, of 800 bytes each


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
        # Read ahead of the application: once it has answered there is no changing the status.
        # Joined as it comes: a sender of single bytes must not cost hundreds for each.
        body = bytearray()
        message: Message = {"more_body": True}
        while message.get("more_body", False):
            message = await receive()
            body += message.get("body", b"")
            if len(body) > most:
                await _refuse(send, most)
                return
        whole: Message = {"type": "http.request", "body": bytes(body), "more_body": False}
        waiting = [message if message["type"] == "http.disconnect" else whole]

        async def replay() -> Message:
            return waiting.pop() if waiting else await receive()

        await self.app(scope, replay, send)


async def _refuse(send: Send, most: int) -> None:
    refusal = b'{"detail":"the body is larger than %d MB"}' % (most // MB)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(refusal)).encode())]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": refusal})
