"""rnnfast.torch's layers and cells beside torch.nn's: construction, calls, gradients, everything around a module."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import numpy as np
import pytest

from rnnfast import functional
from torch_cases import (
    Setup,
    assert_close,
    draw,
    engine,  # noqa: F401
    error,
    leaves,
    no_kernel,  # noqa: F401
    requiring_grad,
    rt,
    run,
    scalar,
    strict,  # noqa: F401
    torch,
)

pytestmark = pytest.mark.usefixtures("engine")

nn = torch.nn
rnn_utils = torch.nn.utils.rnn

LAYERS = ("LSTM", "GRU", "RNN")
CELLS = ("LSTMCell", "GRUCell", "RNNCell")


def pair(kind: str, *arguments: Any, **options: Any) -> tuple[Any, Any]:
    """torch.nn's module and ours from the same seed."""
    torch.manual_seed(1)
    theirs = getattr(nn, kind)(*arguments, **options)
    torch.manual_seed(1)
    return theirs, getattr(rt, kind)(*arguments, **options)


# ---- numbers ----


@pytest.mark.parametrize("seed", range(60))
def test_float64_agrees_with_torch(seed):
    setup = draw(seed)
    theirs, ours = setup.pair()
    arguments = requiring_grad((setup.x(), setup.state() if setup.hx else None))
    assert_close(run(ours, *arguments), run(theirs, *arguments))


@pytest.mark.parametrize("seed", range(100, 124))
def test_float32_is_as_exact_as_torch(seed):
    setup = draw(seed)
    arguments = requiring_grad((setup.x(torch.float32), setup.state(torch.float32) if setup.hx else None))
    theirs, ours = setup.pair(torch.float32)
    found, peer = run(ours, *arguments), run(theirs, *arguments)
    double = requiring_grad(tuple(None if a is None else to_double(a) for a in arguments))
    truth = run(copy.deepcopy(theirs).double(), *double)
    for name in truth:
        limit = max(2 * error(peer[name], truth[name]), 4 * 2.0**-23)
        assert error(found[name], truth[name]) <= limit, name


def to_double(value: Any) -> Any:
    return tuple(map(to_double, value)) if isinstance(value, tuple) else value.detach().double()


@pytest.mark.parametrize("seed", range(200, 230))
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_sequences(seed, enforce_sorted):
    setup = draw(seed)
    theirs, ours = setup.pair()
    lengths = torch.randint(1, setup.steps + 1, (setup.batch_size,))
    lengths[0] = setup.steps
    if enforce_sorted:
        lengths = lengths.sort(descending=True).values
    x, hx = requiring_grad((setup.x(), setup.state() if setup.hx else None))
    packed = rnn_utils.pack_padded_sequence(x, lengths, setup.batch_first, enforce_sorted)
    assert_close(run_packed(ours, packed, x, hx), run_packed(theirs, packed, x, hx))


def run_packed(module: Any, packed: Any, x: Any, hx: Any) -> dict[str, Any]:
    results = module(packed, hx)
    assert isinstance(results[0], rnn_utils.PackedSequence)
    for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        assert getattr(results[0], name) is getattr(packed, name)
    sources = [x, *leaves(hx), *module.parameters()]
    grads = torch.autograd.grad(scalar(results), sources, retain_graph=True)
    named = {f"result {i}": r.detach() for i, r in enumerate(leaves(results))}
    return named | {f"gradient {i}": g for i, g in enumerate(grads)}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched(kind, batch_first):
    theirs, ours = (m.double() for m in pair(kind, 3, 4, 2, batch_first=batch_first, bidirectional=True))
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    h = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    hx = (h, torch.randn(4, 4, dtype=torch.float64, requires_grad=True)) if kind == "LSTM" else h
    assert_close(run(ours, x, hx), run(theirs, x, hx))


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("options", [{}, {"bias": False}])
@pytest.mark.parametrize("given", [False, True])
def test_cells(kind, batch, options, given):
    theirs, ours = (m.double() for m in pair(kind, 3, 4, **options))
    x = torch.randn(*batch, 3, dtype=torch.float64, requires_grad=True)
    h = torch.randn(*batch, 4, dtype=torch.float64, requires_grad=True)
    hx = None if not given else (h, requiring_grad(h * 2)) if kind == "LSTMCell" else h
    assert_close(run(ours, x, hx), run(theirs, x, hx))


