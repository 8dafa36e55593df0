"""`rnnfast bench`: the options, and the order of things; the work is `rnnfast.bench`'s."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

from ..bench import plot, records, report, suites
from ..bench.machine import usable_cores
from ..bench.rivals import LIBRARIES, VARIANTS, how_to_install, is_known, label
from ..bench.rows import CELLS, DEVICES, DTYPES, MODES, Row, shape_name
from ..bench.session import OWN, Outcome, Session
from . import INTERRUPTED
from .console import make_console, progress_bar
from .parameters import COMMA_LIST, SHAPE, CommaList, Share

_PEAK_DTYPES = ("float32", "float64")


@dataclass(frozen=True)
class Plan:
    """What is to be run, once the options are understood."""

    rows: list[Row]
    against: tuple[str, ...]
    threads: int
    rounds: int
    json: Path | None
    plot: Path | None
    note: str = ""  # what the options cannot do for some of the rows

    @property
    def contenders(self) -> tuple[str, ...]:
        return (OWN, *(name for name in self.against if name != OWN))

    @property
    def device(self) -> str:
        return self.rows[0].device


@click.command("bench")
@click.option(
    "--suite", type=click.Choice(suites.SUITES), help="Rows to run; quick if neither this nor --shape is given."
)
@click.option("--cell", "cells", type=CommaList(CELLS), help="Only these of: lstm,gru,rnn.")
@click.option("--mode", "modes", type=CommaList(MODES), help="Only these of: infer,train,step (one streamed step).")
@click.option(
    "--shape", "shapes", type=SHAPE, multiple=True, metavar="T,B,I,H", help="A shape of your own; repeatable."
)
@click.option("--layers", type=click.IntRange(1, 4095), help="Stacked layers.")
@click.option("--bidirectional", is_flag=True, help="Both directions.")
@click.option("--ragged", type=Share(0, 1, min_open=True), metavar="FRACTION", help="Mean length over T.")
@click.option("--reset", type=Share(0, 1), metavar="RATE", help="Probability of a reset, each row and step.")
@click.option("--dtype", type=click.Choice(DTYPES), help="float32 unless the row says otherwise.")
@click.option("--device", type=click.Choice(DEVICES), help="cpu unless the suite is gpu.")
@click.option(
    "--against",
    type=COMMA_LIST,
    help=f"Rivals out of {','.join(name for name in (*LIBRARIES[1:], *VARIANTS))}, or a Python file with the same "
    "verbs; a float32 NumPy loop if not given.",
)
@click.option("--threads", type=click.IntRange(1, 256), help="For every contender; rnnfast's own default if not given.")
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True, help="Timed batches of each contender.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the records here.")
@click.option("--plot", "plot_path", type=click.Path(dir_okay=False, path_type=Path), help="Draw the ratios (PNG).")
def command(**options: Any) -> None:
    """Check every contender's results, then time them in turn: A B A B.

    Each contender runs in a process of its own, stopped while another is timed. Exit status 1: a wrong result, or a
    rival that was named and is missing.
    """
    console = make_console()
    plan = make_plan(options)
    with _leaving_on_sigterm():
        sys.exit(run(plan, console))


def make_plan(options: dict[str, Any]) -> Plan:
    """The rows and contenders that the options ask for; raises click.UsageError."""
    against = tuple(options["against"] or ("numpy",))
    for name in against:
        if not is_known(name):
            raise click.BadParameter(
                f"expected some of {', '.join((*LIBRARIES, *VARIANTS))}, got {name!r}", param_hint="--against"
            )
    named = {OWN: OWN}
    for name in against:
        other = named.setdefault(label(name), name)
        if other != name:
            raise click.UsageError(f"--against: expected rivals of different names, got {other} and {name}")
    for option in ("json_path", "plot_path"):
        if options[option] is not None:
            _check_target(f"--{option[:4]}", options[option])
    if options["json_path"] is not None and options["json_path"] == options["plot_path"]:
        raise click.UsageError(f"--plot: expected another file than --json, got {options['plot_path']}")
    if options["plot_path"] is not None and options["plot_path"].suffix != ".png":
        raise click.UsageError(f"--plot: expected a file that ends in .png, got {options['plot_path']}")
    if options["plot_path"] is not None and importlib.util.find_spec("matplotlib") is None:
        raise click.ClickException("--plot needs matplotlib: pip install matplotlib")
    cores = usable_cores()
    if (options["threads"] or 1) > cores:  # each waits for others that have no core: some rows would never end
        raise click.UsageError(
            f"--threads: expected at most {cores}, the cores of this machine, got {options['threads']}"
        )
    rows = _choose_rows(options)
    if not rows:
        raise click.UsageError("no row of the suite fits --cell and --mode")
    note = _not_for_steps(options, rows)
    threads = options["threads"] or _default_threads()
    return Plan(rows, against, threads, options["rounds"], options["json_path"], options["plot_path"], note)


def _check_target(option: str, path: Path) -> None:
    """Where a file is to be replaced in the end; better said now than after all the measuring."""
    folder = Path(os.path.realpath(path)).parent  # of a link, that of the file which it stands for
    if not folder.is_dir():
        raise click.UsageError(f"{option}: the folder {folder} does not exist")
    if path.exists() and not path.is_file():
        raise click.UsageError(f"{option}: expected a file, got {path}, which is something else")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise click.UsageError(f"{option}: cannot write to {folder}: {error.strerror}") from error


def run(plan: Plan, console: Console) -> int:
    """Run the plan, show and write what came of it; the exit status."""
    outcomes: list[Outcome] = []
    status = 0
    if plan.note:
        console.print(f"[dim]{escape(plan.note)}")
    with (
        progress_bar(console, len(plan.rows)) as (tell, advance),
        Session(plan.contenders, plan.threads, plan.device, plan.rounds, tell) as session,
    ):
        try:
            missing = session.open()
            if missing:
                _print_missing(console, missing)
                return 1
            measured = session.measure_machine([d for d in _PEAK_DTYPES if any(r.dtype == d for r in plan.rows)])
            provenance = session.provenance()
            report.print_machine(console, measured, provenance)
            for number, row in enumerate(plan.rows, 1):
                session.tell = _prefixed(tell, report.describe_row(row))
                outcomes.append(session.run(row))
                if not console.is_terminal:  # no progress bar: the tables come at the very end
                    click.echo(f"[{number}/{len(plan.rows)}] {report.describe_outcome(outcomes[-1])}", err=True)
                if plan.json:
                    records.write_json(plan.json, _records(outcomes), provenance)
                advance()
        except KeyboardInterrupt:
            console.print("[yellow]interrupted; what was measured so far:")
            status = INTERRUPTED
        except SystemExit as stop:  # SIGTERM
            console.print("[yellow]terminated; what was measured so far:")
            status = int(stop.code or 0)
    failed = _show(plan, outcomes, console)
    if outcomes and not any(outcome.median(OWN) for outcome in outcomes) and not failed:
        console.print("[red]rnnfast could run none of these rows")
        failed = True
    return status or int(failed)


def _choose_rows(options: dict[str, Any]) -> list[Row]:
    cells, modes, shapes = options["cells"] or CELLS, options["modes"], options["shapes"]
    device = options["device"] or ("cuda" if options["suite"] == "gpu" else "cpu")
    suite = options["suite"] or (None if shapes else "quick")
    rows = (
        [row for row in suites.rows_of(suite) if row.family in cells and row.mode in (modes or MODES)] if suite else []
    )
    rows += suites.rows_of_shapes(shapes, cells, modes or ("infer", "train"))
    changes = {name: options[name] for name in ("layers", "ragged", "reset", "dtype") if options[name] is not None}
    changes |= {"bidirectional": True} if options["bidirectional"] else {}
    if device == "cpu" and options["dtype"] not in (None, *_PEAK_DTYPES):
        raise click.UsageError(
            f"--dtype: expected {' or '.join(_PEAK_DTYPES)} on the CPU, got {options['dtype']}, which is for --device cuda"
        )
    return [_changed(row, {**changes, "device": device}) for row in rows]


def _changed(row: Row, changes: dict[str, Any]) -> Row:
    """The row with the options that were given; a streamed step knows neither directions nor sequences."""
    if row.mode == "step":
        changes = {name: value for name, value in changes.items() if name in ("layers", "dtype", "device")}
    new = row.with_(**changes)
    return new.with_(name=shape_name(new)) if row.name == shape_name(row) else new


def _not_for_steps(options: dict[str, Any], rows: Sequence[Row]) -> str:
    """A note that streamed steps go without some of the options; click.UsageError where there is nothing else."""
    given = [f"--{name}" for name in ("ragged", "reset") if options[name] is not None]
    given += ["--bidirectional"] if options["bidirectional"] else []
    steps = [row.mode == "step" for row in rows]
    if not given or not any(steps):
        return ""
    if all(steps):
        raise click.UsageError(f"{', '.join(given)}: expected rows of --mode infer or train, got streamed steps alone")
    return f"streamed steps run without {', '.join(given)}"


def _default_threads() -> int:
    try:
        from .. import get_num_threads
    except ImportError:
        return usable_cores()
    return int(get_num_threads())


def _show(plan: Plan, outcomes: Sequence[Outcome], console: Console) -> bool:
    """Tables, the picture and the next command; True if anything failed."""
    if outcomes:
        console.print(report.rows_table(outcomes, [label(name) for name in plan.contenders[1:]], console.width))
    failed = report.print_problems(console, outcomes)
    found = _records(outcomes)
    summary = report.summary_table(found)
    if summary is not None:
        console.print(summary)
    if plan.json and outcomes:
        console.print(f"records: {escape(str(plan.json))}")
    if plan.plot and summary is not None:
        plot.draw(found, plan.plot, f"{plan.threads} threads")
        console.print(f"picture: {escape(str(plan.plot))}")
    rivals = [name for name in ("torch", "onnxruntime", "jax") if importlib.util.find_spec(name) is not None]
    ran = list(dict.fromkeys(row.suite for row in plan.rows))
    following = report.next_command(ran, plan.against, rivals, plan.json is not None, plan.device == "cuda")
    console.print(f"next: [bold]{escape(following)}")
    return failed


def _print_missing(console: Console, missing: dict[str, str]) -> None:
    for name, reason in missing.items():
        absent = "No module named" in reason and name != OWN and name in (*LIBRARIES, *VARIANTS)
        hint = f" ({how_to_install(name)})" if absent else ""
        console.print(f"[red]cannot run {escape(name)}[/]: {escape(reason)}{escape(hint)}")


def _records(outcomes: Sequence[Outcome]) -> list[records.Record]:
    return [record for outcome in outcomes for record in outcome.records]


def _prefixed(tell: Callable[[str], None], prefix: str) -> Callable[[str], None]:
    return lambda text: tell(f"{escape(prefix)}: {escape(text)}")


@contextmanager
def _leaving_on_sigterm() -> Iterator[None]:
    """SIGTERM leaves by an exception, so that the contenders are ended too."""

    def leave(signum: int, _: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
