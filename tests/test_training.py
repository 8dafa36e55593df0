"""tbptt and gradient_flow: windows against whole sequences, burn-in against its definition, norms against backward."""

from __future__ import annotations

import numpy as np
import pytest

from rnnfast import functional
from rnnfast.base import Module
from rnnfast.layers import Linear, Sequential
from rnnfast.modules import GRU, LSTM, RNN
from rnnfast.training import Window, gradient_flow, tbptt

T, B, IN, H = 11, 3, 4, 5


def pairs(state):
    return state if isinstance(state, tuple) else (state,)


def close(a, b, tolerance=1e-12):
    assert len(pairs(a)) == len(pairs(b))
    for p, q in zip(pairs(a), pairs(b), strict=True):
        assert p.shape == q.shape
        np.testing.assert_allclose(p, q, rtol=0, atol=tolerance)


@pytest.fixture(params=[LSTM, GRU, RNN], ids=lambda kind: kind.__name__)
def layer(request):
    return request.param(IN, H, num_layers=2, dtype="float64", seed=0)


@pytest.fixture
def x():
    return np.random.default_rng(0).standard_normal((T, B, IN))


def test_windows_cover_the_sequence(layer, x):
    want, state = layer.infer(x)
    windows = list(tbptt(layer, x, 4))
    assert [(w.start, w.stop) for w in windows] == [(0, 4), (4, 8), (8, 11)]
    close(np.concatenate([w.output for w in windows]), want)
    close(windows[-1].state, state)
    assert all(np.shares_memory(w.x, x) for w in windows)
    assert Window._fields == ("x", "start", "stop", "output", "state")


def test_backward_stays_in_the_window(layer, x):
    rng = np.random.default_rng(1)
    grad = rng.standard_normal((T, B, H))
    for w in tbptt(layer, x, 4):
        layer.backward(grad[w.start : w.stop])
    got = [p.grad for p in layer.parameters()]
    layer.zero_grad()
    state = None
    for start in range(0, T, 4):
        _, state = layer(x[start : start + 4], state)
        layer.backward(grad[start : start + 4])
    for a, p in zip(got, layer.parameters(), strict=True):
        np.testing.assert_array_equal(a, p.grad)


def test_the_loop_body_may_train(layer, x):
    """Each window sees the weights as they are then, on the state that came out of the window before."""
    twin = type(layer)(**layer.config())
    state = None
    for w in tbptt(layer, x, 5):
        output, state = twin(x[w.start : w.stop], state)
        close(w.output, output)
        for module in (layer, twin):
            for parameter in module.parameters():
                parameter.data *= 0.9


def test_initial_state_and_batch_first(x):
    layer = LSTM(IN, H, batch_first=True, dtype="float64", seed=0)
    rng = np.random.default_rng(1)
    state = (rng.standard_normal((1, B, H)), rng.standard_normal((1, B, H)))
    x = np.ascontiguousarray(x.swapaxes(0, 1))
    want, last = layer.infer(x, state)
    windows = list(tbptt(layer, x, 3, state=state))
    close(np.concatenate([w.output for w in windows], axis=1), want)
    close(windows[-1].state, last)


def test_unbatched(x):
    for batch_first in (False, True):
        layer = GRU(IN, H, batch_first=batch_first, dtype="float64", seed=0)
        windows = list(tbptt(layer, x[:, 0], 3, burn_in=2, lengths=9))
        want, _ = layer.infer(x[:, 0], lengths=9)
        close(np.concatenate([w.output for w in windows]), want[2:])


@pytest.mark.parametrize(("window", "burn_in"), [(4, 1), (4, 3), (3, 3), (2, 5), (1, 2), (20, 3), (3, 8)])
def test_burn_in_with_fixed_weights_changes_no_numbers(layer, x, window, burn_in):
    """The states are those of the whole sequence; the first steps are burn-in alone."""
    want, state = layer.infer(x)
    windows = list(tbptt(layer, x, window, burn_in))
    assert windows[0].start == burn_in
    assert [w.stop for w in windows[:-1]] == [w.start for w in windows[1:]]
    close(np.concatenate([w.output for w in windows]), want[burn_in:])
    close(windows[-1].state, state)


