"""Recurrent layers as functions: arrays in, arrays and an explicit context out.

The only caller of the extension modules. A call runs a whole stack over a whole sequence::

    output, state, ctx = lstm(x, (h0, c0), weights)
    grad_x, grad_state, grad_weights = lstm_backward(ctx, grad_output)

Sizes: T time, B batch, I input_size, H hidden_size, P proj_size or H, L num_layers, D directions, G gates.

`weights` are in PyTorch's flat order: for each layer and direction ``weight_ih`` [G·H, I or D·P], ``weight_hh`` [G·H, P],
then with a bias ``bias_ih``, ``bias_hh`` [G·H], then with a projection ``weight_hr`` [P, H]. Gates of the LSTM are i, f, g, o,
those of the GRU r, z, n with the reset gate applied after the recurrent product (torch.nn and cuDNN).

Between a training-mode forward and its backward, the arrays x, hx, weights and reset_state must not change; `output` is
returned read-only, because the backward pass reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from . import _core, _device
from ._arrays import check_flag, check_int, check_number
from ._core import Fresh, TensorMemory, as_array

__all__ = [
    "CELLS",
    "Context",
    "Fresh",
    "Packed",
    "Stream",
    "TensorMemory",
    "as_array",
    "backward",
    "forward",
    "get_num_threads",
    "gru",
    "gru_backward",
    "kernel_calls",
    "lstm",
    "lstm_backward",
    "pack",
    "pack_weights",
    "rnn",
    "rnn_backward",
    "run_backward",
    "run_forward",
    "run_inference",
    "set_num_threads",
    "stack",
]


class CellInfo(NamedTuple):
    """What a cell needs: gates (G), whether there is a state c, and the names of its parameters."""

    gates: int
    has_cell_state: bool
    parameters: tuple[str, ...]


CELLS: dict[str, CellInfo] = {
    name: CellInfo(gates, has_c, tuple(parameters.split())) for name, gates, has_c, parameters in _core.cells()
}


class Context:
    """What a training-mode forward keeps for its backward.

    Attributes
    ----------
    grad_reset_state : array, pair or None
        After `backward`: the gradient of `reset_state`, in its structure and shape.
    grad_h : array [T, L·D, B, P] or None
        After a `backward` with ``record=True``: dL/dh_t in total, before the dropout of the next layer.
    nbytes : int
        The size of the reserve, beside the output itself.
    """

    __slots__ = ("_core", "_reset_state", "cell", "grad_h", "grad_reset_state", "has_cell_state")

    def __init__(self, core: Any, cell: str, reset_state: Any) -> None:
        self._core = core
        self.cell = cell
        self.has_cell_state = CELLS[cell].has_cell_state
        self._reset_state = reset_state
        self.grad_reset_state: Any = None
        self.grad_h: Any = None

    @property
    def nbytes(self) -> int:
        return int(self._core.nbytes)

    @property
    def plan(self) -> str:
        """How the call was shared between threads, in words."""
        return str(self._core.plan)


class Packed(NamedTuple):
    """Weights in the kernels' order, pinned when made; takes the place of `weights` where ``training=False``."""

    stack: Any
    core: Any
    cell: str


@lru_cache(maxsize=256)
def stack(
    cell: str,
    dtype: str,
    input_size: int,
    hidden_size: int,
    proj_size: int,
    num_layers: int,
    num_directions: int,
    bias: bool,
    parameters: tuple[float, ...] = (),
    on_device: bool = False,
) -> Any:
    """The engine's object for a configuration, as `run_forward` takes it."""
    engine: Any = _device if on_device else _core
    return engine.Stack(
        cell, dtype, input_size, hidden_size, proj_size, num_layers, num_directions, bias, list(parameters)
    )


def _cell_info(cell: str) -> CellInfo:
    info = CELLS.get(cell) if isinstance(cell, str) else None
    if info is None:
        raise ValueError(f"cell: expected one of {', '.join(CELLS)}, got {cell!r}")
    return info


