"""The cases of the self-test, and the comparison of the kernels with the reference on one of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import _device, functional, reference

Array = np.ndarray[Any, Any]
Results = dict[str, Array]

DTYPES = ("float32", "float64")
_EXACT = {"float64": (1e-12, 1e-11)}  # tolerances of output and states, and of gradients
_ULPS = 4  # float32: at least this many units in the last place
_DRAWS = 3  # of the cases with the longest sums, where float32 errs most
# float32: at most so many times the worst error of the reference itself, run in float32. Twice a peer's error over 200
# seeds is the contract, which the tests hold; of these few draws the worst alone varies by another factor of two.
_PEER_FACTOR = 4
_PREACTIVATION = 0.5  # times H**-0.5, the size of the weights: in saturated gates 1 - h*h is all rounding error


@dataclass(frozen=True)
class Case:
    """A shape and the options that differ from a plain forward and backward."""

    seq_len: int
    batch_size: int
    input_size: int
    hidden_size: int
    proj_size: int = 0
    bias: bool = True
    initial: bool = True
    lengths: bool = False
    reset: float = 0.0
    reset_rows: str = ""  # reset_state: "each" row its own, "one" for all, "" zero
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)  # num_layers, bidirectional, ... as `forward` takes them

    @property
    def batch_first(self) -> bool:
        return bool(self.options.get("batch_first"))


def cases(cell: str) -> Iterator[Case]:
    """Odd sizes around the kernels' tiles, then every option alone and together."""
    for shape in ((1, 1, 1, 1), (3, 1, 7, 17), (7, 3, 1, 31), (5, 17, 31, 7), (31, 2, 3, 3)):
        yield Case(*shape)
    for seed in range(_DRAWS):
        yield Case(2, 7, 17, 97, seed=seed)
        yield Case(9, 33, 40, 128, seed=seed)
    yield Case(100, 2, 5, 17)
    yield Case(6, 5, 3, 17, bias=False, initial=False)
    yield Case(6, 5, 3, 17, lengths=True)
    yield Case(6, 5, 3, 17, options={"batch_first": True})
    yield Case(6, 5, 3, 17, options={"return_states": True})
    yield Case(6, 5, 3, 17, options={"num_layers": 3})
    yield Case(6, 5, 3, 17, options={"bidirectional": True})
    yield Case(6, 5, 3, 17, options={"num_layers": 3, "dropout": 0.4, "seed": 5, "call": 2})
    yield Case(9, 5, 3, 17, reset=0.3)
    yield Case(9, 5, 3, 17, reset=0.3, reset_rows="one", options={"bidirectional": True})
    together = {"num_layers": 2, "bidirectional": True, "return_states": True, "dropout": 0.3, "batch_first": True}
    yield Case(9, 7, 5, 31, lengths=True, reset=0.3, reset_rows="each", options=together)
    if reference.CELLS[cell].has_c:
        yield Case(6, 5, 3, 17, proj_size=7)
        yield Case(9, 7, 5, 31, proj_size=17, lengths=True, reset=0.3, reset_rows="each", options=together)


def tolerances(dtype: str, peer: tuple[float, float]) -> tuple[float, float]:
    """For output and states, and for gradients.

    `peer` is the worst error of the reference run in `dtype`, over the cases of all cells.
    """
    if dtype in _EXACT:
        return _EXACT[dtype]
    least = _ULPS * float(np.finfo(dtype).eps)
    return max(least, _PEER_FACTOR * peer[0]), max(least, _PEER_FACTOR * peer[1])