@pytest.mark.parametrize(("window", "burn_in"), [(4, 2), (3, 3), (2, 5)])
def test_burn_in_starts_from_the_stored_state_with_the_present_weights(layer, x, window, burn_in):
    versions = []  # of the weights, one a window

    def at_version(k, start, stop, state):
        twin = type(layer)(**layer.config())
        twin.load_state_dict(versions[k])
        return twin.infer(x[start:stop], state)

    stored = None
    for k, w in enumerate(tbptt(layer, x, window, burn_in)):
        versions.append(layer.state_dict())
        _, state = at_version(k, w.start - burn_in, w.start, stored)
        output, _ = at_version(k, w.start, w.stop, state)
        close(w.output, output)
        _, stored = at_version(k, w.start - burn_in, w.start - burn_in + window, stored)
        for parameter in layer.parameters():
            parameter.data *= 0.9


def test_burn_in_has_no_gradient(layer, x):
    (w,) = tbptt(layer, x, window=T - 4, burn_in=4)  # as R2D2 replays one sequence
    grad_x, _ = layer.backward(np.ones_like(w.output))
    assert grad_x.shape == w.x.shape == (T - 4, B, IN)
    got = [p.grad for p in layer.parameters()]
    layer.zero_grad()
    _, state = layer.infer(x[:4])
    layer(x[4:], state)
    layer.backward(np.ones_like(w.output))
    for a, p in zip(got, layer.parameters(), strict=True):
        close(a, p.grad)


@pytest.mark.parametrize(("window", "burn_in"), [(4, 0), (4, 2), (4, 1), (3, 3), (2, 5)])
@pytest.mark.parametrize("kind", [LSTM, GRU])
def test_lengths_and_resets(kind, x, window, burn_in):
    layer = kind(IN, H, num_layers=2, dtype="float64", seed=0)
    lengths = np.array([T, 0, 5], np.uint8)
    reset = np.random.default_rng(2).random((T, B)) < 0.2
    replacement = layer.infer(x[:, :1])[1]
    options = {"lengths": lengths, "reset": reset, "reset_state": replacement}
    want, state = layer.infer(x, **options)
    windows = list(tbptt(layer, x, window, burn_in, **options))
    close(np.concatenate([w.output for w in windows]), want[burn_in:])
    close(windows[-1].state, state)


def test_reset_with_batch_first(x):
    layer = GRU(IN, H, dtype="float64", seed=0)
    other = GRU(IN, H, dtype="float64", seed=0, batch_first=True)
    reset = np.random.default_rng(2).random((T, B)) < 0.3
    first = [w.output for w in tbptt(layer, x, 4, 1, reset=reset)]
    second = [w.output for w in tbptt(other, x.swapaxes(0, 1), 4, 1, reset=reset.T)]
    close(np.concatenate(first), np.concatenate(second, axis=1).swapaxes(0, 1))


class Net(Module):
    """A module of the user's: an embedding by hand in front of a layer."""

    def __init__(self, batch_first=False):
        super().__init__()
        self.table = np.random.default_rng(0).standard_normal((9, IN))
        self.layer = GRU(IN, H, batch_first=batch_first, dtype="float64", seed=0)

    def forward(self, tokens, state=None):
        return self.layer(self.table[tokens], state)


@pytest.mark.parametrize("burn_in", [0, 2, 4, 6])
def test_modules_of_the_user_s(burn_in):
    net = Net()
    tokens = np.random.default_rng(0).integers(0, 9, (T, B))
    want, state = net.layer.infer(net.table[tokens])
    windows = []
    for w in tbptt(net, tokens, 4, burn_in):
        assert net.layer.backward(np.ones_like(w.output))[0].shape == (*w.x.shape, IN)
        windows.append(w)
    close(np.concatenate([w.output for w in windows]), want[burn_in:])
    close(windows[-1].state, state)


