"""A skipped test is one that was not run: python check_skips.py PYTEST.xml ALLOWED.txt fails where a reason is not listed.

ALLOWED holds one reason a line, in the form of fnmatch ("* needs a GPU"); lines that start with # are comments.
"""

from __future__ import annotations

import ast
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from xml.etree import ElementTree


def skips(report: Path) -> list[tuple[str, str]]:
    """(test, reason) of everything that was skipped; expected failures count as skips, too."""
    cases = ElementTree.parse(report).getroot().iter("testcase")
    return [(f"{c.get('classname')}::{c.get('name')}", reason(skip)) for c in cases for skip in c.iter("skipped")]


def reason(skip: ElementTree.Element) -> str:
    """Of a whole file that was skipped pytest gives the reason as (path, line, "Skipped: reason") in the text."""
    message = skip.get("message", "")
    if message == "collection skipped":
        message = str(ast.literal_eval(skip.text or "()")[-1])
    return message.removeprefix("Skipped: ")


def allowed(path: Path) -> list[str]:
    lines = (line.strip() for line in path.read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def main(report: Path, listing: Path) -> int:
    patterns, found = allowed(listing), skips(report)
    unlisted = [skip for skip in found if not any(fnmatchcase(skip[1], pattern) for pattern in patterns)]
    for test, reason in unlisted:
        print(f"skipped for a reason that is not in {listing}: {test}: {reason}")
    print(f"{len(found)} skipped, {len(unlisted)} of them not allowed")
    return int(bool(unlisted))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
