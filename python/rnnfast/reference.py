"""The equations in plain array code: every cell and option, forward and backpropagation through time.

This is the text that the kernels are held against; it is slow, and written to be read. From the inside out:

1. a *cell*: one step and its adjoint, element by element, one row in `CELLS`. Nothing there knows of time or layers;
2. `run_direction`, `run_direction_adjoint`: the time loop of any cell, one layer, one direction;
3. `forward`, `backward`: layers, directions and dropout on top; the same signatures as `rnnfast.functional`;
4. Philox, the counter-based random numbers behind the dropout masks.

Sizes: T time, B batch, I input_size, H hidden_size, P proj_size or H, L num_layers, D directions, G gates of the cell.

All of it works on NumPy arrays (in the dtype given; float64 is the truth that kernels are compared with) and equally on
CuPy, PyTorch or JAX arrays. Nothing is written in place, so `forward` on tensors that require a gradient is a composed
path that the framework differentiates. Masks select and never multiply: a NaN in the padding leaks neither into results
nor, under automatic differentiation, into gradients.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "CELLS",
    "Cell",
    "Context",
    "backward",
    "dropout_mask",
    "forward",
    "philox4x32",
    "sigmoid",
    "weight_shapes",
]

Array = Any
State = tuple[Array, ...]  # (h,) or (h, c)


# ---------------------------------------------------------------------------------------------------------------------
# Arrays of any library
# ---------------------------------------------------------------------------------------------------------------------


def namespace(array: Array) -> Any:
    """The module whose functions work on `array`: numpy, torch, cupy, jax.numpy, or what the array itself names."""
    library = type(array).__module__.partition(".")[0]
    if library in ("numpy", "torch", "cupy"):
        return sys.modules[library]
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__()
    raise TypeError(f"expected an array of NumPy, CuPy, PyTorch or JAX, got {type(array).__name__}")


def as_array_like(value: Any, like: Array) -> Array:
    """`value`, in its own dtype, as an array of the library and on the device of `like`."""
    if hasattr(like, "new_zeros"):
        return namespace(like).as_tensor(value, device=like.device)
    return namespace(like).asarray(value)


def zeros(shape: tuple[int, ...], like: Array) -> Array:
    if hasattr(like, "new_zeros"):
        return like.new_zeros(shape)
    return namespace(like).zeros(shape, dtype=like.dtype)


def select(mask: Array | None, a: Array, b: Array) -> Array:
    """`a` where `mask`, else `b`; a mask of None is true everywhere."""
    return a if mask is None else namespace(a).where(mask, a, b)


def select_or_zero(mask: Array | None, a: Array) -> Array:
    return a if mask is None else select(mask, a, namespace(a).zeros_like(a))


def stack(arrays: Sequence[Array], axis: int, empty: tuple[int, ...], like: Array) -> Array:
    """Arrays along a new axis; no arrays at all make zeros of the shape `empty`."""
    return namespace(like).stack(list(arrays), axis) if arrays else zeros(empty, like)


def split(a: Array, parts: int) -> list[Array]:
    """[..., parts*H] as `parts` arrays [..., H]."""
    size = a.shape[-1] // parts
    return [a[..., k * size : (k + 1) * size] for k in range(parts)]


def join(*parts: Array) -> Array:
    """Arrays [..., H] as one [..., parts*H]."""
    return parts[0] if len(parts) == 1 else namespace(parts[0]).concatenate(parts, -1)


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x [..., in], weight [out, in], bias [out] -> [..., out]"""
    y = x @ weight.T
    return y if bias is None else y + bias


# ---------------------------------------------------------------------------------------------------------------------
# Activations
# ---------------------------------------------------------------------------------------------------------------------


def sigmoid(a: Array) -> Array:
    """1 / (1 + exp(-a)) to full relative precision: no exponential overflows, and small results keep their digits."""
    xp = namespace(a)
    e = xp.exp(xp.where(a >= 0, -a, a))  # not -abs(a), whose derivative at 0 is 0 to a framework
    return xp.where(a >= 0, xp.ones_like(a), e) / (1 + e)


def tanh(a: Array) -> Array:
    return namespace(a).tanh(a)


def relu(a: Array) -> Array:
    xp = namespace(a)
    return xp.where(a <= 0, xp.zeros_like(a), a)  # this way round a NaN stays a NaN


# ---------------------------------------------------------------------------------------------------------------------
# Cells: one step and its adjoint
# ---------------------------------------------------------------------------------------------------------------------
#
#   step(from_x, from_h, state, **parameters) -> new_state, saved
#   adjoint(saved, grad_new_state, **parameters) -> grad_from_x, grad_from_h, grad_state
#
#   from_x [B, G*H] = W_ih x_t + b_ih        from_h [B, G*H] = W_hh h_{t-1} + b_hh
#   state  (h [B, P],) or (h [B, P], c [B, H]); the new h is [B, H], the time loop projects it to P
#
# The time loop owns the matrix products. `grad_state` is what flows past them: of h_{t-1} only where the step uses it
# directly, else 0.0. In the adjoints da is the gradient of a gate before its activation.