def _parameters(info: CellInfo, cell: str, given: dict[str, Any]) -> tuple[float, ...]:
    if given.keys() != set(info.parameters):
        raise TypeError(f"{cell}: expected the parameters {list(info.parameters)}, got {sorted(given)}")
    return tuple(check_number(name, given[name]) for name in info.parameters)


MAX_THREADS = 4096


def _count(name: str, value: Any, most: int = 2**31 - 1) -> int:  # sizes are 32-bit in the engine's index arithmetic
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if not 1 <= value <= most:
        raise ValueError(f"{name}: expected an integer from 1 to {most}, got {value}")
    return int(value)


def memory_mode(lean: Any, checkpoint_every: Any) -> tuple[bool, int]:
    """(lean, checkpoint_every or 0) as `run_forward` takes them."""
    if checkpoint_every is None:
        return check_flag("lean", lean), 0
    check_flag("lean", lean)
    return True, _count("checkpoint_every", checkpoint_every)


def _word(name: str, value: Any) -> int:
    """An integer in [0, 2**64)."""
    if type(value) is int and 0 <= value < 2**64:  # nothing more to ask of the usual case
        return value
    number = check_int(name, value, minimum=0)
    if number >= 2**64:
        raise ValueError(f"{name}: expected below 2**64, got {number}")
    return number


_known_stacks: dict[tuple[Any, ...], Any] = {}  # by what `_check_stack` reads


def _stack_for(cell: str, weights: Any, num_layers: Any, bidirectional: Any, given: dict[str, Any]) -> Any:
    """The configuration, its sizes read off the first weights; the engine checks all others against it.

    What a call before had the same of is not looked at again: for small layers that would take longer than the kernels.
    """
    plain = type(cell) is str and type(num_layers) is int and type(bidirectional) is bool and not given
    arrays = type(weights) is list and len(weights) > 1 and all(type(w) is np.ndarray for w in weights[:5])
    if not (plain and arrays):
        return _check_stack(cell, weights, num_layers, bidirectional, given)
    shapes = [w.shape for w in weights[:5]]
    emulated = _device.extension.emulate  # NumPy's arrays are then the device's
    key = (cell, num_layers, bidirectional, len(weights), weights[0].dtype, emulated, *shapes)
    found = _known_stacks.get(key)
    if found is None:
        if len(_known_stacks) >= 256:
            _known_stacks.clear()
        found = _known_stacks[key] = _check_stack(cell, weights, num_layers, bidirectional, given)
    return found


def _check_stack(cell: str, weights: Any, num_layers: Any, bidirectional: Any, given: dict[str, Any]) -> Any:
    info = _cell_info(cell)
    layers, directions = _count("num_layers", num_layers), 2 if check_flag("bidirectional", bidirectional) else 1
    if not isinstance(weights, Sequence) or len(weights) < 2:
        raise TypeError(f"weights: expected a sequence of arrays in PyTorch's order, got {type(weights).__name__}")
    each, rest = divmod(len(weights), layers * directions)
    kinds = (2, 3, 4, 5) if info.has_cell_state else (2, 4)
    if rest or each not in kinds:
        raise ValueError(
            f"weights: expected {' or '.join(map(str, kinds))} arrays for each of {layers * directions} layers and "
            f"directions (num_layers={layers}), got {len(weights)}"
        )
    sizes = _sizes(info.gates, weights[:each])
    bias, library = each >= 4, _device.library_of(weights[0])
    dtype = library.dtype(weights[0]) if library else str(weights[0].dtype)
    return stack(cell, dtype, *sizes, layers, directions, bias, _parameters(info, cell, given), library is not None)


