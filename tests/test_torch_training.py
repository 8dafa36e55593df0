"""A training run gives the same loss curve as torch.nn's from the same seed."""

from __future__ import annotations

from typing import Any

import pytest

from torch_cases import (
    rt,
    strict,  # noqa: F401
    torch,
)

nn = torch.nn

STEPS = 200


class LanguageModel(nn.Module):
    def __init__(self, lstm: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.lstm = lstm(8, 24, 2)
        self.out = nn.Linear(24, 12)

    def forward(self, text: Any, state: Any) -> Any:
        output, state = self.lstm(self.embedding(text), state)
        return self.out(output), state


def make_text() -> Any:
    """Nested brackets and counting: a language with something to learn for a state."""
    generator, rows = torch.Generator().manual_seed(1), []
    for _ in range(8):
        row: list[int] = []
        while len(row) <= 12 * STEPS:
            n = int(torch.randint(1, 6, (), generator=generator))
            row += [0] * n + [1 + n] + [7] * n
        rows.append(row[: 12 * STEPS + 1])
    return torch.tensor(rows).T


def loss_curve(lstm: Any) -> list[float]:
    torch.manual_seed(0)
    model, text = LanguageModel(lstm), make_text()
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    state, losses = None, []
    for step in range(STEPS):
        window = text[12 * step : 12 * step + 13]
        logits, state = model(window[:-1], state)
        state = tuple(s.detach() for s in state)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), window[1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def test_same_loss_curve_as_torch(restore_sharing):
    torch.set_num_threads(1)  # both libraries' idle threads would spin in each other's way
    ours, theirs = loss_curve(rt.LSTM), loss_curve(nn.LSTM)
    assert theirs[-1] < 0.4 * theirs[0]
    assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
def test_memory_modes_give_the_same_gradients(cell: str, compiled: bool) -> None:
    def gradients(**memory: Any) -> list[Any]:
        torch.manual_seed(0)
        layer = getattr(rt, cell)(3, 8, 2, bidirectional=True, dropout=0.3)
        x = torch.randn(20, 4, 3, requires_grad=True)
        call = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
        output, _ = call(x, lengths=torch.tensor([20, 3, 0, 11]), **memory)
        output.square().sum().backward()
        return [output, x.grad, *(p.grad for p in layer.parameters())]

    torch._dynamo.reset()
    full = gradients()
    for memory in ({"lean": True}, {"checkpoint_every": 6}):
        for a, b in zip(gradients(**memory), full, strict=True):
            assert torch.equal(a, b)
