"""Initialisation of parameters, in place.

Every function takes a `Parameter` or an array, and `seed`: an integer, a `numpy.random.Generator` to go on drawing
from, or None for fresh entropy. Values are drawn in float64 and rounded to the target's dtype, so a float32 and a
float64 module of one seed agree. `orthogonal_`, `identity_`, `irnn_` and `forget_bias_` also know recurrent modules.

The defaults of the layers are PyTorch's: U(±1/sqrt(hidden_size)) for all recurrent parameters, U(±1/sqrt(in_features))
for `Linear`, N(0, 1) for `Embedding`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ._arrays import check_array, check_float, check_int, check_number, check_seed, check_writable
from .base import Module, Parameter

__all__ = [
    "constant_",
    "forget_bias_",
    "generator",
    "identity_",
    "irnn_",
    "kaiming_uniform_",
    "normal_",
    "orthogonal_",
    "recurrent_uniform_",
    "uniform_",
    "xavier_normal_",
    "xavier_uniform_",
]

Draw = Callable[[tuple[int, ...]], Any]


def generator(seed: Any = None) -> np.random.Generator:
    """A generator for `seed`: None (fresh entropy), an integer in [0, 2**64), or a generator, which is handed back."""
    if isinstance(seed, np.random.Generator):
        return seed
    return np.random.default_rng(None if seed is None else check_seed(seed))


def constant_(target: Any, value: float) -> Any:
    """Set every element to `value`."""
    value = check_number("value", value, infinite=True)
    return _fill(target, lambda shape: np.full(shape, value))


def uniform_(target: Any, low: float = 0.0, high: float = 1.0, *, seed: Any = None) -> Any:
    """Draw from U[low, high)."""
    low = check_number("low", low)
    high = check_number("high", high, minimum=low)
    rng = generator(seed)
    return _fill(target, lambda shape: rng.uniform(low, high, shape))


def normal_(target: Any, mean: float = 0.0, std: float = 1.0, *, seed: Any = None) -> Any:
    """Draw from N(mean, std²)."""
    mean, std = check_number("mean", mean), check_number("std", std, minimum=0.0)
    rng = generator(seed)
    return _fill(target, lambda shape: rng.normal(mean, std, shape))


def recurrent_uniform_(target: Any, hidden_size: int, *, seed: Any = None) -> Any:
    """Draw from U(±1/sqrt(hidden_size)), PyTorch's default for every parameter of a recurrent layer."""
    bound = 1.0 / math.sqrt(check_int("hidden_size", hidden_size))
    return uniform_(target, -bound, bound, seed=seed)


def kaiming_uniform_(target: Any, a: float = math.sqrt(5.0), *, seed: Any = None) -> Any:
    """Draw a weight [fan_out, fan_in] from U(±sqrt(6 / ((1 + a²)·fan_in))) (He et al. 2015).

    The default a = sqrt(5) gives U(±1/sqrt(fan_in)), PyTorch's default for `Linear`.
    """
    fan_in, _ = _fans(target)
    bound = math.sqrt(6.0 / ((1.0 + check_number("a", a) ** 2) * fan_in))
    return uniform_(target, -bound, bound, seed=seed)


def xavier_uniform_(target: Any, gain: float = 1.0, *, seed: Any = None) -> Any:
    """Draw a weight [fan_out, fan_in] from U(±gain·sqrt(6 / (fan_in + fan_out))) (Glorot and Bengio 2010)."""
    bound = check_number("gain", gain, minimum=0.0) * math.sqrt(6.0 / sum(_fans(target)))
    return uniform_(target, -bound, bound, seed=seed)


def xavier_normal_(target: Any, gain: float = 1.0, *, seed: Any = None) -> Any:
    """Draw a weight [fan_out, fan_in] from N(0, gain²·2 / (fan_in + fan_out)) (Glorot and Bengio 2010)."""
    std = check_number("gain", gain, minimum=0.0) * math.sqrt(2.0 / sum(_fans(target)))
    return normal_(target, 0.0, std, seed=seed)


def orthogonal_(target: Any, gain: float = 1.0, *, blocks: int | None = None, seed: Any = None) -> Any:
    """Make each block of rows gain × a random (semi-)orthogonal matrix (Saxe et al. 2013).

    target: a weight [blocks·rows, columns], or a module, of which then every recurrent weight (`weight_hh…`) is set,
    one block a gate. blocks: 1 by default; the number of gates for one weight_hh; not given with a module.
    """
    gain, rng = check_number("gain", gain), generator(seed)
    return _fill_blocks(target, blocks, lambda shape: gain * _orthogonal(rng, shape))