def rnn_tanh_step(from_x: Array, from_h: Array, state: State) -> tuple[State, Any]:
    """h = tanh(W_ih x + b_ih + W_hh h + b_hh)"""
    h = tanh(from_x + from_h)
    return (h,), h


def rnn_tanh_adjoint(h: Array, grad: State) -> tuple[Array, Array, State]:
    (dh,) = grad
    da = dh * (1 - h * h)
    return da, da, (0.0,)


def rnn_relu_step(from_x: Array, from_h: Array, state: State) -> tuple[State, Any]:
    """h = max(0, W_ih x + b_ih + W_hh h + b_hh)"""
    h = relu(from_x + from_h)
    return (h,), h


def rnn_relu_adjoint(h: Array, grad: State) -> tuple[Array, Array, State]:
    (dh,) = grad
    da = namespace(h).where(h <= 0, namespace(h).zeros_like(h), dh)
    return da, da, (0.0,)


def lstm_step(from_x: Array, from_h: Array, state: State) -> tuple[State, Any]:
    """i, f, o = sigmoid(...), g = tanh(...), each of W_ih x + b_ih + W_hh h + b_hh; c = f c + i g; h = o tanh(c)"""
    _, c_prev = state
    a_i, a_f, a_g, a_o = split(from_x + from_h, 4)
    i, f, g, o = sigmoid(a_i), sigmoid(a_f), tanh(a_g), sigmoid(a_o)
    c = f * c_prev + i * g
    tanh_c = tanh(c)
    return (o * tanh_c, c), (i, f, g, o, c_prev, tanh_c)


def lstm_adjoint(saved: Any, grad: State) -> tuple[Array, Array, State]:
    i, f, g, o, c_prev, tanh_c = saved
    dh, dc = grad
    dc = dc + dh * o * (1 - tanh_c * tanh_c)
    da_i = dc * g * i * (1 - i)
    da_f = dc * c_prev * f * (1 - f)
    da_g = dc * i * (1 - g * g)
    da_o = dh * tanh_c * o * (1 - o)
    da = join(da_i, da_f, da_g, da_o)
    return da, da, (0.0, dc * f)


def gru_step(from_x: Array, from_h: Array, state: State) -> tuple[State, Any]:
    """r, z = sigmoid(W_ih x + b_ih + W_hh h + b_hh); n = tanh(W_in x + b_in + r (W_hn h + b_hn)); h = (1-z) n + z h"""
    (h_prev,) = state
    x_r, x_z, x_n = split(from_x, 3)
    h_r, h_z, h_n = split(from_h, 3)
    r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
    n = tanh(x_n + r * h_n)
    return ((1 - z) * n + z * h_prev,), (r, z, n, h_n, h_prev)


def gru_adjoint(saved: Any, grad: State) -> tuple[Array, Array, State]:
    r, z, n, h_n, h_prev = saved
    (dh,) = grad
    da_z = dh * (h_prev - n) * z * (1 - z)
    da_n = dh * (1 - z) * (1 - n * n)
    da_r = da_n * h_n * r * (1 - r)
    return join(da_r, da_z, da_n), join(da_r, da_z, da_n * r), (dh * z,)


def leaky_tanh_step(from_x: Array, from_h: Array, state: State, alpha: float) -> tuple[State, Any]:
    """f = tanh(W_ih x + b_ih + W_hh h + b_hh); h = (1 - alpha) h + alpha f"""
    (h_prev,) = state
    f = tanh(from_x + from_h)
    return ((1 - alpha) * h_prev + alpha * f,), f


def leaky_tanh_adjoint(f: Array, grad: State, alpha: float) -> tuple[Array, Array, State]:
    (dh,) = grad
    da, _, _ = rnn_tanh_adjoint(f, (alpha * dh,))
    return da, da, ((1 - alpha) * dh,)


def leaky_relu_step(from_x: Array, from_h: Array, state: State, alpha: float) -> tuple[State, Any]:
    """f = max(0, W_ih x + b_ih + W_hh h + b_hh); h = (1 - alpha) h + alpha f"""
    (h_prev,) = state
    f = relu(from_x + from_h)
    return ((1 - alpha) * h_prev + alpha * f,), f


def leaky_relu_adjoint(f: Array, grad: State, alpha: float) -> tuple[Array, Array, State]:
    (dh,) = grad
    da, _, _ = rnn_relu_adjoint(f, (alpha * dh,))
    return da, da, ((1 - alpha) * dh,)


