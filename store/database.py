"""The store: one PostgreSQL that holds everything, and the objects that speak SQL to it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import psycopg
from pgvector.psycopg import register_vector
from psycopg import Connection
from psycopg.conninfo import conninfo_to_dict
from psycopg_pool import ConnectionPool

from catalog import FeatureSchema
from settings import Settings, UserError
from store import embedded
from store.aliases import Aliases
from store.cache import Cache
from store.events import Events
from store.experiments import Experiments
from store.impressions import Impressions
from store.keys import Keys
from store.products import Products
from store.quarantine import Quarantine
from store.releases import Releases
from store.rules import Rules
from store.schema import read_schema, write_schema
from store.sessions import Sessions
from store.tombstones import Tombstones
from store.users import Users
from store.vectors import Vectors

if TYPE_CHECKING:
    from store.imports import ImportSession

MIGRATIONS = Path(__file__).parent / "migrations"
MIGRATION_LOCK = 0x5354_0001  # key of the advisory lock that lets one process migrate at a time
# Earlier ones corrupt HNSW indexes or fail around vacuum (fixed in 0.8.3 and 0.8.4).
MIN_PGVECTOR = (0, 8, 4)
CONNECT_TIMEOUT = 5  # seconds
MAX_CONNECTIONS = 10
# A pool's attempts come ever more seldom; after so long it gives up, and the next request starts anew.
RECONNECT_SECONDS = 2


class Store:
    """Use `with Store.open(settings) as store`. Safe to share between threads; each process opens its own."""

    def __init__(self, url: str, server: embedded.EmbeddedServer | None, statement_seconds: float | None) -> None:
        self.url = url
        self._server = server
        # Autocommit: a statement alone is one round trip; what belongs together is in `connection.transaction()`.
        self.pool: ConnectionPool[Connection[Any]] = ConnectionPool(
            url,
            min_size=1,
            max_size=MAX_CONNECTIONS,
            timeout=min(CONNECT_TIMEOUT, (statement_seconds or math.inf) / 2),  # waiting for a connection
            reconnect_timeout=RECONNECT_SECONDS,
            kwargs={"autocommit": True, "connect_timeout": CONNECT_TIMEOUT},
            configure=partial(_configure, statement_seconds=statement_seconds),
            open=True,
        )
        self.products = Products(self.pool)
        self.users = Users(self.pool)
        self.sessions = Sessions(self.pool)
        self.events = Events(self.pool)
        self.quarantine = Quarantine(self.pool)
        self.cache = Cache(self.pool)
        self.vectors = Vectors(self.pool)
        self.releases = Releases(self.pool)
        self.aliases = Aliases(self.pool)
        self.rules = Rules(self.pool)
        self.impressions = Impressions(self.pool)
        self.experiments = Experiments(self.pool)
        self.keys = Keys(self.pool)
        self.tombstones = Tombstones(self.pool)

    @classmethod
    def open(cls, settings: Settings, statement_seconds: float | None = None) -> Store:
        """Connect to DATABASE_URL, or start the embedded PostgreSQL in DATA_DIR, and bring the tables up to date.

        `statement_seconds` bounds every statement: a service that answers people must not wait for ever.

        Raises UserError when that server cannot be reached, has no suitable pgvector or holds foreign tables.
        """
        server = None if settings.database_url else embedded.start(settings.data_dir)
        url = server.url if server else settings.database_url
        try:
            with _connect(url) as connection:
                migrate(connection)
            return cls(url, server, statement_seconds)
        except BaseException:
            if server:
                server.stop()
            raise

    def close(self) -> None:
        """Close the connections and stop the embedded server if this process started it."""
        self.pool.close()
        if self._server:
            self._server.stop()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def importing(self, source: str) -> Iterator[ImportSession]:
        """One import: all or nothing. `source` names it in the quarantine and as the origin of features."""
        from store import imports  # with polars, for which no server's start should wait

        with imports.importing(self.pool, source) as session:
            yield session

    def schema(self) -> FeatureSchema:
        """The shop's feature schema. Raises UserError when there is none yet."""
        with self.pool.connection() as connection:
            schema = read_schema(connection)
        if schema is None:
            raise UserError(
                "the shop has no feature schema yet; import its products, perhaps with a schema.json beside them (docs/data.md)"
            )
        return schema

    def put_schema(self, schema: FeatureSchema) -> None:
        """Replace the shop's feature schema."""
        with self.pool.connection() as connection:
            write_schema(connection, schema)


