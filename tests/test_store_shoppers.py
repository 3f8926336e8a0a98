"""Sessions that become users, shoppers who are forgotten, events that grow old, products that change and go."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256

import numpy as np
import psycopg
import pytest
from psycopg import sql

import forget
from catalog import Event, RawProduct, Rejected, User, session_key
from settings import UserError
from store import Impression, ItemRows, PutEvents, SessionTakenError, UserSummary, quarantine, sessions
from store import events as event_store

T0 = datetime(2024, 3, 1, 12, tzinfo=UTC)
PRODUCTS = [RawProduct(product_id=f"p{number}", title="t") for number in range(5)]


@pytest.fixture
def shop(store):
    store.products.put(PRODUCTS)
    return store


def event(item: str = "p1", minutes: int = 0, **rest) -> Event:
    return Event(product_id=item, at=T0 + timedelta(minutes=minutes), **rest)


def showing(list_id: str, user: str) -> Impression:
    return Impression(
        list_id, user, "for_you", "", "release", "default", None, None, None, None, T0, ["p1"], [1.0], [1]
    )  # fmt: skip


@contextmanager
def meanwhile(*works: Callable[[], None]) -> Iterator[None]:
    """Each work over and over in a thread of its own, for the length of the block; all have begun when it begins."""
    stop, failures = threading.Event(), []
    begun = [threading.Event() for _ in works]

    def repeat(work: Callable[[], None], started: threading.Event) -> None:
        try:
            while not stop.is_set():
                work()
                started.set()
        except BaseException as error:
            failures.append(error)
            started.set()

    threads = [threading.Thread(target=repeat, args=pair) for pair in zip(works, begun, strict=True)]
    for thread in threads:
        thread.start()
    for started in begun:
        started.wait()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures


# --- events -----------------------------------------------------------------------------------------------------------


def test_the_same_events_from_many_writers_are_stored_once(shop):
    events = [event(minutes=number, user_id=f"u{number % 7}") for number in range(500)]
    barrier, stored = threading.Barrier(4), []

    def put(order: int) -> None:
        barrier.wait()
        stored.append(shop.events.put(events if order % 2 else events[::-1]).stored)

    threads = [threading.Thread(target=put, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(stored) == len(shop.events.read().at) == 500


def test_events_too_old_go_in_steps_and_the_rest_stays(shop, monkeypatch):
    monkeypatch.setattr(event_store, "DELETE_ROWS", 3)
    shop.events.put([event(minutes=number, user_id="u") for number in range(10)])
    shop.quarantine.add("s", [Rejected("f", 1, "r", "raw")])
    steps = shop.events.delete_before(T0 + timedelta(minutes=7))
    assert next(steps) == 3
    steps.close()  # stopped half-way
    assert len(shop.events.read().at) == 7
    assert forget.apply_retention(shop, T0 + timedelta(minutes=7)) == (4, 0)
    assert shop.events.read().at.tolist() == [T0.timestamp() + 60 * number for number in (7, 8, 9)]
    assert shop.quarantine.counts() == {"r": 1}


def test_events_that_somebody_else_holds_are_left_to_the_next_run(shop):
    """Two that remove the same events in different orders would wait for each other."""
    shop.events.put([event(minutes=number, user_id=f"u{number}") for number in range(3)])
    later = T0 + timedelta(hours=1)
    with shop.pool.connection() as other, other.transaction():
        other.execute("SELECT FROM events WHERE user_id = 'u1' FOR UPDATE")
        assert sum(shop.events.delete_before(later)) == 2
    assert sum(shop.events.delete_before(later)) == 1


def test_retention_as_a_command(shop, settings, capsys):
    now = datetime.now(UTC)
    old, new = (Event(user_id="u", product_id="p1", at=now - timedelta(days=days)) for days in (31, 29))
    shop.events.put([old, new])
    options = {**settings.model_dump(), "what": "retention", "_env_file": None}
    forget.main(forget.ForgetOptions(**options | {"event_retention_days": 30}))
    assert "1 events and 0 rows in quarantine removed" in capsys.readouterr().out
    assert shop.events.read().at.tolist() == [new.at.timestamp()]
    with pytest.raises(UserError, match="kept for ever"):
        forget.main(forget.ForgetOptions(**options))


def test_quarantine_rows_older_than_retention_go_too(shop):
    shop.quarantine.add("s", [Rejected("f", 1, "r", "raw")])
    assert forget.apply_retention(shop, datetime.now(UTC) + timedelta(minutes=1)) == (0, 1)


def test_what_the_api_refused_has_a_bound(shop, monkeypatch):
    monkeypatch.setattr(quarantine, "MOST_OF_A_CALL", 3)
    monkeypatch.setattr(quarantine, "MOST_REFUSED", 5)
    shop.quarantine.add("other", [Rejected("f", number, "r", "raw") for number in range(9)])
    for call in range(4):
        shop.quarantine.add_refused([Rejected(str(call), line, "r", "raw") for line in range(8)])
    kept = [(row.file, row.line) for row in shop.quarantine.read("api")]
    assert kept == [("2", 0), ("2", 1), ("3", 0), ("3", 1), ("3", 2)]
    assert len(shop.quarantine.read("other")) == 9


# --- sessions ---------------------------------------------------------------------------------------------------------


def test_a_merged_session_is_the_user_s_with_what_comes_late(shop):
    shop.events.put([event("p1", session_id="s"), event("p2", user_id="u"), event("p3", session_id="other")])
    assert shop.sessions.owner(session_key("s")) == session_key("s")
    assert shop.sessions.merge(session_key("s"), "u") == 1
    assert shop.sessions.merge(session_key("s"), "u") == 0
    assert shop.sessions.owner(session_key("s")) == "u"
    late = event("p4", session_id="s", kind="cart")
    assert shop.events.put([late, event("p1", session_id="s")]) == PutEvents(1, 1, [])  # one of them was sent before
    assert shop.users.summary("u") == UserSummary({}, {"view": 2, "cart": 1}, T0)
    assert shop.users.summary(session_key("s")) is None
    assert shop.users.summary(session_key("other")).events == {"view": 1}
    with pytest.raises(SessionTakenError):
        shop.sessions.merge(session_key("s"), "somebody else")


def test_the_lists_of_a_merged_session_are_the_user_s(shop):
    """Else nobody would know out of which list the user took what the session was shown."""
    live(shop, "u", "s")
    with shop.pool.connection() as connection:
        rows = connection.execute("SELECT list_id, user_id FROM impressions ORDER BY 1").fetchall()
    assert rows == [("list-0 of u", "u"), ("list-1 of u", "u"), ("list-2 of u", "u")]


def test_no_list_of_a_session_is_left_behind_by_a_merge(shop):
    """Lists are written moments after they were shown: before, during and after the login."""
    for round_number in range(8):
        session, user, count = f"s{round_number}", f"u{round_number}", itertools.count()

        def write(session: str = session, count: Iterator[int] = count) -> None:
            shop.impressions.put([showing(f"{session}-{next(count)}", session_key(session))])

        with meanwhile(write):
            shop.sessions.merge(session_key(session), user)
        write()
        with shop.pool.connection() as connection:
            query = "SELECT DISTINCT user_id FROM impressions WHERE starts_with(list_id, %s)"
            assert connection.execute(query, (f"{session}-",)).fetchall() == [(user,)]


def test_an_import_knows_merged_sessions_too(shop):
    shop.sessions.merge(session_key("s"), "u")
    for expected in (2, 3):  # into the empty table, and beside what is there
        with shop.importing("test") as batch:
            batch.events(
                [event("p1", session_id="s"), event("p2", session_id="new"), event("p3", expected, session_id="s")]
            )
        assert shop.users.summary("u").events == {"view": expected}


def test_no_event_of_a_session_is_left_behind_by_a_merge(shop):
    """Writers of session events and merges at once: whichever comes first, the user has every event."""
    for round_number in range(8):
        session, user, sent = f"s{round_number}", f"u{round_number}", []

        def write(session: str = session, sent: list[Event] = sent) -> None:
            batch = [event(f"p{number}", 5 * len(sent) + number, session_id=session) for number in range(5)]
            sent.extend(batch)
            assert shop.events.put(batch).stored == 5

        with meanwhile(write):
            shop.sessions.merge(session_key(session), user)
        write()
        assert shop.users.summary(user).events == {"view": len(sent)}
        assert shop.users.summary(session_key(session)) is None


# --- being forgotten --------------------------------------------------------------------------------------------------


def traces(url: str, *names: str) -> list[str]:
    """The table of every row that holds one of `names` in any column, as it stands or as JSON spells it."""
    forms = {
        form for name in names for form in (name, json.dumps(name)[1:-1], json.dumps(name, ensure_ascii=False)[1:-1])
    }
    found = []
    with psycopg.connect(url) as connection:
        tables = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = current_schema()").fetchall()
        for (table,) in sorted(tables):
            cursor = connection.execute(sql.SQL("SELECT * FROM {}").format(sql.Identifier(table)))
            found += [table for row in cursor if any(form in str(value) for value in row for form in forms)]
    return found


def live(shop, user: str, session: str) -> None:
    """Everything a shopper can leave behind."""
    shop.users.put([User(user_id=user, profile={"height_cm": 170})])
    shop.events.put([event("p1", user_id=user), event("p2", session_id=session, context="a picnic")])
    shown = [
        showing(f"list-{n} of {user}", name)
        for n, name in enumerate((user, session_key(session), session_key(session)))
    ]
    shop.impressions.put(shown[:2])
    shop.sessions.merge(session_key(session), user)
    shop.impressions.put(shown[2:])  # a list that was shown to the session, written after the login
    shop.quarantine.add_refused(
        [
            Rejected("POST /events", 1, "kind: bad", json.dumps({"user_id": user, "product_id": "p1"})),
            Rejected("POST /events", 2, "kind: bad", json.dumps({"session_id": session, "product_id": "p1"})),
            Rejected("transactions.csv", 3, "row: 3 columns", f"2020-01-01,{user},p1"),
            Rejected("transactions.csv", 4, "at: bad", json.dumps({"customer_id": user}, ensure_ascii=False)),
        ]
    )


def test_a_shopper_who_is_forgotten_leaves_no_trace(shop, settings):
    with psycopg.connect(settings.database_url) as connection:
        # Of another part of the shop, which knows nothing of forgetting.
        connection.execute("CREATE TABLE shown (list bigint, user_id text, items text[])")
        connection.execute("INSERT INTO shown VALUES (1, 'going-77', '{p1}'), (2, 'staying-7', '{p1}')")
    live(shop, "going-77", "browser-77")
    live(shop, "staying-7", "browser-7")
    shop.quarantine.add("s", [Rejected("f", 9, "r", '{"product_id": "going-77"}'), Rejected("f", 8, "r", "xgoing-77x")])
    before = len(traces(settings.database_url, "staying-7"))
    assert set(traces(settings.database_url, "going-77", "browser-77")) == {
        "events", "users", "merged_sessions", "impressions", "shown", "quarantine",
    }  # fmt: skip

    removed = shop.users.forget("going-77")
    assert removed == {"events": 2, "impressions": 3, "merged_sessions": 1, "shown": 1, "users": 1, "quarantine": 4}
    # A product of that name is no shopper, nor is part of a longer word.
    assert traces(settings.database_url, "going-77", "browser-77") == ["quarantine", "quarantine"]
    assert len(traces(settings.database_url, "staying-7")) == before
    assert not any(shop.users.forget("going-77").values())


@pytest.mark.parametrize(
    "raw",
    [
        {"user_id": " gone-7"}, {"user_id": "session:browser-7"}, {"user_id": ["gone-7"]}, {"user": {"id": "gone-7"}},
        {"session_id": "browser-7\t"},
    ],
)  # fmt: skip
def test_what_was_wrong_with_an_id_in_quarantine_does_not_hide_it(shop, settings, raw):
    shop.sessions.merge(session_key("browser-7"), "gone-7")
    shop.quarantine.add_refused(
        [
            Rejected("POST /events", line, "bad", json.dumps(row))
            for line, row in enumerate([raw, {"user_id": "gone-70"}])
        ]
    )
    assert shop.users.forget("gone-7")["quarantine"] == 1
    assert traces(settings.database_url, "gone-7") == ["quarantine"]  # of gone-70


def test_a_row_that_is_quarantined_while_the_others_are_looked_through_goes_too(shop, settings, monkeypatch):
    def row(line: int, user: str) -> list[Rejected]:
        return [Rejected("POST /events", line, "kind: bad", json.dumps({"user_id": user}))]

    # An import that began before and ends while they are looked through.
    with psycopg.connect(settings.database_url) as slow:
        quarantine.insert(slow, "import", [*row(1, "going-7"), *row(2, "staying-7")])

        def looked_through(*arguments):
            yield from every(*arguments)
            slow.commit()
            shop.quarantine.add_refused([*row(3, "going-7"), *row(4, "staying-7")])

        every = quarantine.rows_of
        monkeypatch.setattr(quarantine, "rows_of", looked_through)
        shop.quarantine.add_refused(row(5, "going-7"))
        assert shop.users.forget("going-7")["quarantine"] == 3
    assert not traces(settings.database_url, "going-7")
    assert traces(settings.database_url, "staying-7") == ["quarantine", "quarantine"]


@pytest.mark.parametrize("user", ['a "quoted" \\ one', "고객 7", "%_1", "(.*)"])
def test_odd_ids_are_forgotten_as_well(shop, settings, user):
    live(shop, user, f"of {user}")
    removed = shop.users.forget(user)
    assert {table: count for table, count in removed.items() if table != "quarantine"} == {
        "events": 2, "impressions": 3, "merged_sessions": 1, "users": 1,
    }  # fmt: skip
    assert not traces(settings.database_url, user, "of ")


def test_nothing_of_a_session_comes_back_to_a_user_who_was_forgotten(shop):
    """Events of the session arrive all the while: the user stays gone, and the later ones are the session's own."""
    for round_number in range(8):
        session, user, sent = f"s{round_number}", f"u{round_number}", []
        shop.sessions.merge(session_key(session), user)

        def write(session: str = session, sent: list[Event] = sent) -> None:
            batch = [event(f"p{number}", 5 * len(sent) + number, session_id=session) for number in range(5)]
            sent.extend(batch)
            shop.events.put(batch)

        with meanwhile(write):
            shop.users.forget(user)
        write()
        assert shop.users.summary(user) is None
        assert shop.users.summary(session_key(session)).events["view"] >= 5


