"""How a request is refused: what it is told, and what the API's description says of it, so that a generated client knows too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import HTTPException

from api_controller.schemas import Invalid, Refusal

Responses = dict[int | str, dict[str, Any]]

AGAIN = {"Retry-After": {"description": "seconds after which to ask again", "schema": {"type": "integer"}}}
# Of every route but those that are open to anybody.
ANY: Responses = {
    401: {"model": Refusal, "description": "No key, or one that is not known or was revoked"},
    403: {"model": Refusal, "description": "A key that may not do this, or a shopper token that is not taken"},
    413: {"model": Refusal, "description": "The body is too large"},
    422: {"model": Invalid, "description": "A value that cannot be, named by its place"},
    429: {"model": Refusal, "description": "Too many requests with this key", "headers": AGAIN},
    500: {"model": Refusal, "description": "A mistake of the service's own; its log has more under X-Request-ID"},
    503: {"model": Refusal, "description": "Busy, or something that it needs is away; ask again", "headers": AGAIN},
}
MISSING: Responses = {404: {"model": Refusal, "description": "It is not there"}}
CONFLICT: Responses = {409: {"model": Refusal, "description": "It cannot be done as things stand"}}


def invalid(*values: tuple[Sequence[str | int], str], kind: str = "value_error") -> HTTPException:
    """422 for values that the schema of a body lets pass: the place of each, and why not. `kind` as pydantic names them."""
    return HTTPException(422, [{"loc": list(place), "msg": reason, "type": kind} for place, reason in values])


def unavailable(reason: str) -> HTTPException:
    return HTTPException(503, reason, headers={"Retry-After": "2"})
