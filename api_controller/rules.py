"""Business rules: checking them, new versions, and which one is live."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, HTTPException, Path

from api_controller.access import ADMIN
from api_controller.refusals import CONFLICT, MISSING, invalid, unavailable
from api_controller.schemas import (
    RulesAnswer,
    RulesBody,
    RulesCheckAnswer,
    RulesCheckBody,
    RulesListAnswer,
    RulesLiveBody,
    RulesTurnBody,
    RulesVersionBody,
)
from api_controller.service import ServiceDep
from catalog import Identifier
from conditions import OfGroups, OfProducts, OfRe
from conditions import Path as PathInJson
from rules import DEFAULT, Pin, RuleSet
from settings import UserError
from store import Store, UnreadableRulesError
from vocab import normalise

router = APIRouter(prefix="/rules", tags=["rules"], dependencies=[ADMIN])

MAX_VERSION = 2**31 - 1
Version = Annotated[int, Path(ge=1, le=MAX_VERSION)]


def check(store: Store, rules: RuleSet) -> tuple[RuleSet, list[str]]:
    """The rules in the shop's own spelling, and what in them is open to new values and no product has yet.

    422 that names each field, closed value and product that the shop does not have.
    """
    try:
        schema = store.schema()
    except UserError as error:
        raise unavailable(str(error)) from error
    path: PathInJson = ("body", "rules")
    spelt, unknown = rules.spelt(schema, path)
    products: list[tuple[PathInJson, str]] = [
        ((*path, number, "product_id"), rule.product_id) for number, rule in rules.of(Pin)
    ]
    groups: list[str] = []
    words: dict[str, dict[str, str]] = {}
    for place, part in rules.conditions(path):
        if isinstance(part, OfProducts):
            products += [((*place, "products", number), product) for number, product in enumerate(part.products)]
        elif isinstance(part, OfGroups):
            groups += part.groups
        elif isinstance(part, OfRe):
            named = part.any_of or part.none_of or ()
            words.setdefault(part.re, {}).update({normalise(value): value for value in named})
    there = store.products.existing({product for _, product in products}) if products else set()
    unknown += [(place, f"there is no product {product!r}") for place, product in products if product not in there]
    if unknown:
        raise invalid(*unknown)
    warnings = []
    for field, values in words.items():
        has = store.products.open_values(field, values)
        warnings += [f"no product has {value!r} in {field} yet" for key, value in values.items() if key not in has]
    grouped = store.products.groups(groups) if groups else set()
    warnings += [f"no product is of the group {group!r} yet" for group in dict.fromkeys(groups) if group not in grouped]
    return spelt, warnings


@router.get("")
async def versions(service: ServiceDep, name: Identifier | None = None) -> RulesListAnswer:
    """What rules there are, of one name or of all, and which were live when."""
    store, _ = service.parts()
    found, history = await service.run(lambda: (store.rules.versions(name), store.rules.history(name)))
    return RulesListAnswer(
        versions=[RulesVersionBody(**vars(version)) for version in found],
        history=[RulesTurnBody(**vars(turn)) for turn in history],
    )


@router.get("/{version}", responses=MISSING)
async def version(version: Version, service: ServiceDep, name: Identifier = DEFAULT) -> RulesAnswer:
    store, _ = service.parts()
    found = await service.run(lambda: store.rules.get(name, version))
    if found is None:
        raise HTTPException(404, f"there is no version {version} of the rules {name!r}")
    version_found, rules, stored = found
    return RulesAnswer(**vars(version_found), rules=rules, unreadable=stored if version_found.problem else None)


@router.put("")
async def put(body: RulesBody, service: ServiceDep) -> RulesAnswer:
    """A new version, live at once unless told otherwise: other workers go by it within a second."""
    store, _ = service.parts()

    def work() -> RulesAnswer:
        rules, warnings = check(store, body.rules)
        made = store.rules.put(body.name, rules, body.who, body.note, body.live)
        return RulesAnswer(**vars(made), rules=rules, warnings=warnings)

    return await service.run(work)


@router.post("/check")
async def only_check(body: RulesCheckBody, service: ServiceDep) -> RulesCheckAnswer:
    """Whether rules would be taken; nothing is stored."""
    store, _ = service.parts()
    rules, warnings = await service.run(lambda: check(store, body.rules))
    return RulesCheckAnswer(rules=[rule.title() for rule in rules.root], warnings=warnings)


@router.post("/{version}/live", responses=MISSING | CONFLICT)
async def make_live(version: Version, body: RulesLiveBody, service: ServiceDep) -> RulesVersionBody:
    """Make any version the live one, an earlier one too: a rollback."""
    store, _ = service.parts()
    try:
        made = await service.run(lambda: store.rules.make_live(body.name, version, body.who, body.note))
    except LookupError as error:
        raise HTTPException(404, f"there is no version {version} of the rules {body.name!r}") from error
    except UnreadableRulesError as error:
        raise HTTPException(
            409,
            f"version {version} of the rules {body.name!r} cannot be read: {error}; PUT /rules with what it should be",
        ) from error
    return RulesVersionBody(**vars(made))
