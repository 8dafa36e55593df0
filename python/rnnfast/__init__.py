"""Fast recurrent networks: vanilla RNN, LSTM and GRU, forward and backward through time, in hand-written kernels.

``import rnnfast`` loads NumPy and the engine alone. The submodules `torch`, `bench` and `cli` bring what they need.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from . import _engine as _engine  # first: it sets what the engine reads when it is loaded
from . import functional, init, optim, reference
from ._core import version as __version__
from ._strict import set_strict
from ._tf32 import get_tf32, set_tf32
from .base import Module, Parameter
from .cells import GRUCell, LSTMCell, RNNCell
from .clipping import clip_grad_norm_, clip_grad_value_, get_total_norm
from .explain import explain
from .functional import get_num_threads, set_num_threads
from .interop import from_torch
from .layers import Dropout, Embedding, Linear, Sequential
from .losses import bce_with_logits, cross_entropy, mse_loss
from .modules import GRU, LSTM, RNN, LeakyRNN
from .serialization import load, load_checkpoint, save
from .training import gradient_flow, tbptt

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Dropout",
    "Embedding",
    "GRUCell",
    "LSTMCell",
    "LeakyRNN",
    "Linear",
    "Module",
    "Parameter",
    "RNNCell",
    "Sequential",
    "__version__",
    "bce_with_logits",
    "clip_grad_norm_",
    "clip_grad_value_",
    "cross_entropy",
    "explain",
    "from_torch",
    "functional",
    "get_num_threads",
    "get_tf32",
    "get_total_norm",
    "gradient_flow",
    "init",
    "load",
    "load_checkpoint",
    "mse_loss",
    "optim",
    "reference",
    "save",
    "set_num_threads",
    "set_strict",
    "set_tf32",
    "tbptt",
]


def __getattr__(name: str) -> Any:
    if name in ("torch", "bench"):  # on first use: they import their libraries
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
