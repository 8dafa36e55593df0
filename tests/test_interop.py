"""Other libraries' conventions: PyTorch modules both ways, ONNX operators and Keras layers by their own equations."""

from __future__ import annotations

import numpy as np
import pytest

from rnnfast import interop
from rnnfast.cells import GRUCell, LSTMCell, RNNCell
from rnnfast.interop import (
    from_torch,
    keras_weights,
    load_keras_weights,
    load_onnx_weights,
    onnx_weights,
    permutation,
    reorder_gates,
    to_torch,
)
from rnnfast.layers import Dropout, Embedding, Linear, Sequential
from rnnfast.modules import GRU, LSTM, RNN

T, B, IN, H = 5, 3, 4, 6
KINDS = {
    "rnn_tanh": lambda **k: RNN(IN, H, dtype="float64", **k),
    "rnn_relu": lambda **k: RNN(IN, H, nonlinearity="relu", dtype="float64", **k),
    "lstm": lambda **k: LSTM(IN, H, dtype="float64", **k),
    "gru": lambda **k: GRU(IN, H, dtype="float64", **k),
}


@pytest.fixture(params=KINDS)
def make(request):
    return KINDS[request.param]


def same_weights(a, b):
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, value in a.state_dict().items():
        np.testing.assert_array_equal(value, b.state_dict()[name])


# Permutations --------------------------------------------------------------------------------------------------------


def test_permutations():
    assert permutation("lstm", "torch", "onnx") == (0, 3, 1, 2)
    assert permutation("lstm", "onnx", "torch") == (0, 2, 3, 1)
    assert permutation("gru", "torch", "onnx") == permutation("gru", "torch", "keras") == (1, 0, 2)
    assert permutation("lstm", "torch", "keras") == (0, 1, 2, 3)
    assert permutation("rnn_tanh", "torch", "onnx") == (0,)
    with pytest.raises(ValueError, match="target"):
        permutation("lstm", "torch", "theano")


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_reordering_there_and_back_changes_nothing(cell):
    array = np.random.default_rng(0).standard_normal((5, 24))
    for source in interop.LIBRARIES:
        for target in interop.LIBRARIES:
            there = reorder_gates(array, cell, source, target, axis=1)
            np.testing.assert_array_equal(reorder_gates(there, cell, target, source, axis=1), array)
    blocks = np.arange(4).repeat(6)
    if cell == "lstm":
        np.testing.assert_array_equal(reorder_gates(blocks, cell, "torch", "onnx"), np.repeat([0, 3, 1, 2], 6))
        with pytest.raises(ValueError, match="array"):
            reorder_gates(array, cell, "torch", "onnx")


