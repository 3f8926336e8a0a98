"""The words of the shop: what a product, an event, a shopper and a feature schema are.

Everything that enters the system, from a file or over HTTP, is one of these types first, so a wrong value is
refused here, with its field named, and no later stage needs to check it again.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

# Events outside this window are clock errors (epoch zero, year 20170), not shopping.
EARLIEST = datetime(1990, 1, 1, tzinfo=UTC)
LATEST = datetime(2100, 1, 1, tzinfo=UTC)
AHEAD = timedelta(days=1)  # that a sender's clock may be, or seem to be where a time is in no zone

MAX_ID = 200  # characters; ids become index keys
MAX_TEXT = 20_000  # characters of one title, description or context
MAX_VALUES = 200  # values of one attribute
# A shopper without an account goes by `session:` and the session's id wherever a user id stands, so no user id begins so.
SESSION = "session:"


def _no_nul(text: str) -> str:
    if "\x00" in text:
        raise ValueError("holds a NUL byte, which no text in PostgreSQL may")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("is not valid UTF-8 (a lone surrogate)") from error
    return text


def _identifier(text: str) -> str:
    if text != text.strip():
        raise ValueError("starts or ends with white space")
    return _no_nul(text)


def _user_id(text: str) -> str:
    if text.startswith(SESSION):
        raise ValueError(f"begins with {SESSION!r}, which is kept for sessions; send the rest as session_id")
    return text


def _utc(moment: datetime) -> datetime:
    """A time without a zone is UTC: shops' exports rarely say, and a fixed reading is repeatable."""
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    if not EARLIEST <= moment < LATEST:
        raise ValueError(f"{moment.date()} is not a believable date (expected {EARLIEST.year} to {LATEST.year})")
    return moment


def newest_event() -> datetime:
    """What is said to have happened then or later has not. All that is trained counts back from the newest event: a single one from
    another century would leave nothing to learn from."""
    return min(LATEST, datetime.now(UTC) + AHEAD)


def _happened(moment: datetime) -> datetime:
    if moment >= newest_event():
        raise ValueError(f"{moment:%Y-%m-%d %H:%M} UTC is more than a day ahead of this machine's clock")
    return moment


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("is not a finite number")
    return value


def _as_list(value: Any) -> Any:
    """A single value may stand for a list of one."""
    return [value] if isinstance(value, (str, int, float)) and not isinstance(value, bool) else value


def _no_flag(value: Any) -> Any:
    if isinstance(value, bool):  # pydantic would take true for 1
        raise ValueError("is true or false, and not a number")
    return value


def _as_text(value: Any) -> Any:
    """Numbers are welcome where text is meant (a year, a size); True and None are not."""
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


Identifier = Annotated[
    str, Field(min_length=1, max_length=MAX_ID), BeforeValidator(_as_text), AfterValidator(_identifier)
]
UserId = Annotated[Identifier, AfterValidator(_user_id)]
# Where an id may be left out: null, or an empty text, is the same as none.
MaybeIdentifier = Annotated[
    str,
    Field(max_length=MAX_ID),
    BeforeValidator(lambda value: "" if value is None else _as_text(value)),
    AfterValidator(_identifier),
]
Text = Annotated[str, Field(max_length=MAX_TEXT), AfterValidator(_no_nul)]
Value = Annotated[str, Field(max_length=MAX_ID), BeforeValidator(_as_text), AfterValidator(_no_nul)]
Values = Annotated[
    list[Value],
    Field(max_length=MAX_VALUES),
    BeforeValidator(_as_list, json_schema_input_type=Value | Annotated[list[Value], Field(max_length=MAX_VALUES)]),
]
Moment = Annotated[datetime, AfterValidator(_utc)]
Number = Annotated[float, BeforeValidator(_no_flag), AfterValidator(_finite)]
Price = Annotated[float, Field(ge=0), BeforeValidator(_no_flag), AfterValidator(_finite)]
# What a list may be; here, because the client of the API knows it without any model.
ListKind = Literal["for_you", "similar", "basket", "because", "trending", "again"]
Profile = dict[Identifier, Number]  # height_cm, weight_kg and any other numbers a shop has


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", str_strip_whitespace=False)


