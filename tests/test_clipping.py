"""Norms and clipping against PyTorch and against exact values where the naive formula overflows."""

import math

import numpy as np
import pytest

from rnnfast.base import Parameter
from rnnfast.clipping import clip_grad_norm_, clip_grad_value_, get_total_norm
from rnnfast.layers import Linear

SHAPES = [(3, 4), (5,), (1, 1), (2, 3, 2)]
ORDERS = [2.0, 1.0, 3.5, 0.5, math.inf, -math.inf, 0.0, -1.0, 2]


def gradients(dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(dtype) for shape in SHAPES]


def parameters(grads):
    result = [Parameter(np.zeros_like(g), f"p{i}") for i, g in enumerate(grads)]
    for parameter, grad in zip(result, grads, strict=False):
        parameter.grad = grad.copy()
    return result


def torch_parameters(torch, grads):
    result = [torch.nn.Parameter(torch.zeros(g.shape, dtype=torch.float64)) for g in grads]
    for parameter, grad in zip(result, grads, strict=False):
        parameter.grad = torch.tensor(grad)
    return result


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 100.0, math.inf])
def test_clip_norm_matches_torch(order, max_norm):
    torch = pytest.importorskip("torch")
    ours, theirs = parameters(gradients()), torch_parameters(torch, gradients())
    norm = clip_grad_norm_(ours, max_norm, order)
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm, order)
    assert isinstance(norm, float)
    assert norm == pytest.approx(float(expected), rel=1e-13)
    for a, b in zip(ours, theirs, strict=False):
        np.testing.assert_allclose(a.grad, b.grad.numpy(), rtol=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_total_norm_matches_torch(order):
    torch = pytest.importorskip("torch")
    grads = gradients()
    expected = float(torch.nn.utils.get_total_norm([torch.tensor(g) for g in grads], order))
    assert get_total_norm(grads, order) == pytest.approx(expected, rel=1e-13)
    assert get_total_norm(parameters(grads), order) == pytest.approx(expected, rel=1e-13)


def test_small_gradients_are_untouched_bit_by_bit():
    grads = gradients(np.float32)
    kept = [g.copy() for g in grads]
    clip_grad_norm_(grads, 1000.0)
    for a, b in zip(grads, kept, strict=False):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("items", [(), [], [Parameter(np.zeros(2))], Parameter(np.zeros(2)), [np.zeros((0, 3))]])
def test_nothing_has_norm_zero(items):
    assert get_total_norm(items) == 0.0
    assert clip_grad_norm_(items, 1.0) == 0.0
    assert clip_grad_norm_(items, 1.0, math.inf, error_if_nonfinite=True) == 0.0
    clip_grad_value_(items, 1.0)


def test_single_items_generators_and_modules_parameters():
    array = np.array([3.0, 4.0])
    assert clip_grad_norm_(array, 1.0) == 5.0
    np.testing.assert_allclose(array, [0.6, 0.8], rtol=1e-6)
    parameter = Parameter(np.zeros(2))
    parameter.grad = np.array([3.0, 4.0])
    assert get_total_norm(parameter) == 5.0
    assert get_total_norm(p for p in [parameter]) == 5.0
    layer = Linear(2, 2, seed=0)
    layer(np.ones((1, 2), np.float32))
    layer.backward(np.ones((1, 2), np.float32))
    assert clip_grad_norm_(layer.parameters(), 1.0) == pytest.approx(6**0.5)
    assert get_total_norm(layer.parameters()) == pytest.approx(1.0, rel=1e-6)


def test_tied_parameters_count_once():
    parameter = Parameter(np.zeros(2))
    parameter.grad = np.array([3.0, 4.0])
    assert clip_grad_norm_([parameter, parameter, parameter.grad], 1.0) == 5.0
    np.testing.assert_allclose(parameter.grad, [0.6, 0.8], rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e30, 1e300])
@pytest.mark.parametrize("order", [1.0, 2.0, 5.0, 50.0, -2.0])
def test_norms_neither_overflow_nor_vanish(scale, order):
    dtype = np.float32 if 1e-38 < scale < 1e38 else np.float64
    value = float(dtype(3 * scale))
    grads = [np.full(4, value, dtype), np.full((2, 2), value, dtype)]
    assert get_total_norm(grads, order) == pytest.approx(value * 8 ** (1 / order), rel=1e-12)


