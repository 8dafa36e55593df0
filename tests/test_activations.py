"""tanh and sigmoid of every instruction set: within about 2 units in the last place over all normal numbers, NaN and
infinity right. They are seen through cells whose step is the activation alone, as the kernels compute it and no other way.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from conftest import RunPython
from rnnfast import _core, functional

# Units in the last place. What lies beyond 2 are ties: sigmoid where exp(-x) is near 2^24 (float32) or 2^53 (float64).
LIMIT = {"float32": 2.2, "float64": 2.2}
ROWS = 2**16  # of one call


def rows_of(x: np.ndarray) -> np.ndarray:
    return x[None, :, None]


def tanh(x: np.ndarray) -> np.ndarray:
    """h = tanh(1 * x + 0 * 0): the vanilla RNN with one unit."""
    one, zero = np.ones((1, 1), x.dtype), np.zeros((1, 1), x.dtype)
    return functional.rnn(rows_of(x), None, [one, zero], training=False)[0][0, :, 0]


def gru_gate(x: np.ndarray) -> np.ndarray:
    """h = (1 - z) n + z h0 with n = 0 and h0 = 1 is z = sigmoid(1 * x)."""
    w_ih, w_hh = np.array([[0], [1], [0]], x.dtype), np.zeros((3, 1), x.dtype)
    h0 = np.ones((1, x.size, 1), x.dtype)
    return functional.gru(rows_of(x), h0, [w_ih, w_hh], training=False)[0][0, :, 0]


def lstm_gate(x: np.ndarray) -> np.ndarray:
    """c = f c0 + i g with g = 0 and c0 = 1 is f = sigmoid(1 * x)."""
    w_ih, w_hh = np.array([[0], [1], [0], [0]], x.dtype), np.zeros((4, 1), x.dtype)
    h0, c0 = np.zeros((1, x.size, 1), x.dtype), np.ones((1, x.size, 1), x.dtype)
    return functional.lstm(rows_of(x), (h0, c0), [w_ih, w_hh], training=False)[1][1][0, :, 0]


def sigmoid_truth(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


ACTIVATIONS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "tanh": (tanh, np.tanh),
    "gru": (gru_gate, sigmoid_truth),
    "lstm": (lstm_gate, sigmoid_truth),
}


def float32_values() -> np.ndarray:
    """Every exponent with some 8,000 mantissas, both signs, and two million values more where the functions bend."""
    patterns = np.arange(0x00800000, 0x7F800000, 1021, dtype=np.uint32)
    everywhere = np.concatenate([patterns[::2], patterns[1::2] | 0x80000000]).view(np.float32)
    rng = np.random.default_rng(0)
    bends = rng.uniform(-12, 12, 10**6), rng.standard_normal(10**6), rng.uniform(-90, 90, 10**5)
    return np.concatenate([everywhere, *(b.astype(np.float32) for b in bends)])


def float64_values() -> np.ndarray:
    rng = np.random.default_rng(0)
    sign = rng.choice([-1.0, 1.0], 10**5)
    exponents = sign * 2.0 ** rng.uniform(-1022, 1024, 10**5)
    return np.concatenate(
        [exponents, rng.uniform(-40, 40, 10**5), rng.standard_normal(10**5), rng.uniform(-710, 710, 10**4)]
    )


def worst_ulp(name: str, dtype: str) -> dict[str, float]:
    """The largest error in units in the last place, and where; results below the normal range may be 0 as well."""
    function, truth_of = ACTIVATIONS[name]
    values = float32_values() if dtype == "float32" else float64_values()
    wide = np.float64 if dtype == "float32" else np.longdouble
    tiny, worst = np.finfo(dtype).tiny, {"ulp": 0.0, "x": 0.0}
    for i in range(0, values.size, ROWS):
        x = values[i : i + ROWS]
        with np.errstate(over="ignore", under="ignore"):
            truth = truth_of(x.astype(wide))
            unit = np.spacing(np.maximum(np.abs(truth), tiny).astype(dtype)).astype(wide)
            error = np.abs(function(x).astype(wide) - truth) / unit
        error[(np.abs(truth) < tiny) & (error <= tiny / unit)] = 0
        k = int(np.argmax(error))
        if not error[k] <= worst["ulp"]:  # NaN counts as worse
            worst = {"ulp": float(error[k]), "x": float(x[k])}
    return worst


def biased(cell: str, value: float, dtype: str) -> Any:
    """One gate's sigmoid(value), the value in its bias."""
    gates = functional.CELLS[cell].gates
    zeros, bias = np.zeros((gates, 1), dtype), np.zeros(gates, dtype)
    bias[1] = value
    x, one = np.zeros((1, 1, 1), dtype), np.ones((1, 1, 1), dtype)
    hx = (x, one) if cell == "lstm" else one
    _, state, _ = functional.forward(cell, x, hx, [zeros, zeros, bias, np.zeros(gates, dtype)], training=False)
    return (state[1] if cell == "lstm" else state)[0, 0, 0]


def special_values(dtype: str) -> list[str]:
    """What is wrong at NaN, infinities, zeros and saturation; through the bias, because 0 * inf is NaN."""
    problems = []

    def expect(what: str, found: Any, expected: float) -> None:
        if not np.array_equal(np.asarray(found), np.asarray(expected, dtype), equal_nan=True):
            problems.append(f"{what}: expected {expected}, got {found}")

    big, inf, nan = float(np.finfo(dtype).max), np.inf, np.nan
    for x, expected in ((nan, nan), (inf, 1), (0.0, 0), (-0.0, 0), (big, 1), (50.0, 1)):
        expect(f"tanh({x})", tanh(np.full(1, x, dtype))[0], expected)
        expect(f"tanh({-x})", tanh(np.full(1, -x, dtype))[0], -expected)
    for x, expected in ((nan, nan), (inf, 1), (-inf, 0), (0.0, 0.5), (-0.0, 0.5), (big, 1), (-big, 0), (-800.0, 0)):
        expect(f"sigmoid({x}) in the GRU", biased("gru", x, dtype), expected)
        expect(f"sigmoid({x}) in the LSTM", biased("lstm", x, dtype), expected)
    return problems


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("isa", _core.isas())
def test_within_two_ulp(isa: str, dtype: str, run_python: RunPython) -> None:
    if dtype == "float64" and np.finfo(np.longdouble).nmant <= np.finfo(np.float64).nmant:
        pytest.skip("numpy.longdouble is no wider than float64 here: no truth for float64 activations")
    code = f"""
import json, test_activations as t
from rnnfast import _core
print(json.dumps([_core.isa(), {{n: t.worst_ulp(n, {dtype!r}) for n in t.ACTIVATIONS}}, t.special_values({dtype!r})]))
"""
    used, worst, problems = json.loads(run_python(code, RNNFAST_ISA=isa))
    assert used == isa
    print(isa, dtype, worst)
    limit = LIMIT[dtype]
    assert all(error["ulp"] <= limit for error in worst.values()), worst
    assert not problems
