"""What a batch of calls is timed with: the host's clock, or events on the GPU's own timeline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol


class Clock(Protocol):
    """`start`, some calls, `stop`: the seconds in between. Neither returns before the device has done what it was told."""

    def sync(self) -> None: ...
    def start(self) -> None: ...
    def stop(self) -> float: ...


class HostClock:
    """From the first call to the moment when the device has finished the last one, as the caller sees it."""

    def __init__(self, sync: Callable[[], Any] = lambda: None) -> None:
        self.sync = sync
        self._begin = 0.0

    def start(self) -> None:
        self.sync()
        self._begin = time.perf_counter()

    def stop(self) -> float:
        self.sync()
        return time.perf_counter() - self._begin


class EventClock:
    """CUDA events on PyTorch's current stream. Where the host is slower than the device, its gaps count: so they do in use."""

    def __init__(self, cuda: Any) -> None:
        self.sync = cuda.synchronize
        self._begin, self._end = (cuda.Event(enable_timing=True) for _ in range(2))

    def start(self) -> None:
        self.sync()
        self._begin.record()

    def stop(self) -> float:
        self._end.record()
        self._end.synchronize()
        return float(self._begin.elapsed_time(self._end)) / 1e3  # it tells milliseconds
