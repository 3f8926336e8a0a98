"""What can be asked of a product: a small tree of conditions, as people write it in JSON, and whether it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from catalog import FeatureSchema, Identifier, Moment, Number, Price, Value
from vocab import normalise

MAX_DEPTH = 8  # of one tree
MAX_NAMED = 200  # values, products or groups that one condition names

Path = tuple[str | int, ...]  # where something stands in the JSON
Named = Annotated[list[Value], Field(min_length=1, max_length=MAX_NAMED)]
Ids = Annotated[list[Identifier], Field(min_length=1, max_length=MAX_NAMED)]


@dataclass(frozen=True)
class Facts:
    """What conditions and caps look at, of one product."""

    product_id: str
    std: dict[str, list[str]]
    re: dict[str, list[str]]
    price: float | None
    in_stock: bool
    group_id: str | None
    arrived_at: float | None  # epoch seconds
    new: bool = False  # nobody met it yet, as of the last index


class _Node(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class _OfField(_Node):
    any_of: Named | None = None
    none_of: Named | None = None

    @model_validator(mode="after")
    def _says_one_thing(self) -> _OfField:
        if (self.any_of is None) == (self.none_of is None):
            raise ValueError("give any_of or none_of, one of the two")
        return self


class OfStd(_OfField):
    """A closed field has one of the values, or none of them (as where it has no value at all)."""

    std: Identifier


class OfRe(_OfField):
    """The same of an open field; spelling and case do not matter."""

    re: Identifier


class PriceRange(_Node):
    min: Price | None = None
    max: Price | None = None

    @model_validator(mode="after")
    def _is_a_range(self) -> PriceRange:
        if self.min is None and self.max is None:
            raise ValueError("give min, max or both")
        return self


class OfPrice(_Node):
    """Both bounds belong to the range. Never holds where the price is unknown."""

    price: PriceRange


class InStock(_Node):
    in_stock: bool


class ArrivalRange(_Node):
    after: Moment | None = None
    before: Moment | None = None
    within_days: Annotated[Number, Field(gt=0, le=36_500)] | None = None

    @model_validator(mode="after")
    def _is_a_range(self) -> ArrivalRange:
        if self.after is None and self.before is None and self.within_days is None:
            raise ValueError("give after, before, within_days or several of them")
        return self

    def bounds(self, now: float) -> tuple[float | None, float | None]:
        """The first moment within, the first moment past it: epoch seconds."""
        starts = [] if self.after is None else [self.after.timestamp()]
        starts += [] if self.within_days is None else [now - timedelta(days=self.within_days).total_seconds()]
        return max(starts, default=None), None if self.before is None else self.before.timestamp()


class OfArrival(_Node):
    """From `after` on, up to but without `before`, in the last `within_days`. Never holds where the arrival is unknown."""

    arrived: ArrivalRange


class IsNew(_Node):
    """Nobody met it yet, as of the last index."""

    new_goods: bool


class OfProducts(_Node):
    products: Ids


class OfGroups(_Node):
    groups: Ids


class AllOf(_Node):
    all: Annotated[list[Condition], Field(min_length=1, max_length=50)]


class AnyOf(_Node):
    any: Annotated[list[Condition], Field(min_length=1, max_length=50)]


class Not(_Node):
    not_: Condition = Field(alias="not")


_NODES: dict[str, type[_Node]] = {
    "std": OfStd, "re": OfRe, "price": OfPrice, "in_stock": InStock, "arrived": OfArrival, "new_goods": IsNew,
    "products": OfProducts, "groups": OfGroups, "all": AllOf, "any": AnyOf, "not": Not,
}  # fmt: skip


def _node_of(value: Any) -> str | None:
    """By which of its keys a condition is known."""
    if isinstance(value, _Node):
        return next(name for name, node in _NODES.items() if type(value) is node)
    known = [name for name in _NODES if name in value] if isinstance(value, dict) else []
    return known[0] if len(known) == 1 else None


Condition = Annotated[
    Annotated[OfStd, Tag("std")]
    | Annotated[OfRe, Tag("re")]
    | Annotated[OfPrice, Tag("price")]
    | Annotated[InStock, Tag("in_stock")]
    | Annotated[OfArrival, Tag("arrived")]
    | Annotated[IsNew, Tag("new_goods")]
    | Annotated[OfProducts, Tag("products")]
    | Annotated[OfGroups, Tag("groups")]
    | Annotated[AllOf, Tag("all")]
    | Annotated[AnyOf, Tag("any")]
    | Annotated[Not, Tag("not")],
    Discriminator(
        _node_of,
        custom_error_type="condition",
        custom_error_message=f"is no condition: an object with exactly one of {', '.join(_NODES)}",
    ),
]
for _node in (AllOf, AnyOf, Not):
    _node.model_rebuild()


def holds(condition: Condition, product: Facts, now: float) -> bool:
    """`now` is epoch seconds. `store.conditions` says the same in SQL."""
    match condition:
        case OfStd():
            return _meets(condition, product.std.get(condition.std, ()))
        case OfRe():
            spelt = [normalise(value) for value in product.re.get(condition.re, ())]
            return _meets(condition, spelt, normalise)
        case OfPrice(price=price):
            return _within(product.price, price.min, price.max)
        case InStock():
            return product.in_stock == condition.in_stock
        case OfArrival(arrived=arrived):
            start, end = arrived.bounds(now)
            return _within(product.arrived_at, start, None) and (end is None or product.arrived_at < end)  # type: ignore[operator]
        case IsNew():
            return product.new == condition.new_goods
        case OfProducts():
            return product.product_id in condition.products
        case OfGroups():
            return product.group_id in condition.groups
        case AllOf():
            return all(holds(part, product, now) for part in condition.all)
        case AnyOf():
            return any(holds(part, product, now) for part in condition.any)
        case Not():
            return not holds(condition.not_, product, now)


def _meets(condition: _OfField, values: Sequence[str], spell: Callable[[str], str] = str) -> bool:
    named = {spell(value) for value in condition.any_of or condition.none_of or ()}
    return named.isdisjoint(values) == (condition.any_of is None)


def _within(value: float | None, low: float | None, high: float | None) -> bool:
    return value is not None and (low is None or value >= low) and (high is None or value <= high)


def parts(condition: Condition, path: Path = ()) -> Iterator[tuple[Path, Condition]]:
    """The condition and every one inside it, each with where it stands. No tree may be deeper than MAX_DEPTH."""
    yield path, condition
    if isinstance(condition, Not):
        yield from parts(condition.not_, (*path, "not"))
    elif isinstance(condition, (AllOf, AnyOf)):
        name, inner = ("all", condition.all) if isinstance(condition, AllOf) else ("any", condition.any)
        for number, part in enumerate(inner):
            yield from parts(part, (*path, name, number))


def depth(condition: Condition) -> int:
    return 1 + max((sum(isinstance(step, str) for step in path) for path, _ in parts(condition)), default=0)


def spelt(condition: Condition, schema: FeatureSchema, path: Path, unknown: list[tuple[Path, str]]) -> Condition:
    """The condition with STD values in the schema's own spelling. Fields and STD values that the shop does not have are added to
    `unknown`, each with its path."""
    match condition:
        case OfStd():
            return _spelt_std(condition, schema, path, unknown)
        case OfRe() if condition.re in schema.std:
            unknown.append(((*path, "re"), f'{condition.re} is a closed field: write "std" instead of "re"'))
        case OfRe() if condition.re not in schema.re:
            unknown.append(((*path, "re"), f"no such field; there are {sorted(schema.re)}"))
        case Not():
            return Not(not_=spelt(condition.not_, schema, (*path, "not"), unknown))
        case AllOf():
            return AllOf(all=[spelt(c, schema, (*path, "all", n), unknown) for n, c in enumerate(condition.all)])
        case AnyOf():
            return AnyOf(any=[spelt(c, schema, (*path, "any", n), unknown) for n, c in enumerate(condition.any)])
    return condition


def _spelt_std(condition: OfStd, schema: FeatureSchema, path: Path, unknown: list[tuple[Path, str]]) -> OfStd:
    name, field = ("any_of", condition.std) if condition.any_of else ("none_of", condition.std)
    if field not in schema.std:
        open_field = f'{field} is an open field: write "re" instead of "std"'
        unknown.append(
            ((*path, "std"), open_field if field in schema.re else f"no such field; there are {sorted(schema.std)}")
        )
        return condition
    allowed = {normalise(value): value for value in schema.std[field]}
    values = condition.any_of or condition.none_of or []
    unknown += [
        ((*path, name, number), f"{value!r} is no value of {field}")
        for number, value in enumerate(values)
        if normalise(value) not in allowed
    ]
    return condition.model_copy(update={name: [allowed.get(normalise(value), value) for value in values]})


def said(condition: Condition) -> str:
    """In a few words, to name a rule by."""
    match condition:
        case OfStd(std=field) | OfRe(re=field):
            verb = "is" if condition.any_of else "is not"
            return f"{field} {verb} {' or '.join(condition.any_of or condition.none_of or ())}"
        case OfPrice(price=price):
            return "price" + _bounds_said(price.min, price.max)
        case InStock():
            return "in stock" if condition.in_stock else "out of stock"
        case OfArrival(arrived=arrived):
            days = "" if arrived.within_days is None else f" within {arrived.within_days:g} days"
            after, before = (
                None if moment is None else f"{moment.date()}" for moment in (arrived.after, arrived.before)
            )
            return "arrived" + _bounds_said(after, before) + days
        case IsNew():
            return "new goods" if condition.new_goods else "not new goods"
        case OfProducts():
            return f"one of {len(condition.products)} products"
        case OfGroups():
            return f"one of {len(condition.groups)} product groups"
        case AllOf():
            return " and ".join(said(part) for part in condition.all)
        case AnyOf():
            return "(" + " or ".join(said(part) for part in condition.any) + ")"
        case Not():
            return f"not ({said(condition.not_)})"


def _bounds_said(low: object, high: object) -> str:
    return (f" from {low}" if low is not None else "") + (f" to {high}" if high is not None else "")


def moment(at: float) -> datetime:
    return datetime.fromtimestamp(at, UTC)
