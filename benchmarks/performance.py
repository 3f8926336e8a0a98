"""docs/performance.json: one row a figure of speed, beside what it has to reach."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from settings import UserError

FILE = Path("docs/performance.json")


@dataclass(frozen=True)
class Row:
    bench: str  # which benchmark
    items: int  # in the catalogue
    metric: str  # what was measured, with its unit
    value: float  # ours
    floor: float | None  # what ours is held against: another library's figure, or a bound; None: nothing
    ratio: float | None  # value / floor
    commit: str
    command: str  # that makes this row again

    @property
    def key(self) -> tuple[str, int, str]:
        return self.bench, self.items, self.metric


def save(rows: Sequence[Row], file: Path = FILE) -> None:
    """Put rows into the file, in the place of those with the same benchmark, items and metric; all stand sorted by these.

    Raises UserError, and leaves the file as it is, when it holds something else.
    """
    kept: dict[tuple[str, int, str], Row] = {}
    if file.exists():
        try:
            kept = {row.key: row for row in (Row(**found) for found in json.loads(file.read_text(encoding="utf-8")))}
        except (ValueError, TypeError) as error:
            raise UserError(f"{file} is not a list of rows of speed ({error}); mend it or delete it") from error
    kept.update((row.key, row) for row in rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps([asdict(kept[key]) for key in sorted(kept)], indent=1, ensure_ascii=False, allow_nan=False)
    file.write_text(text + "\n", encoding="utf-8")
