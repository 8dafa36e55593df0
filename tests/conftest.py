"""What all tests share: the header of a run, its skips by reason, and the fixtures of threads, processes and data.

A test that changes how calls are shared between threads does it through a fixture of this file, which puts it back.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import rnnfast
from rnnfast import _core

# (split, threads): every way to share a call, with an even and an odd number of threads.
SHARINGS = (("one", 1), ("batch", 2), ("batch", 3), ("hidden", 2), ("hidden", 3), ("layers", 2), ("alone", 3))
FEW_SHARINGS = (("one", 1), ("batch", 3), ("hidden", 2))


# ---- the run -------------------------------------------------------------------------------------------------------


def pytest_sessionstart(session: pytest.Session) -> None:
    """pytest's -q leaves the header out; which machine ran the kernels is to be seen all the same."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and not reporter.showheader:
        for line in pytest_report_header():
            reporter.line(line)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where the time of a run is limited: what is marked `first` before the rest."""
    items.sort(key=lambda item: item.get_closest_marker("first") is None)


def pytest_report_header() -> list[str]:
    cuda = "built" if find_spec("rnnfast._cuda") else "not built"
    data = os.environ.get("RNNFAST_DATA")
    return [
        f"rnnfast {rnnfast.__version__} at {Path(rnnfast.__file__).parent}",
        f"rnnfast: ISA {_core.isa()} (possible: {', '.join(_core.isas())}), {rnnfast.get_num_threads()} threads, "
        f"CUDA {cuda}, RNNFAST_DATA {data or 'not set'}",
    ]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The skipped tests, grouped by reason: what this run did not look at."""
    reasons: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[reason.removeprefix("Skipped: ")] += 1
    if not reasons:
        return
    terminalreporter.section("skipped, by reason")
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count:5d}  {reason}")


# ---- threads -------------------------------------------------------------------------------------------------------


class Sharing(NamedTuple):
    """How a call is shared between threads: "one", "batch", "hidden", "layers", "alone", or "" for the cost model's choice."""

    split: str
    threads: int

    def use(self) -> None:
        _core.set_split(self.split)
        rnnfast.set_num_threads(self.threads)


def thread_counts() -> dict[str, int]:
    """Of rnnfast and, where a test has imported it, of PyTorch."""
    torch = sys.modules.get("torch")
    counts = {"torch": torch.get_num_threads()} if hasattr(torch, "get_num_threads") else {}
    return {**counts, "rnnfast": rnnfast.get_num_threads()}


def set_thread_counts(counts: dict[str, int]) -> None:
    for name, count in counts.items():
        sys.modules[name].set_num_threads(count)


@pytest.fixture(autouse=True)
def leaves_the_threads() -> Iterator[None]:
    """The number of threads may change the last bits, so a test that leaves another behind would be seen in another one."""
    before = thread_counts()
    yield
    after = {name: count for name, count in thread_counts().items() if name in before}
    set_thread_counts(before)
    assert after == before, "a test that sets the number of threads does it with `restore_sharing`"


@pytest.fixture
def restore_sharing() -> Iterator[None]:
    """Whatever the test sets, later tests see the split and the numbers of threads of before."""
    counts = thread_counts()
    yield
    _core.set_split(os.environ.get("RNNFAST_SPLIT", ""))
    set_thread_counts(counts)


def in_force(request: pytest.FixtureRequest) -> Sharing:
    chosen = Sharing(*request.param)
    chosen.use()
    return chosen


@pytest.fixture(params=SHARINGS, ids=lambda p: f"{p[0]}-{p[1]}")
def sharing(request: pytest.FixtureRequest, restore_sharing: None) -> Sharing:
    """Each way to share a call between threads, in force during the test."""
    return in_force(request)


@pytest.fixture(params=FEW_SHARINGS, ids=lambda p: f"{p[0]}-{p[1]}")
def few_sharings(request: pytest.FixtureRequest, restore_sharing: None) -> Sharing:
    """As `sharing`, one of each kind, where the number of threads is not what a test is about."""
    return in_force(request)


# ---- memory --------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_memory_is_nan() -> Iterator[None]:
    """What PyTorch allocates without filling it, for tensors of the test and of the engine, holds NaN."""
    torch = pytest.importorskip("torch")
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


# ---- processes -----------------------------------------------------------------------------------------------------

RunPython = Callable[..., str]


@pytest.fixture
def run_python() -> RunPython:
    """``run_python(code, timeout=60, **environment)``: the output of `code` in a fresh interpreter that must succeed.

    An environment variable of None is removed. It finds this very rnnfast and the modules beside the tests.
    """

    def run(code: str, timeout: float = 60, expect: int = 0, **environment: str | None) -> str:
        found = run_process(code, timeout, **environment)
        assert found.returncode == expect, (
            f"expected exit status {expect}, got {found.returncode}\n{found.stdout}{found.stderr}"
        )
        return found.stdout if expect == 0 else found.stderr

    return run


def run_process(code: str, timeout: float = 60, **environment: str | None) -> subprocess.CompletedProcess[str]:
    paths = [str(Path(rnnfast.__file__).parent.parent), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    wanted = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **environment}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={name: value for name, value in wanted.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


# ---- data ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def data_file() -> Callable[[str], Path]:
    """``data_file("text/tinyshakespeare.txt")``: its path below $RNNFAST_DATA; skips the test where it is not there."""

    def find(name: str) -> Path:
        folder = os.environ.get("RNNFAST_DATA")
        if not folder:
            pytest.skip(f"RNNFAST_DATA is not set: {name} is not there")
        path = Path(folder) / name
        if not path.is_file():
            pytest.skip(f"RNNFAST_DATA has no {name}")
        return path

    return find
