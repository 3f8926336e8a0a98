"""What was shown and seen."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body

from api_controller.access import PUBLIC
from api_controller.schemas import ViewBody, ViewsAnswer
from api_controller.service import ServiceDep, listed

router = APIRouter(tags=["impressions"])

VIEW_EXAMPLE: list[Any] = [{"list_id": "0b8a4c1de3f24f6f9a3d5c7e8f901234", "positions": [1, 2, 3, 4]}]


@router.post("/impressions", dependencies=[PUBLIC])
async def impressions(
    body: Annotated[ViewBody | list[ViewBody], Body(examples=VIEW_EXAMPLE)], service: ServiceDep
) -> ViewsAnswer:
    """Which places of lists shoppers really saw, of one list or up to 1,000. Said again nothing changes, more is added."""
    store, _ = service.parts()
    given = listed(body)
    await service.run(lambda: store.impressions.see([(view.list_id, view.positions) for view in given]))
    service.rows.labels("view", "stored").inc(len(given))
    return ViewsAnswer(stored=len(given))
