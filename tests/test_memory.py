"""Memory: the size of the reserve, no growth over training steps, bounded scratch for long sequences."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest

import rnnfast
from rnnfast import functional


def weights(cell: str, inputs: int, hidden: int) -> list[np.ndarray]:
    rows = functional.CELLS[cell].gates * hidden
    rng = np.random.default_rng(0)
    return [rng.uniform(-0.1, 0.1, shape).astype(np.float32) for shape in ((rows, inputs), (rows, hidden))]


@pytest.mark.parametrize(("cell", "values"), [("lstm", 5), ("gru", 4), ("rnn_tanh", 1)])
def test_reserve(cell: str, values: int) -> None:
    """Values kept for each unit and step, beside the output; the LSTM also keeps c0 of each row."""
    T, B, H = 50, 8, 64
    _, _, ctx = functional.forward(cell, np.zeros((T, B, 16), np.float32), None, weights(cell, 16, H))
    first_states = B * H if cell == "lstm" else 0
    assert ctx.nbytes <= 4 * (values * T * B * H + first_states) + 256


def test_ragged_reserve_holds_valid_steps_only() -> None:
    T, B, H = 100, 8, 64
    x, lengths = np.zeros((T, B, 16), np.float32), [10] * (B - 1) + [T]
    _, _, ctx = functional.lstm(x, None, weights("lstm", 16, H), lengths=lengths)
    assert ctx.nbytes <= 4 * 5 * (sum(lengths) + B) * H + 256


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system has no /proc")
def test_no_leak_over_training_steps() -> None:
    lstm = rnnfast.LSTM(32, 64, 2, bidirectional=True, seed=0)
    x = np.ones((40, 16, 32), np.float32)

    def step() -> None:
        output, _ = lstm(x, lengths=np.arange(16) + 20)
        lstm.backward(output)
        lstm.zero_grad()

    for _ in range(20):
        step()
    before = resident()
    for _ in range(200):
        step()
    assert resident() - before < 8 << 20  # one step's reserve is 11 MB


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system has no /proc")
def test_scratch_does_not_grow_with_the_sequence() -> None:
    T, H = 100_000, 32
    packed = functional.pack("lstm", weights("lstm", 8, H))
    x = np.zeros((T, 1, 8), np.float32)
    functional.forward("lstm", x[:100], None, packed, training=False)
    before = resident()
    output, _, _ = functional.forward("lstm", x, None, packed, training=False)
    assert resident() - before - output.nbytes < 16 << 20