def _sizes(gates: int, weights: Sequence[Any]) -> tuple[int, int, int]:
    """I, H, and P or 0, of the first layer's weights. What disagrees with another weight is named beside it."""
    w_ih, w_hh, projected = weights[0], weights[1], len(weights) in (3, 5)
    for name, w, axes in (("weight_ih_l0", w_ih, "[G*H, I]"), ("weight_hh_l0", w_hh, "[G*H, P]")):
        if not isinstance(w, np.ndarray) and not _device.owns(w):
            raise TypeError(f"{name}: expected a numpy.ndarray or an array on a CUDA device, got {type(w).__name__}")
        if w.ndim != 2 or not all(1 <= size < 2**31 for size in w.shape):
            raise ValueError(f"{name}: expected shape {axes}, each from 1 to 2147483647, got {list(w.shape)}")
    if not _device.owns(w_ih) and w_ih.dtype not in (np.float32, np.float64):
        raise TypeError(f"weight_ih_l0: expected dtype float32 or float64, got {w_ih.dtype}")
    hidden, rest = divmod(w_ih.shape[0], gates)
    if rest:
        raise ValueError(f"weight_ih_l0: expected {gates} * H rows, got shape {list(w_ih.shape)}")
    output = w_hh.shape[1]
    if output >= hidden if projected else output != hidden:
        wanted = f"fewer columns than H={hidden}" if projected else f"shape {[w_ih.shape[0], hidden]}"
        raise ValueError(
            f"weight_hh_l0: expected {wanted} beside weight_ih_l0 {list(w_ih.shape)}, got {list(w_hh.shape)}"
        )
    w_hr = weights[-1]  # where it is projected; the engine looks at all else that may be wrong with it
    if projected and isinstance(w_hr, np.ndarray) and w_hr.shape[:1] != (output,):
        raise ValueError(f"weight_hr_l0: expected P={output} rows, as weight_hh_l0 has columns, got {list(w_hr.shape)}")
    return w_ih.shape[1], hidden, output if projected else 0


def _pair(name: str, value: Any, has_cell_state: bool) -> tuple[Any, Any]:
    """(h, c) of a state-like argument; c is None for cells without one."""
    if value is None:
        return None, None
    if not has_cell_state:
        if isinstance(value, (tuple, list)):
            raise TypeError(f"{name}: expected one array (this cell has no cell state), got a {type(value).__name__}")
        return value, None
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name}: expected a pair (h, c), got {type(value).__name__}")
    if len(value) != 2:
        raise ValueError(f"{name}: expected a pair (h, c), got {len(value)} elements")
    return value[0], value[1]


def _unpair(h: Any, c: Any, has_cell_state: bool) -> Any:
    return (h, c) if has_cell_state else h


def _check_beside_weights(x: Any, weight: Any) -> None:
    """Where x and weight_ih_l0 disagree, either may be the wrong one: the message names both."""
    if not isinstance(x, np.ndarray) or not isinstance(weight, np.ndarray):
        return  # the engine refuses it
    if x.dtype != weight.dtype:
        raise TypeError(
            f"x: expected dtype {weight.dtype}, that of weight_ih_l0, got {x.dtype} (nothing is converted silently)"
        )
    if x.ndim == 3 and x.shape[2] != weight.shape[1]:
        raise ValueError(f"x: expected I={weight.shape[1]} features, as weight_ih_l0 has, got shape {list(x.shape)}")


def _integer_array(name: str, value: Any, wanted: str, kinds: str) -> Any:
    """An array or list of one of the kinds of dtype; shape and values are the engine's to check."""
    if value is None or _device.owns(value):
        return value
    try:
        array = np.asarray(value)
    except Exception as error:  # whatever a foreign object raises, or a ragged list
        raise TypeError(f"{name}: expected {wanted}, got {type(value).__name__} ({error})") from None
    if array.dtype.kind == "O" and array.size and all(isinstance(number, int) for number in array.flat):
        raise ValueError(f"{name}: expected {wanted} of 64 bits, got {max(array.flat, key=abs)}, which is out of range")
    if array.dtype.kind not in kinds and array.size:
        raise TypeError(f"{name}: expected {wanted}, got dtype {array.dtype}")
    return array


def integers(name: str, value: Any) -> Any:
    """`value` as an array of integers; TypeError naming `name` where it is none."""
    return _integer_array(name, value, "integers", "iu")


def _flags(name: str, value: Any) -> Any:
    return _integer_array(name, value, "bool or integers 0 and 1", "iub")


