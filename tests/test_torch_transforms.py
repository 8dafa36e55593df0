"""torch.func, torch.compile, torch.export, the operators behind them; what is refused instead of answered by zeros."""

from __future__ import annotations

from typing import Any

import pytest

from rnnfast import functional
from rnnfast.explain import explain
from torch_cases import (
    engine,  # noqa: F401
    leaves,
    no_kernel,  # noqa: F401
    requiring_grad,
    rt,
    strict,  # noqa: F401
    torch,
)

pytestmark = pytest.mark.usefixtures("engine")

forward_ad = torch.autograd.forward_ad
functional_call, vmap, grad = torch.func.functional_call, torch.func.vmap, torch.func.grad


def parameters(module: Any) -> dict[str, Any]:
    return {name: p.detach() for name, p in module.named_parameters()}


def loss_of(module: Any) -> Any:
    return lambda weights, x: sum(r.square().sum() for r in leaves(functional_call(module, weights, (x,))))


# ---- torch.func ----


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "GRUCell"])
def test_per_sample_gradients(kind):
    cell = kind.endswith("Cell")
    module = getattr(rt, kind)(3, 4, **({} if cell else {"num_layers": 2})).double()
    samples = torch.randn(6, 2, 3, dtype=torch.float64) if cell else torch.randn(6, 5, 2, 3, dtype=torch.float64)
    before = functional.kernel_calls()
    found = vmap(grad(loss_of(module)), in_dims=(None, 0))(parameters(module), samples)
    assert functional.kernel_calls() == before + 12  # one forward and one backward for each sample, nothing twice
    for i, sample in enumerate(samples):
        loss = loss_of(module)(dict(module.named_parameters()), sample)
        expected = torch.autograd.grad(loss, list(module.parameters()))
        for name, e in zip(found, expected, strict=True):
            torch.testing.assert_close(found[name][i], e)


def test_per_sample_gradients_with_lengths_and_dropout():
    layer = rt.LSTM(3, 4, 2, dropout=0.5).double()
    x, lengths = torch.randn(4, 5, 2, 3, dtype=torch.float64), torch.randint(0, 6, (4, 2))

    def loss(weights: Any, x: Any, lengths: Any) -> Any:
        return functional_call(layer, weights, (x,), {"lengths": lengths})[0].square().sum()

    with pytest.raises(RuntimeError, match="randomness"):
        vmap(grad(loss), in_dims=(None, 0, 0))(parameters(layer), x, lengths)
    found = vmap(grad(loss), in_dims=(None, 0, 0), randomness="different")(parameters(layer), x, lengths)
    assert found["weight_hh_l1"].shape == (4, 16, 4)
    layer.eval()
    found = vmap(grad(loss), in_dims=(None, 0, 0))(parameters(layer), x, lengths)
    expected = grad(loss)(parameters(layer), x[2], lengths[2])
    torch.testing.assert_close({k: v[2] for k, v in found.items()}, expected)


def test_an_ensemble():
    """Weights with a batch axis: one call for each model."""
    models = [rt.GRU(3, 4) for _ in range(3)]
    weights, _ = torch.func.stack_module_state(models)
    x = torch.randn(5, 2, 3)
    found = vmap(lambda w: functional_call(models[0], w, (x,)))(weights)
    for i, model in enumerate(models):
        torch.testing.assert_close(found[0][i], model(x)[0])
        torch.testing.assert_close(found[1][i], model(x)[1])


def test_nested_transforms():
    layer = rt.GRU(2, 3).double()
    x = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)
    nested = vmap(vmap(grad(loss_of(layer)), in_dims=(None, 0)), in_dims=(None, 0))(parameters(layer), x)
    expected = grad(loss_of(layer))(parameters(layer), x[1, 2])
    torch.testing.assert_close({k: v[1, 2] for k, v in nested.items()}, expected)


