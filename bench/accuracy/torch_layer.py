"""torch.nn's recurrent layers behind the face of rnnfast's, so that an example can be run with either.

All else stays the same: the weights begin as the same numbers, and losses, optimiser and data are the example's. The
weights lie in the same memory for both libraries. Ragged batches are packed sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnfast


def map_state(function: Callable[[Any], Any], state: Any) -> Any:
    """Of each part of a state: the LSTM has two; none stays none."""
    if isinstance(state, tuple):
        return tuple(map(function, state))
    return None if state is None else function(state)


class TorchLayer:
    """Before one of rnnfast's layers in the order of bases: the layer whose forward and backward are torch's."""

    kind: type[torch.nn.RNNBase]
    grad_x = False  # whether the gradient by x was ever asked for; torch's forward must know

    def _layer(self: Any) -> torch.nn.RNNBase:
        """torch's layer on these weights, made when it is needed first."""
        if getattr(self, "_torch", None) is None:
            options = {"nonlinearity": self.nonlinearity} if self.cell.startswith("rnn") else {}
            layer = self.kind(self.input_size, self.hidden_size, self.num_layers, dropout=self.dropout, **options)
            for name, parameter in layer.named_parameters():
                parameter.data = torch.from_numpy(getattr(self, name).data)
            self._torch = layer
        return self._torch

    def _mode_changed(self: Any) -> None:
        """Nothing is packed; the weights stay writable."""
        self._layer().train(self.training)

    def forward(self: Any, x: np.ndarray, hx: Any = None, lengths: Any = None) -> tuple[np.ndarray, Any]:
        """x [T, B, I] and the state before it to the output [T, B, H] and the state after it."""
        with torch.set_grad_enabled(self.training):
            self._x = given = torch.from_numpy(x).requires_grad_(self.training and self.grad_x)
            if lengths is not None:
                given = pack_padded_sequence(given, torch.from_numpy(lengths), enforce_sorted=False)
            output, state = self._layer()(given, map_state(torch.from_numpy, hx))
            if lengths is not None:
                output, _ = pad_packed_sequence(output, total_length=len(x))
        self._again, self._output = (x, hx, lengths), output
        return output.detach().numpy(), map_state(lambda part: part.detach().numpy(), state)

    def backward(self: Any, grad_output: np.ndarray, grad_state: Any = None, *, need_grad_x: bool = True) -> Any:
        """Into p.grad of every weight, and by x. The examples that are run so need none by the states."""
        if grad_state is not None:
            raise NotImplementedError("expected the gradient by the output alone")
        if need_grad_x and not self.grad_x:
            self.grad_x = True
            self.forward(*self._again)
        names, parameters = zip(*self._layer().named_parameters(), strict=True)
        inputs = (*parameters, self._x) if need_grad_x else parameters
        grads = torch.autograd.grad(self._output, inputs, torch.from_numpy(grad_output))
        for name, grad in zip(names, grads, strict=False):
            getattr(self, name).add_grad(grad.numpy())
        return grads[-1].numpy() if need_grad_x else None, None


class LSTM(TorchLayer, rnnfast.LSTM):  # type: ignore[misc]  # fewer arguments
    kind = torch.nn.LSTM


class GRU(TorchLayer, rnnfast.GRU):  # type: ignore[misc]  # fewer arguments
    kind = torch.nn.GRU


class RNN(TorchLayer, rnnfast.RNN):  # type: ignore[misc]  # fewer arguments
    kind = torch.nn.RNN


CELLS = {"lstm": LSTM, "gru": GRU, "rnn": RNN}
