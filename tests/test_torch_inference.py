"""Calls without a graph, as a loop of single steps makes them: the short way, its bits, and when it must not be taken."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rnnfast import _core, functional
from torch_cases import (  # skips this file where there is no PyTorch
    no_kernel,  # noqa: F401
    rt,
    strict,  # noqa: F401
    torch,
)

kernels, route = rt.kernels, rt.route

T, B, IN, H = 3, 2, 5, 20
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stack": {"num_layers": 3, "bidirectional": True},
    "batch_first": {"batch_first": True},
    "no_bias": {"bias": False},
    "projected": {"proj_size": 7, "bidirectional": True},
    "double": {"dtype": torch.float64},
}


@pytest.fixture
def short_way_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The long way fails."""

    def run(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("expected the short way")

    monkeypatch.setattr(route, "run", run)


def make(kind: str, options: dict[str, Any], given: bool) -> tuple[Any, Any, Any]:
    """A layer, an input, a state or None."""
    torch.manual_seed(0)
    layer = getattr(rt, kind)(IN, H, **options).eval()
    shape = (B, T, IN) if layer.batch_first else (T, B, IN)
    x = torch.randn(shape, dtype=options.get("dtype"))
    runs = layer.num_layers * (2 if layer.bidirectional else 1)
    h, c = (torch.randn(runs, B, size, dtype=x.dtype) for size in (layer.proj_size or H, H))
    return layer, x, None if not given else (h, c) if kind == "LSTM" else h


def flat(result: Any) -> list[Any]:
    return [t for part in result for t in (part if isinstance(part, tuple) else (part,))]


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [(kind, name) for kind in ("RNN", "LSTM", "GRU") for name in LAYERS if kind == "LSTM" or name != "projected"],
)
def test_the_same_bits(kind: str, options: str, given: bool, request: pytest.FixtureRequest) -> None:
    layer, x, hx = make(kind, LAYERS[options], given)
    with torch.no_grad():
        expected = flat(layer(x, hx))  # the first call packs
        request.getfixturevalue("short_way_only")
        before = functional.kernel_calls()
        found = flat(layer(x, hx))
    assert functional.kernel_calls() == before + 1
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert a.stride() == b.stride()
        assert torch.equal(a, b)


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_cells_have_the_same_bits(kind: str, bias: bool, given: bool, request: pytest.FixtureRequest) -> None:
    cell = getattr(rt, kind + "Cell")(IN, H, bias)
    x, h, c = torch.randn(B, 2, IN)[:, 1], torch.randn(B, H), torch.randn(1, H).expand(B, H)
    hx = None if not given else (h, c) if kind == "LSTM" else h
    with torch.inference_mode():
        expected = flat([cell(x, hx)])
        request.getfixturevalue("short_way_only")
        before = functional.kernel_calls()
        found = flat([cell(x, hx)])
        assert functional.kernel_calls() == before + 1
        for a, b in zip(found, expected, strict=True):
            assert a.shape == b.shape == (B, H)
            assert torch.equal(a, b)


def test_errors_of_cells_are_those_of_the_first_call() -> None:
    cell = rt.LSTMCell(IN, H)
    x, h = torch.zeros(B, IN), torch.zeros(B, H)
    with torch.no_grad():
        for _ in range(2):
            for arguments in (
                (torch.zeros(B, IN + 1),),
                (x.double(),),
                (x, (h[:1], h)),
                (x, (h, torch.zeros(B, H + 1))),
                (x, (h, h.double())),
            ):
                with pytest.raises(RuntimeError):
                    cell(*arguments)
            new = cell(x, (h, h))[0]
            torch.testing.assert_close(cell(x[0], (h[0], h[0]))[0], new[0])


def test_strided_inputs_and_expanded_states(short_way_only: None) -> None:
    layer, x, _ = make("GRU", {}, False)
    wide, state = torch.randn(T, B, 2, IN), torch.randn(1, 1, H).expand(1, B, H)
    with torch.inference_mode():
        layer._cache().get(layer._options(False, False), layer._weights())
        assert torch.equal(layer(wide[:, :, 1], state)[0], layer(wide[:, :, 1].contiguous(), state.contiguous())[0])
        assert torch.equal(layer(x.transpose(0, 1).contiguous().transpose(0, 1))[0], layer(x)[0])


