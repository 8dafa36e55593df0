"""`explain`: which kernel serves a call, how the work is shared between threads, or why something else runs."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from . import _core, functional
from .cells import RecurrentCell
from .modules import RecurrentLayer

__all__ = ["explain"]


def explain(module: Any, x: Any, *, lengths: Any = None) -> str:
    """Say in words what ``module(x)`` runs.

    Parameters
    ----------
    module
        A recurrent layer or cell of `rnnfast` or of `rnnfast.torch`; or any torch.nn.Module, for which every recurrent
        module within is explained.
    x
        Its input. The call is made once, as in training, because the plan depends on the input's shape; nothing of the
        module changes.
    lengths
        As in the call of a layer.

    Returns
    -------
    str
        The kernel, the dtype, the instruction set and the sharing between threads; or what runs in their place and why.

    Raises
    ------
    TypeError
        `module` is none of these.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(module, torch.nn.Module):
        from .torch.explain import explain_torch

        return explain_torch(module, x, lengths)
    if isinstance(module, RecurrentLayer):
        unbatched = getattr(x, "ndim", 3) == 2
        options = {**module._pack_options(), "batch_first": module.batch_first and not unbatched, "lengths": lengths}
        options["dropout"] = module.dropout if module.training else 0.0
        x = x[:, None] if unbatched else x
    elif isinstance(module, RecurrentCell):
        x, options = (x[None] if getattr(x, "ndim", 2) == 2 else x[None, None]), module._pack_options()
    else:
        raise TypeError(f"module: expected a recurrent module, got {type(module).__name__}")
    weights = [p.data for p in module._weight_parameters()]
    *_, context = functional.forward(module.cell, x, None, weights, **options)
    dtype = np.dtype(module.dtype).name
    return describe(type(module).__name__, dtype, context.plan, on_device=module.device == "cuda")


def describe(name: str, dtype: str, plan: str, on_device: bool) -> str:
    """One line for a call that a kernel serves."""
    if on_device:
        return f"{name}: rnnfast's kernel for {dtype} on the GPU; {plan}"
    return (
        f"{name}: rnnfast's kernel for {dtype} on the CPU ({_core.isa()}), at most {functional.get_num_threads()} "
        f"threads; {plan}"
    )
