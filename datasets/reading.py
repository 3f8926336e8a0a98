"""Files to rows. A row that cannot be read becomes `Rejected` with its line; the reading goes on.

Text files may be gzipped. `read_objects` gives rows as dicts (JSON lines, Parquet), `read_frames` as columns (CSV,
Parquet) for what must be fast.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any, TypeVar

import orjson
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, TypeAdapter, ValidationError

from catalog import Rejected, Value
from settings import UserError

CHUNK_ROWS = 50_000  # rows held at once: a few tens of MB of Python objects at most
MAX_RAW = 2_000  # characters of a rejected row that are kept

_VALUE = TypeAdapter[str](Value)

Model = TypeVar("Model", bound=BaseModel)


def find_file(path: Path, stems: Sequence[str], endings: Sequence[str]) -> Path | None:
    """The first existing `path/stem+ending`; `path` itself if it is a file with one of the endings."""
    if path.is_file() and path.name.endswith(tuple(endings)):
        return path
    candidates = (path / f"{stem}{ending}" for stem in stems for ending in endings)
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def need_file(path: Path | None, stems: Sequence[str], endings: Sequence[str], origin: str) -> Path:
    """`find_file`, or a UserError that says what was expected and where the original can be got."""
    names = " or ".join(f"{stem}{ending}" for stem in stems for ending in endings)
    if path is None:
        raise UserError(f"this source needs a folder with {names}; {origin}")
    if not path.exists():
        raise UserError(f"{path} does not exist; expected a folder with {names}; {origin}")
    found = find_file(path, stems, endings)
    if found is None:
        raise UserError(f"{path} has no {names}; {origin}")
    return found


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]] | Rejected]:
    """Rows of a JSON-lines or Parquet file as (line, object)."""
    if path.suffix == ".parquet":
        for first, batch in _parquet_batches(path, None):
            sound, rejected = _sound_rows(batch, path.name, first)
            yield from rejected
            yield from zip(sound["line"].to_pylist(), sound.drop_columns(["line"]).to_pylist(), strict=True)
        return
    with readable(path), _open(path) as stream:
        for line, text in enumerate(stream, start=1):
            content = text.removeprefix(codecs.BOM_UTF8) if line == 1 else text
            if not content.strip():
                continue
            value = parse_object(content, path.name, line)
            yield value if isinstance(value, Rejected) else (line, value)


def parse_object(text: bytes, file: str, line: int) -> dict[str, Any] | Rejected:
    """One JSON object, or why it is none."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return Rejected(file, line, _json_fault(text), raw_text(text))
    if not isinstance(value, dict):
        return Rejected(file, line, "row: not a JSON object", raw_text(text))
    return value


def read_frames(path: Path, columns: Sequence[str]) -> Iterator[pl.DataFrame | Rejected]:
    """Rows of a CSV or Parquet file as frames of `columns` plus `line`. CSV gives text, with null for an empty cell.

    Raises UserError when a column is missing.
    """
    if path.suffix != ".parquet":
        yield from _csv_frames(path, columns)
        return
    for first, batch in _parquet_batches(path, columns):
        sound, rejected = _sound_rows(batch, path.name, first)
        yield from rejected
        frame = pl.DataFrame(pa.Table.from_batches([sound]))
        yield frame.with_columns(pl.col(pl.Categorical, pl.Enum).cast(pl.String))


def parquet_columns(path: Path) -> list[str]:
    with readable(path):
        return list(pq.read_schema(path).names)


