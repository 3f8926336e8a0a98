"""Bodies of many rows: each row is judged alone, so that a bad one costs the others nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import orjson
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, TypeAdapter, ValidationError

from api_controller.refusals import invalid
from api_controller.schemas import RefusedBody
from catalog import Rejected

MAX_RAW = 10_000  # characters of a refused row that are kept

Row = TypeVar("Row", bound=BaseModel)


@dataclass(frozen=True)
class Given(Generic[Row]):
    content: list[Any]  # as it came
    rows: list[Row]  # those that can be taken
    places: list[int]  # of each row in `content`
    refused: list[RefusedBody]

    def rejected(self, refused: Sequence[RefusedBody], route: str) -> list[Rejected]:
        """For the quarantine."""
        return [
            Rejected(route, one.index + 1, f"{one.what}: {one.reason}", _raw(self.content[one.index]))
            for one in refused
        ]


def read_rows(body: bytes, adapter: TypeAdapter[Row], most: int) -> Given[Row]:
    """The rows of a JSON list of at most `most`, or the one that the body is.

    Raises what answers 422 for what is no such list, and for a bad row that came alone.
    """
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise invalid((["body"], f"not valid JSON: {error.msg}"), kind="json_invalid") from error
    alone = not isinstance(content, list)
    if alone:
        content = [content]
    if len(content) > most:
        raise invalid((["body"], f"{len(content):,} rows; at most {most:,} at once"), kind="too_long")
    given: Given[Row] = Given(content, [], [], [])
    for place, row in enumerate(content):
        try:
            given.rows.append(adapter.validate_python(row))
            given.places.append(place)
        except ValidationError as error:
            errors = error.errors(include_url=False, include_context=False, include_input=False)
            if alone:
                raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in errors]) from error
            what = ".".join(map(str, errors[0]["loc"])) or "row"
            reason = errors[0]["msg"].removeprefix("Value error, ")
            given.refused.append(RefusedBody(index=place, what=what, reason=reason))
    return given


def rows_body(model: type[BaseModel], most: int, examples: list[Any]) -> dict[str, Any]:
    """What the interactive pages say of a body that `read_rows` reads."""
    row = {"$ref": f"#/components/schemas/{model.__name__}"}
    schema = {"anyOf": [row, {"type": "array", "items": row, "maxItems": most}], "examples": examples}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _raw(row: Any) -> str:
    try:
        return orjson.dumps(row).decode()[:MAX_RAW]
    except orjson.JSONEncodeError:  # it reads deeper nests than it writes
        return "(nested too deeply to be kept)"
