"""Losses against PyTorch in float64, finite differences, masks, and what they refuse."""

import numpy as np
import pytest

from rnnfast.losses import bce_with_logits, cross_entropy, mse_loss

REDUCTIONS = ["mean", "sum", "none"]


def rng(seed=0):
    return np.random.default_rng(seed)


def against_torch(loss, grad, torch_loss, torch_input, atol=1e-13):
    torch_loss.sum().backward()
    np.testing.assert_allclose(loss, torch_loss.detach().numpy(), rtol=1e-13, atol=atol)
    np.testing.assert_allclose(grad, torch_input.grad.numpy(), rtol=1e-12, atol=atol)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("leading", [(), (7,), (3, 4), (2, 3, 2)])
def test_cross_entropy_matches_torch(leading, reduction, smoothing):
    torch = pytest.importorskip("torch")
    logits, target = rng().normal(size=(*leading, 5)) * 4, np.asarray(rng(1).integers(0, 5, leading))
    if target.size > 2:
        target.reshape(-1)[1] = -100
    loss, grad = cross_entropy(logits, target, reduction=reduction, label_smoothing=smoothing)
    x = torch.tensor(logits, requires_grad=True)
    other = torch.nn.functional.cross_entropy(
        x.reshape(-1, 5), torch.tensor(target).reshape(-1), reduction=reduction, label_smoothing=smoothing
    )
    against_torch(loss, grad, other.reshape(np.shape(loss)), x)
    assert grad.shape == logits.shape


def test_cross_entropy_is_stable():
    loss, grad = cross_entropy(np.array([[1e30, 0.0], [-1e30, 0.0]], np.float32), np.array([0, 1]))
    assert loss == 0
    np.testing.assert_array_equal(grad, 0)
    loss, _ = cross_entropy(np.array([[1000.0, 0.0]]), np.array([1]))
    assert loss == 1000
    assert loss.dtype == np.float64
    loss, grad = cross_entropy(np.array([[0.0, -np.inf]]), np.array([0]))  # a class that is masked out
    assert loss == 0
    np.testing.assert_array_equal(grad, 0)
    loss, _ = cross_entropy(np.array([[0.0, -np.inf]]), np.array([1]))
    assert loss == np.inf


def test_cross_entropy_float32_accuracy():
    logits, target = (rng().normal(size=(4000, 65)) * 3).astype(np.float32), rng(1).integers(0, 65, 4000)
    loss, grad = cross_entropy(logits, target)
    loss64, grad64 = cross_entropy(logits.astype(np.float64), target)
    assert loss.dtype == grad.dtype == np.float32
    assert abs(loss - loss64) < np.finfo(np.float32).eps * loss64
    assert abs(grad - grad64).max() < 4 * np.finfo(np.float32).eps * abs(grad64).max()


def test_cross_entropy_ignores_even_nan():
    logits = np.array([[1.0, 2.0], [np.nan, np.inf], [3.0, 1.0]])
    target = np.array([0, 1, 1])
    for ignore_index, row in ((-7, np.array([0, -7, 1])), (-100, np.array([0, -100, 1]))):
        loss, grad = cross_entropy(logits, row, ignore_index=ignore_index)
        expected, grad_expected = cross_entropy(logits[[0, 2]], target[[0, 2]])
        assert loss == expected
        np.testing.assert_array_equal(grad[[0, 2]], grad_expected)
        np.testing.assert_array_equal(grad[1], 0)
    loss, grad = cross_entropy(logits, np.array([1, 0, 1]), ignore_index=0)  # a class can be what is ignored
    assert np.isfinite(loss)
    np.testing.assert_array_equal(grad[1], 0)
    _, grad = cross_entropy(logits, target)  # and where it counts, a NaN stays in its row
    assert np.isnan(grad[1]).all()
    assert np.isfinite(grad[[0, 2]]).all()


@pytest.mark.parametrize("size", [0, 3])
def test_cross_entropy_of_nothing_is_as_in_torch(size):
    logits, target = rng().normal(size=(size, 4)), np.full(size, -100)
    loss, grad = cross_entropy(logits, target)
    assert np.isnan(loss)
    np.testing.assert_array_equal(grad, np.zeros((size, 4)))
    assert cross_entropy(logits, target, reduction="sum")[0] == 0
    assert cross_entropy(logits, target, reduction="none")[0].shape == (size,)
    torch = pytest.importorskip("torch")
    x = torch.tensor(logits, requires_grad=True)
    against_torch(loss, grad, torch.nn.functional.cross_entropy(x, torch.tensor(target)), x)


