"""The same calls as operators of torch.library: for torch.compile, torch.export, torch.func and everything else that
wants to see an operator instead of Python.

``rnnfast::stack`` and ``rnnfast::stack_backward`` are functions of tensors alone. Between the two travels a token
(`kernels.keep`) that stands for the engine's context; a backward that finds none behind it runs the forward again, so
a copied, offloaded or exported graph stays right. An absent result is an empty tensor, as operators return no None.

Their autograd kernels are written by hand: one that torch.library generates drops the tangents of forward mode and
answers zero where nothing requires a gradient. These refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.forward_ad import unpack_dual

from . import composed, kernels
from .kernels import Extras, Inputs, Options

_INPUTS = "Tensor x, Tensor? h0, Tensor? c0, Tensor? reset_h, Tensor? reset_c, Tensor[] weights"
_EXTRAS = "Tensor? lengths, Tensor? reset, Tensor? seed"
_OPTIONS = (
    "str cell, int num_layers, bool bidirectional, bool batch_first, float dropout, bool return_states, "
    "bool lean, int checkpoint_every"
)
_WHERE = slice(9, 9 + len(Options._fields))  # the options among the arguments of either operator, without gradients
_OUTPUTS = "Tensor output, Tensor hn, Tensor cn, Tensor h_all, Tensor c_all"
_GRADS = "Tensor? grad_output, Tensor? grad_hn, Tensor? grad_cn, Tensor? grad_h_all, Tensor? grad_c_all"

torch.library.define(
    "rnnfast::stack",
    f"({_INPUTS}, {_EXTRAS}, {_OPTIONS}, bool save) -> ({_OUTPUTS}, Tensor token)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "rnnfast::stack_backward",
    f"({_GRADS}, {_INPUTS}, {_EXTRAS}, {_OPTIONS}, Tensor output, Tensor token, bool[] needs) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)
_stack = torch.ops.rnnfast.stack.default
_stack_backward = torch.ops.rnnfast.stack_backward.default


def stack(options: Options, inputs: Inputs, extras: Extras) -> tuple[Tensor | None, ...]:
    """The five outputs through the operator."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        refuse_forward_mode(inputs.flat())
        *outputs, _ = _Stack.apply(options, *extras, *inputs.flat())
    else:
        *outputs, _ = _stack(*inputs[:5], inputs.weights, *extras, *options, False)
    return tuple(_present(options, outputs))


