"""This package, through its public modules, as a user calls it; "rnnfast-tf32" with TF32 products on a GPU, for information."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np

import rnnfast
from rnnfast import _device

from ..arrays import Array, Arrays
from ..rows import Row
from . import Job, Setup, Unsupported, named_states


def available(device: str) -> str | None:
    """On a GPU the arrays are PyTorch's: it has all dtypes, and its cuDNN layers, timed beside, take the same tensors."""
    why = None if device == "cpu" else _device.unavailable()
    if device != "cpu" and why is None and importlib.util.find_spec("torch") is None:
        why = "PyTorch is not installed"
    return why and f"device {device}: {why}"


def version() -> str:
    return str(rnnfast.__version__)


def probe(what: str, threads: int, **arguments: Any) -> Any:
    """The engine's own measurements: "fma" in GFLOP/s, "barrier" in seconds, and the name of the ISA in use."""
    from rnnfast import _core

    if what == "fma":
        return _core.fma_peak(threads, arguments["seconds"], arguments["dtype"])
    if what == "barrier":
        return _core.barrier_time(threads)
    if what == "isa":
        return _core.isa()
    raise ValueError(f"what: expected 'fma', 'barrier' or 'isa', got {what!r}")


def prepare(row: Row, arrays: Arrays, setup: Setup) -> Job:
    if setup.variant == "tf32" and (row.dtype != "float32" or setup.device == "cpu"):
        raise Unsupported("TF32 is for float32 rows on a GPU")
    rnnfast.set_num_threads(setup.threads)
    rnnfast.set_tf32(setup.variant == "tf32")
    if setup.device != "cpu":
        from .rnnfast_torch import Network

        return Network(row, arrays, setup).job()
    layer = _make_layer(row, arrays)
    state = arrays.hx if row.cell == "lstm" else arrays.hx[0]
    options = {"lengths": arrays.lengths, "reset": arrays.reset}
    if row.mode == "step":
        return _stream_job(row, layer.eval(), arrays.x, state)
    if row.mode == "train":
        return _train_job(row, layer.train(), (arrays.x, state), options, arrays.grad_output)

    layer.eval()

    def call() -> Any:
        return layer(arrays.x, state, **options)

    def result() -> dict[str, Array]:
        output, final = call()
        return _copied({"output": output, **named_states(row, _parts(final))})

    return Job(call, result)


def _train_job(row: Row, layer: Any, inputs: tuple[Any, Any], options: Any, grad_output: Any) -> Job:
    def call() -> tuple[Any, Any, Any]:
        layer.zero_grad()
        output, final = layer(*inputs, **options)
        grad_x, _ = layer.backward(grad_output, need_grad_state=False)
        return output, final, grad_x

    def result() -> dict[str, Array]:
        output, final, grad_x = call()
        grads = {f"grad_{name}": parameter.grad for name, parameter in layer.named_parameters()}
        return _copied({"output": output, **named_states(row, _parts(final)), "grad_x": grad_x, **grads})

    return Job(call, result)


def _stream_job(row: Row, layer: Any, x: Any, state: Any) -> Job:
    stream = layer.stream(row.B)
    step, first = stream.step, x[0]

    def result() -> dict[str, Array]:
        stream.state = state
        outputs = [step(x_t) for x_t in x]
        return {"output": np.stack(outputs), **_copied(named_states(row, _parts(stream.state)))}

    return Job(lambda: step(first), result)


def _make_layer(row: Row, arrays: Arrays) -> Any:
    kinds = {"lstm": rnnfast.LSTM, "gru": rnnfast.GRU, "rnn": rnnfast.RNN, "rnn_relu": rnnfast.RNN}
    kind: Any = kinds[row.cell]
    extra = {"nonlinearity": "relu"} if row.cell == "rnn_relu" else {}
    try:
        layer = kind(row.I, row.H, row.layers, bidirectional=row.bidirectional, dtype=row.dtype, seed=0, **extra)
    except (TypeError, ValueError) as error:
        raise Unsupported(str(error)) from error
    for name, parameter in layer.named_parameters():
        parameter.data[...] = arrays.weights[name]
    return layer


def _parts(state: Any) -> tuple[Any, ...]:
    return state if isinstance(state, tuple) else (state,)


def _copied(results: dict[str, Any]) -> dict[str, Array]:
    """The next call may write into the same memory."""
    return {name: np.array(value) for name, value in results.items()}
