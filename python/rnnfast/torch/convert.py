"""torch.nn's recurrent modules to rnnfast's, and back, in place.

A module keeps its identity, its parameters, hooks, mode and attributes; what changes is its class. So optimisers,
weight sharing, parametrisations and every reference to it stay valid.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

from . import cells, fallback, modules

__all__ = ["Change", "convert", "revert"]

M = TypeVar("M", bound=torch.nn.Module)

NAMES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
OURS = {getattr(torch.nn, name): getattr(modules if hasattr(modules, name) else cells, name) for name in NAMES}
THEIRS = {own: original for original, own in OURS.items()}

logger = logging.getLogger("rnnfast.torch")


class Change(NamedTuple):
    """What became of one recurrent module."""

    name: str  # within the module that was converted; "" is that module itself
    module: torch.nn.Module
    replaced: bool
    reason: str  # why it was left, or ""

    def __str__(self) -> str:
        name = self.name or "the module itself"
        return f"{name}: {self.module} {'replaced' if self.replaced else f'left: {self.reason}'}"


def convert(module: M, report: list[Change] | None = None) -> M:
    """Replace every RNN, LSTM, GRU and cell of torch.nn within `module`, or `module` itself, by rnnfast's.

    Parameters
    ----------
    module : torch.nn.Module
        Changed in place and returned.
    report : list, optional
        Receives a `Change` for every recurrent module found. Without it, what was left is logged as a warning by the
        logger "rnnfast.torch", what was replaced as information.

    Left are modules of other classes (a subclass may have changed what the class does), those whose instance has a
    `forward` of its own, and those for which there is no kernel, by dtype or device.
    """
    return _change(module, OURS, report, _reason_to_leave)


def revert(module: M, report: list[Change] | None = None) -> M:
    """The inverse of `convert`: torch.nn's classes for all of rnnfast's, for an exporter that knows only those."""
    return _change(module, THEIRS, report, lambda _: None)


def _change(
    module: M,
    classes: dict[type, type],
    report: list[Change] | None,
    reason_to_leave: Callable[[torch.nn.Module], str | None],
) -> M:
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    changes = []
    for name, child in list(module.named_modules()):
        if not isinstance(child, (torch.nn.RNNBase, torch.nn.RNNCellBase)) or _base(child) in classes.values():
            continue
        why = reason_to_leave(child)
        target = classes.get(_base(child))
        if why is None and target is None:
            why = f"{type(child).__module__}.{type(child).__qualname__} is none of torch.nn's own classes"
        if why is None and target is not None:
            _set_class(child, target)
        changes.append(Change(name, child, why is None, why or ""))
    if report is not None:
        report.extend(changes)
    else:
        for change in changes:
            logger.log(logging.INFO if change.replaced else logging.WARNING, "%s", change)
    return module


def _reason_to_leave(module: torch.nn.Module) -> str | None:
    if _base(module) not in OURS:
        return None
    if "forward" in vars(module):
        return "its forward was replaced, and may call the original one in a way that nobody knows"
    weight = next(iter(module.parameters()))
    return fallback.reason(weight, weight)


def _is_parametrized(module: torch.nn.Module) -> bool:
    # torch.nn.utils.parametrize makes a class for the instance, named after its base.
    return "parametrizations" in module._modules and type(module).__name__.startswith("Parametrized")


def _base(module: torch.nn.Module) -> type:
    return type(module).__bases__[0] if _is_parametrized(module) else type(module)


def _set_class(module: torch.nn.Module, target: type) -> None:
    if _is_parametrized(module):
        own: dict[str, Any] = {k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__")}
        target = type(type(module).__name__, (target,), own)
    module.__dict__.pop("_weight_cache", None)
    module.__class__ = target
