"""Row after row: compute the truth, let every contender prepare and be checked, then time them in turn."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import check
from .arrays import row_steps
from .contender import Contender, ContenderError
from .floor import Level, Machine, floor_seconds
from .machine import load_average, memory_bytes, provenance
from .records import Record, make_record
from .rivals import REDUCED_PRECISION, label
from .rows import Row, least_bytes

OWN = "rnnfast"

_BATCH_SECONDS = 0.02  # a timed batch takes at least this long
_WARM_SECONDS = 0.002  # untimed calls before each batch: caches and threads have been idle
_LONG_CALL = 0.1  # beyond this the untimed call costs more than it mends
_MIN_ROUNDS = 3
_ROW_SECONDS = 20.0  # a row that has used this much stops after _MIN_ROUNDS
_PEAK_SECONDS = 0.3


@dataclass
class Outcome:
    """What became of one row: records in the order of the contenders, and what went wrong or could not be run."""

    row: Row
    records: list[Record] = field(default_factory=list)
    floor: float | None = None
    unsupported: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def median(self, library: str) -> float | None:
        return next((r["median_s"] for r in self.records if r["library"] == library), None)


@dataclass
class Measurements:
    """The machine's abilities, GFLOP/s by dtype, as measured before the first row."""

    machine: Machine
    isa: str | None
    gemm_gflops: dict[str, float]

    def shortfall(self, dtype: str) -> float | None:
        """The measured peak over NumPy's large product where that is below 0.95: then fractions of it say too much."""
        peak, gemm = self.machine.peak_gflops.get(dtype), self.gemm_gflops.get(dtype)
        return peak / gemm if peak and gemm and peak < 0.95 * gemm else None


