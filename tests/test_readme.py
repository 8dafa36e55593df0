"""README's python blocks run as they are written, in their order; what they leave to the reader is given here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rnnfast

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
COMPLETE = [block for block in BLOCKS if "import" in block]  # the others use arrays of the reader's
T, B, IN, H = 7, 3, 2, 4


def run(block: str, names: dict[str, Any]) -> dict[str, Any]:
    exec(compile(block, str(README), "exec"), names)
    return names


@pytest.mark.parametrize("block", COMPLETE, ids=range(len(COMPLETE)))
def test_block_runs(block: str) -> None:
    if "rnnfast.torch" in block:
        pytest.importorskip("torch")
    run(block, {})


def test_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)  # it saves a file
    (block,) = (block for block in BLOCKS if block not in COMPLETE)
    lstm, rng = rnnfast.LSTM(IN, H, seed=0), np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    names = run(
        block,
        {
            "rnnfast": rnnfast,
            "lstm": lstm,
            "adam": rnnfast.optim.Adam(lstm.parameters()),
            "x": normal(T, B, IN),
            "x_t": normal(1, IN),
            "h0": normal(1, B, H),
            "c0": normal(1, B, H),
            "h": normal(1, 1, H),
            "c": normal(1, 1, H),
            "episode_starts": rng.random((T, B)) < 0.2,
            "grad_output": normal(T, B, H),
            "target": normal(T, B, H),
            "torch_lstm": torch.nn.LSTM(IN, H),
        },
    )
    assert lstm.training
    assert names["y"].shape == (1, H)
    assert isinstance(names["torch_lstm"], torch.nn.LSTM)
