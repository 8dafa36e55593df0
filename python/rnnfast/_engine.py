"""Loads the engine, and with it the OpenMP runtime unless another library (PyTorch) has brought it already."""

from __future__ import annotations

import os

# GNU's runtime lets idle threads spin 300,000 times, some 8 ms, before they sleep: a stream that takes a step every 10 ms would
# keep another core busy with nothing. This is about half a millisecond, within which the next call of a loop comes; a thread
# that sleeps takes some 0.1 ms to wake.
_SPINS = "GOMP_SPINCOUNT"
_IDLE_SPINS = 20_000


def _load() -> None:
    """Import the extension module; how long idle threads spin is set for it, unless the user has said so."""
    said = _SPINS in os.environ or "OMP_WAIT_POLICY" in os.environ
    if not said:
        os.environ[_SPINS] = str(_IDLE_SPINS)  # read once, when the runtime is loaded
    try:
        from . import _core  # noqa: F401
    finally:
        if not said:
            del os.environ[_SPINS]


_load()
