"""Initialisers: ranges, moments, structure, seeds, and what they refuse."""

import math

import numpy as np
import pytest

from rnnfast import init
from rnnfast.base import Module, Parameter
from rnnfast.layers import Embedding, Linear, Sequential


class Recurrent(Module):
    """Stands for a recurrent layer: two layers of the named cell, PyTorch's names and shapes."""

    def __init__(self, cell="lstm", hidden_size=4, proj_size=0, bias=True):
        super().__init__()
        self.cell, self.hidden_size = cell, hidden_size
        rows = {"lstm": 4, "gru": 3, "rnn_relu": 1}[cell] * hidden_size
        for layer in range(2):
            shapes = {"weight_ih": (rows, 5), "weight_hh": (rows, proj_size or hidden_size)}
            if bias:
                shapes.update(bias_ih=(rows,), bias_hh=(rows,))
            for name, shape in shapes.items():
                setattr(self, f"{name}_l{layer}", Parameter(np.full(shape, 9.0)))


@pytest.mark.parametrize(
    "function",
    [
        lambda w, seed: init.uniform_(w, -2, 2, seed=seed),
        lambda w, seed: init.normal_(w, 1, 2, seed=seed),
        lambda w, seed: init.xavier_uniform_(w, seed=seed),
        lambda w, seed: init.xavier_normal_(w, seed=seed),
        lambda w, seed: init.kaiming_uniform_(w, seed=seed),
        lambda w, seed: init.recurrent_uniform_(w, 7, seed=seed),
        lambda w, seed: init.orthogonal_(w, seed=seed),
    ],
)
def test_seeds_parameters_arrays_dtypes(function):
    array, parameter, single = np.zeros((6, 4)), Parameter(np.zeros((6, 4))), np.zeros((6, 4), np.float32)
    assert function(array, 3) is array
    assert function(parameter, 3) is parameter
    function(single, 3)
    np.testing.assert_array_equal(array, parameter.data)
    np.testing.assert_array_equal(single, array.astype(np.float32))
    source, other = np.random.default_rng(3), np.zeros((6, 4))
    function(other, source)
    np.testing.assert_array_equal(other, array)
    function(other, source)  # a generator goes on
    assert not np.array_equal(other, array)
    function(other, None)
    assert not np.array_equal(other, array)


def moments(function, shape=(300, 200)):
    weight = np.zeros(shape)
    function(weight)
    return abs(weight).max(), weight.std()


def test_ranges_and_moments():
    bound = 1 / math.sqrt(200)
    largest, std = moments(lambda w: init.kaiming_uniform_(w, seed=0))
    assert 0.99 * bound < largest <= bound
    assert std == pytest.approx(bound / 3**0.5, rel=0.02)
    largest, _ = moments(lambda w: init.recurrent_uniform_(w, 64, seed=0))
    assert 0.99 / 8 < largest <= 1 / 8
    largest, _ = moments(lambda w: init.xavier_uniform_(w, gain=2.0, seed=0))
    assert largest == pytest.approx(2 * math.sqrt(6 / 500), rel=0.01)
    _, std = moments(lambda w: init.xavier_normal_(w, gain=2.0, seed=0))
    assert std == pytest.approx(2 * math.sqrt(2 / 500), rel=0.02)
    _, std = moments(lambda w: init.normal_(w, seed=0))
    assert std == pytest.approx(1.0, rel=0.02)


def test_default_ranges_are_torchs():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    for ours, theirs in (
        (Linear(50, 400, seed=0), torch.nn.Linear(50, 400)),
        (Embedding(400, 50, seed=0), torch.nn.Embedding(400, 50)),
    ):
        for name, parameter in ours.named_parameters():
            other = getattr(theirs, name).detach().numpy()
            assert parameter.data.std() == pytest.approx(other.std(), rel=0.06)
            assert abs(parameter.data).max() == pytest.approx(abs(other).max(), rel=0.3)


@pytest.mark.parametrize("shape", [(5, 5), (8, 3), (3, 8), (1, 1)])
def test_orthogonal(shape):
    weight = init.orthogonal_(np.zeros(shape), gain=2.0, seed=0)
    gram = weight @ weight.T if shape[0] < shape[1] else weight.T @ weight
    np.testing.assert_allclose(gram, 4 * np.eye(min(shape)), atol=1e-13)


def test_orthogonal_blocks_and_modules():
    weight = init.orthogonal_(np.zeros((12, 4)), blocks=3, seed=0)
    for block in np.split(weight, 3):
        np.testing.assert_allclose(block.T @ block, np.eye(4), atol=1e-13)
    assert not np.allclose(weight[:4], weight[4:8])
    model = Sequential(Linear(2, 2, dtype=np.float64, seed=0), Recurrent("gru"), Recurrent("lstm", proj_size=2))
    linear = model[0].weight.data.copy()
    assert init.orthogonal_(model, seed=1) is model
    np.testing.assert_array_equal(model[0].weight.data, linear)
    for block in np.split(model[1].weight_hh_l1.data, 3):
        np.testing.assert_allclose(block @ block.T, np.eye(4), atol=1e-13)
    for block in np.split(model[2].weight_hh_l0.data, 4):
        np.testing.assert_allclose(block.T @ block, np.eye(2), atol=1e-13)
    assert (model[1].weight_ih_l0.data == 9).all()


