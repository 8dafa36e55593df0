"""`explain`: which kernel serves a call, how the work is shared between threads, or why something else runs."""

from __future__ import annotations

import copy
import sys
from typing import Any

import numpy as np

from . import _core, functional
from .cells import RecurrentCell
from .layers import Sequential
from .modules import RecurrentLayer

__all__ = ["explain"]


def explain(module: Any, x: Any, *, lengths: Any = None) -> str:
    """Say in words what ``module(x)`` runs.

    Parameters
    ----------
    module
        A recurrent layer or cell of `rnnfast` or of `rnnfast.torch`; or a `Sequential` or any torch.nn.Module, for which
        every recurrent module within is explained, a line each, by its first input when a copy is called.
    x
        Its input. The call is made once, as in training, because the plan depends on the input's shape; nothing of the
        module changes.
    lengths
        As in the call of a layer; modules that contain layers take none.

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
    if isinstance(module, Sequential):
        return _explain_chain(module, x, lengths)
    if isinstance(module, RecurrentLayer):
        unbatched = getattr(x, "ndim", 3) == 2
        options = {**module._pack_options(), "batch_first": module.batch_first and not unbatched, "lengths": lengths}
        options["dropout"] = module.dropout if module.training else 0.0
        x = x[:, None] if unbatched else x
    elif isinstance(module, RecurrentCell):
        if lengths is not None:
            raise TypeError("lengths: expected None, as a cell's call takes none")
        x, options = (x[None] if getattr(x, "ndim", 2) == 2 else x[None, None]), module._pack_options()
    else:
        raise TypeError(f"module: expected a recurrent module, got {type(module).__name__}")
    weights = [p.data for p in module._weight_parameters()]
    *_, context = functional.forward(module.cell, x, None, weights, **options)
    dtype = np.dtype(module.dtype).name
    return describe(type(module).__name__, dtype, context.plan, on_device=module.device == "cuda")


def _explain_chain(chain: Sequential, x: Any, lengths: Any) -> str:
    if lengths is not None:
        raise TypeError("lengths: expected None, as a Sequential's call takes none")
    lines: list[str] = []

    def walk(modules: Sequential, x: Any, prefix: str) -> Any:
        for name, child in modules._modules.items():
            if isinstance(child, Sequential):
                x = walk(child, x, f"{prefix}{name}.")
                continue
            if isinstance(child, RecurrentLayer):
                lines.append(f"{prefix}{name}: {explain(child, x)}")
            result = child(x)
            x = result[0] if isinstance(result, tuple) else result
        return x

    walk(copy.deepcopy(chain), x, "")  # a copy: every module keeps its last forward for `backward`
    if not lines:
        raise TypeError("module: expected a recurrent module, got a Sequential without any")
    return "\n".join(lines)


def describe(name: str, dtype: str, plan: str, on_device: bool) -> str:
    """One line for a call that a kernel serves."""
    if on_device:
        return f"{name}: rnnfast's kernel for {dtype} on the GPU; {plan}"
    return (
        f"{name}: rnnfast's kernel for {dtype} on the CPU ({_core.isa()}), at most {functional.get_num_threads()} "
        f"threads; {plan}"
    )
