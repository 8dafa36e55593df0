"""The benchmark's GPU is PyTorch's: its tensors, its clock, and which of cuDNN's algorithms PyTorch takes for a row."""

from __future__ import annotations

from .clock import Clock, EventClock, HostClock
from .rows import Row

REGIONS = ("small H", "persistent", "a launch a step", "packed")

# Tests of the emulated engine set this: PyTorch's CPU tensors then stand in for the device's.
stand_in = False


def torch_device(device: str) -> str:
    return "cpu" if stand_in else device


def make_clock(mode: str, device: str) -> Clock:
    """Events for a sequence. A streamed step is as long as its Python call: the host's clock."""
    if device == "cpu" or stand_in:
        return HostClock()
    import torch

    return HostClock(torch.cuda.synchronize) if mode == "step" else EventClock(torch.cuda)


def cudnn_region(row: Row) -> str:
    """Which algorithm of cuDNN PyTorch asks for, by the rules of its `cudnn/RNN.cpp` for a GPU of 98 multiprocessors or more.

    For training the region of the backward pass, whose limits are the tighter ones. "packed" is a launch a step, too.
    """
    if row.ragged:
        return "packed"
    if row.dtype != "float64" and _is_small(row):
        return "small H"
    return "persistent" if row.dtype == "float16" and _fits_persistent(row) else "a launch a step"


def _is_small(row: Row) -> bool:
    forward, backward = (384, 256) if row.family == "rnn" else (192, 128)
    limit = backward if row.mode == "train" else forward
    return limit >= row.H


def _fits_persistent(row: Row) -> bool:
    one = row.layers == 1 and not row.bidirectional
    sizes = row.H <= 1024 and row.H % 128 == 0 and row.I % 128 == 0 and row.B <= 128 and row.B % 8 == 0
    return one and sizes and row.cell != "gru" and (row.cell == "lstm" or row.B < 96 or row.H < 896)
