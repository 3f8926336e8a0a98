"""One real PostgreSQL for the whole run; an empty database of its own for every test that asks for a store."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from pathlib import Path

import hypothesis
import psycopg
import pytest

from settings import Settings
from store import Store, embedded

TEMPLATE = "empty_store"

# How long an example takes says how busy the machine is, nothing about the code.
hypothesis.settings.register_profile("no-deadline", deadline=None)
hypothesis.settings.load_profile("no-deadline")


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