def changed(layer: Any, how: str) -> None:
    weight = layer.weight_hh_l0
    if how == "data":
        weight.data[0, 0] += 1
    elif how == "numpy":
        weight.detach().numpy()[0, 0] += 1
    elif how == "swap":
        weight.data[[0, 1]] = weight.data[[1, 0]]
    elif how == "memory":
        weight.data = weight.data + 1
    elif how == "transpose":
        weight.data = torch.randn(H, H).t()
    elif how == "parameter":
        layer.weight_hh_l0 = torch.nn.Parameter(weight.detach() + 1)
    elif how == "in_place":
        weight.mul_(2)


@pytest.mark.parametrize("how", ["data", "numpy", "swap", "memory", "transpose", "parameter", "in_place"])
def test_changed_weights_are_seen(how: str) -> None:
    layer, x, _ = make("RNN", {}, False)
    with torch.no_grad():
        before = layer(x)[0]
        layer(x)
        changed(layer, how)
        after = layer(x)[0]
        assert not torch.equal(after, before)
        fresh = rt.RNN(IN, H)
        fresh.load_state_dict(layer.state_dict())
        assert torch.equal(after, fresh(x)[0])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda: (torch.zeros(T, B, IN + 1),), RuntimeError, "input.size\\(-1\\)"),
        (lambda: (torch.zeros(T, B, IN).double(),), ValueError, "dtype"),
        (lambda: (torch.zeros(0, B, IN),), RuntimeError, "larger than 0"),
        (lambda: (torch.zeros(T, B, IN), torch.zeros(1, B, H)), TypeError, "pair"),
        (lambda: (torch.zeros(T, B, IN), (torch.zeros(1, B + 1, H), torch.zeros(1, B, H))), RuntimeError, "size"),
        (lambda: (torch.zeros(T, B, IN), (torch.zeros(1, B, H), torch.zeros(1, B, H).double())), RuntimeError, "dtype"),
        (lambda: (torch.zeros(T, B, IN), (torch.zeros(B, H), torch.zeros(B, H))), RuntimeError, "3-D"),
    ],
)
def test_errors_are_those_of_the_first_call(arguments: Any, error: type[Exception], message: str) -> None:
    layer, x, _ = make("LSTM", {}, False)
    with torch.no_grad():
        for _ in range(2):
            with pytest.raises(error, match=message):
                layer(*arguments())
            layer(x)


