"""Training over long sequences: `tbptt` cuts them into windows, `gradient_flow` shows what comes back through time.

Both stand on the modules' public calls and on `functional`; no time loop is here, only one over windows.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from . import functional
from ._arrays import MAX_SIZE, check_flag, check_int
from .base import Module
from .modules import RecurrentLayer, incoming
from .recurrent import map_state

__all__ = ["Window", "gradient_flow", "tbptt"]


class Window(NamedTuple):
    """One window of truncated backpropagation: the steps [start, stop) of the sequence."""

    x: Any  # a view of the sequence
    start: int
    stop: int
    output: Any
    state: Any  # after the window, or after a row's end within it

    def __repr__(self) -> str:
        state = ", ".join(map(_shape, self.state)) if isinstance(self.state, tuple) else _shape(self.state)
        return (
            f"Window(start={self.start}, stop={self.stop}, x={_shape(self.x)}, output={_shape(self.output)}, "
            f"state={f'({state})' if isinstance(self.state, tuple) else state})"
        )


def _shape(value: Any) -> str:
    return str(list(value.shape)) if hasattr(value, "shape") else type(value).__name__


def tbptt(
    module: Module,
    x: Any,
    window: int,
    burn_in: int = 0,
    state: Any = None,
    *,
    lengths: Any = None,
    reset: Any = None,
    **options: Any,
) -> Iterator[Window]:
    """Truncated backpropagation through time: run `module` over `x` window by window, carrying the state over.

        for w in rnnfast.tbptt(lstm, x, window=32):
            loss, grad = mse_loss(w.output, target[w.start : w.stop])
            lstm.backward(grad)                                  # goes back to w.start and no further
            optimiser.step(); lstm.zero_grad()

    The forward of a window runs when the loop asks for it, so it sees the weights as the body of the loop left them.
    The state carried over is a value, not a path for gradients. The last window may be shorter.

    Burn-in. Once weights change, a carried state is stale: older weights made it. With ``burn_in=n`` the n steps before
    every window run again, with the present weights and no gradient, from the state that was stored at their start,
    so that the window starts from a nearly fresh state. The first n steps of `x` are only ever burn-in: windows cover
    [n, T), each step once, and `state` belongs to step 0. So a replayed sequence with its stored state, 40 steps of
    burn-in and 40 of training as in R2D2 (Kapturowski et al. 2019), is one window of
    ``tbptt(lstm, x, window=40, burn_in=40, state=stored)``. A sequence of no more than n steps has no window.
    Dropout stays on in burn-in, as the module's mode says.

    Parameters
    ----------
    module : Module
        A recurrent layer, or any module that is called as ``module(x, state)`` and returns ``(output, state)``. In one
        direction only: a reverse direction has no state to carry.
    x : ndarray [T, B, ...], or [B, T, ...] with ``batch_first`` of the module or of the layers in it
        Of a layer also [T, I], unbatched. Indices [T, B] for a module that embeds them are as good.
    window, burn_in : int
        Steps with and without gradient.
    state : optional
        As `hx` of the module; zeros without it.
    lengths : integers [B], optional
        As in the call of a layer. A row that has ended keeps its state and has zero output in later windows.
    reset : bool or 0/1 [T, B] ([B, T] with ``batch_first``), optional
        As in the call of a layer: what is carried is cut there, too.
    options
        For every call of `module`, as they are (`reset_state`). `module` gets only what is given here.

    Yields
    ------
    Window
        (x, start, stop, output, state).

    Raises
    ------
    ValueError, TypeError
        At once for an argument of this function; from the loop for what `module` refuses.
    """
    window, burn_in = check_int("window", window), check_int("burn_in", burn_in, minimum=0)
    if not isinstance(module, Module):
        raise TypeError(f"module: expected a Module, got {type(module).__name__}")
    _check_takes_state(module)
    if any(getattr(m, "bidirectional", False) for m in module.modules()):
        raise ValueError(
            "module: expected one direction, got a bidirectional layer, whose state cannot be carried over"
        )
    if isinstance(x, (type, memoryview)) or getattr(x, "ndim", 0) < 2:
        raise ValueError(f"x: expected an array [T, B, ...] or [T, I], got {getattr(x, 'shape', type(x).__name__)}")
    steps = _Steps(module, x, lengths, reset, options)
    return _windows(steps, window, burn_in, state)


def _check_takes_state(module: Module) -> None:
    try:
        inspect.signature(module.forward).bind(None, None)
    except TypeError:
        raise _carries_no_state(module) from None


def _carries_no_state(module: Module) -> TypeError:
    return TypeError(
        f"module: expected one whose forward takes (x, state) and returns (output, state), got {type(module).__name__}"
    )


def _windows(steps: _Steps, window: int, burn_in: int, state: Any) -> Iterator[Window]:
    # `stored` is the state at start - burn_in, made by the weights of that time.
    stored = state
    for start in range(burn_in, steps.seq_len, window):
        stop = min(start + window, steps.seq_len)
        last = stop == steps.seq_len
        stored, state = _burn_in(steps, stored, start, burn_in, window)
        if last or not 0 < burn_in < window:
            output, end = steps.run(start, stop, state)
        else:
            output, end, stored = steps.run_and_store(start, stop, state, stop - burn_in)
        if burn_in == 0:
            stored = end
        yield Window(steps.take(start, stop), start, stop, output, end)


def _burn_in(steps: _Steps, stored: Any, start: int, burn_in: int, window: int) -> tuple[Any, Any]:
    """Run up to `start`: the states at the start of the next window's burn-in (where that is passed) and at `start`."""
    if burn_in == 0:
        return None, stored
    if window > burn_in:
        return None, steps.skip(start - burn_in, start, stored)
    middle = start - burn_in + window
    stored = steps.skip(start - burn_in, middle, stored)
    return stored, steps.skip(middle, start, stored)


