"""Optimisers against PyTorch step by step in float64, their state, and all-or-nothing failures."""

import json

import numpy as np
import pytest

from rnnfast.base import Parameter
from rnnfast.layers import Linear
from rnnfast.optim import SGD, Adam, AdamW, RMSprop

SHAPES = [(3, 4), (5,), (), (2, 0)]

CASES = [
    (SGD, {"lr": 0.1}),
    (SGD, {"lr": 0.1, "weight_decay": 0.3}),
    (SGD, {"lr": 0.1, "momentum": 0.9}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.4, "weight_decay": 0.1}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (RMSprop, {}),
    (RMSprop, {"lr": 0.05, "alpha": 0.8, "eps": 1e-4, "weight_decay": 0.2}),
    (RMSprop, {"centered": True}),
    (RMSprop, {"centered": True, "momentum": 0.7, "weight_decay": 0.1}),
    (RMSprop, {"momentum": 0.7}),
    (Adam, {}),
    (Adam, {"lr": 0.02, "betas": (0.5, 0.7), "eps": 1e-3, "weight_decay": 0.1}),
    (Adam, {"amsgrad": True}),
    (AdamW, {}),
    (AdamW, {"lr": 0.05, "weight_decay": 0.3, "amsgrad": True, "betas": (0.8, 0.9)}),
]
IDS = [f"{kind.__name__}-{'-'.join(options) or 'default'}" for kind, options in CASES]


