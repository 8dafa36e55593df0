"""TF32: whether float32 layers on a CUDA device may multiply with 10 bits behind the point instead of 23, on tensor cores.

What is rounded are the operands of products, to the nearest TF32 number (8 bits of exponent, as float32): inputs, weights, h,
the gradients of gates. Sums, gates and states are float32 as ever, and so are results. Each product is off by up to 2**-10
of its size, where float32 has 2**-24. Other dtypes, and the CPU, know nothing of it; kernels of a single block keep float32.
"""

from __future__ import annotations

import os

__all__ = ["get_tf32", "set_tf32"]


def _initial() -> bool:
    value = os.environ.get("RNNFAST_TF32", "0")
    if value not in ("", "0", "1"):
        raise ValueError(f"RNNFAST_TF32: expected 0 or 1, got {value!r}")
    return value == "1"


_tf32 = _initial()


def set_tf32(flag: bool) -> None:
    """With True, float32 layers on a CUDA device round the operands of their products to TF32; sums, gates and states stay
    float32. Off at first, unless the environment has RNNFAST_TF32=1. A backward pass does as its forward pass did.
    """
    if not isinstance(flag, bool):
        raise TypeError(f"flag: expected a bool, got {type(flag).__name__}")
    global _tf32
    _tf32 = flag


def get_tf32() -> bool:
    """Whether float32 products on a CUDA device are rounded to TF32."""
    return _tf32
