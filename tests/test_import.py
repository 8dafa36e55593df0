"""What `import rnnfast` brings: NumPy and the engine, nothing else."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys, numpy
before = set(sys.modules)
import rnnfast
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(new - set(sys.stdlib_module_names) - {"numpy", "rnnfast"}))
"""


def test_loads_numpy_alone() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