def parameters(dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    return [Parameter(np.asarray(rng.normal(size=shape)).astype(dtype), f"p{i}") for i, shape in enumerate(SHAPES)]


def set_gradients(ours, step, theirs=None):
    """New gradients for each step; some parameters have none in some steps."""
    rng = np.random.default_rng(100 + step)
    for i, p in enumerate(ours):
        gradient = np.asarray(rng.normal(size=p.shape) * 10.0 ** rng.integers(-3, 2)).astype(p.dtype)
        p.grad = None if (i + step) % 5 == 4 else gradient
        if theirs is not None:
            import torch

            theirs[i].grad = None if p.grad is None else torch.tensor(gradient)


def snapshot(ours, optimiser):
    return [p.data.copy() for p in ours], optimiser.state_dict()


def assert_same(a, b):
    for x, y in zip(a[0], b[0], strict=False):
        np.testing.assert_array_equal(x, y)
    assert a[1].keys() == b[1].keys()
    for key, value in a[1].items():
        np.testing.assert_array_equal(value, b[1][key])


@pytest.mark.parametrize(("kind", "options"), CASES, ids=IDS)
@pytest.mark.parametrize("schedule", [False, True])
def test_steps_match_torch(kind, options, schedule):
    torch = pytest.importorskip("torch")
    ours = parameters()
    theirs = [torch.nn.Parameter(torch.tensor(p.data)) for p in ours]
    optimiser, other = kind(ours, **options), getattr(torch.optim, kind.__name__)(theirs, **options)
    for step in range(25):
        set_gradients(ours, step, theirs)
        lr = 0.3 / (1 + step) if schedule else None
        if schedule:
            other.param_groups[0]["lr"] = lr
        optimiser.step(lr)
        other.step()
        for p, q in zip(ours, theirs, strict=False):
            np.testing.assert_allclose(p.data, q.detach().numpy(), rtol=1e-12, atol=1e-12)
    assert optimiser.lr == options.get("lr", kind(ours).lr)


@pytest.mark.parametrize(("kind", "options"), CASES, ids=IDS)
def test_float32_stays_float32(kind, options):
    ours, wide = parameters(np.float32), parameters(np.float64)
    optimiser, other = kind(ours, **options), kind(wide, **options)
    arrays = [p.data for p in ours]
    for step in range(5):
        set_gradients(ours, step)
        set_gradients(wide, step)
        gradients = [None if p.grad is None else p.grad.copy() for p in ours]
        optimiser.step(np.float64(0.01))
        other.step(0.01)
        for p, gradient in zip(ours, gradients, strict=False):
            assert gradient is None or np.array_equal(p.grad, gradient)
    for p, q, array in zip(ours, wide, arrays, strict=False):
        assert p.data is array
        assert p.data.dtype == np.float32
        np.testing.assert_allclose(p.data, q.data, rtol=1e-4, atol=1e-4)
    slots = [v for v in optimiser.state_dict().values() if isinstance(v, np.ndarray)]
    assert all(v.dtype == np.float32 for v in slots)


@pytest.mark.parametrize(("kind", "options"), CASES, ids=IDS)
def test_state_resumes_exactly(kind, options):
    ours = parameters()
    optimiser = kind(ours, **options)
    for step in range(3):
        set_gradients(ours, step)
        optimiser.step()
    state = optimiser.state_dict()
    scalars = {k: v for k, v in state.items() if not isinstance(v, np.ndarray)}
    stored = {**{k: v.copy() for k, v in state.items() if isinstance(v, np.ndarray)}, **json.loads(json.dumps(scalars))}
    twins = parameters()
    for p, q in zip(ours, twins, strict=False):
        q.data[...] = p.data
    other = kind(twins, lr=123.0)
    other.load_state_dict(stored)
    assert other.lr == optimiser.lr
    assert repr(other) == repr(optimiser)
    for step in range(3, 8):
        for these, this in ((ours, optimiser), (twins, other)):
            set_gradients(these, step)
            this.step()
    assert_same(snapshot(ours, optimiser), snapshot(twins, other))
    for value in stored.values():  # what was loaded was copied
        assert not any(
            isinstance(value, np.ndarray) and np.shares_memory(value, v)
            for s in other._state
            for v in s.values()
            if isinstance(v, np.ndarray)
        )


def test_state_dict_is_flat():
    p = Parameter(np.zeros(2))
    optimiser = Adam([p])
    empty = optimiser.state_dict()
    assert empty == {
        "optimizer": "Adam",
        "num_parameters": 1,
        "lr": 1e-3,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "amsgrad": False,
    }
    p.grad = np.ones(2)
    optimiser.step()
    assert set(optimiser.state_dict()) - set(empty) == {"0.step", "0.exp_avg", "0.exp_avg_sq"}
    optimiser.load_state_dict(empty)  # back to before the first step
    assert optimiser.state_dict() == empty


def stepped():
    ours = [Parameter(np.zeros(2)), Parameter(np.zeros((2, 2)))]
    for p in ours:
        p.grad = np.ones(p.shape)
    optimiser = Adam(ours)
    optimiser.step()
    return ours, optimiser


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"optimizer": "SGD"}, ValueError, r"state\['optimizer'\]: expected 'Adam', got 'SGD'"),
        ({"num_parameters": 3}, ValueError, r"state\['num_parameters'\]: expected 2, got 3"),
        ({"lr": -1.0}, ValueError, "lr: expected a finite number, at least 0, got -1"),
        ({"lr": None}, TypeError, "lr"),
        ({"beta2": 1.0}, ValueError, "beta2: expected a finite number, at least 0 and below 1"),
        ({"amsgrad": 1}, TypeError, "amsgrad: expected a bool"),
        ({"beta1": ...}, KeyError, "missing .*beta1"),
        ({"1.step": ...}, KeyError, "missing .*1.step"),
        ({"1.step": 0}, ValueError, "1.step'.: expected at least 1"),
        ({"1.step": 1.5}, TypeError, "1.step"),
        ({"2.step": 1}, KeyError, "unexpected .*2.step"),
        ({"momentum": 1.0}, KeyError, "unexpected .*momentum"),
        ({"1.exp_avg": np.zeros(2)}, ValueError, r"1.exp_avg'.: expected shape \(2, 2\), got \(2,\)"),
        ({"1.exp_avg": np.zeros((2, 2), np.float32)}, TypeError, "1.exp_avg'.: expected dtype float64, got float32"),
        ({"1.exp_avg": [0.0]}, TypeError, "1.exp_avg'.: expected a numpy array"),
    ],
)
def test_failed_load_changes_nothing(changes, error, message):
    ours, optimiser = stepped()
    before = snapshot(ours, optimiser)
    state = {**optimiser.state_dict(), "lr": 0.5, "0.exp_avg": np.full(2, 7.0), **changes}
    state = {key: value for key, value in state.items() if value is not ...}
    with pytest.raises(error, match=message):
        optimiser.load_state_dict(state)
    assert_same(before, snapshot(ours, optimiser))
    with pytest.raises(TypeError, match="state: expected a mapping"):
        optimiser.load_state_dict([1])


