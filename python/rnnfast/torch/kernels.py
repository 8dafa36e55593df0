"""Tensors to the engine and back.

The engine reads and writes the memory of the tensors itself; it makes a copy only where a last axis is strided. Nothing
here knows of autograd: tensors come in, tensors and the engine's context come out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .. import _device, functional

DTYPES = {torch.float32: "float32", torch.float64: "float64"}
_ARRAYS = {torch.__dict__[name]: np.dtype(name) for name in ("float32", "float64", "int64", "bool")}
CUDA_DTYPES = {**DTYPES, torch.float16: "float16", torch.bfloat16: "bfloat16"}


def on_device(tensor: Tensor) -> bool:
    """Whether rnnfast._cuda serves it. (Asked at every call, and traced by compilers: no more than this.)"""
    return tensor.is_cuda or _device.extension.emulate


class Options(NamedTuple):
    """What of a call is not a tensor."""

    cell: str
    num_layers: int
    bidirectional: bool
    batch_first: bool
    dropout: float  # 0 when not in training
    return_states: bool
    lean: bool = False
    checkpoint_every: int = 0  # 0: not asked for


class Extras(NamedTuple):
    """The tensors of a call that have no gradient."""

    lengths: Tensor | None  # int64 [B]
    reset: Tensor | None  # bool [T, B], or as x with batch_first
    seed: Tensor | None  # int64 [], of dropout


NO_EXTRAS = Extras(None, None, None)


class Inputs(NamedTuple):
    """The tensors of a call that may have a gradient, `weights` in torch's flat order."""

    x: Tensor  # [T, B, I], or [B, T, I] with batch_first
    h0: Tensor | None  # [L*D, B, P]
    c0: Tensor | None  # [L*D, B, H]
    reset_h: Tensor | None  # [L*D, B or 1, P]
    reset_c: Tensor | None  # [L*D, B or 1, H]
    weights: list[Tensor]

    def flat(self) -> tuple[Tensor | None, ...]:
        return (self.x, self.h0, self.c0, self.reset_h, self.reset_c, *self.weights)

    @staticmethod
    def from_flat(tensors: Sequence[Any]) -> Inputs:
        x, h0, c0, reset_h, reset_c, *weights = tensors
        return Inputs(x, h0, c0, reset_h, reset_c, weights)


# output, hn, cn, h_all, c_all; what the cell lacks, or was not asked for, is None
Outputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def array(tensor: Tensor | None) -> Any:
    """The tensor's own memory, as the engine of its device takes it."""
    if tensor is None:
        return None
    tensor = tensor.detach()  # an output too: its graph, made later, leads to the context that keeps this array
    if on_device(tensor):
        return tensor.resolve_neg()
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    dtype = _ARRAYS.get(tensor.dtype)
    if dtype is None or not tensor.is_cpu or tensor.layout is not torch.strided:
        return tensor.numpy()  # which refuses what has no memory
    return functional.as_array(tensor, dtype)


def stack(options: Options, weights: Sequence[Tensor]) -> Any:
    """The engine's object for a configuration."""
    directions = 2 if options.bidirectional else 1
    each = len(weights) // (options.num_layers * directions)
    rows, input_size = weights[0].shape
    hidden_size, output_size = rows // functional.CELLS[options.cell].gates, weights[1].shape[1]
    return functional.stack(
        options.cell,
        CUDA_DTYPES[weights[0].dtype],
        input_size,
        hidden_size,
        output_size if each in (3, 5) else 0,
        options.num_layers,
        directions,
        each >= 4,
        on_device=on_device(weights[0]),
    )


