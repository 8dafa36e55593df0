"""The instruction set that is asked for is the one that runs, and all agree."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from rnnfast import _core

SCRIPT = """
import sys, numpy as np, rnnfast
from rnnfast import _core
rng = np.random.default_rng(0)
lstm = rnnfast.LSTM(7, 33, 2, bidirectional=True, dtype="float64", seed=3)
x = rng.standard_normal((9, 5, 7))
y, _ = lstm(x, lengths=[9, 0, 4, 7, 1])
grad_x, _ = lstm.backward(rng.standard_normal(y.shape))
np.savez(sys.argv[1], isa=_core.isa(), y=y, grad_x=grad_x, grad_w=lstm.weight_hh_l1.grad)
"""


def run(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "RNNFAST_ISA": isa}
    command = [sys.executable, "-c", SCRIPT, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_each_runs_and_agrees(tmp_path) -> None:
    results = {}
    for isa in _core.isas():
        done = run(isa, str(tmp_path / isa))
        assert done.returncode == 0, done.stderr
        results[isa] = np.load(tmp_path / f"{isa}.npz")
        assert str(results[isa]["isa"]) == isa
    truth = results["scalar"]
    for isa, found in results.items():
        for name in ("y", "grad_x", "grad_w"):
            error = np.abs(found[name] - truth[name]).max() / np.abs(truth[name]).max()
            assert error <= 1e-13, (isa, name)


@pytest.mark.parametrize("isa", ["sse9", "AVX2", "avx2 "])
def test_unknown_is_refused(isa: str) -> None:
    done = run(isa, "unused")
    assert done.returncode != 0
    assert "RNNFAST_ISA: expected one of" in done.stderr
    assert isa in done.stderr


def test_the_best_comes_first() -> None:
    assert _core.isas()[-1] == "scalar"
    assert set(_core.isas()) <= set(_core.compiled_isas())