def test_relu_cell_and_a_loop_of_steps():
    theirs, ours = pair("RNNCell", 3, 4, nonlinearity="relu")
    x = torch.randn(6, 2, 3)
    results = []
    for module in (theirs, ours):
        h = None
        for t in range(6):
            h = module(x[t], h)
        results.append((h.detach(), *torch.autograd.grad(h.square().sum(), list(module.parameters()))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", LAYERS)
def test_empty_batch(kind):
    layer = getattr(rt, kind)(3, 4, 2)
    x = torch.randn(5, 0, 3, requires_grad=True)
    output, state = layer(x)
    assert output.shape == (5, 0, 4)
    assert all(s.shape == (2, 0, 4) for s in leaves(state))
    output.sum().backward()
    assert x.grad.shape == x.shape
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in layer.parameters())


@pytest.mark.parametrize("kind", LAYERS)
def test_strided_tensors(kind):
    theirs, ours = (m.double() for m in pair(kind, 3, 4))
    x = torch.randn(3, 2, 5, dtype=torch.float64).permute(2, 1, 0).requires_grad_()  # the last axis strided
    h = torch.randn(4, 2, 1, dtype=torch.float64).permute(2, 1, 0).requires_grad_()
    hx = (h, requiring_grad(h * 2)) if kind == "LSTM" else h
    assert not x.is_contiguous()
    assert_close(run(ours, x, hx), run(theirs, x, hx))
    expanded = torch.randn(5, 1, 3, dtype=torch.float64).expand(5, 4, 3)
    assert_close(run(ours, expanded), run(theirs, expanded))
    every_second = torch.randn(10, 4, 6, dtype=torch.float64)[::2, :, ::2].requires_grad_()
    assert_close(run(ours, every_second), run(theirs, every_second))


def test_learned_initial_state_for_all_rows():
    theirs, ours = (m.double() for m in pair("LSTM", 3, 4, 2))
    h, c = (torch.randn(2, 1, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    x = torch.randn(5, 3, 3, dtype=torch.float64)

    def call(module: Any) -> Any:
        results = module(x, (h.expand(-1, 3, -1), c.expand(-1, 3, -1)))
        return [*leaves(results), *torch.autograd.grad(scalar(results), [h, c])]

    torch.testing.assert_close(call(ours), call(theirs))


def test_no_copy_of_what_is_contiguous():
    layer = rt.GRU(3, 4)
    x = torch.randn(5, 2, 3)
    seen = []
    original = functional.run_forward
    functional.run_forward = lambda layers, *arguments: (seen.append(arguments), original(layers, *arguments))[1]
    try:
        output, hn = layer(x)
    finally:
        functional.run_forward = original
    pointers = [address(a) for a in seen[0] if isinstance(a, (np.ndarray, torch.Tensor))]
    assert {x.data_ptr(), output.data_ptr(), hn.data_ptr()} <= set(pointers)
    assert [address(w) for w in seen[0][3]] == [p.data_ptr() for p in layer.parameters()]


def address(array: Any) -> int:
    return array.data_ptr() if isinstance(array, torch.Tensor) else array.__array_interface__["data"][0]


# ---- gradients ----


@pytest.mark.parametrize("kind", LAYERS)
def test_any_subset_may_require_a_gradient(kind):
    theirs, ours = (m.double() for m in pair(kind, 3, 4, 2))
    names = [name for name, _ in ours.named_parameters()]
    rng = np.random.default_rng(3)
    for _ in range(8):
        chosen = rng.random(len(names) + 2) < 0.4
        x, h = torch.randn(5, 2, 3, dtype=torch.float64), torch.randn(2, 2, 4, dtype=torch.float64)
        x.requires_grad_(bool(chosen[-1])), h.requires_grad_(bool(chosen[-2]))
        for module in (theirs, ours):
            for name, flag in zip(names, chosen, strict=False):
                getattr(module, name).requires_grad_(bool(flag))
        hx = (h, torch.randn_like(h)) if kind == "LSTM" else h
        if chosen.any():
            assert_close(run(ours, x, hx), run(theirs, x, hx))


@pytest.mark.parametrize("which", range(3))
def test_gradient_of_one_result_alone(which):
    theirs, ours = (m.double() for m in pair("LSTM", 3, 4))
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    grads = [torch.autograd.grad(leaves(m(x))[which].square().sum(), [x, *m.parameters()]) for m in (theirs, ours)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_results_that_need_no_gradient_have_none():
    layer = rt.LSTM(3, 4).requires_grad_(False)
    output, (hn, cn) = layer(torch.randn(5, 2, 3))
    assert not output.requires_grad
    with torch.no_grad():
        assert not rt.LSTM(3, 4)(torch.randn(5, 2, 3))[0].requires_grad
    with torch.inference_mode():
        assert rt.LSTM(3, 4)(torch.randn(5, 2, 3))[0].is_inference()
    assert hn.grad_fn is cn.grad_fn is None


def test_accumulation_and_several_uses_before_backward():
    theirs, ours = (m.double() for m in pair("GRU", 3, 4))
    a, b = torch.randn(5, 2, 3, dtype=torch.float64), torch.randn(7, 3, 3, dtype=torch.float64)
    for module in (theirs, ours):
        (module(a)[0].square().sum() + module(b)[0].sum()).backward()
        module(a)[1].sum().backward()
    for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_backward_twice():
    layer = rt.LSTM(3, 4, 2).double()
    loss = layer(torch.randn(5, 2, 3, dtype=torch.float64))[0].square().sum()
    weights = list(layer.parameters())
    first = torch.autograd.grad(loss, weights, retain_graph=True)
    second = torch.autograd.grad(loss, weights)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, weights)


def test_backward_frees_the_reserve():
    from rnnfast.torch import kernels

    layer = rt.LSTM(3, 4)
    loss = scalar(layer(torch.randn(50, 2, 3), return_states=True))
    assert len(kernels._reserves) == 1
    loss.backward()
    assert len(kernels._reserves) == 0  # while the graph's nodes are still there
    del loss
    results = layer(torch.randn(50, 2, 3), return_states=True)
    assert len(kernels._reserves) == 1
    del results  # without a backward: no cycle keeps it
    assert len(kernels._reserves) == 0


@pytest.mark.parametrize("target", ["x", "weight"])
def test_input_changed_in_place_before_backward_raises(target):
    layer, x = rt.GRU(3, 4), torch.randn(5, 2, 3)
    loss = layer(x)[0].sum()
    with torch.no_grad():
        (x if target == "x" else layer.weight_hh_l0).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_output_may_be_changed_in_place():
    theirs, ours = (m.double() for m in pair("GRU", 3, 4))
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    grads = []
    for module in (theirs, ours):
        output, _ = module(x)
        loss = output.relu_().square().sum()
        grads.append(torch.autograd.grad(loss, list(module.parameters())))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_reset_buffer_may_be_overwritten_before_backward():
    layer = rt.GRU(3, 4)
    x, reset = torch.randn(5, 2, 3), torch.rand(5, 2) < 0.4
    expected = torch.autograd.grad(layer(x, reset=reset.clone())[0].square().sum(), layer.weight_hh_l0)[0]
    loss = layer(x, reset=reset)[0].square().sum()
    reset.fill_(True)
    assert torch.equal(torch.autograd.grad(loss, layer.weight_hh_l0)[0], expected)


def test_hooks_and_anomaly_mode():
    layer, seen = rt.LSTM(3, 4), []
    layer.register_forward_pre_hook(lambda m, a: seen.append("before"))
    layer.register_forward_hook(lambda m, a, r: seen.append("after"))
    layer.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    layer.weight_hh_l0.register_hook(lambda g: seen.append("weight") or g * 2)
    x = torch.randn(5, 2, 3, requires_grad=True)
    with torch.autograd.set_detect_anomaly(True):
        layer(x)[0].sum().backward()
    assert sorted(seen) == ["after", "backward", "before", "weight"]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant):
    from torch.utils.checkpoint import checkpoint

    layer = rt.LSTM(3, 4, 2, dropout=0.5)
    x = torch.randn(5, 2, 3, requires_grad=True)
    torch.manual_seed(5)
    expected = torch.autograd.grad(layer(x)[0].square().sum(), layer.weight_hh_l0)[0]
    torch.manual_seed(5)
    before = functional.kernel_calls()
    checkpoint(lambda x: layer(x)[0], x, use_reentrant=use_reentrant).square().sum().backward()
    assert torch.equal(layer.weight_hh_l0.grad, expected)
    assert functional.kernel_calls() == before + 3  # forward, again forward, backward


def test_saved_tensor_hooks():
    layer, x = rt.GRU(3, 4), torch.randn(5, 2, 3)
    expected = torch.autograd.grad(layer(x)[0].square().sum(), layer.weight_hh_l0)[0]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        loss = layer(x)[0].square().sum()
    torch.testing.assert_close(torch.autograd.grad(loss, layer.weight_hh_l0)[0], expected)


# ---- dropout ----


def test_dropout_follows_torchs_generator():
    layer, x = rt.LSTM(3, 8, 3, dropout=0.5), torch.randn(5, 2, 3)
    torch.manual_seed(3)
    a, b = layer(x)[0], layer(x)[0]
    torch.manual_seed(3)
    c, d = layer(x)[0], layer(x)[0]
    assert torch.equal(a, c)
    assert torch.equal(b, d)
    assert not torch.equal(a, b)
    layer.eval()
    state = torch.get_rng_state()
    assert torch.equal(layer(x)[0], layer(x)[0])
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        torch.manual_seed(3)
        assert torch.equal(layer.train()(x)[0], a)


def test_dropout_of_everything_agrees_with_torch():
    theirs, ours = (m.double() for m in pair("GRU", 3, 4, 2, dropout=1.0))
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    assert_close(run(ours, x), run(theirs, x))


# ---- beyond torch ----


@pytest.mark.parametrize("seed", range(300, 324))
def test_lengths_resets_and_all_states_agree_with_the_reference(seed):
    setup = draw(seed)
    _, ours = setup.pair()
    shape = setup.x().shape[:2]
    arguments = {
        "lengths": torch.randint(0, setup.steps + 1, (setup.batch_size,)),
        "reset": torch.rand(shape) < 0.3,
        "return_states": True,
    }
    shared = {"reset_state": setup.state(batch_size=1 if seed % 2 else None)} if seed % 4 else {}
    x, hx, shared = setup.x(), setup.state(), shared
    found = run(ours, *requiring_grad((x, hx)), **arguments, **{k: requiring_grad(v) for k, v in shared.items()})
    composed = Composed(setup, ours)
    truth = run(composed, *requiring_grad((x, hx)), **arguments, **{k: requiring_grad(v) for k, v in shared.items()})
    assert_close(found, truth)


class Composed(nn.Module):
    """The reference on tensors, differentiated by PyTorch."""

    def __init__(self, setup: Setup, layer: Any) -> None:
        super().__init__()
        self.setup, self.layer = setup, layer

    def forward(self, x: Any, hx: Any, **options: Any) -> Any:
        from rnnfast import reference

        cell = {"LSTM": "lstm", "GRU": "gru", "RNN": f"rnn_{self.setup.nonlinearity}"}[self.setup.kind]
        *results, _ = reference.forward(
            cell,
            x,
            hx,
            list(self.layer.parameters()),
            num_layers=self.setup.num_layers,
            bidirectional=self.setup.bidirectional,
            batch_first=self.setup.batch_first,
            **options,
        )
        return tuple(results)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_lengths_agree_with_packing(dtype):
    _, ours = pair("GRU", 3, 4, 2, bidirectional=True)
    x, lengths = torch.randn(6, 3, 3), torch.tensor([2, 6, 4])
    packed = rnn_utils.pack_padded_sequence(x, lengths, enforce_sorted=False)
    expected, expected_state = ours(packed)
    expected, _ = rnn_utils.pad_packed_sequence(expected)
    output, state = ours(x, lengths=lengths.to(dtype))
    assert torch.equal(output, expected)
    assert torch.equal(state, expected_state)
    assert torch.equal(ours(x, lengths=[2, 6, 4])[0], expected)


def test_unbatched_with_everything():
    _, ours = pair("LSTM", 3, 4)
    x, reset = torch.randn(6, 3), torch.tensor([0, 0, 1, 0, 0, 0])
    start = (torch.randn(1, 4), torch.randn(1, 4))
    output, state, states = ours(x, lengths=5, reset=reset, reset_state=start, return_states=True)
    many = ours(
        x[:, None],
        lengths=torch.tensor([5]),
        reset=reset[:, None],
        reset_state=tuple(s[:, None] for s in start),
        return_states=True,
    )
    for a, b in zip(leaves((output, state, states)), leaves(many), strict=True):
        assert torch.equal(a, b.squeeze(-2))


def test_packed_with_resets_and_all_states():
    _, ours = pair("GRU", 3, 4)
    x, lengths, reset = torch.randn(6, 3, 3), torch.tensor([2, 6, 4]), torch.rand(6, 3) < 0.3
    packed = rnn_utils.pack_padded_sequence(x, lengths, enforce_sorted=False)
    output, state, states = ours(packed, reset=reset, return_states=True)
    expected = ours(x, lengths=lengths, reset=reset, return_states=True)
    assert torch.equal(rnn_utils.pad_packed_sequence(output)[0], expected[0])
    assert torch.equal(state, expected[1])
    assert torch.equal(states, expected[2])


# ---- around a module ----


@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_same_seed_same_weights_and_names(kind, no_kernel):  # noqa: F811
    theirs, ours = pair(kind, 3, 5)
    assert repr(theirs) == repr(ours)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(theirs.parameters(), ours.parameters(), strict=True))
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())


