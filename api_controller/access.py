"""Who may ask what, and how often. Each route names exactly one of three levels in its `dependencies`:

    @router.post("/recommend", dependencies=[PUBLIC])

OPEN: anybody, always. PUBLIC: a public key, as a web page holds it, or an admin key. ADMIN: an admin key. As long as no key was
ever made (keys.py) everything is open.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any

import psycopg
from fastapi import Depends, Header, HTTPException, Request, Security
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CollectorRegistry, Counter

import shopper_token
from keys import digest_of, id_of
from store import ApiKey, Store

log = logging.getLogger("styletower")

KEY_SECONDS = 0.5  # between two looks at the keys: so late, at most, a worker learns of a new or a revoked one
MAX_BUCKETS = 10_000  # keys and addresses whose rate is remembered; whoever asked least recently is forgotten first
NO_KEY = "this needs an API key: send it as X-API-Key: KEY, or as Authorization: Bearer KEY"
UNKNOWN_KEY = "this API key is not known, or was revoked"
NO_TOKEN = (
    "with a public API key, a request that names a user_id needs the header X-Shopper-Token, which the shop's own backend makes"
    " for that shopper (client.sign_shopper; docs/api.md#shopper-tokens); for who has not logged in give a session_id instead"
)
NOT_ADMIN = "a public API key may not do this; it needs an admin key"


class Buckets:
    """Token buckets: each name may ask `rate` times a second, and `burst` times at once after a pause."""

    def __init__(
        self, rate: float, burst: int, most: int = MAX_BUCKETS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.rate, self.burst, self.most, self.clock = rate, burst, most, clock
        self.left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens, as of a moment

    def take(self, name: str) -> float:
        """Seconds until `name` may ask again; 0 when it may now, and then a token is spent."""
        now = self.clock()
        tokens, since = self.left.pop(name, (float(self.burst), now))
        tokens = min(float(self.burst), tokens + (now - since) * self.rate)
        allowed = tokens >= 1.0
        self.left[name] = (tokens - allowed, now)
        if len(self.left) > self.most:
            self.left.popitem(last=False)
        return 0.0 if allowed else (1.0 - tokens) / self.rate


class Access:
    """What one worker knows of the keys, and of who can reach it."""

    def __init__(self, registry: CollectorRegistry, rate: float, burst: int, shopper_secret: str = "") -> None:
        self._shopper_secret = shopper_secret
        self.buckets = Buckets(rate, burst) if rate > 0 else None
        self.refused = Counter("styletower_refused", "Requests not let in", ["reason"], registry=registry)
        self._keys: dict[str, ApiKey] | None = None  # in force, by id; None until they could be read
        self._locked = True
        self._reached_at = ""  # an address by which other machines can come
        self._warned = False

    # ------------------------------------------------------------------------------------------------------------- keys
    def refresh(self, store: Store | None) -> None:
        """Look at the keys. While the database is away those known last go on: a list of popular items is answered then too."""
        if store is None:
            return
        try:
            made = store.keys.read()
        except psycopg.Error:
            return
        self._keys, self._locked = {key.key_id: key for key in made if key.revoked_at is None}, bool(made)
        self._warn()

    def admit(self, request: Request, given: str | None, level: str) -> None:
        """Raises 401 without a key in force, 403 for a public key where `level` is "admin", 429 for one that asks too often."""
        if self._keys is None:
            raise HTTPException(
                503, "the API keys cannot be read yet; GET /ready says why", headers={"Retry-After": "2"}
            )
        name = request.client.host if request.client else "unknown"
        if self._locked:
            key = self._known(given)
            if key is None:
                self.refused.labels("unknown key" if given else "no key").inc()
                raise HTTPException(401, UNKNOWN_KEY if given else NO_KEY, headers={"WWW-Authenticate": "Bearer"})
            if level == "admin" and key.kind != "admin":
                self.refused.labels("public key").inc()
                raise HTTPException(403, NOT_ADMIN)
            name = key.key_id
        wait = self.buckets.take(name) if self.buckets else 0.0
        if wait > 0:
            self.refused.labels("too often").inc()
            seconds = math.ceil(wait)
            raise HTTPException(
                429, f"too many requests; ask again in {seconds} s", headers={"Retry-After": str(seconds)}
            )

    def admit_shoppers(self, given: str | None, token: str | None, user_ids: Iterable[str]) -> None:
        """Raises 403 when a public key names a shopper whom the token is not for. Nothing is asked of admin keys, without
        SHOPPER_SECRET, and as long as everything is open."""
        key = self._known(given)
        if not self._shopper_secret or not self._locked or (key is not None and key.kind == "admin"):
            return
        for user_id in set(user_ids):
            reason = shopper_token.why_not(self._shopper_secret, token, user_id, time.time()) if token else ""
            if reason or not token:
                self.refused.labels("shopper token").inc()
                raise HTTPException(403, f"the token in X-Shopper-Token is not taken: {reason}" if token else NO_TOKEN)

    def _known(self, given: str | None) -> ApiKey | None:
        if not given or self._keys is None:
            return None
        digest = digest_of(given)
        # The id is no secret, so it may be looked up; the digest is compared in a time that tells nothing.
        key = self._keys.get(id_of(digest))
        return key if key is not None and hmac.compare_digest(key.digest, digest) else None

    # ---------------------------------------------------------------------------------------------------- who can reach it
    def notice(self, addresses: Sequence[str]) -> None:
        """Addresses at which it listens or was reached, or from which somebody came."""
        if not self._reached_at:
            self._reached_at = next((address for address in addresses if beyond_this_machine(address)), "")
            self._warn()

    def notice_request(self, scope: Mapping[str, Any]) -> None:
        """Both ends of a request: behind a proxy on this machine only the far one is another machine's."""
        ends = [scope.get("server"), scope.get("client")]
        self.notice([end[0] for end in ends if end and end[1] is not None])

    @property
    def warning(self) -> str:
        """What is wrong with being open; empty when nothing is."""
        if self._keys is None or self._locked or not self._reached_at:
            return ""
        return (
            f"other machines reach this service ({self._reached_at}) and no API key was ever made: whoever reaches it can change "
            "the shop; make keys (python keys.py add --kind admin) or listen on 127.0.0.1"
        )

    def _warn(self) -> None:
        if self.warning and not self._warned:
            log.warning("%s", self.warning)
            self._warned = True


