"""Linear, Embedding, Dropout, Sequential: against PyTorch, finite differences and their contracts."""

import copy

import numpy as np
import pytest

import rnnfast
from rnnfast.base import Module, Parameter
from rnnfast.layers import MAX_LAYER, Dropout, Embedding, Linear, Sequential, sum_rows
from rnnfast.reference import dropout_mask

F64 = np.float64


def rng(seed=0):
    return np.random.default_rng(seed)


def numeric_gradient(function, array, step=1e-6):
    """d function / d array by central differences; the array is changed in place and restored."""
    gradient = np.empty_like(array)
    for i in np.ndindex(array.shape):
        kept = array[i]
        array[i] = kept + step
        above = function()
        array[i] = kept - step
        gradient[i] = (above - function()) / (2 * step)
        array[i] = kept
    return gradient


class Pairs(Module):
    """Like a recurrent layer: forward and backward return tuples."""

    def __init__(self):
        super().__init__()
        self.scale = Parameter(np.full(1, 2.0))

    def forward(self, x):
        self.x = x
        return x * self.scale.data, "state"

    def backward(self, grad_output):
        self.scale.add_grad(np.array([(grad_output * self.x).sum()]))
        return grad_output * self.scale.data, "grad_state"


# ---- Linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(), (5,), (3, 2), (2, 3, 2), (0,), (4, 0)])
def test_linear_matches_torch(leading, bias):
    torch = pytest.importorskip("torch")
    layer = Linear(7, 3, bias, dtype=F64, seed=1)
    x, g = rng().normal(size=(*leading, 7)), rng(1).normal(size=(*leading, 3))
    y = layer(x)
    grad_x = layer.backward(g)
    tx = torch.tensor(x, requires_grad=True)
    parameters = [torch.tensor(p.data, requires_grad=True) for p in layer.parameters()]
    ty = torch.nn.functional.linear(tx, *parameters)
    ty.backward(torch.tensor(g))
    np.testing.assert_allclose(y, ty.detach().numpy(), rtol=0, atol=1e-13)
    np.testing.assert_allclose(grad_x, tx.grad.numpy(), rtol=0, atol=1e-13)
    for p, tp in zip(layer.parameters(), parameters, strict=False):
        np.testing.assert_allclose(p.grad, tp.grad.numpy(), rtol=0, atol=1e-13)


def test_linear_finite_differences():
    layer = Linear(3, 2, dtype=F64, seed=1)
    x, g = rng().normal(size=(4, 3)), rng(1).normal(size=(4, 2))
    layer(x)
    grad_x = layer.backward(g)
    layer.eval()

    def loss():
        return float((layer(x) * g).sum())

    for got, array in ((grad_x, x), (layer.weight.grad, layer.weight.data), (layer.bias.grad, layer.bias.data)):
        np.testing.assert_allclose(got, numeric_gradient(loss, array), atol=1e-8)


def test_linear_strided_input_and_accumulation():
    layer = Linear(3, 2, seed=1)
    x = rng().normal(size=(4, 6, 3)).astype(np.float32)
    strided, g = x.transpose(1, 0, 2)[::2], np.ones((3, 4, 2), np.float32)
    y = layer(strided)
    np.testing.assert_array_equal(y, layer(np.ascontiguousarray(strided)))
    layer.backward(g, retain=True)
    once = layer.weight.grad.copy()
    layer.backward(g)
    np.testing.assert_allclose(layer.weight.grad, 2 * once, rtol=1e-6)
    layer.zero_grad()
    assert layer.weight.grad is None


def test_linear_bias_gradient_keeps_its_digits():
    layer = Linear(1, 1, seed=0)
    n = 2**24 + 2**20  # a running float32 sum of ones stops at 2**24
    layer(np.broadcast_to(np.float32(0), (n, 1)))
    layer.backward(np.broadcast_to(np.float32(1), (n, 1)))
    assert layer.bias.grad[0] == n


