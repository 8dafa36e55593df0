"""The reference on tensors: a composed path that PyTorch differentiates as often as it is asked to.

It serves second and higher derivatives: the first is the engine's. Slow, and exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import functional, reference
from .kernels import Extras, Inputs, Options


def forward(options: Options, inputs: Inputs, extras: Extras) -> tuple[Tensor | None, ...]:
    """The five outputs of `kernels.forward`, by `rnnfast.reference`."""
    has_c = functional.CELLS[options.cell].has_cell_state
    output, state, *states, _ = reference.forward(
        options.cell,
        inputs.x,
        _state(inputs.h0, inputs.c0, has_c),
        inputs.weights,
        num_layers=options.num_layers,
        bidirectional=options.bidirectional,
        batch_first=options.batch_first,
        dropout=options.dropout,
        training=options.dropout > 0,
        lengths=extras.lengths,
        reset=extras.reset,
        reset_state=_state(inputs.reset_h, inputs.reset_c, has_c),
        return_states=options.return_states,
        seed=0 if extras.seed is None else int(extras.seed),
    )
    hn, cn = state if has_c else (state, None)
    h_all, c_all = (states[0] if has_c else (states[0], None)) if states else (None, None)
    return output, hn, cn, h_all, c_all


def _state(h: Tensor | None, c: Tensor | None, has_c: bool) -> Any:
    if h is None:
        return None
    return (h, c) if has_c else h


def second_derivative(
    options: Options,
    extras: Extras,
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    grads_of_grads: Sequence[Tensor | None],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The adjoint of `kernels.backward`: gradients of `grads` and of `inputs` (`Inputs.flat`).

    `grads_of_grads` belong to the gradients of the inputs that are there and needed; None is zero.
    """
    given = [i for i, g in enumerate(grads) if g is not None]
    present = [i for i, t in enumerate(inputs) if t is not None]
    wanted = [i for i in present if needs[i]]

    def first_derivative(output_grads: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
        full: list[Any] = [None] * len(inputs)
        for i, t in zip(present, tensors, strict=True):
            full[i] = t

        def outputs(*chosen: Tensor) -> tuple[Tensor | None, ...]:
            for i, t in zip(wanted, chosen, strict=True):
                full[i] = t
            results = forward(options, Inputs.from_flat(full), extras)
            return tuple(results[i] for i in given)

        _, pull = torch.func.vjp(outputs, *(full[i] for i in wanted))
        return list(pull(tuple(output_grads)))

    firsts, pull = torch.func.vjp(first_derivative, [grads[i] for i in given], [inputs[i] for i in present])
    seeds = [torch.zeros_like(f) if g is None else g for f, g in zip(firsts, grads_of_grads, strict=True)]
    of_grads, of_inputs = pull(seeds)
    return _spread(of_grads, given, len(grads)), _spread(of_inputs, present, len(inputs))


def _spread(values: Sequence[Tensor], places: Sequence[int], size: int) -> list[Tensor | None]:
    spread: list[Tensor | None] = [None] * size
    for place, value in zip(places, values, strict=True):
        spread[place] = value
    return spread