def migrate(connection: Connection[Any], folder: Path = MIGRATIONS) -> None:
    """Check pgvector and apply the migrations in `folder` that are not applied yet, in order of name, all or none.

    Raises UserError for a pgvector that will not do, and for tables that these files did not make.
    """
    files = {path.name: path.read_bytes() for path in sorted(folder.glob("*.sql"))}
    with connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(%s)", (MIGRATION_LOCK,))
        _require_pgvector(connection)
        connection.execute(
            "CREATE TABLE IF NOT EXISTS migrations ("
            "name text PRIMARY KEY, sha256 text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())"
        )
        applied = dict(connection.execute("SELECT name, sha256 FROM migrations").fetchall())
        for name, checksum in applied.items():
            if name not in files:
                raise UserError(
                    f"the database was made by a newer version of this program (migration {name} is not known here);"
                    " update the program or use another database"
                )
            if hashlib.sha256(files[name]).hexdigest() != checksum:
                raise UserError(
                    f"migration {name} was changed after it was applied; restore the file and put the change into a"
                    " new one"
                )
        for name, content in files.items():
            if name not in applied:
                connection.execute(content)
                connection.execute(
                    "INSERT INTO migrations (name, sha256) VALUES (%s, %s)", (name, hashlib.sha256(content).hexdigest())
                )


def _require_pgvector(connection: Connection[Any]) -> None:
    wanted = ".".join(map(str, MIN_PGVECTOR))
    query = "SELECT extversion FROM pg_extension WHERE extname = 'vector'"
    row = connection.execute(query).fetchone()
    if row is None:
        try:
            with connection.transaction():
                connection.execute("CREATE EXTENSION vector")
        except psycopg.Error as error:
            reason = error.diag.message_primary or type(error).__name__
            raise UserError(
                f"the database has no pgvector ({reason}); install pgvector {wanted} or newer on the server and run"
                " CREATE EXTENSION vector as its administrator"
            ) from error
        row = connection.execute(query).fetchone()
    assert row is not None
    if tuple(int(part) for part in row[0].split(".")) < MIN_PGVECTOR:
        raise UserError(
            f"the database has pgvector {row[0]}, which has faults in its HNSW index; install {wanted} or newer on the"
            " server and run ALTER EXTENSION vector UPDATE as its administrator"
        )


def _connect(url: str) -> Connection[Any]:
    """A first connection. Raises UserError with host and reason, never the password."""
    try:
        parts = conninfo_to_dict(url)
    except psycopg.ProgrammingError:
        # The parser's message may quote the whole address, password included.
        raise UserError(
            "DATABASE_URL is not a PostgreSQL address; expected postgresql://user:password@host:5432/database"
        ) from None
    try:
        return psycopg.connect(url, autocommit=True, connect_timeout=CONNECT_TIMEOUT)
    except psycopg.Error as error:
        reason = " ".join(str(error).split())
        password = str(parts.get("password") or "")
        if password:
            reason = reason.replace(password, "***")
        place = f"{parts.get('host') or 'the local socket'}:{parts.get('port') or 5432}"
        raise UserError(f"cannot connect to PostgreSQL at {place}: {reason}; check DATABASE_URL") from None


def _configure(connection: Connection[Any], statement_seconds: float | None) -> None:
    register_vector(connection)
    connection.execute("SET TIME ZONE 'UTC'")
    connection.execute("SET jit = off")  # compiling costs more than these queries take
    if statement_seconds is not None:
        connection.execute("SELECT set_config('statement_timeout', %s, false)", (f"{int(statement_seconds * 1000)}ms",))
