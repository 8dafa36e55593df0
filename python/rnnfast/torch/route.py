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
from torch.autograd import forward_ad
from torch.nn import Parameter

from .. import functional
from . import kernels, operators
from .autograd import Layers
from .kernels import Extras, Inputs, Options

_PLAIN = (Tensor, Parameter)
_transforming = torch._C._are_functorch_transforms_active
_modes = torch._C._len_torch_dispatch_stack
_tracing = torch._C._get_tracing_state


class PackCache:
    """Weights in the kernels' order, for as long as their bytes stay the same.

    Not keyed on addresses and version counters: a write through ``tensor.data``, from NumPy or from another process
    changes neither, and would leave stale weights in use. Reading the weights once costs a fraction of packing them.
    """

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last: tuple[Any, int, Any] | None = None

    def __reduce__(self) -> Any:
        return PackCache, ()  # a copy of a module, or one from a file, packs its own

    def get(self, layers: Any, weights: Sequence[Any]) -> Any:
        """The packed form of `weights`, or `weights` themselves where they cannot be recognised again."""
        digest = functional.digest(weights)
        if digest is None:
            return weights
        last = self._last
        if last is not None and last[0] is layers and last[1] == digest:
            return last[2]
        packed = functional.pack_weights(layers, weights)
        self._last = (layers, digest, packed)
        return packed


def run(
    options: Options, inputs: Inputs, extras: Extras, cache: Callable[[], PackCache | None]
) -> tuple[Tensor | None, ...]:
    """The five outputs of `kernels.forward`; `cache` gives None where the weights are made anew for each call."""
    tensors = inputs.flat()
    if not _is_plain(tensors):
        return operators.stack(options, inputs, extras)
    if forward_ad._current_level >= 0:
        operators.refuse_forward_mode(tensors)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        results: tuple[Tensor | None, ...] = Layers.apply(options, extras, *tensors)
        return results
    packed = None
    if options.dropout == 0 and (packs := cache()) is not None:
        packed = packs.get(kernels.stack(options, inputs.weights), [kernels.array(w) for w in inputs.weights])
    return kernels.forward(options, inputs, extras, training=options.dropout > 0, packed=packed)[0]


def _is_plain(tensors: Sequence[Tensor | None]) -> bool:
    if torch.compiler.is_compiling() or _transforming() or _modes() or _tracing() is not None:
        return False
    x = tensors[0]
    return x is not None and x.device.type == "cpu" and all(t is None or type(t) in _PLAIN for t in tensors)
