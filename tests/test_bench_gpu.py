"""The benchmark of the GPU where there is none: its rules, its records, and the way of a row with stand-ins for the device."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import rnnfast
from rnnfast import _device, functional
from rnnfast._device import extension
from rnnfast.bench import gpu, records, session, suites
from rnnfast.bench.clock import EventClock, HostClock
from rnnfast.bench.contender import Contender, ContenderError
from rnnfast.bench.rivals import Setup
from rnnfast.bench.rows import Row
from rnnfast.bench.worker import Worker, time_batch

_cuda: Any = import_module("rnnfast._cuda") if find_spec("rnnfast._cuda") else None
needs_emulator = pytest.mark.skipif(
    _cuda is None or not _cuda.emulated, reason="rnnfast._cuda is not built with RNNFAST_CUDA=emulate"
)

BEST_BOX = Row("gpu", "best", "lstm", "infer", T=256, B=16, I=768, H=768, dtype="float16", device="cuda")
SMALL = Row("gpu", "small", "lstm", "train", T=4, B=3, I=5, H=8, device="cuda")
HERE = {"date": "2026-01-02", "commit": "abc", "gpu": "a GPU"}


# ---- cuDNN's regions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "region"),
    [
        ({}, "persistent"),
        ({"mode": "train"}, "persistent"),
        ({"dtype": "bfloat16"}, "a launch a step"),
        ({"cell": "gru"}, "a launch a step"),
        ({"layers": 2}, "a launch a step"),
        ({"bidirectional": True}, "a launch a step"),
        ({"B": 12}, "a launch a step"),
        ({"B": 136}, "a launch a step"),
        ({"I": 100}, "a launch a step"),
        ({"H": 1152}, "a launch a step"),
        ({"cell": "rnn", "H": 896, "B": 96}, "a launch a step"),
        ({"cell": "rnn", "H": 896, "B": 88}, "persistent"),
        ({"ragged": 0.5}, "packed"),
        ({"H": 192, "dtype": "float32"}, "small H"),
        ({"H": 193, "dtype": "float32"}, "a launch a step"),
        ({"H": 192, "dtype": "float32", "mode": "train"}, "a launch a step"),
        ({"H": 128, "dtype": "float32", "mode": "train"}, "small H"),
        ({"H": 384, "cell": "rnn_relu"}, "small H"),
        ({"H": 128, "dtype": "float64"}, "a launch a step"),
    ],
)
def test_regions(changes: dict[str, Any], region: str) -> None:
    assert gpu.cudnn_region(BEST_BOX.with_(**changes)) == region


def test_the_suite_has_rows_of_every_region() -> None:
    rows = suites.rows_of("gpu")
    found = Counter(gpu.cudnn_region(row) for row in rows)
    assert found.keys() == set(gpu.REGIONS)
    assert min(found.values()) >= 10
    assert {row.dtype for row in rows} == {"float32", "float64", "float16", "bfloat16"}
    assert {row.mode for row in rows} == {"infer", "train", "step"}
    assert len(suites.gpu_grid()) == len(set(suites.gpu_grid()))


def test_the_suite_has_what_it_is_to_show() -> None:
    """Each cell with and without the input product, ragged, in both directions, streamed; DeepBench; in about 150 rows."""
    rows = suites.rows_of("gpu")
    assert 130 <= len(rows) == len(set(rows)) <= 170
    there = {(r.family, r.mode, r.dtype, r.T, r.B, r.I, r.H, bool(r.ragged), r.bidirectional) for r in rows}
    for cell in ("lstm", "gru", "rnn"):
        for mode in ("infer", "train"):
            for dtype in ("float32", "bfloat16"):
                for input_size in (8, 256):
                    assert (cell, mode, dtype, 256, 64, input_size, 256, False, False) in there
                assert (cell, mode, dtype, 200, 64, 256, 256, True, False) in there
            assert (cell, mode, "bfloat16", 200, 32, 256, 256, False, True) in there
            for dtype in ("float32", "float16"):
                assert any(key[:3] == (cell, mode, dtype) for key in there)
        assert (cell, "step", "float32", 1, 1, 128, 128, False, False) in there
    deepbench = [("lstm", 25, b, h) for b in (16, 64, 128) for h in (512, 1024, 2048)]
    deepbench += [("lstm", 150, 64, 256), ("gru", 1500, 32, 1024), ("rnn", 50, 32, 1760)]
    for cell, steps, batch, size in deepbench:
        for mode in ("infer", "train"):
            for dtype in ("float32", "float16"):
                assert (cell, mode, dtype, steps, batch, size, size, False, False) in there


# ---- records -------------------------------------------------------------------------------------------------------


def record(row: Row, library: str, seconds: float) -> records.Record:
    return records.make_record(row, library, "1", [seconds], 0.0, None)


def test_runs_add_up() -> None:
    """Of a row that was measured again all old records go, whatever the library; other rows keep their date and commit."""
    first = records.merge([], [record(BEST_BOX, "rnnfast", 1.0), record(BEST_BOX, "torch", 2.0)], HERE)
    first += records.merge([], [record(SMALL, "rnnfast", 3.0)], HERE)
    later = HERE | {"date": "2026-02-03", "commit": "def"}
    found = records.merge(first, [record(BEST_BOX, "rnnfast", 0.5)], later)
    assert [(r["name"], r["library"], r["median_s"], r["date"], r["commit"]) for r in found] == [
        ("small", "rnnfast", 3.0, "2026-01-02", "abc"),
        ("best", "rnnfast", 0.5, "2026-02-03", "def"),
    ]
    assert [r["region"] for r in found] == ["small H", "persistent"]


def test_records_of_two_gpus_are_not_merged() -> None:
    first = records.merge([], [record(BEST_BOX, "rnnfast", 1.0)], HERE)
    with pytest.raises(ValueError, match="earlier records of another, got one of a GPU"):
        records.merge(first, [record(SMALL, "rnnfast", 1.0)], HERE | {"gpu": "another"})


# ---- the clocks ----------------------------------------------------------------------------------------------------


class FakeDevice:
    """A timeline that only calls move, and events on it: what `torch.cuda` is to the clock."""

    def __init__(self) -> None:
        self.now, self.waits = 0.0, 0

    def synchronize(self) -> None:
        self.waits += 1

    def Event(self, enable_timing: bool) -> Any:
        assert enable_timing
        event = SimpleNamespace(at=0.0, synchronize=self.synchronize)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda end: (end.at - event.at) * 1e3
        return event

    def work(self) -> None:
        self.now += 0.25


def test_events_time_the_device() -> None:
    device = FakeDevice()
    job = SimpleNamespace(call=device.work, clock=EventClock(device))
    assert time_batch(job, 8) == pytest.approx(0.25)
    assert device.waits == 2  # before the first call, and for the last one's event


def test_the_hosts_clock_waits_for_the_device() -> None:
    device = FakeDevice()
    assert time_batch(SimpleNamespace(call=device.work, clock=HostClock(device.synchronize)), 2) >= 0  # type: ignore[arg-type]
    assert device.waits == 2


# ---- the way of a row, with PyTorch's CPU tensors and the emulated engine ------------------------------------------


class InProcess:
    """What `contender.Contender` is, without a process: the answers go through JSON as they would."""

    alive = True

    def __init__(self, name: str, threads: int, device: str = "cpu") -> None:
        self.name, self.version = name, "1"
        self._worker = Worker(name, Setup(threads, device))

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def open(self) -> Any:
        return self.ask("open")["reason"]

    def ask(self, verb: str, **arguments: Any) -> Any:
        return json.loads(json.dumps(getattr(self._worker, verb)(**arguments)))


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch, restore_sharing: None) -> Iterator[None]:
    pytest.importorskip("torch")
    monkeypatch.setattr(extension, "emulate", True)
    monkeypatch.setattr(gpu, "stand_in", True)
    monkeypatch.setattr(session, "Contender", InProcess)
    monkeypatch.setattr(session, "_BATCH_SECONDS", 1e-4)
    functional.stack.cache_clear()
    gc.freeze()  # garbage is collected before each batch: of the batches, not of all that pytest has
    yield
    gc.unfreeze()
    functional.stack.cache_clear()
    rnnfast.set_tf32(False)  # which the contender of that name has set


def rows() -> list[Any]:
    found = [
        SMALL.with_(cell=cell, mode=mode, dtype=dtype)
        for cell in ("lstm", "gru", "rnn", "rnn_relu")
        for mode in ("infer", "train")
        for dtype in ("float32", "float64", "float16", "bfloat16")
    ]
    found += [SMALL.with_(ragged=0.5), SMALL.with_(reset=0.3), SMALL.with_(layers=2, bidirectional=True)]
    found += [SMALL.with_(cell=cell, mode="step", T=1, layers=2) for cell in ("lstm", "gru")]
    return [pytest.param(row, id=f"{row.cell}-{row.mode}-{row.dtype}-{n}") for n, row in enumerate(found)]


@needs_emulator
@pytest.mark.parametrize("row", rows())
def test_rows_are_checked_and_timed(row: Row, stand_ins: None) -> None:
    before = _cuda.launches()
    with session.Session(("rnnfast", "torch", "rnnfast-tf32", "torch-tf32"), 1, "cuda", rounds=1) as running:
        assert running.open() == {}
        assert running.measure_machine(["float32"]).machine.peak_gflops == {}
        outcome = running.run(row)
    assert not outcome.failures
    names = ["rnnfast", "torch"] + ["rnnfast-tf32", "torch-tf32"] * (row.dtype == "float32")
    assert [r["library"] for r in outcome.records] == names
    assert {r["region"] for r in outcome.records} == {gpu.cudnn_region(row)}
    assert _cuda.launches() > before, "expected the CUDA engine to run"


@needs_emulator
def test_a_wrong_result_is_not_timed(stand_ins: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from rnnfast.bench.rivals import rnnfast_torch, torch

    ones = lambda self, array: torch.Network.send(self, np.ones_like(array))  # noqa: E731
    monkeypatch.setattr(rnnfast_torch.Network, "send", ones)
    with session.Session(("rnnfast",), 1, "cuda", rounds=1) as running:
        running.open()
        outcome = running.run(SMALL)
    assert outcome.failures
    assert not outcome.records


@needs_emulator
def test_the_script_adds_runs_up(stand_ins: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    """Two runs, the first cut short: the second begins with the row that is missing, and the file has both in the end."""
    path, script = tmp_path / "gpu.json", load_script()
    both = [SMALL, SMALL.with_(dtype="float64"), SMALL.with_(mode="infer")]
    monkeypatch.setattr(script.suites, "rows_of", lambda suite: both)
    times = iter([0.0, 1.0, 99.0])
    with monkeypatch.context() as patch:
        patch.setattr(script, "time", SimpleNamespace(monotonic=lambda: next(times)))
        script.measure_rows.callback(path, 10.0, False)
    assert "2 of 3 rows wait" in capsys.readouterr().out
    first = records.read_json(path)[0]
    assert {record["library"] for record in first} == set(script.CONTENDERS)
    measured = records.row_of(first[0])
    assert script.Growing(path).in_order(both)[-1] == measured
    script.measure_rows.callback(path, 1000.0, False)
    assert {records.row_of(record) for record in records.read_json(path)[0]} == set(both)
    script.table.callback([path, tmp_path / "missing.json"])
    shown = capsys.readouterr().out
    assert "small H" in shown
    assert "times faster than cuDNN" in shown


def test_rows_that_fail_come_last_in_the_next_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also one within which the whole run ended; who comes to an end is no longer among them."""
    path, script = tmp_path / "gpu.json", load_script()
    new, hangs, measured, wrong = (SMALL.with_(H=H) for H in (1, 2, 3, 4))
    monkeypatch.setattr(script.machine, "gpus", lambda: [("a GPU", "1")])
    growing = script.Growing(path)
    for row, why in ((measured, ""), (wrong, "rnnfast: wrong result")):
        growing.begin(row, HERE)
        growing.add([record(row, "torch", 1.0)], HERE, row, why)
    growing.begin(hangs, HERE | {"date": "2026-01-03"})
    again = script.Growing(path)
    assert again.in_order([hangs, wrong, measured, new]) == [new, measured, wrong, hangs]
    assert [r["why"] for r in records.read_failed(path)] == ["rnnfast: wrong result", "it did not come to an end"]
    again.begin(hangs, HERE)
    again.add([record(hangs, "torch", 1.0)], HERE, hangs, "")
    assert [r["H"] for r in records.read_failed(path)] == [4]
    assert {r["H"] for r in records.read_json(path)[0]} == {2, 3, 4}


