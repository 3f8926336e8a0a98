"""Keys of the API: made, listed, revoked.

    python keys.py add --kind admin --note "back office"    # prints the key: now, and never again
    python keys.py add --kind public --note "web shop"      # for pages: what shoppers do, and their lists
    python keys.py list
    python keys.py revoke 1f0c22ab                          # by its id

As long as no key was ever made, the service is open to all who reach it. From the first one on, every request needs one, but for
those that only ask whether the service lives; revoking the last one locks it, and never opens it again. Keys are made here alone,
not over HTTP: whoever steals one cannot make himself more.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Annotated, Literal

from pydantic import Field
from pydantic_settings import CliPositionalArg

from catalog import Text
from settings import Settings, UserError, run_script
from store import Store

Kind = Literal["admin", "public"]
ID_DIGITS = 8


class KeyOptions(Settings):
    """Make, list and revoke the keys of the API."""

    action: CliPositionalArg[Literal["add", "list", "revoke"]] = Field(description="what to do")
    key_id: CliPositionalArg[Text] = Field("", description="revoke: the id of the key, as list shows it")
    kind: Kind | None = Field(None, description="add: admin may do everything; public may be shown in a web page")
    note: Annotated[Text, Field(max_length=200)] = Field("", description="add: who has it and what for")


def new_key(kind: Kind) -> str:
    """256 random bits, with a beginning that people, and scanners for leaked secrets, recognise."""
    return f"styletower_{kind}_{secrets.token_urlsafe(32)}"


def digest_of(key: str) -> bytes:
    """What is stored of a key. SHA-256 is enough, see the migration."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def id_of(digest: bytes) -> str:
    return digest.hex()[:ID_DIGITS]


def add(store: Store, kind: Kind, note: str) -> str:
    """Make a key and store its digest; returns the key."""
    while True:  # two keys in 65,000 share an id
        key = new_key(kind)
        digest = digest_of(key)
        if store.keys.add(id_of(digest), digest, kind, note):
            return key


def main(options: KeyOptions) -> None:
    with Store.open(options) as store:
        if options.action == "add":
            if options.kind is None:
                raise UserError("add needs --kind admin or --kind public")
            print(add(store, options.kind, options.note))
            return
        if options.action == "revoke" and not store.keys.revoke(options.key_id):
            raise UserError(f"no key {options.key_id!r} is in force; keys.py list shows the ids")
        known = store.keys.read()
        for key in known:
            state = f"revoked {key.revoked_at:%Y-%m-%d %H:%M}" if key.revoked_at else "in force"
            print(f"{key.key_id}  {key.kind:6}  made {key.made_at:%Y-%m-%d %H:%M}  {state:24}  {key.note}")
        if not known:
            print("no key was ever made: the service is open to all who reach it")
        elif all(key.revoked_at for key in known):
            print("no key is in force: the service answers nobody until one is added")


if __name__ == "__main__":
    run_script(KeyOptions, main)