def test_second_derivatives_by_torch_func():
    ours, theirs = rt.GRU(2, 3).double(), torch.nn.GRU(2, 3).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 1, 2, dtype=torch.float64)

    def hessian_in_x(module: Any) -> Any:
        loss = loss_of(module)
        return torch.func.jacrev(torch.func.jacrev(lambda x: loss(parameters(module), x)))(x)

    torch.testing.assert_close(hessian_in_x(ours), hessian_in_x(theirs))
    # the Hessian of a loss in the weights, for each sample of a batch
    samples = torch.randn(2, 3, 1, 2, dtype=torch.float64)

    def loss(module: Any, bias: Any, x: Any) -> Any:
        return loss_of(module)({**parameters(module), "bias_hh_l0": bias}, x)

    bias = ours.bias_hh_l0.detach()
    hessians = vmap(lambda x: torch.func.jacrev(grad(lambda b: loss(ours, b, x)))(bias))(samples)
    direct = torch.autograd.functional.hessian(lambda b: loss(theirs, b, samples[1]), bias)
    torch.testing.assert_close(hessians[1], direct)


# ---- forward mode: refused in every way to ask for it ----


def by_jvp(function: Any, x: Any) -> Any:
    return torch.func.jvp(function, (x,), (x,))


def by_jacfwd(function: Any, x: Any) -> Any:
    return torch.func.jacfwd(function)(x)


def by_hessian(function: Any, x: Any) -> Any:
    return torch.func.hessian(lambda x: function(x).sum())(x)


def by_dual_numbers(function: Any, x: Any) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, x))).tangent


def by_dual_numbers_without_grad(function: Any, x: Any) -> Any:
    with torch.no_grad():
        return by_dual_numbers(function, x)


def by_linearize(function: Any, x: Any) -> Any:
    return torch.func.linearize(function, x)[1](x)


def by_compiled_jvp(function: Any, x: Any) -> Any:
    return torch.compile(lambda x: by_jvp(function, x), backend="eager")(x)


WAYS = [by_jvp, by_jacfwd, by_hessian, by_dual_numbers, by_dual_numbers_without_grad, by_linearize, by_compiled_jvp]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("weights_require_grad", [False, True])
def test_forward_mode_raises(way, weights_require_grad, no_kernel):  # noqa: F811
    layer = rt.LSTM(3, 4).requires_grad_(weights_require_grad)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"forward-mode|forward mode AD|jvp"):
        way(lambda x: layer(x)[0], torch.randn(5, 2, 3))


def test_forward_mode_through_the_operator_itself_raises(no_kernel):  # noqa: F811
    with forward_ad.dual_level():
        x = torch.randn(5, 2, 3)
        arguments = operator_arguments("lstm", requires_grad=False)
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.ops.rnnfast.stack(forward_ad.make_dual(x, x), *arguments[1:])


def test_forward_mode_elsewhere_does_no_harm():
    layer, x = rt.GRU(3, 4), torch.randn(5, 2, 3)
    with forward_ad.dual_level():
        forward_ad.make_dual(torch.randn(2), torch.randn(2))
        assert torch.equal(layer(x)[0], layer(x)[0])


# ---- the operators ----


def operator_arguments(cell: str, requires_grad: bool = True, **options: Any) -> tuple[Any, ...]:
    layer = getattr(rt, {"lstm": "LSTM", "gru": "GRU"}[cell])(3, 4, 2, **options).double()
    h = torch.randn(2, 2, 4, dtype=torch.float64)
    tensors = [torch.randn(5, 2, 3, dtype=torch.float64), h, h + 1 if cell == "lstm" else None]
    start = [h[:, :1] - 1, h[:, :1] + 2 if cell == "lstm" else None]
    if requires_grad:
        tensors, start = requiring_grad(tensors), requiring_grad(start)
    weights = [p.detach().requires_grad_(requires_grad) for p in layer.parameters()]
    extras = (torch.tensor([5, 3]), torch.rand(5, 2) < 0.3, torch.tensor(7) if options.get("dropout") else None)
    dropout = options.get("dropout", 0.0)
    return (*tensors, *start, weights, *extras, cell, 2, False, False, dropout, True, False, 0, False)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_opcheck(cell, requires_grad):
    arguments = operator_arguments(cell, requires_grad, **({"dropout": 0.5} if requires_grad else {}))
    torch.library.opcheck(torch.ops.rnnfast.stack.default, arguments)


