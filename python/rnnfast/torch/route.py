"""Which way a call goes.

Everything that is not plain eager PyTorch (tracing, torch.func, tensor subclasses, dispatch modes) sees operators; an
eager call that is to be differentiated becomes one node of the graph; any other goes straight to the engine, with
weights packed once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.nn import Parameter

from . import kernels, operators
from .autograd import Layers
from .kernels import Extras, Inputs, Options, WeightCache

_STRIDED = torch.strided
_PLAIN = frozenset({Tensor, Parameter, type(None)})

# Without the Python in front of it, which looks for transforms of torch.func: `_is_plain` has done that.
_apply = super(Function, Layers).apply

# In training, weights that were packed before are worth looking for only where packing outweighs the steps: in a loop
# of single steps. Elsewhere an optimiser has changed them since.
FEW_STEPS = 4

_transforming = torch._C._are_functorch_transforms_active
_modes = torch._C._len_torch_dispatch_stack
_tracing = torch._C._get_tracing_state


def run(
    options: Options, inputs: Inputs, extras: Extras, cache: Callable[[], WeightCache]
) -> tuple[Tensor | None, ...]:
    """The five outputs of `kernels.forward`."""
    tensors = inputs.flat()
    if not _is_plain(tensors):
        return operators.stack(options, inputs, extras)
    if forward_ad._current_level >= 0:
        operators.refuse_forward_mode(tensors)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        steps = inputs.x.shape[1 if options.batch_first else 0]
        few = cache() if steps <= FEW_STEPS else None
        results: tuple[Tensor | None, ...] = _apply(options, extras, few, *tensors)
        return results
    ready = cache().get(options, inputs.weights) if options.dropout == 0 else None
    return kernels.forward(options, inputs, extras, training=options.dropout > 0, ready=ready)[0]


def packed_for(
    kind: tuple[str, int, bool],
    weights: list[Tensor],
    cache: WeightCache | None,
    x: Any,
    h0: Any,
    c0: Any,
    rank: int = 3,
) -> tuple[Any, Any] | None:
    """The stack and the packed weights for a call without a graph on plain CPU tensors of `rank`; else None.

    `kind` is what a module may be told to be at any time: cell, layers, bidirectional.

    The short way of a loop of single steps: what `run` and its callers look at one by one, in as little Python as it
    takes. It is for weights that an earlier call has packed.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return None
    if cache is None or _transforming() or _modes() or _tracing() is not None or forward_ad._current_level >= 0:
        return None
    dtype = weights[0].dtype
    for tensor in (x,) if h0 is None else (x, h0) if c0 is None else (x, h0, c0):
        if (
            type(tensor) is not Tensor
            or tensor.dtype is not dtype
            or tensor.dim() != rank
            or not tensor.is_cpu
            or tensor.layout is not _STRIDED
            or tensor.is_neg()
        ):
            return None
    return cache.unchanged(kind, weights)


def _is_plain(tensors: Sequence[Tensor | None]) -> bool:
    if torch.compiler.is_compiling() or _transforming() or _modes() or _tracing() is not None:
        return False
    x = tensors[0]
    return x is not None and (x.is_cpu or x.is_cuda) and _PLAIN.issuperset(map(type, tensors))