def test_linear_needs_no_grad_x():
    layer = Linear(3, 2, seed=1)
    layer(np.ones((1, 3), np.float32))
    assert layer.backward(np.ones((1, 2), np.float32), need_grad_x=False) is None
    assert layer.weight.grad is not None


def test_eval_saves_nothing_and_keeps_what_was_saved():
    layer = Linear(3, 2, seed=1)
    x, g = np.ones((1, 3), np.float32), np.ones((1, 2), np.float32)
    layer.eval()
    layer(x)
    with pytest.raises(RuntimeError, match="Linear.backward: expected a forward in training mode"):
        layer.backward(g)
    layer.train()
    layer(x)
    layer.eval()
    layer(np.ones((9, 3), np.float32))
    layer.backward(g)
    with pytest.raises(RuntimeError, match="retain=True"):
        layer.backward(g)


def test_linear_seed_and_repr():
    a, b = Linear(5, 4, seed=3), Linear(5, 4, dtype=F64, seed=3)
    np.testing.assert_array_equal(a.weight.data, b.weight.data.astype(np.float32))
    assert not np.array_equal(a.weight.data, Linear(5, 4).weight.data)
    assert abs(b.weight.data).max() <= 5**-0.5
    assert repr(a) == "Linear(5, 4, bias=True)"
    assert Linear(5, 4, bias=False).bias is None
    source = rng(3)
    np.testing.assert_array_equal(Linear(5, 4, seed=source).weight.data, a.weight.data)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"in_features": 0}, ValueError, "in_features: expected at least 1, got 0"),
        ({"in_features": 2.0}, TypeError, "in_features: expected an integer, got float"),
        ({"out_features": True}, TypeError, "out_features: expected an integer, got bool"),
        ({"out_features": np.array([2])}, TypeError, "out_features: expected an integer, got ndarray"),
        ({"out_features": 2**40}, ValueError, "out_features: expected at most 2147483647"),
        ({"in_features": 2**30, "out_features": 2**30}, ValueError, "fits the memory"),
        ({"bias": 1}, TypeError, "bias: expected a bool"),
        ({"device": "tpu"}, ValueError, "device: expected None, 'cpu' or 'cuda', got 'tpu'"),
        ({"device": "cuda:0"}, RuntimeError, "device: 'cuda:0' is not available"),
        ({"dtype": "float16"}, TypeError, "dtype: expected float32 or float64, got float16"),
        ({"dtype": "nonsense"}, TypeError, "dtype: expected float32 or float64"),
        ({"seed": -1}, ValueError, "seed: expected at least 0"),
        ({"seed": 2**64}, ValueError, "seed: expected below"),
        ({"seed": "x"}, TypeError, "seed: expected an integer"),
    ],
)
def test_linear_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        Linear(**{"in_features": 3, "out_features": 2, **arguments})


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.ones((2, 3)), TypeError, "x: expected dtype float32, that of weight, got float64"),
        (np.ones((2, 4), np.float32), ValueError, r"x: expected shape \(\.\.\., 3\), got \(2, 4\)"),
        (np.float32(1), TypeError, "x: expected a numpy array, got numpy.float32"),
        (np.array(1, np.float32), ValueError, r"x: expected shape \(\.\.\., 3\), got \(\)"),
        ([[1.0, 2.0, 3.0]], TypeError, "x: expected a numpy array, got builtins.list"),
        (None, TypeError, "x: expected a numpy array, got builtins.NoneType"),
    ],
)
def test_linear_bad_input(x, error, message):
    layer = Linear(3, 2, seed=0)
    layer(np.ones((1, 3), np.float32))
    with pytest.raises(error, match=message):
        layer(x)
    with pytest.raises(error, match=message.replace("x:", "grad_output:").split(" shape")[0].split(", got")[0]):
        layer.backward(x)
    assert layer.weight.grad is None
    layer.backward(np.ones((1, 2), np.float32))  # the failures left what the forward saved


