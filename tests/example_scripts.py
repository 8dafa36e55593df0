"""The scripts under examples/ as modules: they are no package, and import harness.py, which lies beside them."""

from __future__ import annotations

import importlib
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import rnnfast

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


def invoke(script: Any, *arguments: Any) -> Result:
    """The script's command line, in its tiny mode."""
    return CliRunner().invoke(script.main, ["--tiny", *map(str, arguments)])


def succeed(script: Any, *arguments: Any) -> str:
    """What the script prints."""
    result = invoke(script, *arguments)
    assert result.exit_code == 0, result.output
    return result.output


def refused(script: Any, *arguments: Any) -> str:
    """The error that the script ends with: one line, exit status 1."""
    result = invoke(script, *arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    lines = result.output.strip().splitlines()
    assert lines[-1].startswith("Error: ")
    return lines[-1]


def contents(path: Path) -> dict[str, Any]:
    """Weights, optimiser and what else decides how a training goes on, of a file of --save."""
    if zipfile.is_zipfile(path):
        return contents_of_torch(path)
    checkpoint = rnnfast.load_checkpoint(path)
    user = {name: value for name, value in checkpoint.user.items() if name not in ("seconds", "notes")}
    dropout = [m.call_count for m in checkpoint.module.modules() if hasattr(m, "call_count")]
    return {**checkpoint.module.state_dict(), **checkpoint.optimizer, **user, "dropout": dropout}


def contents_of_torch(path: Path) -> dict[str, Any]:
    import torch

    content = torch.load(path, weights_only=True)
    content["user"] = {name: value for name, value in content["user"].items() if name not in ("seconds", "notes")}

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(entry) for name, entry in value.items()}
        return value.numpy() if isinstance(value, torch.Tensor) else value

    return plain(content)


def assert_same_training(a: Path, b: Path) -> None:
    np.testing.assert_equal(contents(a), contents(b))


def interrupted(learn: Callable[..., Any], stop: int) -> Callable[..., Any]:
    """A task's `learn` that is stopped with Ctrl-C after `stop` calls."""
    calls = iter(range(stop))

    def call(self: Any, *arguments: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return learn(self, *arguments)

    return call


def check_stop_and_resume(script: Any, task: str, folder: Path, monkeypatch: Any, stop: int, *options: Any) -> None:
    """A training that is stopped after `stop` steps and resumed ends with the same bits as one that is not."""
    succeed(script, *options, "--save", folder / "whole")
    with monkeypatch.context() as patch:
        kind = getattr(script, task)
        patch.setattr(kind, "learn", interrupted(kind.learn, stop))
        result = invoke(script, *options, "--save", folder / "parts")
        assert result.exit_code == 130, result.output
    succeed(script, *options, "--save", folder / "parts", "--resume")
    assert_same_training(folder / "whole", folder / "parts")
