"""The extension `rnnfast._cuda`, whether it can run here, and the arrays that rnnfast's own layers have on a device."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np

# Tests of the emulated engine set this: NumPy arrays and PyTorch's CPU tensors then count as the device's.
emulate = False


@lru_cache(maxsize=1)
def load() -> Any:
    return import_module("rnnfast._cuda")


def unavailable() -> str | None:
    """Why nothing can run on a CUDA device, or None."""
    return None if emulate else _missing()


@lru_cache(maxsize=1)
def _missing() -> str | None:
    try:
        engine = load()
    except ModuleNotFoundError:
        return "this build has no rnnfast._cuda (RNNFAST_CUDA=ON pip install . makes it)"
    except ImportError as error:
        return f"rnnfast._cuda cannot be imported: {error}"
    if engine.emulated:
        return "rnnfast._cuda was built with RNNFAST_CUDA=emulate, for tests"
    return None if engine.device_count() else f"no CUDA device: {engine.device_description()}"


def array_module() -> Any:
    """The module of the arrays that rnnfast's own layers have on a device: CuPy."""
    return np if emulate else import_module("cupy")


def no_array_module() -> str | None:
    """Why there is none, or None."""
    try:
        array_module()
    except ImportError as error:
        return f"CuPy cannot be imported, pip install cupy-cuda13x ({error})"
    return None