@dataclass(frozen=True)
class Cell:
    """What the time loop must know of a cell.

    Attributes
    ----------
    gates : int
        G: the weights have G*H rows.
    has_c : bool
        The state is (h, c), and h may be projected; else it is h alone.
    step, adjoint : callable
        One step and its adjoint, as described above.
    parameters : mapping
        Names and defaults of the scalars that `step` and `adjoint` take as keywords.
    """

    gates: int
    has_c: bool
    step: Callable[..., tuple[State, Any]]
    adjoint: Callable[..., tuple[Array, Array, State]]
    parameters: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))


CELLS: dict[str, Cell] = {
    "rnn_tanh": Cell(gates=1, has_c=False, step=rnn_tanh_step, adjoint=rnn_tanh_adjoint),
    "rnn_relu": Cell(gates=1, has_c=False, step=rnn_relu_step, adjoint=rnn_relu_adjoint),
    "lstm": Cell(gates=4, has_c=True, step=lstm_step, adjoint=lstm_adjoint),
    "gru": Cell(gates=3, has_c=False, step=gru_step, adjoint=gru_adjoint),
    "leaky_tanh": Cell(1, False, leaky_tanh_step, leaky_tanh_adjoint, MappingProxyType({"alpha": 0.1})),
    "leaky_relu": Cell(1, False, leaky_relu_step, leaky_relu_adjoint, MappingProxyType({"alpha": 0.1})),
}


# ---------------------------------------------------------------------------------------------------------------------
# Time: one layer, one direction, any cell
# ---------------------------------------------------------------------------------------------------------------------


class Weights(NamedTuple):
    """The weights of one layer and direction."""

    w_ih: Array  # [G*H, I or D*P]
    w_hh: Array  # [G*H, P]
    b_ih: Array | None  # [G*H]
    b_hh: Array | None  # [G*H]
    w_hr: Array | None  # [P, H]

    def flat(self) -> list[Array]:
        return [w for w in self if w is not None]


class Schedule(NamedTuple):
    """The order of the steps of one direction and the masks, [B, 1] a step or None where all are true."""

    order: range
    valid: list[Array | None]  # step t lies within the row
    joined: list[Array | None]  # step t goes on from the step before it in `order`: no reset lies between


class Step(NamedTuple):
    """What the adjoint needs of one step, beside the states."""

    previous: State  # the state that the step started from, zero where the row is not valid
    saved: Any  # the cell's own
    unprojected: Array  # [B, H]: h before W_hr


class Tape(NamedTuple):
    """One run of the time loop; all lists are indexed by t."""

    x: Array  # [T, B, in]
    steps: list[Step]
    states: list[State]  # after each step; past a row's end the state is held
    final: State


def run_direction(
    cell: Cell,
    parameters: Mapping[str, float],
    w: Weights,
    x: Array,
    initial: State,
    replacement: State,
    schedule: Schedule,
) -> Tape:
    """Run the time loop.

    x [T, B, in] is zero past a row's end; `initial` and `replacement` (the state after a reset) are (h [B or 1, P],
    c [B or 1, H]).
    """
    from_x = linear(x, w.w_ih, w.b_ih)
    steps: list[Any] = [None] * len(schedule.order)
    states: list[Any] = [None] * len(schedule.order)
    state = initial
    for t in schedule.order:
        valid, joined = schedule.valid[t], schedule.joined[t]
        state = tuple(select(joined, s, r) for s, r in zip(state, replacement, strict=True))
        previous = tuple(select_or_zero(valid, s) for s in state)
        from_h = linear(previous[0], w.w_hh, w.b_hh)
        (unprojected, *rest), saved = cell.step(from_x[t], from_h, previous, **parameters)
        h = unprojected if w.w_hr is None else linear(unprojected, w.w_hr)
        state = tuple(select(valid, new, held) for new, held in zip((h, *rest), state, strict=True))
        steps[t], states[t] = Step(previous, saved, unprojected), state
    return Tape(x, steps, states, state)


class DirectionGradient(NamedTuple):
    d_from_x: Array  # [T, B, G*H]: of W_ih x + b_ih, so that the gradient of x is d_from_x W_ih
    initial: State
    replacement: State  # for each row: [B, .]
    weights: Weights
    h: Array  # [T, B, P]: dL/dh_t