def rows_of(shop, table: str, user: str) -> int:
    with shop.pool.connection() as connection:
        query = sql.SQL("SELECT count(*) FROM {} WHERE user_id = %s").format(sql.Identifier(table))
        return connection.execute(query, (user,)).fetchone()[0]


def test_a_list_that_was_shown_before_is_not_written_afterwards(shop):
    """It waited in a worker's memory. What is shown later to who comes by that name is written."""
    shop.sessions.merge(session_key("s"), "u")
    shop.users.forget("u")
    now = datetime.now(UTC)
    shown = [
        replace(showing(f"{name} {minutes}", name), at=now + timedelta(minutes=minutes))
        for name in ("u", session_key("s"), "other")
        for minutes in (-600, 0, 10)
    ]
    assert shop.impressions.put(shown) == 5
    assert [rows_of(shop, "impressions", name) for name in ("u", session_key("s"), "other")] == [1, 1, 3]
    assert shop.impressions.put([replace(showing("nobody's", "u"), user_id=None)]) == 1


def test_no_list_is_left_behind_by_a_shopper_who_is_forgotten_while_it_is_written(shop):
    """Before, during and after: each writer has asked for the tombstone that then stands, or its rows are there to be removed."""
    for round_number in range(8):
        user, count = f"u{round_number}", itertools.count()

        def write(user: str = user, count: Iterator[int] = count) -> None:
            shop.impressions.put([showing(f"{user}-{next(count)}", user)])

        with meanwhile(write, write):
            shop.users.forget(user)
        write()
        assert rows_of(shop, "impressions", user) == 0


