"""The CUDA engine, by pointers; see csrc/bindings/module_cuda.cpp. rnnfast/_device is its only caller."""

from collections.abc import Mapping, Sequence

View = Sequence[int] | None  # address, strides in elements

class Call:
    """One forward call, and its backward."""

    def __init__(
        self,
        *,
        cell: str,
        dtype: str,
        sizes: Sequence[int],
        bias: bool,
        parameters: Sequence[float],
        steps: int,
        batch: int,
        training: bool,
        views: Mapping[str, View],
        weights: Sequence[View],
        dropout: float,
        seed: int,
        call: int,
        checkpoint_every: int | None,
        tf32: bool,
    ) -> None:
        """`checkpoint_every`: None keeps gates, else lean; 0: windows of steps as the engine likes."""
    def forward_bytes(self) -> tuple[int, int]:
        """(reserve, workspace)"""
    def forward(self, reserve: int, workspace: int, stream: int) -> None: ...
    def plan(self) -> str:
        """Which kernels serve it, in words."""
    def backward_bytes(self, views: Mapping[str, View], gradients: Sequence[View], retain: bool) -> int:
        """workspace"""
    def backward(
        self,
        views: Mapping[str, View],
        gradients: Sequence[View],
        retain: bool,
        reserve: int,
        workspace: int,
        stream: int,
    ) -> None: ...

emulated: bool
architectures: str

def set_path(path: str) -> None:
    """'generic': a launch for each step, even where all steps fit one launch; 'grid', 'cluster': blocks that share the
    hidden units, even where one block would do, all of the device or those of a cluster; '': the best."""

def device_count() -> int:
    """0 where there is no driver."""

def device_description() -> str:
    """The current device, or why there is none."""

def launches() -> int:
    """In the emulator: how many kernels this thread has launched."""

def barriers() -> int:
    """In the emulator: how many barriers blocks have come to, not in vain: a measure of the steps they did."""

def run_backwards(on: bool) -> None:
    """In the emulator: run the threads of a block in the opposite order."""

def set_multiprocessors(count: int, cluster: int = 16) -> None:
    """In the emulator: how many the device has that plans are made for, 132 at first, and how many blocks its clusters."""