def test_failed_backward_changes_nothing():
    layer = Linear(3, 2, seed=0)
    layer(np.ones((1, 3), np.float32))
    layer.bias.grad = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match="bias.grad: expected shape"):
        layer.backward(np.ones((1, 2), np.float32))
    assert layer.weight.grad is None
    layer.weight.data = np.zeros((3, 3), np.float32)
    with pytest.raises(ValueError, match="weight: expected shape"):
        layer(np.ones((1, 3), np.float32))
    layer = Linear(3, 2, seed=0)
    layer.bias.data = np.zeros(2)
    with pytest.raises(TypeError, match="bias: expected dtype float32, that of weight, got float64"):
        layer(np.ones((1, 3), np.float32))


# ---- Embedding


@pytest.mark.parametrize("padding_idx", [None, 2, -1])
@pytest.mark.parametrize("shape", [(), (1,), (50,), (9, 4), (0,), (3, 0)])
def test_embedding_matches_torch(shape, padding_idx):
    torch = pytest.importorskip("torch")
    layer = Embedding(6, 5, padding_idx, dtype=F64, seed=2)
    indices, g = rng().integers(0, 6, shape), rng(1).normal(size=(*shape, 5))
    if not shape:
        indices = np.array(indices)
    y = layer(indices)
    assert layer.backward(g) is None
    other = torch.nn.Embedding(6, 5, padding_idx=padding_idx, dtype=torch.float64)
    other.load_state_dict({"weight": torch.tensor(layer.weight.data)})
    ty = other(torch.tensor(indices))
    ty.backward(torch.tensor(g))
    np.testing.assert_array_equal(y, ty.detach().numpy())
    np.testing.assert_allclose(layer.weight.grad, other.weight.grad.numpy(), rtol=0, atol=1e-13)
    if padding_idx is not None:
        assert (layer.weight.data[padding_idx] == 0).all()


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint64", "int64", ">i4"])
def test_embedding_takes_any_integer(dtype):
    layer = Embedding(4, 2, seed=0)
    indices = np.array([3, 0, 3]).astype(dtype)
    np.testing.assert_array_equal(layer(indices), layer.weight.data[[3, 0, 3]])
    indices[...] = 1  # the caller's buffer may be filled again before backward
    layer.backward(np.ones((3, 2), np.float32))
    np.testing.assert_array_equal(layer.weight.grad[:, 0], [1, 0, 0, 2])


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 31, 257])
@pytest.mark.parametrize("distinct", [1, 2, 5, 1000])
def test_sum_rows(rows, distinct):
    indices, values = rng(rows).integers(0, distinct, rows), rng(distinct).normal(size=(rows, 3))
    kept = values.copy()
    got_indices, got = sum_rows(np, indices, values)
    expected = np.zeros((distinct, 3))
    np.add.at(expected, indices, values)
    np.testing.assert_array_equal(got_indices, np.unique(indices))
    np.testing.assert_allclose(got, expected[got_indices], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(values, kept)


def test_embedding_gradient_is_accurate_and_nan_stays_in_its_row():
    layer = Embedding(2, 1, seed=0)
    layer(np.zeros(2**18, np.int64))
    layer.backward(np.full((2**18, 1), 0.1, np.float32))
    assert abs(layer.weight.grad[0, 0] / (2**18 * np.float64(np.float32(0.1))) - 1) < 2e-7
    layer.zero_grad()
    layer(np.array([0, 1, 0]))
    layer.backward(np.array([[np.nan], [1], [1]], np.float32))
    np.testing.assert_array_equal(layer.weight.grad, [[np.nan], [1]])


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        (np.array([4]), ValueError, r"indices: expected values in \[0, 4\), got 4"),
        (np.array([0, -1]), ValueError, r"indices: expected values in \[0, 4\), got -1"),
        (np.array([2**64 - 1], np.uint64), ValueError, r"indices: expected values in \[0, 4\)"),
        (np.array([1.0]), TypeError, "indices: expected an integer dtype, got float64"),
        (np.array([True]), TypeError, "indices: expected an integer dtype, got bool"),
        ([1], TypeError, "indices: expected a numpy array, got builtins.list"),
    ],
)
def test_embedding_bad_indices(indices, error, message):
    layer = Embedding(4, 2, seed=0)
    with pytest.raises(error, match=message):
        layer(indices)
    with pytest.raises(RuntimeError):
        layer.backward(np.zeros((1, 2), np.float32))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 2), ValueError, "num_embeddings"),
        ((2, 0), ValueError, "embedding_dim"),
        ((2**31 - 1, 2**31 - 1), ValueError, "num_embeddings, embedding_dim: expected a weight that fits"),
        ((2, 2, 2), ValueError, "padding_idx: expected below num_embeddings = 2, got 2"),
        ((2, 2, -3), ValueError, "padding_idx: expected at least -2"),
        ((2, 2, 0.5), TypeError, "padding_idx"),
    ],
)
def test_embedding_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        Embedding(*arguments)
    assert repr(Embedding(3, 2, -1)) == "Embedding(3, 2, padding_idx=2)"


