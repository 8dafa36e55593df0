"""Losses: each returns (loss, gradient), the gradient being that of the loss by its first argument.

Reductions are PyTorch's: "mean" over what counts, "sum", or "none", where the loss keeps its elements and the gradient
is that of their sum. Reduced losses are summed in float64 and come back in the dtype of the input. What is ignored or
masked is selected away, never multiplied by zero: its gradient is exactly 0 and a NaN there does not spread. Where
nothing counts, the mean is NaN, as in PyTorch, and the gradient zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._arrays import (
    check_array,
    check_choice,
    check_dtype,
    check_float,
    check_index,
    check_int,
    check_number,
    check_shape,
    quiet,
)

__all__ = ["bce_with_logits", "cross_entropy", "mse_loss"]

REDUCTIONS = ("mean", "sum", "none")


def cross_entropy(
    logits: Any, target: Any, *, ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0
) -> tuple[Any, Any]:
    """-log softmax(logits)[target], averaged over the targets that are not `ignore_index`.

    Parameters
    ----------
    logits : array [..., C], float32 or float64
        Classes last.
    target : integer array [...]
        Classes in [0, C), or `ignore_index`, which has no loss and no gradient and may itself be a class.
    reduction : "mean", "sum" or "none"
    label_smoothing : float in [0, 1]
        The share of the target that is spread evenly over all classes (Szegedy et al. 2016).

    Returns
    -------
    loss (a scalar, or [...] with "none") and gradient [..., C].

    Raises
    ------
    TypeError, ValueError
        A wrong kind of array, dtype, shape or class.
    """
    xp = check_array("logits", logits)
    check_float("logits", logits)
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits: expected shape (..., classes), at least one class, got {tuple(logits.shape)}")
    check_array("target", target, xp)
    ignore_index = check_int("ignore_index", ignore_index, minimum=-(2**63))
    classes = logits.shape[-1]
    check_index("target", target, classes, unless=ignore_index)
    check_shape("target", target, logits.shape[:-1])
    check_choice("reduction", reduction, REDUCTIONS)
    smoothing = check_number("label_smoothing", label_smoothing, 0.0, 1.0)

    flat = target.reshape(-1)
    counts = flat != ignore_index
    index = xp.where(counts, flat, 0).astype(np.intp)
    losses, grad = _softmax_loss(xp, logits.reshape(-1, classes), index, smoothing)
    losses = xp.where(counts, losses, logits.dtype.type(0.0))
    grad[~counts] = 0.0
    loss = _reduce(xp, losses.reshape(target.shape), grad, reduction, int(counts.sum()))
    return loss, grad.reshape(logits.shape)


@quiet
def _softmax_loss(xp: Any, logits: Any, index: Any, smoothing: float) -> tuple[Any, Any]:
    """Losses [N] and gradients [N, C] of the rows of logits [N, C], in one buffer of their size."""
    rows, classes = xp.arange(len(index)), logits.shape[1]
    buffer = logits - logits.max(axis=1, keepdims=True)  # shifted so that exp cannot overflow
    picked = buffer[rows, index]
    average = buffer.mean(axis=1) if smoothing else 0.0
    xp.exp(buffer, out=buffer)
    total = buffer.sum(axis=1)
    log_total = xp.log(total)
    losses = log_total - picked
    buffer /= total[:, None]
    if smoothing:
        losses = (1.0 - smoothing) * losses + smoothing * (log_total - average)
        buffer -= smoothing / classes
    buffer[rows, index] -= 1.0 - smoothing
    return losses, buffer


@quiet
def mse_loss(input: Any, target: Any, *, mask: Any = None, reduction: str = "mean") -> tuple[Any, Any]:
    """(input - target)², averaged over all elements, or over those that `mask` keeps.

    input, target: arrays [...] of one shape and dtype, float32 or float64. mask: bool, of that shape or of that shape
    without the last dimension (a step of a ragged batch counts or does not). Returns loss and gradient [...].
    """
    xp = _check_pair("input", input, target)
    mask = _check_mask(xp, mask, input)
    check_choice("reduction", reduction, REDUCTIONS)
    grad = xp.subtract(input, target, out=xp.empty_like(input))
    losses = grad * grad
    grad *= 2.0
    losses, count = _apply_mask(xp, mask, losses, grad)
    return _reduce(xp, losses, grad, reduction, count), grad


@quiet
def bce_with_logits(
    logits: Any,
    target: Any,
    *,
    weight: Any = None,
    pos_weight: Any = None,
    mask: Any = None,
    reduction: str = "mean",
) -> tuple[Any, Any]:
    """Binary cross-entropy: -weight·(pos_weight·y·log σ(x) + (1 - y)·log(1 - σ(x))) for x in logits, y in target.

    Parameters
    ----------
    logits, target : arrays [...] of one shape and dtype, float32 or float64
        Targets are probabilities, usually 0 and 1.
    weight, pos_weight : arrays of that dtype that broadcast to that shape, or None
        Factors of the element and of its positive part. The mean still divides by the number of elements.
    mask : bool array, of that shape or that shape without the last dimension, or None
        Which elements count, in the mean too.
    reduction : "mean", "sum" or "none"

    Returns
    -------
    loss (a scalar, or [...] with "none") and gradient [...].
    """
    xp = _check_pair("logits", logits, target)
    mask = _check_mask(xp, mask, logits)
    weight, pos_weight = (_check_factor(xp, n, w, logits) for n, w in (("weight", weight), ("pos_weight", pos_weight)))
    check_choice("reduction", reduction, REDUCTIONS)
    small = xp.exp(-xp.abs(logits))  # in (0, 1]: neither exp nor log1p can overflow
    tail = xp.log1p(small)
    positive = target if pos_weight is None else target * pos_weight
    negative = 1.0 - target
    losses = positive * (tail + xp.maximum(-logits, 0.0)) + negative * (tail + xp.maximum(logits, 0.0))
    big, small = 1.0 / (1.0 + small), small / (1.0 + small)  # σ(|x|) and σ(-|x|), both to full relative precision
    up = logits >= 0
    grad = xp.asarray(negative * xp.where(up, big, small) - positive * xp.where(up, small, big))
    if weight is not None:
        losses, grad = losses * weight, xp.asarray(grad * weight)
    losses, count = _apply_mask(xp, mask, losses, grad)
    return _reduce(xp, losses, grad, reduction, count), grad


def _check_pair(name: str, value: Any, target: Any) -> Any:
    xp = check_array(name, value)
    check_float(name, value)
    check_array("target", target, xp)
    check_dtype("target", target, value.dtype)
    check_shape("target", target, value.shape)
    return xp


def _check_mask(xp: Any, mask: Any, value: Any) -> Any:
    """The mask in the shape of `value`, or None."""
    if mask is None:
        return None
    check_array("mask", mask, xp)
    check_dtype("mask", mask, bool)
    if mask.ndim == value.ndim - 1:
        check_shape("mask", mask, value.shape[:-1])
        return xp.broadcast_to(mask[..., None], value.shape)
    check_shape("mask", mask, value.shape)
    return mask


def _check_factor(xp: Any, name: str, factor: Any, value: Any) -> Any:
    if factor is None:
        return None
    check_array(name, factor, xp)
    check_dtype(name, factor, value.dtype)
    try:
        return xp.broadcast_to(factor, value.shape)
    except ValueError:
        expected, got = tuple(value.shape), tuple(factor.shape)
        raise ValueError(f"{name}: expected a shape that broadcasts to {expected}, got {got}") from None


def _apply_mask(xp: Any, mask: Any, losses: Any, grad: Any) -> tuple[Any, int]:
    """Losses and gradient (in place) with zero where the mask is false, and how many elements count."""
    if mask is None:
        return losses, grad.size
    grad[~mask] = 0.0
    return xp.where(mask, losses, losses.dtype.type(0.0)), int(mask.sum())


@quiet
def _reduce(xp: Any, losses: Any, grad: Any, reduction: str, count: int) -> Any:
    """The loss as `reduction` says; `grad` is scaled in place to belong to it."""
    if reduction == "none":
        return losses
    total = xp.asarray(losses).sum(dtype=np.float64)
    if reduction == "mean":
        if count:
            grad /= count
            total = total / count
        else:
            total = np.nan
    return xp.asarray(total, dtype=grad.dtype)[()]
