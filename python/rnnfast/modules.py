"""Recurrent layers over whole sequences: `RNN`, `LSTM`, `GRU`.

A layer holds parameters, the mode and the last context; the arithmetic is `functional`'s. What all layers share (the
call, `backward`, streams) is `RecurrentLayer`; a layer of a new cell is a constructor:

    class LeakyRNN(RecurrentLayer):
        def __init__(self, input_size, hidden_size, ..., alpha=0.1, *, seed=None):
            super().__init__("leaky_tanh", input_size, hidden_size, ..., seed=seed, alpha=alpha)

Sizes in comments: T time, B batch, I input_size, H hidden_size, P proj_size or H, L num_layers, D directions, G gates.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from . import functional
from ._arrays import check_choice, check_flag, check_number, check_size, module_of
from .base import Parameter
from .recurrent import Recurrent, cell_weight_shapes, is_missing, map_state, with_batch_axis
from .stream import Stream

__all__ = ["GRU", "LSTM", "RNN", "LeakyRNN", "RecurrentLayer"]

NONLINEARITIES = ("tanh", "relu")

# The random numbers of dropout leave 12 bits for the layer; the last value is `Dropout`'s own.
MAX_LAYERS = 2**12 - 1


class Pass(NamedTuple):
    """The last forward in training mode, as `backward` needs it."""

    context: Any
    parameters: list[Parameter]
    reset_state: Any  # as it was given: Parameters in it receive their gradient
    unbatched: bool


class RecurrentLayer(Recurrent):
    """A stack of recurrent layers over whole sequences: the base of `RNN`, `LSTM` and `GRU`.

    Call it as ``output, state = layer(x, hx)``, see `forward`; then `backward`. All arguments of the constructor are
    attributes. ``call_count`` counts the training calls with dropout: a mask is a function of (seed, call_count, layer,
    t, b, unit) alone.

    Attributes
    ----------
    weight_ih_l{k}, weight_hh_l{k}, bias_ih_l{k}, bias_hh_l{k} : Parameter
        [G·H, I or D·P], [G·H, P], [G·H], [G·H] of layer k; the reverse direction's end in ``_reverse``. With a
        projection also ``weight_hr_l{k}`` [P, H]. Names, shapes and the order of the gates are PyTorch's.
    grad_reset_state : ndarray, tuple or None
        After `backward`: the gradient of the `reset_state` of that call, in its shape; None where it was a Parameter.
    """

    def __init__(
        self,
        cell: str,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        proj_size: int = 0,
        seed: int | None = None,
        **parameters: Any,
    ) -> None:
        super().__init__(cell, input_size, hidden_size, bias, device, dtype, seed, **parameters)
        self.num_layers = check_size("num_layers", num_layers, maximum=MAX_LAYERS)
        self.batch_first = check_flag("batch_first", batch_first)
        self.dropout = check_number("dropout", dropout, 0.0, 1.0)
        self.bidirectional = check_flag("bidirectional", bidirectional)
        self.proj_size = check_size("proj_size", proj_size, minimum=0)
        if self.proj_size >= self.hidden_size:
            raise ValueError(f"proj_size: expected less than hidden_size, got {proj_size} and {self.hidden_size}")
        if self.dropout > 0 and self.num_layers == 1:
            warnings.warn("dropout: acts between layers, and there is one (num_layers=1)", UserWarning, stacklevel=3)
        self.call_count = 0
        self.grad_reset_state: Any = None
        self._last: Pass | None = None
        self._make_weights(self._weight_shapes())

    def _weight_shapes(self) -> dict[str, tuple[int, ...]]:
        directions = 2 if self.bidirectional else 1
        shapes = {}
        for layer in range(self.num_layers):
            inputs = self.input_size if layer == 0 else directions * (self.proj_size or self.hidden_size)
            for suffix in ("", "_reverse")[:directions]:
                for name, shape in cell_weight_shapes(self.cell, inputs, self.hidden_size, self.proj_size, self.bias):
                    shapes[f"{name}_l{layer}{suffix}"] = shape
        return shapes

    def _pack_options(self) -> dict[str, Any]:
        return {"num_layers": self.num_layers, "bidirectional": self.bidirectional, **self._cell_options()}

    def forward(
        self,
        x: Any,
        hx: Any = None,
        lengths: Any = None,
        reset: Any = None,
        reset_state: Any = None,
        return_states: bool = False,
        *,
        lean: bool = False,
        checkpoint_every: int | None = None,
    ) -> tuple[Any, ...]:
        """Run over a batch of sequences, or over one without the batch axis.

        Parameters
        ----------
        x : ndarray [T, B, I]; [B, T, I] with ``batch_first``; or one sequence [T, I]
            In the layer's dtype.
        hx : ndarray [L·D, B, P], optional
            The initial state; zeros without it. The LSTM takes a pair (h0 [L·D, B, P], c0 [L·D, B, H]).
        lengths : integers [B], optional
            The valid steps of each row, zero allowed.
        reset : bool or 0/1 [T, B] ([B, T] with ``batch_first``), optional
            True starts a new segment at t: the state before t is replaced by `reset_state` or zero. With
            ``reset[0]`` True, `reset_state` is an initial state that needs no batch axis of size B. The reverse direction
            is cut between t and t-1: there the state that comes from t is replaced before step t-1.
        reset_state : ndarray or Parameter, [L·D, B or 1, P], optional
            As `hx`, a pair for the LSTM. A `Parameter` accumulates its gradient in `backward`.
        return_states : bool
            Return the states of every layer and step, too.
        lean : bool
            In training mode, keep no gates: `backward` makes them again, to the same bits, in about a third more time.
        checkpoint_every : int, optional
            For very long sequences: lean, and the cell state is kept before every so many steps only.

        Returns
        -------
        output : ndarray [T, B, D·P] ([B, T, D·P] with ``batch_first``), zero past a row's end
            Read-only in training mode, because `backward` reads it.
        state : the state after the last valid step, as `hx`
        states : only with ``return_states``: [T, L·D, B, P], for the LSTM a pair with [T, L·D, B, H]

        One sequence [T, I] comes back without the batch axis everywhere; `reset` is [T] then.

        Raises
        ------
        ValueError, TypeError
            An argument has the wrong rank, shape, range or dtype; the layer is as before.
        """
        memory = {"lean": lean, "checkpoint_every": checkpoint_every}
        return self._call(x, hx, lengths, reset, reset_state, return_states, self.training, **memory)

    def infer(
        self,
        x: Any,
        hx: Any = None,
        lengths: Any = None,
        reset: Any = None,
        reset_state: Any = None,
        return_states: bool = False,
    ) -> tuple[Any, ...]:
        """As `forward` in eval mode, whatever the mode is: no dropout, nothing saved, `backward` is not touched."""
        return self._call(x, hx, lengths, reset, reset_state, return_states, training=False)

    def _call(
        self,
        x: Any,
        hx: Any,
        lengths: Any,
        reset: Any,
        reset_state: Any,
        return_states: bool,
        training: bool,
        **memory: Any,
    ) -> tuple[Any, ...]:
        if module_of(x) is not None and x.ndim not in (2, 3):
            batched = "B, T" if self.batch_first else "T, B"
            size = self.input_size
            raise ValueError(f"x: expected shape [{batched}, I={size}] or [T, I={size}], got {list(x.shape)}")
        unbatched = getattr(x, "ndim", 3) == 2
        if unbatched:
            x, hx = x[:, None], map_state(with_batch_axis("hx", 2), hx)
            lengths = lengths if lengths is None else _as_array(lengths).reshape(-1)
            reset = None if reset is None else with_batch_axis("reset", 1)(_as_array(reset))
        parameters = self._weight_parameters()
        try:
            *result, context = functional.forward(
                self.cell,
                x,
                hx,
                [p.data for p in parameters] if training else self._inference_weights(),
                num_layers=self.num_layers,
                bidirectional=self.bidirectional,
                batch_first=self.batch_first and not unbatched,
                dropout=self.dropout,
                training=training,
                lengths=lengths,
                reset=reset,
                reset_state=map_state(_reset_array(unbatched), reset_state),
                return_states=return_states,
                seed=self.seed,
                call=self.call_count,
                **memory,
                **self._cell_options(),
            )
        except (TypeError, ValueError) as error:
            self._check_weights(error)
            raise
        if training:
            self._remember(Pass(context, parameters, reset_state, unbatched))
            if self.dropout > 0:
                self.call_count += 1
        if not unbatched:
            return tuple(result)
        output, state, *states = result
        return output[:, 0], map_state(lambda s: s[:, 0], state), *(map_state(lambda s: s[:, :, 0], s) for s in states)

    def backward(
        self,
        grad_output: Any = None,
        grad_state: Any = None,
        *,
        grad_states: Any = None,
        need_grad_x: bool = True,
        need_grad_state: bool = True,
        retain: bool = False,
    ) -> tuple[Any, Any]:
        """Go back through the last forward in training mode; add into ``p.grad`` of every weight.

        What that forward was given, and the weights, must not have changed in place since.

        Parameters
        ----------
        grad_output : ndarray, shape of `output`, optional
            What lies past a row's end is ignored, NaN too.
        grad_state, grad_states : as `state` and `states`, optional
            For the LSTM either element of a pair may be None. What is missing is zero; one at least must be there.
        need_grad_x, need_grad_state : bool
            False saves the gradient of x, or that of hx, which is None then.
        retain : bool
            Keep what this needs for another `backward` through the same forward.

        Returns
        -------
        grad_x, grad_state : gradients of x and of hx (whether it was given or not)

        Raises
        ------
        RuntimeError
            There was no forward in training mode, or it was used without ``retain``.
        ValueError, TypeError
            No gradient is given, or one has the wrong shape or dtype; nothing has been added.
        """
        last = self.last_pass("backward")
        if all(map(is_missing, (grad_output, grad_state, grad_states))):
            raise ValueError("backward: expected grad_output, grad_state or grad_states, got none of them")
        trained = [*last.parameters, *_parameters_in(last.reset_state)]
        for parameter in trained:
            parameter.check_grad()
        grads = incoming(last, grad_output, grad_state, grad_states)
        grad_x, grad_hx, grad_weights = functional.backward(
            last.context,
            *grads[:2],
            grad_states=grads[2],
            need_grad_x=need_grad_x,
            need_grad_state=need_grad_state,
            retain=retain,
        )
        for parameter, grad in zip(last.parameters, grad_weights, strict=True):
            parameter.add_grad(grad)
        if last.reset_state is not None or self.grad_reset_state is not None:
            self.grad_reset_state = _hand_out(last.reset_state, last.context.grad_reset_state)
        if not retain:
            self._remember(None)
        if not last.unbatched:
            return grad_x, grad_hx
        return map_state(lambda g: g[:, 0], grad_x), map_state(lambda s: s[:, 0], grad_hx)

    def _remember(self, last: Pass | None) -> None:
        self.__dict__["_last"] = (
            last  # at every call: past the registers of parameters and modules, which take their time
        )

    def last_pass(self, caller: str) -> Pass:
        if self._last is None:
            raise RuntimeError(
                f"{caller}: expected a forward in training mode before it; a forward serves one backward unless that "
                "had retain=True"
            )
        return self._last

    def _weights_changed(self) -> None:
        self._last = None

    def stream(self, batch_size: int) -> Stream:
        """A stream of single steps for `batch_size` rows, from a zero state, with the weights as they are now."""
        return Stream(self, batch_size)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_last": None}


class RNN(RecurrentLayer):
    """Elman RNN: h_t = f(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh) with f = tanh or ReLU.

    Parameters
    ----------
    input_size, hidden_size, num_layers : int
    nonlinearity : "tanh" or "relu"
    bias : bool
        False: no b_ih, b_hh.
    batch_first : bool
        x and output are [B, T, ·]; states keep their shape.
    dropout : float in [0, 1]
        Between layers, in training.
    bidirectional : bool
    device : None or "cpu"
    dtype : float32 (None) or float64
    seed : int, optional
        Of the initial weights and of dropout; drawn where it is None.

    See `RecurrentLayer` for the call.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            f"rnn_{check_choice('nonlinearity', nonlinearity, NONLINEARITIES)}",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device,
            dtype,
            seed=seed,
        )
        self.nonlinearity = nonlinearity