def test_embedding_bad_grad_output():
    layer = Embedding(4, 2, seed=0)
    layer(np.array([1, 2]))
    with pytest.raises(ValueError, match=r"grad_output: expected shape \(2, 2\), got \(2, 3\)"):
        layer.backward(np.zeros((2, 3), np.float32))
    with pytest.raises(TypeError, match="grad_output: expected dtype float32, that of weight, got float64"):
        layer.backward(np.zeros((2, 2)))
    assert layer.weight.grad is None


# ---- Dropout


@pytest.mark.parametrize("shape", [(), (9,), (5, 3), (3, 5, 6), (2, 3, 4, 5), (0, 3), (3, 2, 0)])
def test_dropout_selects_and_scales(shape):
    layer = Dropout(0.25, seed=5)
    x = rng().normal(size=shape) + 10.0
    x = np.asarray(x)
    y = layer(x)
    kept = y != 0
    np.testing.assert_allclose(y, np.where(kept, x / 0.75, 0.0), rtol=1e-15)
    g = np.ones(shape)
    np.testing.assert_allclose(layer.backward(g), np.where(kept, 1 / 0.75, 0.0), rtol=1e-15)
    assert layer.call_count == 1


def test_dropout_mask_is_the_reference_one():
    layer = Dropout(0.5, seed=2**40 + 3)
    layer.call_count = 7
    x = np.ones((4, 3, 6), np.float32)
    y = layer(x)
    mask = dropout_mask(2**40 + 3, 7, MAX_LAYER, np.arange(4)[:, None], np.arange(3)[None, :], 6, 0.5)
    np.testing.assert_array_equal(y != 0, mask)
    assert y.dtype == np.float32
    assert not np.array_equal(layer(x) != 0, mask)  # the next call draws another
    layer.call_count = 7
    np.testing.assert_array_equal(layer(x[:2, :2]) != 0, mask[:2, :2])  # a value's mask does not depend on the others


def test_dropout_rate():
    y = Dropout(0.3, seed=1)(np.ones((100, 10, 100)))
    assert abs((y == 0).mean() - 0.3) < 0.005


def test_dropout_extremes():
    x = np.array([[1.0, np.nan, np.inf]])
    everything = Dropout(1.0, seed=0)
    np.testing.assert_array_equal(everything(x), np.zeros((1, 3)))
    np.testing.assert_array_equal(everything.backward(x), np.zeros((1, 3)))
    nothing = Dropout(0.0, seed=0)
    np.testing.assert_array_equal(nothing(x), x)
    np.testing.assert_array_equal(nothing.backward(x), x)


