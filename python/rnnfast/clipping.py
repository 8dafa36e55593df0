"""Gradient norms and clipping, with PyTorch's semantics.

Each function takes one item or an iterable of items. An item is a `Parameter`, which stands for its gradient (skipped
where it is None), or an array, which is the gradient itself. An item that comes twice, as a tied parameter may, counts
once. Everything is checked before the first gradient is changed.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ._arrays import check_array, check_number, check_writable, module_of
from .base import Module, Parameter

__all__ = ["clip_grad_norm_", "clip_grad_value_", "get_total_norm"]

_BLOCK = 2**16  # elements converted to float64 at a time: half a megabyte, which stays in cache


def get_total_norm(tensors: Any, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> float:
    """The norm of all gradients as if they were one vector.

    norm_type: any p; infinity for the largest magnitude. p = 0 is PyTorch's: how many of the gradients are not all
    zero. The sum is taken in float64, scaled by the largest magnitude, so that no finite gradient overflows or vanishes
    in it. Nothing to take the norm of gives 0. RuntimeError: `error_if_nonfinite`, and the norm is NaN or infinite.
    """
    norm_type = check_number("norm_type", norm_type, infinite=True)
    return _total_norm(_gradients("tensors", tensors), norm_type, error_if_nonfinite)


def clip_grad_norm_(
    parameters: Any, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> float:
    """Scale all gradients in place by max_norm / (norm + 1e-6) where that is below 1; returns the norm before.

    The norm is that of `get_total_norm`. An infinite norm makes finite gradients 0 and a NaN makes all NaN, as in
    PyTorch, unless `error_if_nonfinite` raises RuntimeError, before anything is changed.
    """
    max_norm = check_number("max_norm", max_norm, minimum=0.0, infinite=True)
    norm_type = check_number("norm_type", norm_type, infinite=True)
    gradients = _gradients("parameters", parameters, writable=True)
    norm = _total_norm(gradients, norm_type, error_if_nonfinite)
    coefficient = max_norm / (norm + 1e-6)
    if not coefficient >= 1.0:  # also where it is NaN
        with np.errstate(invalid="ignore"):
            for gradient in gradients:
                gradient *= coefficient
    return norm


def clip_grad_value_(parameters: Any, clip_value: float) -> None:
    """Limit every element of the gradients to [-clip_value, clip_value], in place; a NaN stays one."""
    clip_value = check_number("clip_value", clip_value, minimum=0.0, infinite=True)
    for gradient in _gradients("parameters", parameters, writable=True):
        with np.errstate(over="ignore"):  # a bound beyond the dtype is no bound
            bound = gradient.dtype.type(clip_value)
        module_of(gradient).clip(gradient, -bound, bound, out=gradient)


def _gradients(name: str, items: Any, writable: bool = False) -> list[Any]:
    """The distinct gradients behind `items`, checked."""
    if isinstance(items, Parameter) or module_of(items) is not None:
        items = [items]
    elif isinstance(items, Module) or not hasattr(items, "__iter__"):
        wanted = "a Parameter, an array or an iterable of them"
        raise TypeError(f"{name}: expected {wanted}, got {type(items).__name__}")
    found: dict[int, Any] = {}
    for i, item in enumerate(items):
        where = f"{name}[{i}]"
        gradient = item.grad if isinstance(item, Parameter) else item
        if gradient is None and isinstance(item, Parameter):
            continue
        check_array(where, gradient)
        if gradient.dtype.kind != "f":
            raise TypeError(f"{where}: expected a float dtype, got {gradient.dtype}")
        if writable:
            check_writable(where, gradient)
        found[id(gradient)] = gradient
    return list(found.values())


def _total_norm(gradients: list[Any], p: float, error_if_nonfinite: bool) -> float:
    # The norm of the norms is the norm of all elements, for every p but 0.
    norm = _norm(np.array([_norm(g, p) for g in gradients if g.size]), p)
    if error_if_nonfinite and not math.isfinite(norm):
        raise RuntimeError(f"norm: expected a finite total norm of order {p:g}, got {norm}; no gradient was changed")
    return norm


def _norm(x: Any, p: float) -> float:
    """(Σ|x|^p)^(1/p) of all elements."""
    if x.size == 0:
        return 0.0
    flat = x.reshape(-1)
    if p == 0:
        return float((flat != 0).sum())
    # What all elements are divided by: the one that is raised to the power 1, the others being at most that.
    magnitude = abs(flat)
    pivot = float(magnitude.max() if p > 0 else magnitude.min())
    if math.isinf(p) or pivot == 0.0 or not math.isfinite(pivot):
        return pivot
    with np.errstate(under="ignore", over="ignore"):
        blocks = (magnitude[i : i + _BLOCK].astype(np.float64) / pivot for i in range(0, flat.size, _BLOCK))
        total = sum(float((block**p).sum()) for block in blocks)
        return float(pivot * np.power(total, 1.0 / p))
