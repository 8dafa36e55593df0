"""RNN, LSTM, GRU as modules: against the reference and PyTorch, and the contract of modes, contexts and errors."""

from __future__ import annotations

import copy
import pickle
import threading

import numpy as np
import pytest

from rnnfast import functional, reference
from rnnfast.base import Module, Parameter
from rnnfast.cells import GRUCell
from rnnfast.modules import GRU, LSTM, RNN, RecurrentLayer

LAYERS = {
    "rnn_tanh": lambda *a, **k: RNN(*a, **k),
    "rnn_relu": lambda *a, **k: RNN(*a, nonlinearity="relu", **k),
    "lstm": lambda *a, **k: LSTM(*a, **k),
    "lstm_proj": lambda *a, **k: LSTM(*a, proj_size=3, **k),
    "gru": lambda *a, **k: GRU(*a, **k),
}
T, B, IN, H = 6, 3, 4, 5


@pytest.fixture(params=LAYERS)
def make(request):
    """A constructor of one of the layers."""
    return LAYERS[request.param]


def pairs(state):
    return state if isinstance(state, tuple) else (state,)


def widths(layer):
    """The sizes of the elements of a state."""
    sizes = (layer.proj_size or layer.hidden_size, layer.hidden_size)
    return sizes if functional.CELLS[layer.cell].has_cell_state else sizes[:1]


def random_state(layer, batch, rng, scale=0.5):
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    state = tuple(scale * rng.standard_normal((rows, batch, n)).astype(layer.dtype) for n in widths(layer))
    return state if len(state) > 1 else state[0]


def random_x(layer, rng, seq_len=T, batch=B):
    shape = (batch, seq_len) if layer.batch_first else (seq_len, batch)
    return rng.standard_normal((*shape, layer.input_size)).astype(layer.dtype)


def weights_of(layer):
    return [p.data for p in layer.parameters()]


def assert_close(got, expected, tolerance=1e-11):
    got, expected = pairs(got), pairs(expected)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert np.max(np.abs(a - b), initial=0.0) <= tolerance * max(1.0, np.max(np.abs(b), initial=0.0))


OPTIONS = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 2, "batch_first": True, "bias": False},
    {"num_layers": 3, "bidirectional": True, "dropout": 0.4, "batch_first": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
def test_call_and_backward_equal_the_reference(make, options, ragged):
    layer = make(IN, H, dtype="float64", seed=3, **options)
    rng = np.random.default_rng(0)
    x, hx = random_x(layer, rng), random_state(layer, B, rng)
    extra = {}
    if ragged:
        reset = rng.random((T, B)) < 0.3
        extra = {
            "lengths": np.array([T, 0, 4]),
            "reset": reset.T if layer.batch_first else reset,
            "reset_state": random_state(layer, 1, rng),
        }
    output, state, states = layer(x, hx, return_states=True, **extra)
    settings = {
        "num_layers": layer.num_layers,
        "bidirectional": layer.bidirectional,
        "batch_first": layer.batch_first,
        "dropout": layer.dropout,
    }
    expected = reference.forward(
        layer.cell, x, hx, weights_of(layer), return_states=True, seed=layer.seed, call=0, **settings, **extra
    )
    context = expected[-1]
    for got, want in zip((output, state, states), expected[:3], strict=True):
        assert_close(got, want)

    grad_output = rng.standard_normal(output.shape)
    grad_state, grad_states = random_state(layer, B, rng), None
    grad_states = tuple(rng.standard_normal(s.shape) for s in pairs(states))
    grad_states = grad_states if len(grad_states) > 1 else grad_states[0]
    grad_x, grad_hx = layer.backward(grad_output, grad_state, grad_states=grad_states)
    want_x, want_hx, want_weights = reference.backward(context, grad_output, grad_state, grad_states=grad_states)
    assert_close(grad_x, want_x, 1e-10)
    assert_close(grad_hx, want_hx, 1e-10)
    for parameter, want in zip(layer.parameters(), want_weights, strict=True):
        assert_close(parameter.grad, want, 1e-10)
    if ragged:
        assert_close(layer.grad_reset_state, context.grad_reset_state, 1e-10)


TORCH_OPTIONS = [
    {},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"bias": False, "bidirectional": True},
]


