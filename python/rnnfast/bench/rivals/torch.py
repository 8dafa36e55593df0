"""PyTorch eager: `torch.nn.LSTM`, `GRU`, `RNN` under `inference_mode`, or with autograd for x and every weight.

A ragged batch goes through a packed sequence, packing included, as in any program. There are no resets in PyTorch: the
layer is called for each stretch between the steps at which some row is reset, with the state masked in between.
The variants "torch-bf16" and "torch-tf32" run float32 rows in bfloat16 or with TF32 products, for information.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ..arrays import Array, Arrays
from ..gpu import make_clock, torch_device
from ..rows import Row
from . import Job, Setup, Unsupported, named_states, reset_times

State = tuple[torch.Tensor, ...]


def available(device: str) -> str | None:
    return None if torch_device(device) == "cpu" or torch.cuda.is_available() else "torch sees no CUDA device"


def version() -> str:
    return str(torch.__version__)


def prepare(row: Row, arrays: Arrays, setup: Setup) -> Job:
    if row.reset and (row.bidirectional or row.ragged):
        raise Unsupported("resets in a ragged or bidirectional batch have no form in PyTorch's layers")
    torch.set_num_threads(setup.threads)
    if setup.variant == "tf32" and row.dtype != "float32":
        raise Unsupported("TF32 is for float32 rows")
    if setup.device == "cuda":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = setup.variant == "tf32"
    return Network(row, arrays, setup).job()


class Network:
    """The layer of one row with its inputs as tensors, and a callable pair for each mode.

    Any module with torch.nn's recurrent classes will do.
    """

    library: Any = torch.nn

    def __init__(self, row: Row, arrays: Arrays, setup: Setup) -> None:
        self.row, self.device = row, torch_device(setup.device)
        self.clock = make_clock(row.mode, setup.device)
        self.dtype = getattr(torch, "bfloat16" if setup.variant == "bf16" else row.dtype)
        self.layer = self._make_layer(arrays)
        self.x = self.send(arrays.x)
        self.hx = tuple(self.send(state) for state in arrays.hx)
        self.grad_output = self.send(arrays.grad_output)
        self.take_options(arrays)

    def take_options(self, arrays: Arrays) -> None:
        """Lengths and resets, as the library wants them."""
        self.lengths = None if arrays.lengths is None else torch.from_numpy(arrays.lengths)
        self.cuts: list[tuple[slice, torch.Tensor]] = []
        if arrays.reset is not None:
            times = reset_times(arrays.reset)
            for start, stop in zip(times, [*times[1:], self.row.T], strict=True):
                keep = torch.from_numpy(~arrays.reset[start])[:, None].to(self.device)
                self.cuts.append((slice(start, stop), keep))

    def job(self) -> Job:
        jobs = {"infer": self.infer_job, "train": self.train_job, "step": self.step_job}
        return Job(*jobs[self.row.mode](), self.clock)

    def infer_job(self) -> tuple[Callable[[], Any], Callable[[], dict[str, Array]]]:
        self.layer.eval()

        def call() -> tuple[torch.Tensor, State]:
            with torch.inference_mode():
                return self.forward()

        def result() -> dict[str, Array]:
            output, state = call()
            return self.named(output, state)

        return call, result

    def train_job(self) -> tuple[Callable[[], Any], Callable[[], dict[str, Array]]]:
        self.layer.train()
        self.x.requires_grad_()

        def call() -> tuple[torch.Tensor, State]:
            self.layer.zero_grad(set_to_none=True)
            self.x.grad = None
            output, state = self.forward()
            output.backward(self.grad_output)
            return output, state

        def result() -> dict[str, Array]:
            output, state = call()
            grads = {f"grad_{name}": fetch(p.grad) for name, p in self.layer.named_parameters()}
            return {**self.named(output, state), "grad_x": fetch(self.x.grad), **grads}

        return call, result

    def step_job(self) -> tuple[Callable[[], Any], Callable[[], dict[str, Array]]]:
        self.layer.eval()
        with torch.inference_mode():
            state, inputs = self.hx, [x.unsqueeze(0) for x in self.x.unbind(0)]

        @torch.inference_mode()
        def call(x: torch.Tensor = inputs[0]) -> torch.Tensor:
            nonlocal state
            output, state = self.run(x, state)
            return output

        def result() -> dict[str, Array]:
            nonlocal state
            state = self.hx
            output = torch.cat([call(x) for x in inputs])
            return self.named(output, state)

        return call, result

    def forward(self) -> tuple[torch.Tensor, State]:
        if self.lengths is not None:
            packed = pack_padded_sequence(self.x, self.lengths, enforce_sorted=False)
            output, state = self.run(packed, self.hx)
            return pad_packed_sequence(output, total_length=self.row.T)[0], state
        if not self.cuts:
            return self.run(self.x, self.hx)
        outputs, state = [], self.hx
        for steps, keep in self.cuts:
            state = tuple(torch.where(keep, part, 0) for part in state)
            output, state = self.run(self.x[steps], state)
            outputs.append(output)
        return torch.cat(outputs), state

    def run(self, x: Any, state: State, **options: Any) -> tuple[Any, State]:
        if self.row.cell == "lstm":
            return self.layer(x, state, **options)
        output, final = self.layer(x, state[0], **options)
        return output, (final,)

    def _make_layer(self, arrays: Arrays) -> torch.nn.RNNBase:
        row = self.row
        extra = {"nonlinearity": "relu"} if row.cell == "rnn_relu" else {}
        kind = getattr(self.library, row.family.upper())
        layer: torch.nn.RNNBase = kind(row.I, row.H, row.layers, bidirectional=row.bidirectional, **extra)
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                parameter.copy_(torch.from_numpy(arrays.weights[name]))
        return layer.to(self.device, self.dtype)

    def send(self, array: Array) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, self.dtype)

    def named(self, output: torch.Tensor, state: State) -> dict[str, Array]:
        return {"output": fetch(output), **named_states(self.row, [fetch(part) for part in state])}


def fetch(tensor: torch.Tensor | None) -> Array:
    assert tensor is not None
    tensor = tensor.detach().cpu()
    return np.array((tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy())
