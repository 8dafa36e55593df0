"""The benchmark on the terminal: one line a row, one line a group, and what to try next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .arrays import row_steps
from .gpu import cudnn_region
from .records import Record
from .rows import Row
from .session import OWN, Measurements, Outcome
from .summary import ALL, BEST, Group, groups

_BUSY = 0.75  # of the cores, in the minute before
_WIDE, _WIDE_RIVAL = 96, 20  # characters that the whole table takes, and each rival


def print_machine(console: Console, measured: Measurements, provenance: dict[str, Any]) -> None:
    threads, load = provenance["threads"], provenance["load_average"]
    if load is not None and load > _BUSY * provenance["cores"]:
        console.print(f"[yellow]other programs are busy here (load {load:.1f}): these times are not to be relied on")
    for dtype, peak in measured.machine.peak_gflops.items():
        gemm = measured.gemm_gflops[dtype]
        line = f"{dtype}: FMA peak {peak:.0f} GFLOP/s on {threads} threads, NumPy's large product {gemm:.0f}"
        console.print(f"{line}, ISA {measured.isa or 'unknown'}")
        short = measured.shortfall(dtype)
        if short:
            console.print(f"[yellow]the measured peak is only {short:.2f} of NumPy's product: fractions say too much")
    if measured.machine.levels:
        levels = ", ".join(f"{level.name} {level.bandwidth / 1e9:.0f}" for level in measured.machine.levels)
        console.print(f"read bandwidth of {threads} threads, GB/s: {levels}")


def rows_table(outcomes: Sequence[Outcome], rivals: Sequence[str], width: int) -> Table:
    """One line a row: this package's time, speed and distance from the floor, then each rival's time and ratio.

    Where `width` characters are too few, what follows from the rest is left out.
    """
    wide = width >= _WIDE + _WIDE_RIVAL * len(rivals)
    table = Table(title="median time of one call; ratio = rival / rnnfast", title_justify="left", box=box.SIMPLE_HEAD)
    headings = ("row", "mode", OWN, "of peak", *rivals)
    if wide:
        headings = ("row", "mode", "T,B,I,H", OWN, "µs a step", "GFLOP/s", "of peak", "floor", "time/floor", *rivals)
    for heading in headings:
        is_text = heading in ("row", "mode", "T,B,I,H")
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=heading != "row")
    regions = any(outcome.row.device == "cuda" for outcome in outcomes)
    if regions:
        table.add_column("cuDNN", no_wrap=True)
    for outcome in outcomes:
        row = outcome.row
        shape = f"{row.T},{row.B},{row.I},{row.H}"
        name = row.name.replace(f" {shape}", "") if wide else row.name
        own = _own_cells(outcome)
        own = [shape, *own] if wide else [own[0], own[3]]
        region = [cudnn_region(row)] if regions else []
        table.add_row(escape(name), row.mode, *own, *(_rival_cell(outcome, rival, wide) for rival in rivals), *region)
    return table


def summary_table(records: Sequence[Record]) -> Table | None:
    """Geometric mean (minimum) of the ratios by group; None where there is nothing to compare."""
    found = groups(records)
    if not found:
        return None
    rivals = list(dict.fromkeys(group.rival for group in found))
    table = Table(title="times faster than: geometric mean (minimum)", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("mode", "cell", "size", "rows"):
        table.add_column(heading)
    for rival in rivals:
        table.add_column("the best of them" if rival == BEST else rival, justify="right")
    table.add_column("slowest row" if len(rivals) == 1 else "slowest row against the best")
    for key in dict.fromkeys((group.mode, group.cell, group.size_class) for group in found):
        members = {g.rival: g for g in found if (g.mode, g.cell, g.size_class) == key}
        count = max(group.count for group in members.values())
        style = "bold" if ALL in key else ""
        worst = members[rivals[-1]].worst if rivals[-1] in members else ""
        table.add_row(
            *key, str(count), *(_group_cell(members.get(name)) for name in rivals), escape(worst), style=style
        )
    return table


def print_problems(console: Console, outcomes: Sequence[Outcome]) -> bool:
    """Name what could not be run (once) and what failed (each); True if anything failed."""
    reasons = dict.fromkeys((name, reason) for outcome in outcomes for name, reason in outcome.unsupported.items())
    for name, reason in reasons:
        console.print(f"[dim]not run: {escape(name)}: {escape(reason)}")
    failed = False
    for outcome in outcomes:
        for name, message in outcome.failures.items():
            failed = True
            where = f"{outcome.row.name} ({outcome.row.mode}), {name}"
            console.print(f"[red]FAILED[/] {escape(where)}: {escape(message)}")
    return failed


def next_command(suites: Sequence[str], against: Sequence[str], installed: Sequence[str], json: bool, gpu: bool) -> str:
    """One command that shows more than the one that has just run."""
    rivals = ",".join(installed)
    if tuple(against) == ("numpy",):
        return f"rnnfast bench --against {rivals}" if rivals else "pip install torch && rnnfast bench --against torch"
    rivals = rivals or ",".join(against)
    if gpu:
        return "rnnfast bench --suite gpu --device cuda --against torch --json gpu.json"
    if "real" not in suites:
        return f"rnnfast bench --suite real --against {rivals} --json real.json"
    if not json:
        return f"rnnfast bench --suite real --against {rivals} --json real.json --plot real.png"
    return f"rnnfast bench --suite square --against {rivals} --json square.json"


def _own_cells(outcome: Outcome) -> list[str]:
    record = next((r for r in outcome.records if r["library"] == OWN), None)
    floor = "" if outcome.floor is None else seconds_text(outcome.floor)
    if record is None:
        return ["–", "", "", "", floor, ""]
    median, fraction = record["median_s"], record["peak_fraction"]
    return [
        seconds_text(median),
        f"{median / outcome.row.T * 1e6:.3g}",
        f"{record['gflops']:.3g}",
        "" if fraction is None else f"{fraction:.1%}",
        floor,
        f"{median / outcome.floor:.4g}" if outcome.floor else "",
    ]


def _rival_cell(outcome: Outcome, rival: str, with_time: bool) -> str:
    median, own = outcome.median(rival), outcome.median(OWN)
    if median is None:
        return "[red]failed[/]" if rival in outcome.failures else "–"
    if own is None:
        return seconds_text(median)
    ratio = median / own
    shown = f"[{'green' if ratio >= 1 else 'red'}]{ratio:.2f}×[/]"
    return f"{seconds_text(median)} {shown}" if with_time else shown


def _group_cell(group: Group | None) -> str:
    return "" if group is None else f"{group.mean:.2f}× ({group.minimum:.2f})"


def seconds_text(seconds: float) -> str:
    """Three digits in a unit that suits: "12.3 µs", "4.56 ms", "1.23 s"."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        value = seconds * scale
        if value >= 1.0:
            return f"{value:.3g} {unit}" if value < 999.5 else f"{value:.0f} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def describe_row(row: Row) -> str:
    """For the progress bar."""
    dense = row.T * row.B
    ragged = f", {row_steps(row) / dense:.0%} of {dense} row-steps" if row.ragged else ""
    return f"{row.name} ({row.mode}{ragged})"


def describe_outcome(outcome: Outcome) -> str:
    """One plain line: the row, and each contender's time."""
    times = [f"{record['library']} {seconds_text(record['median_s'])}" for record in outcome.records]
    return f"{describe_row(outcome.row)}: {', '.join(times) or 'no result'}"