def run_direction_adjoint(
    cell: Cell,
    parameters: Mapping[str, float],
    w: Weights,
    tape: Tape,
    grad_states: State,
    grad_final: State,
    schedule: Schedule,
) -> DirectionGradient:
    """The adjoint of `run_direction`: `grad_states` is [T, B, .], zero past a row's end, `grad_final` is [B, .]."""
    seq_len = len(schedule.order)
    batch_size = tape.x.shape[1]
    d_from_x: list[Any] = [None] * seq_len
    d_from_h: list[Any] = [None] * seq_len
    d_h: list[Any] = [None] * seq_len
    d_replacement: State = tuple(zeros(tuple(g.shape), g) for g in grad_final)
    grad = grad_final
    for t in reversed(schedule.order):
        valid, joined, step = schedule.valid[t], schedule.joined[t], tape.steps[t]
        grad = tuple(g + from_outside[t] for g, from_outside in zip(grad, grad_states, strict=True))
        dh, *rest = (select_or_zero(valid, g) for g in grad)
        d_h[t] = dh
        d_unprojected = dh if w.w_hr is None else dh @ w.w_hr
        d_from_x[t], d_from_h[t], direct = cell.adjoint(step.saved, (d_unprojected, *rest), **parameters)
        before = (direct[0] + d_from_h[t] @ w.w_hh, *direct[1:])
        grad = tuple(select(valid, new, held) for new, held in zip(before, grad, strict=True))
        if joined is not None:
            d_replacement = tuple(d + select_or_zero(~joined, g) for d, g in zip(d_replacement, grad, strict=True))
            grad = tuple(select_or_zero(joined, g) for g in grad)

    def over_time(arrays: list[Array], width: int) -> Array:
        return stack(arrays, 0, (seq_len, batch_size, width), tape.x)

    gate_rows, hidden_size = w.w_ih.shape[0], w.w_ih.shape[0] // cell.gates
    dax, dah = over_time(d_from_x, gate_rows), over_time(d_from_h, gate_rows)
    dh_all = over_time(d_h, w.w_hh.shape[1])
    h_prev = over_time([step.previous[0] for step in tape.steps], w.w_hh.shape[1])
    unprojected = over_time([step.unprojected for step in tape.steps], hidden_size)
    d_weights = Weights(
        w_ih=outer_sum(dax, tape.x),
        w_hh=outer_sum(dah, h_prev),
        b_ih=None if w.b_ih is None else dax.sum((0, 1)),
        b_hh=None if w.b_hh is None else dah.sum((0, 1)),
        w_hr=None if w.w_hr is None else outer_sum(dh_all, unprojected),
    )
    return DirectionGradient(dax, grad, d_replacement, d_weights, dh_all)


def outer_sum(a: Array, b: Array) -> Array:
    """The sum over t and b of the outer products: a [T, B, M], b [T, B, N] -> [M, N]."""
    rows = a.shape[0] * a.shape[1]
    return a.reshape(rows, a.shape[2]).T @ b.reshape(rows, b.shape[2])


def make_schedule(valid: Array | None, reset: Array | None, seq_len: int, reverse: bool) -> Schedule:
    """The steps and masks of one direction.

    valid, reset : bool [T, B, 1] or None. A reset at t begins a segment there: the forward direction cuts before step
    t, the reverse direction, which comes to t - 1 from t, before step t - 1. Resets past a row's end do nothing.
    """
    everywhere: list[Array | None] = [None] * seq_len
    joined = everywhere
    if reset is not None:
        cut = reset if valid is None else reset & valid
        if reverse:
            xp = namespace(cut)
            cut = xp.concatenate([cut[1:], xp.zeros_like(cut[:1])], 0)
        joined = [~cut[t] for t in range(seq_len)]
    order = range(seq_len - 1, -1, -1) if reverse else range(seq_len)
    return Schedule(order, everywhere if valid is None else [valid[t] for t in range(seq_len)], joined)


# ---------------------------------------------------------------------------------------------------------------------
# Layers and directions
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """The arguments of `forward`, checked and brought into one form."""

    cell: Cell
    parameters: Mapping[str, float]
    num_layers: int
    x: Array  # [T, B, I], zero past a row's end
    weights: list[Weights]  # one for each layer and direction: number layer * D + direction
    sizes: tuple[int, ...]  # widths of the elements of a state: (P,) or (P, H)
    initial: State  # [L*D, B, .]
    replacement: State  # [L*D, B or 1, .]
    valid: Array | None  # bool [T, B, 1]
    schedules: list[Schedule]  # one for each direction
    batch_first: bool

    @property
    def output_shape(self) -> tuple[int, ...]:
        seq_len, batch_size, _ = self.x.shape
        steps = (batch_size, seq_len) if self.batch_first else (seq_len, batch_size)
        return (*steps, len(self.schedules) * self.sizes[0])


@dataclass
class Context:
    """What `forward` keeps for `backward`, which may be called any number of times.

    Attributes
    ----------
    grad_reset_state : like reset_state, or None
        After `backward`: the gradient of `reset_state`, in its shapes.
    grad_h : [T, L*D, B, P], or None
        After ``backward(record=True)``: dL/dh_t in total, of the state before dropout; zero past a row's end.
    """

    problem: Problem
    tapes: list[Tape]  # one for each layer and direction
    keep: list[Array | None]  # one for each layer: the dropout mask behind it
    dropout: float
    has_reset_state: bool
    grad_reset_state: Any = None
    grad_h: Any = None