def test_batch_first_is_found_in_the_layers_of_a_module():
    net = Net(batch_first=True)
    tokens = np.random.default_rng(0).integers(0, 9, (B, T))
    windows = list(tbptt(net, tokens, 4))
    assert [w.stop for w in windows] == [4, 8, T]
    close(np.concatenate([w.output for w in windows], axis=1), net(tokens)[0])


def test_dropout_stays_on_in_burn_in(x):
    layer = GRU(IN, H, num_layers=2, dropout=0.5, dtype="float64", seed=0)
    (w,) = tbptt(layer, x, window=20, burn_in=4)
    assert layer.call_count == 2
    layer.call_count = 0
    _, state = layer(x[:4])
    close(w.output, layer(x[4:], state)[0])


def test_short_sequences(layer, x):
    assert list(tbptt(layer, x[:3], 4, burn_in=3)) == []
    assert [(w.start, w.stop) for w in tbptt(layer, x[:3], 4)] == [(0, 3)]


def test_arguments_are_refused_at_once(layer, x):
    for arguments, error, name in [
        ((layer, x, 0), ValueError, "window"),
        ((layer, x, 2.0), TypeError, "window"),
        ((layer, x, 2, -1), ValueError, "burn_in"),
        ((layer, x, 2, True), TypeError, "burn_in"),
        ((layer, x[:, 0, 0], 2), ValueError, "x"),
        ((layer, "text", 2), ValueError, "x"),
        ((lambda x: x, x, 2), TypeError, "module"),
        ((GRU(IN, H, bidirectional=True), x, 2), ValueError, "bidirectional"),
    ]:
        with pytest.raises(error, match=name):
            tbptt(*arguments)
    for options, error, name in [
        ({"lengths": [T + 1, 0, 0]}, ValueError, "lengths"),
        ({"lengths": [-1, 0, 0]}, ValueError, "lengths"),
        ({"lengths": [1.0, 0.0, 0.0]}, TypeError, "lengths"),
        ({"reset": np.zeros((T - 1, B), bool)}, ValueError, "reset"),
    ]:
        with pytest.raises(error, match=name):
            tbptt(layer, x, 4, **options)
    with pytest.raises(ValueError, match="h0"):
        next(tbptt(layer, x, 4, state=layer.infer(x[:, :1])[1]))


# gradient_flow -------------------------------------------------------------------------------------------------------


def test_flow_is_the_norm_of_the_total_gradient(layer, x):
    """Of layer 1's h_t by running on from t: the gradient of the initial state of the rest of the sequence."""
    top = RNN(IN, H, dtype="float64", seed=0)
    rng = np.random.default_rng(3)
    grad = rng.standard_normal((T, B, H))
    output, state = top(x)
    last = rng.standard_normal(state.shape)
    norms = gradient_flow(top, grad, last)
    rows = gradient_flow(top, grad, last, per_row=True)
    assert norms.shape == (T, 1)
    assert rows.shape == (T, 1, B)
    for t in range(T):
        h = output[t][None]
        if t + 1 < T:
            top(x[t + 1 :], h)
            _, total = top.backward(grad[t + 1 :], last)
        else:
            total = last
        total = total[0] + grad[t]
        np.testing.assert_allclose(norms[t, 0], np.linalg.norm(total), rtol=1e-12)
        np.testing.assert_allclose(rows[t, 0], np.linalg.norm(total, axis=1), rtol=1e-12)