@pytest.mark.parametrize("options", TORCH_OPTIONS, ids=str)
def test_same_numbers_as_torch(make, options):
    torch = pytest.importorskip("torch")
    layer = make(IN, H, dtype="float64", seed=1, **options)
    twin = layer.to_torch()
    rng = np.random.default_rng(1)
    x, hx = random_x(layer, rng), random_state(layer, B, rng)
    x_t = torch.tensor(x, requires_grad=True)
    hx_t = tuple(torch.tensor(s, requires_grad=True) for s in pairs(hx))
    output, state = layer(x, hx)
    output_t, state_t = twin(x_t, hx_t if isinstance(hx, tuple) else hx_t[0])
    assert_close(output, output_t.detach().numpy())
    assert_close(state, tuple(s.detach().numpy() for s in pairs(state_t)))
    grads = [rng.standard_normal(a.shape) for a in (output, *pairs(state))]
    torch.autograd.backward([output_t, *pairs(state_t)], [torch.tensor(g) for g in grads])
    grad_x, grad_hx = layer.backward(grads[0], tuple(grads[1:]) if isinstance(hx, tuple) else grads[1])
    assert_close(grad_x, x_t.grad.numpy())
    assert_close(grad_hx, tuple(s.grad.numpy() for s in hx_t))
    theirs = dict(twin.named_parameters())
    for name, parameter in layer.named_parameters():
        assert_close(parameter.grad, theirs[name].grad.numpy())


def test_parameters_are_torch_s(make):
    torch = pytest.importorskip("torch")
    layer = make(IN, H, num_layers=2, bidirectional=True)
    kind = getattr(torch.nn, type(layer).__name__)
    options = {"proj_size": layer.proj_size} if layer.proj_size else {}
    twin = kind(IN, H, num_layers=2, bidirectional=True, **options)
    ours = [(name, p.shape) for name, p in layer.named_parameters()]
    assert ours == [(name, tuple(p.shape)) for name, p in twin.named_parameters()]


def test_names_and_order_of_parameters():
    layer = LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2)
    each = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    suffixes = ("_l0", "_l0_reverse", "_l1", "_l1_reverse")
    assert [p.name for p in layer.parameters()] == [name + suffix for suffix in suffixes for name in each]
    assert [p.shape for p in layer.parameters()][:5] == [(16, 3), (16, 2), (16,), (16,), (2, 4)]
    assert layer.weight_ih_l1.shape == (16, 4)
    assert [p.name for p in GRU(3, 4, bias=False).parameters()] == ["weight_ih_l0", "weight_hh_l0"]


def test_unbatched(make):
    layer = make(IN, H, num_layers=2, bidirectional=True, batch_first=True, dtype="float64", seed=0)
    rng = np.random.default_rng(2)
    x, hx = random_x(layer, rng, batch=1), random_state(layer, 1, rng)
    reset = rng.random((1, T)) < 0.4
    replacement = random_state(layer, 1, rng)
    squeeze = lambda state: tuple(s[:, 0] for s in state) if isinstance(state, tuple) else state[:, 0]  # noqa: E731
    batched = layer(x, hx, [5], reset, replacement, return_states=True)
    grads = layer.backward(np.ones_like(batched[0]), batched[1])
    grad_reset = layer.grad_reset_state
    weight_grads = [p.grad for p in layer.parameters()]
    layer.zero_grad()

    output, state, states = layer(x[0], squeeze(hx), 5, list(reset[0]), squeeze(replacement), return_states=True)
    assert_close(output, batched[0][0])
    assert_close(state, squeeze(batched[1]))
    assert_close(states, tuple(s[:, :, 0] for s in pairs(batched[2])))
    grad_x, grad_hx = layer.backward(np.ones_like(output), state)
    assert_close(grad_x, grads[0][0])
    assert_close(grad_hx, squeeze(grads[1]))
    assert_close(layer.grad_reset_state, squeeze(grad_reset))
    for parameter, want in zip(layer.parameters(), weight_grads, strict=True):
        assert_close(parameter.grad, want)


