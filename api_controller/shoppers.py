"""Who shops, and what they do."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, HTTPException, Request
from pydantic import TypeAdapter

from api_controller.access import ADMIN, PUBLIC, GivenKey, ShopperToken
from api_controller.refusals import CONFLICT, MISSING
from api_controller.rows import read_rows, rows_body
from api_controller.schemas import (
    EventsAnswer,
    ForgottenAnswer,
    MergeBody,
    MergedAnswer,
    ProfileBody,
    RefusedBody,
    SessionId,
    UserAnswer,
    UserId,
)
from api_controller.service import Service, ServiceDep
from catalog import SESSION, Event, User, oldest_event, session_key
from store import SessionTakenError

router = APIRouter(tags=["shoppers"])

MAX_EVENTS = 10_000  # of one call
FORGET_SECONDS = 60.0  # all of the quarantine is looked through
EVENTS: TypeAdapter[Event] = TypeAdapter(Event)
EVENT_EXAMPLE: list[Any] = [
    {"user_id": "shopper-1", "product_id": "product-17", "kind": "view", "at": "2026-06-30T10:00:00Z"}
]


@router.post("/events", dependencies=[PUBLIC], openapi_extra=rows_body(Event, MAX_EVENTS, EVENT_EXAMPLE))
async def events(request: Request, service: ServiceDep, key: GivenKey, token: ShopperToken = None) -> EventsAnswer:
    """One event or up to 10,000, in any order of time. The next /recommend sees them; they are on disk when this returns. The same
    event twice counts once. Of many the bad ones are refused, the others stored."""
    store, _ = service.parts()
    body = await request.body()

    def work() -> EventsAnswer:
        given = read_rows(body, EVENTS, MAX_EVENTS)
        named = (event.user_id for event in given.rows if not event.user_id.startswith(SESSION))
        service.access.admit_shoppers(key, token, named)
        oldest = oldest_event(service.settings.event_retention_days)
        kept = [number for number, event in enumerate(given.rows) if event.at >= oldest]
        late = [given.places[number] for number, event in enumerate(given.rows) if event.at < oldest]
        put = store.events.put([given.rows[number] for number in kept])
        unknown = set(put.unknown_products)
        refused = given.refused + [
            RefusedBody(index=given.places[number], what="product_id", reason="unknown product")
            for number in kept
            if given.rows[number].product_id in unknown
        ]
        store.quarantine.add_refused(given.rejected(refused, "POST /events"))
        # What was let go on purpose is not kept in quarantine either.
        refused += [
            RefusedBody(index=place, what="at", reason=f"before {oldest:%Y-%m-%d}; events so old are not kept")
            for place in late
        ]
        refused.sort(key=lambda one: one.index)
        return EventsAnswer(stored=put.stored, duplicates=put.duplicates, refused=refused)

    answer = await service.run(work)
    for outcome, count in (
        ("stored", answer.stored), ("duplicate", answer.duplicates), ("refused", len(answer.refused)),
    ):  # fmt: skip
        service.rows.labels("event", outcome).inc(count)
    return answer


@router.put("/users/{user_id}", dependencies=[ADMIN])
async def user(user_id: UserId, body: ProfileBody, service: ServiceDep) -> User:
    """Set a shopper's profile; what was there before is replaced."""
    store, _ = service.parts()
    stored = User(user_id=user_id, profile=body.profile)
    await service.run(lambda: store.users.put([stored]))
    service.rows.labels("user", "stored").inc()
    return stored


@router.get("/users/{user_id}", dependencies=[ADMIN], responses=MISSING)
async def known_user(user_id: UserId, service: ServiceDep) -> UserAnswer:
    """What is known of a shopper."""
    store, _ = service.parts()
    summary = await service.run(lambda: store.users.summary(user_id))
    if summary is None:
        raise HTTPException(404, f"no user {user_id!r}")
    return UserAnswer(user_id=user_id, **vars(summary))


@router.post("/users/{user_id}/merge", dependencies=[ADMIN], responses=CONFLICT)
async def merge(user_id: UserId, body: MergeBody, service: ServiceDep) -> MergedAnswer:
    """At login: what the session did, and what arrives of it later, is the user's. Twice is the same as once."""
    store, _ = service.parts()
    try:
        moved = await service.run(lambda: store.sessions.merge(session_key(body.session_id), user_id))
    except SessionTakenError as error:
        raise HTTPException(
            409, f"session {body.session_id!r} was merged into another user; begin a new one at logout"
        ) from error
    service.rows.labels("session", "merged").inc()
    return MergedAnswer(moved=moved)


@router.delete("/users/{user_id}", dependencies=[ADMIN])
async def forget(user_id: UserId, service: ServiceDep) -> ForgottenAnswer:
    """Remove every trace of a shopper: profile, events, sessions, whatever has rows of theirs. Twice is the same as once."""
    return await forgotten(service, user_id, "user")


@router.delete("/sessions/{session_id}", dependencies=[ADMIN], responses=CONFLICT)
async def forget_session(session_id: SessionId, service: ServiceDep) -> ForgottenAnswer:
    """Remove every trace of a session that is nobody's. One that was merged into a user is a 409: it goes
    with DELETE /users/{id}."""
    try:
        return await forgotten(service, session_key(session_id), "session")
    except SessionTakenError as error:
        raise HTTPException(
            409,
            f"session {session_id!r} was merged into the user {error.owner!r}, and what it did is theirs: nothing was removed; "
            f"DELETE /users/{error.owner} removes both",
        ) from error


async def forgotten(service: Service, key: str, what: str) -> ForgottenAnswer:
    store, _ = service.parts()
    removed = await service.run(lambda: store.users.forget(key), FORGET_SECONDS)
    service.rows.labels(what, "forgotten").inc()
    return ForgottenAnswer(removed=removed)