def test_flow_of_every_layer_equals_the_recorded_gradients(x):
    layer = LSTM(IN, H, num_layers=2, bidirectional=True, dtype="float64", seed=0)
    output, state = layer(x, lengths=[T, 4, 0])
    grad_h = state[0]
    norms = gradient_flow(layer, output, (grad_h, None), per_row=True)
    weights = [p.data for p in layer.parameters()]
    *_, context = functional.forward(
        "lstm", x, None, weights, num_layers=2, bidirectional=True, lengths=np.array([T, 4, 0])
    )
    functional.backward(context, output, (grad_h, None), record=True)
    np.testing.assert_allclose(norms, np.linalg.norm(context.grad_h, axis=3), rtol=1e-12)
    assert norms.shape == (T, 4, B)
    assert not norms[4:, :, 1].any()
    assert not norms[:, :, 2].any()


def test_flow_leaves_everything_for_backward(layer, x):
    output, _ = layer(x)
    want_x, _ = layer.backward(output, retain=True)
    want = [p.grad.copy() for p in layer.parameters()]
    gradient_flow(layer, output)
    for p, g in zip(layer.parameters(), want, strict=True):
        np.testing.assert_array_equal(p.grad, g)
    layer.zero_grad()
    got_x, _ = layer.backward(output)
    np.testing.assert_array_equal(got_x, want_x)
    for p, g in zip(layer.parameters(), want, strict=True):
        np.testing.assert_array_equal(p.grad, g)
    with pytest.raises(RuntimeError, match="gradient_flow"):
        gradient_flow(layer, output)


def test_vanishing_and_exploding_can_be_seen(x):
    for scale, compare in ((0.1, np.less), (3.0, np.greater)):
        layer = RNN(IN, H, nonlinearity="relu", dtype="float64", seed=0)
        layer.weight_hh_l0.data[...] = scale * np.eye(H)
        layer.bias_ih_l0.data[...] = 50.0  # keeps every unit alive
        _, state = layer(x)
        norms = gradient_flow(layer, None, np.ones_like(state))[:, 0]
        assert compare(norms[:-1], norms[1:]).all()


def test_flow_does_not_overflow_and_shows_nan(x):
    layer = RNN(IN, H, seed=0)
    output, _ = layer(x.astype(np.float32))
    grad = np.zeros_like(output)
    grad[-1] = 3e38
    assert np.isfinite(gradient_flow(layer, grad)[-1]).all()
    grad[-1, 0, 0] = np.nan
    assert np.isnan(gradient_flow(layer, grad)[-1]).all()


def test_flow_unbatched(x):
    layer = GRU(IN, H, num_layers=2, dtype="float64", seed=0)
    output, _ = layer(x[:, :1])
    want = gradient_flow(layer, output)
    output, _ = layer(x[:, 0])
    close(gradient_flow(layer, output), want)


def test_flow_refuses(layer, x):
    with pytest.raises(RuntimeError, match="forward"):
        gradient_flow(layer)
    with pytest.raises(TypeError, match="module"):
        gradient_flow(Net())
    output, _ = layer(x)
    with pytest.raises(ValueError, match="grad_output"):
        gradient_flow(layer, output[1:])


@pytest.mark.parametrize("module", [Sequential(LSTM(IN, H)), Linear(IN, H)])
def test_a_module_without_a_state_is_refused_at_once(module, x):
    with pytest.raises(TypeError, match=rf"module: .* \(x, state\) .* got {type(module).__name__}"):
        tbptt(module, x, 4)


def test_a_module_that_returns_no_state_is_refused(x):
    class Output(Module):
        def forward(self, x, state):
            return x

    with pytest.raises(TypeError, match=r"module: .* returns \(output, state\), got Output"):
        next(tbptt(Output(), x, 4))


def test_windows_show_shapes(layer, x):
    text = repr(next(tbptt(layer, x, 4)))
    assert text.startswith(f"Window(start=0, stop=4, x=[4, {B}, {IN}], output=[4, {B}, {H}], state=")
    assert len(text) < 150
