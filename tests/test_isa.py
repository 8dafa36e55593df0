"""Instruction sets: the one that RNNFAST_ISA names is the one that runs, and all compute the same."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from conftest import RunPython
from reference_cases import Case, assert_close, make, normwise_error, results
from rnnfast import _core, functional, reference

CELLS = tuple(functional.CELLS)
PARAMETERS = {name: tuple((p, 0.3) for p in info.parameters) for name, info in functional.CELLS.items()}
LANES = {"scalar": 1, "neon": 4, "avx2": 8, "avx512": 16}  # of float32
ULP = float(np.finfo(np.float32).eps)


def some_cases() -> Iterator[Case]:
    """Sizes with and without padded lanes for every vector length, every option somewhere."""
    for cell in CELLS:
        for H, dtype in ((1, "float32"), (7, "float64"), (16, "float32"), (37, "float64"), (37, "float32")):
            options: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "lengths": True, "reset": 0.2}
            case = Case(cell=cell, T=9, B=7, I=5, H=H, dtype=dtype, parameters=PARAMETERS[cell], **options)
            yield case
            if case.has_c and H > 3:
                yield Case(cell=cell, T=9, B=7, I=5, H=H, proj=3, dtype=dtype, **options)


def checked() -> dict[str, Any]:
    """In a process of its own: which instruction set ran, and its results, held against the reference."""
    digests = []
    for case in some_cases():
        arrays = make(case)
        found, truth = results(functional, case, arrays), results(reference, case, arrays.astype("float64"))
        if case.dtype == "float64":
            assert_close(found, truth, 1e-12, 1e-11)
        else:
            for name, value in truth.items():  # the gradient of one unit may cancel to almost nothing: hence the floor
                assert normwise_error(found[name], value, floor=1.0) < 16 * ULP, (case, name)
        digests.append(float(np.abs(found["grad_x"]).sum()))
    packed = functional.pack("gru", make(Case(cell="gru", H=37, dtype="float32")).weights)
    return {"isa": _core.isa(), "packed": packed.core.nbytes, "digests": digests}


CODE = "import json, test_isa; print(json.dumps(test_isa.checked()))"


@pytest.mark.parametrize("isa", _core.isas())
def test_forced(isa: str, run_python: RunPython) -> None:
    """That it really ran is seen in the packed weights, too, which are padded to whole vectors."""
    found = json.loads(run_python(CODE, RNNFAST_ISA=isa))
    assert found["isa"] == isa
    lanes = LANES[isa]
    padded = -(-37 // lanes) * lanes
    arrays = (padded * 4 * 3, padded * 37 * 3, padded * 4)  # W_ih, W_hh and the biases of four slots, H = 37 and I = 4
    assert found["packed"] == sum(-(-4 * n // 64) * 64 for n in arrays)
    here = checked()
    assert here["isa"] == _core.isa()
    np.testing.assert_allclose(found["digests"], here["digests"], rtol=1e-5)


def test_the_best_is_chosen_without_being_told(run_python: RunPython) -> None:
    for value in (None, ""):
        found = run_python("from rnnfast import _core; print(_core.isa())", RNNFAST_ISA=value)
        assert found.split() == _core.isas()[:1]


def test_what_is_possible() -> None:
    assert set(_core.isas()) <= set(_core.compiled_isas())
    assert _core.isas()[-1] == "scalar"
    assert _core.isa() in _core.isas()


@pytest.mark.parametrize("name", ["sse9", "AVX2", "avx512 ", "0", *sorted({"neon", "avx2"} - set(_core.isas()))])
def test_unknown_or_impossible(name: str, run_python: RunPython) -> None:
    """A clear error that names the variable, what is possible here and what came; no crash, no silent default."""
    error = run_python("import rnnfast", expect=1, RNNFAST_ISA=name)
    assert "RNNFAST_ISA: expected one of" in error
    assert repr(name) in error
    assert all(isa in error for isa in _core.isas())


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm, which lists symbols, is not installed")
def test_no_symbol_is_shared_between_instruction_sets() -> None:
    """A function compiled for two instruction sets under one name could reach a CPU that cannot run it: all that has
    vector registers in its signature, and every engine, lies in the namespace of its instruction set.
    """
    found = subprocess.run(["nm", "-C", _core.__file__], capture_output=True, text=True, check=False)
    if "rnnfast" not in found.stdout:
        pytest.skip("the extension module is stripped: it has no symbols to look at")
    weak = [line for line in found.stdout.splitlines() if re.search(r" [WVu] ", line)]
    names = "|".join(LANES)
    own = re.compile(rf"rnnfast::({names}|base)::")
    kernels = [line for line in found.stdout.splitlines() if own.search(line)]
    assert {own.search(line).group(1) for line in kernels} >= set(_core.compiled_isas())  # type: ignore[union-attr]
    leaked = [line for line in weak if "rnnfast::" in line and "__vector" in line and not own.search(line)]
    assert not leaked