def test_unbatched_wants_unbatched_states():
    layer = GRU(IN, H, seed=0)
    x = np.zeros((T, IN), np.float32)
    with pytest.raises(ValueError, match="hx: expected 2 dimensions"):
        layer(x, np.zeros((1, 1, H), np.float32))
    with pytest.raises(ValueError, match="reset: expected 1 dimensions"):
        layer(x, reset=np.zeros((T, 1), bool))
    layer(x)
    with pytest.raises(ValueError, match="grad_output"):
        layer.backward(np.zeros((T, 1, H), np.float32))
    with pytest.raises(ValueError, match="grad_state"):
        layer.backward(None, np.zeros((1, 1, H), np.float32))


def test_gradients_accumulate_and_zero_grad_drops_them(make):
    layer = make(IN, H, dtype="float64", seed=0)
    x = random_x(layer, np.random.default_rng(0))
    assert all(p.grad is None for p in layer.parameters())
    output, _ = layer(x)
    grad = np.ones_like(output)
    layer.backward(grad, retain=True)
    once = [p.grad.copy() for p in layer.parameters()]
    layer.backward(grad)
    for parameter, want in zip(layer.parameters(), once, strict=True):
        assert_close(parameter.grad, 2 * want)
    layer.zero_grad()
    assert all(p.grad is None for p in layer.parameters())


def test_order_of_calls():
    layer = LSTM(IN, H, seed=0)
    x = random_x(layer, np.random.default_rng(0))
    with pytest.raises(RuntimeError, match="backward: expected a forward in training mode"):
        layer.backward()
    output, _ = layer(x)
    layer.backward(output)
    with pytest.raises(RuntimeError, match="retain"):
        layer.backward()
    layer.eval()
    layer(x)
    with pytest.raises(RuntimeError, match="training mode"):
        layer.backward()


def test_backward_belongs_to_the_last_forward_in_training_mode():
    layer = GRU(IN, H, seed=0, dtype="float64")
    rng = np.random.default_rng(0)
    x, other = random_x(layer, rng), random_x(layer, rng)
    output, _ = layer(x)
    want, _ = layer.backward(output, retain=True)
    layer.eval()
    layer(other)
    layer.train()
    layer.infer(other)
    with pytest.raises(ValueError, match="x"):
        layer(other[:, :, :2])
    got, _ = layer.backward(output)
    assert_close(got, want, 0.0)


def test_infer_is_eval_in_any_mode():
    layer = LSTM(IN, H, num_layers=2, dropout=0.5, seed=0)
    x = random_x(layer, np.random.default_rng(0))
    output, (hn, cn) = layer.infer(x)
    assert layer.call_count == 0
    assert not np.array_equal(output, layer(x)[0])
    layer.eval()
    for got, want in zip((output, hn, cn), (layer(x)[0], *layer(x)[1]), strict=True):
        np.testing.assert_array_equal(got, want)


def test_need_grad_x():
    layer = LSTM(IN, H, seed=0)
    output, _ = layer(random_x(layer, np.random.default_rng(0)))
    grad_x, (grad_h, grad_c) = layer.backward(output, need_grad_x=False)
    assert grad_x is None
    assert grad_h.shape == grad_c.shape == (1, B, H)
    x = random_x(layer, np.random.default_rng(0))[:, 0]  # unbatched
    output, _ = layer(x)
    grad_x, grad_state = layer.backward(output, need_grad_state=False)
    assert grad_x.shape == x.shape
    assert grad_state is None


def failures(layer):
    """Calls of backward that must be refused."""
    good = np.zeros((T, B, H), np.float32)
    state = np.zeros((1, B, H), np.float32)
    return [
        ("grad_output", lambda: layer.backward(good[:-1])),
        ("grad_output", lambda: layer.backward(good.astype(np.float64))),
        ("grad_output", lambda: layer.backward(good.tolist())),
        ("grad_state", lambda: layer.backward(good, (state, state[..., :1]))),
        ("grad_state", lambda: layer.backward(good, state)),
        ("grad_states", lambda: layer.backward(good, grad_states=(good, good))),
    ]