def test_opcheck_backward():
    arguments = operator_arguments("lstm", requires_grad=False)
    output, hn, cn, h_all, c_all, token = torch.ops.rnnfast.stack(*arguments[:-1], True)
    grads = [torch.randn_like(t) for t in (output, hn, cn, h_all, c_all)]
    everything = (*requiring_grad(grads), *arguments[:-1], output, token, [True] * 13)
    torch.library.opcheck(
        torch.ops.rnnfast.stack_backward.default,
        everything,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_operator_backward_reads_the_memory_it_is_given():
    """A compiler may have used the forward's memory again: what counts are the arguments of the backward."""
    arguments = list(operator_arguments("lstm", requires_grad=False))
    output, *_, token = torch.ops.rnnfast.stack(*arguments[:-1], True)
    grads = (torch.randn_like(output), None, None, None, None)

    def backward(arguments: list[Any], output: Any, token: Any) -> list[Any]:
        return torch.ops.rnnfast.stack_backward(*grads, *arguments[:-1], output, token, [True] * 13)

    expected = backward(arguments, output, torch.zeros(8, dtype=torch.uint8))  # no context: runs the forward again
    moved = [t.clone() if isinstance(t, torch.Tensor) else t for t in arguments]
    moved[5] = [w.clone() for w in arguments[5]]
    moved_output = output.clone()
    for t in (*leaves(arguments[:6]), output):
        t.fill_(float("nan"))
    for t in arguments[6:8]:  # lengths, resets
        t.zero_()
    before = functional.kernel_calls()
    found = backward(moved, moved_output, token)
    assert functional.kernel_calls() == before + 1
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    # used up now, so again by another forward
    again = backward(moved, moved_output, token)
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


# ---- torch.compile and torch.export ----


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_compiles_without_a_graph_break(kind):
    torch._dynamo.reset()
    layer = getattr(rt, kind)(3, 4, 2, bidirectional=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 2, 3, requires_grad=True)
    found, expected = (
        [*leaves(results), *torch.autograd.grad(results[0].square().sum(), [x, *layer.parameters()])]
        for results in (compiled(x), layer(x))
    )
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x)[0], layer(x)[0])


class Tagger(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 3)
        self.lstm = rt.LSTM(3, 4, 2, batch_first=True, dropout=0.5)
        self.out = torch.nn.Linear(4, 5)

    def forward(self, tokens: Any, lengths: Any) -> Any:
        reset = tokens == 0
        return self.out(self.lstm(self.embedding(tokens), lengths=lengths, reset=reset)[0])


def test_compiles_a_model_with_lengths_and_resets():
    torch._dynamo.reset()
    model = Tagger().eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens, lengths = torch.randint(0, 11, (2, 5)), torch.tensor([5, 3])
    before = functional.kernel_calls()
    grads = torch.autograd.grad(compiled(tokens, lengths).square().sum(), list(model.parameters()))
    assert functional.kernel_calls() == before + 2  # the forward's context is found again
    expected = torch.autograd.grad(model(tokens, lengths).square().sum(), list(model.parameters()))
    torch.testing.assert_close(grads, expected)
    model.train()
    compiled(tokens, lengths).square().sum().backward()  # dropout draws its seed inside of the graph


def test_compiles_with_inductor():
    torch._dynamo.reset()
    layer, x = rt.GRU(3, 4), torch.randn(5, 2, 3)
    compiled = torch.compile(layer, fullgraph=True)
    found = torch.autograd.grad(compiled(x)[0].sum(), list(layer.parameters()))
    torch.testing.assert_close(found, torch.autograd.grad(layer(x)[0].sum(), list(layer.parameters())))


