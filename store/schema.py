"""The shop's feature schema, a single row."""

from __future__ import annotations

from typing import Any

from psycopg import Connection

from catalog import FeatureSchema


def read_schema(connection: Connection[Any]) -> FeatureSchema | None:
    row = connection.execute("SELECT schema FROM feature_schema").fetchone()
    return None if row is None else FeatureSchema.model_validate(row[0])


def write_schema(connection: Connection[Any], schema: FeatureSchema) -> None:
    connection.execute(
        "INSERT INTO feature_schema (schema) VALUES (%s) ON CONFLICT (only_row) DO UPDATE SET schema = excluded.schema",
        (schema.model_dump_json(),),
    )


def united(old: FeatureSchema | None, new: FeatureSchema) -> FeatureSchema:
    """`new`, with every field and STD value of `old`, so that products already stored still lie in the schema.

    A field that is STD in one and RE in the other is what `new` says. What was there comes first: importing the same
    schema again changes nothing.
    """
    if old is None:
        return new
    std = {
        name: list(dict.fromkeys([*old.std.get(name, []), *new.std.get(name, [])]))
        for name in dict.fromkeys([*old.std, *new.std])
        if name not in new.re
    }
    re = [name for name in dict.fromkeys([*old.re, *new.re]) if name not in new.std]
    return FeatureSchema(std=std, re=re)
