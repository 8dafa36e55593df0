"""The picture of `--plot`: how many times faster than each rival, one line of dots a row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .records import Record, row_of
from .rows import MODES
from .summary import BEST, Ratio, ratios, rivals_in


def draw(records: Sequence[Record], path: Path, title: str = "") -> None:
    """Write a picture of the ratios in `records`.

    Raises ValueError where there is none, ImportError without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = [ratio for ratio in ratios(records) if ratio.rival != BEST]
    if not found:
        raise ValueError("records: expected at least one row that rnnfast and a rival both ran, got none")
    names = list(dict.fromkeys(_label(ratio.record) for ratio in sorted(found, key=_place)))
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.22 * len(names)), layout="constrained")
    for rival in rivals_in(records):
        members = [ratio for ratio in found if ratio.rival == rival]
        heights = [names.index(_label(ratio.record)) for ratio in members]
        axes.scatter([ratio.value for ratio in members], heights, label=rival, s=22)
    _decorate(axes, names, title)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    pyplot.close(figure)


def _decorate(axes: Any, names: list[str], title: str) -> None:
    axes.set_xscale("log")
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", which="both", alpha=0.3)
    axes.set_xlabel("times faster than (rival's median time / rnnfast's)")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=8)


def _place(ratio: Ratio) -> tuple[int, str]:
    return MODES.index(ratio.record["mode"]), row_of(ratio.record).family


def _label(record: Record) -> str:
    name, shape = record["name"], f"{record['T']},{record['B']},{record['I']},{record['H']}"
    name = name if shape in name else f"{name} {shape}"
    dtype = "" if record["dtype"] == "float32" else f" {record['dtype']}"
    return f"{name}{dtype} {record['mode']}"