def _check_packed(name: str, cell: str, packed: Any) -> Any:
    """The engine's packed weights, if they are those of `cell`."""
    if not isinstance(packed, Packed):
        raise TypeError(f"{name}: expected Packed, got {type(packed).__name__}")
    _cell_info(cell)
    if packed.cell != cell:
        raise ValueError(f"{name}: expected weights packed for the cell {cell}, got those of {packed.cell}")
    return packed.core


def pack(cell: str, weights: Any, *, num_layers: int = 1, bidirectional: bool = False, **parameters: float) -> Packed:
    """Rearrange `weights` once for any number of calls with ``training=False`` and for streams."""
    layers = _stack_for(cell, weights, num_layers, bidirectional, parameters)
    return Packed(layers, pack_weights(layers, weights), cell)


# ---- the engine itself: for callers that bring their own memory and have checked what the engine does not ----

_kernel_calls = 0


def kernel_calls() -> int:
    """How many forward and backward calls the engine has run in this process (steps of streams apart)."""
    return _kernel_calls


def run_forward(layers: Any, *arguments: Any) -> tuple[Any, ...]:
    """``(output, hn, cn, h_all, c_all, context)`` of the engine's forward; what is absent is None.

    The arguments, all by position, are NumPy arrays or None: x, h0, c0, weights (a list, or what `pack_weights` made),
    batch_first, training, lengths, reset, reset_h, reset_c, return_states, dropout, seed, call; then, to be written
    into, output, hn, cn; then what `pack_weights` made of the weights, where they come as a list; then what
    `memory_mode` gives.
    """
    global _kernel_calls
    results: tuple[Any, ...] = layers.forward(*arguments)
    _kernel_calls += 1
    return results


def run_inference(call: Any, *arguments: Any) -> tuple[Any, ...] | None:
    """What `call`, an engine's `infer` or `infer_step`, makes of tensors of PyTorch; None where one is not plain.

    The arguments, all by position: x, h0, c0 (on the CPU, of the weights' dtype), what `pack_weights` made, batch_first
    (not for a step), and a `Fresh`.
    """
    global _kernel_calls
    results: tuple[Any, ...] | None = call(*arguments)
    _kernel_calls += results is not None
    return results


def run_backward(context: Any, *arguments: Any) -> tuple[Any, ...]:
    """``(grad_x, grad_h0, grad_c0, [grad_weights], grad_reset_h, grad_reset_c, grad_h)`` of the engine's backward.

    The arguments, all by position: grad_output, grad_hn, grad_cn, grad_h_all, grad_c_all, need_grad_x,
    need_grad_weights, retain, record; then, to be written into, grad_x; then need_grad_state. Gradients of reset states
    come row by row.
    """
    global _kernel_calls
    results: tuple[Any, ...] = context.backward(*arguments)
    _kernel_calls += 1
    return results


def pack_weights(layers: Any, weights: Sequence[Any]) -> Any:
    """The weights in the kernels' order, for `run_forward` when not training."""
    engine: Any = _device if isinstance(layers, _device.Stack) else _core
    return engine.Packed(layers, weights)


