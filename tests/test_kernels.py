"""The kernels against the reference: every cell, dtype and option, in every way that a call is shared between threads.

The truth is the reference in float64 on the very numbers that the kernel got. The limits are those of the numerical
contract: 1e-12 (gradients 1e-11) in float64; in float32 twice the error of the reference run in float32, or a few units
in the last place where that is less. PyTorch is the peer for float32 in test_numerics.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import SHARINGS, Sharing
from reference_cases import (
    Case,
    assert_close,
    cases,
    flatten,
    make,
    map_arrays,
    named,
    normwise_error,
    options,
    poison_padding,
    results,
    valid_mask,
)
from rnnfast import functional, reference

CELLS = tuple(functional.CELLS)
PARAMETERS = {name: tuple((p, 0.3) for p in info.parameters) for name, info in functional.CELLS.items()}
DTYPES = ("float64", "float32")
ODD = (1, 3, 7, 17, 31, 97)
ULP = float(np.finfo(np.float32).eps)

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"return_states": False, "hx": False},
    "states": {"hx": False},
    "no_bias": {"bias": False, "num_layers": 2},
    "layers": {"num_layers": 4, "H": 17},
    "bidirectional": {"bidirectional": True, "H": 33},
    "batch_first": {"batch_first": True, "bidirectional": True, "lengths": True, "reset": 0.2},
    "dropout": {"num_layers": 3, "bidirectional": True, "dropout": 0.4, "H": 19},
    "drop_all": {"num_layers": 2, "dropout": 1.0},
    "ragged": {"lengths": (2, 0, 7, 5, 1), "T": 7, "B": 5, "bidirectional": True, "num_layers": 2},
    "no_steps_at_all": {"lengths": (0, 0, 0), "bidirectional": True, "num_layers": 2, "reset": 0.5},
    "full_lengths": {"lengths": (5, 5, 5), "bidirectional": True},
    "reset": {"reset": 0.3, "T": 9, "bidirectional": True, "num_layers": 2},
    "reset_to_rows": {"reset": 0.3, "T": 9, "reset_state": "rows", "bidirectional": True},
    "reset_to_shared": {"reset": 0.3, "T": 9, "reset_state": "shared", "bidirectional": True, "H": 21},
    "reset_always": {"reset": 1.0, "reset_state": "rows", "bidirectional": True, "lengths": True},
    "one_of_each": {"T": 1, "B": 1, "I": 1, "H": 1, "bidirectional": True},
    "everything": {
        "T": 11,
        "B": 6,
        "H": 37,
        "num_layers": 3,
        "bidirectional": True,
        "batch_first": True,
        "dropout": 0.3,
        "lengths": (3, 11, 0, 6, 1, 11),
        "reset": 0.3,
        "reset_state": "shared",
    },
}


def case_of(cell: str, **changes: Any) -> Case:
    return Case(cell=cell, parameters=PARAMETERS[cell], **changes)


def variants(*names: str) -> list[Any]:
    """Every cell in every variant (or in those named), and projected where it can be."""
    found = []
    for cell, name in product(CELLS, names or VARIANTS):
        found.append(pytest.param(case_of(cell, **VARIANTS[name]), id=f"{cell}-{name}"))
        if functional.CELLS[cell].has_cell_state and VARIANTS[name].get("H", 5) > 3:
            found.append(pytest.param(case_of(cell, proj=3, **VARIANTS[name]), id=f"{cell}-proj-{name}"))
    return found


@cache
def truth_of(case: Case) -> dict[str, Any]:
    return results(reference, case, make(case).astype("float64"))


@cache
def peer_of(case: Case) -> dict[str, Any]:
    """The reference in the case's own dtype."""
    return results(reference, case, make(case))


def check(case: Case, found: dict[str, Any], grad_floor: float = 0.0, slack: float = 1.0) -> None:
    """Assert that results are as near to the truth as the contract wants; `slack` widens the limit of float32."""
    truth = truth_of(case)
    assert all(str(a.dtype) == case.dtype for a in found.values())
    if case.dtype == "float64":
        assert_close(found, truth, 1e-12, 1e-11, grad_floor)
        return
    assert found.keys() == truth.keys()
    for name, expected in truth.items():
        floor = grad_floor if name.startswith("grad") else 0.0
        limit = slack * max(2 * normwise_error(peer_of(case)[name], expected, floor), 8 * ULP)
        error = normwise_error(found[name], expected, floor)
        assert error <= limit, f"{name}: expected a normwise error up to {limit:.1e}, got {error:.3e}"


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Bitwise the same, NaN in the same places."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