@lru_cache(1000)
def beyond_this_machine(address: str) -> bool:
    """An address that other machines may use: any but this machine's own. Names that are no addresses are not judged."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    return not (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def told_to_listen(arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    """The host that uvicorn was started with; the workers that it starts have its command line too."""
    host = environment.get("UVICORN_HOST", "")
    for argument, value in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument == "--host":
            host = value
        elif argument.startswith("--host="):
            host = argument.removeprefix("--host=")
    return host


async def given_key(
    header: Annotated[str | None, Security(APIKeyHeader(name="X-API-Key", auto_error=False))],
    bearer: Annotated[HTTPAuthorizationCredentials | None, Security(HTTPBearer(auto_error=False))],
) -> str | None:
    return header or (bearer.credentials if bearer else None)


GivenKey = Annotated[str | None, Depends(given_key)]
ShopperToken = Annotated[
    str | None, Header(alias="X-Shopper-Token", description="of the shop's backend, where SHOPPER_SECRET asks for one")
]


async def _open() -> None:
    """Nothing to check."""


async def _public(request: Request, key: GivenKey) -> None:
    request.app.state.service.access.admit(request, key, "public")


async def _admin(request: Request, key: GivenKey) -> None:
    request.app.state.service.access.admit(request, key, "admin")


OPEN, PUBLIC, ADMIN = Depends(_open), Depends(_public), Depends(_admin)
