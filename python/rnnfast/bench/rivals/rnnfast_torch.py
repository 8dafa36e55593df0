"""This package's layers for PyTorch, on a GPU: the tensors, the loop and the clock are those of the contender "torch"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import rnnfast.torch
from rnnfast import functional

from ..arrays import Array, Arrays
from . import torch as rival
from .torch import State


class Network(rival.Network):
    """Lengths and resets are arguments here, and lie on the device; steps are a stream's."""

    library = rnnfast.torch

    def take_options(self, arrays: Arrays) -> None:
        given = {"lengths": arrays.lengths, "reset": arrays.reset}
        self.options = {n: torch.from_numpy(a).to(self.device) for n, a in given.items() if a is not None}

    def forward(self) -> tuple[torch.Tensor, State]:
        return self.run(self.x, self.hx, **self.options)

    def step_job(self) -> tuple[Callable[[], Any], Callable[[], dict[str, Array]]]:
        row = self.row
        weights = [parameter.detach() for parameter in self.layer.parameters()]
        packed = functional.pack(row.engine_cell, weights, num_layers=row.layers)
        stream = functional.Stream(row.engine_cell, packed, row.B, num_layers=row.layers)
        step, first = stream.step, self.x[0]

        def result() -> dict[str, Array]:
            stream.set_state(self.hx if row.cell == "lstm" else self.hx[0])
            output = torch.stack([step(x_t) for x_t in self.x])
            state = stream.get_state()
            return self.named(output, state if isinstance(state, tuple) else (state,))

        return lambda: step(first), result
