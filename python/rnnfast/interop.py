"""Weights in other libraries' conventions: PyTorch, ONNX, Keras.

The order of the gates, the transposes and the layout of the biases are here and nowhere else. rnnfast's own convention
is PyTorch's, so that a PyTorch module needs no permutation at all.

    PyTorch   weight_ih [G·H, I], weight_hh [G·H, P]; bias_ih, bias_hh [G·H]
    ONNX      W [D, G·H, I], R [D, G·H, H]; B [D, 2·G·H], the two biases one after the other
    Keras     kernel [I, G·H], recurrent_kernel [H, G·H]; bias [G·H], for the GRU with reset_after [2, G·H]

Sizes: I input_size, H hidden_size, P proj_size or H, D directions, G gates.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from . import cells, layers, modules
from .base import Module
from .modules import RecurrentLayer

__all__ = [
    "from_torch",
    "keras_weights",
    "load_keras_weights",
    "load_onnx_weights",
    "onnx_weights",
    "permutation",
    "reorder_gates",
    "to_torch",
]

# The gates in the order of their blocks, by PyTorch's letters: ONNX and Keras call g "c", and n "h".
# A cell with one gate has no order and no row.
GATE_ORDER = {
    "lstm": {"torch": "ifgo", "onnx": "iofg", "keras": "ifgo"},
    "gru": {"torch": "rzn", "onnx": "zrn", "keras": "zrn"},
}
LIBRARIES = ("torch", "onnx", "keras")


def permutation(cell: str, source: str, target: str) -> tuple[int, ...]:
    """Block k of the target's order is block ``permutation(...)[k]`` of the source's.

    cell: the engine's name, such as "lstm". source, target: "torch", "onnx" or "keras".
    """
    for name, library in (("source", source), ("target", target)):
        if library not in LIBRARIES:
            raise ValueError(f"{name}: expected one of {LIBRARIES}, got {library!r}")
    orders = GATE_ORDER.get(cell)
    return (0,) if orders is None else tuple(orders[source].index(gate) for gate in orders[target])


def reorder_gates(array: np.ndarray, cell: str, source: str, target: str, axis: int = 0) -> np.ndarray:
    """A copy of `array` with the blocks along `axis`, one a gate, in the target's order."""
    order = permutation(cell, source, target)
    if array.shape[axis] % len(order):
        raise ValueError(f"array: expected {len(order)} gates in dimension {axis}, got shape {array.shape}")
    blocks = np.split(array, len(order), axis)
    return np.concatenate([blocks[k] for k in order], axis)


# ONNX ----------------------------------------------------------------------------------------------------------------


def onnx_weights(module: RecurrentLayer, layer: int = 0) -> dict[str, np.ndarray]:
    """The inputs W, R and (with biases) B of the ONNX operator RNN, LSTM or GRU for one layer.

    The GRU operator needs ``linear_before_reset=1``.
    """
    _check_plain(module, layer)
    found: dict[str, list[np.ndarray]] = {"W": [], "R": []}
    for suffix in _suffixes(module, layer):
        weights = {name: p.data for name, p in module.named_parameters(remove_duplicate=False)}
        found["W"].append(_turn(module, weights[f"weight_ih{suffix}"], "torch", "onnx"))
        found["R"].append(_turn(module, weights[f"weight_hh{suffix}"], "torch", "onnx"))
        if module.bias:
            biases = [_turn(module, weights[f"bias_{part}{suffix}"], "torch", "onnx") for part in ("ih", "hh")]
            found.setdefault("B", []).append(np.concatenate(biases))
    return {name: np.stack(parts) for name, parts in found.items()}


def load_onnx_weights(module: RecurrentLayer, weights: Mapping[str, Any], layer: int = 0) -> None:
    """Copy the operator's W, R and B into one layer; B may be missing, which is zero.

    Raises
    ------
    KeyError, ValueError, TypeError
        A name, shape or dtype is not the layer's; nothing has changed.
    """
    _check_plain(module, layer)
    suffixes, rows = _suffixes(module, layer), module.weight_hh_l0.shape[0]
    w, r = (_checked(name, weights[name], (len(suffixes), rows, None)) for name in ("W", "R"))
    b = weights.get("B")
    b = np.zeros((len(suffixes), 2 * rows), module.dtype) if b is None else _checked("B", b, (len(suffixes), 2 * rows))
    state = {}
    for d, suffix in enumerate(suffixes):
        state[f"weight_ih{suffix}"] = _turn(module, w[d], "onnx", "torch")
        state[f"weight_hh{suffix}"] = _turn(module, r[d], "onnx", "torch")
        for part, bias in zip(("ih", "hh"), np.split(b[d], 2), strict=True):
            state[f"bias_{part}{suffix}"] = _turn(module, bias, "onnx", "torch")
    _load_part(module, state)