def identity_(target: Any, gain: float = 1.0, *, blocks: int | None = None) -> Any:
    """Make each block of rows gain × the identity; `target` and `blocks` as for `orthogonal_`."""
    gain = check_number("gain", gain)
    return _fill_blocks(target, blocks, lambda shape: gain * np.eye(shape[0], shape[1]))


def irnn_(module: Module, gain: float = 1.0) -> Module:
    """Recurrent weights gain × identity and recurrent biases zero: the IRNN (Le, Jaitly and Hinton 2015).

    Meant for a ReLU RNN; the paper also draws the input weights from N(0, 0.001²).
    """
    gain = check_number("gain", gain)
    biases = [_writable(p) for kind in ("bias_ih", "bias_hh") for p, _ in _recurrent(module, kind)]
    identity_(module, gain)
    for bias in biases:
        bias[...] = 0.0
    return module


def forget_bias_(module: Module, value: float = 1.0) -> Module:
    """Set the bias of every LSTM forget gate in `module` to `value` (Gers et al. 2000; Jozefowicz et al. 2015).

    The two biases of a gate add up: `bias_ih` gets the value in the rows of gate f, `bias_hh` zero. ValueError where
    the module holds no LSTM with bias.
    """
    value = check_number("value", value)
    gates = [
        (_writable(p)[lstm.hidden_size : 2 * lstm.hidden_size], number)  # gate order i, f, g, o
        for kind, number in (("bias_ih", value), ("bias_hh", 0.0))
        for p, lstm in _recurrent(module, kind)
        if lstm.cell.startswith("lstm")
    ]
    if not gates:
        raise ValueError(f"module: expected an LSTM with bias, got {type(module).__name__}")
    for rows, number in gates:
        rows[...] = number
    return module


def _writable(target: Any) -> Any:
    """The array of a parameter, or the array itself, checked."""
    name = repr(target.name) if isinstance(target, Parameter) else "target"
    data = target.data if isinstance(target, Parameter) else target
    check_array(name, data)
    check_float(name, data)
    check_writable(name, data)
    return data


def _fill(target: Any, draw: Draw) -> Any:
    data = _writable(target)
    data[...] = check_array("target", data).asarray(draw(tuple(data.shape)))
    return target


def _fill_blocks(target: Any, blocks: int | None, draw: Draw) -> Any:
    if isinstance(target, Module):
        if blocks is not None:
            raise ValueError(f"blocks: expected None with a module (a block a gate), got {blocks}")
        weights = [(_matrix(p), p.shape[0] // layer.hidden_size) for p, layer in _recurrent(target, "weight_hh")]
        if not weights:
            raise ValueError(
                f"target: expected a recurrent module, or one that holds some, got {type(target).__name__}"
            )
    else:
        data, count = _matrix(target), check_int("blocks", 1 if blocks is None else blocks)
        if data.shape[0] % count:
            raise ValueError(f"blocks: expected a divisor of the {data.shape[0]} rows, got {count}")
        weights = [(data, count)]
    for data, count in weights:
        rows = data.shape[0] // count
        for k in range(count):
            _fill(data[k * rows : (k + 1) * rows], draw)
    return target


def _recurrent(module: Module, kind: str) -> list[tuple[Parameter, Any]]:
    """The parameters of the kind (weight_hh, bias_ih, …) of each recurrent module in `module`, beside that one."""
    if not isinstance(module, Module):
        raise TypeError(f"module: expected a Module, got {type(module).__name__}")
    children = [child for child in module.modules() if hasattr(child, "cell")]
    return [(p, child) for child in children for name, p in child._parameters.items() if name.startswith(kind)]


def _matrix(target: Any) -> Any:
    data = _writable(target)
    if data.ndim != 2 or 0 in data.shape:
        raise ValueError(f"target: expected a weight (rows, columns), neither zero, got shape {tuple(data.shape)}")
    return data


def _fans(target: Any) -> tuple[int, int]:
    """fan_in and fan_out of a weight [fan_out, fan_in]."""
    fan_out, fan_in = _matrix(target).shape
    return fan_in, fan_out


def _orthogonal(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """A random matrix with orthonormal columns, or rows where it has fewer rows: QR of a normal matrix."""
    rows, columns = shape
    q, r = np.linalg.qr(rng.normal(size=(max(shape), min(shape))))
    q *= np.where(np.diagonal(r) < 0.0, -1.0, 1.0)  # makes the distribution uniform (Mezzadri 2007)
    return q if rows >= columns else q.T
