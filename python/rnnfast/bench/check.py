"""Is the result right? Every tensor of every contender is held to `rnnfast.reference` in float64 before it is timed.

The tolerances catch a wrong result, they do not rank accuracy: that is what the tests and bench/accuracy are for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import reference
from .arrays import Array, Arrays
from .gpu import torch_device
from .rows import Row

# Normwise, (output and states, gradients). A float32 gradient of a weight sums T*B products in an order of its own.
TOLERANCES = {
    "float64": (1e-12, 1e-11),
    "float32": (2e-5, 2e-4),
    "float16": (2e-2, 5e-2),
    "bfloat16": (1e-1, 2e-1),
}


# The derivative of ReLU jumps at 0: where rounding turns the sign of one pre-activation among millions, the gradient of
# one step changes at once. There the error is that of the 2-norm, and a wrong gradient is still far outside.
_KINK_TOLERANCE = 1e-2


def has_kink(row: Row, tensor: str) -> bool:
    return row.cell == "rnn_relu" and row.dtype != "float64" and tensor.startswith("grad")


def tolerance(row: Row, tensor: str) -> float:
    """What the error of the named tensor may be, e.g. "hn" or "grad_x"."""
    usual = TOLERANCES[row.dtype][tensor.startswith("grad")]
    return max(usual, _KINK_TOLERANCE) if has_kink(row, tensor) else usual


def compute_truth(row: Row, arrays: Arrays, device: str = "cpu") -> dict[str, Array]:
    """The float64 results of `row` by name, as `rivals.Job.result` returns them.

    On "cuda" the reference runs on torch tensors there: the same equations, in seconds where NumPy takes minutes.
    """
    send, fetch = _transfers(device)
    exact = arrays.astype("float64")
    states = tuple(send(state) for state in exact.hx)
    output, state, ctx = reference.forward(
        row.engine_cell,
        send(exact.x),
        states if row.cell == "lstm" else states[0],
        [send(weight) for weight in exact.weights.values()],
        num_layers=row.layers,
        bidirectional=row.bidirectional,
        training=row.mode == "train",
        lengths=exact.lengths,
        reset=exact.reset,
    )
    results = {"output": output, **dict(zip(("hn", "cn"), state if row.cell == "lstm" else (state,), strict=False))}
    if row.mode == "train":
        grad_x, _, grad_weights = reference.backward(ctx, send(exact.grad_output))
        results["grad_x"] = grad_x
        results |= {f"grad_{name}": grad for name, grad in zip(exact.weights, grad_weights, strict=True)}
    return {name: fetch(value) for name, value in results.items()}


def _transfers(device: str) -> tuple[Any, Any]:
    if device == "cpu":
        return (lambda array: array), (lambda array: array)
    import torch

    place = torch_device(device)
    return (lambda array: torch.from_numpy(array).to(place)), (lambda tensor: tensor.cpu().numpy())


def normwise_error(found: Array, truth: Array, order: float = math.inf) -> float:
    """|found - truth| / |truth| in the maximum norm (or 2-norm); infinite for a wrong shape, a NaN or an infinity."""
    if found.shape != truth.shape:
        return math.inf
    if truth.size == 0:
        return 0.0
    difference = float(np.linalg.norm((found.astype(np.float64) - truth).ravel(), order))
    scale = float(np.linalg.norm(truth.ravel(), order))
    if difference == 0.0:
        return 0.0
    return difference / scale if math.isfinite(difference) and scale > 0 else math.inf


def errors(row: Row, found: Mapping[str, Array], truth: Mapping[str, Array]) -> dict[str, float]:
    """The error of every tensor of the truth; a missing one is infinitely wrong."""
    orders = {name: 2 if has_kink(row, name) else math.inf for name in truth}
    return {n: normwise_error(found[n], truth[n], orders[n]) if n in found else math.inf for n in truth}


def mismatches(row: Row, found: Mapping[str, float]) -> list[str]:
    """The tensors that are out of tolerance, in words."""
    return [
        f"{name}: error {error:.1e}, tolerance {tolerance(row, name):.0e}"
        for name, error in found.items()
        if not error <= tolerance(row, name)
    ]
