"""Where rnnfast has no kernel: torch's own implementation, announced; and what autocast makes of dtypes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import _device, functional
from .._strict import fall_back
from . import composed, kernels
from .kernels import CUDA_DTYPES, DTYPES, Extras, Inputs, Options


def reason(x: Tensor, weight: Tensor) -> str | None:
    """Why no kernel can serve a call, or None. (Tensors without data need none.)"""
    if not (x.is_cpu or x.is_cuda or x.is_meta):
        return f"there is no kernel for the device {x.device.type!r}"
    missing = _missing_engine() if x.is_cuda and not kernels.is_fake(x) else None
    if missing is not None:
        return f"there is no kernel for the device 'cuda': {missing}"
    if weight.dtype not in (CUDA_DTYPES if kernels.on_device(weight) else DTYPES):
        return f"there is no kernel for {weight.dtype} on {'CUDA' if x.is_cuda else 'the CPU'}"
    if x.layout is not torch.strided or weight.layout is not torch.strided:
        return f"there is no kernel for the layout {x.layout if x.layout is not torch.strided else weight.layout}"
    return None


def _at_trace_time(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let torch.compile call it while it traces, and keep the result.

    As torch.compiler.assume_constant_result, without the second that importing the compiler takes.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_at_trace_time
def _missing_engine() -> str | None:
    return _device.unavailable()


@_at_trace_time
def announce(why: str) -> bool:
    """Say it once, or raise in strict mode."""
    fall_back(why, "torch's own implementation runs")
    return True


def run(options: Options, inputs: Inputs, extras: Extras, training: bool, batch_sizes: Tensor | None) -> Any:
    """The five outputs by torch's own implementation, or, for what torch lacks, by the composed path.

    With `batch_sizes`, x and output are a PackedSequence's data.
    """
    if extras.lengths is not None or extras.reset is not None or options.return_states:
        return composed.forward(options, inputs, draw_seed(options, extras))
    function = getattr(torch._VF, options.cell)
    has_c = functional.CELLS[options.cell].has_cell_state
    h0, c0 = _initial(options, inputs, batch_sizes)
    rest = [
        (h0, c0) if has_c else h0,
        list(inputs.weights),
        len(inputs.weights) // (options.num_layers * (2 if options.bidirectional else 1)) >= 4,
        options.num_layers,
        options.dropout,
        training,
        options.bidirectional,
    ]
    if batch_sizes is None:
        output, *state = function(inputs.x, *rest, options.batch_first)
    else:
        output, *state = function(inputs.x, batch_sizes, *rest)
    return output, state[0], state[1] if has_c else None, None, None


def run_cell(cell: str, x: Tensor, state: tuple[Tensor | None, ...], weights: list[Tensor]) -> tuple[Tensor, ...]:
    """One step [B, .] by torch's own implementation: the new state, (h,) or (h, c)."""
    zeros = x.new_zeros(x.shape[0], weights[1].shape[1])
    h, *c = (zeros if s is None else s for s in state)
    biases = weights[2:] or [None, None]
    result = getattr(torch._VF, f"{cell}_cell")(x, (h, *c) if c else h, *weights[:2], *biases)
    return tuple(result) if c else (result,)


def _initial(options: Options, inputs: Inputs, batch_sizes: Tensor | None) -> tuple[Tensor, Tensor]:
    x, weights = inputs.x, inputs.weights
    runs = options.num_layers * (2 if options.bidirectional else 1)
    batch_size = int(batch_sizes[0]) if batch_sizes is not None else x.shape[0 if options.batch_first else 1]
    hidden_size = weights[0].shape[0] // functional.CELLS[options.cell].gates
    h0 = x.new_zeros(runs, batch_size, weights[1].shape[1]) if inputs.h0 is None else inputs.h0
    c0 = x.new_zeros(runs, batch_size, hidden_size) if inputs.c0 is None else inputs.c0
    return h0, c0


def draw_seed(options: Options, extras: Extras) -> Extras:
    """With a seed for dropout from torch's generator, where there is dropout."""
    if options.dropout == 0:
        return extras
    return extras._replace(seed=torch.randint(2**63 - 1, (), device="cpu"))


