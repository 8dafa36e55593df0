"""Streams: step by step they are the layer in eval, and their state can be taken, set, forked and reordered."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

from rnnfast.modules import GRU, LSTM, RNN
from rnnfast.stream import Stream

T, B, IN, H = 7, 3, 4, 5
LAYERS = {
    "rnn": lambda **k: RNN(IN, H, **k),
    "relu": lambda **k: RNN(IN, H, nonlinearity="relu", num_layers=2, **k),
    "lstm": lambda **k: LSTM(IN, H, num_layers=2, **k),
    "lstm_proj": lambda **k: LSTM(IN, H, proj_size=3, **k),
    "gru": lambda **k: GRU(IN, H, num_layers=3, bias=False, **k),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param](seed=0)


@pytest.fixture
def x():
    return np.random.default_rng(0).standard_normal((T, B, IN)).astype(np.float32)


def pairs(state):
    return state if isinstance(state, tuple) else (state,)


def assert_same(a, b):
    assert type(a) is type(b)
    for p, q in zip(pairs(a), pairs(b), strict=True):
        np.testing.assert_array_equal(p, q)


def close(a, b, tolerance=2e-6):
    for p, q in zip(pairs(a), pairs(b), strict=True):
        assert p.shape == q.shape
        np.testing.assert_allclose(p, q, rtol=0, atol=tolerance)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_steps_are_the_layer(layer, x, mode, dtype):
    layer = type(layer)(**{**layer.config(), "dtype": dtype}).train(mode)
    x = x.astype(dtype)
    reset = np.random.default_rng(1).random((T, B)) < 0.3
    for cuts in (None, reset):
        stream = layer.stream(B)
        outputs = [stream.step(x[t], None if cuts is None else cuts[t]) for t in range(T)]
        want, state = layer.infer(x, reset=cuts)
        close(np.stack(outputs), want, 2e-6 if dtype == "float32" else 1e-12)
        close(stream.state, state, 2e-6 if dtype == "float32" else 1e-12)


def test_dropout_is_off(x):
    layer = GRU(IN, H, num_layers=2, dropout=0.9, seed=0)
    stream = layer.stream(B)
    close(np.stack([stream.step(x[t]) for t in range(T)]), layer.infer(x)[0])
    assert layer.call_count == 0


def test_each_result_is_fresh_unless_out_is_given(layer, x):
    stream = layer.stream(B)
    first = stream.step(x[0])
    kept = first.copy()
    second = stream.step(x[1])
    assert not np.shares_memory(first, second)
    np.testing.assert_array_equal(first, kept)
    twin, out = layer.stream(B), np.empty_like(first)
    assert twin.step(x[0], out=out) is out
    np.testing.assert_array_equal(out, first)
    twin.step(x[1], None, out)
    np.testing.assert_array_equal(out, second)


def test_reset_may_be_numbers(layer, x):
    a, b = layer.stream(B), layer.stream(B)
    for t in range(3):
        want = a.step(x[t], reset=np.array([True, False, True]))
        got = b.step(x[t], reset=np.array([1, 0, 1], np.uint8))
        np.testing.assert_array_equal(got, want)


def test_state_is_a_copy_both_ways(layer, x):
    stream = layer.stream(B)
    assert all(not s.any() for s in pairs(stream.state))
    stream.step(x[0])
    state = stream.state
    want = stream.step(x[1])
    stream.state = state
    for element in pairs(state):
        element += 1
    np.testing.assert_array_equal(stream.step(x[1]), want)
    for element in pairs(stream.state):
        element += 1
    again = layer.stream(B)
    again.state = None
    again.step(x[0])
    np.testing.assert_array_equal(again.step(x[1]), want)


def test_state_starts_from_the_layer_s(layer, x):
    _, state = layer.infer(x[:4])
    stream = layer.stream(B)
    stream.state = state
    close(stream.step(x[4]), layer.infer(x[4:5], state)[0][0])


def test_refused_states_change_nothing(layer, x):
    stream = layer.stream(B)
    stream.step(x[0])
    before = stream.state
    wrong = [tuple(s[:, :1] for s in pairs(before)), tuple(s.astype(np.float64) for s in pairs(before))]
    wrong = [w if isinstance(before, tuple) else w[0] for w in wrong]
    wrong.append(pairs(before)[0] if isinstance(before, tuple) else (before, before))
    for state in wrong:
        with pytest.raises((ValueError, TypeError), match="state"):
            stream.state = state
        assert_same(stream.state, before)


def test_refused_steps_change_nothing(layer, x):
    stream = layer.stream(B)
    y = stream.step(x[0])
    before = stream.state
    for arguments, name in [
        ((x[0, :2],), "x"),
        ((x[0].astype(np.float64),), "x"),
        ((x,), "x"),
        ((x[0].tolist(),), "x"),
        ((x[0], np.zeros(B + 1, bool)), "reset"),
        ((x[0], None, np.empty((B, y.shape[1] + 1), np.float32)), "out"),
        ((x[0], None, y.astype(np.float64)), "out"),
    ]:
        with pytest.raises((ValueError, TypeError), match=name):
            stream.step(*arguments)
        assert_same(stream.state, before)


def test_fork_goes_its_own_way(layer, x):
    stream = layer.stream(B)
    stream.step(x[0])
    fork = stream.fork()
    want = stream.step(x[1])
    stream.step(x[2])
    np.testing.assert_array_equal(fork.step(x[1]), want)
    stream.close()
    fork.step(x[2])


def test_reorder(layer, x):
    stream = layer.stream(B)
    stream.step(x[0])
    before = stream.state
    stream.reorder([2, 0, 2])
    for got, want in zip(pairs(stream.state), pairs(before), strict=True):
        np.testing.assert_array_equal(got, want[:, [2, 0, 2]])
    stream.reorder(np.arange(B, dtype=np.uint8))
    after = stream.state
    for rows, error in [
        ([0, 1], ValueError),
        ([0, 1, 3], ValueError),
        ([0, 1, -1], ValueError),
        ([[0, 1, 2]], ValueError),
        ([0.0, 1.0, 2.0], TypeError),
        ([True, False, True], TypeError),
    ]:
        with pytest.raises(error, match="rows"):
            stream.reorder(rows)
        assert_same(stream.state, after)


def test_weights_are_pinned_until_refresh(layer, x):
    stream = layer.stream(B)
    want = stream.step(x[0])
    stream.state = None
    for parameter in layer.parameters():
        parameter.data *= 2
    np.testing.assert_array_equal(stream.step(x[0]), want)
    fork = stream.fork()
    fork.state = None
    np.testing.assert_array_equal(fork.step(x[0]), want)
    state = stream.state
    stream.refresh()
    assert_same(stream.state, state)
    stream.state = None
    got = stream.step(x[0])
    close(got, layer.infer(x[:1])[0][0])
    assert not np.array_equal(got, want)
    fork.state = None
    np.testing.assert_array_equal(fork.step(x[0]), want)


def test_an_eval_layer_and_its_streams_share_one_pack(layer, x, monkeypatch):
    from rnnfast import functional

    calls, original = [], functional.pack
    monkeypatch.setattr(functional, "pack", lambda *a, **k: calls.append(1) or original(*a, **k))
    layer.eval()
    layer(x)
    streams = [layer.stream(B) for _ in range(2)]
    streams[0].refresh()
    streams[0].fork()
    assert len(calls) == 1


def test_closed(layer, x):
    with layer.stream(B) as stream:
        held = stream.step
        held(x[0])
        assert not stream.closed
    assert stream.closed
    stream.close()
    for use in (
        lambda: stream.step(x[0]),
        lambda: held(x[0]),
        lambda: stream.state,
        lambda: setattr(stream, "state", None),
        lambda: stream.fork(),
        lambda: stream.reorder([0, 1, 2]),
        lambda: stream.refresh(),
        lambda: stream.__enter__(),
    ):
        with pytest.raises(RuntimeError, match="closed"):
            use()
    assert "closed" in repr(stream)


def test_a_subclass_may_wrap_step(layer, x):
    class Doubled(Stream):
        def step(self, x_t, reset=None, out=None):
            return 2 * super().step(x_t, reset, out)

    with Doubled(layer, B) as stream:
        np.testing.assert_array_equal(stream.step(x[0]), 2 * layer.stream(B).step(x[0]))
    with pytest.raises(RuntimeError, match="closed"):
        stream.step(x[0])


def test_what_makes_no_stream(layer):
    with pytest.raises(ValueError, match="bidirectional"):
        GRU(IN, H, bidirectional=True).stream(B)
    for size, error in [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError), (None, TypeError)]:
        with pytest.raises(error, match="batch_size"):
            layer.stream(size)


def test_streams_are_not_copied(layer):
    stream = layer.stream(B)
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="fork"):
            duplicate(stream)
