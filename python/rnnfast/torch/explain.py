"""`rnnfast.explain` for PyTorch's modules."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

from ..explain import describe
from . import cells, fallback, kernels
from .kernels import CUDA_DTYPES, Inputs, Options
from .modules import Layer, make_extras
from .packed import unpack

RECURRENT = (torch.nn.RNNBase, torch.nn.RNNCellBase)


def explain_torch(module: torch.nn.Module, x: Any, lengths: Any = None) -> str:
    """As `rnnfast.explain`; of a module that only contains recurrent ones, a line each, by what it is first called with."""
    if not isinstance(x, (torch.Tensor, PackedSequence)):
        raise TypeError(f"x: expected a Tensor or a PackedSequence, got {type(x).__name__}")
    if isinstance(module, RECURRENT):
        return _explain(module, x, lengths)
    found = [(name, m) for name, m in module.named_modules() if isinstance(m, RECURRENT)]
    if not found:
        raise TypeError(f"module: expected a recurrent module, got {type(module).__name__} without any")
    if lengths is not None:
        raise TypeError(f"lengths: expected None, as for a layer alone, got some for {type(module).__name__}")
    calls, ending = _inner_calls(module, x)
    lines = [f"{name}: {_explain(m, *calls.get(name, (None, None)))}" for name, m in found]
    return "\n".join(
        line if name in calls else f"{line}; {ending}" for (name, _), line in zip(found, lines, strict=True)
    )


def _inner_calls(module: torch.nn.Module, x: Any) -> tuple[dict[str, tuple[Any, Any]], str]:
    """(x, lengths) of the first call of each recurrent module within, and why there is none of the others."""
    calls: dict[str, tuple[Any, Any]] = {}

    def watch(name: str, inner: torch.nn.Module) -> None:
        def note(_: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            calls.setdefault(name, (options.get("input", *args[:1]), options.get("lengths")))

        inner.register_forward_pre_hook(note, with_kwargs=True)

    devices = [x.data.device] if x.is_cuda else []
    try:
        model = copy.deepcopy(module)  # the call may change what it has beside its parameters
        for name, inner in model.named_modules():
            if isinstance(inner, RECURRENT):
                watch(name, inner)
        with torch.no_grad(), torch.random.fork_rng(devices):
            model(x)
    except Exception as error:  # it may take more than x
        words = str(error).partition("\n")[0]
        return calls, f"no plan, because the call ended before it: {type(error).__name__}: {words}"
    return calls, "no plan, because the call leaves it out"


def _explain(module: torch.nn.Module, x: Any, lengths: Any) -> str:
    name = type(module).__name__
    if not isinstance(module, (Layer, cells.Cell)):
        return f"{name}: torch's own implementation; rnnfast.torch.convert(module) replaces torch.nn's classes"
    weight = next(iter(module.parameters()))
    data = weight if x is None else x.data if isinstance(x, PackedSequence) else x
    why = fallback.reason(data, weight)
    if why is not None:
        return f"{name}: torch's own implementation, because {why}"
    dtype = CUDA_DTYPES[weight.dtype]
    if x is None or kernels.is_fake(data):
        return f"{name}: rnnfast's kernel for {dtype} on the {'GPU' if data.is_cuda else 'CPU'}"
    return describe(name, dtype, _plan(module, x, lengths), on_device=kernels.on_device(data))


def _plan(module: Layer | cells.Cell, x: Any, lengths: Any) -> str:
    batch_first = False
    if isinstance(module, cells.Cell):
        x = x.unsqueeze(0) if x.dim() == 2 else x[None, None]
        options = Options(module.cell(), 1, False, False, 0.0, False)
    else:
        batch_first = module.batch_first and not isinstance(x, PackedSequence) and x.dim() == 3
        options = module._options(batch_first, False)
        if isinstance(x, PackedSequence):
            x, lengths, _ = unpack(x)
        elif x.dim() == 2:
            x = x.unsqueeze(1)
    weights = module._weights()
    inputs = Inputs(x.detach().to(weights[0].dtype), None, None, None, None, weights)
    _, context = kernels.forward(options, inputs, make_extras(inputs.x, batch_first, lengths, None), training=True)
    return str(context.plan)