def test_exports():
    model = Tagger().eval()
    tokens, lengths = torch.randint(0, 11, (2, 5)), torch.tensor([5, 3])
    batch, steps = torch.export.Dim("batch", min=1), torch.export.Dim("steps", min=1)
    program = torch.export.export(model, (tokens, lengths), dynamic_shapes=({0: batch, 1: steps}, {0: batch}))
    assert "rnnfast.stack" in str(program.graph)
    other = torch.randint(0, 11, (4, 7)), torch.tensor([2, 7, 0, 3])
    torch.testing.assert_close(program.module()(*other), model(*other))


def test_traces():
    layer, x = rt.GRU(3, 4), torch.randn(5, 2, 3)
    traced = torch.jit.trace(layer, (x,), check_trace=False)
    torch.testing.assert_close(traced(2 * x)[0], layer(2 * x)[0])


def test_fake_tensors(no_kernel):  # noqa: F811
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer = rt.LSTM(3, 4, 2, proj_size=2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        output, (hn, cn) = layer(torch.randn(5, 2, 3))
    assert (output.shape, hn.shape, cn.shape) == ((5, 2, 2), (2, 2, 2), (2, 2, 4))


HERE = [torch.float32, torch.float16, torch.bfloat16]


def on_a_fake_device(kind: str, dtype: Any, **options: Any) -> tuple[Any, Any]:
    """A module and its input; PyTorch's initialisation would ask for the device itself."""
    module = getattr(rt, kind)(3, 4, **options, device="meta", dtype=dtype)
    for name, p in list(module.named_parameters()):
        setattr(module, name, torch.nn.Parameter(torch.empty_like(p, device="cuda"), requires_grad=False))
    return module, torch.empty(*([] if kind.endswith("Cell") else [5]), 2, 3, device="cuda", dtype=dtype)


@pytest.mark.parametrize("dtype", HERE)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "LSTMCell"])
def test_fake_tensors_on_a_device(kind, dtype, no_kernel):  # noqa: F811
    """Shapes, dtypes and devices as of the real thing on the CPU; no device needs to be there."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    options = {} if kind == "LSTMCell" else {"num_layers": 2, "bidirectional": True}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        layer, x = on_a_fake_device(kind, dtype, **options)
        results = leaves(layer(x))
    expected = leaves(getattr(torch.nn, kind)(3, 4, **options)(torch.randn(x.shape)))
    assert [r.shape for r in results] == [r.shape for r in expected]
    assert {(r.dtype, r.device.type) for r in results} == {(dtype, "cuda")}
    assert "on the GPU" in explain(layer, x)


@pytest.mark.parametrize("dtype", HERE)
def test_fake_gradients_on_a_device(dtype, no_kernel):  # noqa: F811
    """Of the operators, since a PyTorch without CUDA has no autograd for its devices."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    given = operator_arguments("lstm", requires_grad=False)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        there = [map_tensors(lambda t: there_of(t, dtype), a) for a in given]
        *results, token = torch.ops.rnnfast.stack(*there[:-1], True)
        grads = torch.ops.rnnfast.stack_backward(*results, *there[:-1], results[0], token, [True] * 13)
    assert token.device.type == "cpu"  # what stands behind it is Python's
    assert [g.shape for g in grads] == [t.shape for t in leaves(given[:6])]
    assert {(t.dtype, t.device.type) for t in (*results, *grads)} == {(dtype, "cuda")}


def there_of(tensor: Any, dtype: Any) -> Any:
    return torch.empty(tensor.shape, device="cuda", dtype=dtype if tensor.dtype.is_floating_point else tensor.dtype)


def map_tensors(change: Any, value: Any) -> Any:
    if isinstance(value, list):
        return [map_tensors(change, v) for v in value]
    return change(value) if isinstance(value, torch.Tensor) else value


def test_exports_for_a_device(no_kernel):  # noqa: F811
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        layer, x = on_a_fake_device("GRU", torch.bfloat16)
        program = torch.export.export(layer, (x,))
    assert "rnnfast.stack" in str(program.graph)
