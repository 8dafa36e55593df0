"""Optimisers: SGD, RMSprop, Adam, AdamW, with PyTorch's formulas.

An optimiser takes an iterable of parameters (tied ones count once) and changes their data in place; parameters without
a gradient are skipped. `step(lr)` takes a learning rate for that step alone. A step checks every gradient before it
changes anything, as `load_state_dict` checks every entry.

`state_dict` is flat: the optimiser's name, its hyperparameters and "num_parameters" as JSON-able scalars, and for each
parameter that has been stepped "{index}.{slot}", an array, or an integer for the slot "step".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from ._arrays import (
    check_array,
    check_dtype,
    check_flag,
    check_float,
    check_int,
    check_number,
    check_shape,
    check_writable,
    quiet,
)
from .base import Module, Parameter

__all__ = ["SGD", "Adam", "AdamW", "Optimizer", "RMSprop"]


class Optimizer:
    """What all optimisers share: the parameters, hyperparameters as attributes, and a state for each parameter.

    A subclass names its slots and gives `_check` (hyperparameters in, checked ones out) and `_update`.
    """

    lr: float
    required: ClassVar[tuple[str, ...]] = ()  # slots that every state has
    optional: ClassVar[tuple[str, ...]] = ()  # slots that some hyperparameters add

    def __init__(self, parameters: Iterable[Parameter], **hyper: Any) -> None:
        if isinstance(parameters, (Parameter, Module)) or not hasattr(parameters, "__iter__"):
            kind = type(parameters).__name__
            raise TypeError(f"parameters: expected an iterable of Parameters, got {kind}")
        distinct: dict[int, Parameter] = {}
        for i, parameter in enumerate(parameters):
            if not isinstance(parameter, Parameter):
                raise TypeError(f"parameters[{i}]: expected a Parameter, got {type(parameter).__name__}")
            check_array(f"parameters[{i}]", parameter.data)
            check_float(f"parameters[{i}]", parameter.data)
            distinct[id(parameter)] = parameter
        if not distinct:
            raise ValueError("parameters: expected at least one, got none")
        self.parameters = list(distinct.values())
        self._hyper_names = tuple(hyper)
        self._state: list[dict[str, Any]] = [{} for _ in self.parameters]
        self._set(self._check(hyper))

    @quiet
    def step(self, lr: float | None = None) -> None:
        """Change each parameter that has a gradient; with `lr`, this step uses it instead of `self.lr`.

        Raises
        ------
        TypeError, ValueError
            A gradient does not fit its parameter, a parameter is read-only (its module is in eval), or `lr` is negative
            or not finite. Nothing has been changed.
        """
        rate = check_number("lr", self.lr if lr is None else lr, minimum=0.0)
        self._check({name: getattr(self, name) for name in self._hyper_names})  # attributes can be assigned
        todo = [i for i, parameter in enumerate(self.parameters) if parameter.grad is not None]
        for i in todo:
            self._check_parameter(i)
        for i in todo:
            parameter = self.parameters[i]
            self._update(check_array("parameter", parameter.data), parameter, self._state[i], rate)

    def zero_grad(self) -> None:
        """Set every gradient to None."""
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The flat dictionary that the top of this file describes; arrays are copies."""
        result: dict[str, Any] = {"optimizer": type(self).__name__, "num_parameters": len(self.parameters)}
        result.update({name: getattr(self, name) for name in self._hyper_names})
        for i, state in enumerate(self._state):
            result.update({f"{i}.{slot}": value if slot == "step" else value.copy() for slot, value in state.items()})
        return result

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over hyperparameters and states, copied.

        KeyError: an entry is missing or unexpected. ValueError, TypeError: another optimiser or number of parameters,
        or an entry does not fit. Nothing has been changed then.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state: expected a mapping, got {type(state).__name__}")
        fixed = {"optimizer": type(self).__name__, "num_parameters": len(self.parameters)}
        missing = sorted({*fixed, *self._hyper_names} - state.keys())
        if missing:
            raise KeyError(f"state: expected the entries of {type(self).__name__}; missing {missing}")
        for name, expected in fixed.items():
            if state[name] != expected:
                raise ValueError(f"state[{name!r}]: expected {expected!r}, got {state[name]!r}")
        hyper = self._check({name: state[name] for name in self._hyper_names})
        slots = {key: value for key, value in state.items() if key not in fixed and key not in hyper}
        loaded = [self._take_slots(i, slots) for i in range(len(self.parameters))]
        if slots:
            raise KeyError(
                f"state: expected the entries of {type(self).__name__}; unexpected {sorted(map(str, slots))}"
            )
        self._set(hyper)
        self._state = loaded

    def _take_slots(self, i: int, slots: dict[str, Any]) -> dict[str, Any]:
        """Move the entries of parameter i out of `slots`, checked."""
        names = [slot for slot in self.required + self.optional if f"{i}.{slot}" in slots]
        missing = [f"{i}.{slot}" for slot in self.required if slot not in names]
        if names and missing:
            raise KeyError(f"state: expected all entries of parameter {i} or none; missing {missing}")
        return {slot: self._slot_value(i, slot, slots.pop(f"{i}.{slot}")) for slot in names}

    def _slot_value(self, i: int, slot: str, value: Any) -> Any:
        where, data = f"state['{i}.{slot}']", self.parameters[i].data
        if slot == "step":
            return check_int(where, value)
        check_array(where, value, check_array(f"parameters[{i}]", data))
        check_dtype(where, value, data.dtype)
        check_shape(where, value, data.shape)
        return value.copy()

    def _check_parameter(self, i: int) -> None:
        parameter = self.parameters[i]
        name = f"parameters[{i}] ({parameter.name})"
        xp = check_array(name, parameter.data)
        check_float(name, parameter.data)
        check_writable(name, parameter.data)
        states = {slot: value for slot, value in self._state[i].items() if slot != "step"}
        for what, value in {"grad": parameter.grad, **states}.items():
            check_array(f"{name}.{what}", value, xp)
            check_dtype(f"{name}.{what}", value, parameter.data.dtype)
            check_shape(f"{name}.{what}", value, parameter.data.shape)

    def _set(self, hyper: Mapping[str, Any]) -> None:
        for name, value in hyper.items():
            setattr(self, name, value)

    def _check(self, hyper: Mapping[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def _update(self, xp: Any, parameter: Parameter, state: dict[str, Any], lr: float) -> None:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{n}={getattr(self, n)}' for n in self._hyper_names)})"


class SGD(Optimizer):
    """Stochastic gradient descent, with momentum (Polyak) or Nesterov momentum as in PyTorch.

    g = grad + weight_decay·p;  b = momentum·b + (1 - dampening)·g (b = g at the first step);
    p -= lr·b, or lr·(g + momentum·b) with `nesterov`, which needs momentum and no dampening.
    """

    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    optional = ("momentum_buffer",)

    def __init__(
        self,
        parameters: Iterable[Parameter],
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        super().__init__(
            parameters, lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov
        )

    def _check(self, hyper: Mapping[str, Any]) -> dict[str, Any]:
        result = _nonnegative(hyper, "lr", "momentum", "weight_decay")
        result["dampening"] = check_number("dampening", hyper["dampening"])
        result["nesterov"] = check_flag("nesterov", hyper["nesterov"])
        if result["nesterov"] and (result["momentum"] == 0.0 or result["dampening"] != 0.0):
            got = f"momentum {result['momentum']:g} and dampening {result['dampening']:g}"
            raise ValueError(f"nesterov: expected a momentum and no dampening, got {got}")
        return result

    def _update(self, xp: Any, parameter: Parameter, state: dict[str, Any], lr: float) -> None:
        p, scratch = parameter.data, xp.empty_like(parameter.data)
        g = _decayed(xp, parameter, self.weight_decay)
        if self.momentum:
            g = self._momentum(xp, g, state, scratch)
        xp.multiply(g, lr, out=scratch)
        p -= scratch

    def _momentum(self, xp: Any, g: Any, state: dict[str, Any], scratch: Any) -> Any:
        """The direction to go: the momentum buffer, brought up to date, or Nesterov's look ahead of it."""
        buffer = state.get("momentum_buffer")
        if buffer is None:
            buffer = state["momentum_buffer"] = g.copy()
        else:
            buffer *= self.momentum
            xp.multiply(g, 1.0 - self.dampening, out=scratch)
            buffer += scratch
        if not self.nesterov:
            return buffer
        xp.multiply(buffer, self.momentum, out=scratch)
        scratch += g
        return scratch


class RMSprop(Optimizer):
    """Gradients divided by a running root mean square (Hinton; centered: Graves 2013), as in PyTorch.

    g = grad + weight_decay·p;  s = alpha·s + (1 - alpha)·g²;  d = sqrt(s) + eps, or sqrt(s - m²) + eps with `centered`,
    where m = alpha·m + (1 - alpha)·g;  p -= lr·g/d, or with momentum b = momentum·b + g/d, p -= lr·b.
    Where rounding makes s - m² negative it counts as 0 (PyTorch takes the root and gets NaN).
    """

    alpha: float
    eps: float
    weight_decay: float
    momentum: float
    centered: bool
    required = ("square_avg",)
    optional = ("momentum_buffer", "grad_avg")

    def __init__(
        self,
        parameters: Iterable[Parameter],
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
    ) -> None:
        super().__init__(
            parameters, lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum, centered=centered
        )

    def _check(self, hyper: Mapping[str, Any]) -> dict[str, Any]:
        result = _nonnegative(hyper, "lr", "alpha", "eps", "weight_decay", "momentum")
        result["centered"] = check_flag("centered", hyper["centered"])
        return result

    def _update(self, xp: Any, parameter: Parameter, state: dict[str, Any], lr: float) -> None:
        p, scratch = parameter.data, xp.empty_like(parameter.data)
        g = _decayed(xp, parameter, self.weight_decay)
        square = _slot(xp, state, "square_avg", p)
        _average_square(xp, square, g, self.alpha, scratch)
        if self.centered:
            mean = _slot(xp, state, "grad_avg", p)
            _average(xp, mean, g, self.alpha, scratch)
            xp.multiply(mean, mean, out=scratch)
            xp.subtract(square, scratch, out=scratch)
            xp.maximum(scratch, 0.0, out=scratch)
            xp.sqrt(scratch, out=scratch)
        else:
            xp.sqrt(square, out=scratch)
        scratch += self.eps
        xp.divide(g, scratch, out=scratch)
        if self.momentum:
            buffer = _slot(xp, state, "momentum_buffer", p)
            buffer *= self.momentum
            buffer += scratch
            xp.multiply(buffer, lr, out=scratch)
        else:
            scratch *= lr
        p -= scratch


class Adam(Optimizer):
    """Adam (Kingma and Ba 2015), with AMSGrad (Reddi et al. 2018) on request, as in PyTorch.

    g = grad + weight_decay·p;  m = beta1·m + (1 - beta1)·g;  v = beta2·v + (1 - beta2)·g²;
    p -= lr/(1 - beta1^t) · m / (sqrt(v)/sqrt(1 - beta2^t) + eps); with `amsgrad` the largest v so far instead of v.
    t counts the steps of the parameter itself. `betas` become the attributes beta1 and beta2.
    """

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    amsgrad: bool
    required = ("step", "exp_avg", "exp_avg_sq")
    optional = ("max_exp_avg_sq",)
    decoupled: ClassVar[bool] = False  # whether weight decay shrinks the parameter instead of joining the gradient

    def __init__(
        self,
        parameters: Iterable[Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
    ) -> None:
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"betas: expected two numbers, got {betas!r}")
        super().__init__(
            parameters, lr=lr, beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=weight_decay, amsgrad=amsgrad
        )

    def _check(self, hyper: Mapping[str, Any]) -> dict[str, Any]:
        result = _nonnegative(hyper, "lr", "eps", "weight_decay")
        for name in ("beta1", "beta2"):
            result[name] = check_number(name, hyper[name], 0.0, 1.0, below=True)
        result["amsgrad"] = check_flag("amsgrad", hyper["amsgrad"])
        return result

    def _update(self, xp: Any, parameter: Parameter, state: dict[str, Any], lr: float) -> None:
        p, scratch = parameter.data, xp.empty_like(parameter.data)
        if self.decoupled:
            p *= 1.0 - lr * self.weight_decay
        g = _decayed(xp, parameter, 0.0 if self.decoupled else self.weight_decay)
        mean, square = _slot(xp, state, "exp_avg", p), _slot(xp, state, "exp_avg_sq", p)
        t = state["step"] = state.get("step", 0) + 1
        _average(xp, mean, g, self.beta1, scratch)
        _average_square(xp, square, g, self.beta2, scratch)
        if self.amsgrad:
            largest = _slot(xp, state, "max_exp_avg_sq", p)
            square = xp.maximum(largest, square, out=largest)
        xp.sqrt(square, out=scratch)
        scratch /= math.sqrt(1.0 - self.beta2**t)
        scratch += self.eps
        xp.divide(mean, scratch, out=scratch)
        scratch *= lr / (1.0 - self.beta1**t)
        p -= scratch


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019): p is first multiplied by 1 - lr·weight_decay."""

    decoupled = True

    def __init__(
        self,
        parameters: Iterable[Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
    ) -> None:
        super().__init__(parameters, lr, betas, eps, weight_decay, amsgrad)


def _nonnegative(hyper: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: check_number(name, hyper[name], minimum=0.0) for name in names}


def _slot(xp: Any, state: dict[str, Any], name: str, like: Any) -> Any:
    """The state array of that name, zeros at first."""
    if name not in state:
        state[name] = xp.zeros_like(like)
    return state[name]


def _decayed(xp: Any, parameter: Parameter, weight_decay: float) -> Any:
    """The gradient, plus weight_decay times the parameter; never written to afterwards."""
    if not weight_decay:
        return parameter.grad
    g = xp.multiply(parameter.data, weight_decay, out=xp.empty_like(parameter.data))
    g += parameter.grad
    return g


def _average(xp: Any, average: Any, value: Any, decay: float, scratch: Any) -> None:
    """average += (1 - decay)·(value - average), in place."""
    xp.subtract(value, average, out=scratch)
    scratch *= 1.0 - decay
    average += scratch


def _average_square(xp: Any, average: Any, value: Any, decay: float, scratch: Any) -> None:
    """average = decay·average + (1 - decay)·value², in place."""
    xp.multiply(value, value, out=scratch)
    scratch *= 1.0 - decay
    average *= decay
    average += scratch
