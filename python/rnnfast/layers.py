"""The layers around a recurrence: Linear, Embedding, Dropout, Sequential.

Each has forward(x) and backward(grad_output) -> grad_x, which adds into `p.grad`. Features come last, after any leading
dimensions [...]. `backward` belongs to the last training-mode forward and may follow it once, or again and again with
`retain=True`; a forward in eval saves nothing and leaves what was saved. What is saved is the input itself, not a copy:
do not change it in place before `backward`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from . import init
from ._arrays import (
    check_array,
    check_device,
    check_dtype,
    check_flag,
    check_float,
    check_index,
    check_int,
    check_number,
    check_seed,
    check_shape,
    check_size,
    float_dtype,
    fresh_seed,
    new_array,
    new_weight,
)
from .base import Module, Parameter
from .cells import RecurrentCell
from .reference import dropout_mask

__all__ = ["Dropout", "Embedding", "Linear", "Sequential"]

# The counter of the dropout masks has 12 bits for the layer and 20 for a quarter of the unit.
MAX_LAYER = 2**12 - 1
MAX_UNITS = 2**22


class _Layer(Module):
    """What the layers share: the one thing that a training-mode forward saves for `backward`."""

    def __init__(self) -> None:
        super().__init__()
        self._saved: Any = None

    def _weights_changed(self) -> None:
        self._saved = None

    def _take(self) -> Any:
        if self._saved is None:
            raise RuntimeError(
                f"{type(self).__name__}.backward: expected a forward in training mode before it, got none since the "
                "last backward (which keeps it with retain=True)"
            )
        return self._saved

    def _check_grads(self) -> None:
        for parameter in self._parameters.values():
            parameter.check_grad()


class Linear(_Layer):
    """y = x W^T + b, for x [..., in_features] and y [..., out_features].

    Parameters
    ----------
    in_features, out_features : int
        Sizes, at least 1.
    bias : bool
        Whether b is added.
    device : None or "cpu"
    dtype : float32 (default) or float64
    seed : int, Generator or None
        For the initial values, U(±1/sqrt(in_features)) as in PyTorch.

    `weight` [out_features, in_features] and `bias` [out_features] (or None) are parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        seed: Any = None,
    ) -> None:
        super().__init__()
        self.in_features = check_size("in_features", in_features)
        self.out_features = check_size("out_features", out_features)
        place, kind, rng = check_device(device), float_dtype(dtype), init.generator(seed)
        shape = (self.out_features, self.in_features)
        self.weight = Parameter(new_weight("out_features, in_features", shape, kind, place))
        self.bias = Parameter(new_array(shape[:1], kind, place)) if check_flag("bias", bias) else None
        init.kaiming_uniform_(self.weight, seed=rng)
        if self.bias is not None:
            init.uniform_(self.bias, -(bound := 1.0 / math.sqrt(self.in_features)), bound, seed=rng)

    def forward(self, x: Any) -> Any:
        """x [..., in_features] -> y [..., out_features]. TypeError, ValueError: x is not such an array."""
        weight = self.weight.data
        check_array("weight", weight)
        check_shape("weight", weight, (self.out_features, self.in_features))
        _check_input("x", x, weight, (..., self.in_features))
        if self.bias is not None:
            _check_input("bias", self.bias.data, weight, (self.out_features,))
        y = x.reshape(-1, self.in_features) @ weight.T
        if self.bias is not None:
            y += self.bias.data
        if self.training:
            self._saved = x
        return y.reshape(*x.shape[:-1], self.out_features)

    def backward(self, grad_output: Any, *, need_grad_x: bool = True, retain: bool = False) -> Any:
        """grad_output [..., out_features] -> grad_x [..., in_features] (None without `need_grad_x`).

        Adds into weight.grad and bias.grad. RuntimeError: no forward in training mode was there.
        """
        check_flag("need_grad_x", need_grad_x)
        check_flag("retain", retain)
        x, weight = self._take(), self.weight.data
        self._check_grads()
        _check_input("grad_output", grad_output, weight, (*x.shape[:-1], self.out_features))
        grad = grad_output.reshape(-1, self.out_features)
        grad_x = (grad @ weight).reshape(x.shape) if need_grad_x else None
        grad_weight = grad.T @ x.reshape(-1, self.in_features)
        if self.bias is not None:
            # Summed in float64, because one running float32 sum a column loses digits in long sequences.
            self.bias.add_grad(grad.sum(axis=0, dtype=np.float64).astype(weight.dtype))
        self.weight.add_grad(grad_weight)
        if not retain:
            self._saved = None
        return grad_x

    def __repr__(self) -> str:
        return f"Linear({self.in_features}, {self.out_features}, bias={self.bias is not None})"