class _Steps:
    """A module and its sequence: runs of some of its steps."""

    def __init__(self, module: Module, x: Any, lengths: Any, reset: Any, options: dict[str, Any]) -> None:
        self.module, self.x, self.options = module, x, options
        unbatched = isinstance(module, RecurrentLayer) and x.ndim == 2
        self.time_axis = 1 if _batch_first(module) and not unbatched else 0
        self.seq_len = x.shape[self.time_axis]
        self.lengths = None if lengths is None else _checked_lengths(lengths, self.seq_len)
        self.reset = None if reset is None else _checked_reset(reset, self.seq_len, self.time_axis)

    def take(self, start: int, stop: int) -> Any:
        return _slice(self.x, self.time_axis, start, stop)

    def call_options(self, start: int, stop: int) -> dict[str, Any]:
        options = dict(self.options)
        if self.lengths is not None:
            options["lengths"] = np.clip(self.lengths - start, 0, stop - start)
        if self.reset is not None:
            options["reset"] = _slice(self.reset, self.time_axis, start, stop)
        return options

    def run(self, start: int, stop: int, state: Any) -> tuple[Any, ...]:
        result = self.module(self.take(start, stop), state, **self.call_options(start, stop))
        if not isinstance(result, tuple) or len(result) < 2:
            raise _carries_no_state(self.module)
        return result

    def skip(self, start: int, stop: int, state: Any) -> Any:
        """The state after [start, stop), run from `state` without gradient."""
        if start == stop:
            return state
        if isinstance(self.module, RecurrentLayer) and self.module.dropout == 0.0:
            # The reserve can be left out; with dropout the masks need the training mode.
            return self.module.infer(self.take(start, stop), state, **self.call_options(start, stop))[1]
        return self.run(start, stop, state)[1]

    def run_and_store(self, start: int, stop: int, state: Any, at: int) -> tuple[Any, Any, Any]:
        """As `run`, and the state before step `at`."""
        if not isinstance(self.module, RecurrentLayer):
            stored = self.skip(start, at, state)  # before the run, which must be the module's last
            return (*self.run(start, stop, state), stored)
        options = self.call_options(start, stop)
        output, end, states = self.module(self.take(start, stop), state, return_states=True, **options)
        stored = map_state(lambda s: s[at - start - 1].copy(), states)
        if self.lengths is None:
            return output, end, stored
        running = (self.lengths >= at)[:, None] if self.x.ndim > 2 else self.lengths >= at
        return output, end, _map_pairs(lambda s, e: np.where(running, s, e), stored, end)


