"""A limit for a training that is run for its time alone: it stops there, and says how many steps were made in it."""

from __future__ import annotations

import math
import time
from typing import Any


class Stopped(Exception):
    """The time is over."""


class Clock:
    """Counts the steps of one training, or of all that a task makes, and stops them after `limit` seconds."""

    def __init__(self, limit: float | None = None) -> None:
        self.limit = math.inf if limit is None else limit
        self.steps = 0
        self.seconds = 0.0
        self.began: float | None = None

    def watch(self, task: Any) -> Any:
        """The same harness.Task, whose steps are counted; no step is cut."""
        learn = task.learn

        def counted(*arguments: Any) -> Any:
            now = time.monotonic()
            self.began = now if self.began is None else self.began
            self.seconds = now - self.began
            if self.seconds > self.limit:
                raise Stopped
            self.steps += 1
            return learn(*arguments)

        task.learn = counted
        return task

    def figures(self) -> dict[str, Any]:
        """What is known of a training that was stopped: no figure, but its pace, validations included."""
        return {"ours": None, "stopped": True, "steps": self.steps, "seconds": self.seconds}