class Embedding(_Layer):
    """Rows of a table: indices [...] of any integer dtype -> [..., embedding_dim].

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        Rows and columns of the table, at least 1.
    padding_idx : int or None
        A row that starts as zero and gets no gradient; negative counts from the end.
    device, dtype, seed
        As for `Linear`; the initial values are N(0, 1).

    `weight` [num_embeddings, embedding_dim] is the parameter. Its gradient is dense.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: Any = None,
        dtype: Any = None,
        *,
        seed: Any = None,
    ) -> None:
        super().__init__()
        self.num_embeddings = rows = check_size("num_embeddings", num_embeddings)
        self.embedding_dim = check_size("embedding_dim", embedding_dim)
        self.padding_idx: int | None = None
        if padding_idx is not None:
            index = check_int("padding_idx", padding_idx, minimum=-rows)
            if index >= rows:
                raise ValueError(f"padding_idx: expected below num_embeddings = {rows}, got {index}")
            self.padding_idx = index % rows
        place, shape, kind = check_device(device), (rows, self.embedding_dim), float_dtype(dtype)
        self.weight = Parameter(new_weight("num_embeddings, embedding_dim", shape, kind, place))
        init.normal_(self.weight, seed=seed)
        if self.padding_idx is not None:
            self.weight.data[self.padding_idx] = 0.0

    def forward(self, indices: Any) -> Any:
        """indices [...] -> [..., embedding_dim]. TypeError: not integers; ValueError: one is outside the table."""
        weight = self.weight.data
        xp = check_array("indices", indices, check_array("weight", weight))
        check_shape("weight", weight, (self.num_embeddings, self.embedding_dim))
        check_index("indices", indices, self.num_embeddings)
        indices = indices.astype(np.intp)  # a copy: the caller may fill its buffer with the next batch
        if self.training:
            self._saved = indices
        return xp.take(weight, indices, axis=0)

    def backward(self, grad_output: Any, *, need_grad_x: bool = True, retain: bool = False) -> None:
        """grad_output [..., embedding_dim] is added into the rows of weight.grad; indices have no gradient: None."""
        check_flag("need_grad_x", need_grad_x)
        check_flag("retain", retain)
        indices, weight = self._take(), self.weight.data
        self._check_grads()
        _check_input("grad_output", grad_output, weight, (*indices.shape, self.embedding_dim))
        xp = check_array("weight", weight)
        rows, grads = sum_rows(xp, indices.reshape(-1), grad_output.reshape(-1, self.embedding_dim))
        grad_weight = xp.zeros_like(weight)
        grad_weight[rows] = grads
        if self.padding_idx is not None:
            grad_weight[self.padding_idx] = 0.0
        self.weight.add_grad(grad_weight)
        if not retain:
            self._saved = None

    def __repr__(self) -> str:
        return f"Embedding({self.num_embeddings}, {self.embedding_dim}, padding_idx={self.padding_idx})"


def sum_rows(xp: Any, indices: Any, rows: Any) -> tuple[Any, Any]:
    """Sum the rows [N, E] that have the same index [N]: the distinct indices, ascending, and their sums.

    After a stable sort, neighbours of one segment are added in pairs until each segment is one row: log2 of the largest
    count passes over fewer and fewer rows. The order of the additions depends on the indices alone, so the result is
    deterministic, its rounding error grows with that logarithm only, and every step is a whole-array one.
    """
    order = indices.argsort(kind="stable")
    indices, rows = indices[order], rows[order]
    while True:
        odd = _ranks(xp, indices) % 2 == 1
        if not odd.any():
            return indices, rows
        (places,) = odd.nonzero()
        rows[places - 1] += rows[places]  # the row before an odd one is the even one of the same segment
        indices, rows = indices[~odd], rows[~odd]


def _ranks(xp: Any, indices: Any) -> Any:
    """For each position of a sorted array, how many equal values stand before it."""
    positions = xp.arange(len(indices))
    first = xp.ones(len(indices), dtype=bool)
    first[1:] = indices[1:] != indices[:-1]
    return positions - positions[first][xp.cumsum(first) - 1]


class Dropout(_Layer):
    """Zeroes each value with probability p and scales the others by 1/(1-p); in eval, x itself.

    Parameters
    ----------
    p : float
        In [0, 1].
    seed : int in [0, 2**64) or None
        Half of what decides the masks; None takes a fresh one.

    The masks are counter-based: a function of `seed`, of `call_count` (the training-mode forwards so far, which may be
    set to resume) and of the value's place: for x [..., units] the index in the first dimension, the index in the ones
    between, and the unit. They select and never multiply: a NaN that is dropped is gone.
    """

    def __init__(self, p: float = 0.5, *, seed: int | None = None) -> None:
        super().__init__()
        self.p = check_number("p", p, 0.0, 1.0)
        self.seed = fresh_seed() if seed is None else check_seed(seed)
        self.call_count = 0

    def forward(self, x: Any) -> Any:
        """x [..., units], float32 or float64 -> the same shape."""
        xp = check_array("x", x)
        check_float("x", x)
        if not self.training:
            return x
        keep = self._keep(xp, x.shape)
        y = _select(xp, keep, x, self.p)
        self._saved = (keep, x.shape, x.dtype)
        self.call_count += 1
        return y

    def backward(self, grad_output: Any, *, need_grad_x: bool = True, retain: bool = False) -> Any:
        """grad_output [..., units] -> grad_x, under the mask of the forward."""
        check_flag("need_grad_x", need_grad_x)
        check_flag("retain", retain)
        keep, shape, dtype = self._take()
        xp = check_array("grad_output", grad_output)
        check_dtype("grad_output", grad_output, dtype)
        check_shape("grad_output", grad_output, shape)
        if not retain:
            self._saved = None
        return _select(xp, keep, grad_output, self.p) if need_grad_x else None

    def _keep(self, xp: Any, shape: tuple[int, ...]) -> Any:
        """The mask for x of this shape; None where all is kept."""
        if self.p == 0.0:
            return None
        units = shape[-1] if shape else 1
        if units > MAX_UNITS:
            raise ValueError(f"x: expected at most {MAX_UNITS} values in the last dimension, got {units}")
        first = shape[0] if len(shape) > 2 else 1
        between = math.prod(shape[1:-1] if len(shape) > 2 else shape[:-1])
        # The last layer number, so that a recurrent layer of the same seed draws other masks.
        t, b = np.arange(first)[:, None], np.arange(between)[None, :]
        keep = dropout_mask(self.seed, self.call_count, MAX_LAYER, t, b, units, self.p)
        return xp.asarray(keep.reshape(shape))

    def __repr__(self) -> str:
        return f"Dropout(p={self.p}, seed={self.seed})"


def _select(xp: Any, keep: Any, x: Any, p: float) -> Any:
    if keep is None:
        return x
    if p == 1.0:
        return xp.zeros_like(x)
    return xp.where(keep, x * x.dtype.type(1.0 / (1.0 - p)), x.dtype.type(0.0))


class Sequential(Module):
    """Modules in a chain, each on the output of the one before.

    Of a recurrent layer's (output, state) only the output goes on, and of its (grad_x, grad_state) only grad_x goes
    back: states start from zero at every call. Children are named "0", "1", … as in PyTorch. One module cannot stand in
    two places, because it saves only its last forward; two modules may share a `Parameter`.
    """

    def __init__(self, *modules: Module) -> None:
        super().__init__()
        for i, module in enumerate(modules):
            if not isinstance(module, Module):
                raise TypeError(f"modules[{i}]: expected a Module, got {type(module).__name__}")
            if isinstance(module, RecurrentCell):  # its backward wants the context of each step
                raise TypeError(f"modules[{i}]: expected a layer, got {type(module).__name__}, for single steps")
        if len({id(m) for m in modules}) < len(modules):
            raise ValueError("modules: expected each module once, got one twice")
        for i, module in enumerate(modules):
            setattr(self, str(i), module)

    def forward(self, x: Any) -> Any:
        """x goes through all modules."""
        for module in self:
            x = _first(module(x))
        return x

    def backward(self, grad_output: Any, *, need_grad_x: bool = True, retain: bool = False) -> Any:
        """grad_output goes back through all modules -> grad_x (None without `need_grad_x`).

        Where one of them raises, no gradient has changed.
        """
        check_flag("need_grad_x", need_grad_x)
        check_flag("retain", retain)
        held = [(parameter, parameter.grad) for parameter in self.parameters()]
        for parameter, _ in held:
            parameter.check_grad()
        for parameter, _ in held:
            parameter.grad = None
        try:
            grad_x = self._backward(grad_output, need_grad_x, retain)
        except BaseException:
            for parameter, grad in held:
                parameter.grad = grad
            raise
        for parameter, grad in held:
            if grad is not None:
                fresh, parameter.grad = parameter.grad, grad
                if fresh is not None:
                    parameter.add_grad(fresh)
        return grad_x

    def _backward(self, grad: Any, need_grad_x: bool, retain: bool) -> Any:
        # Only what differs from the defaults is passed on, so that a user's module needs no such arguments.
        options = {"retain": True} if retain else {}
        for i in reversed(range(len(self))):
            last = {"need_grad_x": False} if i == 0 and not need_grad_x else {}
            grad = _first(self[i].backward(grad, **options, **last))
        return grad

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Module]:
        return iter(self._modules.values())

    def __getitem__(self, index: int) -> Any:
        return list(self)[index]

    def __repr__(self) -> str:
        return f"Sequential({', '.join(map(repr, self))})"


def _first(result: Any) -> Any:
    return result[0] if isinstance(result, tuple) else result


def _check_input(name: str, value: Any, weight: Any, shape: tuple[Any, ...]) -> None:
    check_array(name, value, check_array("weight", weight))
    if value.dtype != weight.dtype:
        raise TypeError(f"{name}: expected dtype {weight.dtype}, that of weight, got {value.dtype}")
    check_shape(name, value, shape)
