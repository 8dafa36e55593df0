"""The float32 NumPy loop: the input product batched over time, one product and in-place activations a step.

This is what a careful user without a framework writes, and what a bare `rnnfast bench` compares with. One layer and
direction at a time: a reversed direction is the forward loop on turned sequences, a ragged batch is masked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays import Array, Arrays, reversal, reversed_resets, valid_steps
from ..rows import Row
from . import Job, Setup, Unsupported, named_states

State = tuple[Array, ...]


def available(device: str) -> str | None:
    return None if device == "cpu" else "NumPy runs on the CPU only"


def version() -> str:
    return str(np.__version__)


def prepare(row: Row, arrays: Arrays, setup: Setup) -> Job:
    if row.dtype not in ("float32", "float64"):
        raise Unsupported(f"no {row.dtype}")
    if row.mode == "step":
        return _stream_job(row, arrays)
    if row.mode == "train":
        return Job(lambda: train(row, arrays), lambda: train(row, arrays))
    return Job(lambda: infer(row, arrays), lambda: infer(row, arrays))


def infer(row: Row, arrays: Arrays) -> dict[str, Array]:
    """Output [T,B,D*H] and final states [L*D,B,H] by name."""
    output, state, _ = _forward(row, arrays, arrays.x, arrays.hx, save=False)
    return {"output": output, **named_states(row, state)}


def train(row: Row, arrays: Arrays) -> dict[str, Array]:
    """Forward, and the gradients of sum(output * grad_output) for x and every weight."""
    output, state, tape = _forward(row, arrays, arrays.x, arrays.hx, save=True)
    return {"output": output, **named_states(row, state), **_backward(row, arrays, tape)}


def _stream_job(row: Row, arrays: Arrays) -> Job:
    state = arrays.hx

    def step(x: Array) -> Array:
        nonlocal state
        output, state, _ = _forward(row, arrays, x, state, save=False)
        return output

    def result() -> dict[str, Array]:
        nonlocal state
        state = arrays.hx
        outputs = [step(arrays.x[t : t + 1]) for t in range(len(arrays.x))]
        return {"output": np.concatenate(outputs), **named_states(row, state)}

    return Job(lambda: step(arrays.x[:1]), result)


# --- layers and directions -------------------------------------------------------------------------------------------


@dataclass
class _Track:
    """One layer and direction as the loop sees it, in its own order of time, with what backward needs."""

    suffix: str
    index: tuple[Array, Array] | None  # how its sequences were turned
    x: Array  # [T,B,I]
    valid: Array | None  # [T,B]
    reset: Array | None  # [T,B]
    before: list[State]  # the states that each step started from
    cache: list[Any]  # what the cell's adjoint needs


def _forward(row: Row, arrays: Arrays, x: Array, hx: State, save: bool) -> tuple[Array, State, list[_Track]]:
    seq_len, batch_size, _ = x.shape
    valid = valid_steps(arrays.lengths, seq_len)
    tracks, finals = [], []
    for layer in range(row.layers):
        outputs = []
        for direction in range(row.directions):
            index = reversal(arrays.lengths, seq_len, batch_size) if direction else None
            reset = reversed_resets(arrays.reset, index) if index else arrays.reset
            suffix = f"_l{layer}" + "_reverse" * direction
            track = _Track(suffix, index, x[index] if index else x, valid, reset, [], [])
            initial = tuple(state[layer * row.directions + direction] for state in hx)
            output, final = _run(row.cell, arrays.weights, track, initial, save)
            outputs.append(output[index] if index else output)
            finals.append(final)
            tracks.append(track)
        x = np.concatenate(outputs, axis=2) if row.bidirectional else outputs[0]
    return x, tuple(np.stack(parts) for parts in zip(*finals, strict=True)), tracks


def _backward(row: Row, arrays: Arrays, tape: list[_Track]) -> dict[str, Array]:
    grads: dict[str, Array] = {}
    grad = arrays.grad_output
    for layer in reversed(range(row.layers)):
        parts = []
        for direction in range(row.directions):
            track = tape[layer * row.directions + direction]
            part = grad[:, :, direction * row.H : (direction + 1) * row.H]
            grad_x = _run_back(row.cell, arrays.weights, track, part[track.index] if track.index else part, grads)
            parts.append(grad_x[track.index] if track.index else grad_x)
        grad = parts[0] + parts[1] if row.bidirectional else parts[0]
    return {"grad_x": grad, **{f"grad_{name}": grads[name] for name in arrays.weights}}


# --- the loop over time ----------------------------------------------------------------------------------------------


def _run(cell: str, weights: dict[str, Array], track: _Track, state: State, save: bool) -> tuple[Array, State]:
    step, _, folded = _CELLS[cell]
    w_ih, w_hh, b_ih, b_hh = (weights[name + track.suffix] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    hidden = w_hh.shape[1]
    pre = track.x @ w_ih.T + b_ih
    pre[:, :, : folded * hidden] += b_hh[: folded * hidden]
    late_bias, w_hh_t = b_hh[folded * hidden :], w_hh.T
    output = np.empty((*pre.shape[:2], hidden), pre.dtype)
    for t in range(len(pre)):
        state = _reset(state, track, t)
        new, cache = step(pre[t], state[0] @ w_hh_t, late_bias, state)
        if save:
            track.before.append(state)
            track.cache.append(cache)
        state = new if track.valid is None else tuple(map(np.where, _twice(track.valid[t], new), new, state))
        output[t] = new[0] if track.valid is None else np.where(track.valid[t][:, None], new[0], 0)
    return output, state


def _run_back(
    cell: str, weights: dict[str, Array], track: _Track, grad_output: Array, grads: dict[str, Array]
) -> Array:
    """Fill `grads` for this track's weights and return grad_x [T,B,I]."""
    _, adjoint, _ = _CELLS[cell]
    w_ih, w_hh = weights["weight_ih" + track.suffix], weights["weight_hh" + track.suffix]
    seq_len, batch_size = grad_output.shape[:2]
    d_pre = np.empty((seq_len, batch_size, len(w_hh)), w_hh.dtype)  # gradient of x W_ih^T + b_ih
    d_rec = np.empty_like(d_pre)  # gradient of h W_hh^T + b_hh
    grad: State = tuple(np.zeros_like(state) for state in track.before[0])
    for t in reversed(range(seq_len)):
        valid = None if track.valid is None else track.valid[t][:, None]
        incoming = grad_output[t] if valid is None else np.where(valid, grad_output[t], 0)
        grad = (grad[0] + incoming, *grad[1:])
        active = grad if valid is None else tuple(np.where(valid, g, 0) for g in grad)
        before = adjoint(active, track.before[t], track.cache[t], d_pre[t], d_rec[t])
        before = (before[0] + d_rec[t] @ w_hh, *before[1:])
        grad = before if valid is None else tuple(np.where(valid, b, g) for b, g in zip(before, grad, strict=True))
        grad = _reset(grad, track, t)
    flat_pre, flat_rec = d_pre.reshape(-1, len(w_hh)), d_rec.reshape(-1, len(w_hh))
    grads["weight_ih" + track.suffix] = flat_pre.T @ track.x.reshape(len(flat_pre), -1)
    grads["weight_hh" + track.suffix] = flat_rec.T @ np.stack([s[0] for s in track.before]).reshape(len(flat_rec), -1)
    grads["bias_ih" + track.suffix] = flat_pre.sum(axis=0)
    grads["bias_hh" + track.suffix] = flat_rec.sum(axis=0)
    return d_pre @ w_ih


