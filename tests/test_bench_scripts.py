"""The scripts under bench/ that measure by themselves: they run, and their records say what they should."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).parent.parent / "bench"


def run(script: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, BENCH / script, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def splits() -> ModuleType:
    spec = importlib.util.spec_from_file_location("splits", BENCH / "splits.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_splits_times_what_is_possible(splits: ModuleType, restore_sharing: None) -> None:
    import rnnfast

    rnnfast.set_num_threads(2)
    shape: dict[str, Any] = {"cell": "gru", "T": 8, "B": 2, "I": 32, "H": 32, "layers": 2, "bidirectional": False}
    found = list(splits.rows(shape, rounds=1))
    assert [row["mode"] for row in found] == ["train", "infer"]
    for row in found:
        assert set(row["seconds"]) == {"one", "batch", "hidden", "layers"}
        assert row["choice"] in row["seconds"]
        assert row["ratio"] == row["seconds"][row["choice"]] / min(row["seconds"].values()) >= 1


def test_splits_leaves_out_what_falls_back_to_one_thread(splits: ModuleType, restore_sharing: None) -> None:
    import rnnfast

    rnnfast.set_num_threads(2)
    shape: dict[str, Any] = {"cell": "rnn", "T": 8, "B": 1, "I": 32, "H": 32, "layers": 1, "bidirectional": False}
    assert set(next(splits.rows(shape, rounds=1))["seconds"]) == {"one", "hidden"}


def test_steps(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    target = tmp_path / "steps.json"
    assert "torch.nn" in run("steps.py", "--calls", "10", "--json", str(target))
    rows = json.loads(target.read_text())["rows"]
    assert len(rows) == 6 * 2 * 3
    for row in rows:
        assert row["ratio"] == row["torch_us"] / row["rnnfast_us"] > 0


def test_streams(tmp_path: Path) -> None:
    target = tmp_path / "streams.json"
    assert "p99" in run("streams.py", "--steps", "100", "--json", str(target))
    rows = json.loads(target.read_text())["rows"]
    assert len(rows) == 12
    for row in rows:
        assert 0 < row["p50_us"] <= row["p99_us"] <= row["max_us"]
        assert abs(row["memory_bytes"]) < 1024


def test_mixed_programs(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    target = tmp_path / "mixed.json"
    run("mixed.py", "--seconds", "0.01", "--repeats", "1", "--shape", "4,2,8", "--json", str(target))
    rows = json.loads(target.read_text())["rows"]
    assert [row["program"] for row in rows] == ["model", "blas", "two processes", "threads"]
    for row in rows:
        assert row["torch_s"] > 0 < row["rnnfast_s"]