def test_identity_and_irnn():
    weight = init.identity_(Parameter(np.full((6, 3), 9.0)), 0.5, blocks=2).data
    np.testing.assert_array_equal(weight, 0.5 * np.vstack([np.eye(3)] * 2))
    rnn = Recurrent("rnn_relu")
    assert init.irnn_(rnn) is rnn
    for layer in range(2):
        np.testing.assert_array_equal(getattr(rnn, f"weight_hh_l{layer}").data, np.eye(4))
        for name in ("bias_ih", "bias_hh"):
            np.testing.assert_array_equal(getattr(rnn, f"{name}_l{layer}").data, 0)
    assert (rnn.weight_ih_l0.data == 9).all()
    init.irnn_(Recurrent("rnn_relu", bias=False))


def test_forget_bias():
    model = Sequential(Recurrent("lstm", proj_size=3), Recurrent("gru"))
    assert init.forget_bias_(model, 1.5) is model
    for layer in range(2):
        bias_ih, bias_hh = (getattr(model[0], f"{name}_l{layer}").data for name in ("bias_ih", "bias_hh"))
        np.testing.assert_array_equal(bias_ih, [9] * 4 + [1.5] * 4 + [9] * 8)
        np.testing.assert_array_equal(bias_hh, [9] * 4 + [0] * 4 + [9] * 8)
    assert (model[1].bias_ih_l0.data == 9).all()


def test_constant():
    assert (init.constant_(np.zeros((2, 2)), 3) == 3).all()
    assert np.isinf(init.constant_(np.zeros(2), math.inf)).all()
    assert init.uniform_(np.zeros((0, 3))).shape == (0, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: init.constant_(np.zeros(2), "x"), TypeError, "value: expected a number, got str"),
        (lambda: init.constant_(np.zeros(2), math.nan), ValueError, "value"),
        (lambda: init.uniform_([0.0]), TypeError, "target: expected an array, got builtins.list"),
        (lambda: init.uniform_(np.zeros(2, int)), TypeError, "target: expected dtype float32 or float64, got int64"),
        (lambda: init.uniform_(np.broadcast_to(0.0, 2)), ValueError, "target: expected a writable array"),
        (lambda: init.uniform_(np.zeros(2), 1.0, 0.0), ValueError, "high: expected a finite number, at least 1"),
        (lambda: init.normal_(np.zeros(2), std=-1), ValueError, "std"),
        (lambda: init.normal_(np.zeros(2), seed=1.5), TypeError, "seed: expected an integer, got float"),
        (lambda: init.xavier_uniform_(np.zeros(2)), ValueError, r"target: expected a weight \(rows, columns\)"),
        (lambda: init.kaiming_uniform_(np.zeros((2, 0))), ValueError, "target: expected a weight"),
        (lambda: init.orthogonal_(np.zeros((5, 2)), blocks=2), ValueError, "blocks: expected a divisor of the 5 rows"),
        (lambda: init.orthogonal_(np.zeros((4, 2)), blocks=0), ValueError, "blocks: expected at least 1"),
        (lambda: init.orthogonal_(Recurrent(), blocks=4), ValueError, "blocks: expected None with a module"),
        (lambda: init.orthogonal_(Linear(2, 2)), ValueError, "target: expected a recurrent module"),
        (lambda: init.identity_(np.zeros((2, 2)), math.inf), ValueError, "gain"),
        (lambda: init.irnn_(Linear(2, 2)), ValueError, "expected a recurrent module"),
        (lambda: init.irnn_(np.zeros(2)), TypeError, "module: expected a Module, got ndarray"),
        (lambda: init.forget_bias_(Recurrent("gru")), ValueError, "module: expected an LSTM with bias, got Recurrent"),
        (lambda: init.forget_bias_(Recurrent(bias=False)), ValueError, "module: expected an LSTM with bias"),
        (lambda: init.forget_bias_(Recurrent(), math.inf), ValueError, "value"),
        (lambda: init.recurrent_uniform_(np.zeros(2), 0), ValueError, "hidden_size"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("call", [init.irnn_, init.forget_bias_, init.orthogonal_, init.identity_])
def test_a_read_only_parameter_stops_all(call):
    module = Recurrent()
    for name in ("weight_hh_l1", "bias_hh_l1"):
        getattr(module, name).data.flags.writeable = False
    with pytest.raises(ValueError, match="l1'?: expected a writable array"):
        call(module)
    for parameter in module.parameters():
        assert (parameter.data == 9).all()
