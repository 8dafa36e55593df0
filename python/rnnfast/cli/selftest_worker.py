"""The cases on one ISA, in a process of its own: ``RNNFAST_ISA=avx2 python -m rnnfast.cli.selftest_worker``.

The ISA is chosen when the engine is loaded, so one process tests one. With the argument "cuda" it is the CUDA engine's turn.
Prints a JSON line for each cell and dtype.
"""

from __future__ import annotations

import json
import sys

from .. import _core, reference
from . import selftest_cases as cases


def check(cell: str, dtype: str, on_device: bool = False) -> dict[str, object]:
    """The worst errors over all cases, as (forward, gradients), of the kernels and of the reference run in `dtype`."""
    worst, peer, count = (0.0, 0.0), (0.0, 0.0), 0
    for case in cases.cases(cell):
        found, expected = cases.compare(cell, case, dtype, on_device)
        worst = max(worst[0], found[0]), max(worst[1], found[1])
        peer = max(peer[0], expected[0]), max(peer[1], expected[1])
        count += 1
    return {"cell": cell, "dtype": dtype, "cases": count, "worst": worst, "peer": peer}


def main() -> None:
    on_device = sys.argv[1:] == ["cuda"]
    print(json.dumps({"isa": "cuda" if on_device else _core.isa()}), flush=True)
    for cell in reference.CELLS:
        for dtype in cases.DTYPES:
            print(json.dumps(check(cell, dtype, on_device)), flush=True)


if __name__ == "__main__":
    main()