def forward(
    cell: str,
    x: Array,
    hx: Any,
    weights: Sequence[Array],
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
    **parameters: float,
) -> tuple[Any, ...]:
    """Run a recurrent network over a sequence.

    Parameters
    ----------
    cell : str
        A name in `CELLS`.
    x : [T, B, I]
        The input; [B, T, I] with `batch_first`. What lies past a row's end is never used.
    hx : h0 [L*D, B, P], for a cell with c (h0, c0 [L*D, B, H]), or None
        The initial state; None is zero.
    weights : sequence
        For each layer, for each direction: w_ih, w_hh, (b_ih, b_hh if there is a bias), (w_hr if h is projected), with
        the shapes that `weight_shapes` gives.
    dropout : float
        The probability with which a value between two layers is dropped, if `training`.
    lengths : integers [B], or None
        The number of valid steps of each row. Values out of range raise for arrays on the host; elsewhere they are
        clamped.
    reset : bool or 0/1, shaped as x without its last axis, or None
        A new segment begins at t: the state before it (in the reverse direction the state handed from t to t - 1) is
        replaced by `reset_state`.
    reset_state : like hx with a batch of B or 1, or None
        None is zero.
    seed, call : int
        The key and a counter of the dropout masks.
    **parameters
        The scalars of the cell.

    Returns
    -------
    output : [T, B, D*P]
        [B, T, D*P] with `batch_first`; zero past a row's end.
    state : like hx
        The state after each row's last valid step.
    states : [T, L*D, B, P], for a cell with c a pair
        Only with `return_states`: the state after every step, zero past a row's end.
    ctx : Context or None
        For `backward`; None if not `training`.

    Raises
    ------
    ValueError, TypeError
        An argument is out of range or has a wrong shape or dtype; the message names it.
    """
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout: expected a probability from 0 to 1, got {dropout}")
    problem = make_problem(
        cell, x, hx, weights, num_layers, bidirectional, batch_first, lengths, reset, reset_state, parameters
    )
    directions = len(problem.schedules)
    tapes: list[Tape] = []
    all_states: list[State] = []  # for each layer and direction: h (and c), [T, B, .]
    keep: list[Array | None] = []
    y = problem.x
    for layer in range(num_layers):
        for direction in range(directions):
            tapes.append(run_one(problem, layer, direction, y))
            all_states.append(gather_states(tapes[-1], problem))
        y = join(*(states[0] for states in all_states[-directions:]))
        active = training and dropout > 0 and layer < num_layers - 1
        keep.append(layer_mask(seed, call, layer, y, dropout) if active else None)
        y = drop(keep[layer], y, dropout)

    output = y.swapaxes(0, 1) if batch_first else y
    state = pack_runs(problem, [tape.final for tape in tapes])
    ctx = Context(problem, tapes, keep, dropout, reset_state is not None) if training else None
    if not return_states:
        return output, state, ctx
    return output, state, pack_runs(problem, all_states, axis=1), ctx


def run_one(problem: Problem, layer: int, direction: int, y: Array) -> Tape:
    """The time loop of one layer and direction over its input y [T, B, in]."""
    k = layer * len(problem.schedules) + direction
    return run_direction(
        problem.cell,
        problem.parameters,
        problem.weights[k],
        y,
        tuple(element[k] for element in problem.initial),
        tuple(element[k] for element in problem.replacement),
        problem.schedules[direction],
    )


def backward(
    ctx: Context,
    grad_output: Array | None = None,
    grad_state: Any = None,
    *,
    grad_states: Any = None,
    need_grad_x: bool = True,
    record: bool = False,
) -> tuple[Array | None, Any, list[Array]]:
    """Backpropagation through time.

    Parameters
    ----------
    ctx : Context
        From `forward`. Afterwards it also holds `grad_reset_state`, and with `record` `grad_h`.
    grad_output, grad_state, grad_states
        The gradients of what `forward` returned, in the same shapes; None is zero, and so may be either element of a
        pair. What lies past a row's end in `grad_output` and `grad_states` is never used.
    need_grad_x : bool
        False saves a product: `grad_x` is None.

    Returns
    -------
    grad_x : like x, or None
    grad_state : like hx
        The gradient of the initial state, always.
    grad_weights : list
        In the order of `weights`.
    """
    problem, directions = ctx.problem, len(ctx.problem.schedules)
    dy, d_final, d_all = incoming_gradients(problem, grad_output, grad_state, grad_states)
    results: list[Any] = [None] * len(ctx.tapes)
    for layer in reversed(range(problem.num_layers)):
        dy = drop(ctx.keep[layer], dy, ctx.dropout)
        runs = range(layer * directions, (layer + 1) * directions)
        for k, dh, schedule in zip(runs, split(dy, directions), problem.schedules, strict=True):
            results[k] = run_direction_adjoint(
                problem.cell,
                problem.parameters,
                problem.weights[k],
                ctx.tapes[k],
                (d_all[0][:, k] + dh, *(g[:, k] for g in d_all[1:])),
                tuple(g[k] for g in d_final),
                schedule,
            )
        if layer > 0 or need_grad_x:
            dy = sum(results[k].d_from_x @ problem.weights[k].w_ih for k in runs)

    ctx.grad_reset_state = None
    if ctx.has_reset_state:
        replacements = [
            tuple(sum_to_batch(g, r) for g, r in zip(result.replacement, problem.replacement, strict=True))
            for result in results
        ]
        ctx.grad_reset_state = pack_runs(problem, replacements)
    ctx.grad_h = stack([result.h for result in results], 1, (), problem.x) if record else None
    grad_x = None
    if need_grad_x:
        grad_x = dy.swapaxes(0, 1) if problem.batch_first else dy
    grad_weights = [g for result in results for g in result.weights.flat()]
    return grad_x, pack_runs(problem, [result.initial for result in results]), grad_weights


