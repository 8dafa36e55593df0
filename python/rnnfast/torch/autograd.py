"""Eager calls: one node of the graph for a whole stack of layers.

`Layers` is that node, `LayersBackward` its backward where that is itself differentiated (``create_graph=True``). Both
run the engine; what flows back through `LayersBackward` comes from the composed path.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import composed, kernels
from .kernels import NO_EXTRAS, Extras, Inputs, Options, WeightCache


class Layers(Function):
    """(options, extras, cache or None, *inputs.flat()) -> the five outputs."""

    @staticmethod
    def forward(ctx: Any, options: Options, extras: Extras, cache: WeightCache | None, *tensors: Any) -> Any:
        inputs = Inputs.from_flat(tensors)
        ready = None if cache is None else cache.get(options, inputs.weights)
        if extras is not NO_EXTRAS:  # small, and often buffers that the next batch overwrites
            extras = Extras(*(None if t is None else t.clone() for t in extras))
        outputs, context = kernels.forward(options, inputs, extras, training=True, ready=ready)
        ctx.options, ctx.extras = options, extras
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(kernels.keep(context, outputs[0]), *tensors)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        token, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled():
            found = LayersBackward.apply(ctx.options, ctx.extras, needs, token, *grads, *tensors)
        else:
            found = run_backward(ctx.options, ctx.extras, needs, token, grads, tensors)
        return (None, None, None, *found)


class LayersBackward(Function):
    """(options, extras, needs, token, *gradients of the five outputs, *inputs.flat()) -> the gradients of inputs."""

    @staticmethod
    def forward(ctx: Any, options: Options, extras: Extras, needs: Any, token: Tensor, *tensors: Any) -> Any:
        ctx.options, ctx.extras, ctx.needs = options, extras, needs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return tuple(run_backward(options, extras, needs, token, tensors[:5], tensors[5:]))

    @staticmethod
    def backward(ctx: Any, *grads_of_grads: Any) -> Any:
        tensors = ctx.saved_tensors
        grads, inputs = tensors[:5], tensors[5:]
        wanted = [g for g, need, t in zip(grads_of_grads, ctx.needs, inputs, strict=True) if need and t is not None]
        of_grads, of_inputs = composed.second_derivative(ctx.options, ctx.extras, ctx.needs, grads, inputs, wanted)
        return (None, None, None, None, *of_grads, *of_inputs)


def run_backward(
    options: Options, extras: Extras, needs: Any, token: Tensor, grads: Any, tensors: Any
) -> list[Tensor | None]:
    """The engine's backward, after another forward where the first one's context is gone or its output has changed."""
    inputs = Inputs.from_flat(tensors)
    reserve = kernels.find(token)
    if reserve is not None and reserve.usable():
        context, retain = reserve.context, kernels.keeps_graph()
    else:
        (_, context), retain = kernels.forward(options, inputs, extras, training=True), False
    return kernels.backward(options, inputs, context, grads, needs, retain=retain)