def _present(options: Options, outputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The five outputs, or their gradients: None again where an empty tensor stands for it."""
    has_c = kernels.functional.CELLS[options.cell].has_cell_state
    there = (True, True, has_c, options.return_states, has_c and options.return_states)
    return [o if is_there else None for o, is_there in zip(outputs, there, strict=True)]


def _parse(arguments: Sequence[Any]) -> tuple[Inputs, Extras, Options, tuple[Any, ...]]:
    """Inputs, extras and options of an operator's arguments, and what comes after them."""
    options = Options(*arguments[_WHERE])
    return Inputs(*arguments[:6]), Extras(*arguments[6:9]), options, tuple(arguments[_WHERE.stop :])


# ---- the kernels ----
#
# The token is on the CPU for every device: what stands behind it is Python's.

_DEVICES = ("CPU", "CUDA")


@torch.library.impl("rnnfast::stack", _DEVICES)
def _stack_kernel(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, extras, options, (save,) = _parse(arguments)
    outputs, context = kernels.forward(options, inputs, extras, training=save or options.dropout > 0)
    token = kernels.keep(context, outputs[0]) if save else torch.zeros(8, dtype=torch.uint8)
    return (*(inputs.x.new_empty(0) if o is None else o for o in outputs), token)


@torch.library.impl("rnnfast::stack_backward", _DEVICES)
def _stack_backward_kernel(*arguments: Any) -> list[Tensor]:
    grads, (inputs, extras, options, (output, token, needs)) = arguments[:5], _parse(arguments[5:])
    context, retain = _context(options, inputs, extras, output, token)
    found = kernels.backward(options, inputs, context, grads, needs, retain=retain)
    return [inputs.x.new_empty(0) if g is None else g for g in found]


def _context(options: Options, inputs: Inputs, extras: Extras, output: Tensor, token: Tensor) -> tuple[Any, bool]:
    """The forward's context, or another one, and whether it must survive."""
    reserve = kernels.find(token)
    if reserve is None or reserve.tokens is not None or reserve.context.consumed:
        return kernels.forward(options, inputs, extras, training=True)[1], False
    # A compiler may have used the memory that the forward was given for something else.
    kernels.rebind(reserve.context, options, inputs, extras, output)
    return reserve.context, kernels.keeps_graph()


@torch.library.register_fake("rnnfast::stack")
def _stack_fake(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, _, options, _ = _parse(arguments)
    x = inputs.x
    output, hn, cn = kernels.output_shapes(options, inputs)
    steps = x.shape[1 if options.batch_first else 0]
    h_all = [steps, *hn] if options.return_states else [0]
    c_all = [steps, *cn] if options.return_states and cn is not None else [0]
    shapes = (output, hn, [0] if cn is None else cn, h_all, c_all)
    return (*(x.new_empty(shape) for shape in shapes), torch.empty(8, dtype=torch.uint8, device="cpu"))


@torch.library.register_fake("rnnfast::stack_backward")
def _stack_backward_fake(*arguments: Any) -> list[Tensor]:
    inputs, _, _, (*_, needs) = _parse(arguments[5:])
    x = inputs.x
    return [
        x.new_empty(t.shape if need and t is not None else [0]) for t, need in zip(inputs.flat(), needs, strict=True)
    ]


# ---- autograd ----
#
# Functions with a `setup_context` and a `vmap` of their own, which torch.func asks for. It does not look into the
# autograd kernel of an operator, so under its transforms `stack` calls `_Stack` itself.


class _Stack(Function):
    """(options, *extras, *inputs.flat()) -> what the operator returns."""

    @staticmethod
    def forward(options: Options, *tensors: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(_stack(*tensors[3:8], list(tensors[8:]), *tensors[:3], *options, True))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.options = inputs[0]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[5])
        ctx.save_for_backward(output[0], output[5], *inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        output, token, *tensors = ctx.saved_tensors
        inputs = tensors[3:]
        needs = tuple(need and t is not None for need, t in zip(ctx.needs_input_grad[4:], inputs, strict=True))
        arguments = (output, token, *tensors[:3], *_present(ctx.options, grads[:5]), *inputs)
        found = _StackBackward.apply(ctx.options, needs, *arguments)
        return (None, None, None, None, *(g if need else None for g, need in zip(found, needs, strict=True)))

    @staticmethod
    def vmap(info: Any, in_dims: Any, options: Options, *tensors: Any) -> Any:
        samples = [_Stack.apply(options, *_sample(tensors, in_dims[1:], i)) for i in range(info.batch_size)]
        return _join_outputs(samples)


class _StackBackward(Function):
    """(options, needs, output, token, *extras, *the five gradients, *inputs.flat()) -> the gradients of the inputs."""

    @staticmethod
    def forward(options: Options, needs: Any, output: Tensor, token: Tensor, *tensors: Any) -> Any:
        extras, grads, inputs = tensors[:3], tensors[3:8], tensors[8:]
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(
                _stack_backward(*grads, *inputs[:5], list(inputs[5:]), *extras, *options, output, token, list(needs))
            )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.options, ctx.needs = inputs[:2]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[4:])

    @staticmethod
    def backward(ctx: Any, *grads_of_grads: Any) -> Any:
        tensors = ctx.saved_tensors
        extras, grads, inputs = Extras(*tensors[:3]), tensors[3:8], tensors[8:]
        wanted = [g for g, need in zip(grads_of_grads, ctx.needs, strict=True) if need]
        of_grads, of_inputs = composed.second_derivative(ctx.options, extras, ctx.needs, grads, inputs, wanted)
        return (*(None,) * 7, *of_grads, *of_inputs)

    @staticmethod
    def vmap(info: Any, in_dims: Any, options: Options, needs: Any, *tensors: Any) -> Any:
        tokens = _tokens(tensors[1])
        samples = []
        for i in range(info.batch_size):
            sample = _sample(tensors, in_dims[2:], i)
            if tokens is not None:
                sample[1] = tokens[i]
            samples.append(_StackBackward.apply(options, needs, *sample))
        found = tuple(map(torch.stack, zip(*samples, strict=True)))
        return found, (0,) * len(found)


@torch.library.impl("rnnfast::stack", "Autograd")
def _stack_autograd(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, extras, options, _ = _parse(arguments)
    if _differentiated(inputs.flat()):
        return tuple(_Stack.apply(options, *extras, *inputs.flat()))
    with torch._C._AutoDispatchBelowAutograd():
        return tuple(_stack(*arguments))


@torch.library.impl("rnnfast::stack_backward", "Autograd")
def _stack_backward_autograd(*arguments: Any) -> list[Tensor]:
    grads, (inputs, extras, options, (output, token, needs)) = arguments[:5], _parse(arguments[5:])
    if _differentiated((*grads, *inputs.flat())):
        return list(_StackBackward.apply(options, tuple(needs), output, token, *extras, *grads, *inputs.flat()))
    with torch._C._AutoDispatchBelowAutograd():
        return list(_stack_backward(*arguments))


def _differentiated(tensors: Sequence[Tensor | None]) -> bool:
    refuse_forward_mode(tensors)
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def refuse_forward_mode(tensors: Sequence[Tensor | None]) -> None:
    """Raise where a tensor carries a tangent."""
    if torch.autograd.forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if tensor is not None and unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                "rnnfast: forward-mode differentiation (jvp, jacfwd, hessian) has no kernel; use reverse mode, "
                "torch.func.jacrev for one, or rnnfast.torch.revert(module)"
            )


# ---- vmap: the kernels, sample by sample ----


def _sample(tensors: Sequence[Any], in_dims: Sequence[Any], i: int) -> list[Any]:
    """Sample i of the arguments."""
    return [_select(t, dim, i) for t, dim in zip(tensors, in_dims, strict=True)]


def _select(value: Any, dim: Any, i: int) -> Any:
    if isinstance(value, (list, tuple)) and isinstance(dim, (list, tuple)):
        return _sample(value, dim, i)
    return value if dim is None or value is None else value.select(dim, i)


def _join_outputs(samples: Sequence[Any]) -> Any:
    """What the operator returned for each sample, along a new first axis."""
    *outputs, tokens = zip(*samples, strict=True)
    token = kernels.keep_all(list(tokens)) if kernels.has_memory(tokens[0]) else torch.stack(tokens)
    return (*map(torch.stack, outputs), token), (0,) * 6


def _tokens(token: Tensor) -> list[Tensor] | None:
    """Those that `_join_outputs` joined, if they are still there."""
    reserve = kernels.find(token)
    return None if reserve is None else reserve.tokens


def _stack_vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
    return _join_outputs([_stack(*_sample(arguments, in_dims, i)) for i in range(info.batch_size)])


_register_vmap: Callable[..., Any] | None = getattr(torch.library, "register_vmap", None)  # since PyTorch 2.5
if _register_vmap is not None:
    _register_vmap("rnnfast::stack", _stack_vmap)
