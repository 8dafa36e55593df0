"""Recurrent cells, one step a call: `RNNCell`, `LSTMCell`, `GRUCell`.

For loops that a layer cannot run for you, because a step's input depends on the step before: attention, sampling, a
simulator in between. A cell keeps no context of its own, so that the loop may be unrolled as far as it likes. What a
step was given must not change in place before its `backward`:

    contexts = []
    for x in xs:
        state, context = cell(x, state)
        contexts.append(context)
    grad_state = None
    for context, grad_h in zip(reversed(contexts), reversed(grads)):    # grads of a loss in each step's state
        grad_x, grad_state = cell.backward(context, add(grad_h, grad_state))

Where the inputs are known beforehand, a layer is many times faster.

Sizes in comments: B batch, I input_size, H hidden_size, G gates.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from . import functional
from ._arrays import check_choice, module_of
from .base import Parameter
from .modules import NONLINEARITIES
from .recurrent import Recurrent, cell_weight_shapes, is_missing, map_state, with_batch_axis

__all__ = ["GRUCell", "LSTMCell", "RNNCell", "RecurrentCell"]


class CellContext(NamedTuple):
    """What one step saved for its `backward`; opaque."""

    context: Any
    parameters: list[Parameter]
    unbatched: bool


class RecurrentCell(Recurrent):
    """One step of one layer: the base of `RNNCell`, `LSTMCell` and `GRUCell`.

    Attributes
    ----------
    weight_ih, weight_hh, bias_ih, bias_hh : Parameter
        [G·H, I], [G·H, H], [G·H], [G·H]; names and order of the gates are PyTorch's.
    """

    def __init__(
        self,
        cell: str,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        seed: int | None = None,
        **parameters: Any,
    ) -> None:
        super().__init__(cell, input_size, hidden_size, bias, device, dtype, seed, **parameters)
        self._make_weights(dict(cell_weight_shapes(cell, self.input_size, self.hidden_size, 0, self.bias)))

    def forward(self, x: Any, hx: Any = None) -> tuple[Any, CellContext | None]:
        """One step.

        Parameters
        ----------
        x : ndarray [B, I], or [I]
        hx : ndarray [B, H], for the LSTM a pair (h, c), or without the batch axis as x; zeros where it is None

        Returns
        -------
        state : as `hx`; for RNN and GRU the output, for the LSTM (output, c)
        context : for `backward`; None in eval mode, where nothing is saved

        Raises
        ------
        ValueError, TypeError
            An argument has the wrong rank, shape or dtype.
        """
        shape = () if module_of(x) is None else x.shape  # anything else is refused by the engine
        if len(shape) > 2:
            raise ValueError(f"x: expected shape (batch, {self.input_size}) or ({self.input_size},), got {shape}")
        unbatched = len(shape) == 1
        if unbatched:
            x, hx = x[None], map_state(with_batch_axis("hx", 1, axis=0), hx)
        parameters = self._weight_parameters()
        try:
            _, state, context = functional.forward(
                self.cell,
                x[None] if shape else x,
                map_state(with_batch_axis("hx", 2, axis=0), hx),
                [p.data for p in parameters] if self.training else self._inference_weights(),
                training=self.training,
                **self._cell_options(),
            )
        except (TypeError, ValueError) as error:
            self._check_weights(error)
            raise
        state = map_state(lambda s: s[0, 0] if unbatched else s[0], state)
        return state, CellContext(context, parameters, unbatched) if self.training else None

    def backward(
        self, context: CellContext, grad_state: Any, *, need_grad_x: bool = True, retain: bool = False
    ) -> tuple[Any, Any]:
        """Go back through the step that returned `context`; add into ``p.grad`` of every weight.

        Parameters
        ----------
        context : CellContext
        grad_state : as `state`
            The gradient of the state that the step returned; one element of the LSTM's pair may be None.
        need_grad_x : bool
            False saves the gradient of x, which is None then.
        retain : bool
            Allow another `backward` with this context.

        Returns
        -------
        grad_x, grad_hx : gradients of x and of hx

        Raises
        ------
        RuntimeError
            The context was used before without ``retain``.
        TypeError, ValueError
            `context` is none (of a step in eval mode), or a gradient has the wrong shape or dtype.
        """
        if not isinstance(context, CellContext):
            raise TypeError(f"context: expected one of a step in training mode, got {type(context).__name__}")
        if is_missing(grad_state):
            raise ValueError("grad_state: expected a gradient of the state, got None")
        for parameter in context.parameters:
            parameter.check_grad()
        if context.unbatched:
            grad_state = map_state(with_batch_axis("grad_state", 1, axis=0), grad_state)
        grad_state = map_state(with_batch_axis("grad_state", 2, axis=0), grad_state)
        try:
            grad_x, grad_hx, grad_weights = functional.backward(
                context.context, None, grad_state, need_grad_x=need_grad_x, retain=retain
            )
        except RuntimeError as error:
            raise RuntimeError(
                "context: expected one that no backward has used, or only with retain=True, got one that is used up"
            ) from error
        for parameter, grad in zip(context.parameters, grad_weights, strict=True):
            parameter.add_grad(grad)
        index: Any = (0, 0) if context.unbatched else 0
        return None if grad_x is None else grad_x[index], map_state(lambda s: s[index], grad_hx)


class RNNCell(RecurrentCell):
    """h' = f(W_ih x + b_ih + W_hh h + b_hh) with f = tanh or ReLU; arguments as those of `RNN`, in PyTorch's order."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: Any = None,
        *,
        seed: int | None = None,
    ) -> None:
        cell = f"rnn_{check_choice('nonlinearity', nonlinearity, NONLINEARITIES)}"
        super().__init__(cell, input_size, hidden_size, bias, device, dtype, seed=seed)
        self.nonlinearity = nonlinearity


class LSTMCell(RecurrentCell):
    """The step of `LSTM`: ``(h, c), context = cell(x, (h, c))``."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        seed: int | None = None,
    ) -> None:
        super().__init__("lstm", input_size, hidden_size, bias, device, dtype, seed=seed)


class GRUCell(RecurrentCell):
    """The step of `GRU`: ``h, context = cell(x, h)``."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        seed: int | None = None,
    ) -> None:
        super().__init__("gru", input_size, hidden_size, bias, device, dtype, seed=seed)