def output_shapes(options: Options, inputs: Inputs) -> tuple[list[Any], list[Any], list[Any] | None]:
    """The shapes of output, hn and cn (None without a cell state)."""
    weights, x = inputs.weights, inputs.x
    directions = 2 if options.bidirectional else 1
    state_size = weights[1].shape[1]
    runs, batch_size = options.num_layers * directions, x.shape[0 if options.batch_first else 1]
    cell = functional.CELLS[options.cell]
    cn = [runs, batch_size, weights[0].shape[0] // cell.gates] if cell.has_cell_state else None
    return [x.shape[0], x.shape[1], directions * state_size], [runs, batch_size, state_size], cn


_threads = torch.get_num_threads()
if _threads < functional.get_num_threads():
    functional.set_num_threads(_threads)


def follow_threads() -> None:
    """Do as `torch.set_num_threads` said: a DataLoader's worker sets it to 1, and so do many scripts."""
    global _threads
    wanted = torch.get_num_threads()
    if wanted != _threads:
        _threads = wanted
        functional.set_num_threads(wanted)


class Ready(NamedTuple):
    """Weights as the engine takes them."""

    layers: Any
    arrays: list[Any]
    packed: Any  # in the kernels' order, or None


class Known(NamedTuple):
    """Weights that were seen before, in a module of this kind."""

    kind: tuple[str, int, bool]  # cell, layers, bidirectional
    memory: Any  # _core.TensorMemory
    ready: Ready


class WeightCache:
    """The weights of a module in the kernels' order, for as long as their bytes stay the same.

    Not keyed on addresses and version counters: a write through ``tensor.data``, from NumPy or from another process
    changes neither, and would leave stale weights in use. Reading the weights once costs a fraction of packing them.
    """

    __slots__ = ("_digest", "_known", "_packed")

    def __init__(self) -> None:
        self._known: Known | None = None
        self._packed: tuple[Any, Any] | None = None  # a stack and weights in its order
        self._digest: int | None = None  # of their bytes

    def __reduce__(self) -> Any:
        return WeightCache, ()  # a copy of a module, or one from a file, packs its own

    def get(self, options: Options, weights: list[Tensor]) -> Ready:
        known = self._known
        if known is None or known.kind != options[:3] or not known.memory.holds(weights):
            known = self._see(options, weights)
        layers, arrays, _ = known.ready
        # A device's are taken as they are.
        digest = None if on_device(weights[0]) else known.memory.digest()
        if digest is None:
            return known.ready
        packed = self._packed
        if packed is None or packed[0] is not layers or self._digest != digest:
            packed = self._packed = (layers, functional.pack_weights(layers, arrays))
            self._digest = digest
        return Ready(layers, arrays, packed[1])

    def unchanged(self, kind: tuple[str, int, bool], weights: list[Tensor]) -> tuple[Any, Any] | None:
        """The stack and the packed weights of the last `get`, if these are the same tensors with the same bytes."""
        known, packed = self._known, self._packed
        if known is None or packed is None or known.kind != kind:
            return None
        if packed[0] is not known.ready.layers or not known.memory.holds(weights):
            return None
        return packed if known.memory.digest() == self._digest else None

    def _see(self, options: Options, weights: list[Tensor]) -> Known:
        ready = Ready(stack(options, weights), list(map(array, weights)), None)
        known = Known(options[:3], functional.TensorMemory(weights), ready)
        if all(type(w) is torch.nn.Parameter for w in weights):  # nothing that belongs to a graph is kept
            self._known = known
        return known


_fresh = {dtype: functional.Fresh(torch.empty, dtype, torch.device("cpu")) for dtype in DTYPES}


def infer(
    packed: tuple[Any, Any], x: Tensor, h0: Tensor | None, c0: Tensor | None, batch_first: bool
) -> tuple[Tensor | None, ...] | None:
    """(output, hn, cn) of plain tensors, without a graph; None where a shape or a layout is not plain."""
    follow_threads()
    stack, weights = packed
    return functional.run_inference(stack.infer, x, h0, c0, weights, batch_first, _fresh[x.dtype])


def infer_step(
    packed: tuple[Any, Any], x: Tensor, h0: Tensor | None, c0: Tensor | None
) -> tuple[Tensor | None, ...] | None:
    """(h, c) after one step of one layer, all [B, .]; None as for `infer`."""
    follow_threads()
    stack, weights = packed
    return functional.run_inference(stack.infer_step, x, h0, c0, weights, _fresh[x.dtype])


def forward(
    options: Options, inputs: Inputs, extras: Extras, *, training: bool, ready: Ready | None = None
) -> tuple[Outputs, Any]:
    """Run the engine: the outputs, and its context when `training` (which dropout needs, too)."""
    follow_threads()
    x, h0, c0, reset_h, reset_c, weights = inputs
    if ready is None:
        ready = Ready(stack(options, weights), list(map(array, weights)), None)
    shape, hn_shape, cn_shape = output_shapes(options, inputs)
    output = torch.empty(shape, dtype=x.dtype, device=x.device)
    hn = torch.empty(hn_shape, dtype=x.dtype, device=x.device)
    cn = None if cn_shape is None else torch.empty(cn_shape, dtype=x.dtype, device=x.device)
    *_, h_all, c_all, context = functional.run_forward(
        ready.layers,
        array(x),
        array(h0),
        array(c0),
        ready.arrays if training or ready.packed is None else ready.packed,
        options.batch_first,
        training,
        array(extras.lengths),
        array(extras.reset),
        array(reset_h),
        array(reset_c),
        options.return_states,
        options.dropout,
        0 if extras.seed is None else int(extras.seed),
        0,
        _target(output),
        _target(hn),
        _target(cn),
        ready.packed if training else None,
        options.lean,
        options.checkpoint_every,
    )
    return (output, hn, cn, _tensor(h_all), _tensor(c_all)), context


def rebind(context: Any, options: Options, inputs: Inputs, extras: Extras, output: Tensor) -> None:
    """Let a context read what its forward read, and wrote to `output`, from this memory."""
    x, h0, c0, reset_h, reset_c = (array(t) for t in inputs[:5])
    given = [x, h0, c0, list(map(array, inputs.weights)), array(extras.reset), reset_h, reset_c, array(output)]
    if on_device(inputs.x):  # there lengths are not copied either
        given.append(array(extras.lengths))
    context.rebind(stack(options, inputs.weights), *given)


def _target(tensor: Tensor | None) -> Any:
    """Memory to be written; the engine refuses the strides that an empty tensor has, and has nothing to write to it."""
    return None if tensor is None or tensor.numel() == 0 else array(tensor)


def _tensor(values: Any) -> Tensor | None:
    """Of its own, as in `array`."""
    if isinstance(values, Tensor):
        return values.detach()
    return None if values is None else torch.from_numpy(values)


def backward(
    options: Options,
    inputs: Inputs,
    context: Any,
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
    *,
    retain: bool,
) -> list[Tensor | None]:
    """The gradients of `inputs.flat()` where `needs` says so, from those of the five outputs (None: zero)."""
    follow_threads()
    need_x, need_weights = needs[0], any(needs[5:])
    grad_x = torch.empty(inputs.x.shape, dtype=inputs.x.dtype, device=inputs.x.device) if need_x else None
    _, grad_h0, grad_c0, grad_weights, grad_reset_h, grad_reset_c, _ = functional.run_backward(
        context,
        *(array(g) for g in grads),
        need_x,
        need_weights,
        retain,
        False,
        _target(grad_x),
        any(needs[1:3]),
    )
    found = [
        grad_x,
        _tensor(grad_h0),
        _tensor(grad_c0),
        _like(_tensor(grad_reset_h), inputs.reset_h),
        _like(_tensor(grad_reset_c), inputs.reset_c),
        *(map(_tensor, grad_weights) if need_weights else [None] * len(inputs.weights)),
    ]
    return [g if need else None for g, need in zip(found, needs, strict=True)]


def _like(gradient: Tensor | None, state: Tensor | None) -> Tensor | None:
    """A reset state that the batch shares collects over it."""
    if gradient is None or state is None or gradient.shape == state.shape:
        return gradient
    return gradient.sum(1, keepdim=True)


def keeps_graph() -> bool:
    """Whether the backward pass that is running may be followed by another through the same graph."""
    query = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if query is None else bool(query())


# ---- the context of a forward, as a tensor ----
#
# Autograd, torch.utils.checkpoint, offloading hooks and compilers decide about the life of tensors, so a context lives
# as long as a tensor does: eight bytes whose storage owns it. Who comes with a copy of that tensor, or after its death,
# finds no context and runs the forward again.


class Reserve(np.ndarray):
    """The owner of a token's storage."""

    context: Any
    output: Tensor  # shares the version counter of what the caller got
    version: int
    tokens: list[Tensor] | None  # of a call for each sample (vmap)

    def usable(self) -> bool:
        """Whether the context can still serve a backward: not used up, and `output`, which it reads, is unchanged."""
        return not self.context.consumed and self.output._version == self.version


_reserves: WeakValueDictionary[int, Reserve] = WeakValueDictionary()


def keep(context: Any, output: Tensor) -> Tensor:
    """A token [8] for the context of a forward that returned `output`."""
    reserve = np.zeros(8, np.uint8).view(Reserve)
    reserve.context, reserve.output, reserve.tokens = context, output.detach(), None
    reserve.version = 0 if output.is_inference() else output._version
    return _register(reserve)


def keep_all(tokens: list[Tensor]) -> Tensor:
    """A token [N, 8] for N tokens."""
    reserve = np.zeros((len(tokens), 8), np.uint8).view(Reserve)
    reserve.tokens = tokens
    return _register(reserve)


def _register(reserve: Reserve) -> Tensor:
    token = torch.from_numpy(reserve)
    _reserves[token.data_ptr()] = reserve
    return token


def find(token: Tensor) -> Reserve | None:
    """What the token stands for, unless it is a copy."""
    return _reserves.get(token.data_ptr()) if has_memory(token) else None


def is_fake(tensor: Tensor) -> bool:
    """Whether it has a shape alone: on "meta", or in a FakeTensorMode."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def has_memory(tensor: Tensor) -> bool:
    """Whether it is a tensor and not the stand-in of a transform, for instance of torch.func's."""
    return type(tensor) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