# ---- autocast ----


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for the device of x."""
    return not x.is_meta and torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type)


def run_in_autocast(
    kind: str, layer: tuple[Any, ...], call: Callable[[Inputs], Any], inputs: Inputs, training: bool, packing: str = ""
) -> Any:
    """The five outputs of `call` under autocast.

    On the CPU computed in the weights' dtype and returned in the dtypes of torch.nn, on CUDA both in autocast's.
    """
    if kernels.on_device(inputs.x):
        return call(in_autocast_dtype(inputs))
    x, h0 = inputs.x, inputs.h0
    own, autocast = inputs.weights[0].dtype, torch.get_autocast_dtype(x.device.type)
    dtypes = (x.dtype, own, None if h0 is None else h0.dtype)
    grad = torch.is_grad_enabled()
    expected = autocast_dtypes(kind, layer, dtypes, packing, (training, grad, autocast)) or (autocast,) * 3
    converted = Inputs.from_flat([None if t is None else t.to(own) for t in inputs.flat()])
    wanted = (*expected, *expected[1:])
    return tuple(None if o is None else o.to(dtype) for o, dtype in zip(call(converted), wanted, strict=True))


def in_autocast_dtype(inputs: Inputs) -> Inputs:
    """In the dtype of autocast, all but float64, as PyTorch casts the arguments of an operator."""
    dtype = torch.get_autocast_dtype(inputs.x.device.type)
    cast = Inputs.from_flat([t if t is None or t.dtype is torch.float64 else t.to(dtype) for t in inputs.flat()])
    wanted = cast.weights[0].dtype
    for name, t in zip(("input", "hx", "hx", "reset_state", "reset_state"), cast.flat(), strict=False):
        if t is not None and t.dtype is not wanted:
            raise ValueError(f"{name}: expected dtype {wanted} under autocast, as the weights have, got {t.dtype}")
    return cast


@_at_trace_time
def autocast_dtypes(*question: Any) -> tuple[torch.dtype, ...] | None:
    """As `_ask_torch`, remembered."""
    return _ask_torch(*question)


@lru_cache(maxsize=1024)
def _ask_torch(
    kind: str,
    layer: tuple[Any, ...],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype | None],
    packing: str,
    modes: tuple[bool, bool, torch.dtype],
) -> tuple[torch.dtype, ...] | None:
    """The dtypes of output, hn and cn that torch.nn's own module returns under autocast; None where it refuses.

    They depend on which of its paths torch takes (for an LSTM bfloat16 when dense and float32 when ragged, for a GRU
    those of x), so torch is asked, with the smallest module of that kind.

    Parameters
    ----------
    kind : a class of torch.nn
    layer : (num_layers, bias, batch_first, dropout, bidirectional, proj_size), () for a cell
    dtypes : of x, of the weights, of hx or None
    packing : "" for a tensor, "even" or "ragged" for a PackedSequence
    modes : (the module trains, gradients are recorded, autocast's dtype)
    """
    training, grad, autocast = modes
    with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(grad), torch.autocast("cpu", autocast):
        try:
            found = list(_dtypes(_probe(kind, layer, dtypes, packing, training)))
        except (RuntimeError, ValueError, TypeError):
            return None
    if not layer:
        found.insert(0, found[0])  # a cell has no output beside h
    return (*found, found[-1])[:3]


def _probe(kind: str, layer: tuple[Any, ...], dtypes: tuple[Any, ...], packing: str, training: bool) -> Any:
    x_dtype, weight_dtype, hx_dtype = dtypes
    if not layer:
        module = getattr(torch.nn, kind)(2, 2, dtype=weight_dtype)
        state = torch.zeros(2, 2, dtype=hx_dtype)
        x: Any = torch.zeros(2, 2, dtype=x_dtype)
    else:
        num_layers, bias, batch_first, dropout, bidirectional, proj_size = layer
        options = {"proj_size": 1} if proj_size else {}
        module = getattr(torch.nn, kind)(
            2,
            2,
            min(num_layers, 2),
            bias=bias,
            batch_first=batch_first,
            dropout=dropout if num_layers > 1 else 0.0,
            bidirectional=bidirectional,
            dtype=weight_dtype,
            **options,
        )
        state = torch.zeros(min(num_layers, 2) * (2 if bidirectional else 1), 2, 2, dtype=hx_dtype)
        x = torch.zeros(2, 2, 2, dtype=x_dtype)
        if packing:
            lengths = torch.tensor([2, 1 if packing == "ragged" else 2])
            x = torch.nn.utils.rnn.pack_padded_sequence(x, lengths)
    module.train(training)
    if hx_dtype is None:
        return module(x)
    if kind not in ("LSTM", "LSTMCell"):
        return module(x, state)
    return module(x, (state[..., :1].contiguous() if layer and layer[5] else state, state))


def _dtypes(results: Any) -> Sequence[torch.dtype]:
    if isinstance(results, Tensor):
        return [results.dtype]
    if isinstance(results, torch.nn.utils.rnn.PackedSequence):
        return [results.data.dtype]
    return [dtype for result in results for dtype in _dtypes(result)]
