"""The parent's handle on the process of one contender.

A contender that is not being asked is stopped (SIGSTOP), so that idle threads that spin cannot disturb the one whose
turn it is; it is continued for exactly as long as an answer takes.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

from .. import __path__ as package_path
from .rivals import VARIANTS

_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "NPROC",  # the size of XLA's CPU pool
)
_WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_TIMEOUT = "RNNFAST_BENCH_TIMEOUT"  # seconds for one answer
_TIMEOUT_SECONDS = 900.0  # a compilation of a long row may take minutes

# The child gets the parent's module path. A built-in rival finds an empty `rnnfast` package in the place of this one, so
# that its process loads neither the extension modules nor their threads; a file may well be about rnnfast itself.
_PROGRAM = """
import json, sys, types
setup = json.loads(sys.argv[1])
sys.path[:] = setup["sys_path"]
if setup["bare"]:
    package = types.ModuleType("rnnfast")
    package.__path__ = setup["package_path"]
    sys.modules["rnnfast"] = package
from rnnfast.bench.worker import main
main(setup)
"""


class ContenderError(Exception):
    """A contender answered with an error, died or did not answer in time."""


class Contender:
    """One child process. Use as a context manager: the child is gone afterwards, however the block was left.

    Parameters
    ----------
    name : str
        As `rivals.load` takes it.
    threads : int
        Given to every thread pool by its environment variable, before anything is imported.
    device : str
        "cpu" or "cuda".
    """

    def __init__(self, name: str, threads: int, device: str = "cpu") -> None:
        self.name, self.threads, self.device = name, threads, device
        self.version: str | None = None
        self._log: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        self._process = self._start()

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def open(self) -> str | None:
        """Import the library; the reason why it cannot run here, or None."""
        answer = self.ask("open")
        self.version = answer["version"]
        return answer["reason"]

    def ask(self, verb: str, **arguments: Any) -> dict[str, Any]:
        """Continue the child, send one request, wait for its answer, stop the child.

        Raises ContenderError with the child's own message.
        """
        if not self.alive:
            raise ContenderError(self._last_words())
        self._signal("SIGCONT")
        try:
            answer = self._exchange({"verb": verb, **arguments})
        finally:
            self._stop()
        if "error" in answer:
            raise ContenderError(answer["error"])
        return answer

    def close(self) -> None:
        """End the child at once; a second call does nothing."""
        if self.alive:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None and not stream.closed:
                stream.close()

    def _start(self) -> subprocess.Popen[bytes]:
        setup = {
            "name": self.name if not self.name.endswith(".py") else str(Path(self.name).resolve()),
            "threads": self.threads,
            "device": self.device,
            "parent": os.getpid(),
            "bare": VARIANTS.get(self.name, (self.name,))[0] != "rnnfast" and not self.name.endswith(".py"),
            "sys_path": sys.path,
            "package_path": list(package_path),
        }
        return subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, json.dumps(setup)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=child_environment(self.threads, self.device),
            bufsize=0,
        )

    def _exchange(self, request: dict[str, Any]) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps(request).encode() + b"\n")
        except BrokenPipeError:
            raise ContenderError(self._last_words()) from None
        limit = float(os.environ.get(_TIMEOUT, _TIMEOUT_SECONDS))
        if not select.select([stdout], [], [], limit)[0]:
            self._process.kill()
            raise ContenderError(f"no answer to {request['verb']!r} in {limit:g} s")
        line = stdout.readline()
        if not line.endswith(b"\n"):
            self._process.wait()
            raise ContenderError(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _stop(self) -> None:
        """Stop the child, and wait until all its threads have stopped."""
        self._signal("SIGSTOP")
        if hasattr(os, "waitid") and self.alive:
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def _signal(self, name: str) -> None:
        """Windows has no such signals: there the idle contenders go on spinning."""
        if hasattr(signal, name) and self.alive:
            self._process.send_signal(getattr(signal, name))

    def _last_words(self) -> str:
        self._log.seek(0)
        words = self._log.read().decode(errors="replace").strip().splitlines()
        ending = f": {words[-1]}" if words else ""
        return f"the process ended with status {self._process.returncode}{ending}"


def child_environment(threads: int, device: str) -> dict[str, str]:
    """This process's environment with the thread counts set and waiting policies left to each library's default."""
    environment = {name: value for name, value in os.environ.items() if name not in _WAIT_VARIABLES}
    environment.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))
    if threads == 1:
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
    if device == "cpu":
        environment["JAX_PLATFORMS"] = "cpu"
    return environment