@pytest.mark.parametrize("dtype", ["uint8", "uint64", "int32"])
def test_cross_entropy_takes_any_integer_and_strides(dtype):
    logits = rng().normal(size=(3, 4, 5))
    target = rng(1).integers(0, 5, (4, 3)).astype(dtype)
    loss, grad = cross_entropy(logits.transpose(1, 0, 2), target)
    expected, grad_expected = cross_entropy(np.ascontiguousarray(logits.transpose(1, 0, 2)), target.astype(np.int64))
    assert loss == expected
    np.testing.assert_array_equal(grad, grad_expected)


LOGITS, TARGET = np.zeros((2, 3)), np.array([0, 1])


@pytest.mark.parametrize(
    ("logits", "target", "options", "error", "message"),
    [
        ([[0.0]], TARGET, {}, TypeError, "logits: expected an array"),
        (LOGITS.astype(int), TARGET, {}, TypeError, "logits: expected dtype float32 or float64, got int64"),
        (LOGITS.astype(np.float16), TARGET, {}, TypeError, "logits: expected dtype float32 or float64, got float16"),
        (np.array(1.0), TARGET, {}, ValueError, "logits: expected shape"),
        (np.zeros((2, 0)), TARGET, {}, ValueError, "logits: expected shape"),
        (LOGITS, [0, 1], {}, TypeError, "target: expected a numpy array"),
        (LOGITS, TARGET.astype(float), {}, TypeError, "target: expected an integer dtype, got float64"),
        (LOGITS, TARGET[:1], {}, ValueError, r"target: expected shape \(2,\), got \(1,\)"),
        (LOGITS, TARGET + 2, {}, ValueError, r"target: expected values in \[0, 3\) or -100, got 3"),
        (LOGITS, TARGET - 1, {}, ValueError, r"target: expected values in \[0, 3\) or -100, got -1"),
        (LOGITS, TARGET, {"reduction": "avg"}, ValueError, "reduction: expected 'mean' or 'sum' or 'none', got 'avg'"),
        (LOGITS, TARGET, {"reduction": 1}, ValueError, "reduction"),
        (LOGITS, TARGET, {"label_smoothing": 1.5}, ValueError, "label_smoothing"),
        (LOGITS, TARGET, {"ignore_index": 0.5}, TypeError, "ignore_index"),
    ],
)
def test_cross_entropy_refuses(logits, target, options, error, message):
    with pytest.raises(error, match=message):
        cross_entropy(logits, target, **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(), (4,), (3, 5), (2, 0)])
def test_mse_matches_torch(shape, reduction):
    torch = pytest.importorskip("torch")
    a, b = np.asarray(rng().normal(size=shape)), np.asarray(rng(1).normal(size=shape))
    loss, grad = mse_loss(a, b, reduction=reduction)
    x = torch.tensor(a, requires_grad=True)
    against_torch(loss, grad, torch.nn.functional.mse_loss(x, torch.tensor(b), reduction=reduction), x)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("factors", [(), ("weight",), ("pos_weight",), ("weight", "pos_weight")])
def test_bce_matches_torch(factors, reduction):
    torch = pytest.importorskip("torch")
    logits, target = rng().normal(size=(4, 3, 5)) * 5, rng(1).random((4, 3, 5))
    options = {name: rng(2).random(5) + 0.5 if name == "pos_weight" else rng(3).random((3, 1)) for name in factors}
    loss, grad = bce_with_logits(logits, target, **options, reduction=reduction)
    x = torch.tensor(logits, requires_grad=True)
    tensors = {name: torch.tensor(value) for name, value in options.items()}
    other = torch.nn.functional.binary_cross_entropy_with_logits(
        x, torch.tensor(target), **tensors, reduction=reduction
    )
    against_torch(loss, grad, other, x)


