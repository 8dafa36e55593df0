"""The process of one contender: answers one JSON line with one JSON line until its input ends.

    {"verb": "open"}                      -> {"version", "reason"}    reason: why the library cannot run, or null
    {"verb": "truth", "row", "path"}      -> {}                       writes the float64 results to `path`
    {"verb": "prepare", "row", "truth"}   -> {"errors"} or {"unsupported"}   the error of each tensor, or why not
    {"verb": "calibrate", "seconds"}      -> {"repeats", "seconds"}   calls a batch, seconds a call
    {"verb": "time", "repeats", "warm"}   -> {"seconds"}              of one call, the mean over a batch
    {"verb": "probe", "what", ...}        -> {"value"}

Any exception is answered as {"error"}. The library may print what it likes: the protocol has a descriptor of its own.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from types import ModuleType, NoneType
from typing import Any, BinaryIO

import numpy as np

from . import check, probes
from .arrays import make_arrays
from .rivals import Job, Setup, Unsupported, load
from .rows import Row

_WARM_SECONDS = 0.03
_MAX_REPEATS = 1_000_000


class Worker:
    """The verbs, and the one job that is prepared at a time."""

    def __init__(self, name: str, setup: Setup) -> None:
        self.name, self.setup = name, setup
        self.library: ModuleType | None = None
        self.job: Job | None = None

    def open(self) -> dict[str, Any]:
        self.library, variant = load(self.name)
        self.setup = Setup(self.setup.threads, self.setup.device, variant)
        reason = self.library.available(self.setup.device)
        if not isinstance(reason, (str, NoneType)):
            raise TypeError(f"available: expected None or the reason why not, got {reason!r}")
        return {"reason": reason, "version": None if reason else self.library.version()}

    def truth(self, row: dict[str, Any], path: str) -> dict[str, Any]:
        task = Row(**row)
        truth: dict[str, Any] = check.compute_truth(task, make_arrays(task), self.setup.device)
        np.savez(path, **truth)
        return {}

    def prepare(self, row: dict[str, Any], truth: str) -> dict[str, Any]:
        self.job = None  # frees the row before
        gc.collect()
        task = Row(**row)
        assert self.library is not None
        try:
            job = self.library.prepare(task, make_arrays(task), self.setup)
            if not isinstance(job, Job):
                raise TypeError(f"prepare: expected a Job of rnnfast.bench.rivals, got {type(job).__name__}")
            self.job = job
            found = self.job.result()
        except Unsupported as reason:
            return {"unsupported": str(reason)}
        with np.load(truth) as expected:
            return {"errors": check.errors(task, found, expected)}

    def calibrate(self, seconds: float) -> dict[str, Any]:
        assert self.job is not None
        run_for(self.job, _WARM_SECONDS)
        repeats, each = 1, time_batch(self.job, 1)
        while repeats * each < seconds and repeats < _MAX_REPEATS:
            repeats = min(_MAX_REPEATS, max(2 * repeats, math.ceil(1.2 * seconds / max(each, 1e-9))))
            each = time_batch(self.job, repeats)
        return {"repeats": repeats, "seconds": each}

    def time(self, repeats: int, warm: int) -> dict[str, Any]:
        assert self.job is not None
        for _ in range(warm):
            self.job.call()
        return {"seconds": time_batch(self.job, repeats)}

    def probe(self, what: str, **arguments: Any) -> dict[str, Any]:
        if what == "gemm":
            return {"value": probes.gemm_gflops(**arguments)}
        if what == "read":
            return {"value": probes.read_levels(**arguments)}
        assert self.library is not None
        return {"value": self.library.probe(what, **arguments)}


def run_for(job: Job, seconds: float) -> None:
    """Call until `seconds` have passed, twice at least: compilation, first allocations and page faults."""
    end = time.perf_counter() + seconds
    job.call()
    job.call()
    while time.perf_counter() < end:
        job.call()
    job.clock.sync()


def time_batch(job: Job, repeats: int) -> float:
    """Seconds a call, the mean of `repeats`; no garbage is collected meanwhile."""
    call, clock = job.call, job.clock
    gc.collect()
    gc.disable()
    try:
        clock.start()
        for _ in range(repeats):
            call()
        return clock.stop() / repeats
    finally:
        gc.enable()


def serve(verbs: dict[str, Callable[..., dict[str, Any]]], requests: BinaryIO, replies: BinaryIO) -> None:
    for line in requests:
        request = json.loads(line)
        try:
            reply = verbs[request.pop("verb")](**request)
        except Exception as error:  # told to the parent, which reports it
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()


def main(setup: dict[str, Any]) -> None:
    """Called by the program that `contender.Contender` starts."""
    _die_with(setup["parent"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides: it gets the same Ctrl-C
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    worker = Worker(setup["name"], Setup(setup["threads"], setup["device"]))
    verbs = ("open", "truth", "prepare", "calibrate", "time", "probe")
    serve({verb: getattr(worker, verb) for verb in verbs}, sys.stdin.buffer, replies)


def _die_with(parent: int) -> None:
    """On Linux, ask to be killed when the parent is: a stopped process would never notice that its input ended."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit("the parent ended before this process began")
