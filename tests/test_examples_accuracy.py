"""bench/accuracy/: README's table, torch.nn's layer in rnnfast's place; no task is trained here."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import rnnfast

FOLDER = Path(__file__).parents[1] / "bench" / "accuracy"


@pytest.fixture
def folder(monkeypatch):
    """bench/accuracy/ and, for its scripts, examples/ on the path."""
    monkeypatch.syspath_prepend(FOLDER.parents[1] / "examples")
    monkeypatch.syspath_prepend(FOLDER)


def record(task, ours, layer="rnnfast", seed=0, seconds=10.0, **more):
    cost = {"seconds": seconds, "steps": 100, "threads": 1, "load_average": 0.5}
    place = {"cpu": "Some CPU", "isa": "avx2", "date": "2026-01-01T00:00"}
    return {"task": task, "published": 9.1, "ours": ours, "layer": layer, "seed": seed, **cost, **place, **more}


PROVENANCE = {"cores": 2, "versions": {"numpy": "2"}}


def test_table(folder):
    run = importlib.import_module("run")
    rows = [record("chorales, GRU 46", 8.4), record("chorales, GRU 46", 8.6, seed=1, seconds=90.0)]
    rows += [record("chorales, GRU 46", 8.4, "torch", seconds=30.0), record("adding, T = 200, LSTM", 0.1)]
    rows += [record("adding, T = 200, IRNN", 0.1)]
    lines = run.table(rows, PROVENANCE).splitlines()
    assert lines[4] == "| chorales, GRU 46 | 9.1 | ≤ 8.69 | 8.5 (8.4 to 8.6) | yes | 2 | 10 | 30 |"
    assert lines[3] == "| adding, T = 200, LSTM | 9.1 | ≤ 0.001 | 0.1 | **no** | 1 | 10 |  |"
    assert lines[2] == "| adding, T = 200, IRNN | 9.1 |  | 0.1 |  | 1 | 10 |  |"
    assert lines[-1].endswith(" Some CPU, avx2; 1 of 2 cores; numpy 2; 2026-01-01.")


def test_table_compares_times_of_one_machine_alone(folder):
    run = importlib.import_module("run")
    other = {"cpu": "Other CPU", "date": "2026-01-02T00:00"}
    rows = [record("prompts", 0.4), record("prompts", 0.6, seed=1, seconds=20.0, **other)]
    assert run.table(rows, PROVENANCE).splitlines()[2].endswith("| 2 | 20¹ |  |")  # the newest
    rows += [record("prompts", 0.4, "torch", seconds=30.0)]
    lines = run.table(rows, PROVENANCE).splitlines()
    assert lines[2].endswith("| 2 | 10² | 30² |")
    assert "¹ Other CPU, avx2; ² Some CPU, avx2; 1 of 2 cores; numpy 2; 2026-01-01 to 2026-01-02." in lines[-1]


def test_table_says_which_times_are_reckoned(folder):
    run = importlib.import_module("run")
    rows = [record("prompts", 0.4), record("prompts", None, "torch", seconds=30.0, steps=25, stopped=True)]
    lines = run.table(rows, PROVENANCE).splitlines()
    assert lines[2].endswith("| 1 | 10 | ≈ 120 |")
    assert "≈: stopped before its end" in lines[-1]


def test_a_clock_stops_all_trainings_of_a_task(folder, monkeypatch):
    clock_module = importlib.import_module("clock")
    now = [0.0]
    monkeypatch.setattr(clock_module.time, "monotonic", lambda: now[0])
    clock, learnt = clock_module.Clock(7.0), []
    for _ in range(2):
        task = clock.watch(SimpleNamespace(learn=lambda *arguments: learnt.append(arguments)))
        for _ in range(2):
            task.learn("run", "batch", 0.1)
            now[0] += 2.0
    with pytest.raises(clock_module.Stopped):
        task.learn("run", "batch", 0.1)
    assert learnt == 4 * [("run", "batch", 0.1)]
    assert clock.figures() == {"ours": None, "stopped": True, "steps": 4, "seconds": 8.0}
    assert not clock_module.Clock().limit < float("inf")


def test_readme_says_what_was_measured(folder):
    run = importlib.import_module("run")
    if not run.RESULTS.exists():
        pytest.skip("bench/results is not part of a source distribution")
    assert run.filled() == (run.ROOT / "README.md").read_text()


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("ragged", [False, True])
def test_torch_layer(folder, cell, ragged):
    pytest.importorskip("torch")
    kinds = importlib.import_module("torch_layer").CELLS
    random = np.random.default_rng(0)
    x, grad = (random.standard_normal((7, 3, size)).astype(np.float32) for size in (4, 5))
    lengths = np.array([7, 2, 5]) if ragged else None
    ours, theirs = ({"lstm": rnnfast.LSTM, "gru": rnnfast.GRU, "rnn": rnnfast.RNN}[cell], kinds[cell])
    ours, theirs = (kind(4, 5, seed=1) for kind in (ours, theirs))
    for _ in range(2):  # the second time after a step
        np.testing.assert_allclose(theirs(x, lengths=lengths)[0], ours(x, lengths=lengths)[0], atol=2e-6)
        for layer in (ours, theirs):
            layer.backward(grad, need_grad_x=False)
        for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
            np.testing.assert_allclose(a.grad, b.grad, atol=2e-5)
        for layer in (ours, theirs):
            rnnfast.optim.SGD(layer.parameters(), lr=0.1).step()
            layer.zero_grad()
    np.testing.assert_allclose(theirs.eval()(x)[0], ours.eval()(x)[0], atol=2e-6)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_torch_layer_carries_its_state_and_gives_the_gradient_by_x(folder, cell):
    pytest.importorskip("torch")
    kinds = importlib.import_module("torch_layer").CELLS
    random = np.random.default_rng(0)
    x, grad = (random.standard_normal((6, 3, size)).astype(np.float32) for size in (4, 5))
    ours, theirs = ({"lstm": rnnfast.LSTM, "gru": rnnfast.GRU, "rnn": rnnfast.RNN}[cell], kinds[cell])
    ours, theirs = (kind(4, 5, seed=1) for kind in (ours, theirs))
    for a, b in zip(rnnfast.tbptt(theirs, x, 3), rnnfast.tbptt(ours, x, 3), strict=True):
        np.testing.assert_allclose(a.output, b.output, atol=2e-6)
        piece = np.ascontiguousarray(grad[a.start : a.stop])
        np.testing.assert_allclose(theirs.backward(piece)[0], ours.backward(piece)[0], atol=2e-5)
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        np.testing.assert_allclose(a.grad, b.grad, atol=2e-5)


def test_torch_layers_are_swapped_and_put_back(folder):
    pytest.importorskip("torch")
    tasks = importlib.import_module("numpy_examples")
    before = dict(tasks.harness.CELLS)
    with tasks.layers_of("torch"):
        assert tasks.harness.CELLS["gru"].__module__ == "torch_layer"
    assert before == tasks.harness.CELLS
    assert "torch_layer" in sys.modules


SMALL = {
    "adding, T = 200, GRU": ("numpy_examples", {"length": 10, "parameters": 100, "steps": 4, "evaluate": 2}),
    "addition": ("torch_examples", {"hidden": 8, "pairs": 300, "steps": 4, "evaluate": 2}),
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("layer", ["rnnfast", "torch"])
def test_tasks_run_and_stop(folder, name, layer):
    pytest.importorskip("torch")
    module, settings = SMALL[name]
    task = importlib.import_module(module).TASKS[name]
    task = dataclasses.replace(task, settings=task.settings | settings)
    whole = task(0, layer)
    assert whole["ours"] > 0.0
    assert whole["steps"] == (8 if name.startswith("adding") else 4)  # of two learning rates
    stopped = task(0, layer, 0.0)
    assert stopped["ours"] is None
    assert stopped["stopped"]
    assert 1 <= stopped["steps"] < whole["steps"]
