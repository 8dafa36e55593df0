"""No machine is handed an instruction that it lacks: python check_objects.py BUILD_FOLDER (x86-64; needs binutils).

1. What every machine runs (core, dispatch, the scalar engine) has no VEX or EVEX instruction.
2. What only some machines run defines nothing outside the namespace of its instruction set: of an inline function that two
   objects define the linker keeps any one, and that must not be the one with AVX-512 in it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

WIDE = re.compile(r"^\s+[0-9a-f]+:\s+(v[a-z]\w*\s|.*%[yz]mm|.*%k[0-7]\b)")
ENGINE = re.compile(r"engine_(avx2|avx512)_")
HARMLESS = {"DW.ref.__gxx_personality_v0"}


def lines(*command: str | Path) -> list[str]:
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout.splitlines()


def wide_instructions(path: Path) -> list[str]:
    """Instructions that baseline x86-64 lacks."""
    return [line.strip() for line in lines("objdump", "-d", "--no-show-raw-insn", path) if WIDE.match(line)]


def foreign_symbols(path: Path, isa: str) -> list[str]:
    """Defined symbols that another object could be linked to."""
    mark = f"7rnnfast{len(isa)}{isa}"
    names = [line.split()[-1] for line in lines("nm", "--defined-only", "--extern-only", path)]
    return [name for name in names if mark not in name and name not in HARMLESS]


def main(folder: Path) -> int:
    objects = [path for path in sorted(folder.rglob("*.o")) if "/csrc/" in path.as_posix()]
    found = 0
    kinds = {"baseline": 0, "avx2": 0, "avx512": 0}
    for path in objects:
        engine = ENGINE.search(path.as_posix())
        kinds[engine[1] if engine else "baseline"] += 1
        problems = foreign_symbols(path, engine[1]) if engine else wide_instructions(path)
        found += len(problems)
        for problem in problems[:10]:
            print(f"{path.relative_to(folder)}: {problem}")
    print(f"{len(objects)} objects {kinds}: {found} problems")
    return int(bool(found) or not all(kinds.values()))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
