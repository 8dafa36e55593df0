"""RNNCell, LSTMCell, GRUCell: one step equals a layer's, unrolled by hand forwards and backwards."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

from rnnfast.cells import GRUCell, LSTMCell, RNNCell
from rnnfast.modules import GRU, LSTM, RNN

T, B, IN, H = 5, 3, 4, 6
CELLS = {
    "rnn_tanh": (RNNCell, RNN, {}),
    "rnn_relu": (RNNCell, RNN, {"nonlinearity": "relu"}),
    "lstm": (LSTMCell, LSTM, {}),
    "gru": (GRUCell, GRU, {}),
}


@pytest.fixture(params=CELLS)
def kinds(request):
    return CELLS[request.param]


def pairs(state):
    return state if isinstance(state, tuple) else (state,)


def structure(like, elements):
    """`elements` as a pair where `like` is one."""
    return tuple(elements) if isinstance(like, tuple) else elements[0]


def twins(kinds, **options):
    """A cell, and a layer with the same weights."""
    cell_kind, layer_kind, extra = kinds
    cell = cell_kind(IN, H, dtype="float64", seed=0, **extra, **options)
    layer = layer_kind(IN, H, dtype="float64", seed=1, **extra, **options)
    layer.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()})
    return cell, layer


def close(a, b, tolerance=1e-12):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1.0, np.abs(b).max(initial=0)))


@pytest.mark.parametrize("bias", [True, False])
def test_unrolled_by_hand_it_is_the_layer(kinds, bias):
    cell, layer = twins(kinds, bias=bias)
    rng = np.random.default_rng(0)
    x, grads = rng.standard_normal((T, B, IN)), rng.standard_normal((T, B, H))
    state, contexts, outputs = None, [], []
    for t in range(T):
        state, context = cell(x[t], state)
        contexts.append(context)
        outputs.append(pairs(state)[0])
    output, last = layer(x)
    close(np.stack(outputs), output)
    for a, b in zip(pairs(state), pairs(last), strict=True):
        close(a, b[0])

    want_x, want_h0 = layer.backward(grads)
    grad_x = np.empty_like(x)
    flow = tuple(np.zeros_like(s) for s in pairs(state))
    for t in reversed(range(T)):
        incoming = structure(state, [flow[0] + grads[t], *flow[1:]])
        grad_x[t], back = cell.backward(contexts[t], incoming)
        flow = pairs(back)
    close(grad_x, want_x)
    for a, b in zip(flow, pairs(want_h0), strict=True):
        close(a, b[0])
    theirs = dict(layer.named_parameters())
    for name, parameter in cell.named_parameters():
        close(parameter.grad, theirs[f"{name}_l0"].grad)


def test_same_numbers_as_torch(kinds):
    torch = pytest.importorskip("torch")
    cell, _ = twins(kinds)
    twin = cell.to_torch()
    assert [n for n, _ in cell.named_parameters()] == [n for n, _ in twin.named_parameters()]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((B, IN))
    state, _ = cell(x)
    hx = structure(state, [rng.standard_normal((B, H)) for _ in pairs(state)])
    state, context = cell(x, hx)
    x_t = torch.tensor(x, requires_grad=True)
    hx_t = [torch.tensor(h, requires_grad=True) for h in pairs(hx)]
    state_t = pairs(twin(x_t, structure(state, hx_t)))
    grads = [rng.standard_normal((B, H)) for _ in state_t]
    torch.autograd.backward(state_t, [torch.tensor(g) for g in grads])
    grad_x, grad_hx = cell.backward(context, structure(state, grads))
    for a, b in zip(pairs(state), state_t, strict=True):
        close(a, b.detach().numpy())
    close(grad_x, x_t.grad.numpy())
    for a, b in zip(pairs(grad_hx), hx_t, strict=True):
        close(a, b.grad.numpy())
    for parameter, theirs in zip(cell.parameters(), twin.parameters(), strict=True):
        close(parameter.grad, theirs.grad.numpy())


def test_unbatched(kinds):
    cell, _ = twins(kinds)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, IN))
    state, _ = cell(x)
    state, context = cell(x, state)
    grad_x, grad_hx = cell.backward(context, state)
    grads = [p.grad for p in cell.parameters()]
    cell.zero_grad()
    one, _ = cell(x[0])
    one, context = cell(x[0], one)
    for a, b in zip(pairs(one), pairs(state), strict=True):
        assert a.shape == (H,)
        close(a, b[0])
    got_x, got_hx = cell.backward(context, one)
    close(got_x, grad_x[0])
    for a, b in zip(pairs(got_hx), pairs(grad_hx), strict=True):
        close(a, b[0])
    for parameter, want in zip(cell.parameters(), grads, strict=True):
        close(parameter.grad, want)
    with pytest.raises(ValueError, match="hx"):
        cell(x[0], structure(state, [np.zeros((1, H)) for _ in pairs(state)]))


def test_contexts_are_independent():
    cell = GRUCell(IN, H, dtype="float64", seed=0)
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, B, IN))
    h, first = cell(x)
    _, second = cell(y)
    want, _ = cell.backward(first, h, retain=True)
    cell.backward(second, h)
    got, _ = cell.backward(first, h)
    np.testing.assert_array_equal(got, want)
    with pytest.raises(RuntimeError):
        cell.backward(first, h)


def test_eval_saves_nothing_and_seals(kinds):
    cell, _ = twins(kinds)
    x = np.random.default_rng(0).standard_normal((B, IN))
    want, _ = cell(x)
    cell.eval()
    got, context = cell(x)
    assert context is None
    for a, b in zip(pairs(got), pairs(want), strict=True):
        close(a, b)
    assert not cell.weight_ih.data.flags.writeable
    with pytest.raises(TypeError, match="context: expected one of a step in training mode, got NoneType"):
        cell.backward(context, got)


def test_either_gradient_of_the_pair_may_be_missing():
    cell = LSTMCell(IN, H, dtype="float64", seed=0)
    rng = np.random.default_rng(0)
    x, grad = rng.standard_normal((B, IN)), rng.standard_normal((B, H))
    parts = []
    for pair in ((grad, None), (None, grad), (grad, grad)):
        _, context = cell(x)
        parts.append(cell.backward(context, pair)[0])
    close(parts[0] + parts[1], parts[2])


def test_refused_calls_change_nothing():
    cell = LSTMCell(IN, H, seed=0)
    x, h = np.zeros((B, IN), np.float32), np.zeros((B, H), np.float32)
    for bad, error, name in [
        ((x[:, :2],), ValueError, "x"),
        ((x.astype(np.float64),), TypeError, "x"),
        ((x[None],), ValueError, "x"),
        ((x.tolist(),), TypeError, "x"),
        ((x, h), (ValueError, TypeError), "hx"),
        ((x, (h, h[:1])), ValueError, "c0"),
        ((x, (h, h.astype(np.float64))), TypeError, "c0"),
        ((x, (h[None], h[None])), ValueError, "hx"),
    ]:
        with pytest.raises(error, match=name):
            cell(*bad)
    state, context = cell(x)
    for bad in ((h[:1], h), (h, h.astype(np.float64)), (h[None], None)):
        with pytest.raises((ValueError, TypeError), match="grad_state"):
            cell.backward(context, bad)
    assert all(p.grad is None for p in cell.parameters())
    assert cell.backward(context, state, need_grad_x=False)[0] is None


def test_copies_config_repr(kinds):
    cell_kind, _, extra = kinds
    cell = cell_kind(IN, H, bias=False, dtype="float64", seed=3, **extra)
    for twin in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell)), cell_kind(**cell.config())):
        for p, q in zip(cell.parameters(), twin.parameters(), strict=True):
            np.testing.assert_array_equal(p.data, q.data)
    shown = ", nonlinearity=relu" if extra else ""
    assert repr(cell) == f"{cell_kind.__name__}({IN}, {H}, bias=False{shown}, dtype=float64)"


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [("input_size", 0, ValueError), ("hidden_size", 1.0, TypeError), ("bias", 1, TypeError), ("dtype", int, TypeError)],
)
def test_bad_arguments_are_named(name, value, error):
    with pytest.raises(error, match=name):
        GRUCell(**{"input_size": IN, "hidden_size": H, name: value})


def test_a_context_that_is_used_up_is_told_in_words():
    cell = GRUCell(2, 3)
    state, context = cell(np.zeros((1, 2), np.float32))
    cell.backward(context, state)
    with pytest.raises(RuntimeError, match="context: expected one that no backward has used") as told:
        cell.backward(context, state)
    assert "reserve" not in str(told.value)


@pytest.mark.parametrize("nothing", [None, (None, None)])
def test_backward_of_nothing(nothing):
    cell = LSTMCell(2, 3)
    _, context = cell(np.zeros((1, 2), np.float32))
    with pytest.raises(ValueError, match="grad_state: expected a gradient of the state, got None"):
        cell.backward(context, nothing)
