"""Strict mode: what to do where rnnfast has no kernel for a case and another library's implementation must run.

By default that is said once for each reason; in strict mode it raises. Nothing is ever replaced silently.
"""

from __future__ import annotations

import warnings

__all__ = ["FallbackWarning", "fall_back", "get_strict", "set_strict"]


class FallbackWarning(UserWarning):
    """rnnfast has no kernel for this case, and something slower runs instead."""


_strict = False
_said: set[str] = set()


def set_strict(flag: bool) -> None:
    """With True, a call that no kernel of rnnfast can serve raises RuntimeError instead of running something slower."""
    if not isinstance(flag, bool):
        raise TypeError(f"flag: expected a bool, got {type(flag).__name__}")
    global _strict
    _strict = flag


def get_strict() -> bool:
    """Whether strict mode is on."""
    return _strict


def fall_back(reason: str, instead: str) -> None:
    """Announce that `instead` runs because of `reason`: once for each pair, or as RuntimeError in strict mode."""
    message = f"rnnfast: {reason}; {instead}"
    if _strict:
        raise RuntimeError(f"{message} (strict mode)")
    if message not in _said:
        _said.add(message)
        warnings.warn(message, FallbackWarning, stacklevel=3)
