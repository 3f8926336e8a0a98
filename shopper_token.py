"""Signed words of the shop's own backend that a page speaks for a shopper: `<expires, epoch seconds>.<HMAC-SHA256, hex>`.

A public API key is in everybody's hands; with SHOPPER_SECRET, whoever has one may name only the shopper that a token is for.
"""

from __future__ import annotations

import hashlib
import hmac


def sign(secret: str, user_id: str, expires: int) -> str:
    """A token for that shopper, good before `expires` (epoch seconds)."""
    # The number comes first and holds no dot, so no two pairs are signed as one.
    signed = f"{expires}.{user_id}".encode()
    return f"{expires}.{hmac.new(secret.encode(), signed, hashlib.sha256).hexdigest()}"


def why_not(secret: str, token: str, user_id: str, now: float) -> str:
    """What is wrong with a token for that shopper, for people; empty when nothing is. Takes a time that tells nothing of the right
    one."""
    expires, _, _ = token.partition(".")
    number = int(expires) if expires.isascii() and expires.isdigit() and len(expires) <= 12 else 0
    if not hmac.compare_digest(sign(secret, user_id, number).encode(), token.encode()):
        return "it was not made for this user_id with this service's SHOPPER_SECRET"
    return "it has expired; ask the backend for a new one" if now >= number else ""