def test_norm_of_many_float32_is_exact():
    grads = np.full(3 * 2**16 + 5, 0.1, np.float32)
    exact = float(np.float32(0.1)) * grads.size**0.5
    assert get_total_norm(grads) == pytest.approx(exact, rel=1e-14)


def test_extreme_orders_do_not_raise():
    assert get_total_norm([np.ones(10)], 1e-300) == math.inf
    assert get_total_norm([np.array([0.5, 2.0])], 1e6) == pytest.approx(2.0)
    assert get_total_norm([np.array([0.0, 2.0])], -3.0) == 0.0


def test_strided_gradients_are_clipped_in_place():
    base = np.ones((4, 6))
    clip_grad_norm_([base.T[::2]], 1.0)
    assert np.count_nonzero(base == 1.0) == 12
    assert get_total_norm([base[:, ::2]]) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("order", [2.0, math.inf, 1.0])
def test_nonfinite_as_in_torch(bad, order):
    torch = pytest.importorskip("torch")
    grads = gradients()
    grads[1][2] = bad
    ours, theirs = parameters(grads), torch_parameters(torch, grads)
    for call in (
        lambda: clip_grad_norm_(ours, 1.0, order, error_if_nonfinite=True),
        lambda: get_total_norm(ours, order, error_if_nonfinite=True),
    ):
        with pytest.raises(RuntimeError, match="expected a finite total norm"):
            call()
    for p, g in zip(ours, grads, strict=False):
        np.testing.assert_array_equal(p.grad, g)
    norm = clip_grad_norm_(ours, 1.0, order)
    np.testing.assert_array_equal(norm, float(torch.nn.utils.clip_grad_norm_(theirs, 1.0, order)))
    for a, b in zip(ours, theirs, strict=False):
        np.testing.assert_array_equal(a.grad, b.grad.numpy())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_clip_value(dtype):
    grads = gradients(dtype)
    grads[1][:] = [np.nan, np.inf, -np.inf, 0.01, -9]
    ours = parameters(grads)
    clip_grad_value_(ours, 0.1)
    for p, g in zip(ours, grads, strict=False):
        np.testing.assert_array_equal(
            p.grad, np.where(np.isnan(g), g, np.minimum(np.maximum(g, -dtype(0.1)), dtype(0.1)))
        )
        assert p.grad.dtype == dtype
    clip_grad_value_(grads, 1e300 if dtype is np.float32 else math.inf)
    assert np.isinf(grads[1][1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda g: clip_grad_norm_(g, -1.0), ValueError, "max_norm: expected a number, at least 0, got -1"),
        (lambda g: clip_grad_norm_(g, math.nan), ValueError, "max_norm"),
        (lambda g: clip_grad_norm_(g, "1"), TypeError, "max_norm: expected a number, got str"),
        (lambda g: clip_grad_norm_(g, 0.1, math.nan), ValueError, "norm_type"),
        (lambda g: clip_grad_norm_(g, 0.1, None), TypeError, "norm_type"),
        (lambda g: clip_grad_value_(g, -0.1), ValueError, "clip_value: expected a number, at least 0, got -0.1"),
        (
            lambda g: clip_grad_norm_([*g, 3.0], 0.1),
            TypeError,
            r"parameters\[4\]: expected an array, got builtins.float",
        ),
        (lambda g: clip_grad_norm_([*g, None], 0.1), TypeError, r"parameters\[4\]"),
        (lambda g: clip_grad_norm_(7, 0.1), TypeError, "parameters: expected a Parameter, an array or an iterable"),
        (lambda g: clip_grad_norm_(Linear(2, 2), 0.1), TypeError, "parameters: .* got Linear"),
        (lambda g: clip_grad_norm_([*g, np.ones(2, int)], 0.1), TypeError, r"parameters\[4\]: expected a float dtype"),
        (
            lambda g: clip_grad_value_([*g, np.broadcast_to(9.0, 3)], 0.1),
            ValueError,
            r"parameters\[4\]: expected a writ",
        ),
        (
            lambda g: clip_grad_norm_([*g, np.broadcast_to(9.0, 3)], 0.1),
            ValueError,
            r"parameters\[4\]: expected a writ",
        ),
    ],
)
def test_refusals_change_nothing(call, error, message):
    grads = gradients()
    kept = [g.copy() for g in grads]
    with pytest.raises(error, match=message):
        call(grads)
    for a, b in zip(grads, kept, strict=False):
        np.testing.assert_array_equal(a, b)