# Keras ---------------------------------------------------------------------------------------------------------------


def keras_weights(module: RecurrentLayer, layer: int = 0) -> list[np.ndarray]:
    """What ``set_weights`` of the Keras layer SimpleRNN, LSTM or GRU (with ``reset_after``) takes, for one layer.

    Of a bidirectional layer: the forward weights, then the backward ones, as the wrapper Bidirectional has them.
    """
    _check_plain(module, layer)
    found = []
    for suffix in _suffixes(module, layer):
        weights = {name: p.data for name, p in module.named_parameters(remove_duplicate=False)}
        for part in ("ih", "hh"):
            found.append(_turn(module, weights[f"weight_{part}{suffix}"], "torch", "keras").T.copy())
        if module.bias:
            biases = [_turn(module, weights[f"bias_{part}{suffix}"], "torch", "keras") for part in ("ih", "hh")]
            found.append(np.stack(biases) if module.cell == "gru" else biases[0] + biases[1])
    return found


def load_keras_weights(module: RecurrentLayer, weights: Sequence[Any], layer: int = 0) -> None:
    """Copy ``get_weights()`` of the Keras layer into one layer. One bias of Keras' becomes bias_ih; bias_hh is zero.

    Raises
    ------
    ValueError, TypeError
        The number of arrays, a shape or a dtype is not the layer's; nothing has changed.
    """
    _check_plain(module, layer)
    suffixes, rows = _suffixes(module, layer), module.weight_hh_l0.shape[0]
    each = 3 if module.bias else 2
    if len(weights) != each * len(suffixes):
        raise ValueError(f"weights: expected {each * len(suffixes)} arrays, got {len(weights)}")
    state = {}
    for d, suffix in enumerate(suffixes):
        kernel, recurrent, *bias = weights[each * d : each * (d + 1)]
        for part, matrix in (("ih", kernel), ("hh", recurrent)):
            matrix = _checked("weights", matrix, (None, rows))
            state[f"weight_{part}{suffix}"] = _turn(module, matrix.T, "keras", "torch")
        for array in bias:
            if module.cell == "gru" and np.ndim(array) == 1:
                raise ValueError("weights: expected a GRU with reset_after=True (bias [2, 3·H]), got a bias of rank 1")
            array = _checked("weights", array, (2, rows) if module.cell == "gru" else (rows,))
            halves = array if module.cell == "gru" else (array, np.zeros_like(array))
            for part, half in zip(("ih", "hh"), halves, strict=True):
                state[f"bias_{part}{suffix}"] = _turn(module, half, "keras", "torch")
    _load_part(module, state)


def _check_plain(module: Any, layer: int) -> None:
    if not isinstance(module, (modules.RNN, modules.LSTM, modules.GRU)):
        raise TypeError(f"module: expected an RNN, LSTM or GRU, got {type(module).__name__}")
    if module.proj_size:
        raise ValueError(f"module: expected an LSTM without projection, got {module!r}")
    if not 0 <= layer < module.num_layers:
        raise ValueError(f"layer: expected a number from 0 to {module.num_layers - 1}, got {layer}")


def _suffixes(module: RecurrentLayer, layer: int) -> list[str]:
    return [f"_l{layer}", f"_l{layer}_reverse"][: 2 if module.bidirectional else 1]


def _turn(module: RecurrentLayer, array: np.ndarray, source: str, target: str) -> np.ndarray:
    return reorder_gates(array, module.cell, source, target)


def _checked(name: str, value: Any, shape: tuple[int | None, ...]) -> np.ndarray:
    array = np.asarray(value)
    if array.ndim != len(shape) or any(want not in (None, got) for want, got in zip(shape, array.shape, strict=True)):
        raise ValueError(f"{name}: expected shape {shape}, got {array.shape}")
    return array


def _load_part(module: RecurrentLayer, part: Mapping[str, np.ndarray]) -> None:
    """Load some of the parameters, all or nothing. Zero biases that the module does not have are dropped."""
    own = module.state_dict()
    extra = [name for name, value in part.items() if name not in own and np.any(value)]
    if extra:
        raise ValueError(f"weights: expected none of {extra}: the module has bias=False")
    module.load_state_dict({**own, **{name: value for name, value in part.items() if name in own}})