def test_dropout_eval_is_the_identity():
    layer = Dropout(0.5, seed=0).eval()
    x = np.ones(3)
    assert layer(x) is x
    assert layer.call_count == 0
    with pytest.raises(RuntimeError, match="Dropout.backward"):
        layer.backward(x)


def test_dropout_refuses():
    for p, error in ((-0.1, ValueError), (1.1, ValueError), (np.nan, ValueError), ("a", TypeError), (True, TypeError)):
        with pytest.raises(error, match="p: expected"):
            Dropout(p)
    with pytest.raises(ValueError, match="seed"):
        Dropout(0.5, seed=-1)
    layer = Dropout(0.5, seed=0)
    with pytest.raises(TypeError, match="x: expected dtype float32 or float64, got int64"):
        layer(np.ones(3, np.int64))
    with pytest.raises(ValueError, match="x: expected at most 4194304 values"):
        layer(np.broadcast_to(1.0, 2**22 + 1))
    assert layer.call_count == 0
    layer(np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"grad_output: expected shape \(2, 3\), got \(3,\)"):
        layer.backward(np.ones(3))
    with pytest.raises(TypeError, match="grad_output: expected dtype float64, got float32"):
        layer.backward(np.ones((2, 3), np.float32))


def test_a_weight_of_another_kind_is_named():
    linear, table = Linear(2, 3), Embedding(2, 3)
    linear.weight.data = linear.weight.data.astype(F64)
    with pytest.raises(TypeError, match="x: expected dtype float64, that of weight, got float32"):
        linear(np.zeros((4, 2), np.float32))
    table.weight.data = table.weight.data.tolist()
    with pytest.raises(TypeError, match="^weight: expected an array, got builtins.list"):
        table(np.array([0]))


# ---- Sequential


def test_sequential_chain_finite_differences():
    model = Sequential(Linear(3, 4, dtype=F64, seed=0), Pairs(), Dropout(0.4, seed=3), Linear(4, 2, dtype=F64, seed=1))
    x, g = rng().normal(size=(5, 3)), rng(1).normal(size=(5, 2))
    model(x)
    grad_x = model.backward(g)

    def loss():
        model[2].call_count = 0
        return float((model(x) * g).sum())

    np.testing.assert_allclose(grad_x, numeric_gradient(loss, x), atol=1e-8)
    for parameter in model.parameters():
        np.testing.assert_allclose(parameter.grad, numeric_gradient(loss, parameter.data), atol=1e-8)


def test_sequential_names_and_access():
    model = Sequential(Embedding(5, 4, seed=0), Linear(4, 5, seed=1))
    assert list(model.state_dict()) == ["0.weight", "1.weight", "1.bias"]
    assert len(model) == 2
    assert isinstance(model[-1], Linear)
    assert [type(m).__name__ for m in model] == ["Embedding", "Linear"]
    assert repr(model) == "Sequential(Embedding(5, 4, padding_idx=None), Linear(4, 5, bias=True))"
    indices = np.array([[1, 2]])
    y = model(indices)
    assert model.backward(np.ones_like(y)) is None
    assert model[0].weight.grad.shape == (5, 4)


def test_sequential_options_reach_the_layers():
    model = Sequential(Linear(3, 4, seed=0), Linear(4, 2, seed=1))
    y = model(np.ones((1, 3), np.float32))
    assert model.backward(y, retain=True, need_grad_x=False) is None
    first = model[0].weight.grad.copy()
    assert model.backward(y).shape == (1, 3)
    np.testing.assert_allclose(model[0].weight.grad, 2 * first, rtol=1e-6)
    with pytest.raises(RuntimeError):
        model.backward(y)


def test_empty_sequential_is_the_identity():
    x = np.ones(3)
    assert Sequential()(x) is x
    assert Sequential().backward(x) is x