def test_bce_is_stable_and_precise():
    x = np.array([1e4, -1e4, -30.0, 30.0, 0.0], np.float32)
    y = np.array([0.0, 1.0, 0.0, 1.0, 0.5], np.float32)
    loss, grad = bce_with_logits(x, y, reduction="none")
    np.testing.assert_allclose(loss, [1e4, 1e4, 9.357623e-14, 9.357623e-14, 0.6931472], rtol=1e-6)
    np.testing.assert_allclose(grad, [1, -1, 9.357623e-14, -9.357623e-14, 0], rtol=1e-6)


@pytest.mark.parametrize("loss_function", [mse_loss, bce_with_logits])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("steps", [True, False])
def test_masks_select(loss_function, reduction, steps):
    x, y = rng().normal(size=(4, 3, 2)), rng(1).random((4, 3, 2))
    mask = rng(2).random((4, 3) if steps else (4, 3, 2)) < 0.6
    full = np.broadcast_to(mask[..., None], x.shape) if steps else mask
    x[~full] = np.nan
    y[~full] = np.inf
    loss, grad = loss_function(x, y, mask=mask, reduction=reduction)
    expected, grad_expected = loss_function(x[full], y[full], reduction=reduction)
    np.testing.assert_allclose(loss[full] if reduction == "none" else loss, expected, rtol=1e-14)
    np.testing.assert_allclose(grad[full], grad_expected, rtol=1e-14)
    np.testing.assert_array_equal(grad[~full], 0)
    if reduction == "none":
        np.testing.assert_array_equal(loss[~full], 0)


@pytest.mark.parametrize("loss_function", [mse_loss, bce_with_logits])
def test_all_masked_is_nan_with_zero_gradient(loss_function):
    x, mask = np.ones((2, 3)), np.zeros(2, bool)
    loss, grad = loss_function(x, x, mask=mask)
    assert np.isnan(loss)
    np.testing.assert_array_equal(grad, 0)
    assert loss_function(x, x, mask=mask, reduction="sum")[0] == 0


@pytest.mark.parametrize("loss_function", [mse_loss, bce_with_logits])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradient_by_finite_differences(loss_function, reduction):
    x, y = rng().normal(size=(3, 2)), rng(1).random((3, 2))
    _, grad = loss_function(x, y, reduction=reduction)
    for i in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[i] = 1e-6
        above, below = (loss_function(x + s, y, reduction=reduction)[0] for s in (step, -step))
        assert abs((above - below) / 2e-6 - grad[i]) < 1e-8


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target": np.zeros((2, 3), np.float32)}, TypeError, "target: expected dtype float64, got float32"),
        ({"target": np.zeros((2, 3), int)}, TypeError, "target: expected dtype float64, got int64"),
        ({"target": np.zeros((2, 1))}, ValueError, r"target: expected shape \(2, 3\), got \(2, 1\)"),
        ({"mask": np.ones((2, 3))}, TypeError, "mask: expected dtype bool, got float64"),
        ({"mask": np.ones(3, bool)}, ValueError, r"mask: expected shape \(2,\), got \(3,\)"),
        ({"mask": np.ones((2, 2), bool)}, ValueError, r"mask: expected shape \(2, 3\), got \(2, 2\)"),
        ({"mask": [True]}, TypeError, "mask: expected a numpy array"),
        ({"reduction": None}, ValueError, "reduction"),
    ],
)
@pytest.mark.parametrize("loss_function", [mse_loss, bce_with_logits])
def test_pair_losses_refuse(loss_function, change, error, message):
    arguments = {"target": np.zeros((2, 3)), **change}
    with pytest.raises(error, match=message):
        loss_function(np.zeros((2, 3)), **arguments)


def test_bce_refuses_factors():
    x = np.zeros((2, 3))
    with pytest.raises(ValueError, match=r"pos_weight: expected a shape that broadcasts to \(2, 3\), got \(2,\)"):
        bce_with_logits(x, x, pos_weight=np.ones(2))
    with pytest.raises(TypeError, match="weight: expected dtype float64, got float32"):
        bce_with_logits(x, x, weight=np.ones(3, np.float32))


def test_inputs_are_left_alone():
    x, y, target = rng().normal(size=(3, 2)), rng(1).random((3, 2)), np.array([0, 1, -100])
    kept = x.copy(), y.copy(), target.copy()
    cross_entropy(x, target)
    mse_loss(x, y)
    bce_with_logits(x, y)
    for now, then in zip((x, y, target), kept, strict=False):
        np.testing.assert_array_equal(now, then)
