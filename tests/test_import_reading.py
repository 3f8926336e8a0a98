"""Files to rows: what is read, what is refused, and where it stood."""

from __future__ import annotations

import gzip
from datetime import UTC, date, datetime, timedelta, timezone

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from catalog import EARLIEST, Event, RawProduct, Rejected, User, newest_event
from datasets import reading
from datasets.events import EVENT_SCHEMA, checked_events, event_frame
from datasets.reading import need_file, raw_text, read_frames, read_objects, validated
from settings import UserError


def split(found):
    """(accepted, rejected) of an iterator."""
    everything = list(found)
    rejected = [item for item in everything if isinstance(item, Rejected)]
    return [item for item in everything if not isinstance(item, Rejected)], rejected


def checked(rows, names=None):
    """(all valid events by line, rejected)"""
    frames, rejected = split(checked_events(rows, "f", names or {}))
    return pl.concat(frames).sort("line"), rejected


def reasons(rejected):
    return [(row.line, row.reason) for row in rejected]


# --- JSON lines


def test_json_lines_are_objects_with_their_line_numbers(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n  \n{"a": "\xea\xb0\x80"}\r\n{"a": null}')
    assert list(read_objects(file)) == [(1, {"a": 1}), (4, {"a": "가"}), (5, {"a": None})]


def test_gzipped_json_lines_read_the_same(tmp_path):
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"a": 1}\n{"a": 2}\n'))
    assert list(read_objects(file)) == [(1, {"a": 1}), (2, {"a": 2})]


def test_bad_json_lines_are_rejected_one_by_one(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"a": 1}\n{"a": \n{"a": "\xff"}\n{"a": "x\x00"}\n[1]\n"text"\n{"a": NaN}\n{"a": 2}\n')
    accepted, rejected = split(read_objects(file))
    assert accepted == [(1, {"a": 1}), (8, {"a": 2})]
    assert reasons(rejected) == [
        (2, "row: not valid JSON"),
        (3, "row: broken UTF-8"),
        (4, "row: holds a NUL byte"),
        (5, "row: not a JSON object"),
        (6, "row: not a JSON object"),
        (7, "row: not valid JSON"),
    ]
    assert rejected[1].raw == '{"a": "\\xff"}'
    assert rejected[2].raw == '{"a": "x\\x00"}'
    assert {row.file for row in rejected} == {"rows.jsonl"}


@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: data[:60] + b"\x00" * 20 + data[80:]])
def test_a_damaged_gzip_file_is_for_the_user_to_mend(tmp_path, damage):
    file = tmp_path / "rows.jsonl.gz"
    lines = b"".join(b'{"a": "%d"}\n' % (number * number) for number in range(1000))
    file.write_bytes(damage(gzip.compress(lines)))
    with pytest.raises(UserError, match=r"rows\.jsonl\.gz cannot be read"):
        list(read_objects(file))


