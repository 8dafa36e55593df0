"""The JSON of a benchmark: one record for each row and library under `rows`, and `provenance`.

What several runs measured may have `failed` too: the rows that did not come to an end, each with `why` and its `date`.
A record may say more than `FIELDS`: `region`, which of cuDNN's algorithms PyTorch takes for a row on a GPU; and `date`,
`commit` and `gpu` where a file holds what several runs measured (`merge`).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .._files import replace_file
from .arrays import row_steps
from .gpu import cudnn_region
from .rows import Row, useful_flops

Record = dict[str, Any]

_ROW_FIELDS = (
    "suite",
    "name",
    "cell",
    "mode",
    "device",
    "dtype",
    "T",
    "B",
    "I",
    "H",
    "layers",
    "bidirectional",
    "ragged",
    "reset",
)
_MEASURED_FIELDS = (
    "library",
    "version",
    "median_s",
    "min_s",
    "max_s",
    "rounds",
    "gflops",
    "peak_fraction",
    "max_error",
)
FIELDS = _ROW_FIELDS + _MEASURED_FIELDS


def make_record(
    row: Row, library: str, version: str, seconds: Sequence[float], max_error: float, peak_gflops: float | None
) -> Record:
    """A record of the timed calls of one library; `seconds` has one entry a round, `gflops` counts useful flops."""
    median = statistics.median(seconds)
    gflops = useful_flops(row, row_steps(row)) / median / 1e9
    measured = (
        library,
        version,
        median,
        min(seconds),
        max(seconds),
        len(seconds),
        gflops,
        gflops / peak_gflops if peak_gflops else None,
        max_error,
    )
    record = {name: getattr(row, name) for name in _ROW_FIELDS} | dict(zip(_MEASURED_FIELDS, measured, strict=True))
    return record | ({"region": cudnn_region(row)} if row.device == "cuda" else {})


def row_of(record: Record) -> Row:
    return Row(**{name: record[name] for name in _ROW_FIELDS})


def row_key(record: Record) -> tuple[Any, ...]:
    """Equal for the records of one row, whatever the library."""
    return tuple(record[name] for name in _ROW_FIELDS)


def key_of(row: Row) -> tuple[Any, ...]:
    return tuple(getattr(row, name) for name in _ROW_FIELDS)


def merge(
    earlier: Iterable[Record],
    new: Iterable[Record],
    provenance: dict[str, Any],
    key: Callable[[Record], Any] = row_key,
) -> list[Record]:
    """What runs on one GPU have measured together: for each `key` the newest records, each with its date and commit.

    Raises ValueError where earlier ones of a GPU are another GPU's.
    """
    own = {name: provenance[name] for name in ("date", "commit", "gpu")}
    fresh = [{**record, **own} for record in new]
    measured = {key(record) for record in fresh}
    kept = [record for record in earlier if key(record) not in measured]
    for record in kept:
        if record["device"] == "cuda" and record.get("gpu", own["gpu"]) != own["gpu"]:
            raise ValueError(f"gpu: expected earlier records of {own['gpu']}, got one of {record['gpu']}")
    return [*kept, *fresh]


def failure(row: Row, why: str, date: str) -> Record:
    return {name: getattr(row, name) for name in _ROW_FIELDS} | {"why": why, "date": date}


def write_json(
    path: Path, records: Iterable[Record], provenance: dict[str, Any], failed: Iterable[Record] = ()
) -> None:
    """Write the file whole or not at all."""
    content = {"provenance": provenance, "rows": list(records)} | ({"failed": list(failed)} if failed else {})
    replace_file(path, (json.dumps(content, indent=1) + "\n").encode())


def read_json(path: Path) -> tuple[list[Record], dict[str, Any]]:
    """Records and provenance; raises ValueError naming the file and what it lacks."""
    content = json.loads(path.read_text())
    if not isinstance(content, dict) or not {"rows", "provenance"} <= content.keys():
        raise ValueError(f"{path.name}: expected an object with 'rows' and 'provenance'")
    for record in content["rows"]:
        missing = [name for name in FIELDS if name not in record]
        if missing:
            raise ValueError(f"{path.name}: a record lacks {', '.join(missing)}")
    return content["rows"], content["provenance"]


def read_failed(path: Path) -> list[Record]:
    """The rows of the file that did not come to an end."""
    failed: list[Record] = json.loads(path.read_text()).get("failed", [])
    return failed