@pytest.mark.parametrize("case", range(6))
def test_a_refused_backward_changes_nothing(case):
    layer = LSTM(IN, H, seed=0)
    output, _ = layer(random_x(layer, np.random.default_rng(0)))
    layer.backward(output, retain=True)
    before = [p.grad.copy() for p in layer.parameters()]
    name, call = failures(layer)[case]
    with pytest.raises((ValueError, TypeError), match=name):
        call()
    for parameter, grad in zip(layer.parameters(), before, strict=True):
        np.testing.assert_array_equal(parameter.grad, grad)
    layer.backward(output)  # the context is still there


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (np.zeros((4 * H, H)), TypeError),
        (np.zeros((4, H), np.float32), ValueError),
        ([[0.0]], TypeError),
        (np.broadcast_to(np.float32(0), (4 * H, H)), ValueError),
    ],
    ids=["dtype", "shape", "list", "read-only"],
)
def test_a_foreign_grad_is_refused_before_anything_is_added(bad, error):
    layer = LSTM(IN, H, seed=0)
    output, _ = layer(random_x(layer, np.random.default_rng(0)))
    layer.weight_hh_l0.grad = bad
    with pytest.raises(error, match=r"weight_hh_l0\.grad"):
        layer.backward(output)
    assert layer.weight_ih_l0.grad is None
    layer.weight_hh_l0.grad = None
    layer.backward(output)


def test_reset_state_parameters_are_trained():
    layer = LSTM(IN, H, dtype="float64", seed=0)
    rng = np.random.default_rng(0)
    x, reset = random_x(layer, rng), np.zeros((T, B), bool)
    reset[0] = True  # a learned initial state
    learned = Parameter(rng.standard_normal((1, 1, H)), "learned")
    fixed = rng.standard_normal((1, 1, H))
    output, _ = layer(x, reset=reset, reset_state=(learned, fixed))
    layer.backward(output)
    want, _ = layer(x, reset=reset, reset_state=(learned.data, fixed))
    np.testing.assert_array_equal(output, want)
    layer.backward(output)
    grad_h, grad_c = layer.grad_reset_state
    np.testing.assert_array_equal(learned.grad, grad_h)
    assert grad_h.shape == grad_c.shape == (1, 1, H)
    layer(x, reset=reset, reset_state=(learned, fixed))
    layer.backward(output)
    assert_close(learned.grad, 2 * grad_h)
    assert layer.grad_reset_state[0] is None
    np.testing.assert_array_equal(layer.grad_reset_state[1], grad_c)
    layer(x)
    layer.backward(output)
    assert layer.grad_reset_state is None


def test_dropout_counts_calls_and_repeats():
    x = np.ones((T, B, IN), np.float32)
    first, second = (GRU(IN, H, num_layers=2, dropout=0.5, seed=7) for _ in range(2))
    a, b = first(x)[0], first(x)[0]
    assert first.call_count == 2
    assert not np.array_equal(a, b)
    second.call_count = 1
    np.testing.assert_array_equal(second(x)[0], b)
    first.eval()
    first(x)
    assert first.call_count == 2
    plain = GRU(IN, H, num_layers=2, seed=7)
    plain(x)
    assert plain.call_count == 0


def test_a_refused_forward_counts_nothing():
    layer = GRU(IN, H, num_layers=2, dropout=0.5, seed=7)
    with pytest.raises(ValueError, match="x"):
        layer(np.zeros((T, B, IN + 1), np.float32))
    with pytest.raises(TypeError, match="x"):
        layer(np.zeros((T, B, IN)))
    assert layer.call_count == 0


# Modes ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def packs(monkeypatch):
    """Counts the calls of functional.pack."""
    calls = []
    original = functional.pack

    def pack(*args, **kwargs):
        calls.append(args[0])
        return original(*args, **kwargs)

    monkeypatch.setattr(functional, "pack", pack)
    return calls


