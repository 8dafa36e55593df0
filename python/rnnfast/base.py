"""Parameters and modules: named arrays with gradients, and trees of them.

A `Module` knows its parameters, its children, whether it trains, and nothing of time, threads or files. The names in
`state_dict` are PyTorch's, so that a checkpoint moves between the two libraries without a table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ._arrays import check_array, check_dtype, check_shape, check_writable, detached

__all__ = ["Module", "Parameter"]


class Parameter:
    """An array that is trained, and its gradient.

    Attributes
    ----------
    data : ndarray
        The value. It may be replaced or changed in place; a module in `eval()` makes it read-only.
    grad : ndarray or None
        The gradient that `backward` adds into; None until the first `backward` and after `zero_grad`.
    name : str
        The local name, e.g. ``"weight_ih_l0"``. `Module.named_parameters` gives the full path.
    """

    __slots__ = ("__weakref__", "data", "grad", "name")

    def __init__(self, data: Any, name: str = "") -> None:
        self.data = data
        self.grad: Any = None
        self.name = name

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.data.dtype)

    def add_grad(self, grad: Any) -> None:
        """Add `grad` into `self.grad`; the first gradient is taken over without a copy, so `grad` must be fresh."""
        if self.grad is None:
            self.grad = grad
        else:
            self.grad += grad

    def check_grad(self) -> None:
        """TypeError or ValueError where `grad`, which anyone can assign, is not one that can be added into."""
        if self.grad is None:
            return
        name = f"{self.name}.grad"
        check_array(name, self.grad, check_array(self.name, self.data))
        check_dtype(name, self.grad, self.data.dtype)
        check_shape(name, self.grad, self.data.shape)
        check_writable(name, self.grad)

    def __repr__(self) -> str:
        return f"Parameter({self.name!r}, shape={self.shape}, dtype={self.dtype})"


class Module:
    """A tree of parameters: anything with `parameters`, `train`/`eval` and `state_dict`.

    Assigning a `Parameter` or a `Module` to an attribute registers it under that name. One `Parameter` assigned in two
    places is tied: it is listed once by `parameters`, and under both names in `state_dict`.
    """

    training: bool

    def __init__(self) -> None:
        object.__setattr__(self, "_parameters", {})
        object.__setattr__(self, "_modules", {})
        self.training = True

    def __setattr__(self, name: str, value: Any) -> None:
        if "_modules" not in self.__dict__:
            raise RuntimeError(f"{name}: expected super().__init__() before it is assigned, got {type(self).__name__}")
        kind = Parameter if isinstance(value, Parameter) else Module if isinstance(value, Module) else None
        if kind is None and name not in self._parameters and name not in self._modules:
            return object.__setattr__(self, name, value)
        registries: dict[Any, dict[str, Any]] = {Parameter: self._parameters, Module: self._modules}
        for key, registry in registries.items():
            if key is kind:
                registry[name] = value  # a name that was there keeps its place in the order
            else:
                registry.pop(name, None)
        if kind is Parameter and not value.name:
            value.name = name
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        object.__delattr__(self, name)
        self._parameters.pop(name, None)
        self._modules.pop(name, None)

    def named_modules(self, prefix: str = "", remove_duplicate: bool = True) -> Iterator[tuple[str, Module]]:
        """This module and all below it, as (path, module); a shared one once unless `remove_duplicate` is False."""
        seen: set[int] = set()

        def walk(module: Module, path: str) -> Iterator[tuple[str, Module]]:
            if remove_duplicate and id(module) in seen:
                return
            seen.add(id(module))
            yield path, module
            for name, child in module._modules.items():
                yield from walk(child, f"{path}.{name}" if path else name)

        yield from walk(self, prefix)

    def modules(self) -> Iterator[Module]:
        return (module for _, module in self.named_modules())

    def named_parameters(self, prefix: str = "", remove_duplicate: bool = True) -> Iterator[tuple[str, Parameter]]:
        """All parameters below this module, as (path, parameter); tied ones once unless `remove_duplicate` is False."""
        seen: set[int] = set()
        for path, module in self.named_modules(prefix, remove_duplicate):
            for name, parameter in module._parameters.items():
                if remove_duplicate and id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                yield (f"{path}.{name}" if path else name), parameter

    def parameters(self) -> Iterator[Parameter]:
        return (parameter for _, parameter in self.named_parameters())

    def zero_grad(self) -> None:
        """Set every gradient to None."""
        for module in self.modules():
            for parameter in module._parameters.values():
                parameter.grad = None

    def train(self, mode: bool = True) -> Module:
        """Switch to training (or evaluation, with ``mode=False``), this module and all below it."""
        for module in self.modules():
            module.training = bool(mode)
            module._mode_changed()
        return self

    def eval(self) -> Module:
        return self.train(False)

    def _mode_changed(self) -> None:
        """Called after `training` was set; a layer that keeps packed weights makes or drops them here."""

    def _weights_changed(self) -> None:
        """Called after new weights were written; a layer drops here what it saved for `backward` under the old ones."""

    def state_dict(self) -> dict[str, Any]:
        """Copies of all parameters by path."""
        return {name: p.data.copy() for name, p in self.named_parameters(remove_duplicate=False)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy values into the parameters; PyTorch's tensors are taken, too.

        Everything is checked before the first is written. A forward that waits for its `backward` is dropped.

        Raises
        ------
        KeyError
            A name is missing or unexpected.
        ValueError, TypeError
            A shape, a dtype or a kind of array differs, tied names come with values that differ, or a parameter is
            read-only for another reason than eval(); nothing has been changed.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state: expected a mapping from names to arrays, got {type(state).__name__}")
        state = {name: detached(value) for name, value in state.items()}
        own = dict(self.named_parameters(remove_duplicate=False))
        missing, unexpected = sorted(own.keys() - state.keys()), sorted(map(str, state.keys() - own.keys()))
        if missing or unexpected:
            raise KeyError(f"state: expected the names of this module; missing {missing}, unexpected {unexpected}")
        first_name: dict[int, str] = {}
        for name, parameter in own.items():
            xp = check_array(f"state[{name!r}]", state[name], check_array(name, parameter.data))
            check_shape(f"state[{name!r}]", state[name], parameter.shape)
            check_dtype(f"state[{name!r}]", state[name], parameter.data.dtype)
            tied = first_name.setdefault(id(parameter), name)
            if tied != name and not xp.array_equal(state[name], state[tied], equal_nan=True):
                raise ValueError(f"state[{name!r}]: expected the values of {tied!r}, which it is tied to, got others")
        self._write({name: (parameter, state[name]) for name, parameter in own.items()})

    def _write(self, values: Mapping[str, tuple[Parameter, Any]]) -> None:
        # Parameters of a module in eval are read-only, and its packed weights would be stale: all train meanwhile.
        modes = [(module, module.training) for module in self.modules()]
        self.train()
        try:
            for name, (parameter, _) in values.items():
                check_writable(name, parameter.data)
            for parameter, value in values.values():
                parameter.data[...] = value
            for module, _ in modes:
                module._weights_changed()
        finally:
            for module, training in modes:
                module.training = training
                module._mode_changed()

    def to_torch(self) -> Any:
        """The same module in PyTorch, with copies of the weights, in the same mode; TypeError where it has none."""
        from .interop import to_torch

        return to_torch(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    _parameters: dict[str, Parameter]
    _modules: dict[str, Module]