def test_sequential_failure_leaves_all_gradients():
    model = Sequential(Linear(3, 4, seed=0), Linear(4, 2, seed=1))
    x, g = np.ones((1, 3), np.float32), np.ones((1, 2), np.float32)
    model(x)
    model.backward(g)
    grads = [(p.grad, p.grad.copy()) for p in model.parameters()]
    model[0].eval()  # saves nothing in the next forward
    model(x)
    with pytest.raises(RuntimeError, match="Linear.backward"):
        model.backward(g)
    for p, (grad, value) in zip(model.parameters(), grads, strict=False):
        assert p.grad is grad
        np.testing.assert_array_equal(grad, value)
    model.train()
    model(x)
    model.backward(g)
    for p, (grad, value) in zip(model.parameters(), grads, strict=False):
        assert p.grad is grad
        np.testing.assert_allclose(grad, 2 * value, rtol=1e-6)


def test_sequential_refuses():
    with pytest.raises(TypeError, match=r"modules\[1\]: expected a Module, got function"):
        Sequential(Dropout(), lambda x: x)
    with pytest.raises(TypeError, match=r"modules\[0\]: expected a layer, got GRUCell, for single steps"):
        Sequential(rnnfast.GRUCell(2, 2))
    layer = Linear(2, 2)
    with pytest.raises(ValueError, match="modules: expected each module once"):
        Sequential(layer, layer)


# ---- tied parameters


def test_tied_embedding_and_head():
    torch = pytest.importorskip("torch")
    model = Sequential(Embedding(6, 4, dtype=F64, seed=0), Linear(4, 6, bias=False, dtype=F64, seed=1))
    model[1].weight = model[0].weight
    assert [name for name, _ in model.named_parameters()] == ["0.weight"]
    assert list(model.state_dict()) == ["0.weight", "1.weight"]
    assert model[0].weight.name == "weight"
    indices, g = rng().integers(0, 6, (3, 5)), rng(1).normal(size=(3, 5, 6))
    model(indices)
    model.backward(g)
    weight = torch.tensor(model[0].weight.data, requires_grad=True)
    (torch.nn.functional.embedding(torch.tensor(indices), weight) @ weight.T).backward(torch.tensor(g))
    np.testing.assert_allclose(model[0].weight.grad, weight.grad.numpy(), atol=1e-12)
    state = model.state_dict()
    state["1.weight"] = state["1.weight"] + 1
    with pytest.raises(ValueError, match="which it is tied to"):
        model.load_state_dict(state)
    twin = copy.deepcopy(model)
    assert twin[0].weight is twin[1].weight


def test_new_weights_drop_a_forward():
    layer = Linear(3, 4)
    y = layer(np.ones((2, 3), np.float32))
    layer.load_state_dict(layer.state_dict())
    with pytest.raises(RuntimeError, match="expected a forward in training mode"):
        layer.backward(y)


# ---- explain


def test_explain_goes_through_a_chain():
    model = Sequential(
        Embedding(5, 4, seed=0), Sequential(rnnfast.LSTM(4, 6, seed=0), Dropout(0.5)), rnnfast.GRU(6, 3, seed=0)
    )
    indices = rng().integers(0, 5, (7, 2))
    model(indices)
    waiting, calls = model[2].last_pass("here"), model[1][1].call_count
    lines = rnnfast.explain(model, indices).splitlines()
    assert [line.split(": rnnfast's kernel for float32 on the CPU")[0] for line in lines] == ["1.0: LSTM", "2: GRU"]
    assert (model[2].last_pass("here"), model[1][1].call_count) == (waiting, calls)
    with pytest.raises(TypeError, match="lengths: expected None"):
        rnnfast.explain(model, indices, lengths=[7, 3])
    with pytest.raises(TypeError, match="got a Sequential without any"):
        rnnfast.explain(Sequential(Linear(2, 2)), np.ones((1, 2), np.float32))