def test_eval_packs_once_and_seals(make, packs):
    layer = make(IN, H, num_layers=2, bidirectional=True, seed=0)
    x = random_x(layer, np.random.default_rng(0))
    trained, _ = layer(x)
    assert not packs
    layer.eval()
    for parameter in layer.parameters():
        with pytest.raises(ValueError, match="read-only"):
            parameter.data += 1
    outputs = [layer(x)[0] for _ in range(3)]
    assert len(packs) == 1
    for output in outputs:
        np.testing.assert_array_equal(output, outputs[0])
        assert_close(output, trained, 1e-6)
    layer.train()
    for parameter in layer.parameters():
        parameter.data += 0.1
    layer.eval()
    assert not np.array_equal(layer(x)[0], outputs[0])
    assert len(packs) == 2


def changed_output(layer, x, change):
    """Output in eval before and after `change`, and what a fresh layer with the changed weights gives."""
    layer.eval()
    before = layer(x)[0]
    change()
    fresh = type(layer)(**layer.config())
    for p, q in zip(fresh.parameters(), layer.parameters(), strict=True):
        p.data[...] = q.data
    return before, layer(x)[0], fresh(x)[0]


def test_replaced_data_in_eval_is_seen(packs):
    layer = LSTM(IN, H, seed=0)
    x = random_x(layer, np.random.default_rng(0))

    def replace(read_only):
        data = layer.weight_hh_l0.data * 3
        data.flags.writeable = not read_only
        layer.weight_hh_l0.data = data

    for read_only in (False, True):
        before, after, want = changed_output(layer, x, lambda: replace(read_only))  # noqa: B023
        assert not np.array_equal(before, after)
        assert_close(after, want, 1e-6)


def test_unsealed_data_in_eval_is_seen():
    layer = GRU(IN, H, seed=0)
    x = random_x(layer, np.random.default_rng(0))

    def unseal():
        layer.weight_hh_l0.data.flags.writeable = True
        layer.weight_hh_l0.data *= 3

    before, after, want = changed_output(layer, x, unseal)
    assert not np.array_equal(before, after)
    assert_close(after, want, 1e-6)
    layer.weight_hh_l0.data *= 3
    assert not np.array_equal(layer(x)[0], after)


def test_tied_weights_trained_elsewhere_are_never_stale():
    actor, learner = GRU(IN, H, seed=0), GRU(IN, H, seed=1)
    learner.weight_hh_l0 = actor.weight_hh_l0
    x = random_x(actor, np.random.default_rng(0))
    actor.eval()
    outputs = [actor(x)[0]]
    learner.train()  # makes the shared weight writeable
    learner.weight_hh_l0.data *= 2
    outputs.append(actor(x)[0])
    learner.eval()  # the same array, read-only as before
    outputs.append(actor(x)[0])
    learner.train()
    learner.weight_hh_l0.data *= 2
    learner.eval()
    outputs.append(actor(x)[0])
    np.testing.assert_array_equal(outputs[1], outputs[2])
    assert not np.array_equal(outputs[0], outputs[1])
    assert not np.array_equal(outputs[2], outputs[3])


def test_load_state_dict_in_eval(packs):
    layer, other = LSTM(IN, H, seed=0), LSTM(IN, H, seed=1)
    x = random_x(layer, np.random.default_rng(0))
    layer.eval()
    layer(x)
    layer.load_state_dict(other.state_dict())
    assert not layer.training
    assert not layer.weight_ih_l0.data.flags.writeable
    np.testing.assert_array_equal(layer(x)[0], other.eval()(x)[0])


def test_load_state_dict_of_tensors():
    torch = pytest.importorskip("torch")
    twin = torch.nn.GRU(IN, H, num_layers=2, bidirectional=True)
    layer = GRU(IN, H, num_layers=2, bidirectional=True, seed=0)
    layer.load_state_dict(twin.state_dict())
    for name, value in twin.state_dict().items():
        np.testing.assert_array_equal(getattr(layer, name).data, value.numpy())
    twin.weight_hh_l0.data += 1  # a copy was made
    assert not np.array_equal(layer.weight_hh_l0.data, twin.weight_hh_l0.detach().numpy())
    layer.load_state_dict(dict(twin.named_parameters()))  # tensors that require gradients
    with pytest.raises(TypeError, match="weight_ih_l0"):
        layer.load_state_dict(twin.double().state_dict())


