"""convert and revert: what is replaced, what is left and why; five models whose outputs and gradients stay the same."""

from __future__ import annotations

import copy
import io
import logging
from typing import Any

import pytest

from rnnfast import functional
from torch_cases import (
    leaves,
    no_kernel,  # noqa: F401
    rt,
    strict,  # noqa: F401
    torch,
)

nn = torch.nn
NAMES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")


# ---- what convert does ----


@pytest.mark.parametrize("name", NAMES)
def test_root_and_back(name):
    module = getattr(nn, name)(3, 4)
    x = torch.randn(5, 3)
    expected = leaves(module(x))
    weights = list(module.parameters())
    assert rt.convert(module) is module
    assert type(module) is getattr(rt, name)
    assert all(a is b for a, b in zip(module.parameters(), weights, strict=True))
    torch.testing.assert_close(leaves(module(x)), expected)
    with torch.no_grad():
        module(x)
    assert rt.revert(module) is module
    assert type(module) is getattr(nn, name)
    assert vars(module).keys() == vars(getattr(nn, name)(3, 4)).keys()
    assert all(torch.equal(a, b) for a, b in zip(leaves(module(x)), expected, strict=True))


class Own(nn.LSTM):
    """A subclass, which may do anything."""


def mixed() -> Any:
    inner = nn.ModuleDict({"lstm": nn.LSTM(3, 4), "cell": nn.GRUCell(4, 4)})
    return nn.ModuleList([inner, nn.Linear(4, 4), Own(4, 4), nn.GRU(4, 4).bfloat16(), rt.RNN(4, 4), nn.RNN(4, 4)])


def test_report(no_kernel):  # noqa: F811
    model, changes = mixed(), []
    rt.convert(model, changes)
    assert [(c.name, c.replaced) for c in changes] == [
        ("0.lstm", True),
        ("0.cell", True),
        ("2", False),
        ("3", False),
        ("5", True),
    ]
    assert "test_torch_convert.Own is none of torch.nn's own classes" in str(changes[2])
    assert str(changes[3]).startswith("3: GRU(4, 4) left: ")
    assert "no kernel for torch.bfloat16" in changes[3].reason
    assert str(changes[0]) == "0.lstm: LSTM(3, 4) replaced"
    assert changes[0].module is model[0]["lstm"]
    again: list[Any] = []
    rt.convert(model, again)
    assert [c.name for c in again] == ["2", "3"]
    back: list[Any] = []
    rt.revert(model, back)
    assert [(c.name, c.replaced) for c in back if c.replaced] == [(n, True) for n in ("0.lstm", "0.cell", "4", "5")]
    assert type(model[4]) is nn.RNN


def test_without_a_report_it_is_logged(caplog, no_kernel):  # noqa: F811
    with caplog.at_level(logging.INFO, logger="rnnfast.torch"):
        rt.convert(mixed())
    assert [r.levelname for r in caplog.records] == ["INFO", "INFO", "WARNING", "WARNING", "INFO"]


def test_not_a_module(no_kernel):  # noqa: F811
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got str"):
        rt.convert("LSTM")


def test_what_belongs_to_a_module_stays():
    """Mode, hooks, optimiser, a second reference to the same layer, a parametrisation."""
    shared = nn.LSTM(3, 3, 2, dropout=0.3).eval()
    model = nn.ModuleList([shared, shared, nn.utils.parametrizations.weight_norm(nn.GRU(3, 3), "weight_hh_l0")])
    seen: list[str] = []
    shared.register_forward_hook(lambda *_: seen.append("hook"))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(5, 2, 3)
    expected, expected_norm = shared(x)[0].detach(), model[2](x)[0].detach()
    rt.convert(model)
    assert model[0] is model[1] is shared
    assert isinstance(shared, rt.LSTM)
    assert isinstance(model[2], rt.GRU)
    assert not shared.training
    torch.testing.assert_close(shared(x)[0], expected)
    torch.testing.assert_close(model[2](x)[0], expected_norm)
    assert seen == ["hook", "hook"]
    before = shared.weight_hh_l1.detach().clone()
    (shared(x)[0].sum() + model[2](x)[0].sum()).backward()
    optimiser.step()
    assert not torch.equal(shared.weight_hh_l1, before)
    rt.revert(model)
    assert isinstance(model[2], nn.GRU)
    assert torch.nn.utils.parametrize.is_parametrized(model[2], "weight_hh_l0")
    model[2](x)
    torch.nn.utils.parametrize.remove_parametrizations(model[2], "weight_hh_l0")
    assert type(model[2]) is nn.GRU


def test_export_to_onnx_after_revert(no_kernel):  # noqa: F811
    pytest.importorskip("onnx")
    model = rt.revert(rt.convert(nn.LSTM(3, 4).eval()))
    buffer = io.BytesIO()
    try:
        torch.onnx.export(model, (torch.randn(5, 2, 3),), buffer, dynamo=False)
    except (AttributeError, ImportError) as e:
        pytest.skip(f"this PyTorch has no TorchScript exporter: {e}")
    assert b"LSTM" in buffer.getvalue()


# ---- five models ----