def _batch_first(module: Module) -> bool:
    """As the module says, or the layers in it."""
    layers = [child for child in module.modules() if isinstance(child, RecurrentLayer)]
    return bool(getattr(module, "batch_first", any(layer.batch_first for layer in layers)))


def _map_pairs(function: Any, a: Any, b: Any) -> Any:
    return tuple(map(function, a, b)) if isinstance(a, tuple) else function(a, b)


def _slice(array: Any, axis: int, start: int, stop: int) -> Any:
    return array[(slice(None),) * axis + (slice(start, stop),)]


def _checked_lengths(lengths: Any, seq_len: int) -> Any:
    """Lengths are clipped window by window, so that no call could see one that is out of range."""
    lengths = functional.integers("lengths", lengths)
    if lengths.ndim > 1 or lengths.size > MAX_SIZE:
        raise ValueError(f"lengths: expected one number for each row, got shape {lengths.shape}")
    if lengths.size and (lengths.min() < 0 or lengths.max() > seq_len):
        raise ValueError(f"lengths: expected numbers from 0 to {seq_len}, got {lengths.min()} to {lengths.max()}")
    return lengths.astype(np.int64)


def _checked_reset(reset: Any, seq_len: int, time_axis: int) -> Any:
    reset = np.asarray(reset)
    if reset.ndim <= time_axis or reset.shape[time_axis] != seq_len:
        raise ValueError(f"reset: expected {seq_len} steps in dimension {time_axis}, got shape {reset.shape}")
    return reset


def gradient_flow(
    module: RecurrentLayer,
    grad_output: Any = None,
    grad_state: Any = None,
    *,
    grad_states: Any = None,
    per_row: bool = False,
) -> np.ndarray:
    """How much gradient reaches every step and layer: the norms of dL/dh_t through the last forward.

    Vanishing shows as norms that fall towards t = 0, explosion as norms that rise. The module's last forward in
    training mode stays usable for `backward`, and no ``p.grad`` changes.

        output, state = lstm(x)
        loss, grad = mse_loss(output, target)
        norms = rnnfast.gradient_flow(lstm, grad)                # [T, L·D]
        lstm.backward(grad)

    Parameters
    ----------
    module : RecurrentLayer
    grad_output, grad_state, grad_states
        As in ``module.backward``.
    per_row : bool
        A norm for each row of the batch: [T, L·D, B].

    Returns
    -------
    norms : ndarray [T, L·D], float64
        The 2-norm over batch and units of the total gradient of h_t: from the output, from the layer above (after its
        dropout mask) and from step t+1. Zero past a row's end.

    Raises
    ------
    RuntimeError
        There was no forward in training mode, or a `backward` without ``retain`` has used it.
    ValueError, TypeError
        A gradient has the wrong shape or dtype; nothing has changed.
    """
    check_flag("per_row", per_row)
    if not isinstance(module, RecurrentLayer):
        raise TypeError(f"module: expected a recurrent layer, got {type(module).__name__}")
    last = module.last_pass("gradient_flow")
    grads = incoming(last, grad_output, grad_state, grad_states)
    functional.backward(
        last.context,
        *grads[:2],
        grad_states=grads[2],
        need_grad_x=False,
        need_grad_weights=False,
        retain=True,
        record=True,
    )
    grad_h = last.context.grad_h
    last.context.grad_h = None  # as large as the states of the whole sequence
    return _norms(grad_h, axes=(3,) if per_row else (2, 3))


def _norms(values: Any, axes: tuple[int, ...]) -> np.ndarray:
    """2-norms over `axes`, in float64 and scaled, so that neither float32's range nor float64's squares overflow."""
    values = np.abs(values, dtype=np.float64)
    scale = values.max(axis=axes, keepdims=True, initial=0.0)
    usable = np.where((scale > 0) & np.isfinite(scale), scale, 1.0)
    norms = np.sqrt(np.square(values / usable).sum(axis=axes))
    return np.asarray(norms * np.squeeze(usable, axis=axes))
