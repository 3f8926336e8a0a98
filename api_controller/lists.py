"""Ranked lists: for a shopper, and like an item."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, HTTPException, Query

import recommender as pipeline
from api_controller.schemas import ItemBody, NeighbourBody, ProductId, ReasonBody, RecommendAnswer, RecommendBody
from api_controller.service import ServiceDep
from store import Filters
from vocab import normalise

router = APIRouter(tags=["lists"])


@router.post("/recommend")
async def recommend(body: RecommendBody, service: ServiceDep) -> RecommendAnswer:
    """A ranked list for a shopper, a context, a body, or nobody at all."""
    _, recommender = service.parts()

    def work() -> pipeline.Answer:
        filters = Filters(_known_values(recommender, body.filters.std), *_bounds(body))
        return recommender.recommend(
            pipeline.Request(
                body.user_id,
                body.history,
                body.context,
                body.profile,
                filters,
                body.exclude,
                body.exclude_history,
                body.k,
            )
        )

    answer = await service.run(work)
    for stage, milliseconds in answer.milliseconds.items():
        service.seconds.labels(stage).observe(milliseconds / 1000)
    if answer.degraded:
        service.degraded.inc()
    items = [
        ItemBody.model_construct(**{**vars(item), "reasons": [ReasonBody(**vars(reason)) for reason in item.reasons]})
        for item in answer.items
    ]
    return RecommendAnswer.model_construct(**{**vars(answer), "items": items})


def _bounds(body: RecommendBody) -> tuple[float | None, float | None, bool | None]:
    return body.filters.min_price, body.filters.max_price, body.filters.in_stock


def _known_values(recommender: pipeline.Recommender, std: dict[str, list[str]]) -> dict[str, list[str]]:
    """The filter in the schema's own spelling; 422 on a field or value that the shop does not have."""
    allowed = recommender.allowed_values()
    found: dict[str, list[str]] = {}
    for field, values in std.items():
        place = ["body", "filters", "std", field]
        if field not in allowed:
            raise HTTPException(422, [{"loc": place, "msg": f"no such field; there are {sorted(allowed)}"}])
        unknown = [value for value in values if normalise(value) not in allowed[field]]
        if unknown:
            raise HTTPException(422, [{"loc": place, "msg": f"{unknown[0]!r} is no value of {field}"}])
        found[field] = [allowed[field][normalise(value)] for value in values]
    return found


@router.get("/items/{product_id}/similar")
async def similar(
    product_id: ProductId, service: ServiceDep, k: Annotated[int, Query(ge=1, le=100)] = 20
) -> list[NeighbourBody]:
    """The items most like one, by cosine of their vectors."""
    _, recommender = service.parts()
    try:
        found = await service.run(lambda: recommender.similar(product_id, k))
    except LookupError as error:
        raise HTTPException(404, f"no product {product_id!r} in the live release") from error
    return [NeighbourBody(**vars(neighbour)) for neighbour in found]
