"""What is shipped: python check_dist.py SDIST WHEEL. Each must hold what it needs, and nothing that is only ours."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from fnmatch import fnmatchcase
from pathlib import Path

WHEEL_NEEDS = (
    *("rnnfast/__init__.py", "rnnfast/py.typed", "rnnfast/_core.pyi", "rnnfast/_core.*.so"),
    *("rnnfast-*/METADATA", "rnnfast-*/entry_points.txt", "rnnfast-*/licenses/LICENSE"),
)
WHEEL_HOLDS = ("rnnfast/*", "rnnfast-*.dist-info/*")
NOBODY_NEEDS = ("*.pyc", "*results*", "*/.ci/*", ".ci/*", "*.o", "*.json", "*.csv", "*.safetensors")
WHEEL_LACKS = (*NOBODY_NEEDS, "*tests/*", "*.cpp", "*.h", "*.cu", "*.cuh", "*.a")
SDIST_LACKS = (*NOBODY_NEEDS, "*.so")
ONLY_IN_GIT = (".ci/*", "bench/results/*", ".gitignore")


def matching(names: list[str], patterns: tuple[str, ...]) -> list[str]:
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def check_wheel(path: Path) -> list[str]:
    names = [name for name in zipfile.ZipFile(path).namelist() if not name.endswith("/")]
    problems = [f"lacks {pattern}" for pattern in WHEEL_NEEDS if not matching(names, (pattern,))]
    problems += [f"holds {name}" for name in matching(names, WHEEL_LACKS)]
    problems += [f"holds {name}" for name in names if not matching([name], WHEEL_HOLDS)]
    modules = [file.removeprefix("python/") for file in tracked() if file.startswith("python/")]
    return problems + [f"lacks {name}" for name in modules if name not in names]


def check_sdist(path: Path) -> list[str]:
    with tarfile.open(path) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    problems = [f"holds {name}" for name in matching(names, SDIST_LACKS)]
    needed = [file for file in tracked() if not matching([file], ONLY_IN_GIT)]
    return problems + [f"lacks {file}" for file in needed if file not in names]


def tracked() -> list[str]:
    return subprocess.run(["git", "ls-files"], check=True, capture_output=True, text=True).stdout.split()


def main(sdist: Path, wheel: Path) -> int:
    problems = [f"{sdist.name} {p}" for p in check_sdist(sdist)] + [f"{wheel.name} {p}" for p in check_wheel(wheel)]
    for problem in problems:
        print(problem)
    print(f"{sdist.name} {sdist.stat().st_size >> 10} KiB, {wheel.name} {wheel.stat().st_size >> 10} KiB")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
