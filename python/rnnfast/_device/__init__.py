"""Arrays on a CUDA device: the engine `rnnfast._cuda` behind the interface that `_core` has for NumPy arrays.

The extension takes addresses, strides and a stream, and allocates nothing. What it is given comes from the arrays' own
library, CuPy or PyTorch, and so does the memory. A call goes to the library's current stream of the arrays' device, and does
not wait for it. From the outside in:

    stream.py        one step after another: pinned weights, the state inside
    stack.py         a stack of layers, its weights, its forward call
    context.py       what a forward call keeps, and its backward
    arguments.py     arrays of a call, checked, and as addresses and strides
    libraries.py     CuPy and PyTorch with the same verbs: memory, devices, streams
    extension.py     the extension, and why it cannot run here

Sizes: T time, B batch, I input_size, H hidden_size, P proj_size or H, L num_layers, D directions.
"""

from __future__ import annotations

from .context import Context
from .extension import array_module, no_array_module, unavailable
from .libraries import library_of, owns
from .stack import Packed, Stack
from .stream import Stream

__all__ = [
    "Context",
    "Packed",
    "Stack",
    "Stream",
    "array_module",
    "library_of",
    "no_array_module",
    "owns",
    "unavailable",
]
