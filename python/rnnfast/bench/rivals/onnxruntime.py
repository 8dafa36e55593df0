"""ONNX Runtime: the operators LSTM, GRU and RNN, one a layer, in a model that is built here; inference only.

States are inputs and outputs of the model, so that streaming feeds them back; resets call the session for each stretch
between the steps at which some row is reset.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..arrays import Array, Arrays
from ..rows import Row
from . import Job, Setup, Unsupported, named_states, reset_times

_OPSET, _IR_VERSION = 17, 8
_PASS_THROUGH = 0  # in the shape of a Reshape: this axis as it is

State = tuple[Array, ...]
Run = Callable[[Array, State], tuple[Array, State]]


def available(device: str) -> str | None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        return str(error)
    return None if device == "cpu" else "its recurrent operators are compared on the CPU only"


def version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


def prepare(row: Row, arrays: Arrays, setup: Setup) -> Job:
    if row.mode == "train":
        raise Unsupported("inference only")
    if row.dtype != "float32":
        raise Unsupported("its recurrent operators are float32 only")
    if row.reset and (row.bidirectional or row.ragged):
        raise Unsupported("resets in a ragged or bidirectional batch have no form in ONNX's operators")
    run = _make_run(row, arrays, setup)
    if row.mode == "step":
        return _stream_job(row, arrays, run)

    def call() -> tuple[Array, State]:
        return _run_segments(run, arrays) if arrays.reset is not None else run(arrays.x, arrays.hx)

    def result() -> dict[str, Array]:
        output, state = call()
        return {"output": output, **named_states(row, state)}

    return Job(call, result)


def _stream_job(row: Row, arrays: Arrays, run: Run) -> Job:
    state, inputs = arrays.hx, [arrays.x[t : t + 1] for t in range(len(arrays.x))]

    def call(x: Array = inputs[0]) -> Array:
        nonlocal state
        output, state = run(x, state)
        return output

    def result() -> dict[str, Array]:
        nonlocal state
        state = arrays.hx
        outputs = [call(x) for x in inputs]
        return {"output": np.concatenate(outputs), **named_states(row, state)}

    return Job(call, result)


def _run_segments(run: Run, arrays: Arrays) -> tuple[Array, State]:
    assert arrays.reset is not None
    times, outputs, state = reset_times(arrays.reset), [], arrays.hx
    for start, stop in zip(times, [*times[1:], len(arrays.x)], strict=True):
        cut = arrays.reset[start][:, None]
        state = tuple(np.where(cut, np.float32(0), part) for part in state)
        output, state = run(arrays.x[start:stop], state)
        outputs.append(output)
    return np.concatenate(outputs), state


def _make_run(row: Row, arrays: Arrays, setup: Setup) -> Run:
    """run(x, state) -> output, state on a session; states are [L*D,B,H] as PyTorch's, one array for all layers."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = setup.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    model = build_model(row, arrays)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = ("h0", "c0")[: len(arrays.hx)]
    lengths = {} if arrays.lengths is None else {"lengths": arrays.lengths.astype(np.int32)}

    def run(x: Array, state: State) -> tuple[Array, State]:
        output, *final = session.run(None, {"x": x, **dict(zip(names, state, strict=True)), **lengths})
        return output, tuple(final)

    return run


# --- the model -------------------------------------------------------------------------------------------------------


def build_model(row: Row, arrays: Arrays) -> bytes:
    """A serialised model: x [T,B,I], h0 (and c0) [L*D,B,H], lengths [B] if ragged -> output [T,B,D*H], hn (and cn)."""
    from onnx import TensorProto, helper

    states = ("h", "c")[: len(arrays.hx)]
    constants = {
        "output_shape": np.array([_PASS_THROUGH, _PASS_THROUGH, -1], np.int64),
        "state_split": np.array([row.directions] * row.layers, np.int64),
    }
    nodes = []
    for state in states:
        parts = [f"{state}0_{layer}" for layer in range(row.layers)]
        nodes.append(helper.make_node("Split", [f"{state}0", "state_split"], parts, axis=0))
    for layer in range(row.layers):
        nodes += _layer_nodes(row, arrays, layer, constants)
    for state in states:
        finals = [f"{state}n_{layer}" for layer in range(row.layers)]
        nodes.append(helper.make_node("Concat", finals, [f"{state}n"], axis=0))

    def value(name: str, kind: int, rank: int) -> Any:
        return helper.make_tensor_value_info(name, kind, [None] * rank)

    inputs = [value(name, TensorProto.FLOAT, 3) for name in ("x", *(f"{state}0" for state in states))]
    inputs += [value("lengths", TensorProto.INT32, 1)] if arrays.lengths is not None else []
    outputs = [value(name, TensorProto.FLOAT, 3) for name in (f"y_{row.layers}", *(f"{state}n" for state in states))]
    graph = helper.make_graph(
        nodes, "rnn", inputs, outputs, [_tensor(name, array) for name, array in constants.items()]
    )
    opset = [helper.make_opsetid("", _OPSET)]
    return helper.make_model(graph, opset_imports=opset, ir_version=_IR_VERSION).SerializeToString()


def _layer_nodes(row: Row, arrays: Arrays, layer: int, constants: dict[str, Array]) -> list[Any]:
    """One operator, and its output [T,D,B,H] brought to [T,B,D*H]; weights are added to `constants`."""
    from onnx import helper

    w, r, b = (f"{name}_{layer}" for name in "WRB")
    constants.update(zip((w, r, b), onnx_weights(row, arrays, layer), strict=True))
    below = f"y_{layer}" if layer else "x"
    operator = {"lstm": "LSTM", "gru": "GRU"}.get(row.cell, "RNN")
    inputs = [below, w, r, b, "lengths" if arrays.lengths is not None else "", f"h0_{layer}"]
    outputs = [f"raw_{layer}", f"hn_{layer}"]
    options: dict[str, Any] = {"hidden_size": row.H, "direction": "bidirectional" if row.bidirectional else "forward"}
    if row.cell == "lstm":
        inputs, outputs = [*inputs, f"c0_{layer}"], [*outputs, f"cn_{layer}"]
    elif row.cell == "gru":
        options["linear_before_reset"] = 1
    else:
        options["activations"] = ["Relu" if row.cell == "rnn_relu" else "Tanh"] * row.directions
    return [
        helper.make_node(operator, inputs, outputs, **options),
        helper.make_node("Transpose", [f"raw_{layer}"], [f"turned_{layer}"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", [f"turned_{layer}", "output_shape"], [f"y_{layer + 1}"]),
    ]


def onnx_weights(row: Row, arrays: Arrays, layer: int) -> tuple[Array, Array, Array]:
    """W [D,G*H,in], R [D,G*H,H] and B [D,2*G*H] of one layer in ONNX's order of the gates."""
    stacked = []
    for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        suffixes = [f"_l{layer}", f"_l{layer}_reverse"][: row.directions]
        stacked.append(np.stack([to_onnx_order(row.cell, arrays.weights[kind + suffix]) for suffix in suffixes]))
    return stacked[0], stacked[1], np.concatenate(stacked[2:], axis=1)


def to_onnx_order(cell: str, array: Array) -> Array:
    """Rows [G*H, ...] from PyTorch's gates (i,f,g,o and r,z,n) to ONNX's (i,o,f,c and z,r,h)."""
    order = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2)}.get(cell)
    if order is None:
        return array
    gates = np.split(array, len(order))
    return np.concatenate([gates[k] for k in order])


def _tensor(name: str, array: Array) -> Any:
    from onnx import numpy_helper

    return numpy_helper.from_array(np.ascontiguousarray(array), name)
