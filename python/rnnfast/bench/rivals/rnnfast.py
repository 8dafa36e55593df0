"""This package, through its public modules, as a user calls it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np

import rnnfast

from ..arrays import Array, Arrays
from ..rows import Row
from . import Job, Setup, Unsupported, named_states


def available(device: str) -> str | None:
    if device == "cpu":
        return None
    if importlib.util.find_spec("rnnfast._cuda") is None:
        return "device cuda: this version of rnnfast has no CUDA engine"
    try:
        import cupy

        importlib.import_module("rnnfast._cuda")
    except ImportError as error:
        return f"device cuda: {error}"
    return None if cupy.cuda.runtime.getDeviceCount() else "device cuda: none found"


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
    rnnfast.set_num_threads(setup.threads)
    send, fetch, sync = _transfers(row, setup.device)
    layer = _make_layer(row, arrays, setup.device, send)
    hx = tuple(send(state) for state in arrays.hx)
    x, state = send(arrays.x), hx if row.cell == "lstm" else hx[0]
    options = {"lengths": arrays.lengths, "reset": arrays.reset}
    if row.mode == "step":
        return _stream_job(row, layer.eval(), x, state, fetch, sync)
    if row.mode == "train":
        return _train_job(row, layer.train(), (x, state), options, send(arrays.grad_output), fetch, sync)

    layer.eval()

    def call() -> Any:
        return layer(x, state, **options)

    def result() -> dict[str, Array]:
        output, final = call()
        return _fetched(fetch, {"output": output, **named_states(row, _parts(final))})

    return Job(call, result, sync)


def _train_job(
    row: Row, layer: Any, inputs: tuple[Any, Any], options: Any, grad_output: Any, fetch: Any, sync: Callable[[], None]
) -> Job:
    def call() -> tuple[Any, Any, Any]:
        layer.zero_grad()
        output, final = layer(*inputs, **options)
        grad_x, _ = layer.backward(grad_output)
        return output, final, grad_x

    def result() -> dict[str, Array]:
        output, final, grad_x = call()
        grads = {f"grad_{name}": parameter.grad for name, parameter in layer.named_parameters()}
        return _fetched(fetch, {"output": output, **named_states(row, _parts(final)), "grad_x": grad_x, **grads})

    return Job(call, result, sync)


def _stream_job(row: Row, layer: Any, x: Any, state: Any, fetch: Any, sync: Callable[[], None]) -> Job:
    stream = layer.stream(row.B)
    step, first = stream.step, x[0]

    def result() -> dict[str, Array]:
        stream.state = state
        outputs = [fetch(step(x_t)) for x_t in x]
        return {"output": np.stack(outputs), **_fetched(fetch, named_states(row, _parts(stream.state)))}

    return Job(lambda: step(first), result, sync)


def _make_layer(row: Row, arrays: Arrays, device: str, send: Any) -> Any:
    kinds = {"lstm": rnnfast.LSTM, "gru": rnnfast.GRU, "rnn": rnnfast.RNN, "rnn_relu": rnnfast.RNN}
    kind: Any = kinds[row.cell]
    extra = {"nonlinearity": "relu"} if row.cell == "rnn_relu" else {}
    extra |= {"device": device} if device != "cpu" else {}
    try:
        layer = kind(row.I, row.H, row.layers, bidirectional=row.bidirectional, dtype=row.dtype, seed=0, **extra)
    except (TypeError, ValueError) as error:
        raise Unsupported(str(error)) from error
    for name, parameter in layer.named_parameters():
        parameter.data[...] = send(arrays.weights[name])
    return layer


def _transfers(row: Row, device: str) -> tuple[Callable[[Array], Any], Callable[[Any], Array], Callable[[], None]]:
    """To the device in the row's dtype, back from it, and the wait for it."""
    if device == "cpu":
        return (lambda array: array), np.asarray, lambda: None
    import cupy

    if row.dtype == "bfloat16":
        import ml_dtypes

        return (
            (lambda array: cupy.asarray(array.astype(ml_dtypes.bfloat16))),
            (lambda array: cupy.asnumpy(array).astype(np.float32)),
            cupy.cuda.get_current_stream().synchronize,
        )
    return (
        (lambda array: cupy.asarray(array.astype(row.dtype))),
        cupy.asnumpy,
        cupy.cuda.get_current_stream().synchronize,
    )


def _parts(state: Any) -> tuple[Any, ...]:
    return state if isinstance(state, tuple) else (state,)


def _fetched(fetch: Any, results: dict[str, Any]) -> dict[str, Array]:
    """Copies: the next call may write into the same memory."""
    return {name: np.array(fetch(value)) for name, value in results.items()}
