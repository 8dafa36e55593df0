"""Types of command-line values: comma-separated lists and shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import click


class CommaList(click.ParamType):
    """ "a,b" as ("a", "b"), each one of `choices` if there are any."""

    name = "list"

    def __init__(self, choices: Sequence[str] = ()) -> None:
        self.choices = tuple(choices)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if not isinstance(value, str):
            return tuple(value)
        found = tuple(dict.fromkeys(part.strip() for part in value.split(",") if part.strip()))
        unknown = [part for part in found if self.choices and part not in self.choices]
        if unknown or not found:
            wanted = f"some of {', '.join(self.choices)}" if self.choices else "names separated by commas"
            self.fail(f"expected {wanted}, got {value!r}", param, ctx)
        return found


class Shape(click.ParamType):
    """ "T,B,I,H" as four positive integers."""

    name = "shape"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if not isinstance(value, str):
            return tuple(value)
        try:
            sizes = tuple(int(part) for part in value.split(","))
        except ValueError:
            sizes = ()
        if len(sizes) != 4 or min(sizes) < 1 or max(sizes) >= 2**31:
            self.fail(f"expected four positive integers T,B,I,H below 2**31, got {value!r}", param, ctx)
        return sizes


class Share(click.FloatRange):
    """A number within [0, 1]; click's own range lets NaN through."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"expected a number, got {value!r}", param, ctx)
        return number


COMMA_LIST = CommaList()
SHAPE = Shape()
