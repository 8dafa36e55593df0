"""Accuracy of the examples that NumPy trains: what others published, what ours reach, and in what time.

`TASKS` maps a name to a function of a seed and of who computes the recurrent layer: "rnnfast", or "torch", that is
torch.nn's (torch_layer.py). The example's own data, model and loop run with the published settings; the test part is
looked at once, at the end. `run.py` calls them.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import harness
from clock import Clock, Stopped

DATA = Path(os.environ.get("RNNFAST_DATA", "data"))


@contextmanager
def layers_of(layer: str) -> Iterator[None]:
    """Let the examples build their models from rnnfast's layers or from torch's."""
    before = dict(harness.CELLS)
    if layer == "torch":
        import torch_layer

        harness.CELLS.update(torch_layer.CELLS)
    try:
        yield
    finally:
        harness.CELLS.update(before)


@dataclass(frozen=True)
class Task:
    """One figure of one example."""

    script: str
    unit: str
    published: float | None
    source: str
    settings: dict[str, Any]
    train: Callable[[Any, Any, Any, Clock], dict[str, Any]]  # module, settings, data to what `__call__` returns
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, seed: int = 0, layer: str = "rnnfast", limit: float | None = None) -> dict[str, Any]:
        module = importlib.import_module(self.script)
        with layers_of(layer):
            settings = module.Settings(**self.settings, seed=seed)
            data = module.load(settings, {"data": None, "limit": None, "tiny": False, **self.options})
            clock = Clock(limit)
            try:
                result = self.train(module, settings, data, clock)
            except Stopped:
                result = clock.figures()
        return {"unit": self.unit, "published": self.published, "source": self.source, "seed": seed, **result}


def trained(module: Any, settings: Any, data: Any, task: Any, clock: Clock) -> harness.Run:
    run = harness.new_run(module.SCRIPT, settings, data)
    harness.train(module.SCRIPT, run, clock.watch(task), None, None, None)
    return run


def figures(run: harness.Run, ours: float) -> dict[str, Any]:
    return {"ours": ours, "validation": run.best, "steps": run.step, "seconds": run.seconds, "test": run.test}


# Chorales ------------------------------------------------------------------------------------------------------------


def chorales(module: Any, settings: Any, data: Any, clock: Clock) -> dict[str, Any]:
    run = trained(module, settings, data, module.Composing(data), clock)
    return figures(run, run.test)


CHUNG = {
    "dropout": 0.0,
    "noise": 0.075,
    "transpose": 0,
    "lr": 0.001,
    "schedule": "constant",
    "steps": 12_000,
    "patience": 10,
}
OURS = {"hidden": 256, "dropout": 0.2, "noise": 0.05, "transpose": 5, "lr": 0.003, "steps": 10_000}
JSB = {"data": DATA / "music/jsb-chorales-quarter.json"}


def chung(cell: str, hidden: int, published: float) -> Task:
    settings = CHUNG | {"cell": cell, "hidden": hidden}
    return Task("music", "nats a step", published, "Chung et al. 2014", settings, chorales, JSB)


# Text ----------------------------------------------------------------------------------------------------------------


def characters(module: Any, settings: Any, data: Any, clock: Clock) -> dict[str, Any]:
    run = trained(module, settings, data, module.Writing(data), clock)
    return figures(run, run.test)


LIBRARY = Task("text_generation", "bits a character", None, "", {}, characters, {"file": None})

# Memory --------------------------------------------------------------------------------------------------------------


def memory(module: Any, settings: Any, data: Any, clock: Clock) -> dict[str, Any]:
    """The grid of learning rates, with clipping; validation chooses. Seconds and steps are those of the whole grid."""

    class Remembering(module.Remembering):
        def flow(self, run: Any, count: int = 20) -> list[float]:
            return []  # not what is asked here, and torch's layer has none

    runs, diverged = [], 0
    for trial in (trial for trial in module.trials(settings) if trial["clip"] is not None):
        run = harness.new_run(module.SCRIPT, settings, data._replace(info=trial))
        try:
            harness.train(module.SCRIPT, run, clock.watch(Remembering(data)), None, None, None)
            runs.append(run)
        except harness.Diverged:
            diverged += 1
    best = min(runs, key=lambda run: run.best)
    whole = {"steps": sum(run.step for run in runs), "seconds": sum(run.seconds for run in runs), "diverged": diverged}
    return figures(best, best.test) | whole | {"lr": best.info["lr"], "guess": module.guess(settings)}


def adding(cell: str, published: float | None) -> Task:
    source = "Bai et al. 2018, T = 600" if published else ""
    return Task("gradient_flow", "squared error", published, source, {"cell": cell, "length": 200}, memory)


def copying(cell: str, length: int, published: float | None, **settings: Any) -> Task:
    source = "Bai et al. 2018" if published else ""
    settings |= {"cell": cell, "task": "copy", "length": length}
    return Task("gradient_flow", "nats a step", published, source, settings, memory)


# Forecasts -----------------------------------------------------------------------------------------------------------


def forecasts(module: Any, settings: Any, data: Any, clock: Clock) -> dict[str, Any]:
    run = trained(module, settings, data, module.Forecasting(data, settings.forecast), clock)
    return figures(run, run.test["model"]["mse"])


ETTH1 = Task(
    script="forecasting",
    unit="squared error",
    published=0.650,
    source="Zhou et al. 2021, LSTMa",
    settings={"cell": "lstm", "forecast": "point", "split": "8640,2880,2880", "evaluate": 200},
    train=forecasts,
    options={"data": DATA / "timeseries/ETTh1.csv"},
)

TASKS = {
    "chorales, tanh RNN 100": chung("rnn", 100, 9.10),
    "chorales, GRU 46": chung("gru", 46, 8.54),
    "chorales, LSTM 36": chung("lstm", 36, 8.67),
    "chorales, LSTM 256, transposed": Task("music", "nats a step", None, "", OURS, chorales, JSB),
    "ETTh1, 24 steps ahead, LSTM 64": ETTH1,
    "characters, Python's library, LSTM 128": LIBRARY,
    "adding, T = 200, GRU": adding("gru", 5e-5),
    "adding, T = 200, LSTM": adding("lstm", 0.16),
    "adding, T = 200, tanh RNN": adding("rnn", 0.18),
    "adding, T = 200, ReLU RNN": adding("relu", None),
    "adding, T = 200, IRNN": adding("irnn", None),
    "copy, T = 20, GRU": copying("gru", 20, None, steps=16_000, evaluate=1000),
    "copy, T = 20, LSTM": copying("lstm", 20, None, steps=16_000, evaluate=1000),
    "copy, T = 20, tanh RNN": copying("rnn", 20, None, steps=16_000, evaluate=1000),
    "copy, T = 1000, GRU": copying("gru", 1000, 0.0204, steps=4000, evaluate=250, rates="0.01"),
    "copy, T = 1000, LSTM": copying("lstm", 1000, 0.0204, steps=4000, evaluate=250, rates="0.01"),
    "copy, T = 1000, tanh RNN": copying("rnn", 1000, 0.0204, steps=4000, evaluate=250, rates="0.01"),
}