def test_threads_share_a_module_in_eval():
    layer = LSTM(IN, H, num_layers=2, seed=0).eval()
    xs = [random_x(layer, np.random.default_rng(k)) for k in range(4)]
    want = [layer(x)[0] for x in xs]
    layer._mode_changed()  # the threads race for the first pack
    got = [None] * len(xs)

    def work(k):
        for _ in range(20):
            got[k] = layer(xs[k])[0]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
@pytest.mark.parametrize("training", [True, False])
def test_copies(make, duplicate, training):
    layer = make(IN, H, num_layers=2, seed=0)
    x = random_x(layer, np.random.default_rng(0))
    layer(x)
    layer.train(training)
    want = layer(x)[0]
    twin = duplicate(layer)
    assert twin.training == training
    assert [p.data.flags.writeable for p in twin.parameters()] == [training] * len(weights_of(layer))
    np.testing.assert_array_equal(twin(x)[0], want)
    assert dict(twin.named_parameters())["weight_hh_l1"] is twin.weight_hh_l1
    twin.train()
    twin.weight_hh_l0.data += 1
    assert not np.array_equal(twin.weight_hh_l0.data, layer.weight_hh_l0.data)
    fresh = duplicate(layer).train()
    with pytest.raises(RuntimeError, match="backward"):
        fresh.backward()


def test_parameters_may_be_tied_but_not_replaced_by_arrays():
    layer = GRU(H, H, num_layers=2, dtype="float64", seed=0)
    layer.weight_hh_l1 = layer.weight_hh_l0
    assert len(list(layer.parameters())) == 7
    x = random_x(layer, np.random.default_rng(0))
    output, _ = layer(x)
    layer.backward(output)
    tied = layer.weight_hh_l0.grad
    layer.weight_hh_l1 = Parameter(layer.weight_hh_l0.data.copy())
    layer.zero_grad()
    layer(x)
    layer.backward(output)
    assert_close(tied, layer.weight_hh_l0.grad + layer.weight_hh_l1.grad)
    with pytest.raises(TypeError, match=r"weight_hh_l1: expected a Parameter"):
        layer.weight_hh_l1 = np.zeros((3 * H, H))
    assert isinstance(layer.weight_hh_l1, Parameter)


