"""Tokens that say for whom a page speaks: made, and taken for nobody else and no longer."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from client import sign_shopper
from settings import ServiceSettings
from shopper_token import sign, why_not

SECRET = "0123456789abcdef" * 2


def test_a_token_is_what_openssl_makes_of_the_same_words():
    """printf '1800000000.고객-1' | openssl dgst -sha256 -hmac 0123456789abcdef0123456789abcdef"""
    expires = datetime.fromtimestamp(1_800_000_000, UTC)
    by_openssl = "c2b0a73c647995ac32ed34ec089e0a46b86bb3b63730bb016db629f6def2ec9d"
    assert sign_shopper(SECRET, "고객-1", expires) == f"1800000000.{by_openssl}"


def test_it_is_good_for_its_shopper_until_it_expires():
    token = sign(SECRET, "u1", 1000)
    assert why_not(SECRET, token, "u1", 999.9) == ""
    assert "expired" in why_not(SECRET, token, "u1", 1000.0)


@given(st.text(max_size=80))
def test_nothing_else_is_a_token(text):
    assert "not made for this user_id" in why_not(SECRET, text, "u1", 0.0)


@pytest.mark.parametrize(
    "token",
    [
        sign("f" * 32, "u1", 1000),
        sign(SECRET, "u2", 1000),
        sign(SECRET, "u1", 1000).replace("1000.", "9000."),
        sign(SECRET, "u1", 1000).replace("1000.", "٩٠٠٠."),
        sign(SECRET, "u1", 1000)[:-1],
        sign(SECRET, "0.u1", 100).replace("100.", "1000."),
    ],
)
def test_what_is_changed_or_made_for_others_is_none(token):
    assert "not made for this user_id" in why_not(SECRET, token, "u1", 0.0)


def test_a_time_without_a_zone_is_refused():
    with pytest.raises(ValueError, match="no time zone"):
        sign_shopper(SECRET, "u1", datetime(2026, 6, 30))
    assert sign_shopper(SECRET, "u1", datetime.now(UTC) + timedelta(hours=1))


def test_a_secret_that_can_be_guessed_is_refused_and_none_is_shown():
    with pytest.raises(ValidationError, match="give it 32 at least"):
        ServiceSettings(shopper_secret="password", _env_file=None)
    assert SECRET not in repr(ServiceSettings(shopper_secret=SECRET, _env_file=None))
    assert ServiceSettings(_env_file=None).shopper_secret.get_secret_value() == ""
