"""PyTorch's own module database, run with torch.nn's recurrent classes replaced by ours, and gradient checks.

`torch.testing._internal.common_modules.module_db` holds, for every class of torch.nn, constructor arguments, inputs,
references and inputs that must raise. These are what PyTorch's CI runs its module tests on; the tests below do with
ours what those do with torch.nn's.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

from torch_cases import (
    leaves,
    no_kernel,  # noqa: F401
    requiring_grad,
    rt,
    scalar,
    strict,  # noqa: F401
    torch,
)

pytest.importorskip("expecttest", reason="torch.testing's module database needs expecttest")
common_modules = pytest.importorskip("torch.testing._internal.common_modules")

NAMES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
CLASSES = {getattr(torch.nn, name): getattr(rt, name) for name in NAMES}
ENTRIES = [info for info in common_modules.module_db if info.module_cls in CLASSES]


def samples(info: Any, training: bool = True, requires_grad: bool = True, packed: bool = True) -> list[Any]:
    keywords = {"with_packed_sequence": packed} if info.module_cls in (torch.nn.RNN, torch.nn.GRU) else {}
    return list(
        info.module_inputs_func(
            info, device="cpu", dtype=torch.float64, requires_grad=requires_grad, training=training, **keywords
        )
    )


def build(info: Any, sample: Any, training: bool = True, ours: bool = True) -> Any:
    torch.manual_seed(0)
    kind = CLASSES[info.module_cls] if ours else info.module_cls
    arguments = sample.constructor_input
    return kind(*arguments.args, **arguments.kwargs, dtype=torch.float64).train(training)


def entry(function: Any) -> Any:
    return pytest.mark.parametrize("info", ENTRIES, ids=lambda info: info.name)(function)


def test_all_six_classes_are_in_the_database(no_kernel):  # noqa: F811
    assert {info.module_cls for info in ENTRIES} == set(CLASSES)


@entry
@pytest.mark.parametrize("training", [True, False])
def test_forward(info, training):
    for sample in samples(info, training):
        arguments, keywords = sample.forward_input.args, sample.forward_input.kwargs
        module = build(info, sample, training)
        results = leaves(module(*arguments, **keywords))
        torch.testing.assert_close(
            results, leaves(build(info, sample, training, ours=False)(*arguments, **keywords)), rtol=1e-12, atol=1e-13
        )
        if sample.reference_fn is not None and not isinstance(arguments[0], torch.nn.utils.rnn.PackedSequence):
            expected = sample.reference_fn(module, *arguments, **keywords)
            torch.testing.assert_close(results, leaves(expected))


def some(inputs: list[Any], count: int) -> list[Any]:
    """About `count` of them, from all of the list."""
    return inputs[:: max(1, len(inputs) // count | 1)]  # an odd stride meets both values of the options that alternate


@entry
def test_gradients(info):
    """gradcheck over inputs, states and weights."""
    for sample in some(samples(info), 12):
        function, inputs = as_function(build(info, sample), sample)
        assert torch.autograd.gradcheck(function, inputs)


@entry
def test_gradients_of_gradients(info):
    for sample in some(samples(info), 4):
        function, inputs = as_function(build(info, sample), sample)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def as_function(module: Any, sample: Any) -> tuple[Any, tuple[Any, ...]]:
    """The call as a function of all tensors that may have a gradient."""
    arguments = sample.forward_input.args
    names = [name for name, _ in module.named_parameters()]
    tensors = leaves(list(arguments))

    def function(*all_tensors: Any) -> tuple[Any, ...]:
        rest = iter(all_tensors)
        rebuilt = [rebuild(argument, rest) for argument in arguments]
        weights = dict(zip(names, rest, strict=True))
        return tuple(leaves(torch.func.functional_call(module, weights, tuple(rebuilt))))

    return function, tuple(requiring_grad(t) for t in [*tensors, *module.parameters()])


def rebuild(argument: Any, tensors: Any) -> Any:
    if argument is None:
        return None
    if isinstance(argument, torch.nn.utils.rnn.PackedSequence):
        return argument._replace(data=next(tensors))
    if isinstance(argument, tuple):
        return tuple(rebuild(element, tensors) for element in argument)
    return next(tensors)


@entry
def test_strided_inputs(info):
    for sample in samples(info, packed=False):
        module = build(info, sample)
        arguments = sample.forward_input.args
        strided = [make_strided(argument) for argument in arguments]
        found, expected = module(*strided), module(*arguments)
        torch.testing.assert_close(leaves(found), leaves(expected))
        weights = list(module.parameters())
        for a, b in zip(*(torch.autograd.grad(scalar(r), weights) for r in (found, expected)), strict=True):
            torch.testing.assert_close(a, b)


def make_strided(argument: Any) -> Any:
    if isinstance(argument, tuple):
        return tuple(map(make_strided, argument))
    return torch.stack([argument.detach(), argument.detach()], -1)[..., 0].requires_grad_()


@entry
def test_pickle_repr_state_and_copies(info):
    for sample in samples(info)[:6]:
        module, theirs = build(info, sample), build(info, sample, ours=False)
        assert repr(module) == repr(theirs)
        arguments = sample.forward_input.args
        expected = leaves(module(*arguments))
        other = build(info, sample)
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
        other.load_state_dict(theirs.state_dict())
        for same in (other, pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
            torch.testing.assert_close(leaves(same(*arguments)), expected)


@entry
def test_errors(info, no_kernel):  # noqa: F811
    inputs = info.module_error_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=False, training=True)
    for wrong in inputs:
        sample = wrong.module_error_input
        if wrong.error_on is common_modules.ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(wrong.error_type, match=wrong.error_regex):
                CLASSES[info.module_cls](*sample.constructor_input.args, **sample.constructor_input.kwargs)
        else:
            arguments = sample.constructor_input
            module = CLASSES[info.module_cls](*arguments.args, **{"dtype": torch.float64, **arguments.kwargs})
            with pytest.raises(wrong.error_type, match=wrong.error_regex):
                module(*sample.forward_input.args, **sample.forward_input.kwargs)


# ---- gradient checks of what torch.nn does not have ----


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_gradients_with_lengths_resets_and_all_states(kind):
    layer = getattr(rt, kind)(2, 3, 2, bidirectional=True).double()
    shape = (4, 2, 3)
    h, r = torch.randn(shape, dtype=torch.float64), torch.randn(4, 1, 3, dtype=torch.float64)
    states = [h, h + 1, r, r + 1] if kind == "LSTM" else [h, r]
    lengths, reset = torch.tensor([4, 2]), torch.tensor([[0, 1], [0, 0], [1, 0], [0, 0]])

    def function(x: Any, *rest: Any) -> Any:
        hx, start = (rest[:2], rest[2:]) if kind == "LSTM" else rest
        return tuple(leaves(layer(x, hx, lengths=lengths, reset=reset, reset_state=start, return_states=True)))

    inputs = requiring_grad((torch.randn(4, 2, 2, dtype=torch.float64), *states))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_gradients_under_dropout():
    layer = rt.GRU(2, 3, 3, dropout=0.5).double()

    def function(x: Any) -> Any:
        torch.manual_seed(0)
        return layer(x)

    x = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x, fast_mode=True)


def test_third_derivative():
    layers = [cls(2, 3).double() for cls in (torch.nn.GRU, rt.GRU)]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(3, 1, 2, dtype=torch.float64, requires_grad=True)
    found = []
    for layer in layers:
        g = layer(x)[0].square().sum()
        for _ in range(3):
            (g,) = torch.autograd.grad(g, x, create_graph=True)
            g = g.square().sum()
        found.append(g)
    torch.testing.assert_close(found[0], found[1])


def test_gradient_penalty_trains_the_weights():
    """The gradient's norm as a loss: first derivatives by the engine, second ones into the weights."""
    layers = [cls(2, 3).double() for cls in (torch.nn.LSTM, rt.LSTM)]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    for layer in layers:
        (g,) = torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
        g.square().sum().backward(inputs=list(layer.parameters()))
    for p, q in zip(*(layer.parameters() for layer in layers), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