def test_tombstones_say_nobody_s_id_and_go_when_nothing_can_wait_any_more(shop, settings):
    for user in ("early", "late"):
        shop.users.forget(user)
    with shop.pool.connection() as connection:
        connection.execute(
            "UPDATE tombstones SET forgotten_at = now() - interval '50 hours' WHERE digest = sha256('early')"
        )
    assert shop.tombstones.delete_old() == 1
    with shop.pool.connection() as connection:
        assert connection.execute("SELECT digest FROM tombstones").fetchall() == [(sha256(b"late").digest(),)]
    assert traces(settings.database_url, "late") == []


def test_nobody_is_held_while_the_quarantine_is_looked_through(shop, monkeypatch):
    """So a session may be merged meanwhile: what is quarantined of it goes as well."""
    monkeypatch.setattr(quarantine, "SCAN_ROWS", 2)
    raws = [json.dumps({"user_id": f"u{number}"}) for number in range(9)]
    raws += [json.dumps({"user_id": "u"}), json.dumps({"session_id": "late"})]
    shop.quarantine.add("s", [Rejected("f", line, "r", raw) for line, raw in enumerate(raws)])
    tells_of, held = quarantine._tells_of, []

    def slowly(*given) -> bool:
        with shop.pool.connection() as connection:
            held.append(
                connection.execute(
                    "SELECT count(*) FROM pg_locks JOIN pg_database ON pg_database.oid = database"
                    " WHERE locktype = 'advisory' AND datname = current_database()"
                ).fetchone()[0]
            )
        shop.sessions.merge(session_key("late"), "u")
        return tells_of(*given)

    monkeypatch.setattr(quarantine, "_tells_of", slowly)
    assert shop.users.forget("u")["quarantine"] == 2
    assert held
    assert not any(held)
    assert sorted(row.raw for row in shop.quarantine.read()) == sorted(raws[:9])


