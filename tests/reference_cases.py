"""Random problems for the tests: a configuration, its arrays, and all results of an engine on them.

A `Case` is small, printable and hashable, so a failing one can be pasted into a test. `make` draws its arrays, always
in float64 and then rounded to the case's dtype. `results` runs anything that has `forward` and `backward` as
`rnnfast.reference` and `rnnfast.functional` have them, so a kernel test reads::

    arrays = make(case)
    assert_close(results(functional, case, arrays), results(reference, case, arrays.astype("float64")), tolerance)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from rnnfast import reference

SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 32, 33, 64, 97)


@dataclass(frozen=True)
class Case:
    """One configuration. The names of sizes are those of the shapes: x [T, B, I], H hidden units, proj 0 or P."""

    cell: str = "lstm"
    T: int = 5
    B: int = 3
    I: int = 4  # noqa: E741
    H: int = 5
    proj: int = 0
    num_layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    batch_first: bool = False
    dropout: float = 0.0
    lengths: bool | tuple[int, ...] = False  # True draws them, zero and T among them
    reset: float | None = None  # the rate of resets, or no reset at all
    reset_state: str | None = None  # "rows": one for each row; "shared": one for all
    hx: bool = True  # False leaves the initial state to its default
    return_states: bool = True
    parameters: tuple[tuple[str, float], ...] = ()  # of the cell
    dtype: str = "float64"
    seed: int = 0
    weight_scale: float = 1.0

    @property
    def has_c(self) -> bool:
        return reference.CELLS[self.cell].has_c

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def state_size(self) -> int:
        return self.proj or self.H

    @property
    def state_sizes(self) -> tuple[int, ...]:
        return (self.state_size, self.H) if self.has_c else (self.state_size,)

    @property
    def work(self) -> int:
        """Multiplications of one forward, roughly."""
        products = sum(math.prod(shape) for shape in self.weight_shapes().values() if len(shape) == 2)
        return self.T * self.B * products

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        return reference.weight_shapes(
            self.cell,
            self.I,
            self.H,
            proj_size=self.proj,
            num_layers=self.num_layers,
            bidirectional=self.bidirectional,
            bias=self.bias,
        )


@dataclass
class Arrays:
    """The arrays of a case; states and their gradients are pairs for a cell with c."""

    x: Any
    hx: Any
    weights: list[Any]
    lengths: Any
    reset: Any
    reset_state: Any
    grad_output: Any
    grad_state: Any
    grad_states: Any

    def map(self, convert: Callable[[Any], Any]) -> Arrays:
        """A copy with `convert` applied to every floating-point array; lengths and reset stay as they are."""
        kept = ("lengths", "reset")
        changed = {name: map_arrays(convert, value) for name, value in vars(self).items() if name not in kept}
        return replace(self, **changed)

    def astype(self, dtype: str) -> Arrays:
        return self.map(lambda a: a.astype(dtype))


def map_arrays(convert: Callable[[Any], Any], value: Any) -> Any:
    """Apply `convert` to the arrays in a nest of tuples and lists; None stays."""
    if value is None:
        return None
    if isinstance(value, (tuple, list)):
        return type(value)(map_arrays(convert, v) for v in value)
    return convert(value)


def make(case: Case) -> Arrays:
    """Draw the arrays of a case from its seed."""
    rng = np.random.default_rng(case.seed)
    runs = case.num_layers * case.directions

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(case.dtype)

    def state(batch_size: int, *leading: int) -> Any:
        elements = tuple(normal(*leading, runs, batch_size, size) for size in case.state_sizes)
        return elements if case.has_c else elements[0]

    bound = case.weight_scale / math.sqrt(case.H)
    weights = [rng.uniform(-bound, bound, shape).astype(case.dtype) for shape in case.weight_shapes().values()]
    steps = (case.B, case.T) if case.batch_first else (case.T, case.B)
    x, hx = normal(*steps, case.I), state(case.B)
    reset_state = state(1 if case.reset_state == "shared" else case.B)
    return Arrays(
        x=x,
        hx=hx if case.hx else None,
        weights=weights,
        lengths=draw_lengths(case, rng),
        reset=None if case.reset is None else rng.random(steps) < case.reset,
        reset_state=reset_state if case.reset_state else None,
        grad_output=normal(*steps, case.directions * case.state_size),
        grad_state=state(case.B),
        grad_states=state(case.B, case.T) if case.return_states else None,
    )


def draw_lengths(case: Case, rng: np.random.Generator) -> np.ndarray | None:
    drawn = rng.integers(0, case.T + 1, case.B)
    if case.lengths is False:
        return None
    if case.lengths is not True:
        return np.array(case.lengths, dtype=np.int64)
    if case.B > 1:
        drawn[rng.permutation(case.B)[:2]] = 0, case.T
    return drawn


def options(case: Case, arrays: Arrays) -> dict[str, Any]:
    """The keywords of `forward`."""
    return {
        "num_layers": case.num_layers,
        "bidirectional": case.bidirectional,
        "batch_first": case.batch_first,
        "dropout": case.dropout,
        "lengths": arrays.lengths,
        "reset": arrays.reset,
        "reset_state": arrays.reset_state,
        "return_states": case.return_states,
        "seed": case.seed,
        "call": case.seed % 5,
        **{**reference.CELLS[case.cell].parameters, **dict(case.parameters)},
    }


def valid_mask(case: Case, arrays: Arrays) -> np.ndarray:
    """[T, B] ([B, T] with batch_first): the steps within each row."""
    lengths = np.full(case.B, case.T) if arrays.lengths is None else np.asarray(arrays.lengths)
    valid = np.arange(case.T)[:, None] < lengths
    return valid.T if case.batch_first else valid


def poison_padding(case: Case, arrays: Arrays) -> Arrays:
    """A copy with NaN wherever nothing may be read: past the ends in x and in the incoming gradients."""
    valid = valid_mask(case, arrays)
    by_time = (valid.T if case.batch_first else valid)[:, None, :, None]

    def poison(mask: np.ndarray) -> Callable[[Any], Any]:
        return lambda a: np.where(mask, a, np.array(np.nan, dtype=a.dtype))

    return replace(
        arrays,
        x=poison(valid[..., None])(arrays.x),
        grad_output=poison(valid[..., None])(arrays.grad_output),
        grad_states=map_arrays(poison(by_time), arrays.grad_states),
    )


def results(engine: Any, case: Case, arrays: Arrays, backward: bool = True) -> dict[str, Any]:
    """Everything that an engine computes on a case, by name; the adjoint too unless told otherwise."""
    output, state, *states, ctx = engine.forward(
        case.cell, arrays.x, arrays.hx, arrays.weights, training=backward, **options(case, arrays)
    )
    found = {"output": output, **named("state", state), **named("states", states[0] if states else None)}
    if backward:
        grad_x, grad_state, grad_weights = engine.backward(
            ctx, arrays.grad_output, arrays.grad_state, grad_states=arrays.grad_states, record=True
        )
        found |= {"grad_x": grad_x, "grad_h": ctx.grad_h, **named("grad_state", grad_state)}
        found |= {f"grad_{name}": g for name, g in zip(case.weight_shapes(), grad_weights, strict=True)}
        found |= named("grad_reset_state", ctx.grad_reset_state)
    return found


def named(name: str, state: Any) -> dict[str, Any]:
    """{"name": h}, {"name.h": h, "name.c": c}, or nothing."""
    if state is None:
        return {}
    return (
        {f"{name}.{part}": a for part, a in zip("hc", state, strict=True)}
        if isinstance(state, tuple)
        else {name: state}
    )


def flatten(value: Any) -> Iterator[Any]:
    """The arrays in a nest of tuples and lists, in order, without the Nones."""
    if isinstance(value, (tuple, list)):
        for element in value:
            yield from flatten(element)
    elif value is not None:
        yield value


def normwise_error(found: Any, truth: Any, floor: float = 0.0) -> float:
    """max |found - truth| / max(|truth|, floor); infinite where NaNs or infinities are not in the same places."""
    found, truth = np.asarray(found, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    if found.shape != truth.shape or not np.array_equal(np.isnan(found), np.isnan(truth)):
        return math.inf
    same = (found == truth) | np.isnan(truth)
    if same.all():
        return 0.0
    difference = float(np.abs(found - truth)[~same].max())
    scale = max(floor, float(np.abs(truth[np.isfinite(truth)]).max(initial=0.0)))
    return difference / scale if scale > 0 else math.inf


def assert_close(
    found: dict[str, Any],
    truth: dict[str, Any],
    tolerance: float,
    grad_tolerance: float = 0.0,
    grad_floor: float = 0.0,
) -> None:
    """Compare two `results` normwise; gradients with the larger of the two tolerances.

    grad_floor is the least norm that a gradient is compared with. Random cases need one: a gradient of a single value,
    or of few, is a sum that may cancel to almost nothing, and its relative error is then anything.
    """
    assert found.keys() == truth.keys()
    for name in truth:
        is_gradient = name.startswith("grad")
        limit = max(tolerance, grad_tolerance) if is_gradient else tolerance
        shape, expected = tuple(found[name].shape), tuple(truth[name].shape)
        assert shape == expected, f"{name}: expected shape {expected}, got {shape}"
        error = normwise_error(found[name], truth[name], grad_floor if is_gradient else 0.0)
        assert error <= limit, f"{name}: expected a normwise error up to {limit:.1e}, got {error:.3e}"


@st.composite
def cases(
    draw: Callable[[Any], Any],
    cells: Sequence[str] = tuple(reference.CELLS),
    dtypes: Sequence[str] = ("float64",),
    sizes: Sequence[int] = SIZES,
    max_work: int = 2_000_000,
    max_steps: int = 97,
) -> Case:
    """Random configurations of every option; a size is lowered where a forward would pass `max_work` products."""
    cell = draw(st.sampled_from(tuple(cells)))
    size = st.sampled_from(tuple(sizes))
    hidden_size = draw(size)
    proj = draw(st.integers(1, hidden_size - 1)) if can_project(cell, hidden_size) and draw(st.booleans()) else 0
    case = Case(
        cell=cell,
        T=min(draw(size), max_steps),
        B=draw(st.sampled_from((0, *sizes))),
        I=draw(size),
        H=hidden_size,
        proj=proj,
        num_layers=draw(st.sampled_from((1, 1, 2, 3))),
        bidirectional=draw(st.booleans()),
        bias=draw(st.booleans()),
        batch_first=draw(st.booleans()),
        dropout=draw(st.sampled_from((0.0, 0.0, 0.3, 0.8, 1.0))),
        lengths=draw(st.booleans()),
        reset=draw(st.sampled_from((None, 0.0, 0.1, 0.5, 1.0))),
        reset_state=draw(st.sampled_from((None, "rows", "shared"))),
        hx=draw(st.booleans()),
        return_states=draw(st.booleans()),
        dtype=draw(st.sampled_from(tuple(dtypes))),
        seed=draw(st.integers(0, 2**32 - 1)),
        weight_scale=draw(st.sampled_from((1.0, 1.0, 0.1, 3.0))),
    )
    case = replace(case, reset_state=case.reset_state if case.reset is not None else None)
    return shrink_to(case, max_work)


def can_project(cell: str, hidden_size: int) -> bool:
    return reference.CELLS[cell].has_c and hidden_size > 1


def shrink_to(case: Case, max_work: int) -> Case:
    """The case with fewer rows, then fewer steps, until a forward takes at most `max_work` products."""
    for name in ("B", "T"):
        size = getattr(case, name)
        if case.work > max_work:
            case = replace(case, **{name: max(1, size * max_work // case.work)})
    return case