def forward(
    cell: str,
    x: Any,
    hx: Any,
    weights: Any,
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = True,
    lengths: Any = None,
    reset: Any = None,
    reset_state: Any = None,
    return_states: bool = False,
    seed: int = 0,
    call: int = 0,
    lean: bool = False,
    checkpoint_every: int | None = None,
    **parameters: float,
) -> tuple[Any, ...]:
    """Run a stack of recurrent layers over a sequence.

    Parameters
    ----------
    cell : str
        A key of `CELLS`.
    x : array [T, B, I], or [B, T, I] with `batch_first`
        float32 or float64, the dtype of the weights.
    hx : array, pair or None
        h0 [L·D, B, P], for the LSTM (h0, c0) with c0 [L·D, B, H]; None: zeros.
    weights : sequence of arrays, or `Packed` when not training
    dropout : float
        Between layers, when training; a function of (seed, call, layer, t, b, unit) alone.
    lengths : integers [B], optional
        Valid steps of each row, any order, zero allowed. `output` is zero past them.
    reset : bool [T, B] (as x with `batch_first`), optional
        A new segment starts at t: the state before it is replaced by zero, or by `reset_state` [L·D, B or 1, P or H].
    return_states : bool
        Also return h of every layer and step, [T, L·D, B, P] (for the LSTM with c, [T, L·D, B, H]).
    lean : bool
        When training, keep no gates: the backward pass makes them again from `x` and `output`, to the same bits. The
        context then holds at most T·B·H values of a layer and direction beside its output.
        On a CUDA device gradients that are sums over steps may differ in their last digits.
    checkpoint_every : int, optional
        Lean, and the state c is kept before every so many steps only (or a few more, where that costs nothing).
    parameters
        Those that `CELLS` names for the cell.

    Returns
    -------
    output : array [T, B, D·P] or [B, T, D·P]
    state : as hx, after the last valid step
    states : with `return_states`
    ctx : Context, or None when not training

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came. Nothing has been changed.
    """
    if isinstance(weights, Packed):
        layers, matrices = weights.stack, _check_packed("weights", cell, weights)
    else:
        layers, matrices = _stack_for(cell, weights, num_layers, bidirectional, parameters), weights
        _check_beside_weights(x, weights[0])
    has_c = CELLS[cell].has_cell_state
    training = check_flag("training", training)
    h0, c0 = _pair("hx", hx, has_c)
    reset_h, reset_c = _pair("reset_state", reset_state, has_c)
    if reset is None and reset_state is not None:
        raise ValueError("reset_state: expected None without reset")
    output, hn, cn, h_all, c_all, core = run_forward(
        layers,
        x,
        h0,
        c0,
        matrices,
        check_flag("batch_first", batch_first),
        training,
        integers("lengths", lengths),
        _flags("reset", reset),
        reset_h,
        reset_c,
        check_flag("return_states", return_states),
        dropout if type(dropout) is float else check_number("dropout", dropout),
        _word("seed", seed),
        _word("call", call),
        *(None, None, None, None),
        *memory_mode(lean, checkpoint_every),
    )
    ctx = None
    if training:
        if isinstance(output, np.ndarray):
            output.flags.writeable = False
        ctx = Context(core, cell, (reset_h, reset_c))
    if return_states:
        return output, _unpair(hn, cn, has_c), _unpair(h_all, c_all, has_c), ctx
    return output, _unpair(hn, cn, has_c), ctx


def backward(
    ctx: Context,
    grad_output: Any = None,
    grad_state: Any = None,
    *,
    grad_states: Any = None,
    need_grad_x: bool = True,
    need_grad_weights: bool = True,
    need_grad_state: bool = True,
    retain: bool = False,
    record: bool = False,
) -> tuple[Any, Any, Any]:
    """Backpropagation through time for a forward with ``training=True``.

    Parameters
    ----------
    ctx : Context
    grad_output, grad_state, grad_states
        Gradients of what `forward` returned, in the same shapes; None, or None in a pair, is zero. `grad_output` past a
        row's length is ignored, even where it is NaN.
    need_grad_x, need_grad_weights, need_grad_state : bool
        False skips the product and returns None.
    retain : bool
        Keep the reserve for another backward; without it a second one raises RuntimeError.
    record : bool
        Also put dL/dh_t of every step into ``ctx.grad_h``.

    Returns
    -------
    grad_x : array, shape of x, or None
    grad_state : as hx, or None
    grad_weights : list of arrays in the order of the weights, or None
    """
    if not isinstance(ctx, Context):
        raise TypeError(f"ctx: expected the Context of a forward with training=True, got {type(ctx).__name__}")
    grad_hn, grad_cn = _pair("grad_state", grad_state, ctx.has_cell_state)
    grad_h_all, grad_c_all = _pair("grad_states", grad_states, ctx.has_cell_state)
    grad_x, grad_h0, grad_c0, grad_weights, grad_reset_h, grad_reset_c, grad_h = run_backward(
        ctx._core,
        grad_output,
        grad_hn,
        grad_cn,
        grad_h_all,
        grad_c_all,
        check_flag("need_grad_x", need_grad_x),
        check_flag("need_grad_weights", need_grad_weights),
        check_flag("retain", retain),
        check_flag("record", record),
        None,
        check_flag("need_grad_state", need_grad_state),
    )
    reset_h, reset_c = ctx._reset_state
    resets = _unpair(_like(grad_reset_h, reset_h), _like(grad_reset_c, reset_c), ctx.has_cell_state)
    ctx.grad_reset_state = None if reset_h is None and reset_c is None else resets
    ctx.grad_h = grad_h
    grad_state = _unpair(grad_h0, grad_c0, ctx.has_cell_state) if need_grad_state else None
    return grad_x, grad_state, grad_weights if need_grad_weights else None


