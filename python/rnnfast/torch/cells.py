"""torch.nn's recurrent cells on rnnfast's kernels: one step, `RNNCell`, `LSTMCell`, `GRUCell`.

A cell's step is a layer's call with T = 1. For many steps a layer is faster by far, with `reset` and `return_states`
for what a loop over a cell is usually written for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import fallback, kernels, route
from .kernels import NO_EXTRAS, Inputs, Options, WeightCache

__all__ = ["GRUCell", "LSTMCell", "RNNCell"]


_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class Cell(torch.nn.RNNCellBase):
    """What the cells share: ``cell(input [B, I] or [I], hx [B, H] or [H])``, for an LSTM a pair."""

    _weight_cache: WeightCache | None = None

    def cell(self) -> str:
        """The engine's name of the cell."""
        raise NotImplementedError

    def _step(self, input: Tensor, state: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """The new state, (h,) or (h, c); `state` holds Nones where none was given."""
        h, c = (*state, None)[:2]
        if len(state) == 1 or (h is None) == (c is None):
            kind = self.cell(), 1, False
            packed = route.packed_for(kind, self._weights(), self._weight_cache, input, h, c, rank=2)
            short = None if packed is None else kernels.infer_step(packed, input, h, c)
            if short is not None:
                return short[: len(state)]
        unbatched = input.dim() == 1
        for s in state:
            if s is not None and unbatched and s.dim() != 1:
                raise RuntimeError(f"For unbatched input, hx should also be 1-D but got a {s.dim()}-D tensor")
        x = input.unsqueeze(0) if unbatched else input
        elements = [s.unsqueeze(0) if s is not None and s.dim() == 1 else s for s in state]
        self._check(x, elements)
        weights = self._weights()
        why = fallback.reason(x, weights[0])
        if why is not None and fallback.announce(why):
            new = fallback.run_cell(self.cell(), x, tuple(elements), weights)
        else:
            new = self._run(x, elements, weights)
        return tuple(s.squeeze(0) for s in new) if unbatched else new

    def _run(self, x: Tensor, state: list[Any], weights: list[Tensor]) -> tuple[Tensor, ...]:
        # [B, .] as one step [1, B, .] of one layer
        h0, c0 = [None if s is None else s.unsqueeze(0) for s in (*state, None)[:2]]
        inputs = Inputs(x.unsqueeze(0), h0, c0, None, None, weights)
        options = Options(self.cell(), 1, False, False, 0.0, False)
        if not fallback.autocasts(x):
            _, *new = route.run(options, inputs, NO_EXTRAS, self._cache)
        else:
            kind = {"lstm": "LSTMCell", "gru": "GRUCell"}.get(options.cell, "RNNCell")
            _, *new = fallback.run_in_autocast(
                kind,
                (),
                lambda converted: route.run(options, converted, NO_EXTRAS, self._cache),
                inputs,
                self.training,
            )
        return tuple(s.squeeze(0) for s in new[: len(state)] if s is not None)

    def _weights(self) -> list[Tensor]:
        parameters = self._parameters
        try:
            weights = [parameters[name] for name in _NAMES]
        except KeyError:  # a parametrisation or a hook computes one
            weights = [getattr(self, name) for name in _NAMES]
        biases = [i for i in (2, 3) if weights[i] is not None]
        if not biases:
            return weights[:2]
        for i in {2, 3} - {*biases}:  # torch.nn's step knows a single one
            weights[i] = torch.zeros_like(weights[biases[0]])
        return weights

    def _cache(self) -> WeightCache:
        if self._weight_cache is None:
            self.__dict__["_weight_cache"] = WeightCache()
        return self._weight_cache  # type: ignore[return-value]

    def _check(self, x: Tensor, state: list[Any]) -> None:
        """In torch's words."""
        if x.device != self.weight_ih.device:
            raise RuntimeError(
                f"Input and parameter tensors are not at the same device, found input tensor at {x.device} and parameter "
                f"tensor at {self.weight_ih.device}"
            )
        autocast = fallback.autocasts(x)
        if x.shape[1] != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {x.shape[1]} expected {self.input_size}")
        if x.dtype != self.weight_ih.dtype and not autocast:
            raise RuntimeError(f"mat1 and mat2 must have the same dtype, but got {x.dtype} and {self.weight_ih.dtype}")
        for i, s in enumerate(state):
            if s is None:
                continue
            if s.shape[0] != x.shape[0]:
                raise RuntimeError(f"Input batch size {x.shape[0]} doesn't match hidden{i} batch size {s.shape[0]}")
            if s.shape[1] != self.hidden_size:
                raise RuntimeError(
                    f"hidden{i} has inconsistent hidden_size: got {s.shape[1]}, expected {self.hidden_size}"
                )
            if s.dtype != x.dtype and not autocast:
                raise RuntimeError(f"mat1 and mat2 must have the same dtype, but got {s.dtype} and {x.dtype}")


def check_rank(kind: str, name: str, tensor: Tensor | None) -> None:
    if tensor is not None and tensor.dim() not in (1, 2):
        raise ValueError(f"{kind}: Expected {name} to be 1D or 2D, got {tensor.dim()}D instead")


class RNNCell(Cell):
    """torch.nn.RNNCell: h' = f(W_ih x + b_ih + W_hh h + b_hh) with f = tanh or ReLU."""

    __constants__ = ["input_size", "hidden_size", "bias", "nonlinearity"]  # noqa: RUF012 (torch's)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity

    def cell(self) -> str:
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return f"rnn_{self.nonlinearity}"

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        check_rank("RNNCell", "input", input)
        check_rank("RNNCell", "hidden", hx)
        return self._step(input, (hx,))[0]


class LSTMCell(Cell):
    """torch.nn.LSTMCell: i, f, o = σ(…), g = tanh(…), c' = f∘c + i∘g, h' = o∘tanh(c')."""

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)

    def cell(self) -> str:
        return "lstm"

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        check_rank("LSTMCell", "input", input)
        if hx is not None and (not isinstance(hx, (tuple, list)) or len(hx) != 2):
            raise TypeError(f"hx: expected a pair (h, c), got {type(hx).__name__}")
        h, c = (None, None) if hx is None else hx
        check_rank("LSTMCell", "hx[0]", h)
        check_rank("LSTMCell", "hx[1]", c)
        new_h, new_c = self._step(input, (h, c))
        return new_h, new_c


class GRUCell(Cell):
    """torch.nn.GRUCell: r, z = σ(…), n = tanh(W_in x + b_in + r∘(W_hn h + b_hn)), h' = (1-z)∘n + z∘h."""

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)

    def cell(self) -> str:
        return "gru"

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        check_rank("GRUCell", "input", input)
        check_rank("GRUCell", "hidden", hx)
        return self._step(input, (hx,))[0]