def test_repr_of_options(no_kernel):  # noqa: F811
    for options in (
        {"num_layers": 2, "bias": False, "batch_first": True, "dropout": 0.5, "bidirectional": True, "proj_size": 2},
        {},
    ):
        theirs, ours = pair("LSTM", 3, 5, **options)
        assert repr(theirs) == repr(ours)
        assert [p.shape for p in theirs.parameters()] == [p.shape for p in ours.parameters()]
    assert repr(nn.RNN(3, 4, 2, "relu")) == repr(rt.RNN(3, 4, 2, "relu"))


def test_what_isinstance_says(no_kernel):  # noqa: F811
    assert isinstance(rt.LSTM(3, 4), nn.RNNBase)
    assert isinstance(rt.LSTMCell(3, 4), nn.RNNCellBase)
    assert not isinstance(rt.LSTM(3, 4), nn.LSTM)  # torch.compile refuses those


@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_pickle_deepcopy_and_save(kind):
    module = getattr(rt, kind)(3, 4)
    x = torch.randn(2, 3)
    with torch.no_grad():
        expected = leaves(module(x))
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        copies = [
            pickle.loads(pickle.dumps(module)),
            copy.deepcopy(module),
            copy.copy(module),
            torch.load(buffer, weights_only=False),
        ]
        for other in copies:
            assert type(other) is type(module)
            assert all(torch.equal(a, b) for a, b in zip(leaves(other(x)), expected, strict=True))
        next(copies[1].parameters()).zero_()
        assert all(torch.equal(a, b) for a, b in zip(leaves(module(x)), expected, strict=True))