# PyTorch -------------------------------------------------------------------------------------------------------------

# Classes that have the same name, constructor arguments and parameters in both libraries.
TORCH_CLASSES: dict[str, type[Module]] = {
    "RNN": modules.RNN,
    "LSTM": modules.LSTM,
    "GRU": modules.GRU,
    "RNNCell": cells.RNNCell,
    "LSTMCell": cells.LSTMCell,
    "GRUCell": cells.GRUCell,
    "Linear": layers.Linear,
    "Embedding": layers.Embedding,
    "Dropout": layers.Dropout,
}


def _import_torch() -> Any:
    try:
        import torch
    except ImportError:
        raise ImportError("PyTorch is not installed: pip install torch") from None
    return torch


def from_torch(module: Any) -> Any:
    """The rnnfast counterpart of a PyTorch module, with copies of the weights, in the same mode.

    module: torch.nn.RNN, LSTM, GRU, their cells, Linear, Embedding, Dropout or a Sequential of these, on the CPU, in
    float32 or float64. A subclass is refused, because what it changes is unknown.

    Raises
    ------
    TypeError
        There is no counterpart, or the dtype is another.
    ValueError
        The module is not on the CPU, or has an option that rnnfast lacks.
    ImportError
        PyTorch is not installed.
    """
    torch = _import_torch()

    kind = type(module)
    if kind is torch.nn.Sequential:
        result: Module = layers.Sequential(*(from_torch(child) for child in module))
        result.training = module.training
        return result
    own = TORCH_CLASSES.get(kind.__name__)
    if own is None or kind is not getattr(torch.nn, kind.__name__):
        hint = "; rnnfast.torch.revert(module) makes it one" if kind.__module__.startswith("rnnfast.torch") else ""
        raise TypeError(
            f"module: expected one of torch.nn's {', '.join(TORCH_CLASSES)} or Sequential, got {kind}{hint}"
        )
    for option in ("max_norm", "scale_grad_by_freq", "sparse"):
        if getattr(module, option, None):
            raise ValueError(f"module: expected an Embedding without {option}, got {module}")
    arguments = _arguments(own, module)
    parameters = list(module.parameters())
    if parameters:
        arguments["dtype"] = _numpy_dtype(parameters)
    result = own(**arguments)
    result.load_state_dict(module.state_dict())
    return result.train(module.training)


def to_torch(module: Module) -> Any:
    """The PyTorch counterpart of a module of rnnfast's, with copies of the weights, in the same mode.

    Raises
    ------
    TypeError
        PyTorch has no such module.
    ImportError
        PyTorch is not installed.
    """
    torch = _import_torch()

    kind = type(module)
    if isinstance(module, layers.Sequential) and kind is layers.Sequential:
        result = torch.nn.Sequential(*(to_torch(child) for child in module))
        result.training = module.training
        return result
    if TORCH_CLASSES.get(kind.__name__) is not kind:
        raise TypeError(f"module: expected one of {', '.join(TORCH_CLASSES)} or Sequential, got {kind.__name__}")
    arguments = _arguments(kind, module)
    state = {name: torch.from_numpy(value) for name, value in module.state_dict().items()}
    if state:
        arguments["dtype"] = next(iter(state.values())).dtype
    result = getattr(torch.nn, kind.__name__)(**arguments)
    result.load_state_dict(state)
    return result.train(module.training)


def _arguments(own: type[Module], source: Any) -> dict[str, Any]:
    """The constructor's arguments, which are attributes of the source in both libraries."""
    names = [name for name in inspect.signature(own).parameters if name not in ("device", "dtype", "seed")]
    values = {name: getattr(source, name) for name in names}
    if not isinstance(values.get("bias", True), bool):  # Linear keeps the bias itself, or None
        values["bias"] = values["bias"] is not None
    return values


def _numpy_dtype(parameters: Sequence[Any]) -> np.dtype[Any]:
    torch = _import_torch()
    known: dict[Any, np.dtype[Any]] = {torch.float32: np.dtype(np.float32), torch.float64: np.dtype(np.float64)}
    first = parameters[0].dtype
    for parameter in parameters:
        if parameter.device.type != "cpu":
            raise ValueError(f"module: expected parameters on the CPU, got one on {parameter.device}")
        if parameter.dtype != first or first not in known:
            raise TypeError(f"module: expected parameters in float32 or in float64, got {parameter.dtype}")
    return known[first]
