"""Every knob, typed, from the environment, a `.env` file or the command line.

A script declares its options as a subclass of `Settings` and hands them to `run_script`: the same names then work as
`--epochs 5`, as `EPOCHS=5` and as a line in `.env`. Nonsense stops the program before any work is done.
"""

from __future__ import annotations

import inspect
import os
import signal
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

from pydantic import AfterValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, CliApp, CliSettingsSource, SettingsConfigDict, SettingsError

LEAST_SECRET = 32  # characters: who holds one token can try secrets at leisure


WARNING = "warning: "  # what a script's lines begin with that a person should see; retrain.py passes them on


class UserError(Exception):
    """Something the person at the keyboard can mend. The message says what was wrong, where, and what to do."""

    exit_code = 2  # of a script that ends with it


class Settings(BaseSettings):
    """What every part of the system shares."""

    model_config = SettingsConfigDict(
        env_file=".env",
        env_file_encoding="utf-8",
        env_ignore_empty=True,
        extra="ignore",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    database_url: str = Field("", description="PostgreSQL to use; empty starts the embedded one in DATA_DIR")
    data_dir: Path = Field(Path(".data"), description="embedded database, text encoder and caches")
    models_dir: Path = Field(Path("saved_models"), description="where releases are saved")
    text_encoder: str = Field(
        "", description="HuggingFace name or path; empty is the multilingual DistilBERT prepared from a package"
    )
    text_encoder_layers: int = Field(
        6,
        ge=6,
        le=12,
        multiple_of=6,
        description="of the prepared one, 6 or 12: all know Korean better, and are half as fast (docs/text_encoders.md)",
    )
    list_category_field: str = Field(
        "category",
        description="the STD field that says what kind of thing a product is: a basket's complements are of others, and of what a "
        "context names it counts most",
    )
    context_words: bool = Field(
        True,
        description="products that have what a context names (a category, a colour, ...) come first in lists for shoppers",
    )
    trending_half_life_days: float = Field(
        3.0, ge=0.05, le=365, description="days after which an event counts half in what is trending"
    )
    event_retention_days: int = Field(
        0,
        ge=0,
        le=36_500,
        description="days that events are kept for (forget.py removes older ones); 0 keeps them for ever",
    )
    seed: int = Field(0, ge=0, description="seed of every random choice")
    event_weights: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = Field(
        {},
        description='what an event of a kind counts, as JSON such as {"cart": 3, "purchase": 5, "skip": 0}; docs/data.md',
    )


def _hard_to_guess(secret: SecretStr) -> SecretStr:
    if 0 < len(secret) < LEAST_SECRET:
        make = "python -c 'import secrets; print(secrets.token_hex())'"
        raise ValueError(f"has {len(secret)} characters; give it {LEAST_SECRET} at least, as {make} prints")
    return secret


class ServiceSettings(Settings):
    """What the service alone reads."""

    impression_share: float = Field(
        1.0, ge=0, le=1, description="share of the lists shown that are logged, by shopper; 0 logs none"
    )
    impression_retention_days: int = Field(
        90, ge=0, le=36_500, description="days after which a logged list is deleted; 0 keeps all"
    )
    session_retention_days: int = Field(
        400,  # no browser keeps a cookie longer without renewing it
        ge=0,
        le=36_500,
        description="days after its last login for which a session is known to be a user's; 0 is for ever",
    )
    rate_limit: float = Field(
        0.0, ge=0, le=1e6, description="requests a second of one key, or of one address without keys; 0 is no limit"
    )
    rate_burst: int = Field(20, ge=1, description="requests at once before RATE_LIMIT holds")
    shopper_secret: Annotated[SecretStr, AfterValidator(_hard_to_guess)] = Field(
        SecretStr(""),
        description="with it, a public key may name only the shopper whom a token of the shop's backend is for; docs/api.md",
    )
    cors_origins: str = Field(
        "",
        pattern=r"^(\*|(https?://[^\s/,*]+)(\s*,\s*https?://[^\s/,*]+)*)?$",
        description="whose pages may call from a browser: https://shop.example, with commas between several; * is everybody's",
    )


Options = TypeVar("Options", bound=Settings)


def run_script(options_type: type[Options], main: Callable[[Options], None]) -> None:
    """Parse the command line into `options_type`, run `main`, and turn what a person can mend into one line.

    Exit codes: 0 done, 2 a bad option or missing input (one line on stderr), 130 interrupted, 141 nobody reads the output any
    more; others where a `UserError` of another kind says so.
    """
    script = Path(sys.argv[0]).name
    options_type.__doc__ = inspect.cleandoc(options_type.__doc__ or "")  # shown by --help as it stands
    try:
        options = CliApp.run(
            options_type,
            cli_args=sys.argv[1:],
            # Intermixed: `script.py hm --seed 1 folder` reads like `script.py hm folder --seed 1`.
            cli_settings_source=CliSettingsSource(
                options_type, cli_exit_on_error=False, parse_args_method=ArgumentParser.parse_intermixed_args
            ),
            cli_exit_on_error=False,
        )
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "options"
        _stop(script, f"{name}: {first['msg']} (got {first.get('input')!r}); see {script} --help")
    except SettingsError as error:
        _stop(script, f"{error}; see {script} --help")
    try:
        main(options)
        sys.stdout.flush()
    except UserError as error:
        _stop(script, str(error), error.exit_code)
    except BrokenPipeError:
        # Whoever reads the output has enough (`| head`). What is left of it would be written, and complained of, at the very end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        sys.exit(130)


def _stop(script: str, message: str, exit_code: int = 2) -> NoReturn:
    print(f"{script}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(exit_code)