def test_to_and_double():
    layer = rt.LSTM(3, 4)
    x = torch.randn(5, 2, 3)
    expected = layer(x)[0]
    assert layer.double()(x.double())[0].dtype == torch.float64
    torch.testing.assert_close(layer.to(torch.float32)(x)[0], expected)
    assert rt.LSTM(3, 4, dtype=torch.float64).weight_ih_l0.dtype == torch.float64
    meta = rt.LSTM(3, 4, 2, device="meta")
    assert meta(torch.randn(5, 2, 3, device="meta"))[1][1].shape == (2, 2, 4)
    meta.to_empty(device="cpu").load_state_dict(rt.LSTM(3, 4, 2).state_dict())
    assert meta(x)[0].shape == (5, 2, 4)


def test_shared_weights():
    theirs, ours = pair("LSTM", 4, 4, 2)
    for module in (theirs, ours):
        for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            setattr(module, f"{kind}_l1", getattr(module, f"{kind}_l0"))
        assert len(list(module.parameters())) == 4
    x = torch.randn(5, 2, 4, requires_grad=True)
    assert_close(run(ours, x), run(theirs, x), 1e-6, 1e-5)
    first, second = rt.GRU(3, 4), rt.GRU(3, 4)
    second.weight_hh_l0 = first.weight_hh_l0
    (first(x[..., :3])[0].sum() + second(x[..., :3])[0].sum()).backward()
    assert first.weight_hh_l0.grad is second.weight_hh_l0.grad