def _reset(state: State, track: _Track, t: int) -> State:
    """Zero where a segment starts before step t; past a row's end resets mean nothing."""
    if track.reset is None:
        return state
    cut = track.reset[t] if track.valid is None else track.reset[t] & track.valid[t]
    return tuple(np.where(cut[:, None], 0, part) for part in state) if cut.any() else state


def _twice(valid: Array, state: State) -> list[Array]:
    return [valid[:, None]] * len(state)


# --- cells: step(pre [B,G*H], rec [B,G*H], late_bias, state) -> (state, cache) and its adjoint -----------------------


def _sigmoid(a: Array) -> None:
    """In place, as (1 + tanh(a/2)) / 2: cannot overflow."""
    a *= 0.5
    np.tanh(a, out=a)
    a += 1
    a *= 0.5


def _lstm_step(pre: Array, gates: Array, late_bias: Array, state: State) -> tuple[State, Any]:
    gates += pre
    size = gates.shape[1] // 4
    i, f, g, o = (gates[:, k * size : (k + 1) * size] for k in range(4))
    _sigmoid(gates[:, : 2 * size])
    _sigmoid(o)
    np.tanh(g, out=g)
    c = f * state[1]
    c += i * g
    tanh_c = np.tanh(c)
    return (o * tanh_c, c), (i, f, g, o, tanh_c)


