"""Conditions on products (conditions.py) as SQL over the columns of `products`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import orjson
from psycopg import sql

from conditions import (
    AllOf,
    AnyOf,
    Condition,
    InStock,
    IsNew,
    Not,
    OfArrival,
    OfGroups,
    OfPrice,
    OfProducts,
    OfRe,
    OfStd,
    moment,
)
from vocab import normalise

# `vocab.normalise` in the database's words.
SPELT = r"btrim(regexp_replace(lower(normalize(value, NFKC)), '[\s_\-‐‑–—/]+', ' ', 'g'))"


def condition_sql(condition: Condition, parameters: dict[str, Any], now: float) -> sql.Composable:
    """True where the condition holds; false or null elsewhere. What it compares with is added to `parameters`.

    Raises ValueError for `new_goods`: that is in an item's row, not in `products`.
    """

    def given(value: Any) -> sql.Composable:
        name = f"value{len(parameters)}"
        parameters[name] = value
        return sql.Placeholder(name)

    def inner(part: Condition) -> sql.Composable:
        return condition_sql(part, parameters, now)

    match condition:
        case OfStd():
            values = condition.none_of if condition.any_of is None else condition.any_of
            objects = [orjson.dumps({condition.std: [value]}).decode() for value in values or ()]
            has = sql.SQL("std @> ANY({}::jsonb[])").format(given(objects))
            return has if condition.any_of is not None else _not(has)
        case OfRe():
            values = [normalise(value) for value in condition.any_of or condition.none_of or ()]
            has = sql.SQL(
                "EXISTS (SELECT FROM jsonb_array_elements_text(re -> {}::text) AS said(value)"
                " WHERE " + SPELT + " = ANY({}::text[]))"
            ).format(given(condition.re), given(values))
            return has if condition.any_of is not None else _not(has)
        case OfPrice(price=price):
            return _between("price", ((">=", price.min), ("<=", price.max)), given)
        case InStock():
            return sql.SQL("in_stock = {}").format(given(condition.in_stock))
        case OfArrival(arrived=arrived):
            start, end = (None if bound is None else moment(bound) for bound in arrived.bounds(now))
            return _between("arrived_at", ((">=", start), ("<", end)), given)
        case IsNew():
            raise ValueError("new goods are not known to the table of products")
        case OfProducts():
            return sql.SQL("product_id = ANY({}::text[])").format(given(condition.products))
        case OfGroups():
            return sql.SQL("group_id = ANY({}::text[])").format(given(condition.groups))
        case AllOf():
            return _joined(" AND ", [inner(part) for part in condition.all])
        case AnyOf():
            return _joined(" OR ", [inner(part) for part in condition.any])
        case Not():
            return _not(inner(condition.not_))


def _between(column: str, bounds: Iterable[tuple[str, Any]], given: Callable[[Any], sql.Composable]) -> sql.Composable:
    compare = [sql.SQL(f"{column} {sign} {{}}").format(given(bound)) for sign, bound in bounds if bound is not None]
    return _joined(" AND ", compare)


def _not(condition: sql.Composable) -> sql.Composable:
    """True where the condition is false or, for a column without a value, null."""
    return sql.SQL("({}) IS NOT TRUE").format(condition)


def _joined(word: str, conditions: Sequence[sql.Composable]) -> sql.Composable:
    return sql.SQL("({})").format(sql.SQL(word).join(conditions))