def incoming_gradients(
    problem: Problem, grad_output: Array | None, grad_state: Any, grad_states: Any
) -> tuple[Array, State, State]:
    """Check the gradients, fill in zeros: dy [T, B, D*P], d_final [L*D, B, .] and d_all [T, L*D, B, .] by element."""
    x, runs = problem.x, len(problem.weights)
    seq_len, batch_size, _ = x.shape
    if grad_output is None:
        grad_output = zeros(problem.output_shape, x)
    check_array("grad_output", grad_output, problem.output_shape, x.dtype)
    dy = select_or_zero(problem.valid, grad_output.swapaxes(0, 1) if problem.batch_first else grad_output)
    final_shapes = [(runs, batch_size, size) for size in problem.sizes]
    d_final = unpack_gradient("grad_state", problem.cell, grad_state, final_shapes, x)
    all_shapes = [(seq_len, *shape) for shape in final_shapes]
    d_all = unpack_gradient("grad_states", problem.cell, grad_states, all_shapes, x)
    valid = None if problem.valid is None else problem.valid[:, None]
    return dy, d_final, tuple(select_or_zero(valid, g) for g in d_all)


def gather_states(tape: Tape, problem: Problem) -> State:
    """h (and c) after every step [T, B, .], zero past a row's end."""
    steps = tuple(problem.x.shape[:2])
    stacked = [
        stack([state[j] for state in tape.states], 0, (*steps, size), problem.x) for j, size in enumerate(problem.sizes)
    ]
    return tuple(select_or_zero(problem.valid, a) for a in stacked)


def pack_runs(problem: Problem, states: Sequence[State], axis: int = 0) -> Any:
    """The states of all layers and directions along a new axis, as the caller sees a state: a pair, or h alone."""
    elements = tuple(stack(runs, axis, (), problem.x) for runs in zip(*states, strict=True))
    return elements if problem.cell.has_c else elements[0]


def drop(keep: Array | None, y: Array, p: float) -> Array:
    """Dropout by a mask of what is kept; the adjoint is the same function."""
    scale = 1.0 / (1.0 - p) if p < 1.0 else 0.0
    return y if keep is None else select_or_zero(keep, y * scale)


def sum_to_batch(grad: Array, like: Array) -> Array:
    """The gradient [B, .] of one layer and direction, summed over B where `like` [L*D, B or 1, .] has a batch of 1."""
    return grad if grad.shape[0] == like.shape[1] else grad.sum(0)[None]


# ---------------------------------------------------------------------------------------------------------------------
# Arguments: checked, and brought into one form
# ---------------------------------------------------------------------------------------------------------------------


def make_problem(
    cell: str,
    x: Array,
    hx: Any,
    weights: Sequence[Array],
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    lengths: Any,
    reset: Any,
    reset_state: Any,
    parameters: Mapping[str, float],
) -> Problem:
    record, constants = find_cell(cell, parameters)
    if num_layers < 1:
        raise ValueError(f"num_layers: expected at least 1, got {num_layers}")
    check_rank("x", x, 3)
    if batch_first:
        x = x.swapaxes(0, 1)
    seq_len, batch_size, input_size = x.shape
    directions = (False, True) if bidirectional else (False,)
    groups = group_weights(record, weights, num_layers, len(directions), input_size, x.dtype)
    sizes = state_sizes(record, groups[0])
    valid = valid_mask(lengths, seq_len, batch_size, x)
    resets = reset_mask(reset, seq_len, batch_size, batch_first, x)
    return Problem(
        cell=record,
        parameters=constants,
        num_layers=num_layers,
        x=select_or_zero(valid, x),
        weights=groups,
        sizes=sizes,
        initial=unpack_state("hx", record, hx, sizes, len(groups), (batch_size,), x),
        replacement=unpack_state("reset_state", record, reset_state, sizes, len(groups), (batch_size, 1), x),
        valid=valid,
        schedules=[make_schedule(valid, resets, seq_len, reverse) for reverse in directions],
        batch_first=batch_first,
    )


def find_cell(name: str, parameters: Mapping[str, float]) -> tuple[Cell, dict[str, float]]:
    """The record of a cell, and its parameters with the defaults filled in."""
    if name not in CELLS:
        raise ValueError(f"cell: expected one of {', '.join(CELLS)}, got {name!r}")
    cell = CELLS[name]
    for key in parameters:
        if key not in cell.parameters:
            raise TypeError(f"{key}: not an option, nor a parameter of the cell {name!r}")
    return cell, {**cell.parameters, **parameters}