@pytest.mark.skipif(not hasattr(os, "waitid"), reason="this system has no os.waitid")
def test_a_contender_is_given_up_after_a_while(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RNNFAST_BENCH_TIMEOUT", "0.5")
    rival = tmp_path / "hangs.py"
    rival.write_text("import time\ntime.sleep(60)\n")
    with Contender(str(rival), 1) as contender, pytest.raises(ContenderError, match=r"no answer to 'open' in 0\.5 s"):
        contender.open()


STUB = """#!/bin/sh
# In the place of python: everything succeeds, the two measurements write what they were given and a line more.
case "$1 $2" in
  "bench/gpu.py rows" | "bench/gpu.py scaling") echo "$2 $RNNFAST_COMMIT" >>"$4" ;;
  "bench/gpu.py table") echo "the table" ;;
esac
"""


def test_the_command_adds_runs_up_in_bench_results(tmp_path: Path) -> None:
    """Twice, with all that it starts replaced: the second run begins with what the first has left."""
    root = Path(__file__).resolve().parent.parent
    (tmp_path / "bench" / "results").mkdir(parents=True)
    shutil.copy(root / "bench" / "gpu.sh", tmp_path / "bench")
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(stub), "RNNFAST_COMMIT": "abc"}
    for run in ("first", "second"):
        done = subprocess.run(
            ["bash", tmp_path / "bench" / "gpu.sh", tmp_path / run],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "the table" in done.stdout.partition("======== scaling")[2]
    for name in ("gpu", "scaling"):
        lines = (tmp_path / "bench" / "results" / f"{name}.json").read_text().splitlines()
        assert lines == [f"{'rows' if name == 'gpu' else name} abc"] * 2


def load_script() -> Any:
    source = Path(__file__).resolve().parent.parent / "bench" / "gpu.py"
    spec = spec_from_file_location("bench_gpu_script", source)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_are_spread_over_regions() -> None:
    script = load_script()
    rows = suites.rows_of("gpu")
    chosen = script.spread(rows)
    assert sorted(map(repr, chosen)) == sorted(map(repr, rows))
    assert {gpu.cudnn_region(row) for row in chosen[:20]} == set(gpu.REGIONS)


def test_without_a_device_the_contender_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from rnnfast.bench.rivals import rnnfast as contender

    monkeypatch.setattr(_device, "unavailable", lambda: "no CUDA device: none")
    assert contender.available("cuda") == "device cuda: no CUDA device: none"
    assert contender.available("cpu") is None
