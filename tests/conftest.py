"""One real PostgreSQL for the whole run; an empty database of its own for every test that asks for a store."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import psycopg
import pytest
import torch
from psycopg.conninfo import conninfo_to_dict

import build_index
import extract_features
import train_reranker
import train_simcse
import train_user
from datasets import sample_shop
from settings import Settings, run_script
from store import Store, embedded
from tests.serving import environment_of, serving
from tests.tiny import tiny_text_encoder

TEMPLATE = "empty_store"
TINY_SHOP: dict[str, Any] = {"seed": 1, "products": 200, "shoppers": 120, "events": 4000, "days": 40}

# How long an example takes says how busy the machine is, nothing about the code.
hypothesis.settings.register_profile("no-deadline", deadline=None)
hypothesis.settings.load_profile("no-deadline")
# Tensors this small gain nothing from threads, and on a busy machine threads only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def server() -> Iterator[embedded.EmbeddedServer]:
    """The embedded server, without the waits for the disk that only a power failure would reward."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)  # as root, the server runs as another user, who must get in
        running = embedded.start(
            Path(folder), fsync="off", synchronous_commit="off", full_page_writes="off", shared_buffers="128MB"
        )
        with psycopg.connect(running.url, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {TEMPLATE}")
        Store.open(_settings(_database_url(running, TEMPLATE))).close()
        yield running
        running.stop()


NewDatabase = Callable[[str], AbstractContextManager[str]]


@pytest.fixture(scope="session")
def new_database(server: embedded.EmbeddedServer) -> NewDatabase:
    """Gives the address of a new database, a copy of the named one, for the length of a `with` block."""
    numbers = count()

    @contextmanager
    def create(template: str) -> Iterator[str]:
        name = f"test_{next(numbers)}"
        with psycopg.connect(server.url, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
            yield _database_url(server, name)
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")

    return create


NewShop = Callable[[], AbstractContextManager[Settings]]


@pytest.fixture(scope="session")
def new_shop(new_database: NewDatabase) -> Iterator[NewShop]:
    """Gives a copy of a small trained, live shop for the length of a `with` block. Trained once, by the scripts themselves."""
    with tempfile.TemporaryDirectory() as name, new_database(TEMPLATE) as url:
        folder = Path(name)
        os.chmod(folder, 0o755)
        tiny_text_encoder(folder / "text")
        common: dict[str, Any] = {
            "database_url": url, "data_dir": folder / "data", "models_dir": folder / "models",
            "text_encoder": str(folder / "text"), "_env_file": None,
        }  # fmt: skip
        settings = Settings(**common)
        made = sample_shop.generate(**TINY_SHOP)
        with Store.open(settings) as store, store.importing("sample") as batch:
            batch.schema(made.schema)
            batch.products(made.products)
            batch.users(made.users)
            batch.events(made.events)
        extract_features.main(extract_features.ExtractOptions(**common))
        train_simcse.main(train_simcse.SimcseOptions(**common, epochs=4, batch_size=64))
        # So few events hold next to no request without a past: what context and body alone say is then learned of forgotten ones.
        # Without the adapter, which test_new_goods.py has: with it the reranker betters nothing in so small a shop, and is off.
        train_user.main(
            train_user.UserOptions(
                **common, epochs=6, batch_size=128, learning_rate=3e-3, history=10, forget=0.3, adapter=False
            )
        )
        train_reranker.main(train_reranker.RerankerOptions(**common, epochs=2))
        build_index.main(build_index.IndexOptions(**common))

        @contextmanager
        def copy() -> Iterator[Settings]:
            template = str(conninfo_to_dict(url)["dbname"])
            with tempfile.TemporaryDirectory() as copied, new_database(template) as database_url:
                models = shutil.copytree(folder / "models", Path(copied) / "models")
                yield settings.model_copy(update={"database_url": database_url, "models_dir": models})

        yield copy


@pytest.fixture(scope="module")
def shop(new_shop: NewShop) -> Iterator[Settings]:
    """A trained, live shop that the tests of a module share: its settings."""
    with new_shop() as settings:
        yield settings


@pytest.fixture(scope="module")
def client(shop: Settings) -> Iterator[httpx.Client]:
    """A client of a server of that shop."""
    with serving(environment_of(shop)) as (_, client):
        yield client


@pytest.fixture
def exit_code(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str | int | None]:
    """Runs a script in this process: its options, its main function, and the words of its command line."""

    def run(options: type[Settings], main: Callable[[Any], None], *words: str) -> str | int | None:
        monkeypatch.setattr(sys, "argv", list(words))
        try:
            run_script(options, main)
        except SystemExit as stopped:
            return stopped.code
        return 0

    return run


@pytest.fixture
def database_url(new_database: NewDatabase) -> Iterator[str]:
    """A database with the tables and no rows."""
    with new_database(TEMPLATE) as url:
        yield url


@pytest.fixture
def settings(database_url: str) -> Settings:
    return _settings(database_url)


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    """An empty store in a database of its own."""
    with Store.open(settings) as opened:
        yield opened


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """A DATA_DIR that the server's user can enter (pytest's own temporary directories are closed to it under root)."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def _settings(database_url: str) -> Settings:
    return Settings(database_url=database_url, _env_file=None)


def _database_url(server: embedded.EmbeddedServer, name: str) -> str:
    return server.url.replace("/postgres?", f"/{name}?")