class LSTM(RecurrentLayer):
    """LSTM: i, f, o = σ(…), g = tanh(…), c_t = f∘c_{t-1} + i∘g, h_t = o∘tanh(c_t), projected to P where proj_size > 0.

    Parameters as `RNN` without `nonlinearity`, and

    proj_size : int
        0, or less than hidden_size: h_t = W_hr (o∘tanh(c_t)) has this size (Sak et al. 2014).

    The state is the pair (h [L·D, B, P], c [L·D, B, H]). See `RecurrentLayer` for the call.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
        *,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            "lstm",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device,
            dtype,
            proj_size=proj_size,
            seed=seed,
        )


class GRU(RecurrentLayer):
    """GRU: r, z = σ(…), n = tanh(W_in x + b_in + r∘(W_hn h + b_hn)), h_t = (1-z)∘n + z∘h_{t-1}.

    Parameters as `RNN` without `nonlinearity`. See `RecurrentLayer` for the call.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            "gru",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device,
            dtype,
            seed=seed,
        )


class LeakyRNN(RecurrentLayer):
    """Leaky RNN: h_t = (1 - alpha) h_{t-1} + alpha f(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), f = tanh or ReLU.

    The continuous-time network tau dh/dt = -h + f(...) by Euler steps, alpha = dt / tau (Song, Yang & Wang 2016).

    Parameters
    ----------
    alpha : float in [0, 1]
        1 is the vanilla RNN; 0 keeps the state.

    The others are those of `RNN`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        alpha: float = 0.1,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            f"leaky_{check_choice('nonlinearity', nonlinearity, NONLINEARITIES)}",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device,
            dtype,
            seed=seed,
            alpha=check_number("alpha", alpha, 0.0, 1.0),
        )
        self.nonlinearity = nonlinearity


def incoming(last: Pass, grad_output: Any, grad_state: Any, grad_states: Any) -> tuple[Any, Any, Any]:
    """The gradients with a batch axis."""
    if not last.unbatched:
        return grad_output, grad_state, grad_states
    return (
        with_batch_axis("grad_output", 2)(grad_output),
        map_state(with_batch_axis("grad_state", 2), grad_state),
        map_state(with_batch_axis("grad_states", 3, axis=2), grad_states),
    )


def _as_array(values: Any) -> Any:
    """Itself where it is an array, of whatever library."""
    return np.asarray(values) if module_of(values) is None else values


def _hand_out(reset_state: Any, grads: Any) -> Any:
    """Add each gradient into its element of `reset_state` where that is a Parameter, else return it in its place."""
    if not isinstance(reset_state, (tuple, list)):
        return _hand_out_one(reset_state, grads)
    return tuple(_hand_out_one(element, grad) for element, grad in zip(reset_state, grads, strict=True))


def _hand_out_one(element: Any, grad: Any) -> Any:
    if element is None or grad is None:
        return None
    grad = grad.reshape(element.shape)
    if not isinstance(element, Parameter):
        return grad
    element.add_grad(grad)
    return None


def _parameters_in(state: Any) -> list[Parameter]:
    elements: Sequence[Any] = state if isinstance(state, (tuple, list)) else (state,)
    return [element for element in elements if isinstance(element, Parameter)]


def _reset_array(unbatched: bool) -> Callable[[Any], Any]:
    """A function that gives the array of an element of `reset_state`, with a batch axis."""

    def array_of(element: Any) -> Any:
        array = element.data if isinstance(element, Parameter) else element
        # A learned state [L·D, 1, P] serves unbatched calls as it is.
        return array[:, None] if unbatched and getattr(array, "ndim", 3) == 2 else array

    return array_of
