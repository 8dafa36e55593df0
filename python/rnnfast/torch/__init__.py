"""The PyTorch layer: `RNN`, `LSTM`, `GRU` and their cells as drop-in replacements for torch.nn's, on rnnfast's kernels.

    import rnnfast.torch
    lstm = rnnfast.torch.LSTM(64, 128, num_layers=2)      # torch.nn's constructor, state_dict, initialisation, repr
    model = rnnfast.torch.convert(model)                  # or: every recurrent module of a model, in place

From the outside in:

    modules.py, cells.py    torch.nn's classes: parameters, arguments, shapes and their errors
    packed.py               PackedSequence
    route.py                which way a call goes: autograd.py, operators.py, or torch's own kernels (fallback.py)
    autograd.py             eager calls: one autograd.Function
    operators.py            torch.compile, torch.export, torch.func: operators registered with torch.library
    composed.py             the reference on tensors: derivatives of derivatives
    kernels.py              tensors to the engine and back, without copies
    convert.py              torch.nn's modules to ours and back

`isinstance(m, torch.nn.RNNBase)` holds for the layers and `isinstance(m, torch.nn.RNNCellBase)` for the cells;
torch.nn.LSTM itself is not their base, because torch.compile refuses its instances.
"""

from __future__ import annotations

try:
    import torch as _torch
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "rnnfast.torch: expected PyTorch to be installed: pip install 'rnnfast[torch]'"
    ) from error

from typing import Any

from .cells import GRUCell, LSTMCell, RNNCell
from .convert import Change, convert, revert
from .modules import GRU, LSTM, RNN

__all__ = ["GRU", "LSTM", "RNN", "Change", "GRUCell", "LSTMCell", "RNNCell", "convert", "revert"]


def __getattr__(name: str) -> Any:
    if hasattr(_torch.nn, name):
        raise AttributeError(
            f"rnnfast.torch has no {name}: only the recurrent layers and cells; take {name} from torch.nn, or convert a "
            "whole model with rnnfast.torch.convert(model)"
        )
    raise AttributeError(f"module 'rnnfast.torch' has no attribute {name!r}")
