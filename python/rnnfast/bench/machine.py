"""Where and with what numbers were measured: the provenance that travels in every JSON file."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

RIVAL_DISTRIBUTIONS = ("torch", "onnxruntime", "onnx", "jax", "jaxlib", "cupy-cuda13x", "cupy-cuda12x", "cupy")


def cpu_model() -> str:
    """The processor's own name for itself, and its architecture where it has none."""
    if sys.platform == "darwin":
        name = _output("sysctl", "-n", "machdep.cpu.brand_string")
    else:
        name = _proc_field("model name")
    return name or platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> float:
    """The memory of this machine; infinity where the system does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return math.inf


def load_average() -> float | None:
    """How many threads wanted to run during the last minute; None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def gpus() -> list[tuple[str, str]]:
    """(name, driver) of each NVIDIA device, as the driver's own tool says; empty where there is none."""
    lines = (_output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader") or "").splitlines()
    return [(name.strip(), driver.strip()) for name, _, driver in (line.partition(",") for line in lines) if driver]


def versions(distributions: Iterable[str] = RIVAL_DISTRIBUTIONS) -> dict[str, str]:
    """Python, this package, NumPy, and those of `distributions` that are installed. Nothing is imported."""
    found = {"python": platform.python_version()}
    for name in ("rnnfast", "numpy", *distributions):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of the checkout that this file is tracked in, "+" behind it if files were changed.

    Of an installed package what RNNFAST_COMMIT says: whoever installed it may know. None elsewhere.
    """
    here = Path(__file__)
    git = ("git", "-C", str(here.parent))
    if not _output(*git, "ls-files", "--error-unmatch", here.name):
        return os.environ.get("RNNFAST_COMMIT") or None  # installed, perhaps inside another project's checkout
    changed = _output(*git, "status", "--porcelain", "--untracked-files=no")
    return _output(*git, "rev-parse", "HEAD") + ("+" if changed else "")


def provenance(threads: int, isa: str | None) -> dict[str, Any]:
    """cpu, cores, threads, isa, gpu, driver, versions, commit, date."""
    gpu, driver = next(iter(gpus()), (None, None))
    return {
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "threads": threads,
        "isa": isa,
        "gpu": gpu,
        "driver": driver,
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _proc_field(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def _output(*command: str) -> str:
    """What a command prints, "" where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