def test_a_session_that_nobody_owns_is_forgotten_as_completely(shop, settings):
    shop.events.put([event("p1", session_id="browser-77"), event("p2", session_id="browser-7")])
    shop.impressions.put([showing("a", session_key("browser-77"))])
    shop.quarantine.add_refused(
        [Rejected("POST /events", 1, "kind: bad", json.dumps({"session_id": "browser-77", "product_id": "p1"}))]
    )
    removed = shop.users.forget(session_key("browser-77"))
    assert removed == {"events": 1, "impressions": 1, "merged_sessions": 0, "users": 0, "quarantine": 1}
    assert traces(settings.database_url, "browser-77") == []
    assert shop.impressions.put([showing("b", session_key("browser-77"))]) == 0
    assert shop.users.summary(session_key("browser-7")).events == {"view": 1}


def test_a_session_that_is_a_user_s_is_not_forgotten_alone(shop):
    live(shop, "u", "s")
    with pytest.raises(SessionTakenError) as raised:
        shop.users.forget(session_key("s"))
    assert raised.value.owner == "u"
    assert shop.users.summary("u").events == {"view": 2}


def test_whose_a_session_was_goes_with_time_unless_it_is_merged_again(shop, monkeypatch):
    monkeypatch.setattr(sessions, "DELETE_ROWS", 2)
    for number in range(5):
        shop.sessions.merge(session_key(f"s{number}"), "u")
    shop.events.put([event("p1", session_id="s0")])
    with shop.pool.connection() as connection:
        connection.execute("UPDATE merged_sessions SET merged_at = now() - interval '10 days'")
    shop.sessions.merge(session_key("s1"), "u")
    with pytest.raises(SessionTakenError):
        shop.sessions.merge(session_key("s2"), "somebody else")  # which makes it no younger
    assert shop.sessions.delete_before(timedelta(days=11)) == 0
    assert shop.sessions.delete_before(timedelta(days=9)) == 4
    assert [shop.sessions.owner(session_key(f"s{number}")) for number in (0, 1)] == [session_key("s0"), "u"]
    assert shop.users.summary("u").events == {"view": 1}


