"""The rich console of all commands: as wide as the terminal, and wide enough for the tables where there is none."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_WIDTH_OF_A_FILE = 180


def make_console() -> Console:
    unknown_width = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=_WIDTH_OF_A_FILE if unknown_width else None, highlight=False)


@contextmanager
def progress_bar(console: Console, total: int) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """A bar that is drawn when told to and at no other time, so that it never disturbs what is being measured.

    Yields tell(text) and advance().
    """
    columns = (BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as progress:
        task = progress.add_task("", total=total)

        def tell(text: str) -> None:
            progress.update(task, description=text, refresh=True)

        def advance() -> None:
            progress.advance(task)

        yield tell, advance