def read_only(p):
    p.data.flags.writeable = False


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda p: setattr(p, "grad", np.ones(2)), ValueError, r"parameters\[1\] \(b\).grad: expected shape"),
        (
            lambda p: setattr(p, "grad", np.ones((2, 2), np.float32)),
            TypeError,
            "grad: expected dtype float64, got float32",
        ),
        (lambda p: setattr(p, "grad", [[1.0, 1.0]] * 2), TypeError, "grad: expected a numpy array"),
        (lambda p: setattr(p, "data", np.zeros((2, 2), int)), TypeError, r"parameters\[1\] \(b\): expected dtype"),
        (lambda p: setattr(p, "data", np.zeros((2, 2), np.float32)), TypeError, "expected dtype float32, got float64"),
        (lambda p: setattr(p, "data", np.zeros((3, 2))), ValueError, r"grad: expected shape \(3, 2\)"),
        (read_only, ValueError, r"parameters\[1\] \(b\): expected a writable array"),
    ],
)
def test_failed_step_changes_nothing(spoil, error, message):
    ours, optimiser = stepped()
    ours[1].name = "b"
    before = ours[0].data.copy(), optimiser.state_dict()
    spoil(ours[1])
    with pytest.raises(error, match=message):
        optimiser.step()
    np.testing.assert_array_equal(ours[0].data, before[0])
    for key, value in optimiser.state_dict().items():
        np.testing.assert_array_equal(value, before[1][key])


@pytest.mark.parametrize("lr", [-1.0, np.nan, np.inf, "0.1", True, np.ones(1)])
def test_bad_lr(lr):
    ours, optimiser = stepped()
    before = snapshot(ours, optimiser)
    with pytest.raises((ValueError, TypeError), match="lr: expected"):
        optimiser.step(lr)
    assert_same(before, snapshot(ours, optimiser))
    with pytest.raises((ValueError, TypeError), match="lr: expected"):
        SGD(ours, lr)
    optimiser.lr = lr
    with pytest.raises((ValueError, TypeError), match="lr: expected"):
        optimiser.step()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: SGD([]), ValueError, "parameters: expected at least one, got none"),
        (lambda p: SGD(p), TypeError, "parameters: expected an iterable of Parameters, got Parameter"),
        (lambda p: SGD(Linear(2, 2)), TypeError, "parameters: expected an iterable of Parameters, got Linear"),
        (lambda p: SGD(3), TypeError, "parameters: .* got int"),
        (lambda p: SGD([p, p.data]), TypeError, r"parameters\[1\]: expected a Parameter, got ndarray"),
        (lambda p: SGD([Parameter(np.zeros(2, int))]), TypeError, r"parameters\[0\]: expected dtype"),
        (lambda p: SGD([p], momentum=-0.1), ValueError, "momentum"),
        (lambda p: SGD([p], nesterov=True), ValueError, "nesterov: expected a momentum and no dampening"),
        (lambda p: SGD([p], momentum=0.9, dampening=0.1, nesterov=True), ValueError, "nesterov"),
        (lambda p: SGD([p], nesterov="yes"), TypeError, "nesterov: expected a bool"),
        (lambda p: RMSprop([p], alpha=-1), ValueError, "alpha"),
        (lambda p: RMSprop([p], eps=-1), ValueError, "eps"),
        (lambda p: Adam([p], betas=(0.9,)), ValueError, "betas: expected two numbers"),
        (lambda p: Adam([p], betas=(1.0, 0.9)), ValueError, "beta1: expected"),
        (lambda p: AdamW([p], weight_decay=-1), ValueError, "weight_decay"),
    ],
)
def test_constructors_refuse(make, error, message):
    with pytest.raises(error, match=message):
        make(Parameter(np.zeros(2)))


def test_tied_parameters_step_once_and_zero_grad():
    p = Parameter(np.zeros(1))
    optimiser = SGD(iter([p, p]), lr=1.0)
    p.grad = np.ones(1)
    optimiser.step()
    assert p.data[0] == -1.0
    optimiser.zero_grad()
    assert p.grad is None
    optimiser.step()
    assert p.data[0] == -1.0


def test_centered_rmsprop_survives_a_constant_gradient():
    p = Parameter(np.zeros(3))
    optimiser = RMSprop([p], centered=True, alpha=0.5)
    for _ in range(500):
        p.grad = np.array([0.1, 1 / 3, 1e-5])
        optimiser.step(1e-12)
    assert np.isfinite(p.data).all()


def test_amsgrad_can_be_switched_on_later():
    ours, optimiser = stepped()
    optimiser.amsgrad = True
    optimiser.step()
    assert "0.max_exp_avg_sq" in optimiser.state_dict()
    assert ours[0].data.shape == (2,)


def test_large_gradients_warn_of_nothing(recwarn):
    p = Parameter(np.zeros(2, np.float32))
    optimiser = Adam([p])
    p.grad = np.array([1e30, np.nan], np.float32)
    optimiser.step()
    assert not recwarn.list