class Session:
    """All processes of a benchmark. Use as a context manager: no child outlives the block.

    Parameters
    ----------
    names : sequence of str
        The contenders in their order.
    tell : callable
        Told in a few words what is being done.
    """

    def __init__(
        self, names: Sequence[str], threads: int, device: str, rounds: int, tell: Callable[[str], None] = lambda _: None
    ) -> None:
        self.threads, self.device, self.rounds, self.tell = threads, device, rounds, tell
        self.names = tuple(names)
        self.contenders: dict[str, Contender] = {}
        self._stack = ExitStack()
        self.measurements = Measurements(Machine(threads, {}, ()), None, {})
        self._load_average = load_average()  # before this program adds its own

    def __enter__(self) -> Session:
        with ExitStack() as stack:
            for name in self.names:
                self.contenders[label(name)] = stack.enter_context(Contender(name, self.threads, self.device))
            self._truth = stack.enter_context(Contender("numpy", self.threads, self.device))
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            self._path = str(Path(folder) / "truth.npz")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def open(self) -> dict[str, str]:
        """Import every library; the reasons of those that cannot run here, by name."""
        missing = {}
        for name, contender in self.contenders.items():
            self.tell(f"starting {name}")
            try:
                reason = contender.open()
            except ContenderError as error:
                reason = str(error)
            if reason:
                missing[name] = reason
        return missing

    def measure_machine(self, dtypes: Sequence[str]) -> Measurements:
        """Measure the FMA peak, NumPy's product and read bandwidths; nothing of it on a GPU."""
        isa = self._probe_own("isa")
        if self.device != "cpu":
            self.measurements = Measurements(Machine(self.threads, {}, ()), isa, {})
            return self.measurements
        peaks, gemms = {}, {}
        for dtype in dtypes:
            self.tell(f"measuring the {dtype} peak")
            first = self._probe_own("fma", seconds=_PEAK_SECONDS, dtype=dtype)
            gemms[dtype] = self._truth.ask("probe", what="gemm", dtype=dtype)["value"]
            second = self._probe_own("fma", seconds=_PEAK_SECONDS, dtype=dtype)
            peaks[dtype] = max(first or 0.0, second or 0.0) or gemms[dtype]
        self.measurements = Measurements(
            Machine(self.threads, peaks, self._read_levels(), self._probe_own("barrier") or 0.0), isa, gemms
        )
        return self.measurements

    def provenance(self) -> dict[str, Any]:
        """As `machine.provenance`, with the measured peaks (GFLOP/s) and read bandwidths (GB/s)."""
        machine = self.measurements.machine
        return provenance(self.threads, self.measurements.isa) | {
            "load_average": self._load_average,
            "peak_gflops": machine.peak_gflops,
            "gemm_gflops": self.measurements.gemm_gflops,
            "barrier_us": machine.barrier * 1e6,
            "read_gbs": {level.name: level.bandwidth / 1e9 for level in machine.levels},
        }

    def run(self, row: Row) -> Outcome:
        """Check and time one row. Contenders that fail or cannot run it are left out, and named in the outcome."""
        outcome = Outcome(row)
        needed, present = least_bytes(row), memory_bytes()
        if needed > present:
            wanted = f"arrays that fit the memory of {present / 1e9:.3g} GB"
            outcome.failures["memory"] = f"expected {wanted}, got {needed / 1e9:.3g} GB at least"
            return outcome
        outcome.floor = floor_seconds(row, row_steps(row), self.measurements.machine)
        self.tell("computing the truth")
        try:
            self._living_truth().ask("truth", row=asdict(row), path=self._path)
        except ContenderError as problem:  # no memory for it, mostly
            outcome.failures["the reference"] = str(problem)
            return outcome
        errors: dict[str, float] = {}
        for name in self.contenders:
            self.tell(f"checking {name}")
            error = self._prepare(name, outcome)
            if error is not None:
                errors[name] = error
        seconds = self._time(list(errors), outcome)
        peak = self.measurements.machine.peak_gflops.get(row.dtype)
        for name, samples in seconds.items():
            version = str(self.contenders[name].version)
            record = make_record(row, name, version, samples, errors[name], peak)
            outcome.records.append(record | {"floor_s": outcome.floor})
        return outcome

    def _prepare(self, name: str, outcome: Outcome) -> float | None:
        """The contender's worst error, None where it cannot or must not be timed."""
        row = outcome.row
        try:
            contender = self._living(name)
            answer = contender.ask("prepare", row=asdict(row), truth=self._path)
        except ContenderError as error:
            outcome.failures[name] = str(error)
            return None
        if "unsupported" in answer:
            outcome.unsupported[name] = answer["unsupported"]
            return None
        errors = answer["errors"]
        wrong = check.mismatches(row, errors)
        if name in REDUCED_PRECISION:
            wrong = [f"{tensor}: {error}" for tensor, error in errors.items() if not math.isfinite(error)]
        if wrong:
            outcome.failures[name] = "wrong result: " + "; ".join(wrong)
            return None
        return max(errors.values())

    def _time(self, names: list[str], outcome: Outcome) -> dict[str, list[float]]:
        """Seconds a call, one entry a round, the contenders in turn."""
        plans: dict[str, tuple[int, int]] = {}
        samples: dict[str, list[float]] = {}
        for name in names:
            self.tell(f"warming {name} up")
            answer = self._ask_or_drop(name, outcome, "calibrate", seconds=_BATCH_SECONDS)
            if answer:
                each = answer["seconds"]
                plans[name] = answer["repeats"], 0 if each > _LONG_CALL else math.ceil(_WARM_SECONDS / each)
                samples[name] = []
        start = time.monotonic()
        for turn in range(self.rounds):
            if turn >= _MIN_ROUNDS and time.monotonic() - start > _ROW_SECONDS:
                break
            self.tell(f"round {turn + 1} of {self.rounds}")
            for name, (repeats, warm) in list(plans.items()):
                answer = self._ask_or_drop(name, outcome, "time", repeats=repeats, warm=warm)
                if answer:
                    samples[name].append(answer["seconds"])
                else:
                    del plans[name], samples[name]
        return samples

    def _ask_or_drop(self, name: str, outcome: Outcome, verb: str, **arguments: Any) -> dict[str, Any] | None:
        try:
            return self.contenders[name].ask(verb, **arguments)
        except ContenderError as error:
            outcome.failures[name] = str(error)
            return None

    def _living(self, name: str) -> Contender:
        """The contender, started anew if it died in a row before."""
        if not self.contenders[name].alive:
            self.contenders[name] = self._anew(self.contenders[name])
            self.contenders[name].open()
        return self.contenders[name]

    def _living_truth(self) -> Contender:
        if not self._truth.alive:
            self._truth = self._anew(self._truth)
        return self._truth

    def _anew(self, dead: Contender) -> Contender:
        dead.close()
        return self._stack.enter_context(Contender(dead.name, self.threads, self.device))

    def _probe_own(self, what: str, **arguments: Any) -> Any:
        """A measurement by the engine itself, None where it is not a contender or cannot."""
        if OWN not in self.contenders:
            return None
        try:
            return self.contenders[OWN].ask("probe", what=what, threads=self.threads, **arguments)["value"]
        except ContenderError:
            return None

    def _read_levels(self) -> tuple[Level, ...]:
        self.tell("measuring read bandwidths")
        with Contender("numpy", threads=1) as reader:
            found = reader.ask("probe", what="read", threads=self.threads)["value"]
        return tuple(Level(*level) for level in found)