def weight_shapes(
    cell: str,
    input_size: int,
    hidden_size: int,
    *,
    proj_size: int = 0,
    num_layers: int = 1,
    bidirectional: bool = False,
    bias: bool = True,
) -> dict[str, tuple[int, ...]]:
    """PyTorch's names of all weights and their shapes, in the order in which `forward` takes them."""
    shapes: dict[str, tuple[int, ...]] = {}
    gate_rows, state_size = CELLS[cell].gates * hidden_size, proj_size or hidden_size
    suffixes = ("", "_reverse") if bidirectional else ("",)
    for layer in range(num_layers):
        below = input_size if layer == 0 else state_size * len(suffixes)
        for suffix in suffixes:
            shapes[f"weight_ih_l{layer}{suffix}"] = (gate_rows, below)
            shapes[f"weight_hh_l{layer}{suffix}"] = (gate_rows, state_size)
            if bias:
                shapes[f"bias_ih_l{layer}{suffix}"] = (gate_rows,)
                shapes[f"bias_hh_l{layer}{suffix}"] = (gate_rows,)
            if proj_size:
                shapes[f"weight_hr_l{layer}{suffix}"] = (state_size, hidden_size)
    return shapes


def group_weights(
    cell: Cell, weights: Sequence[Array], num_layers: int, directions: int, input_size: int, dtype: Any
) -> list[Weights]:
    """The flat sequence as one `Weights` for each layer and direction, all shapes checked against the first w_hh."""
    weights, runs = list(weights), num_layers * directions
    count, left_over = divmod(len(weights), runs)
    counts = (2, 3, 4, 5) if cell.has_c else (2, 4)
    if left_over or count not in counts:
        expected = " or ".join(str(n * runs) for n in counts)
        raise ValueError(f"weights: expected {expected} of them, got {len(weights)}")
    has_bias, has_projection = count >= 4, count % 2 == 1
    check_rank("weights[1]", weights[1], 2)
    gate_rows, state_size = weights[1].shape
    hidden_size = gate_rows // cell.gates
    if hidden_size == 0 or gate_rows % cell.gates or not (has_projection or state_size == hidden_size):
        wanted = f"({cell.gates}*H, {'P' if has_projection else 'H'})"
        raise ValueError(f"weights[1]: expected shape {wanted}, got {describe(weights[1])}")
    bias_shapes = [(gate_rows,)] * 2 if has_bias else []
    projection_shapes = [(state_size, hidden_size)] if has_projection else []
    groups = []
    for k in range(runs):
        group = weights[k * count : (k + 1) * count]
        below = input_size if k < directions else directions * state_size
        shapes: list[tuple[int, ...]] = [(gate_rows, below), (gate_rows, state_size), *bias_shapes, *projection_shapes]
        for j, (w, shape) in enumerate(zip(group, shapes, strict=True)):
            check_array(f"weights[{k * count + j}]", w, shape, dtype)
        b_ih, b_hh = group[2:4] if has_bias else (None, None)
        groups.append(Weights(group[0], group[1], b_ih, b_hh, group[-1] if has_projection else None))
    return groups


def state_sizes(cell: Cell, w: Weights) -> tuple[int, ...]:
    """The widths of the elements of a state: (P,), or (P, H) for a cell with c."""
    hidden_size, state_size = w.w_hh.shape[0] // cell.gates, w.w_hh.shape[1]
    return (state_size, hidden_size) if cell.has_c else (state_size,)


def unpack_elements(name: str, cell: Cell, state: Any) -> list[tuple[str, Any]]:
    """What the caller gave as named elements, each None if the whole is None."""
    if not cell.has_c:
        return [(name, state)]
    if state is None:
        state = (None, None)
    if not isinstance(state, (tuple, list)) or len(state) != 2:
        raise TypeError(f"{name}: expected a pair (h, c), got {type(state).__name__}")
    return [(f"{name}[{j}]", element) for j, element in enumerate(state)]


def unpack_state(
    name: str, cell: Cell, state: Any, sizes: Sequence[int], runs: int, batches: Sequence[int], like: Array
) -> State:
    """Elements [L*D, B, .] with one of the `batches` as B; zeros where `state` is None."""
    elements = []
    for (label, element), size in zip(unpack_elements(name, cell, state), sizes, strict=True):
        shape = (runs, batches[0], size)
        if state is None:
            element = zeros(shape, like)
        elif tuple(getattr(element, "shape", ())) not in [(runs, batch, size) for batch in batches]:
            shapes = " or ".join(str((runs, batch, size)) for batch in dict.fromkeys(batches))
            raise ValueError(f"{label}: expected shape {shapes}, got {describe(element)}")
        check_array(label, element, tuple(element.shape), like.dtype)
        elements.append(element)
    return tuple(elements)