def test_as_a_child_of_a_module():
    class Pair(Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = GRU(IN, H, seed=0), GRU(H, H, seed=1)

    model = Pair()
    assert [name for name, _ in model.named_parameters()][:2] == ["first.weight_ih_l0", "first.weight_hh_l0"]
    model.eval()
    assert not model.second.weight_ih_l0.data.flags.writeable
    twin = copy.deepcopy(model)
    assert not twin.second.weight_ih_l0.data.flags.writeable


# Construction --------------------------------------------------------------------------------------------------------


def test_initial_values(make):
    layer = make(20, 30, num_layers=2, seed=5)
    bound = 1 / np.sqrt(30)
    for parameter in layer.parameters():
        assert np.abs(parameter.data).max() <= bound
    values = np.concatenate([p.data.ravel() for p in layer.parameters()])
    assert abs(values.mean()) < 0.05 * bound
    assert abs(values.std() - bound / np.sqrt(3)) < 0.02 * bound
    twin, wide, other = (make(20, 30, num_layers=2, **k) for k in ({"seed": 5}, {"seed": 5, "dtype": "float64"}, {}))
    for p, q, r, s in zip(*(m.parameters() for m in (layer, twin, wide, other)), strict=True):
        np.testing.assert_array_equal(p.data, q.data)
        np.testing.assert_array_equal(p.data, r.data.astype(np.float32))
        assert not np.array_equal(p.data, s.data)


def test_reset_parameters():
    layer = GRU(IN, H, seed=0)
    before = layer.state_dict()
    layer.reset_parameters(1)
    assert not np.array_equal(layer.weight_ih_l0.data, before["weight_ih_l0"])
    layer.reset_parameters(0)
    np.testing.assert_array_equal(layer.weight_ih_l0.data, before["weight_ih_l0"])
    with pytest.raises(RuntimeError, match="eval"):
        layer.eval().reset_parameters()


BAD_ARGUMENTS = [
    ("input_size", 0, ValueError),
    ("input_size", -3, ValueError),
    ("input_size", 2**31, ValueError),
    ("input_size", 4.0, TypeError),
    ("input_size", True, TypeError),
    ("input_size", None, TypeError),
    ("input_size", "4", TypeError),
    ("input_size", np.array([4]), TypeError),
    ("hidden_size", 0, ValueError),
    ("hidden_size", 2**20, ValueError),
    ("hidden_size", 2**70, ValueError),
    ("hidden_size", np.float64(3), TypeError),
    ("num_layers", 0, ValueError),
    ("num_layers", 2**31 - 1, ValueError),
    ("num_layers", False, TypeError),
    ("num_layers", 1.5, TypeError),
    ("bias", 1, TypeError),
    ("batch_first", 0.5, TypeError),
    ("bidirectional", "no", TypeError),
    ("dropout", -0.1, ValueError),
    ("dropout", 1.1, ValueError),
    ("dropout", float("nan"), ValueError),
    ("dropout", True, TypeError),
    ("dropout", "half", TypeError),
    ("dtype", "float16", TypeError),
    ("dtype", np.int32, TypeError),
    ("dtype", "nonsense", TypeError),
    ("dtype", ">f4", TypeError),
    ("device", "tpu", ValueError),
    ("device", "cuda:x", ValueError),
    ("seed", -1, ValueError),
    ("seed", 2**64, ValueError),
    ("seed", 1.0, TypeError),
    ("proj_size", -1, ValueError),
    ("proj_size", 5, ValueError),
    ("proj_size", 1.0, TypeError),
]


@pytest.mark.parametrize(("name", "value", "error"), BAD_ARGUMENTS, ids=lambda v: str(v)[:20])
def test_bad_arguments_are_named(name, value, error):
    arguments = {"input_size": IN, "hidden_size": H, name: value}
    with pytest.raises(error, match=name):
        LSTM(**arguments)


@pytest.mark.parametrize("when", ["training", "before eval", "after eval"])
@pytest.mark.parametrize("defect", ["dtype", "shape"])
@pytest.mark.parametrize("module", [LSTM(IN, H), GRUCell(IN, H)], ids=["LSTM", "GRUCell"])
def test_a_weight_that_does_not_fit_is_named(module, defect, when):
    """And not x, or another weight, that disagrees with it."""
    module = copy.deepcopy(module)
    if when == "after eval":
        module.eval()
    first = next(module.parameters())
    first.data = first.data.astype(np.float64) if defect == "dtype" else first.data[:, :-1].copy()
    if when == "before eval":
        module.eval()
    x = np.zeros((T, B, IN) if isinstance(module, LSTM) else (B, IN), np.float32)
    with pytest.raises((TypeError, ValueError), match=rf"^{first.name}: expected"):
        module(x)


def test_more_bad_arguments():
    with pytest.raises(ValueError, match="nonlinearity"):
        RNN(IN, H, nonlinearity="sigmoid")
    with pytest.raises(TypeError, match="proj_size"):
        GRU(IN, H, proj_size=2)
    with pytest.warns(UserWarning, match="dropout"):
        GRU(IN, H, dropout=0.5)


def test_cuda_says_why_not():
    with pytest.raises(RuntimeError, match=r"device: 'cuda' is not available"):
        LSTM(IN, H, device="cuda")
    assert LSTM(IN, H, device="cpu").device == "cpu"


def test_numpy_scalars_are_as_good():
    layer = LSTM(np.int64(IN), np.int32(H), bias=np.bool_(True), dropout=np.float32(0.0), dtype=np.dtype("float64"))
    assert layer.config() == LSTM(IN, H, dtype="float64", seed=layer.seed).config()


def test_positional_order_is_torch_s():
    pytest.importorskip("torch")
    import inspect

    import torch

    for kind in (LSTM, GRU, RNN):
        # torch's own signature is (*args, **kwargs); its order stands in the documented base class.
        order = list(inspect.signature(kind).parameters)
        options = {"num_layers": 2, "bias": False, "batch_first": True, "dropout": 0.5, "bidirectional": True}
        options.update({"proj_size": 2} if kind is LSTM else {"nonlinearity": "relu"} if kind is RNN else {})
        positional = [IN, H, *(options[name] for name in order[2:] if name in options)]
        ours, theirs = kind(*positional), getattr(torch.nn, kind.__name__)(*positional)
        for name, value in options.items():
            assert getattr(ours, name) == getattr(theirs, name) == value


def test_config_rebuilds(make):
    import json

    layer = make(IN, H, num_layers=2, dropout=0.25, batch_first=True, dtype="float64", seed=11)
    config = json.loads(json.dumps(layer.config()))
    twin = type(layer)(**config)
    assert twin.config() == layer.config()
    for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
        np.testing.assert_array_equal(p.data, q.data)


def test_repr():
    assert repr(LSTM(10, 20)) == "LSTM(10, 20)"
    assert repr(LSTM(10, 20, 2, dropout=0.5, bidirectional=True, proj_size=3)) == (
        "LSTM(10, 20, num_layers=2, dropout=0.5, bidirectional=True, proj_size=3)"
    )
    assert repr(RNN(1, 2, nonlinearity="relu", dtype="float64")) == "RNN(1, 2, nonlinearity=relu, dtype=float64)"


def test_a_new_layer_is_a_constructor():
    class ReluNet(RecurrentLayer):
        def __init__(self, input_size, hidden_size, *, seed=None):
            super().__init__("rnn_relu", input_size, hidden_size, bidirectional=True, seed=seed)

    ours, twin = ReluNet(IN, H, seed=0), RNN(IN, H, nonlinearity="relu", bidirectional=True, seed=0)
    x = random_x(ours, np.random.default_rng(0))
    np.testing.assert_array_equal(ours(x)[0], twin(x)[0])
    assert repr(ours) == "ReluNet(4, 5)"
    assert ours.config() == {"input_size": IN, "hidden_size": H, "seed": 0}


@pytest.mark.parametrize("change", [lambda m: m.load_state_dict(m.state_dict()), lambda m: m.reset_parameters(1)])
def test_new_weights_drop_a_forward(change):
    layer = GRU(IN, H, seed=0)
    x = random_x(layer, np.random.default_rng(0))
    output, _ = layer(x)
    change(layer)
    with pytest.raises(RuntimeError, match="expected a forward in training mode"):
        layer.backward(output)


def test_weights_that_are_refused_keep_a_forward():
    layer = GRU(IN, H, seed=0)
    output, _ = layer(random_x(layer, np.random.default_rng(0)))
    with pytest.raises(KeyError):
        layer.load_state_dict({})
    layer.backward(output)


@pytest.mark.parametrize("batch_first", [False, True])
def test_x_of_another_rank(batch_first):
    wanted = r"\[B, T, I=4\]" if batch_first else r"\[T, B, I=4\]"
    for shape in ((4,), (), (2, 2, 2, 4)):
        with pytest.raises(ValueError, match=rf"x: expected shape {wanted} or \[T, I=4\], got"):
            LSTM(4, 3, batch_first=batch_first)(np.zeros(shape, np.float32))


def test_lengths_beyond_64_bits():
    with pytest.raises(
        ValueError, match=r"lengths: expected integers of 64 bits, got 1180591620717411303424, .* range"
    ):
        LSTM(2, 3)(np.zeros((4, 3, 2), np.float32), lengths=[2**70, 1, 1])


def test_backward_of_nothing():
    layer = LSTM(2, 3, seed=0)
    output, _ = layer(np.zeros((4, 1, 2), np.float32))
    for state in (None, (None, None)):
        with pytest.raises(ValueError, match="expected grad_output, grad_state or grad_states"):
            layer.backward(None, state, grad_states=state)
    assert all(p.grad is None for p in layer.parameters())
    layer.backward(output)  # the forward is still there
