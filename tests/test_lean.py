"""Lean mode and checkpoints: the same bits as the full mode, for less memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import rnnfast
from conftest import RunPython, Sharing
from reference_cases import Arrays, Case, make, named, options
from rnnfast import functional
from test_kernels import CELLS, VARIANTS, assert_same, case_of, variants


def everything(case: Case, arrays: Arrays, times: int = 1, **memory: Any) -> dict[str, Any]:
    """All results of a forward and `times` backward calls, the last one's gradients."""
    output, state, *states, ctx = functional.forward(
        case.cell, arrays.x, arrays.hx, arrays.weights, **options(case, arrays), **memory
    )
    for left in reversed(range(times)):
        grad_x, grad_state, grad_weights = functional.backward(
            ctx, arrays.grad_output, arrays.grad_state, grad_states=arrays.grad_states, record=True, retain=left > 0
        )
    found = {"output": output, **named("state", state), **named("states", states[0] if states else None)}
    found |= {"grad_x": grad_x, "grad_h": ctx.grad_h, **named("grad_state", grad_state)}
    found |= {f"grad_weight {i}": g for i, g in enumerate(grad_weights)}
    return found | named("grad_reset_state", ctx.grad_reset_state)


@pytest.mark.parametrize("case", variants())
def test_same_bits(case: Case, few_sharings: Sharing) -> None:
    arrays = make(case)
    full = everything(case, arrays)
    for memory in ({"lean": True}, {"checkpoint_every": 1}, {"checkpoint_every": 4}, {"checkpoint_every": 10**6}):
        assert_same(everything(case, arrays, **memory), full)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_same_bits_over_many_segments(cell: str, bidirectional: bool, dtype: str, sharing: Sharing) -> None:
    """Batches large enough that blocks of the gradient products have a few steps, and that segments have several blocks."""
    changes: dict[str, Any] = {"lengths": True, "reset": 0.1, "reset_state": "rows", "num_layers": 2, "dropout": 0.2}
    for T, B in ((61, 40), (300, 3)):
        case = case_of(cell, T=T, B=B, I=5, H=21, bidirectional=bidirectional, dtype=dtype, **changes)
        arrays = make(case)
        full = everything(case, arrays)
        for every in (1, 7, 150):
            assert_same(everything(case, arrays, checkpoint_every=every), full)


@pytest.mark.parametrize("cell", CELLS)
def test_same_bits_where_layers_would_run_at_once(cell: str, restore_sharing: None) -> None:
    """Which lean mode cannot: what the model takes in its place may not cut the batch either."""
    Sharing("", 2).use()
    for T, B in ((30, 2), (33, 1), (61, 5)):
        case = case_of(cell, T=T, B=B, I=32, H=32, num_layers=2, return_states=False, dtype="float32")
        arrays = make(case)
        full = everything(case, arrays)
        for memory in ({"lean": True}, {"checkpoint_every": 5}):
            assert_same(everything(case, arrays, **memory), full)


@pytest.mark.parametrize("cell", CELLS)
def test_retain(cell: str, few_sharings: Sharing) -> None:
    """A backward leaves the reserve of the lean mode as it was."""
    case = case_of(cell, **VARIANTS["everything"])
    arrays = make(case)
    assert_same(everything(case, arrays, times=3, checkpoint_every=3), everything(case, arrays))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_reserve(dtype: str) -> None:
    T, B, I, H = 3000, 8, 3, 64  # noqa: E741
    size = np.dtype(dtype).itemsize

    def kept(cell: str, **memory: Any) -> float:
        gates = functional.CELLS[cell].gates
        weights = [np.zeros(s, dtype) for s in ((gates * H, I), (gates * H, H), (gates * H,), (gates * H,))]
        context = functional.forward(cell, np.zeros((T, B, I), dtype), None, weights, **memory)[-1]
        return float(context.nbytes / (T * B * H * size))

    assert 4.9 < kept("lstm") < 5.1
    assert 0 < kept("lstm", lean=True) < 0.2
    assert kept("lstm", checkpoint_every=1000) < 0.01
    assert kept("gru", lean=True) < 0.01


def test_modules(few_sharings: Sharing) -> None:
    x = np.random.default_rng(0).standard_normal((50, 4, 3)).astype(np.float32)
    gradients = []
    for memory in ({}, {"lean": True}, {"checkpoint_every": 5}):
        layer = rnnfast.LSTM(3, 16, 2, dropout=0.5, proj_size=7, seed=1)
        output, _ = layer(x, **memory)
        grad_x, _ = layer.backward(np.ones_like(output))
        gradients.append([output, grad_x, *(p.grad for p in layer.parameters())])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("memory", "error"),
    [
        ({"lean": 1.5}, TypeError),
        ({"lean": "yes"}, TypeError),
        ({"checkpoint_every": 0}, ValueError),
        ({"checkpoint_every": -3}, ValueError),
        ({"checkpoint_every": 2**70}, ValueError),
        ({"checkpoint_every": 2.0}, TypeError),
        ({"checkpoint_every": True}, TypeError),
    ],
)
def test_bad_options(memory: dict[str, Any], error: type[Exception]) -> None:
    layer = rnnfast.GRU(3, 4, seed=0)
    with pytest.raises(error, match=next(iter(memory))):
        layer(np.zeros((2, 1, 3), np.float32), **memory)


MILLION = """
import resource, sys
import numpy as np, rnnfast
T, H = 1_000_000, 16
layer = rnnfast.LSTM(4, H, seed=0)
x = np.zeros((T, 1, 4), np.float32)
x[::1000] = 1
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
output, _ = layer(x, checkpoint_every=2000)
arrays = output.nbytes * 2  # the caller's own: the output and its gradient
layer.backward(np.ones_like(output), need_grad_x=False)
assert np.isfinite(layer.weight_hh_l0.grad).all() and layer.weight_hh_l0.grad.any()
used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
assert used < arrays + 40e6, (used, arrays)
"""


def test_a_million_steps_in_bounded_memory(run_python: RunPython) -> None:
    run_python(MILLION)
