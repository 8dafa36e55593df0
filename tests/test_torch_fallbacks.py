"""Where torch's own implementation runs: the complete list, said once, raised in strict mode; autocast; explain."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest

import rnnfast
from rnnfast import _strict, functional
from rnnfast._strict import FallbackWarning, set_strict
from rnnfast.explain import explain
from torch_cases import (
    leaves,
    no_kernel,  # noqa: F401
    rt,
    strict,  # noqa: F401
    torch,
)

nn = torch.nn
LAYERS = ("LSTM", "GRU", "RNN")
CELLS = ("LSTMCell", "GRUCell", "RNNCell")

# Every case that may fall back on a machine without a GPU, and the reason that must be given. Whatever is not in this
# list runs on the engine: all other tests of rnnfast.torch are in strict mode, in which a fallback raises.
PERMITTED = {
    torch.bfloat16: "there is no kernel for torch.bfloat16 on the CPU",
    torch.float16: "there is no kernel for torch.float16 on the CPU",
}
SERVED = (torch.float32, torch.float64)


@pytest.mark.parametrize("kind", LAYERS + CELLS)
@pytest.mark.parametrize("dtype", PERMITTED)
def test_permitted_fallbacks(kind, dtype, no_kernel):  # noqa: F811
    torch.manual_seed(1)
    theirs = getattr(nn, kind)(3, 4, dtype=dtype)
    ours = getattr(rt, kind)(3, 4, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 3, dtype=dtype)
    with pytest.raises(RuntimeError, match=f"{PERMITTED[dtype]}.*strict mode"):
        ours(x)
    set_strict(False)
    _strict._said.clear()
    with pytest.warns(FallbackWarning, match=PERMITTED[dtype]):
        found = leaves(ours(x))
    assert all(torch.equal(a, b) for a, b in zip(found, leaves(theirs(x)), strict=True))
    assert PERMITTED[dtype] in explain(ours, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(x)  # said once


@pytest.mark.parametrize("kind", LAYERS + CELLS)
@pytest.mark.parametrize("dtype", SERVED)
def test_served(kind, dtype):
    module = getattr(rt, kind)(3, 4, dtype=dtype)
    module(torch.randn(5, 3, dtype=dtype))
    assert "rnnfast's kernel for" in explain(module, torch.randn(5, 3, dtype=dtype))


def test_every_dtype_is_in_one_of_the_lists(no_kernel):  # noqa: F811
    floating = {
        t
        for t in vars(torch).values()
        if isinstance(t, torch.dtype) and t.is_floating_point and "float8" not in str(t) and "float4" not in str(t)
    }
    assert floating == {*PERMITTED, *SERVED}


def test_fallback_of_packed_sequences_and_of_what_torch_lacks(no_kernel):  # noqa: F811
    set_strict(False)
    theirs = nn.GRU(3, 4, 2, bidirectional=True, dtype=torch.bfloat16)
    ours = rt.GRU(3, 4, 2, bidirectional=True, dtype=torch.bfloat16)
    ours.load_state_dict(theirs.state_dict())
    x, lengths = torch.randn(5, 3, 3, dtype=torch.bfloat16), torch.tensor([2, 5, 3])
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    h = torch.randn(4, 3, 4, dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        found, expected = ours(packed, h), theirs(packed, h)
        assert all(torch.equal(a, b) for a, b in zip(leaves(found), leaves(expected), strict=True))
        output, state, states = ours(x, h, lengths=lengths, reset=torch.rand(5, 3) < 0.3, return_states=True)
        assert (output.dtype, state.shape, states.shape) == (torch.bfloat16, (4, 3, 4), (5, 4, 3, 4))
        padded, _ = nn.utils.rnn.pad_packed_sequence(expected[0])
        torch.testing.assert_close(ours(x, h, lengths=lengths)[0], padded, rtol=0.05, atol=0.05)


def test_set_strict(no_kernel):  # noqa: F811
    set_strict(False)
    assert not _strict.get_strict()
    set_strict(True)
    assert _strict.get_strict()
    with pytest.raises(TypeError, match="flag: expected a bool, got int"):
        set_strict(1)


# ---- autocast ----


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", LAYERS + CELLS)
@pytest.mark.parametrize("grad", [False, True])
def test_autocast_gives_torchs_dtypes(kind, autocast, grad):
    for options in ({},) if kind in CELLS else ({}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True}):
        theirs, ours = getattr(nn, kind)(3, 4, **options), getattr(rt, kind)(3, 4, **options)
        ours.load_state_dict(theirs.state_dict())
        for x in arguments(kind, autocast):
            with torch.autocast("cpu", autocast), torch.set_grad_enabled(grad):
                found = leaves(ours(x))
                try:
                    expected = leaves(theirs(x))
                except RuntimeError:
                    assert all(r.dtype == autocast for r in found)  # torch refuses: float16 LSTMs in training
                    continue
            assert [r.dtype for r in found] == [r.dtype for r in expected]
            torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)


def arguments(kind: str, autocast: Any) -> list[Any]:
    x = torch.randn(2, 3) if kind in CELLS else torch.randn(5, 2, 3)
    if kind in CELLS:
        return [x, x.to(autocast)]
    return [x, x.to(autocast), nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3])[: x.shape[1]])]


def test_autocast_with_states_and_gradients():
    theirs, ours = nn.GRU(3, 4), rt.GRU(3, 4)
    ours.load_state_dict(theirs.state_dict())
    x, h = torch.randn(5, 2, 3), torch.randn(1, 2, 4)
    grads = []
    for module in (theirs, ours):
        with torch.autocast("cpu", torch.bfloat16):
            loss = module(x, h)[0].float().square().sum()
        grads.append(torch.autograd.grad(loss, list(module.parameters())))
    assert [g.dtype for g in grads[1]] == [torch.float32] * 4
    torch.testing.assert_close(grads[1], grads[0], rtol=0.1, atol=0.1)


def test_autocast_leaves_torchs_generator_alone():
    layer, x = rt.LSTM(3, 4, 2, dropout=0.5).eval(), torch.randn(5, 2, 3)
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    assert torch.equal(torch.get_rng_state(), state)


# ---- explain ----


def test_explain():
    x = torch.randn(5, 2, 3)
    lstm = rt.LSTM(3, 4)
    assert explain(lstm, x).startswith("LSTM: rnnfast's kernel for float32 on the CPU (")
    assert explain(lstm, x) == explain(rnnfast.LSTM(3, 4), x.numpy())
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]))
    assert explain(lstm, packed) == explain(lstm, x, lengths=torch.tensor([5, 3]))
    assert "rnnfast.torch.convert" in explain(nn.LSTM(3, 4), x)
    text = explain(nn.Sequential(nn.Linear(3, 3), rt.GRU(3, 4), nn.GRU(3, 4)), x)
    assert [line.partition(": ")[0] for line in text.splitlines()] == ["1", "2"]
    for cell in (rnnfast.LSTMCell(3, 4), rt.LSTMCell(3, 4)):
        one = x[0] if isinstance(cell, nn.Module) else x[0].numpy()
        assert explain(cell, one).startswith("LSTMCell: rnnfast's kernel for float32")
        assert explain(cell, one[0]).split(" (predicted")[0] == explain(cell, one).split(" (predicted")[0]


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(9, 3), nn.BatchNorm1d(3)
        self.encoder = rt.LSTM(3, 4, batch_first=True, bidirectional=True)
        self.spare, self.cell = rt.GRU(3, 4), rt.GRUCell(8, 5)

    def forward(self, indices):
        hidden, _ = self.encoder(input=self.norm(self.embedding(indices).mT).mT, lengths=[5, 2])
        return self.cell(nn.functional.dropout(hidden[:, 0]))


def test_explain_calls_a_copy_of_a_model():
    model, indices = Tagger(), torch.arange(10).reshape(2, 5) % 9
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    encoder, spare, cell = explain(model, indices).splitlines()
    assert encoder == f"encoder: {explain(model.encoder, torch.zeros(2, 5, 3), lengths=[5, 2])}"
    assert spare.endswith("kernel for float32 on the CPU; no plan, because the call leaves it out")
    assert cell == f"cell: {explain(model.cell, torch.zeros(2, 8))}"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert "the call ended before it: TypeError" in explain(nn.Sequential(nn.Bilinear(3, 3, 3), model.cell), indices)
    with pytest.raises(TypeError, match="lengths: expected None"):
        explain(model, indices, lengths=[5, 2])


def test_explain_changes_nothing():
    layer = rnnfast.LSTM(3, 4, 2, dropout=0.5, seed=0)
    x = torch.randn(5, 2, 3).numpy()
    layer(x)
    context, count = layer._last, layer.call_count
    explain(layer, x, lengths=[5, 2])
    assert layer._last is context
    assert layer.call_count == count
    before = functional.kernel_calls()
    with pytest.raises(TypeError, match="expected a recurrent module, got str"):
        explain("LSTM", x)
    with pytest.raises(TypeError, match="got Linear without any"):
        explain(nn.Linear(3, 4), torch.randn(5, 3))
    with pytest.raises(TypeError, match="x: expected a Tensor"):
        explain(rt.LSTM(3, 4), x)
    with pytest.raises(TypeError, match="lengths: expected None, as a cell's call takes none"):
        explain(rnnfast.GRUCell(3, 4), x[0], lengths=[1, 1])
    assert functional.kernel_calls() == before