def weight_norm(module: Any) -> Any:
    return nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")


def old_weight_norm(module: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(module, "weight_hh_l0")


def orthogonal(module: Any) -> Any:
    return nn.utils.parametrizations.orthogonal(module, "weight_hh_l0")


@pytest.mark.parametrize("change", [weight_norm, old_weight_norm, orthogonal])
def test_parametrised_weights(change):
    theirs, ours = (change(m.double()) for m in pair("GRU", 3, 4))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    assert_close(run(ours, x), run(theirs, x), 1e-12, 1e-10)
    with torch.no_grad():
        torch.testing.assert_close(ours(x)[0], theirs(x)[0])
        for module in (theirs, ours):
            for p in module.parameters():
                p.mul_(1.1)
        torch.testing.assert_close(ours(x)[0], theirs(x)[0])


def test_no_warning_about_flat_weights():
    layer = rt.LSTM(3, 4, 2)
    layer.flatten_parameters()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.weight_hh_l0 = nn.Parameter(layer.weight_hh_l0.detach().clone())
        copy.deepcopy(layer)(torch.randn(5, 2, 3))
        layer.flatten_parameters()


def change_in_place(layer: Any) -> None:
    with torch.no_grad():
        layer.weight_hh_l0.mul_(0.5)


def change_data(layer: Any) -> None:
    layer.weight_hh_l0.data.mul_(0.5)  # raises no version counter


def change_one_value(layer: Any) -> None:
    layer.weight_hh_l0.data[-1, -1] += 1


def replace_data(layer: Any) -> None:
    layer.weight_hh_l0.data = layer.weight_hh_l0.data * 0.5


def change_through_numpy(layer: Any) -> None:
    layer.weight_hh_l0.detach().numpy()[...] *= 0.5


def replace_parameter(layer: Any) -> None:
    layer.weight_hh_l0 = nn.Parameter(layer.weight_hh_l0.detach() * 0.5)


def load(layer: Any) -> None:
    layer.load_state_dict({k: v * 0.5 for k, v in layer.state_dict().items()})


CHANGES = [change_in_place, change_data, change_one_value, replace_data, change_through_numpy, replace_parameter, load]


@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
@pytest.mark.parametrize("change", CHANGES)
def test_packed_weights_are_never_stale(kind, change):
    theirs, ours = pair(kind, 3, 4)
    if kind == "LSTMCell":
        for module in (theirs, ours):
            module.register_parameter("weight_hh_l0", module.weight_hh)
    x = torch.randn(1, 2, 3)[0] if kind == "LSTMCell" else torch.randn(1, 2, 3)
    hx = (torch.randn(2, 4),) * 2 if kind == "LSTMCell" else (torch.randn(1, 2, 4),) * 2
    for grad in (False, True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(ours(x, hx), theirs(x, hx))
        for module in (theirs, ours):
            change(module)
            if kind == "LSTMCell":
                module.weight_hh = module.weight_hh_l0


def test_functional_call():
    layer, other = rt.GRU(3, 4), rt.GRU(3, 4)
    x = torch.randn(5, 2, 3)
    with torch.no_grad():
        assert not torch.equal(layer(x)[0], other(x)[0])
        found = torch.func.functional_call(layer, dict(other.named_parameters()), (x,))
        assert torch.equal(found[0], other(x)[0])


def test_a_second_thread():
    import threading

    layer, x, found = rt.LSTM(16, 16), torch.randn(50, 4, 16), {}
    expected = layer(x)[0]

    def work(i: int) -> None:
        found[i] = layer(x)[0] if i % 2 else torch.autograd.grad(layer(x)[0].sum(), layer.weight_hh_l0)[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(found[1], expected)
    assert torch.equal(found[3], expected)
    torch.testing.assert_close(found[0], found[2])


def test_follows_torchs_number_of_threads():
    import rnnfast

    before = torch.get_num_threads(), rnnfast.get_num_threads()
    try:
        torch.set_num_threads(before[0] + 1)
        rt.GRU(3, 4)(torch.randn(5, 2, 3))
        assert rnnfast.get_num_threads() == before[0] + 1
        rnnfast.set_num_threads(1)
        rt.GRU(3, 4)(torch.randn(5, 2, 3))
        assert rnnfast.get_num_threads() == 1
    finally:
        torch.set_num_threads(before[0])
        rt.GRU(3, 4)(torch.randn(5, 2, 3))
        rnnfast.set_num_threads(before[1])


# ---- errors ----


@pytest.mark.parametrize(
    ("arguments", "options", "exception", "message"),
    [
        ((torch.zeros(5, 2, 4),), {}, RuntimeError, "input.size"),
        ((torch.zeros(5, 2, 3).double(),), {}, ValueError, "does not match weight dtype"),
        ((torch.zeros(0, 2, 3),), {}, RuntimeError, "sequence length"),
        ((torch.zeros(5, 2, 3, 1),), {}, ValueError, "Expected input to be 2D or 3D"),
        ((torch.zeros(5, 2, 3), torch.zeros(1, 3, 4)), {}, RuntimeError, r"Expected hidden size \(1, 2, 4\)"),
        ((torch.zeros(5, 2, 3), torch.zeros(2, 4)), {}, RuntimeError, "For batched 3-D input, hx should also be 3-D"),
        ((torch.zeros(5, 3), torch.zeros(1, 2, 4)), {}, RuntimeError, "For unbatched 2-D input"),
        ((torch.zeros(5, 2, 3), torch.zeros(1, 2, 4).double()), {}, RuntimeError, "not the same dtype"),
        ((torch.zeros(5, 2, 3), (torch.zeros(1, 2, 4),) * 2), {}, TypeError, "hx: expected a Tensor, got tuple"),
        ((torch.zeros(5, 2, 3),), {"lengths": torch.tensor([1, 6])}, ValueError, "lengths"),
        ((torch.zeros(5, 2, 3),), {"lengths": torch.tensor([1])}, ValueError, r"lengths: expected shape \[2\]"),
        ((torch.zeros(5, 2, 3),), {"lengths": torch.tensor([1.0, 2.0])}, TypeError, "lengths: expected integers"),
        ((torch.zeros(5, 2, 3),), {"reset": torch.zeros(2, 5).bool()}, ValueError, r"reset: expected shape \[5, 2\]"),
        ((torch.zeros(5, 2, 3),), {"reset": torch.full((5, 2), 2)}, ValueError, "reset: expected 0 and 1"),
        ((torch.zeros(5, 2, 3),), {"reset": torch.zeros(5, 2)}, TypeError, "reset: expected bool"),
        ((torch.zeros(5, 2, 3),), {"reset_state": torch.zeros(1, 2, 4)}, ValueError, "reset_state: expected None"),
    ],
)
def test_errors(arguments, options, exception, message, no_kernel):  # noqa: F811
    with pytest.raises(exception, match=message):
        rt.GRU(3, 4)(*arguments, **options)


def test_lstm_wants_a_pair(no_kernel):  # noqa: F811
    with pytest.raises(TypeError, match=r"hx: expected a pair \(h, c\), got Tensor"):
        rt.LSTM(3, 4)(torch.zeros(5, 2, 3), torch.zeros(1, 2, 4))
    with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size \(1, 2, 4\)"):
        rt.LSTM(3, 4)(torch.zeros(5, 2, 3), (torch.zeros(1, 2, 4), torch.zeros(1, 2, 5)))
    with pytest.raises(ValueError, match="proj_size"):
        rt.GRU(3, 4, proj_size=2)


def test_what_is_not_here_is_said(no_kernel):  # noqa: F811
    with pytest.raises(AttributeError, match=r"torch\.nn, or convert"):
        rt.Linear  # noqa: B018
    with pytest.raises(TypeError, match="expected a pair .* got 1 elements"):
        rt.LSTM(2, 3)(torch.zeros(4, 1, 2), (torch.zeros(1, 1, 3),))
