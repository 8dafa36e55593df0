"""README's python blocks that stand alone run as they are written, each in a fresh namespace."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
COMPLETE = [block for block in BLOCKS if "import" in block]  # the others use arrays of the reader's


@pytest.mark.parametrize("block", COMPLETE, ids=range(len(COMPLETE)))
def test_block_runs(block):
    if "rnnfast.torch" in block:
        pytest.importorskip("torch")
    exec(compile(block, str(README), "exec"), {})
