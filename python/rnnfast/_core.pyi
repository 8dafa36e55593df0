"""The CPU engine: the whole time loop of recurrent layers, forward and backward.

`rnnfast.functional` is its only caller: arrays come in checked for rank and type there, and what is None stays None.
tests/test_stubs.py compares names, parameters and defaults with the compiled module.
"""

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

version: str
compiler: str

class Stack:
    """The configuration of a stack of recurrent layers."""

    def __init__(
        self,
        cell: str,
        dtype: str,
        input_size: int,
        hidden_size: int,
        proj_size: int,
        num_layers: int,
        num_directions: int,
        bias: bool,
        parameters: Sequence[float],
    ) -> None: ...
    def forward(
        self,
        x: Any,
        h0: Any,
        c0: Any,
        weights: Any,
        batch_first: bool,
        training: bool,
        lengths: Any,
        reset: Any,
        reset_h: Any,
        reset_c: Any,
        return_states: bool,
        dropout: float,
        seed: int,
        call: int,
        output: Any = None,
        hn: Any = None,
        cn: Any = None,
        packed: Any = None,
        lean: bool = False,
        checkpoint_every: int = 0,
    ) -> tuple[NDArray[Any], NDArray[Any], Any, Any, Any, Context | None]:
        """(output, hn, cn, h_all, c_all, context)"""

    def infer(
        self, x: Any, h0: Any, c0: Any, packed: Packed, batch_first: bool, fresh: Fresh
    ) -> tuple[Any, Any, Any] | None:
        """Inference on PyTorch's tensors: (output, hn, cn), or None where they are not the plain ones."""

    def infer_step(self, x: Any, h0: Any, c0: Any, packed: Packed, fresh: Fresh) -> tuple[Any, Any] | None:
        """One step of one layer, [B, .] to (h, c); None as for `infer`."""

class Fresh:
    """What makes new tensors: torch.empty, and what it is told beside the shape."""

    def __init__(self, empty: Any, dtype: Any, device: Any) -> None: ...

def as_array(tensor: Any, dtype: Any) -> NDArray[Any]:
    """The memory of a strided CPU tensor of PyTorch."""

class TensorMemory:
    """Where some of PyTorch's tensors lie, and what is there."""

    def __init__(self, tensors: list[Any]) -> None: ...
    def holds(self, tensors: list[Any]) -> bool:
        """Whether they are the same objects, contiguous, in the same memory."""

    def digest(self) -> int | None:
        """A number that changes when a byte of the tensors does; None where one is not contiguous."""

class Packed:
    """Weights in the kernels' order, pinned when made."""

    def __init__(self, stack: Stack, weights: Sequence[Any]) -> None: ...
    @property
    def nbytes(self) -> int: ...

class Context:
    """What a training-mode forward keeps for its backward."""

    def backward(
        self,
        grad_output: Any,
        grad_hn: Any,
        grad_cn: Any,
        grad_h_all: Any,
        grad_c_all: Any,
        need_grad_x: bool,
        need_grad_weights: bool,
        retain: bool,
        record: bool,
        grad_x: Any = None,
        need_grad_state: bool = True,
    ) -> tuple[Any, Any, Any, list[NDArray[Any]], Any, Any, Any]:
        """(grad_x, grad_h0, grad_c0, [grad_weights], grad_reset_h, grad_reset_c, grad_h)"""
    def rebind(
        self,
        stack: Stack,
        x: Any,
        h0: Any,
        c0: Any,
        weights: Sequence[Any],
        reset: Any,
        reset_h: Any,
        reset_c: Any,
        output: Any,
    ) -> None:
        """Read these arrays from now on: of the same contents as the forward's, but in other memory."""
    @property
    def nbytes(self) -> int: ...
    @property
    def consumed(self) -> bool: ...
    @property
    def plan(self) -> str: ...

class Stream:
    """One step after another, with pinned weights and the state inside."""

    def __init__(self, stack: Stack, packed: Packed, batch_size: int) -> None: ...
    def step(self, x_t: Any, reset: Any = None, out: Any = None) -> NDArray[Any]: ...
    def get_state(self) -> Any: ...
    def set_state(self, h: Any, c: Any = None) -> None: ...
    def reorder(self, rows: Any) -> None: ...
    def set_packed(self, packed: Packed) -> None: ...
    def fork(self) -> Stream: ...
    def close(self) -> None: ...
    @property
    def closed(self) -> bool: ...

def cells() -> list[tuple[str, int, bool, str]]:
    """(name, gates, has a cell state, parameters) of every cell."""

def isa() -> str:
    """The instruction set in use."""

def isas() -> list[str]:
    """Those that this machine can run, best first."""

def compiled_isas() -> list[str]: ...
def get_num_threads() -> int: ...
def set_num_threads(n: int) -> None: ...
def set_split(split: str) -> None:
    """Force how calls are shared between threads; '' is the cost model."""

def barrier_time(threads: int) -> float:
    """Seconds in which threads that have nothing else to do meet."""

def fma_peak(threads: int, seconds: float = 0.2, dtype: str = "float32") -> float:
    """GFLOP/s of fused multiply-adds."""

def pooled_bytes() -> int:
    """Memory held for reuse."""

def release_pool() -> None: ...