def unpack_gradient(name: str, cell: Cell, grad: Any, shapes: Sequence[tuple[int, ...]], like: Array) -> State:
    """Elements of an incoming gradient; zeros for each that is None."""
    elements = []
    for (label, element), shape in zip(unpack_elements(name, cell, grad), shapes, strict=True):
        if element is None:
            element = zeros(shape, like)
        check_array(label, element, shape, like.dtype)
        elements.append(element)
    return tuple(elements)


def valid_mask(lengths: Any, seq_len: int, batch_size: int, like: Array) -> Array | None:
    """[T, B, 1]: the steps within each row."""
    if lengths is None:
        return None
    if isinstance(lengths, (list, tuple)):
        lengths = np.asarray(lengths, dtype=None if lengths else np.int64)
    check_array("lengths", lengths, (batch_size,), None)
    if "int" not in str(lengths.dtype):
        raise TypeError(f"lengths: expected integers, got dtype {lengths.dtype}")
    on_host = isinstance(lengths, np.ndarray) or str(getattr(lengths, "device", "")) == "cpu"
    if on_host and bool(((lengths < 0) | (lengths > seq_len)).any()):
        raise ValueError(f"lengths: expected values from 0 to {seq_len}, got {lengths.tolist()}")
    return as_array_like(np.arange(seq_len)[:, None, None], like) < as_array_like(lengths, like)[None, :, None]


def reset_mask(reset: Any, seq_len: int, batch_size: int, batch_first: bool, like: Array) -> Array | None:
    """[T, B, 1]: a segment begins here."""
    if reset is None:
        return None
    if isinstance(reset, (list, tuple)):
        reset = np.asarray(reset)
    check_array("reset", reset, (batch_size, seq_len) if batch_first else (seq_len, batch_size), None)
    reset = as_array_like(reset, like)
    return ((reset.swapaxes(0, 1) if batch_first else reset) != 0)[:, :, None]


def describe(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else str(tuple(shape))


def check_rank(name: str, array: Any, rank: int) -> None:
    if len(getattr(array, "shape", ())) != rank:
        raise ValueError(f"{name}: expected an array of rank {rank}, got {describe(array)}")


def check_array(name: str, array: Any, shape: tuple[int, ...], dtype: Any) -> None:
    """The shape and, unless None, the dtype."""
    if tuple(getattr(array, "shape", ("none",))) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {describe(array)}")
    if dtype is not None and array.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype} as x has it, got {array.dtype}")


# ---------------------------------------------------------------------------------------------------------------------
# Dropout masks
# ---------------------------------------------------------------------------------------------------------------------

WORD = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


def philox4x32(counter: Sequence[Any], key: Sequence[int]) -> tuple[np.ndarray, ...]:
    """Philox4x32-10: four random words of 32 bits for each counter.

    Parameters
    ----------
    counter : four arrays or integers, below 2**32, that broadcast
    key : two integers below 2**32

    Returns
    -------
    Four uint64 arrays of words below 2**32.

    Source: Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
    """
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.atleast_1d(np.asarray(c, dtype=np.uint64)) for c in counter))
    k0, k1 = int(key[0]), int(key[1])
    for _ in range(10):
        product0, product1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (product1 >> HALF) ^ c1 ^ np.uint64(k0),
            product1 & WORD,
            (product0 >> HALF) ^ c3 ^ np.uint64(k1),
            product0 & WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def dropout_mask(seed: int, call: int, layer: int, t: Any, b: Any, units: int, p: float) -> np.ndarray:
    """Which of the `units` features of a layer's output are kept: bool [*broadcast(t, b), units].

    A pure function of its arguments: no step, row or thread depends on another. One block of Philox serves the units
    4q to 4q + 3, with key (low, high) of `seed` and counter (t, b, layer * 2**20 + q, call); a unit is kept if its word
    is at least floor(p * 2**32).
    """
    t, b = np.broadcast_arrays(t, b)
    quads = np.arange((units + 3) // 4, dtype=np.uint64)
    counter = (
        t[..., None].astype(np.uint64) & WORD,
        b[..., None].astype(np.uint64) & WORD,
        (np.uint64(layer << 20) + quads) & WORD,
        call & 0xFFFFFFFF,
    )
    words = np.stack(philox4x32(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)), axis=-1)
    threshold = np.uint64(int(p * 2**32))
    return words.reshape(*t.shape, 4 * len(quads))[..., :units] >= threshold


def layer_mask(seed: int, call: int, layer: int, y: Array, p: float) -> Array:
    """The mask of a whole layer's output y [T, B, D*P], as an array of the same library."""
    seq_len, batch_size, units = y.shape
    mask = dropout_mask(seed, call, layer, np.arange(seq_len)[:, None], np.arange(batch_size)[None, :], units, p)
    return as_array_like(mask, y)
