"""What this machine can do, measured in a process of its own before the rows: sgemm and read bandwidth by NumPy.

(The FMA peak comes from the engine's own loop, `rnnfast._core.fma_peak`.)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

_GEMM_SIZE = 1536
_GEMM_SECONDS = 0.4
_READ_SECONDS = 0.05
_MEMORY_BYTES = 256 * 2**20
_DEFAULT_CACHES = {2: 2**20, 3: 32 * 2**20}


def gemm_gflops(dtype: str) -> float:
    """The best of NumPy's large products, with the threads that this process was started with."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((_GEMM_SIZE, _GEMM_SIZE)).astype(dtype) for _ in range(2))
    out = np.empty_like(a)
    seconds = _best(lambda: np.matmul(a, b, out=out), _GEMM_SECONDS)
    return 2.0 * _GEMM_SIZE**3 / seconds / 1e9


def read_levels(threads: int) -> list[tuple[str, float, float]]:
    """(name, bytes for each thread, bytes a second of all threads together) of L2, L3 and memory.

    This process must have been started with one BLAS thread: each Python thread reads an array of its own.
    """
    sizes = cache_sizes()
    shares = {"L2": sizes[2], "L3": sizes[3] // threads}
    levels = [(name, float(share), _read(share // 2, threads)) for name, share in shares.items() if share]
    return [*levels, ("memory", float("inf"), _read(_MEMORY_BYTES // threads, threads))]


def cache_sizes() -> dict[int, int]:
    """Bytes of the unified caches by level, as the first core sees them; a usual size where the system does not say."""
    sizes = dict(_DEFAULT_CACHES)
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            kind, level, size = ((index / name).read_text().strip() for name in ("type", "level", "size"))
            if kind == "Unified" and size.endswith("K"):
                sizes[int(level)] = int(size[:-1]) * 1024
        except (OSError, ValueError):
            continue
    return sizes


def _read(size: int, threads: int) -> float:
    """Bytes a second of `threads` threads that each read `size` bytes again and again, as a dot product does."""
    values = min(size, _MEMORY_BYTES) // 8
    pairs = [(np.ones(values, np.float32), np.ones(values, np.float32)) for _ in range(threads)]

    def read(pair: tuple[np.ndarray, np.ndarray]) -> float:
        return _best(lambda: np.dot(*pair), _READ_SECONDS)

    with ThreadPoolExecutor(threads) as pool:
        return sum(8.0 * values / seconds for seconds in pool.map(read, pairs))


def _best(call: Callable[[], object], budget: float) -> float:
    """Seconds of the fastest of as many calls as fit into `budget` seconds (two at least, the first not counted)."""
    call()
    best, end = float("inf"), time.perf_counter() + budget
    while True:
        start = time.perf_counter()
        call()
        now = time.perf_counter()
        best = min(best, now - start)
        if now >= end:
            return best