class RawProduct(_Record):
    """A product as the seller gave it. `attributes` is what was typed in: any names, any spelling."""

    product_id: Identifier
    title: Annotated[str, Field(min_length=1, max_length=MAX_TEXT), AfterValidator(_no_nul)]
    description: Text = ""
    attributes: dict[Identifier, Values] = {}
    price: Price | None = None
    in_stock: bool = True
    group_id: Identifier | None = Field(None, description="shared by the same item in other colours or sizes")
    arrived_at: Moment | None = None


class Product(_Record):
    """Structured JSON: what the encoder reads. `std` values lie in the schema, `re` values are open."""

    product_id: Identifier
    title: Text
    std: dict[str, list[str]] = {}
    re: dict[str, list[str]] = {}


def oldest_event(days: int) -> datetime:
    """Events from before are not kept, when events are kept for so many days; 0 is for ever."""
    return datetime.now(UTC) - timedelta(days=days) if days else EARLIEST


def session_key(session_id: str) -> str:
    """What stands as the user id of a session that belongs to nobody yet."""
    return SESSION + session_id


def event_id_of(user_id: str, product_id: str, kind: str, at: datetime) -> str:
    """The id of an event whose sender gave none: the same act at the same moment (`at` in UTC) is one event."""
    key = "\x1f".join((user_id, product_id, kind, at.isoformat()))
    return hashlib.blake2b(key.encode(), digest_size=12).hexdigest()


class Event(_Record):
    """One thing a shopper did. Sent twice, it counts once: the id is the same.

    Who has no account is known by `session_id`; `user_id` then is `session:` and that id.
    """

    session_id: Identifier | None = Field(None, description="instead of user_id, of a shopper who has not logged in")
    user_id: Annotated[MaybeIdentifier, AfterValidator(_user_id)] = Field(
        "", validate_default=True, description="counts, where session_id is given too"
    )
    product_id: Identifier
    kind: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")] = "view"
    at: Annotated[Moment, AfterValidator(_happened)]
    context: Text = Field("", description="the cart concept or occasion in words, if the shopper gave one")
    event_id: MaybeIdentifier = ""
    list_id: MaybeIdentifier = Field(
        "", description="of the answer of /recommend that showed the product, if it was one"
    )

    @field_validator("user_id", mode="after")
    @classmethod
    def _shopper(cls, user_id: str, info: ValidationInfo) -> str:
        if user_id or "session_id" not in info.data:  # a bad session_id is reported already
            return user_id
        if info.data["session_id"] is None:
            raise PydanticCustomError("missing", "give user_id, or session_id for a shopper without an account")
        return session_key(info.data["session_id"])

    @model_validator(mode="after")
    def _fill_id(self) -> Event:
        if not self.event_id:
            self.event_id = event_id_of(self.user_id, self.product_id, self.kind, self.at)
        return self


class User(_Record):
    """A shopper's body and other numbers. Only what is known is present; nothing is guessed."""

    user_id: UserId
    profile: Profile = {}


class FeatureSchema(_Record):
    """Which STD fields exist and their allowed values; which RE fields exist (their values are open)."""

    std: dict[Identifier, list[Value]]
    re: list[Identifier]

    @model_validator(mode="after")
    def _fields_are_distinct(self) -> FeatureSchema:
        both = sorted(set(self.std) & set(self.re))
        if both:
            raise ValueError(f"fields {both} are both STD and RE; a field is closed or open, not both")
        empty = sorted(name for name, values in self.std.items() if not values)
        if empty:
            raise ValueError(f"STD fields {empty} allow no value at all; list their values or make them RE")
        return self


@dataclass(frozen=True)
class Rejected:
    """A row that did not get in: where it stood, why, and the row itself for the person who mends it.

    `line` counts from 1: the line of a text file (a CSV's heading is line 1), the row of a Parquet file.
    """

    file: str
    line: int
    reason: str
    raw: str
