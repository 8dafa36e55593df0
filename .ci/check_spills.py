"""What ptxas -v says of the kernels: python check_spills.py BUILD.log fails where registers are spilled to local memory.

The kernels are shaped for the architectures in TUNED, which may spill nothing; on others a few bytes may go there. Prints, for
each kernel template and architecture, the most registers that any of its instances takes.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
TUNED, ELSEWHERE = ("sm_80", "sm_90a"), 64  # bytes
NAME = re.compile(r"\d+([a-z_]+_kernel)")


def main(log: Path) -> int:
    most: dict[tuple[str, str], int] = {}
    spilled, entry = [], ("", "")
    for line in log.read_text(errors="replace").splitlines():
        if found := ENTRY.search(line):
            name = NAME.search(found[1])
            entry = (name[1] if name else found[1], found[2])
        elif found := SPILLS.search(line):
            if max(int(found[2]), int(found[3])) > (0 if entry[1] in TUNED else ELSEWHERE):
                spilled.append(f"{entry[0]} for {entry[1]}: {found[0]}")
        elif found := REGISTERS.search(line):
            most[entry] = max(most.get(entry, 0), int(found[1]))
    for (name, architecture), registers in sorted(most.items()):
        print(f"{name:28} {architecture:8} {registers:4} registers")
    print(*spilled, sep="\n")
    print(f"{len(most)} kernels, {len(spilled)} with spills")
    return int(bool(spilled) or not most)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