def _like(gradient: Any, state: Any) -> Any:
    """A reset state that the batch shares collects over it."""
    if gradient is None or gradient.shape == state.shape:
        return gradient
    return gradient.sum(axis=1, keepdims=True)


def lstm(x: Any, hx: Any, weights: Any, **options: Any) -> tuple[Any, ...]:
    """Long short-term memory (Hochreiter & Schmidhuber 1997): ``output, (hn, cn), ctx``; options as `forward`."""
    return forward("lstm", x, hx, weights, **options)


def gru(x: Any, hx: Any, weights: Any, **options: Any) -> tuple[Any, ...]:
    """Gated recurrent unit (Cho et al. 2014): ``output, hn, ctx``; options as `forward`."""
    return forward("gru", x, hx, weights, **options)


def rnn(x: Any, hx: Any, weights: Any, *, nonlinearity: str = "tanh", **options: Any) -> tuple[Any, ...]:
    """Vanilla recurrent network (Elman 1990), tanh or relu: ``output, hn, ctx``; options as `forward`."""
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity: expected 'tanh' or 'relu', got {nonlinearity!r}")
    return forward(f"rnn_{nonlinearity}", x, hx, weights, **options)


lstm_backward = gru_backward = rnn_backward = backward


class Stream:
    """One step after another in one direction, with pinned weights and the state inside.

    `step(x_t, reset=None, out=None)`: x_t [B, I], reset bool [B], out [B, P]; returns h of the last layer.
    """

    __slots__ = ("_cell", "_core", "_has_cell_state", "step")

    def __init__(self, cell: str, packed: Packed, batch_size: int, *, num_layers: int = 1) -> None:
        weights = _check_packed("packed", cell, packed)
        engine: Any = _device if isinstance(packed.stack, _device.Stack) else _core
        self._core = engine.Stream(packed.stack, weights, _count("batch_size", batch_size))
        self._cell, self._has_cell_state = cell, CELLS[cell].has_cell_state
        self.step = self._core.step  # nothing between the caller and the kernel

    def get_state(self) -> Any:
        """Copies, structured as hx."""
        return self._core.get_state()

    def set_state(self, state: Any) -> None:
        """Take a copy of `state`, structured as hx; None is zero."""
        self._core.set_state(*_pair("state", state, self._has_cell_state))

    def reorder(self, rows: Any) -> None:
        """Row i takes the state of row ``rows[i]``."""
        self._core.reorder(integers("rows", rows))

    def fork(self) -> Stream:
        """Another that goes on from here on its own, with the same weights."""
        other = object.__new__(Stream)
        other._core, other._cell, other._has_cell_state = self._core.fork(), self._cell, self._has_cell_state
        other.step = other._core.step
        return other

    def set_packed(self, packed: Packed) -> None:
        """Take other weights of the same configuration; the state stays."""
        self._core.set_packed(_check_packed("packed", self._cell, packed))

    def close(self) -> None:
        """Give the weights and the state back; every later call raises RuntimeError."""
        self._core.close()


def get_num_threads() -> int:
    """Threads that a call may use: OMP_NUM_THREADS, else the physical cores, unless `set_num_threads` said otherwise."""
    return int(_core.get_num_threads())


def set_num_threads(n: int) -> None:
    """Set the most threads that a call may use. Results are bitwise repeatable for one thread count."""
    _core.set_num_threads(_count("n", n, MAX_THREADS))