class Tagger(nn.Module):
    """A bidirectional LSTM over packed sentences."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.lstm = nn.LSTM(6, 5, 2, batch_first=True, bidirectional=True)
        self.out = nn.Linear(10, 4)

    def forward(self, tokens: Any, lengths: Any) -> Any:
        packed = nn.utils.rnn.pack_padded_sequence(self.embedding(tokens), lengths, True, enforce_sorted=False)
        output, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return self.out(output)


class Translator(nn.Module):
    """An encoder, a decoder cell, and attention in between."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(20, 6), nn.Embedding(20, 6)
        self.encoder = nn.GRU(6, 4, bidirectional=True)
        self.decoder = nn.LSTMCell(6 + 8, 8)
        self.out = nn.Linear(16, 20)

    def forward(self, source: Any, target: Any) -> Any:
        memory, last = self.encoder(self.source(source))  # [S, B, 8]
        h = torch.cat([last[0], last[1]], -1)
        state, context, logits = (h, torch.zeros_like(h)), torch.zeros_like(h), []
        for word in self.target(target):
            state = self.decoder(torch.cat([word, context], -1), state)
            weights = torch.softmax((memory * state[0]).sum(-1), 0)
            context = (weights[..., None] * memory).sum(0)
            logits.append(self.out(torch.cat([state[0], context], -1)))
        return torch.stack(logits)


class Transducer(nn.Module):
    """An RNN-T: the predictor's state advances where a label is emitted, one step a call."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(5, 6, proj_size=4, batch_first=True)
        self.embedding = nn.Embedding(8, 4)
        self.predictor = nn.LSTM(4, 4, 2, batch_first=True)
        self.joint = nn.Linear(4, 8)

    def forward(self, frames: Any, labels: Any) -> Any:
        encoded, _ = self.encoder(frames)  # [B, T, 4]
        predicted, state = [], None
        for u in range(labels.shape[1]):
            step, state = self.predictor(self.embedding(labels[:, u : u + 1]), state)
            predicted.append(step)
        return self.joint(torch.tanh(encoded[:, :, None] + torch.cat(predicted, 1)[:, None]))


class Policy(nn.Module):
    """PPO's recurrent policy: the state is cut where an episode begins."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 6)
        self.actor, self.critic = nn.Linear(6, 3), nn.Linear(6, 1)

    def forward(self, observations: Any, starts: Any, state: Any) -> Any:
        if isinstance(self.lstm, rt.LSTM):
            output, _ = self.lstm(observations, state, reset=starts)  # the whole rollout in one call
        else:
            steps = []
            for observation, start in zip(observations, starts, strict=True):
                keep = (~start).to(observation.dtype)[None, :, None]
                step, state = self.lstm(observation[None], tuple(keep * s for s in state))
                steps.append(step)
            output = torch.cat(steps)
        return self.actor(output), self.critic(output)


class WeightDrop(nn.Module):
    """Dropout on the recurrent weights: the raw ones are parameters, the dropped ones are set before each call."""

    def __init__(self, lstm: Any, p: float) -> None:
        super().__init__()
        self.lstm, self.p = lstm, p
        weight = lstm.weight_hh_l0
        del lstm._parameters["weight_hh_l0"]
        lstm.register_parameter("weight_hh_l0_raw", nn.Parameter(weight.detach()))

    def forward(self, x: Any) -> Any:
        mask = torch.bernoulli(torch.full_like(self.lstm.weight_hh_l0_raw, 1 - self.p)) / (1 - self.p)
        self.lstm.weight_hh_l0 = self.lstm.weight_hh_l0_raw * mask
        return self.lstm(x)[0]


class LanguageModel(nn.Module):
    """Three layers with weight drop and tied embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.layers = nn.Sequential(*(WeightDrop(nn.LSTM(6, 6), 0.5) for _ in range(3)))
        self.out = nn.Linear(6, 20)
        self.out.weight = self.embedding.weight

    def forward(self, tokens: Any) -> Any:
        return self.out(self.layers(self.embedding(tokens)))


def inputs(kind: type) -> tuple[Any, ...]:
    frames = torch.randn(3, 7, 5, dtype=torch.float64)
    words = torch.randint(0, 8, (6, 4))
    return {
        Tagger: (torch.randint(0, 20, (4, 7)), torch.tensor([3, 7, 1, 5])),
        Translator: (torch.randint(0, 20, (6, 3)), torch.randint(0, 20, (4, 3))),
        Transducer: (frames, words[:3]),
        Policy: (
            torch.randn(20, 4, 5, dtype=torch.float64),
            torch.rand(20, 4) < 0.2,
            tuple(torch.randn(1, 4, 6, dtype=torch.float64) for _ in range(2)),
        ),
        LanguageModel: (torch.randint(0, 20, (9, 4)),),
    }[kind]


@pytest.mark.parametrize("kind", [Tagger, Translator, Transducer, Policy, LanguageModel])
def test_model_stays_the_same(kind):
    torch.manual_seed(3)
    model, arguments = kind().double(), inputs(kind)
    converted, changes = copy.deepcopy(model), []
    rt.convert(converted, changes)
    assert changes
    assert all(change.replaced for change in changes)
    results = []
    for m in (model, converted):
        torch.manual_seed(4)
        outputs = leaves(m(*arguments))
        generator = torch.Generator().manual_seed(5)
        loss = sum((o * torch.randn(o.shape, dtype=o.dtype, generator=generator)).sum() for o in outputs)
        results.append((outputs, torch.autograd.grad(loss, list(m.parameters()))))
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-11)
    rt.revert(converted)
    before = functional.kernel_calls()
    torch.manual_seed(4)
    torch.testing.assert_close(leaves(converted(*arguments)), results[0][0])
    assert functional.kernel_calls() == before


@pytest.mark.usefixtures("no_kernel")
def test_an_instance_with_a_forward_of_its_own_is_left():
    module = nn.LSTM(6, 8)
    module.forward = lambda x, forward=module.forward: forward(2 * x)
    report = []
    rt.convert(module, report)
    assert type(module) is nn.LSTM
    assert not report[0].replaced
    assert "forward was replaced" in report[0].reason
    module(torch.zeros(3, 2, 6))