def test_ways_that_are_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph, dropout, autocast, transforms, hooks on dispatch: each is served by `route.run`, after a short call, too."""
    layer, x, _ = make("RNN", {"num_layers": 2, "dropout": 0.5}, False)
    with torch.no_grad():
        first = layer(x)[0]
        layer(x)
        called: list[str] = []
        monkeypatch.setattr(kernels, "infer", lambda *_: called.append("short"))
        layer.train()
        assert not torch.equal(layer(x)[0], first)
        layer.eval()
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
        torch.func.vmap(lambda x: layer(x)[0])(torch.stack([x, x]))
        layer(x, lengths=torch.tensor([1, 2]))
        layer(x[:, 0])
    assert layer(x)[0].requires_grad
    assert not called


def test_empty_and_unbatched_inputs_after_a_short_call() -> None:
    layer, x, _ = make("GRU", {}, False)
    with torch.inference_mode():
        for _ in range(2):
            whole = layer(x)[0]
            assert layer(x[:, :0])[0].shape == (T, 0, H)
            torch.testing.assert_close(layer(x[:, 0])[0], whole[:, 0])


# ---- the digest ----


@pytest.mark.usefixtures("no_kernel")
def test_the_digest_sees_every_byte() -> None:
    values = np.random.default_rng(0).integers(0, 256, 3 * 128 + 20, dtype=np.uint8)
    seen = set()
    for i in range(-1, len(values)):
        changed = values.copy()
        if i >= 0:
            changed[i] ^= 1
        seen.add(_core.TensorMemory([torch.from_numpy(changed)]).digest())
    assert len(seen) == len(values) + 1


@pytest.mark.usefixtures("no_kernel")
def test_the_digest_sees_places_and_lengths() -> None:
    blocks = torch.arange(8).repeat_interleave(64).float()
    digests = {
        _core.TensorMemory(tensors).digest()
        for tensors in (
            [blocks],
            [blocks.view(8, 64)[[1, 0, 2, 3, 4, 5, 6, 7]].contiguous()],
            [blocks.view(8, 64)[[2, 1, 0, 3, 4, 5, 6, 7]].contiguous()],
            [blocks[:-1].clone()],
            [blocks[:256].clone(), blocks[256:].clone()],
            [blocks[256:].clone(), blocks[:256].clone()],
            [torch.zeros(512)],
            [torch.zeros(511)],
            [torch.zeros(0)],
            [],
        )
    }
    assert len(digests) == 10


@pytest.mark.usefixtures("no_kernel")
def test_memory_of_strided_and_of_other_tensors() -> None:
    a = torch.randn(4, 4)
    memory = _core.TensorMemory([a])
    assert memory.holds([a])
    assert not memory.holds([a.clone()])
    assert not memory.holds([a, a])
    assert _core.TensorMemory([a.t()]).digest() is None


# ---- a module that is told to be another one, or lies in memory of its own ----


@pytest.mark.parametrize("grad", [False, True])
def test_what_a_module_is_told_to_be_is_seen(grad: bool) -> None:
    cell, layer = rt.RNNCell(IN, H), rt.RNN(IN, H, num_layers=2)
    x = torch.randn(T, B, IN)
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            cell(x[0]), layer(x)
        cell.nonlinearity, layer.mode = "relu", "RNN_RELU"
        assert cell(x[0]).min() == 0
        assert layer(x)[0].min() == 0


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"])
@pytest.mark.parametrize("grad", [False, True])
def test_memory_stays_resizable(kind: str, grad: bool) -> None:
    """FSDP frees the storage of parameters; buffers are filled anew with `out=`."""
    module = getattr(rt, kind)(IN, H)
    buffer, state = torch.empty(0), torch.empty(0)
    lead = () if kind.endswith("Cell") else (1,)
    with torch.set_grad_enabled(grad):
        for batch_size in (1, 2, 3):
            torch.randn(*lead, batch_size, IN, out=buffer)
            torch.randn(*lead, batch_size, H, out=state)
            hx = (state, state.clone()) if kind.startswith("LSTM") else state
            results = flat([module(buffer, hx)])[:1]
            if grad:
                results[0].sum().backward()
    for tensor in (*module.parameters(), results[0].detach()):
        tensor.untyped_storage().resize_(0)


@pytest.mark.parametrize("missing", ["bias_ih", "bias_hh"])
@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
def test_cells_with_one_bias(kind: str, missing: str) -> None:
    theirs, ours = getattr(torch.nn, kind)(IN, H), getattr(rt, kind)(IN, H)
    ours.load_state_dict(theirs.state_dict())
    setattr(theirs, missing, None), setattr(ours, missing, None)
    x = torch.randn(B, IN)
    for a, b in zip(flat([ours(x)]), flat([theirs(x)]), strict=True):
        torch.testing.assert_close(a, b)


def test_cells_refuse_other_devices_and_states() -> None:
    cell, x, h = rt.LSTMCell(IN, H), torch.zeros(IN), torch.zeros(1, H)
    cell(x)
    with pytest.raises(RuntimeError, match="not at the same device"):
        cell(torch.zeros(B, IN, device="meta"))
    with pytest.raises(RuntimeError, match="1-D"):
        cell(x, (h, h))
    with pytest.raises(TypeError, match=r"hx: expected a pair \(h, c\), got tuple"):
        cell(x, ())
    with pytest.raises(TypeError, match="lengths: expected a Tensor or numbers, got str"):
        rt.GRU(IN, H)(torch.zeros(T, B, IN), lengths="a")
