"""Who shops, and what they do."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body

from api_controller.access import ADMIN, PUBLIC
from api_controller.schemas import EventsAnswer, ProfileBody, UserId
from api_controller.service import ServiceDep, listed
from catalog import Event, User

router = APIRouter(tags=["shoppers"])

EVENT_EXAMPLE: list[Any] = [
    {"user_id": "shopper-1", "product_id": "product-17", "kind": "view", "at": "2026-06-30T10:00:00Z"}
]


@router.post("/events", dependencies=[PUBLIC])
async def events(
    body: Annotated[Event | list[Event], Body(examples=EVENT_EXAMPLE)], service: ServiceDep
) -> EventsAnswer:
    """One event or up to 1,000. The next /recommend sees them. The same event twice counts once."""
    store, _ = service.parts()
    given = listed(body)
    put = await service.run(lambda: store.events.put(given))
    return EventsAnswer(stored=put.stored, duplicates=put.duplicates, unknown_products=put.unknown_products)


@router.put("/users/{user_id}", dependencies=[ADMIN])
async def user(user_id: UserId, body: ProfileBody, service: ServiceDep) -> User:
    """Set a shopper's profile; what was there before is replaced."""
    store, _ = service.parts()
    stored = User(user_id=user_id, profile=body.profile)
    await service.run(lambda: store.users.put([stored]))
    return stored
