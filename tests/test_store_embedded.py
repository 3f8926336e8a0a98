"""The embedded PostgreSQL outlives nothing and loses nothing."""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import psycopg
import pytest
import yaml

from catalog import RawProduct
from settings import Settings, UserError
from store import Store, embedded

ROOT = Path(__file__).parent.parent
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs the death signal of Linux")
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="about running as root")

# A process that opens the store of argv[1], writes product "kept", says so, and waits.
OWNER = """
    import sys
    from pathlib import Path
    from catalog import RawProduct
    from settings import Settings
    from store import Store, embedded
    {before}
    store = Store.open(Settings(database_url="", data_dir=Path(sys.argv[1]), _env_file=None))
    store.products.put([RawProduct(product_id="kept", title="t")])
    print(store._server.pid or 0, flush=True)  # 0: another process owns it
    {after}
"""


def settings(data_dir: Path) -> Settings:
    return Settings(database_url="", data_dir=data_dir, _env_file=None)


@contextlib.contextmanager
def owner(data_dir: Path, before: str = "", after: str = "sys.stdin.read()"):
    """A process with the store open; gives it and the server's pid."""
    code = textwrap.dedent(OWNER).format(before=before, after=after)
    with subprocess.Popen(
        [sys.executable, "-c", code, str(data_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout is not None
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def runs(pid: int) -> bool:
    """Whether it is a live process (one that nobody has buried yet is not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def titles(data_dir: Path) -> list[str]:
    with Store.open(settings(data_dir)) as store:
        return [product.title for batch in store.products.iter_raw() for product in batch]


@linux_only
def test_after_kill_9_of_the_owner_the_row_is_there_and_the_old_server_is_gone(data_dir):
    with owner(data_dir) as (process, pid):
        assert runs(pid)
        process.kill()
        process.wait()
        assert titles(data_dir) == ["t"]
        assert not runs(pid)


@linux_only
def test_a_server_that_outlived_its_owner_is_replaced(data_dir):
    """As on macOS, where a killed owner takes nobody with it."""
    harmless = "embedded.PR_SET_PDEATHSIG = 3  # asks something instead"
    with owner(data_dir, before=harmless) as (process, pid):
        process.kill()
        process.wait()
        assert runs(pid)
        assert titles(data_dir) == ["t"]
        assert not runs(pid)


@linux_only
@pytest.mark.parametrize("end", ["", "store.close()", "raise SystemExit(3)"])
def test_the_server_stops_with_its_owner(data_dir, end):
    with owner(data_dir, after=end) as (process, pid):
        process.wait()
        assert not runs(pid)
    assert not (data_dir / "postgres" / "postmaster.pid").exists()


@linux_only
def test_sigterm_of_the_owner_stops_the_server(data_dir):
    with owner(data_dir) as (process, pid):
        server = os.pidfd_open(pid)
        process.send_signal(signal.SIGTERM)
        process.wait()
        assert select.select([server], [], [], 30)[0]  # readable when the process has ended
        os.close(server)
    assert not (data_dir / "postgres" / "postmaster.pid").exists()


@linux_only
def test_the_server_outlives_the_thread_that_started_it(data_dir):
    code = textwrap.dedent("""
        import sys, threading
        from pathlib import Path
        from settings import Settings
        from store import Store
        opened = []
        settings = Settings(database_url="", data_dir=Path(sys.argv[1]), _env_file=None)
        thread = threading.Thread(target=lambda: opened.append(Store.open(settings)))
        thread.start()
        thread.join()
        with opened[0] as store, store.pool.connection() as connection:
            # A server told to stop would break off this query.
            print(connection.execute("SELECT 'alive' FROM pg_sleep(0.3)").fetchone()[0])
    """)
    done = subprocess.run([sys.executable, "-c", code, str(data_dir)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "alive\n", done.stderr


def test_a_second_process_uses_the_server_of_the_first_and_leaves_it_running(data_dir):
    with Store.open(settings(data_dir)) as first:
        with owner(data_dir, after="store.close()") as (process, _):
            assert process.wait() == 0
        assert first.products.existing(["kept"]) == {"kept"}


def test_the_store_opens_twice_in_one_process(data_dir):
    with Store.open(settings(data_dir)) as first:
        with Store.open(settings(data_dir)) as second:
            second.products.put([RawProduct(product_id="p", title="t")])
        assert first.products.count() == 1


@pytest.mark.parametrize("name", ["with space", "옷 'quoted' \"twice\"", "long" * 40 + "/" + "path" * 40])
def test_any_path_will_do(data_dir, name):
    with Store.open(settings(data_dir / name)) as store:
        store.products.put([RawProduct(product_id="p", title=name)])
    assert titles(data_dir / name) == [name]


def test_nobody_else_can_reach_the_socket(data_dir):
    with Store.open(settings(data_dir / ("long" * 40))) as store:
        sockets = Path(psycopg.conninfo.conninfo_to_dict(store.url)["host"])
        assert len(os.fsencode(sockets)) < 100
        assert sockets.stat().st_mode & 0o077 == 0


def test_a_socket_directory_laid_out_by_somebody_else_is_refused(data_dir, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(data_dir))
    long = data_dir / ("long" * 40)
    with Store.open(settings(long)) as store:
        sockets = Path(psycopg.conninfo.conninfo_to_dict(store.url)["host"])
    assert sockets.parent == data_dir
    sockets.chmod(0o777)
    with pytest.raises(UserError, match="is not ours"):
        Store.open(settings(long))


def test_a_stale_pid_file_that_names_a_stranger_is_no_obstacle(data_dir):
    with Store.open(settings(data_dir)) as store:
        store.products.put([RawProduct(product_id="p", title="t")])
    with subprocess.Popen(["sleep", "600"]) as stranger:
        pid_file = data_dir / "postgres" / "postmaster.pid"
        pid_file.write_text(f"{stranger.pid}\n{data_dir / 'postgres'}\n")
        assert titles(data_dir) == ["t"]
        assert stranger.poll() is None
        stranger.kill()


def test_a_first_start_that_was_broken_off_is_begun_again(data_dir):
    (data_dir / "postgres.new").mkdir()
    (data_dir / "postgres.new" / "PG_VERSION").write_text("18\n")
    assert titles(data_dir) == []


def test_a_directory_of_another_major_version_is_refused(data_dir):
    titles(data_dir)
    (data_dir / "postgres" / "PG_VERSION").write_text("99\n")
    with pytest.raises(UserError, match=r"written by PostgreSQL 99.*DATABASE_URL"):
        Store.open(settings(data_dir))


def test_a_machine_without_the_wheel_is_told_what_to_do(data_dir, monkeypatch):
    monkeypatch.setattr(embedded, "WHEEL", "no_such_wheel")
    with pytest.raises(UserError, match="set DATABASE_URL"):
        Store.open(settings(data_dir))


@pytest.mark.parametrize("body", ["kill -ILL $$", "echo 'terminated by signal 4: Illegal instruction' >&2; exit 1"])
def test_a_processor_that_the_wheel_does_not_fit_is_told_what_to_do(data_dir, monkeypatch, body):
    for name in ("postgres", "initdb"):
        (data_dir / name).write_text(f"#!/bin/sh\n{body}\n")
        (data_dir / name).chmod(0o755)
    monkeypatch.setattr(embedded, "_programs", lambda account: data_dir)
    with pytest.raises(UserError, match="does not run on this processor; set DATABASE_URL"):
        Store.open(settings(data_dir / "data"))


def test_a_server_that_ends_at_once_says_why(data_dir):
    with pytest.raises(UserError, match=r"embedded PostgreSQL failed .*shared_buffers"):
        embedded.start(data_dir, shared_buffers="nonsense")
    assert titles(data_dir) == []  # the failed start left no lock behind


@root_only
def test_root_may_work_where_the_user_of_the_server_may_not_enter(data_dir, monkeypatch):
    """As in a clone under /root: data and programs move, nothing is opened up."""
    monkeypatch.setattr(embedded, "ROOT_HOME", data_dir / "home")
    monkeypatch.setattr(embedded, "_may", lambda account, test, path: False)
    closed = data_dir / "closed"
    closed.mkdir(mode=0o700)
    with Store.open(settings(closed)) as store:
        store.products.put([RawProduct(product_id="p", title="t")])
    assert titles(closed) == ["t"]
    assert closed.stat().st_mode & 0o777 == 0o700
    assert (closed / "postgres").resolve().is_relative_to(data_dir / "home")


@root_only
def test_the_server_does_not_run_as_root(data_dir):
    with Store.open(settings(data_dir)) as store:
        assert Path(f"/proc/{store._server.pid}").stat().st_uid != 0


def test_the_server_keeps_the_memory_that_every_search_takes(data_dir):
    with Store.open(settings(data_dir)) as store, store.pool.connection() as connection:
        connection.execute("CREATE TEMP TABLE told (line text)")
        connection.execute("COPY told FROM PROGRAM 'env'")
        lines = {line for (line,) in connection.execute("SELECT line FROM told")}
    assert {f"{name}={value}" for name, value in embedded.KEPT_MEMORY.items()} <= lines


def test_in_containers_the_server_is_tuned_as_here():
    """A shop's own machine must not be slower than the one that was measured."""
    database = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["db"]
    program, *options = shlex.split(database["command"])
    assert program == "postgres"
    assert dict(option.split("=") for option in options if option != "-c") == embedded.TUNING
    assert embedded.KEPT_MEMORY.items() <= database["environment"].items()
