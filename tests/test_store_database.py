"""Opening a store: what is refused, and migrations."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import psycopg
import pytest

from settings import Settings, UserError
from store import Store, database
from store.database import migrate


@pytest.fixture
def bare_url(new_database) -> Iterator[str]:
    """A database with nothing in it."""
    with new_database("template1") as url:
        yield url


@pytest.fixture
def bare(bare_url) -> Iterator[psycopg.Connection]:
    with psycopg.connect(bare_url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def folder(tmp_path):
    """Two migrations; the second needs the first."""
    (tmp_path / "0001_a.sql").write_text("CREATE TABLE a (n integer); INSERT INTO a VALUES (1);")
    (tmp_path / "0002_b.sql").write_text("ALTER TABLE a ADD COLUMN m integer DEFAULT 5;")
    return tmp_path


def open_url(url: str) -> Store:
    return Store.open(Settings(database_url=url, _env_file=None))


def rows(connection, query):
    return connection.execute(query).fetchall()


def test_migrations_are_applied_in_order_and_once(bare, folder):
    migrate(bare, folder)
    migrate(bare, folder)
    assert rows(bare, "SELECT n, m FROM a") == [(1, 5)]


def test_a_new_migration_is_added_to_the_old_ones(bare, folder):
    migrate(bare, folder)
    (folder / "0003_c.sql").write_text("UPDATE a SET m = 7;")
    migrate(bare, folder)
    assert rows(bare, "SELECT n, m FROM a") == [(1, 7)]


def test_a_changed_migration_is_refused(bare, folder):
    migrate(bare, folder)
    (folder / "0001_a.sql").write_text("CREATE TABLE a (n bigint);")
    with pytest.raises(UserError, match=r"0001_a\.sql was changed after it was applied"):
        migrate(bare, folder)


def test_a_database_of_a_newer_program_is_refused(bare, folder):
    migrate(bare, folder)
    (folder / "0002_b.sql").unlink()
    with pytest.raises(UserError, match=r"newer version.*0002_b\.sql"):
        migrate(bare, folder)


def test_a_migration_that_fails_takes_all_of_them_back(bare, folder):
    (folder / "0003_c.sql").write_text("SELECT 1 / 0;")
    with pytest.raises(psycopg.errors.DivisionByZero):
        migrate(bare, folder)
    assert rows(bare, "SELECT to_regclass('a'), to_regclass('migrations')") == [(None, None)]


def test_two_processes_that_open_an_empty_database_at_once_both_get_it(bare_url):
    failures = []

    def open_and_close():
        try:
            open_url(bare_url).close()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=open_and_close) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_another_process_can_connect_with_the_url(store):
    with psycopg.connect(store.url) as connection:
        assert rows(connection, "SELECT count(*) FROM products") == [(0,)]


def test_the_pool_reads_and_writes_vectors_and_says_times_in_utc(store):
    with store.pool.connection() as connection:
        vector, zone = connection.execute("SELECT '[1,2]'::vector, current_setting('TimeZone')").fetchone()
    assert vector.to_list() == [1, 2]
    assert zone == "UTC"


def test_no_query_is_compiled_whatever_the_server_does_by_itself(store):
    with psycopg.connect(store.url) as theirs, store.pool.connection() as ours:
        assert [connection.execute("SHOW jit").fetchone()[0] for connection in (theirs, ours)] == ["on", "off"]


def test_a_statement_may_be_bounded_in_time(settings):
    """Half of that is the time to wait for a connection, which a busy machine may need some of."""
    with (
        Store.open(settings, statement_seconds=2.0) as store,
        store.pool.connection() as connection,
        pytest.raises(psycopg.errors.QueryCanceled),
    ):
        connection.execute("SELECT pg_sleep(60)")


def test_a_server_that_is_not_there_is_named_without_the_password():
    with pytest.raises(UserError, match=r"127\.0\.0\.1:1: .*refused") as caught:
        open_url("postgresql://shop:s3cret@127.0.0.1:1/shop")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["postgres//shop:s3cret@db/shop", "postgresql://shop:s3cret@db:port:1/shop", "host=db s3cret", "s3cret"]
)
def test_an_address_that_is_none_is_refused_without_repeating_it(url):
    with pytest.raises(UserError, match=r"DATABASE_URL") as caught:
        open_url(url)
    assert "s3cret" not in str(caught.value)


def test_an_old_pgvector_is_refused(settings, monkeypatch):
    monkeypatch.setattr(database, "MIN_PGVECTOR", (99, 0, 0))
    with pytest.raises(UserError, match=r"pgvector \d.*install 99\.0\.0 or newer.*ALTER EXTENSION vector UPDATE"):
        Store.open(settings)


def test_a_database_without_pgvector_that_we_may_not_add_is_refused(bare, bare_url):
    role = bare.info.dbname + "_guest"
    bare.execute(f"CREATE ROLE {role} LOGIN")
    with pytest.raises(UserError, match=r"has no pgvector .*CREATE EXTENSION vector"):
        open_url(bare_url.replace("//postgres@", f"//{role}@"))
    bare.execute(f"DROP ROLE {role}")