# ---- every option, every way to share a call -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", variants())
def test_options(case: Case, dtype: str, sharing: Sharing) -> None:
    case = replace(case, dtype=dtype)
    check(case, results(functional, case, make(case)))


@pytest.mark.parametrize("case", [p for p in variants() if p.values[0].lengths])
def test_padding_is_not_read(case: Case, few_sharings: Sharing) -> None:
    arrays = make(case)
    poisoned = poison_padding(case, arrays)
    if not valid_mask(case, arrays).all():
        assert np.isnan(poisoned.x).any()
        assert np.isnan(poisoned.grad_output).any()
    assert_same(results(functional, case, poisoned), results(functional, case, arrays))


def odd_sizes() -> list[tuple[int, int, int, int]]:
    """(T, B, I, H) over the odd sizes: every pair of T and B, the others in turn; fewer rows where it is much work."""
    found = []
    for i, j in product(range(6), repeat=2):
        T, I, H = ODD[i], ODD[(i + j) % 6], ODD[(i + 5 * j + 1) % 6]  # noqa: E741
        B = max(n for n in ODD if n == 1 or (n <= ODD[j] and T * n * H * (I + H) < 3_000_000))
        found.append((T, B, I, H))
    return found


@pytest.mark.parametrize(("T", "B", "I", "H"), odd_sizes())
@pytest.mark.parametrize("cell", CELLS)
def test_odd_sizes(cell: str, T: int, B: int, I: int, H: int, restore_sharing: None) -> None:  # noqa: E741
    number = T + B + I + H
    case = case_of(cell, T=T, B=B, I=I, H=H, dtype=DTYPES[number // 2 % 2], seed=number)
    case = replace(case, lengths=number % 4 > 1, bidirectional=H < 97 and number % 3 == 0)
    if case.has_c and H > 1 and number % 5 < 2:
        case = replace(case, proj=(H + 1) // 2)
    Sharing(*SHARINGS[number % len(SHARINGS)]).use()
    # The tensors of one unit hold so few numbers that the peer's error is small by chance now and then.
    check(case, results(functional, case, make(case)), grad_floor=0.1, slack=2 if H == 1 else 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "B"), [(3, 0), (0, 3), (0, 0)])
@pytest.mark.parametrize("cell", CELLS)
def test_empty(cell: str, T: int, B: int, dtype: str, few_sharings: Sharing) -> None:
    for reset_state, proj in (("rows", 0), ("shared", 2 if functional.CELLS[cell].has_cell_state else 0)):
        changes = VARIANTS["everything"] | {"T": T, "B": B, "lengths": True, "reset_state": reset_state}
        case = case_of(cell, dtype=dtype, proj=proj, **changes)
        arrays = make(case)
        found = results(functional, case, arrays)
        check(case, found)
        if T == 0:
            for name, start in named("state", arrays.hx).items():
                np.testing.assert_array_equal(found[name], start)


@given(
    cases(cells=CELLS, dtypes=DTYPES, max_work=500_000, max_steps=33),
    st.sampled_from((*SHARINGS, ("", 2))),
)
@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_random_configurations(restore_sharing: None, case: Case, chosen: tuple[str, int]) -> None:
    if case.weight_scale > 1:  # the error of a chaotic network grows with every step
        case = replace(case, T=min(case.T, 4))
    case = replace(case, parameters=PARAMETERS[case.cell])
    Sharing(*chosen).use()
    arrays = make(case)
    poisoned = poison_padding(case, arrays) if case.lengths else arrays
    check(case, results(functional, case, poisoned), grad_floor=1.0, slack=4)


# ---- the call ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", variants())
def test_evaluation_and_packed_weights(case: Case, dtype: str) -> None:
    """Without training there is no dropout and no context, packed weights do the same, and nothing else changes."""
    case = replace(case, dtype=dtype)
    arrays = make(case)
    plain = results(functional, replace(case, dropout=0.0), arrays)
    found = results(functional, case, arrays, backward=False)
    for name, value in found.items():
        np.testing.assert_array_equal(value, plain[name], err_msg=name)
    layers = {"num_layers": case.num_layers, "bidirectional": case.bidirectional}
    packed = functional.pack(case.cell, arrays.weights, **layers, **dict(case.parameters))
    for weight in arrays.weights:
        weight[...] = np.nan  # they are pinned: later changes do not matter
    again = results(functional, case, replace(arrays, weights=packed), backward=False)
    assert_same(again, found)


@pytest.mark.parametrize("cell", CELLS)
def test_context_and_output(cell: str) -> None:
    case = case_of(cell, **VARIANTS["everything"])
    arrays = make(case)
    *found, ctx = functional.forward(cell, arrays.x, arrays.hx, arrays.weights, **options(case, arrays))
    assert not found[0].flags.writeable  # the backward pass reads it
    assert ctx.nbytes > 0
    assert ctx.plan
    assert ctx.grad_h is None
    assert ctx.grad_reset_state is None
    *_, nothing = functional.forward(cell, arrays.x, arrays.hx, arrays.weights, training=False, **options(case, arrays))
    assert nothing is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", variants("everything", "plain"))
def test_retain(case: Case, dtype: str, few_sharings: Sharing) -> None:
    case = replace(case, dtype=dtype)
    arrays = make(case)
    *_, ctx = functional.forward(case.cell, arrays.x, arrays.hx, arrays.weights, **options(case, arrays))
    given_grads = (ctx, arrays.grad_output, arrays.grad_state)

    def backward(retain: bool) -> list[Any]:
        found = functional.backward(*given_grads, grad_states=arrays.grad_states, retain=retain, record=True)
        return list(flatten((found, ctx.grad_reset_state, ctx.grad_h)))

    first = backward(retain=True)
    for other in (backward(retain=True), backward(retain=False)):
        for a, b in zip(first, other, strict=True):
            np.testing.assert_array_equal(a, b)
    with pytest.raises(RuntimeError, match="used up"):
        backward(retain=False)
    with pytest.raises(RuntimeError, match="used up"):
        backward(retain=True)


@pytest.mark.parametrize("case", variants("everything"))
def test_missing_gradients_are_zero(case: Case) -> None:
    arrays = make(case)

    def backward(grad_output: Any, grad_state: Any, grad_states: Any, **wanted: Any) -> list[Any]:
        *_, ctx = functional.forward(case.cell, arrays.x, arrays.hx, arrays.weights, **options(case, arrays))
        found = functional.backward(ctx, grad_output, grad_state, grad_states=grad_states, **wanted)
        return [*found, ctx.grad_reset_state]

    full = [arrays.grad_output, arrays.grad_state, arrays.grad_states]
    zeros = map_arrays(np.zeros_like, full)
    for chosen in product((True, False), repeat=3):
        with_none = backward(*(g if c else None for g, c in zip(full, chosen, strict=True)))
        with_zeros = backward(*(g if c else z for g, z, c in zip(full, zeros, chosen, strict=True)))
        for a, b in zip(flatten(with_none), flatten(with_zeros), strict=True):
            np.testing.assert_array_equal(a, b)
    if case.has_c:
        for k in range(2):
            halves = [tuple(h if j == k else None for j, h in enumerate(pair)) for pair in full[1:]]
            padded = [tuple(h if j == k else np.zeros_like(h) for j, h in enumerate(pair)) for pair in full[1:]]
            for a, b in zip(flatten(backward(None, *halves)), flatten(backward(None, *padded)), strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("T", [1, None], ids=["one_step", "steps"])
@pytest.mark.parametrize("case", variants())
def test_what_is_not_needed(case: Case, T: int | None, few_sharings: Sharing) -> None:
    """It is None, and the rest keeps its bits."""
    case = replace(case, T=1, lengths=bool(case.lengths)) if T else case
    arrays = make(case)

    def backward(**wanted: bool) -> list[Any]:
        *_, ctx = functional.forward(case.cell, arrays.x, arrays.hx, arrays.weights, **options(case, arrays))
        found = functional.backward(
            ctx, arrays.grad_output, arrays.grad_state, grad_states=arrays.grad_states, **wanted
        )
        return [*found, ctx.grad_reset_state]

    complete = backward()
    for place, unwanted in enumerate(("need_grad_x", "need_grad_state", "need_grad_weights")):
        found = backward(**{unwanted: False})
        assert found[place] is None
        for other in {0, 1, 2, 3} - {place}:
            for a, b in zip(flatten(found[other]), flatten(complete[other]), strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("cell", CELLS)
def test_half_a_state(cell: str) -> None:
    """Either half of the LSTM's initial or reset state may be missing: zeros."""
    if not functional.CELLS[cell].has_cell_state:
        return
    case = case_of(cell, proj=3, **VARIANTS["everything"] | {"reset_state": "rows"})
    arrays = make(case)
    for k in range(2):

        def half(pair: Any, filler: Callable[[Any], Any], k: int = k) -> Any:
            return tuple(h if j == k else filler(h) for j, h in enumerate(pair))

        found, padded = (
            results(
                functional,
                case,
                replace(arrays, hx=half(arrays.hx, filler), reset_state=half(arrays.reset_state, filler)),
            )
            for filler in (lambda h: None, np.zeros_like)
        )
        missing = f"grad_reset_state.{'hc'[1 - k]}"
        assert found.pop(missing) is None
        assert padded.pop(missing) is not None
        assert_same(found, padded)


# ---- layouts -------------------------------------------------------------------------------------------------------


def filled(shape: list[int], dtype: Any) -> np.ndarray:
    """What must not be read: NaN, or for other dtypes ones."""
    return np.full(shape, np.nan if np.dtype(dtype).kind == "f" else 1, dtype)


def stepped(a: np.ndarray) -> np.ndarray:
    """The same values, every third of a larger array on each axis: the last axis is not contiguous."""
    large = filled([3 * n for n in a.shape], a.dtype)
    view = large[tuple(slice(1, None, 3) for _ in a.shape)]
    view[...] = a
    return view


def stepped_but_last(a: np.ndarray) -> np.ndarray:
    large = filled([*(2 * n for n in a.shape[:-1]), a.shape[-1] + 3], a.dtype)
    view = large[(*(slice(None, None, 2) for _ in a.shape[:-1]), slice(1, a.shape[-1] + 1))]
    view[...] = a
    return view


def reversed_axes(a: np.ndarray) -> np.ndarray:
    """Negative strides on every axis."""
    everywhere = tuple(slice(None, None, -1) for _ in a.shape)
    return np.ascontiguousarray(a[everywhere])[everywhere]


def reversed_but_last(a: np.ndarray) -> np.ndarray:
    some = tuple(slice(None, None, -1) for _ in a.shape[:-1])
    return np.ascontiguousarray(a[some])[some]


def swapped(a: np.ndarray) -> np.ndarray:
    """The first two axes lie the other way round."""
    return a if a.ndim < 2 else np.ascontiguousarray(a.swapaxes(0, 1)).swapaxes(0, 1)


def unaligned(a: np.ndarray) -> np.ndarray:
    raw = np.empty(a.nbytes + 1, dtype=np.uint8)
    view = raw[1:].view(a.dtype).reshape(a.shape)
    view[...] = a
    return view


def odd_strides(a: np.ndarray) -> np.ndarray:
    """A field of packed records: strides that are no multiple of the element."""
    records = np.zeros(a.shape, dtype=np.dtype([("tag", "u1"), ("value", a.dtype)]))
    records["value"] = a
    return records["value"]


def read_only(a: np.ndarray) -> np.ndarray:
    a = a.copy()
    a.flags.writeable = False
    return a


LAYOUTS = (
    np.asfortranarray,
    stepped,
    stepped_but_last,
    reversed_axes,
    reversed_but_last,
    swapped,
    unaligned,
    odd_strides,
    read_only,
)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("batch_first", [False, True], ids=["time_first", "batch_first"])
@pytest.mark.parametrize("cell", CELLS)
def test_layouts(cell: str, batch_first: bool, layout: Callable[[Any], Any], restore_sharing: None) -> None:
    """Strides of any kind, of every argument, weights as transposed views among them, are read as they are."""
    case = case_of(cell, **VARIANTS["everything"] | {"batch_first": batch_first, "H": 17, "reset_state": "rows"})
    arrays = make(case)
    expected = results(functional, case, arrays)
    changed = arrays.map(layout)
    changed.reset, changed.lengths = layout(arrays.reset), layout(arrays.lengths)
    assert_same(results(functional, case, changed), expected)
    Sharing("hidden", 2).use()
    assert_same(results(functional, case, changed), results(functional, case, arrays))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_broadcast_views(cell: str, axis: int) -> None:
    """A stride of zero: one sequence for all rows, one step for all times, one state for all rows."""
    case = case_of(cell, T=4, B=4, I=4, H=4)
    arrays = make(case)

    def one(a: Any) -> Any:
        axis_of_a = min(axis, a.ndim - 1)
        return np.broadcast_to(a.take([0], axis_of_a), a.shape)

    views = arrays.map(one)
    assert all(0 in a.strides for a in flatten((views.x, views.weights, views.grad_output)))
    assert_same(results(functional, case, views), results(functional, case, views.map(np.ascontiguousarray)))


# ---- values that are not finite ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_a_bad_row_stays_alone(cell: str, value: float, dtype: str, few_sharings: Sharing) -> None:
    """Rows share no arithmetic: what one holds changes no bit of the others, whatever the padding of H and P."""
    for H, proj in ((5, 0), (37, 0), (19, 3 if functional.CELLS[cell].has_cell_state else 0)):
        case = case_of(cell, T=6, B=7, H=H, proj=proj, num_layers=2, bidirectional=True, dtype=dtype)
        arrays = make(case)
        clean = results(functional, case, arrays)
        arrays.x[2, 3] = value
        found = results(functional, case, arrays)
        others = np.arange(7) != 3
        for name, batch_axis in (("output", 1), ("grad_x", 1), ("grad_h", 2)):
            kept, expected = (np.moveaxis(r[name], batch_axis, 0)[others] for r in (found, clean))
            np.testing.assert_array_equal(kept, expected, err_msg=name)
        assert not np.array_equal(found["output"][:, 3], clean["output"][:, 3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("where", ["x", "hx", "weight_ih", "weight_hh", "bias", "grad_output"])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_not_finite_as_in_the_reference(cell: str, where: str, value: float, dtype: str) -> None:
    """NaN and infinity come out exactly where the equations put them, also beside padded lanes."""
    for H in (5, 16, 21):
        case = case_of(cell, T=5, B=3, H=H, dtype=dtype, reset=0.0)
        arrays = make(case)
        arrays.reset[3, 1] = True
        place = {
            "x": arrays.x[1],
            "hx": next(flatten(arrays.hx))[0],
            "weight_ih": arrays.weights[0],
            "weight_hh": arrays.weights[1],
            "bias": arrays.weights[3],
            "grad_output": arrays.grad_output[2],
        }[where]
        place[(1,) * place.ndim] = value
        found, expected = (
            results(engine, case, arrays if engine is functional else arrays.astype("float64"))
            for engine in (functional, reference)
        )
        for name, truth in expected.items():
            error = normwise_error(found[name], truth)
            assert error < 1e-5, f"{name} with H={H}: error {error}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_nan_in_a_dropped_state(cell: str, dtype: str, few_sharings: Sharing) -> None:
    """A reset at t = 0 overrides the initial state, NaN or not, and resets cut a NaN off."""
    case = case_of(cell, T=6, B=3, H=7, reset=0.0, dtype=dtype, reset_state="rows")
    arrays = make(case)
    arrays.reset[0] = arrays.reset[4] = True
    clean = results(functional, case, arrays)
    poisoned = replace(arrays, hx=map_arrays(lambda a: np.full_like(a, np.nan), arrays.hx))
    assert_same(results(functional, case, poisoned), clean)
    arrays.x[1] = np.nan
    found = results(functional, case, arrays)
    assert np.isnan(found["output"][1:4]).all()
    np.testing.assert_array_equal(found["output"][4:], clean["output"][4:])
    np.testing.assert_array_equal(found["grad_x"][4:], clean["grad_x"][4:])
