"""Contenders: one file a library, the same three verbs in each.

    available(device) -> str | None             why it cannot run here, or None
    version() -> str
    prepare(row, arrays, setup) -> Job          everything that is excluded from the time; raises Unsupported

A contender is named on the command line by its file's name, by one of the `VARIANTS`, or by the path of any Python file
with these verbs. The equations are written here as a user of each library would write them: a rival is not to inherit a
mistake (or a good idea) from this package.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..arrays import Array
from ..clock import Clock, HostClock
from ..rows import Row

VERBS = ("available", "version", "prepare")
LIBRARIES = ("rnnfast", "torch", "onnxruntime", "jax", "numpy")
VARIANTS = {"torch-bf16": ("torch", "bf16"), "torch-tf32": ("torch", "tf32"), "rnnfast-tf32": ("rnnfast", "tf32")}
REDUCED_PRECISION = tuple(VARIANTS)  # timed for information, never held to the row's tolerance

_DISTRIBUTIONS = {"onnxruntime": "onnxruntime onnx"}


class Unsupported(Exception):
    """The library cannot run this row; its message says why. The row goes on without it."""


@dataclass(frozen=True)
class Setup:
    """What a contender is told besides the row: its thread count, its device and its variant's name ("" for none)."""

    threads: int
    device: str = "cpu"
    variant: str = ""


@dataclass
class Job:
    """A prepared row. `call` is what is timed; `result` starts from the initial state and returns what is checked:
    output, hn (cn), and for training grad_x and grad_<weight name>; `clock` times a batch of calls.
    """

    call: Callable[[], Any]
    result: Callable[[], dict[str, Array]]
    clock: Clock = field(default_factory=HostClock)


def is_known(name: str) -> bool:
    return name in LIBRARIES or name in VARIANTS or name.endswith(".py")


def label(name: str) -> str:
    """How a contender is called in tables and records: a file by its name without folder and ending."""
    return Path(name).stem if name.endswith(".py") else name


def how_to_install(name: str) -> str:
    library = VARIANTS.get(name, (name, ""))[0]
    return f"pip install {_DISTRIBUTIONS.get(library, library)}"


def load(name: str) -> tuple[ModuleType, str]:
    """The module of a contender and its variant."""
    if name.endswith(".py"):
        return _load_file(Path(name)), ""
    library, variant = VARIANTS.get(name, (name, ""))
    return importlib.import_module(f"{__name__}.{library}"), variant


def _load_file(path: Path) -> ModuleType:
    wanted = f"contender: expected a Python file with {', '.join(VERBS)} as in rnnfast.bench.rivals, got {path}"
    spec = importlib.util.spec_from_file_location(f"contender_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(wanted)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    missing = [verb for verb in VERBS if not callable(getattr(module, verb, None))]
    if missing:
        raise TypeError(f"{wanted} without {', '.join(missing)}")
    return module


def named_states(row: Row, states: Sequence[Array]) -> dict[str, Array]:
    """The final states by name: hn, and cn for the LSTM."""
    return dict(zip(("hn", "cn"), states, strict=False))


def reset_times(reset: Array) -> list[int]:
    """The steps at which a library without resets must be called anew, t = 0 always among them."""
    return sorted({0, *np.flatnonzero(reset.any(axis=1)).tolist()})
