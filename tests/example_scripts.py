"""The scripts under examples/ as modules: they are no package, and import harness.py, which lies beside them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def example_script(name: str) -> Any:
    """A fixture that is the module of examples/NAME.py."""

    @pytest.fixture(scope="module", name="script")
    def script() -> Iterator[ModuleType]:
        sys.path.insert(0, str(EXAMPLES))
        try:
            yield importlib.import_module(name)
        finally:
            sys.path.remove(str(EXAMPLES))

    return script
