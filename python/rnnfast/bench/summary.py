"""How many times faster than each rival: geometric mean and minimum, by cell, mode and size class and over all.

Works on JSON records alone, so that the command, the plots and the README tables say the same.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .records import FIELDS, Record, row_of
from .rivals import REDUCED_PRECISION
from .rows import CELLS, MODES, SIZE_CLASSES

OWN = "rnnfast"
BEST = "best"  # of all rivals in the row's own precision
ALL = "all"

_KEY = FIELDS[: FIELDS.index("library")]


@dataclass(frozen=True)
class Ratio:
    """One row against one rival: `value` is the rival's median time over rnnfast's."""

    record: Record
    rival: str
    value: float


@dataclass(frozen=True)
class Group:
    """Rows of one cell, mode and size class (each may be "all") against one rival."""

    cell: str
    mode: str
    size_class: str
    rival: str
    count: int
    mean: float
    minimum: float
    worst: str  # the name of the slowest row in comparison


def by_row(records: Iterable[Record]) -> list[list[Record]]:
    """The records of each row together, in order."""
    rows: dict[tuple[object, ...], list[Record]] = defaultdict(list)
    for record in records:
        rows[tuple(record[name] for name in _KEY)].append(record)
    return list(rows.values())


def rivals_in(records: Iterable[Record]) -> list[str]:
    return [name for name in dict.fromkeys(record["library"] for record in records) if name != OWN]


def ratios(records: Sequence[Record]) -> list[Ratio]:
    """Every row against every rival that ran it, and against the best of them."""
    found = []
    for row in by_row(records):
        own = next((record for record in row if record["library"] == OWN), None)
        if own is None:
            continue
        times = {record["library"]: record["median_s"] for record in row if record is not own}
        found += [Ratio(own, name, seconds / own["median_s"]) for name, seconds in times.items()]
        peers = [seconds for name, seconds in times.items() if name not in REDUCED_PRECISION]
        if peers:
            found.append(Ratio(own, BEST, min(peers) / own["median_s"]))
    return found


def groups(records: Sequence[Record]) -> list[Group]:
    """Groups that have rows: each cell, mode and size class, each cell and mode, each mode; "best" after the rivals."""
    found = ratios(records)
    order = [*rivals_in(records), BEST] if len(rivals_in(records)) > 1 else rivals_in(records)
    wanted = [(cell, mode, size) for mode in MODES for cell in CELLS for size in (*SIZE_CLASSES, ALL)]
    wanted += [(ALL, mode, ALL) for mode in MODES]
    made = [group for key in wanted for rival in order if (group := _group(found, key, rival)) is not None]
    return [group for group in made if group.size_class != ALL or group.cell == ALL or not _has_one_size(group, made)]


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _group(found: list[Ratio], key: tuple[str, str, str], rival: str) -> Group | None:
    members = [ratio for ratio in found if ratio.rival == rival and _belongs(ratio.record, key)]
    if not members:
        return None
    slowest = min(members, key=lambda ratio: ratio.value)
    mean = geometric_mean([ratio.value for ratio in members])
    return Group(*key, rival, len(members), mean, slowest.value, slowest.record["name"])


def _has_one_size(total: Group, made: list[Group]) -> bool:
    """All rows of this cell and mode are of one size class: its line would say the same twice."""
    parts = [g for g in made if (g.cell, g.mode, g.rival) == (total.cell, total.mode, total.rival) and g != total]
    return len(parts) == 1


def _belongs(record: Record, key: tuple[str, str, str]) -> bool:
    row = row_of(record)
    return all(wanted in (ALL, has) for wanted, has in zip(key, (row.family, row.mode, row.size_class), strict=True))
