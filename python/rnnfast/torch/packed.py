"""PackedSequence: its data as padded rows with lengths, and back.

The engine wants rows [T, B, .] with lengths; a PackedSequence holds the valid steps one after another, [N, .]. Both
directions are one gather or scatter by the same index, and each is the other's adjoint.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.utils.rnn import PackedSequence


class Padded(NamedTuple):
    """A PackedSequence's data as rows in the order of the user's batch."""

    x: Tensor  # [T, B, .], zero past the ends
    lengths: Tensor  # int64 [B]
    index: Tensor  # int64 [N]: t * B + b of each valid step


def unpack(sequence: PackedSequence) -> Padded:
    """The rows of a PackedSequence."""
    batch_sizes = sequence.batch_sizes  # on the host, always
    steps, batch_size = batch_sizes.shape[0], int(batch_sizes[0])
    valid = torch.arange(batch_size) < batch_sizes[:, None]  # [T, B], B by falling length
    lengths, order = valid.sum(0), sequence.sorted_indices
    if order is not None:
        lengths = torch.zeros_like(lengths).scatter_(0, order.cpu(), lengths)
    t, b = valid.nonzero(as_tuple=True)
    index = t * batch_size + (b if order is None else order.cpu()[b])
    data = sequence.data
    index = index.to(data.device)
    return Padded(Unpack.apply(data, index, steps * batch_size).view(steps, batch_size, -1), lengths, index)


def pack(output: Tensor, padded: Padded, like: PackedSequence) -> PackedSequence:
    """Rows [T, B, .] as a PackedSequence of the same layout as `like`."""
    data = Pack.apply(output.flatten(0, 1), padded.index)
    return PackedSequence(data, like.batch_sizes, like.sorted_indices, like.unsorted_indices)


class Unpack(Function):
    """data [N, .], index [N] -> [rows, .], zero elsewhere."""

    generate_vmap_rule = True

    @staticmethod
    def forward(data: Tensor, index: Tensor, rows: int) -> Tensor:
        return data.new_zeros(rows, data.shape[1]).index_copy_(0, index, data)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return Pack.apply(grad, *ctx.saved_tensors), None, None


class Pack(Function):
    """rows [M, .], index [N] -> [N, .]"""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, index: Tensor) -> Tensor:
        return rows.index_select(0, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.rows = inputs[0].shape[0]
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return Unpack.apply(grad, *ctx.saved_tensors, ctx.rows), None


def permute(state: Tensor | None, order: Tensor | None) -> Tensor | None:
    """Rows of a state [L*D, B, .] in another order."""
    return state if state is None or order is None else state.index_select(1, order)