def test_what_is_no_parquet_file_is_for_the_user_to_mend(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(UserError, match=r"rows\.parquet cannot be read"):
        list(read_objects(tmp_path / "rows.parquet"))


# --- CSV


def test_csv_cells_are_text_and_empty_ones_null(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_bytes('\ufeffid,unused,name\r\n007,x,"a, ""b""\nc"\r\n\r\n8,,\r\n'.encode())
    accepted, rejected = split(read_frames(file, ["id", "name"]))
    assert pl.concat(accepted).to_dicts() == [
        {"line": 2, "id": "007", "name": 'a, "b"\nc'},
        {"line": 5, "id": "8", "name": None},
    ]
    assert rejected == []


def test_a_csv_row_of_another_width_or_of_broken_bytes_is_rejected(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_bytes(b"id,name\n1,one\n2\n3,three,3\n4,f\xff\xffr\n5,five\n")
    accepted, rejected = split(read_frames(file, ["id", "name"]))
    assert pl.concat(accepted)["id"].to_list() == ["1", "5"]
    assert sorted(reasons(rejected)) == [
        (3, "row: 1 columns where the heading has 2"),
        (4, "row: 3 columns where the heading has 2"),
        (5, "name: broken UTF-8"),
    ]
    assert {row.line: row.raw for row in rejected}[5] == "4,f\\udcff\\udcffr"


def test_a_quote_that_never_ends_costs_rows_but_not_the_import(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text('id,name\n1,one\n2,"two\n' + "3,three\n" * 30_000 + "4,four\n")
    accepted, rejected = split(read_frames(file, ["id", "name"]))
    assert pl.concat(accepted)["id"][0] == "1"
    assert pl.concat(accepted)["id"][-1] == "4"
    assert [(row.line, row.reason[:12]) for row in rejected] == [(3, "row: not CSV")]


def test_csv_rows_keep_their_lines_across_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "CHUNK_ROWS", 3)
    file = tmp_path / "rows.csv"
    file.write_text("id\n" + "".join(f"{number}\n" for number in range(10)))
    accepted, _ = split(read_frames(file, ["id"]))
    assert [len(frame) for frame in accepted] == [3, 3, 3, 1]
    assert pl.concat(accepted)["line"].to_list() == list(range(2, 12))


@pytest.mark.parametrize("content", ["id,colour\n1,red\n", "", "\n"])
def test_a_missing_csv_column_is_named(tmp_path, content):
    file = tmp_path / "rows.csv"
    file.write_text(content)
    with pytest.raises(UserError, match=r"rows\.csv has no column .*name"):
        list(read_frames(file, ["id", "name"]))


def test_an_empty_csv_table_gives_an_empty_frame(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("id,name\n")
    accepted, rejected = split(read_frames(file, ["id", "name"]))
    assert pl.concat(accepted).height == 0
    assert rejected == []


# --- Parquet


def test_parquet_rows_are_numbered_from_one(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "CHUNK_ROWS", 2)
    file = tmp_path / "rows.parquet"
    pl.DataFrame({"id": [7, 8, 9], "kind": pl.Series(["a", "b", "a"], dtype=pl.Categorical)}).write_parquet(file)
    accepted, _ = split(read_frames(file, ["id", "kind"]))
    assert pl.concat(accepted).to_dicts() == [
        {"id": 7, "kind": "a", "line": 1},
        {"id": 8, "kind": "b", "line": 2},
        {"id": 9, "kind": "a", "line": 3},
    ]
    assert list(read_objects(file))[2] == (3, {"id": 9, "kind": "a"})


def test_a_parquet_row_of_broken_bytes_is_rejected(tmp_path):
    file = tmp_path / "rows.parquet"
    buffers = [
        None,
        pa.py_buffer(b"\x00\x00\x00\x00\x01\x00\x00\x00\x03\x00\x00\x00\x04\x00\x00\x00"),
        pa.py_buffer(b"a\xff\xfeb"),
    ]
    pq.write_table(pa.table({"id": pa.Array.from_buffers(pa.string(), 3, buffers)}), file)
    accepted, rejected = split(read_frames(file, ["id"]))
    assert pl.concat(accepted).to_dicts() == [{"id": "a", "line": 1}, {"id": "b", "line": 3}]
    assert reasons(rejected) == [(2, "row: broken UTF-8")]
    assert split(read_objects(file))[0] == [(1, {"id": "a"}), (3, {"id": "b"})]


def test_a_missing_parquet_column_is_named(tmp_path):
    pl.DataFrame({"id": [1]}).write_parquet(tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"rows\.parquet has no column name"):
        list(read_frames(tmp_path / "rows.parquet", ["id", "name"]))


# --- finding files


def test_a_missing_file_is_named_with_where_to_get_it(tmp_path):
    with pytest.raises(UserError, match=r"needs a folder with shoes\.csv or shoes\.parquet; from the cobbler"):
        need_file(None, ["shoes"], (".csv", ".parquet"), "from the cobbler")
    with pytest.raises(UserError, match=r"nowhere does not exist; .*from the cobbler"):
        need_file(tmp_path / "nowhere", ["shoes"], (".csv",), "from the cobbler")
    with pytest.raises(UserError, match=r"has no shoes\.csv; from the cobbler"):
        need_file(tmp_path, ["shoes"], (".csv",), "from the cobbler")


def test_a_file_is_found_in_its_folder_or_given_itself(tmp_path):
    file = tmp_path / "shoes.csv"
    file.touch()
    assert need_file(tmp_path, ["boots", "shoes"], (".parquet", ".csv"), "") == file
    assert need_file(file, ["boots"], (".csv",), "") == file


# --- rows to records


def test_a_refused_row_names_the_field_by_the_files_own_name():
    row = {"article": "", "cost": -1}
    result = validated(RawProduct, {"product_id": "", "title": "x"}, "f.csv", 3, row, {"product_id": "article"})
    assert result == Rejected("f.csv", 3, "article: missing", '{"article": "", "cost": -1}')


@pytest.mark.parametrize(
    ("model", "values", "reason"),
    [
        (RawProduct, {"product_id": "1", "title": None}, "title: missing"),
        (RawProduct, {"product_id": "1"}, "title: missing"),
        (RawProduct, {"product_id": "1", "title": "t", "colour": "red"}, "colour: Extra inputs are not permitted"),
        (User, {"user_id": "u\x00"}, "user_id: holds a NUL byte, which no text in PostgreSQL may"),
        (User, {"user_id": "u", "profile": {"age": float("inf")}}, "profile.age: is not a finite number"),
    ],
)
def test_the_reason_names_the_field_and_the_fault(model, values, reason):
    result = validated(model, values, "f", 1, values)
    assert isinstance(result, Rejected)
    assert result.reason == reason


@given(st.one_of(st.text(), st.binary(), st.dictionaries(st.text(), st.text() | st.none()), st.just("\ud800\x00")))
def test_a_raw_row_is_always_text_that_postgresql_takes(row):
    text = raw_text(row)
    text.encode("utf-8")
    assert "\x00" not in text


# --- events

ids = st.one_of(
    st.none(),
    st.text(max_size=5),
    st.sampled_from(
        [
            "u1",
            "session:a",
            "사용자",
            " u",
            "u ",
            "a b",
            "\x00",
            "\x1c",
            "\u00a0",
            "u\n",
            "x" * 200,
            "x" * 201,
            "\u2028",
        ]
    ),
)
kinds = st.one_of(
    st.none(), st.text(max_size=3), st.sampled_from(["view", "purchase", "Buy", "view\n", "k" * 32, "k" * 33])
)
texts = st.one_of(st.none(), st.text(max_size=5), st.sampled_from(["\x00", "a" * 20_000, "가" * 20_001]))
days = st.dates(date(1985, 1, 1), date(2105, 1, 1))
moments = st.datetimes(datetime(1985, 1, 1), datetime(2105, 1, 1), timezones=st.sampled_from([None, UTC]))
odd_times = st.sampled_from(
    ["", "0", "-1", "yesterday", "20200101", "2020-1-1", "2020-02-30", "2020-13-01", "1577836800", "1577836800.5"]
)
odd_times |= st.sampled_from(
    ["1990-01-01", "1989-12-31T23:59:59.999999Z", "2100-01-01", "2020-01-01T24:00:00", "2020-01-01T23:59:60Z"]
)
odd_times |= st.sampled_from(
    ["2020-01-01 10:00:00", "2020-01-01T10:00:00.1234567Z", "2020-01-01T10:00:00.5", "2020-01-01T10:00:00-00:00"]
)
odd_times |= st.sampled_from(
    ["2020-01-01T10:00:00-23:59", "2020-01-01T10:00:00+24:00", "2020-01-01T10:00:00+0900", "1990-01-01T08:59:59+09:00"]
)
times = st.one_of(
    st.none(),
    days.map(str),
    moments.map(datetime.isoformat),
    moments.map(lambda moment: moment.astimezone(timezone(timedelta(hours=-9, minutes=-30))).isoformat()),
    moments.map(lambda moment: moment.replace(tzinfo=None, microsecond=0).isoformat() + "Z"),
    odd_times,
)
rows = st.fixed_dictionaries(
    {"user_id": ids, "product_id": ids, "kind": kinds, "at": times, "context": texts, "event_id": ids}
)


@given(st.lists(rows, max_size=6))
def test_checked_columns_accept_and_refuse_exactly_what_event_does(given_rows):
    frame = pl.DataFrame(given_rows, schema=dict.fromkeys(EVENT_SCHEMA, pl.String)).with_row_index("line", offset=1)
    expected, refused = [], []
    for line, row in enumerate(given_rows, start=1):
        try:
            expected.append(Event(**{name: value for name, value in row.items() if value is not None}))
        except ValidationError:
            refused.append(line)
    accepted, rejected = checked(frame)
    assert dict(accepted.schema) == {**EVENT_SCHEMA, "line": pl.Int64}
    assert accepted.drop("line").rows() == event_frame(expected).rows()
    assert sorted([*accepted["line"], *refused]) == list(range(1, len(given_rows) + 1))
    assert [row.line for row in rejected] == refused


@given(st.lists(st.tuples(days, moments.map(lambda moment: moment.replace(tzinfo=UTC))), min_size=1, max_size=5))
def test_typed_time_columns_mean_the_same_as_text(pairs):
    kinds_of_time: list[pl.DataType] = [pl.Date(), pl.Datetime("us", "UTC")]
    for column, kind in zip(zip(*pairs, strict=True), kinds_of_time, strict=True):
        typed = pl.DataFrame({"line": range(len(column)), "user_id": "u", "product_id": "p"}).with_columns(
            pl.Series("at", column, dtype=kind)
        )
        text = typed.with_columns(pl.Series("at", [value.isoformat() for value in column]))
        from_typed, refused = checked(typed)
        from_text, _ = checked(text)
        assert from_typed.rows() == from_text.rows()
        moments_of = [
            value if isinstance(value, datetime) else datetime(value.year, value.month, value.day, tzinfo=UTC)
            for value in column
        ]
        assert [row.line for row in refused] == [
            line for line, moment in enumerate(moments_of) if not EARLIEST <= moment < newest_event()
        ]


def test_whole_numbers_are_ids_and_other_types_are_refused():
    frame = pl.DataFrame({"line": [1], "user_id": [12], "product_id": [7], "at": [date(2020, 1, 2)]})
    accepted, _ = checked(frame)
    assert accepted.select("user_id", "product_id", "kind", "context").row(0) == ("12", "7", "view", "")
    assert accepted["at"][0] == datetime(2020, 1, 2, tzinfo=UTC)
    _, (refused,) = checked(frame.with_columns(user_id=pl.lit(True)), {"user_id": "customer"})
    assert refused.reason.startswith("customer: ")
    assert refused.raw == '{"user_id": true, "product_id": 7, "at": "2020-01-02"}'


def test_the_same_act_at_the_same_moment_has_the_same_id():
    frame = pl.DataFrame({"line": [1, 2, 3], "user_id": "u", "product_id": ["p", "p", "q"], "at": date(2020, 1, 2)})
    accepted, _ = checked(frame)
    first, second, other = accepted["event_id"]
    assert first == second != other
    assert first == Event(user_id="u", product_id="p", at=date(2020, 1, 2)).event_id


@pytest.mark.parametrize("none", [None, ""])
def test_an_id_that_is_null_or_empty_is_none(none):
    """As clients send it whose language has no way to leave a field out."""
    act = {"user_id": "u", "product_id": "p", "at": date(2020, 1, 2)}
    assert Event(**act, event_id=none, list_id=none) == Event(**act)
