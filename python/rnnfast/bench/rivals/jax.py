"""JAX: a jitted `lax.scan` for each layer and direction, the input product batched outside; `value_and_grad` to train.

Ragged batches and resets are masks inside the scan; a reversed direction is the scan over turned sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..arrays import Array, Arrays, reversal, reversed_resets, valid_steps
from ..rows import Row
from . import Job, Setup, named_states

State = tuple[Any, ...]


def available(device: str) -> str | None:
    if device == "cpu":
        return None
    return None if any(found.platform == "gpu" for found in jax.devices()) else "jax sees no CUDA device"


def version() -> str:
    return str(jax.__version__)


def prepare(row: Row, arrays: Arrays, setup: Setup) -> Job:
    jax.config.update("jax_enable_x64", row.dtype == "float64")
    jax.clear_caches()
    dtype = jnp.dtype(row.dtype)
    weights = {name: jnp.asarray(weight, dtype) for name, weight in arrays.weights.items()}
    x, hx = jnp.asarray(arrays.x, dtype), tuple(jnp.asarray(state, dtype) for state in arrays.hx)
    run = _make_forward(row, arrays)
    if row.mode == "step":
        return _stream_job(row, jax.jit(run), weights, x, hx)
    if row.mode == "train":
        return _train_job(row, run, weights, x, hx, jnp.asarray(arrays.grad_output, dtype))
    compiled = jax.jit(run)

    def call() -> Any:
        return jax.block_until_ready(compiled(weights, x, hx))

    def result() -> dict[str, Array]:
        output, state = call()
        return _fetched({"output": output, **named_states(row, state)})

    return Job(call, result)


def _train_job(row: Row, run: Callable[..., Any], weights: Any, x: Any, hx: State, grad_output: Any) -> Job:
    def loss(weights: Any, x: Any) -> Any:
        output, state = run(weights, x, hx)
        return (output * grad_output).sum(), (output, state)

    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))

    def call() -> Any:
        return jax.block_until_ready(compiled(weights, x))

    def result() -> dict[str, Array]:
        (_, (output, state)), (grad_weights, grad_x) = call()
        grads = {f"grad_{name}": grad for name, grad in grad_weights.items()}
        return _fetched({"output": output, **named_states(row, state), "grad_x": grad_x, **grads})

    return Job(call, result)


def _stream_job(row: Row, compiled: Callable[..., Any], weights: Any, xs: Any, hx: State) -> Job:
    state, inputs = hx, [xs[t : t + 1] for t in range(len(xs))]

    def call(x: Any = inputs[0]) -> Any:
        nonlocal state
        output, state = jax.block_until_ready(compiled(weights, x, state))
        return output

    def result() -> dict[str, Array]:
        nonlocal state
        state = hx
        outputs = [call(x) for x in inputs]
        return _fetched({"output": jnp.concatenate(outputs), **named_states(row, state)})

    return Job(call, result)


def _make_forward(row: Row, arrays: Arrays) -> Callable[..., tuple[Any, State]]:
    """forward(weights, x [T,B,I], hx) -> output [T,B,D*H], final states; masks and turns are constants of the trace."""
    seq_len = 1 if row.mode == "step" else row.T
    valid = valid_steps(arrays.lengths, seq_len)

    def forward(weights: Any, x: Any, hx: State) -> tuple[Any, State]:
        finals = []
        for layer in range(row.layers):
            outputs = []
            for direction in range(row.directions):
                suffix = f"_l{layer}" + "_reverse" * direction
                index = reversal(arrays.lengths, seq_len, row.B) if direction else None
                turn = _turner(index, arrays.lengths)
                reset = reversed_resets(arrays.reset, index) if index else arrays.reset
                initial = tuple(state[layer * row.directions + direction] for state in hx)
                own = {name: weights[name + suffix] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
                output, final = _scan(row.cell, own, turn(x), initial, valid, reset)
                outputs.append(turn(output))
                finals.append(final)
            x = jnp.concatenate(outputs, axis=2) if row.bidirectional else outputs[0]
        return x, tuple(jnp.stack(parts) for parts in zip(*finals, strict=True))

    return forward


def _turner(index: tuple[Array, Array] | None, lengths: Array | None) -> Callable[[Any], Any]:
    if index is None:
        return lambda x: x
    return (lambda x: x[::-1]) if lengths is None else (lambda x: x[index])


def _scan(cell: str, w: Any, x: Any, initial: State, valid: Array | None, reset: Array | None) -> tuple[Any, State]:
    step, folded = _CELLS[cell]
    size = w["weight_hh"].shape[1] * folded
    pre = x @ w["weight_ih"].T + w["bias_ih"]
    pre = pre.at[:, :, :size].add(w["bias_hh"][:size])
    late_bias = w["bias_hh"][size:]
    cut = reset if reset is None or valid is None else reset & valid

    def body(state: State, now: Any) -> tuple[State, Any]:
        pre_t, valid_t, cut_t = now
        if cut_t is not None:
            state = tuple(jnp.where(cut_t[:, None], 0, part) for part in state)
        new = step(pre_t, state[0] @ w["weight_hh"].T, late_bias, state)
        if valid_t is None:
            return new, new[0]
        held = tuple(jnp.where(valid_t[:, None], n, s) for n, s in zip(new, state, strict=True))
        return held, jnp.where(valid_t[:, None], new[0], 0)

    final, output = jax.lax.scan(body, initial, (pre, valid, cut))
    return output, final


# --- cells: step(pre [B,G*H], rec [B,G*H], late_bias, state) -> state ------------------------------------------------


def _lstm(pre: Any, rec: Any, late_bias: Any, state: State) -> State:
    i, f, g, o = jnp.split(pre + rec, 4, axis=1)
    c = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def _gru(pre: Any, rec: Any, late_bias: Any, state: State) -> State:
    pre_r, pre_z, pre_n = jnp.split(pre, 3, axis=1)
    rec_r, rec_z, rec_n = jnp.split(rec, 3, axis=1)
    r, z = jax.nn.sigmoid(pre_r + rec_r), jax.nn.sigmoid(pre_z + rec_z)
    n = jnp.tanh(pre_n + r * (rec_n + late_bias))
    return (n + z * (state[0] - n),)


def _rnn(pre: Any, rec: Any, late_bias: Any, state: State) -> State:
    return (jnp.tanh(pre + rec),)


def _relu(pre: Any, rec: Any, late_bias: Any, state: State) -> State:
    return (jnp.maximum(pre + rec, 0),)


# the step, and how many gates can take b_hh before the scan
_CELLS: dict[str, tuple[Callable[..., State], int]] = {
    "lstm": (_lstm, 4),
    "gru": (_gru, 2),
    "rnn": (_rnn, 1),
    "rnn_relu": (_relu, 1),
}


def _fetched(results: dict[str, Any]) -> dict[str, Array]:
    """NumPy copies, bfloat16 as float32."""
    return {
        name: np.array(value.astype("float32") if value.dtype == jnp.bfloat16 else value)
        for name, value in results.items()
    }