def test_one_session_as_a_command(shop, settings, capsys):
    shop.events.put([event("p1", session_id="s")])
    live(shop, "u", "merged")
    options = {**settings.model_dump(), "what": "session", "_env_file": None}
    forget.main(forget.ForgetOptions(**options, shopper="s"))
    assert "1 of events" in capsys.readouterr().out
    with pytest.raises(UserError, match="whom"):
        forget.main(forget.ForgetOptions(**options))
    with pytest.raises(UserError, match=r"forget\.py user u removes both"):
        forget.main(forget.ForgetOptions(**options, shopper="merged"))


def test_one_shopper_as_a_command(shop, settings, capsys):
    live(shop, "u", "s")
    options = {**settings.model_dump(), "what": "user", "_env_file": None}
    forget.main(forget.ForgetOptions(**options, shopper="u"))
    assert "2 of events, 3 of impressions, 1 of merged_sessions, 1 of users" in capsys.readouterr().out
    assert shop.users.summary("u") is None
    with pytest.raises(UserError, match="whom"):
        forget.main(forget.ForgetOptions(**options))


# --- goods ------------------------------------------------------------------------------------------------------------


def test_a_deleted_product_leaves_every_release_and_its_events_stay(shop):
    rows = ItemRows(["p1", "p2"], np.eye(2, dtype=np.float32), np.ones((2, 1), np.int32), np.ones((2, 1), np.int32))
    for release in ("one", "two"):
        shop.vectors.create(release, 2)
        shop.vectors.copy(release, rows)
    shop.events.put([event("p1", user_id="u")])
    assert shop.products.delete(["p1", "nothing"]) == {"p1"}
    assert [shop.vectors.count(release) for release in ("one", "two")] == [1, 1]
    assert shop.users.summary("u").events == {"view": 1}
    assert shop.products.delete(["p1"]) == set()


def test_changes_of_one_product_come_one_after_the_other(shop):
    order = []

    def change() -> None:
        with shop.products.changing(["p1"], []) as second:
            order.append(("second", second.before["p1"].text[0]))

    with shop.products.changing(["p1"], []) as first:
        order.append(("first", first.before["p1"].text[0]))
        other = threading.Thread(target=change)
        other.start()
        first.put([RawProduct(product_id="p1", title="changed")])
    other.join()
    assert order == [("first", "t"), ("second", "changed")]