def _lstm_adjoint(grad: State, state: State, cache: Any, d_pre: Array, d_rec: Array) -> State:
    i, f, g, o, tanh_c = cache
    dh, dc = grad
    dc = dc + dh * o * (1 - tanh_c * tanh_c)
    np.concatenate(
        [dc * g * i * (1 - i), dc * state[1] * f * (1 - f), dc * i * (1 - g * g), dh * tanh_c * o * (1 - o)],
        axis=1,
        out=d_pre,
    )
    d_rec[...] = d_pre
    return np.zeros_like(dh), dc * f


def _gru_step(pre: Array, rec: Array, late_bias: Array, state: State) -> tuple[State, Any]:
    size = rec.shape[1] // 3
    gates = rec[:, : 2 * size]
    gates += pre[:, : 2 * size]
    _sigmoid(gates)
    r, z, rec_n = gates[:, :size], gates[:, size:], rec[:, 2 * size :]
    rec_n += late_bias
    n = np.tanh(pre[:, 2 * size :] + r * rec_n)
    return (n + z * (state[0] - n),), (r, z, n, rec_n)


def _gru_adjoint(grad: State, state: State, cache: Any, d_pre: Array, d_rec: Array) -> State:
    r, z, n, rec_n = cache
    (dh,) = grad
    dn = dh * (1 - z) * (1 - n * n)
    dz = dh * (state[0] - n) * z * (1 - z)
    dr = dn * rec_n * r * (1 - r)
    np.concatenate([dr, dz, dn], axis=1, out=d_pre)
    np.concatenate([dr, dz, dn * r], axis=1, out=d_rec)
    return (dh * z,)


def _rnn_step(pre: Array, rec: Array, late_bias: Array, state: State) -> tuple[State, Any]:
    rec += pre
    np.tanh(rec, out=rec)
    return (rec,), rec


def _rnn_adjoint(grad: State, state: State, h: Any, d_pre: Array, d_rec: Array) -> State:
    np.multiply(grad[0], 1 - h * h, out=d_pre)
    d_rec[...] = d_pre
    return (np.zeros_like(h),)


def _relu_step(pre: Array, rec: Array, late_bias: Array, state: State) -> tuple[State, Any]:
    rec += pre
    np.maximum(rec, 0, out=rec)
    return (rec,), rec


def _relu_adjoint(grad: State, state: State, h: Any, d_pre: Array, d_rec: Array) -> State:
    np.multiply(grad[0], h > 0, out=d_pre)
    d_rec[...] = d_pre
    return (np.zeros_like(h),)


# step, adjoint, and how many gates can take b_hh before the loop (the GRU's n cannot: r multiplies it)
_CELLS: dict[str, tuple[Callable[..., tuple[State, Any]], Callable[..., State], int]] = {
    "lstm": (_lstm_step, _lstm_adjoint, 4),
    "gru": (_gru_step, _gru_adjoint, 2),
    "rnn": (_rnn_step, _rnn_adjoint, 1),
    "rnn_relu": (_relu_step, _relu_adjoint, 1),
}
