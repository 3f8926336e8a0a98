"""Ranked lists: for a shopper, and like an item."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import orjson
from fastapi import APIRouter, HTTPException, Query, Request, Response

import recommender as pipeline
from api_controller.access import PUBLIC, GivenKey, ShopperToken
from api_controller.experiments import Assignment, assign, log_list
from api_controller.refusals import MISSING, invalid
from api_controller.rules import check
from api_controller.schemas import NeighbourBody, ProductId, RecommendAnswer, RecommendBody
from api_controller.service import Service, ServiceDep
from catalog import session_key
from conditions import ArrivalRange, OfArrival
from list_kinds import RequestError, UnknownProductError
from rules import DEFAULT, NamedRules
from store import Filters, Store
from vocab import normalise

router = APIRouter(tags=["lists"])

TRIED = "tried"  # the name of rules that came with the request


@router.post("/recommend", dependencies=[PUBLIC], response_model=RecommendAnswer, responses=MISSING)
async def recommend(
    body: RecommendBody, service: ServiceDep, asked: Request, key: GivenKey, token: ShopperToken = None
) -> Response:
    """A ranked list for a shopper, a context, a body, or nobody at all; or of another `kind`: like a product, for a cart, what is
    trending, what to buy again. Rules to try need an admin key."""
    if body.rules is not None:  # they take the place of the shop's own, and may ask for a hundred times the work
        service.access.admit(asked, key, "admin")
    if body.user_id is not None:
        service.access.admit_shoppers(key, token, [body.user_id])
    store, recommender = service.parts()
    shopper = body.user_id or (None if body.session_id is None else session_key(body.session_id))

    def work() -> tuple[Assignment, pipeline.Answer]:
        assignment = assign(service, shopper, body)
        rules, unknown = _rules(store, recommender, body, assignment.rules)
        answer = recommender.recommend(
            pipeline.Request(
                shopper,
                body.history,
                body.context,
                body.profile,
                _filters(recommender, body),
                body.exclude,
                body.exclude_history,
                body.k,
                rules=rules,
                kind=body.kind,
                product_id=body.product_id,
                cart=body.cart,
                explain=body.explain,
                release=assignment.release,
            )
        )
        return assignment, replace(answer, warnings=[*answer.warnings, *unknown])

    try:
        assignment, answer = await service.run(work)
    except RequestError as error:
        raise invalid((["body", error.field], str(error))) from error
    except UnknownProductError as error:
        raise HTTPException(404, f"no product {body.product_id!r} in the live release") from error
    service.lists.labels(answer.kind).inc()
    list_id, arm = log_list(service, shopper, assignment, body, answer)
    for stage, milliseconds in answer.milliseconds.items():
        service.seconds.labels(stage).observe(milliseconds / 1000)
    if body.context:
        service.count_contexts(recommender)
    if answer.degraded:
        service.degraded.inc()
    _count_rules(service, answer.rules)
    counted = {
        "list_id": list_id,
        "experiment": assignment.experiment.name if assignment.experiment and arm else None,
        "arm": arm.name if arm else None,
    }
    # As it is: its fields are those of a RecommendAnswer, and models of each item and reason would only copy them. `kind` is first
    # for people who read it.
    return Response(orjson.dumps({"kind": answer.kind, **counted, **vars(answer)}), media_type="application/json")


def _filters(recommender: pipeline.Recommender, body: RecommendBody) -> Filters:
    given = body.filters
    within = given.arrived_within_days
    return Filters(
        _known_values(recommender, "std", given.std),
        given.min_price,
        given.max_price,
        given.in_stock,
        _known_values(recommender, "std_none", given.std_none),
        given.arrived_after,
        given.arrived_before,
        () if within is None else [OfArrival(arrived=ArrivalRange(within_days=within))],
    )


def _rules(
    store: Store, recommender: pipeline.Recommender, body: RecommendBody, of_arm: str | None
) -> tuple[NamedRules | None, list[str]]:
    """The rules to try, or the live ones, an experiment's before others; and what in them no product has. 422 for a name that has
    none."""
    if body.rules is not None:
        rules, unknown = check(store, body.rules)
        return NamedRules(TRIED, None, rules), unknown
    if of_arm is not None and (named := recommender.rules(of_arm)) is not None:
        return named, []
    named = recommender.rules(body.rule_set)
    if named is None and body.rule_set != DEFAULT:
        raise invalid((["body", "rule_set"], f"no rules of the name {body.rule_set!r} are live"))
    return named, []


def _count_rules(service: Service, used: pipeline.RulesUsed | None) -> None:
    """Add to the metrics what rules did, or that they could not be read. Those that are only tried do not count."""
    if used is None or used.version is None:
        return
    service.count_effects(used.effects)
    if used.problem:
        service.unread_rules.labels(used.name).inc()


def _known_values(recommender: pipeline.Recommender, part: str, std: dict[str, list[str]]) -> dict[str, list[str]]:
    """A part of the filter in the schema's own spelling; 422 on a field or value that the shop does not have."""
    if not std:
        return {}
    allowed = recommender.allowed_values(std)
    found: dict[str, list[str]] = {}
    for field, values in std.items():
        place = ["body", "filters", part, field]
        if field not in allowed:
            raise invalid((place, f"no such field; there are {sorted(allowed)}"))
        unknown = [value for value in values if normalise(value) not in allowed[field]]
        if unknown:
            raise invalid((place, f"{unknown[0]!r} is no value of {field}"))
        found[field] = [allowed[field][normalise(value)] for value in values]
    return found


@router.get("/items/{product_id}/similar", dependencies=[PUBLIC], responses=MISSING)
async def similar(
    product_id: ProductId, service: ServiceDep, k: Annotated[int, Query(ge=1, le=100)] = 20
) -> list[NeighbourBody]:
    """The items most like one, by cosine of their vectors."""
    _, recommender = service.parts()
    try:
        answer = await service.run(lambda: recommender.similar(product_id, k))
    except UnknownProductError as error:
        raise HTTPException(404, f"no product {product_id!r} in the live release") from error
    _count_rules(service, answer.rules)
    return [NeighbourBody.model_validate(item, from_attributes=True) for item in answer.items]