def compare(
    cell: str, case: Case, dtype: str, on_device: bool = False
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Worst normwise errors (forward, gradients) of the kernels, and of the reference run in `dtype`."""
    arguments = _draw(cell, case, dtype)
    truth = _results(reference, cell, case, _as_type(arguments, "float64"))
    kernels = _on_device(cell, case, arguments) if on_device else _results(functional, cell, case, arguments)
    peer = truth if dtype == "float64" else _results(reference, cell, case, arguments)
    return _worst(kernels, truth), _worst(peer, truth)


def normwise_error(found: Array, truth: Array) -> float:
    """max|found - truth| / max|truth|; infinite for a wrong shape or a NaN."""
    if found.shape != truth.shape:
        return math.inf
    difference = float(np.abs(found.astype(np.float64) - truth).max(initial=0.0))
    scale = float(np.abs(truth).max(initial=0.0))
    if difference == 0.0:
        return 0.0
    return difference / scale if math.isfinite(difference) and scale > 0 else math.inf


def _worst(found: Results, truth: Results) -> tuple[float, float]:
    worst = [0.0, 0.0]
    for name, expected in truth.items():
        kind = int(name.startswith("grad"))
        error = normwise_error(found[name], expected) if name in found else math.inf
        worst[kind] = max(worst[kind], error)
    return worst[0], worst[1]


def _results(engine: Any, cell: str, case: Case, arguments: dict[str, Any]) -> Results:
    """All that an engine returns for a case, forward and backward, by name."""
    incoming = arguments["incoming"]
    output, state, *states, ctx = engine.forward(
        cell,
        arguments["x"],
        arguments["hx"],
        arguments["weights"],
        lengths=arguments["lengths"],
        reset=arguments["reset"],
        reset_state=arguments["reset_state"],
        **case.options,
        **reference.CELLS[cell].parameters,
    )
    grad_x, grad_state, grad_weights = engine.backward(
        ctx, incoming["output"], incoming["state"], grad_states=incoming["states"] if states else None, record=True
    )
    found = {"output": output, "grad_x": grad_x, "grad_h": ctx.grad_h}
    named = {"state": state, "states": states[0] if states else None, "grad_state": grad_state}
    named |= {"grad_reset_state": ctx.grad_reset_state, "grad_weights": tuple(grad_weights)}
    for name, value in named.items():
        parts = value if isinstance(value, tuple) else (value,)
        found |= {f"{name}.{k}": part for k, part in enumerate(parts) if part is not None}
    return found


def _on_device(cell: str, case: Case, arguments: dict[str, Any]) -> Results:
    """The CUDA kernels' results, by CuPy."""
    arrays: Any = _device.array_module()
    found = _results(functional, cell, case, _mapped(arguments, arrays.asarray))
    return {name: getattr(arrays, "asnumpy", np.asarray)(value) for name, value in found.items()}


def _draw(cell: str, case: Case, dtype: str) -> dict[str, Any]:
    """The arguments of a case, the same at every call."""
    rng = np.random.default_rng([case.seed, case.seq_len, case.batch_size, case.input_size, case.hidden_size])
    layers, directions = case.options.get("num_layers", 1), 2 if case.options.get("bidirectional") else 1
    sizes = (case.proj_size or case.hidden_size, case.hidden_size)[: 2 if reference.CELLS[cell].has_c else 1]
    steps = (case.batch_size, case.seq_len) if case.batch_first else (case.seq_len, case.batch_size)

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(dtype)

    def state(*leading: int, batch_size: int = case.batch_size) -> Any:
        parts = tuple(normal(*leading, layers * directions, batch_size, size) for size in sizes)
        return parts if len(parts) == 2 else parts[0]

    shapes = reference.weight_shapes(
        cell,
        case.input_size,
        case.hidden_size,
        proj_size=case.proj_size,
        num_layers=layers,
        bidirectional=directions == 2,
        bias=case.bias,
    )
    return {
        "x": normal(*steps, case.input_size),
        "hx": state() if case.initial else None,
        "weights": [
            (normal(*shape) * _PREACTIVATION * case.hidden_size**-0.5).astype(dtype) for shape in shapes.values()
        ],
        "lengths": np.arange(case.batch_size) * case.seq_len // (case.batch_size - 1) if case.lengths else None,
        "reset": rng.random(steps) < case.reset if case.reset else None,
        "reset_state": state(batch_size=1 if case.reset_rows == "one" else case.batch_size)
        if case.reset_rows
        else None,
        "incoming": {
            "output": normal(*steps, directions * sizes[0]),
            "state": state(),
            "states": state(case.seq_len),
        },
    }


def _as_type(value: Any, dtype: str) -> Any:
    return _mapped(value, lambda array: array.astype(dtype))


def _mapped(value: Any, convert: Callable[[Array], Any]) -> Any:
    """A nest of arrays with the floating-point ones converted."""
    if isinstance(value, dict):
        return {name: _mapped(part, convert) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(part, convert) for part in value)
    return convert(value) if isinstance(value, np.ndarray) and value.dtype.kind == "f" else value
