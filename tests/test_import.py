"""`import rnnfast` brings NumPy and nothing else: what costs time or may be missing is loaded where it is used."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from conftest import RunPython

LOADED = """
import json, sys
import numpy, numpy.random
before = set(sys.modules)
{code}
print(json.dumps(sorted({{name.partition(".")[0] for name in set(sys.modules) - before}})))
"""
LATER = ("torch", "rich", "click", "safetensors", "cupy", "matplotlib", "onnxruntime", "jax", "scipy", "pytest")


@pytest.mark.parametrize(
    "code",
    [
        "import rnnfast",
        "import rnnfast.functional, rnnfast.modules, rnnfast.optim, rnnfast.reference, rnnfast.serialization",
        "from rnnfast import *",
        """
import rnnfast
lstm = rnnfast.LSTM(2, 3, seed=0)
output, _ = lstm(numpy.zeros((4, 1, 2), "float32"))
lstm.backward(output)
rnnfast.clip_grad_norm_(lstm.parameters(), 1.0)
rnnfast.optim.Adam(lstm.parameters()).step()
""",
    ],
    ids=["import", "submodules", "star", "training"],
)
def test_numpy_alone(code: str, run_python: RunPython) -> None:
    loaded = set(json.loads(run_python(LOADED.format(code=code))))
    others = loaded - {"rnnfast"} - set(sys.stdlib_module_names)
    assert not {name for name in others if not name.startswith(("_", "numpy"))}
    assert not loaded & set(LATER)


def test_version_and_all(run_python: RunPython) -> None:
    found = run_python("import rnnfast; print(rnnfast.__version__, all(hasattr(rnnfast, n) for n in rnnfast.__all__))")
    version, complete = found.split()
    assert version[0].isdigit()
    assert complete == "True"


def test_nothing_is_printed_or_warned_about(run_python: RunPython) -> None:
    run_python("import warnings; warnings.simplefilter('error'); import numpy; import rnnfast")
    assert run_python("import numpy, rnnfast") == ""


def test_unknown_attribute() -> None:
    import rnnfast

    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        rnnfast.nothing_of_that_name  # noqa: B018


def test_floating_point_mode_after_import(run_python: RunPython) -> None:
    """A library linked with fast-math would turn denormals off for the whole process."""
    code = "import numpy, rnnfast; print(float(numpy.float32(1e-40) / 2 * numpy.float32(2)))"
    assert float(run_python(code)) == pytest.approx(float(np.float32(1e-40)), rel=1e-3)