def validated(
    model: type[Model], values: Mapping[str, Any], file: str, line: int, raw: Any, names: Mapping[str, str] = {}
) -> Model | Rejected:
    """`values` as a `model`, or `Rejected` whose reason names the field (by the file's own name if `names` has it).

    None is the same as absent: tables cannot say the difference.
    """
    try:
        return model.model_validate({name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = [str(part) for part in first["loc"] if isinstance(part, str)] or ["row"]
        # "Too short" is said of empty text only: nothing in the catalogue asks for more than one character.
        absent = first["type"] in ("missing", "string_too_short")
        message = "missing" if absent else first["msg"].removeprefix("Value error, ")
        return Rejected(
            file, line, f"{'.'.join([names.get(field[0], field[0]), *field[1:]])}: {message}", raw_text(raw)
        )


def valid_values(values: Iterable[Any]) -> list[str]:
    """The distinct values in order, without those that no product may have: these are reported with their rows."""
    found = set()
    for value in values:
        with suppress(ValidationError):
            found.add(_VALUE.validate_python(value))
    return sorted(found)


def need_columns(path: Path, present: Sequence[str], needed: Sequence[str]) -> None:
    """Raise UserError if a column is missing."""
    missing = [name for name in needed if name not in present]
    if missing:
        raise UserError(f"{path} has no column {', '.join(missing)} (it has {', '.join(present) or 'no heading'})")


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """A file that breaks off or cannot be opened is the user's to mend; it must not look like a bug of ours."""
    try:
        yield
    except (EOFError, zlib.error, pa.ArrowException, pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); get or make the file again") from error


def raw_text(row: Any) -> str:
    """A row as text that PostgreSQL takes: valid UTF-8, no NUL, not endless."""
    if isinstance(row, bytes):
        text = row.decode("utf-8", "backslashreplace").rstrip("\r\n")
    else:
        text = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False, default=str)
    return text[:MAX_RAW].encode("utf-8", "backslashreplace").decode().replace("\x00", "\\x00")


def _json_fault(text: bytes) -> str:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return "row: broken UTF-8"
    return "row: holds a NUL byte" if b"\x00" in text else "row: not valid JSON"


def _csv_frames(path: Path, columns: Sequence[str]) -> Iterator[pl.DataFrame | Rejected]:
    with readable(path), _open(path) as stream:
        # Bytes that are no UTF-8 pass as lone surrogates, so one bad byte costs one row and not the file.
        reader = csv.reader(TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline=""))
        heading = next(reader, [])
        need_columns(path, heading, columns)
        lines: list[int] = []
        rows: list[list[str]] = []
        while True:
            line = reader.line_num + 1
            try:
                row = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                yield Rejected(path.name, line, f"row: not CSV ({error})", "")
                continue
            if len(row) == len(heading):
                lines.append(line)
                rows.append(row)
            elif row:
                reason = f"row: {len(row)} columns where the heading has {len(heading)}"
                yield Rejected(path.name, line, reason, raw_text(",".join(row)))
            if len(rows) == CHUNK_ROWS:
                yield from _text_frame(path, heading, columns, lines, rows)
                lines, rows = [], []
        yield from _text_frame(path, heading, columns, lines, rows)


def _text_frame(
    path: Path, heading: list[str], columns: Sequence[str], lines: list[int], rows: list[list[str]]
) -> Iterator[pl.DataFrame | Rejected]:
    try:
        cells = list(zip(*rows, strict=True)) or [()] * len(heading)
        data = {name: pl.Series(cells[heading.index(name)], dtype=pl.String) for name in columns}
    except UnicodeEncodeError:
        sound = []
        for line, row in zip(lines, rows, strict=True):
            broken = next((name for name, cell in zip(heading, row, strict=True) if not _is_utf8(cell)), None)
            if broken is None:
                sound.append((line, row))
            else:
                yield Rejected(path.name, line, f"{broken}: broken UTF-8", raw_text(",".join(row)))
        yield from _text_frame(path, heading, columns, [line for line, _ in sound], [row for _, row in sound])
        return
    frame = pl.DataFrame({"line": pl.Series(lines, dtype=pl.Int64), **data})
    yield frame.with_columns(pl.col(pl.String).replace("", None))


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parquet_batches(path: Path, columns: Sequence[str] | None) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(number of the first row, from 1; rows)"""
    with readable(path), pq.ParquetFile(path) as file:
        if columns is not None:
            need_columns(path, file.schema_arrow.names, columns)
        first = 1
        for batch in file.iter_batches(CHUNK_ROWS, columns=columns):
            yield first, batch
            first += batch.num_rows


def _sound_rows(batch: pa.RecordBatch, file: str, first: int) -> tuple[pa.RecordBatch, list[Rejected]]:
    """The batch with a `line` column, without rows whose bytes are no UTF-8 (Arrow does not check on reading)."""
    numbered = batch.append_column("line", pa.array(range(first, first + batch.num_rows), pa.int64()))
    if _is_sound(batch):
        return numbered, []
    keep = [_is_sound(batch.slice(index, 1)) for index in range(batch.num_rows)]
    rejected = [Rejected(file, first + index, "row: broken UTF-8", "") for index, kept in enumerate(keep) if not kept]
    return numbered.filter(pa.array(keep)), rejected


def _is_sound(batch: pa.RecordBatch) -> bool:
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]