# ONNX ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_onnx_there_and_back(make, bias, bidirectional):
    layer = make(num_layers=2, bias=bias, bidirectional=bidirectional, seed=0)
    other = make(num_layers=2, bias=bias, bidirectional=bidirectional, seed=1)
    for k in range(2):
        load_onnx_weights(other, onnx_weights(layer, k), k)
    same_weights(layer, other)
    weights = onnx_weights(layer)
    assert list(weights) == (["W", "R", "B"] if bias else ["W", "R"])
    assert weights["R"].shape == (1 + bidirectional, layer.weight_hh_l0.shape[0], H)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_onnx_runtime_agrees(make, bidirectional):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper, numpy_helper

    layer = make(bidirectional=bidirectional, seed=0)
    layer = type(layer)(**{**layer.config(), "dtype": "float32"})
    directions = 1 + bidirectional
    attributes = {"hidden_size": H, "direction": "bidirectional" if bidirectional else "forward"}
    if layer.cell == "gru":
        attributes["linear_before_reset"] = 1
    if layer.cell == "rnn_relu":
        attributes["activations"] = ["Relu"] * directions
    node = helper.make_node(type(layer).__name__, ["X", "W", "R", "B"], ["Y"], **attributes)
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, [T, B, IN])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, [T, directions, B, H])],
        [numpy_helper.from_array(value, name) for name, value in onnx_weights(layer).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    onnx.checker.check_model(model)
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((T, B, IN)).astype(np.float32)
    (y,) = session.run(None, {"X": x})  # T, D, B, H
    want = layer(x)[0].reshape(T, B, directions, H).swapaxes(1, 2)
    np.testing.assert_allclose(y, want, rtol=0, atol=2e-6)


def test_onnx_without_b_is_zero_bias(make):
    layer = make(seed=0)
    weights = onnx_weights(make(bias=False, seed=1))
    load_onnx_weights(layer, weights)
    assert not layer.bias_ih_l0.data.any()
    assert not layer.bias_hh_l0.data.any()


def test_refused_weights_change_nothing(make):
    layer, plain = make(seed=0), make(bias=False, seed=0)
    before = layer.state_dict()
    good = onnx_weights(layer)
    for bad, error, name in [
        ({**good, "W": good["W"][:, :-1]}, ValueError, "W"),
        ({**good, "R": good["R"][..., :-1]}, ValueError, "weight_hh"),
        ({**good, "B": good["B"].astype(np.float32)}, TypeError, "bias_ih"),
        ({"R": good["R"]}, KeyError, "W"),
    ]:
        with pytest.raises(error, match=name):
            load_onnx_weights(layer, bad)
    keras = keras_weights(layer)
    for bad in (keras[:2], [keras[0].T, *keras[1:]], [*keras[:2], keras[2][..., :-1]]):
        with pytest.raises(ValueError, match="weights"):
            load_keras_weights(layer, bad)
    for name, value in before.items():
        np.testing.assert_array_equal(layer.state_dict()[name], value)
    with pytest.raises(ValueError, match="bias=False"):
        load_onnx_weights(plain, good)
    with pytest.raises(ValueError, match="layer"):
        onnx_weights(layer, 1)
    with pytest.raises(ValueError, match="projection"):
        onnx_weights(LSTM(IN, H, proj_size=2))
    with pytest.raises(TypeError, match="module"):
        keras_weights(Linear(IN, H))


# Keras ---------------------------------------------------------------------------------------------------------------


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def keras_layer(cell, weights, x):
    """The steps as Keras states them: kernel on the right, gates i f c o and z r h, reset after the product."""
    kernel, recurrent, bias = weights
    h = c = np.zeros((x.shape[1], recurrent.shape[0]))
    outputs = []
    for x_t in x:
        if cell == "lstm":
            i, f, g, o = np.split(x_t @ kernel + h @ recurrent + bias, 4, axis=1)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        elif cell == "gru":
            x_z, x_r, x_h = np.split(x_t @ kernel + bias[0], 3, axis=1)
            h_z, h_r, h_h = np.split(h @ recurrent + bias[1], 3, axis=1)
            z, r = sigmoid(x_z + h_z), sigmoid(x_r + h_r)
            h = z * h + (1 - z) * np.tanh(x_h + r * h_h)
        else:
            a = x_t @ kernel + h @ recurrent + bias
            h = np.tanh(a) if cell == "rnn_tanh" else np.maximum(a, 0)
        outputs.append(h)
    return np.stack(outputs)


def test_keras_equations(make):
    layer = make(seed=0)
    weights = keras_weights(layer)
    assert weights[0].shape == (IN, layer.weight_ih_l0.shape[0])
    x = np.random.default_rng(0).standard_normal((T, B, IN))
    want = keras_layer(layer.cell, weights, x)
    np.testing.assert_allclose(layer(x)[0], want, rtol=0, atol=1e-12)
    other = make(seed=1)
    load_keras_weights(other, weights)
    np.testing.assert_allclose(other(x)[0], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_keras_there_and_back_bidirectional(make, bias):
    layer, other = (make(num_layers=2, bias=bias, bidirectional=True, seed=s) for s in (0, 1))
    for k in range(2):
        weights = keras_weights(layer, k)
        assert len(weights) == (6 if bias else 4)
        load_keras_weights(other, weights, k)
    x = np.random.default_rng(0).standard_normal((T, B, IN))
    np.testing.assert_allclose(other(x)[0], layer(x)[0], rtol=0, atol=1e-12)
    if layer.cell == "gru":
        same_weights(layer, other)


def test_keras_gru_with_reset_before_is_refused():
    layer = GRU(IN, H, dtype="float64", seed=0)
    kernel, recurrent, bias = keras_weights(layer)
    with pytest.raises(ValueError, match="reset_after"):
        load_keras_weights(layer, [kernel, recurrent, bias[0]])


# PyTorch -------------------------------------------------------------------------------------------------------------


def torch_modules(torch):
    nn, wide = torch.nn, {"dtype": torch.float64}
    return [
        nn.RNN(IN, H, nonlinearity="relu", bias=False, **wide),
        nn.RNN(IN, H, 2, batch_first=True),
        nn.LSTM(IN, H, 2, bidirectional=True, dropout=0.25, proj_size=3, **wide),
        nn.GRU(IN, H, 2, batch_first=True, bidirectional=True, bias=False),
        nn.RNNCell(IN, H, nonlinearity="relu"),
        nn.LSTMCell(IN, H, bias=False, **wide),
        nn.GRUCell(IN, H, **wide),
        nn.Linear(IN, H),
        nn.Linear(IN, H, bias=False, **wide),
        nn.Embedding(9, IN, padding_idx=2),
        nn.Embedding(9, IN, **wide),
        nn.Dropout(0.25),
        nn.Sequential(nn.Embedding(9, IN), nn.Dropout(0.1), nn.Linear(IN, H)),
    ]


@pytest.mark.parametrize("index", range(13))
@pytest.mark.parametrize("training", [True, False])
def test_torch_there_and_back(index, training):
    torch = pytest.importorskip("torch")
    theirs = torch_modules(torch)[index].train(training)
    ours = from_torch(theirs)
    assert type(ours).__name__ == type(theirs).__name__
    assert ours.training == training
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    for name, value in ours.state_dict().items():
        np.testing.assert_array_equal(value, state[name].numpy())
        assert not np.shares_memory(value, state[name].numpy())
    back = to_torch(ours)
    assert repr(back) == repr(theirs)
    assert back.training == training
    for name, value in back.state_dict().items():
        assert torch.equal(value, state[name])
        assert value.dtype == state[name].dtype


def test_converted_modules_compute_the_same():
    torch = pytest.importorskip("torch")
    theirs = torch.nn.LSTM(IN, H, 2, bidirectional=True, batch_first=True, proj_size=3, dtype=torch.float64)
    x = np.random.default_rng(0).standard_normal((B, T, IN))
    got, (hn, cn) = from_torch(theirs)(x)
    want, (h_t, c_t) = theirs(torch.from_numpy(x))
    for a, b in ((got, want), (hn, h_t), (cn, c_t)):
        np.testing.assert_allclose(a, b.detach().numpy(), rtol=0, atol=1e-12)


def test_torch_copies():
    torch = pytest.importorskip("torch")
    theirs = torch.nn.GRU(IN, H)
    ours = from_torch(theirs)
    before = ours.state_dict()
    with torch.no_grad():
        theirs.weight_hh_l0 += 1
    back = ours.to_torch()
    ours.weight_hh_l0.data += 2
    np.testing.assert_array_equal(back.weight_hh_l0.detach().numpy(), before["weight_hh_l0"])
    assert all(p.requires_grad for p in back.parameters())
    eval_mode = ours.eval().to_torch()
    eval_mode.weight_hh_l0.data += 1  # of a read-only array, a writeable copy


def test_methods_and_functions_are_one():
    pytest.importorskip("torch")
    others = Linear(IN, H), Embedding(5, IN), Dropout(0.1), Sequential(Embedding(5, IN), GRU(IN, H))
    for module in (RNN(IN, H), LSTMCell(IN, H), GRUCell(IN, H), RNNCell(IN, H), *others):
        assert repr(module.to_torch()) == repr(to_torch(module))


def test_what_torch_cannot_give():
    torch = pytest.importorskip("torch")

    class Mine(torch.nn.LSTM):
        pass

    for module, error, text in [
        (torch.nn.GRU(IN, H).half(), TypeError, "float32"),
        (torch.nn.GRU(IN, H, device="meta"), ValueError, "CPU"),
        (torch.nn.Conv1d(1, 1, 1), TypeError, "Conv1d"),
        (Mine(IN, H), TypeError, "Mine"),
        (torch.nn.Embedding(3, 2, max_norm=1.0), ValueError, "max_norm"),
        (object(), TypeError, "object"),
    ]:
        with pytest.raises(error, match=text):
            from_torch(module)
    mixed = torch.nn.LSTM(IN, H)
    mixed.bias_hh_l0 = torch.nn.Parameter(mixed.bias_hh_l0.double())
    with pytest.raises(TypeError, match="float64"):
        from_torch(mixed)


def test_what_torch_cannot_take():
    pytest.importorskip("torch")

    class Mine(LSTM):
        pass

    with pytest.raises(TypeError, match="Mine"):
        to_torch(Mine(IN, H))


def test_sequential_keeps_the_modes_of_its_children():
    pytest.importorskip("torch")
    model = Sequential(Embedding(5, IN), Dropout(0.5), Linear(IN, H))
    model[1].eval()
    theirs = to_torch(model)
    assert [m.training for m in theirs] == [True, False, True]
    assert [m.training for m in from_torch(theirs)] == [True, False, True]


def test_from_torch_names_revert():
    pytest.importorskip("torch")
    import rnnfast.torch
    from rnnfast.interop import from_torch

    with pytest.raises(TypeError, match=r"rnnfast\.torch\.revert"):
        from_torch(rnnfast.torch.LSTM(2, 3))
