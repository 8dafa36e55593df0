"""Draw the pictures and README tables from the JSON records in bench/results/.

    python bench/plots.py [--results DIR] [--pictures DIR] [--readme FILE] [--check]

One picture a file. In the README everything between ``<!-- bench: NAME -->`` and ``<!-- /bench -->`` is replaced by
the table of NAME.json: geometric mean and minimum of the ratios by mode, cell and size, the name of the row that has the
least ratio of the last column, and where it was measured. With --check nothing is written; the exit status is 1 if the
README does not say what the records say.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rnnfast.bench import plot, records, summary

ROOT = Path(__file__).resolve().parent.parent
OTHERS = {"accuracy", "dropin", "instructions", "mixed", "ragged", "splits", "steps", "streams"}  # of other scripts
MARKED = re.compile(r"(<!-- bench: (?P<name>[\w.-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def table(rows: Sequence[records.Record], provenance: dict[str, Any]) -> str:
    """The summary as a Markdown table with its provenance below."""
    groups = summary.groups(rows)
    rivals = list(dict.fromkeys(group.rival for group in groups))
    heads = ["mode", "cell", "size", "rows", *(f"× {name}" for name in rivals), f"row with the least × {rivals[-1]}"]
    lines = [heads, ["---"] * 4 + ["---:"] * len(rivals) + ["---"]]
    for key in dict.fromkeys((group.mode, group.cell, group.size_class) for group in groups):
        members = {g.rival: g for g in groups if (g.mode, g.cell, g.size_class) == key}
        found = [members.get(rival) for rival in rivals]
        cells = ["" if group is None else f"{group.mean:.2f} ({group.minimum:.2f})" for group in found]
        last = next(group for group in reversed(found) if group is not None)
        lines.append([*key, str(max(group.count for group in members.values())), *cells, last.worst])
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{body}\n\n{origin(provenance)}\n"


def origin(provenance: dict[str, Any]) -> str:
    """Where and with what the numbers were measured, in one sentence."""
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    place = f"{provenance['cpu']}, {provenance['threads']} of {provenance['cores']} cores, {provenance['isa']}"
    device = f", {provenance['gpu']} with driver {provenance['driver']}" if provenance["gpu"] else ""
    commit = (provenance["commit"] or "unknown")[:12]
    what = "Geometric mean (minimum) of the rival's median time over rnnfast's"
    return f"{what}; {place}{device}; {versions}; commit {commit}, {provenance['date'][:10]}."


def fill(text: str, tables: dict[str, str]) -> str:
    """The README's text with every marked table replaced; raises KeyError for a mark without records."""

    def replaced(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in tables:
            raise KeyError(f"bench: expected records for the mark {name!r}, have {sorted(tables)}")
        return f"{match[1]}{tables[name]}{match[3]}"

    return MARKED.sub(replaced, text)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    files = [path for path in sorted(options.results.glob("*.json")) if path.stem not in OTHERS]
    found = {path.stem: records.read_json(path) for path in files}
    with_ratios = {name: content for name, content in found.items() if summary.groups(content[0])}
    tables = {name: table(*content) for name, content in with_ratios.items()}
    text = options.readme.read_text()
    filled = fill(text, tables)
    if options.check:
        return int(filled != text)
    options.readme.write_text(filled)
    options.pictures.mkdir(parents=True, exist_ok=True)
    for name, (rows, provenance) in with_ratios.items():
        title = f"{name}: {provenance['cpu']}, {provenance['threads']} threads"
        plot.draw(rows, options.pictures / f"{name}.png", title)
        print(f"{name}: {len(rows)} records")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draw pictures and README tables from benchmark records.")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if the README is out of date")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
