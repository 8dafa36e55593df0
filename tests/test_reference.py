"""The reference: its adjoint against finite differences, and all of it against PyTorch in float64.

Everything else is held against the reference, so what is shown here is shown by other means than the reference itself.
"""

from __future__ import annotations

from dataclasses import replace
from operator import itemgetter
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from reference_cases import (
    Arrays,
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
)
from rnnfast import reference

CELLS = tuple(reference.CELLS)
TORCH_CELLS = {"rnn_tanh": "RNN", "rnn_relu": "RNN", "lstm": "LSTM", "gru": "GRU"}  # those that torch.nn has

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"return_states": False},
    "states": {},
    "no_bias": {"bias": False, "num_layers": 2},
    "layers": {"num_layers": 3},
    "bidirectional": {"bidirectional": True},
    "batch_first": {"batch_first": True, "bidirectional": True, "lengths": True},
    "dropout": {"num_layers": 3, "bidirectional": True, "dropout": 0.4},
    "ragged": {"lengths": (2, 0, 7, 5, 1), "T": 7, "B": 5, "bidirectional": True, "num_layers": 2},
    "reset": {"reset": 0.3, "T": 9, "bidirectional": True, "num_layers": 2},
    "reset_to_rows": {"reset": 0.3, "T": 9, "reset_state": "rows", "bidirectional": True},
    "reset_to_shared": {"reset": 0.3, "T": 9, "reset_state": "shared", "bidirectional": True},
    "reset_always": {"reset": 1.0, "reset_state": "rows", "bidirectional": True, "lengths": True},
    "one": {"T": 1, "B": 1, "I": 1, "H": 1, "bidirectional": True},
    "odd": {"T": 4, "B": 7, "I": 3, "H": 17, "num_layers": 2, "lengths": True},
}
EVERYTHING: dict[str, Any] = {
    "T": 8,
    "B": 4,
    "num_layers": 3,
    "bidirectional": True,
    "batch_first": True,
    "dropout": 0.3,
    "lengths": (3, 8, 0, 6),
    "reset": 0.3,
    "reset_state": "shared",
}
VARIANTS["everything"] = EVERYTHING


def variants() -> list[Any]:
    """Every cell in every variant, and projected where it can be."""
    found = []
    for cell, record in reference.CELLS.items():
        for name, changes in VARIANTS.items():
            found.append(pytest.param(Case(cell=cell, **changes), id=f"{cell}-{name}"))
            if record.has_c and changes.get("H", 5) > 2:
                found.append(pytest.param(Case(cell=cell, proj=2, **changes), id=f"{cell}-proj-{name}"))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The adjoint against central differences
# ---------------------------------------------------------------------------------------------------------------------


def inputs(arrays: Arrays) -> list[Any]:
    return list(flatten((arrays.x, arrays.hx, arrays.weights, arrays.reset_state)))


def outputs(engine: Any, case: Case, arrays: Arrays) -> list[Any]:
    """The output, the state and the states, in training, so with dropout."""
    *found, _ = engine.forward(case.cell, arrays.x, arrays.hx, arrays.weights, **options(case, arrays))
    return list(flatten(found))


def loss(case: Case, arrays: Arrays) -> Any:
    """The scalar whose gradient `backward` computes: the sum of all outputs times their incoming gradients."""
    gradients = flatten((arrays.grad_output, arrays.grad_state, arrays.grad_states))
    return sum((y * g).sum() for y, g in zip(outputs(reference, case, arrays), gradients, strict=True))


def adjoint(case: Case, arrays: Arrays) -> list[Any]:
    """The gradients of `inputs`, in the same order."""
    *_, ctx = reference.forward(case.cell, arrays.x, arrays.hx, arrays.weights, **options(case, arrays))
    grad_x, grad_hx, grad_weights = reference.backward(
        ctx, arrays.grad_output, arrays.grad_state, grad_states=arrays.grad_states
    )
    return list(flatten((grad_x, grad_hx if arrays.hx is not None else None, grad_weights, ctx.grad_reset_state)))


def check_adjoint(case: Case, step: float = 1e-5, tolerance: float = 1e-7) -> None:
    """For each input on its own, the derivative in a random direction."""
    arrays = make(case)
    if arrays.hx is None:  # the gradient of a state not given is that of zeros
        arrays.hx = map_arrays(np.zeros_like, make(replace(case, hx=True)).hx)
    rng = np.random.default_rng(case.seed + 1)
    gradients = adjoint(case, arrays)
    assert len(gradients) == len(inputs(arrays))
    for j, gradient in enumerate(gradients):
        assert gradient.shape == inputs(arrays)[j].shape
        direction = rng.standard_normal(gradient.shape)
        sides = []
        for sign in (1, -1):
            moved = arrays.astype("float64")
            tensor = inputs(moved)[j]
            tensor += sign * step * direction
            sides.append(loss(case, moved))
        expected = (sides[0] - sides[1]) / (2 * step)
        found = (gradient * direction).sum()
        scale = max(1.0, float(np.linalg.norm(gradient) * np.linalg.norm(direction)))
        assert abs(found - expected) <= tolerance * scale, f"input {j} of shape {gradient.shape}: {found} {expected}"


@pytest.mark.parametrize("case", variants())
def test_adjoint_against_finite_differences(case: Case) -> None:
    if case.cell.endswith("relu"):  # a short step, so as not to straddle a kink
        check_adjoint(case, step=1e-7, tolerance=1e-6)
    else:
        check_adjoint(case)


@given(cases(cells=[cell for cell in CELLS if not cell.endswith("relu")], sizes=(1, 2, 3, 4, 7), max_work=5000))
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_adjoint_of_random_configurations(case: Case) -> None:
    check_adjoint(case, tolerance=1e-6)  # ReLU is left out: at many drawn points some difference straddles a kink


def test_a_new_cell_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time, layers, masks and adjoint come with a step, its adjoint and a row; parameters reach both."""

    def step(from_x: Any, from_h: Any, state: Any, beta: float) -> Any:
        (h_prev,) = state
        z, n = reference.split(from_x + from_h, 2)
        z, n = reference.sigmoid(z), reference.tanh(n)
        return ((1 - z) * h_prev + beta * z * n,), (z, n, h_prev)

    def step_adjoint(saved: Any, grad: Any, beta: float) -> Any:
        z, n, h_prev = saved
        (dh,) = grad
        da = reference.join(dh * (beta * n - h_prev) * z * (1 - z), dh * beta * z * (1 - n * n))
        return da, da, (dh * (1 - z),)

    monkeypatch.setitem(reference.CELLS, "minimal", reference.Cell(2, False, step, step_adjoint, {"beta": 0.5}))
    check_adjoint(Case(cell="minimal", **EVERYTHING))
    other = Case(cell="minimal", parameters=(("beta", 0.9),), **EVERYTHING)
    check_adjoint(other)
    default = results(reference, replace(other, parameters=()), make(other))
    assert normwise_error(results(reference, other, make(other))["output"], default["output"]) > 0.01


@pytest.mark.parametrize("bidirectional", [False, True])
def test_recorded_gradients_are_those_of_each_step(bidirectional: bool) -> None:
    """h = tanh(a), so dL/da = dL/dh (1 - h^2), and the gradients of the weights are sums of it over the steps."""
    changes = EVERYTHING | {"bidirectional": bidirectional, "batch_first": False}
    case = Case(cell="rnn_tanh", **changes)
    arrays = make(case)
    found = results(reference, case, arrays)
    da = found["grad_h"] * (1 - found["states"] ** 2)  # zero past the ends, where both are zero
    suffixes = [f"l{layer}{way}" for layer in range(3) for way in ("", "_reverse")[: case.directions]]
    for k, suffix in enumerate(suffixes):
        np.testing.assert_allclose(found[f"grad_bias_hh_{suffix}"], da[:, k].sum((0, 1)), rtol=0, atol=1e-12)
    valid = np.arange(case.T)[:, None] < arrays.lengths
    assert not found["grad_h"].swapaxes(1, 2)[~valid].any()
    x = np.where(valid[..., None], arrays.x, 0)
    np.testing.assert_allclose(found["grad_weight_ih_l0"], np.einsum("tbh,tbi->hi", da[:, 0], x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("cell", CELLS)
def test_missing_gradients_are_zero(cell: str) -> None:
    case = Case(cell=cell, **EVERYTHING)
    arrays = make(case)
    *_, ctx = reference.forward(case.cell, arrays.x, arrays.hx, arrays.weights, **options(case, arrays))
    full = {"grad_output": arrays.grad_output, "grad_state": arrays.grad_state, "grad_states": arrays.grad_states}
    parts = [{name: value} for name, value in full.items()]
    if case.has_c:  # either half of a pair may be missing
        parts[1:] = [
            {name: tuple(half if j == k else None for j, half in enumerate(full[name]))}
            for name in ("grad_state", "grad_states")
            for k in range(2)
        ]
    total = flatten(reference.backward(ctx, **full))
    by_part = [list(flatten(reference.backward(ctx, **part))) for part in parts]
    for whole, *pieces in zip(total, *by_part, strict=True):
        assert normwise_error(sum(pieces), whole) < 1e-13
    assert not any(gradient.any() for gradient in flatten(reference.backward(ctx)))


def test_need_grad_x_and_repeated_backward() -> None:
    case = Case(**EVERYTHING)
    arrays = make(case)
    *_, ctx = reference.forward(case.cell, arrays.x, arrays.hx, arrays.weights, **options(case, arrays))
    grad_x, grad_state, grad_weights = reference.backward(ctx, arrays.grad_output)
    nothing, same_state, same_weights = reference.backward(ctx, arrays.grad_output, need_grad_x=False)
    assert grad_x is not None
    assert nothing is None
    assert ctx.grad_h is None
    for a, b in zip(flatten((grad_state, grad_weights)), flatten((same_state, same_weights)), strict=True):
        np.testing.assert_array_equal(a, b)


# ---------------------------------------------------------------------------------------------------------------------
# Against PyTorch
# ---------------------------------------------------------------------------------------------------------------------


def torch_results(case: Case, arrays: Arrays) -> dict[str, Any]:
    """What torch.nn computes, lengths by a PackedSequence, under the names of `results`."""
    torch = pytest.importorskip("torch")
    kind = TORCH_CELLS[case.cell]
    extra: dict[str, Any] = {"nonlinearity": case.cell[4:]} if kind == "RNN" else {}
    if case.proj:
        extra["proj_size"] = case.proj
    module = getattr(torch.nn, kind)(
        case.I,
        case.H,
        num_layers=case.num_layers,
        bias=case.bias,
        batch_first=case.batch_first,
        bidirectional=case.bidirectional,
        dtype=torch.float64,
        **extra,
    )
    tensors = arrays.map(torch.from_numpy)
    with torch.no_grad():
        for (name, parameter), w in zip(module.named_parameters(), tensors.weights, strict=True):
            assert name in case.weight_shapes()
            parameter.copy_(w)
    for a in flatten((tensors.x, tensors.hx)):
        a.requires_grad_()
    output, state = run_torch(torch, module, case, tensors)
    gradients = flatten((tensors.grad_output, tensors.grad_state))
    torch.autograd.backward(list(flatten((output, state))), list(gradients))
    found = {"output": output, **named("state", state), "grad_x": tensors.x.grad}
    found |= named("grad_state", map_arrays(lambda a: a.grad, tensors.hx))
    found |= {f"grad_{name}": p.grad for name, p in module.named_parameters()}
    return {name: a.detach().numpy() for name, a in found.items()}


def run_torch(torch: Any, module: Any, case: Case, tensors: Arrays) -> tuple[Any, Any]:
    if tensors.lengths is None:
        return module(tensors.x, tensors.hx)
    rnn = torch.nn.utils.rnn
    lengths = torch.as_tensor(tensors.lengths)
    packed = rnn.pack_padded_sequence(tensors.x, lengths, batch_first=case.batch_first, enforce_sorted=False)
    output, state = module(packed, tensors.hx)
    return rnn.pad_packed_sequence(output, batch_first=case.batch_first, total_length=case.T)[0], state


def compare_with_torch(case: Case) -> None:
    arrays = make(case)
    found = results(reference, case, arrays)
    truth = torch_results(case, arrays)
    assert_close({name: found[name] for name in truth}, truth, 1e-12)


@pytest.mark.parametrize("cell", TORCH_CELLS)
@pytest.mark.parametrize("lengths", [None, (4, 6, 1, 2, 6)], ids=["dense", "ragged"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one_way", "two_ways"])
@pytest.mark.parametrize(("num_layers", "bias"), [(1, True), (3, False), (2, True)])
def test_against_torch(cell: str, lengths: Any, bidirectional: bool, num_layers: int, bias: bool) -> None:
    case = Case(cell=cell, T=6, B=5, num_layers=num_layers, bias=bias, lengths=lengths or False, return_states=False)
    for proj in (0, 3) if case.has_c else (0,):
        for batch_first in (False, True):
            compare_with_torch(replace(case, bidirectional=bidirectional, proj=proj, batch_first=batch_first))


@pytest.mark.parametrize("cell", TORCH_CELLS)
@pytest.mark.parametrize(
    "changes",
    [
        {"T": 1, "B": 1, "I": 1, "H": 1},
        {"T": 7, "B": 3, "I": 97, "H": 31},
        {"T": 31, "B": 7, "I": 1, "H": 17},
        {"T": 200, "B": 2, "I": 3, "H": 5},
        {"T": 5, "B": 17, "I": 3, "H": 7, "weight_scale": 10.0},
    ],
    ids=lambda changes: "-".join(str(size) for size in changes.values()),
)
def test_sizes_against_torch(cell: str, changes: dict[str, Any]) -> None:
    compare_with_torch(Case(cell=cell, num_layers=2, bidirectional=True, return_states=False, **changes))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_recorded_gradients_against_torch(cell: str) -> None:
    """dL/dh_t, which torch shows in a loop of cells written out, with the mask between the layers."""
    torch = pytest.importorskip("torch")
    case = Case(cell=cell, num_layers=2, dropout=0.5, return_states=False)
    arrays = make(case)
    found = results(reference, case, arrays)
    tensors = arrays.map(torch.from_numpy)
    y, all_h, total = list(tensors.x), [], 0.0
    for layer in range(2):
        make_cell = torch.nn.LSTMCell if case.has_c else torch.nn.GRUCell
        module = make_cell(tensors.weights[4 * layer].shape[1], case.H, dtype=torch.float64)
        for parameter, w in zip(module.parameters(), tensors.weights[4 * layer : 4 * layer + 4], strict=True):
            parameter.data.copy_(w)
        state = tuple(s[layer] for s in tensors.hx) if case.has_c else tensors.hx[layer]
        steps = []
        for x_t in y:
            state = module(x_t, state)
            steps.append(state[0] if case.has_c else state)
        total += sum(
            (s * g[layer]).sum() for s, g in zip(flatten((state,)), flatten((tensors.grad_state,)), strict=True)
        )
        all_h.append(steps)
        t = np.arange(case.T)[:, None]
        keep = torch.from_numpy(reference.dropout_mask(case.seed, case.seed % 5, 0, t, np.arange(case.B), case.H, 0.5))
        y = [torch.where(kept, h / 0.5, 0.0) for kept, h in zip(keep, steps, strict=True)]
    total += sum((h * g).sum() for h, g in zip(all_h[1], tensors.grad_output, strict=True))
    gradients = torch.autograd.grad(total, [h for steps in all_h for h in steps])
    expected = torch.stack(gradients).reshape(2, case.T, case.B, case.H).swapaxes(0, 1).numpy()
    np.testing.assert_allclose(found["grad_h"], expected, rtol=0, atol=1e-13)


# ---------------------------------------------------------------------------------------------------------------------
# Resets: the segments on their own
# ---------------------------------------------------------------------------------------------------------------------


def run_in_segments(case: Case, arrays: Arrays) -> dict[str, Any]:
    """The results of a case with resets from runs without: one for each row and segment."""
    plain = replace(case, B=1, lengths=False, reset=None, reset_state=None, hx=True)
    truth = {name: np.zeros_like(a) for name, a in results(reference, case, arrays).items()}
    lengths = np.full(case.B, case.T) if arrays.lengths is None else arrays.lengths
    for b in range(case.B):
        starts = [0, *(t for t in range(1, lengths[b]) if arrays.reset[t, b])]
        ends = [*starts[1:], lengths[b]]
        for start, end in zip(starts, ends, strict=True):
            enters = [d == 0 and start == 0 and not (end > 0 and arrays.reset[0, b]) for d in range(2)]
            enters[1] = end == lengths[b]
            leaves = [end == lengths[b], start == 0]
            part = take_segment(case, arrays, b, slice(start, end), enters, leaves)
            found = results(reference, replace(plain, T=int(end - start)), part)
            put_segment(case, truth, found, b, slice(start, end), enters, leaves)
    return truth


def runs_where(case: Case, flags: list[bool]) -> np.ndarray:
    """[L*D, 1, 1]: the flag of each layer and direction's direction."""
    return np.array([flags[d] for _ in range(case.num_layers) for d in range(case.directions)])[:, None, None]


def take_segment(case: Case, a: Arrays, b: int, steps: slice, enters: list[bool], leaves: list[bool]) -> Arrays:
    row = slice(b, b + 1)

    def initial(given: Any, after_reset: Any) -> Any:
        after_reset = after_reset[:, row] if after_reset.shape[1] == case.B else after_reset
        return np.where(runs_where(case, enters), given[:, row], after_reset)

    after = map_arrays(np.zeros_like, a.hx) if a.reset_state is None else a.reset_state
    elements = [initial(h, r) for h, r in zip(flatten((a.hx,)), flatten((after,)), strict=True)]
    return Arrays(
        x=a.x[steps, row],
        hx=tuple(elements) if case.has_c else elements[0],
        weights=a.weights,
        lengths=None,
        reset=None,
        reset_state=None,
        grad_output=a.grad_output[steps, row],
        grad_state=map_arrays(lambda g: np.where(runs_where(case, leaves), g[:, row], 0), a.grad_state),
        grad_states=map_arrays(lambda g: g[steps, :, row], a.grad_states),
    )


def put_segment(
    case: Case,
    truth: dict[str, Any],
    found: dict[str, Any],
    b: int,
    steps: slice,
    enters: list[bool],
    leaves: list[bool],
) -> None:
    row = slice(b, b + 1)
    after_reset = {name for name in truth if name.startswith("grad_reset_state")}
    for name, value in found.items():
        if name in ("output", "grad_x"):
            truth[name][steps, row] = value
        elif name.startswith("states") or name == "grad_h":
            truth[name][steps, :, row] = value
        elif name.startswith("state"):
            truth[name][:, row] += np.where(runs_where(case, leaves), value, 0)
        elif name.startswith("grad_state"):
            truth[name][:, row] += np.where(runs_where(case, enters), value, 0)
            target = name.replace("grad_state", "grad_reset_state")
            if target in after_reset:
                where = row if truth[target].shape[1] == case.B else slice(0, 1)
                truth[target][:, where] += np.where(runs_where(case, enters), 0, value)
        else:
            truth[name] += value


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("reset_state", [None, "rows", "shared"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one_way", "two_ways"])
def test_resets_equal_separate_segments(cell: str, reset_state: str | None, bidirectional: bool) -> None:
    case = Case(cell=cell, T=9, B=4, num_layers=2, bidirectional=bidirectional, reset=0.35, reset_state=reset_state)
    for lengths in (False, (9, 0, 4, 7)):
        for proj in (0, 2) if case.has_c else (0,):
            this = replace(case, lengths=lengths, proj=proj, seed=3)
            arrays = make(this)
            arrays.reset[0] = True, True, False, False  # at the start, also of an empty row
            arrays.reset[4, 2] = arrays.reset[8, 3] = True  # past the ends
            found = results(reference, this, arrays)
            truth = run_in_segments(this, arrays)
            if reset_state is None:
                assert not any(name.startswith("grad_reset_state") for name in found)
            assert_close(found, truth, 1e-13)


@pytest.mark.parametrize("cell", CELLS)
def test_a_reset_at_the_start_overrides_the_initial_state(cell: str) -> None:
    case = Case(cell=cell, reset=0.0, bidirectional=True)
    arrays = make(case)
    arrays.reset[0] = True
    found = results(reference, case, arrays)
    for name in named("grad_state", arrays.grad_state):
        assert not found[name][0].any()
        assert found[name][1].all()


def test_no_resets_change_nothing() -> None:
    case = Case(reset=0.0, lengths=True, bidirectional=True, num_layers=2, reset_state="rows")
    arrays = make(case)
    found = results(reference, case, arrays)
    plain = results(reference, case, replace(arrays, reset=None, reset_state=None))
    for name, value in plain.items():
        np.testing.assert_array_equal(found[name], value)
    assert not found["grad_reset_state.h"].any()


def test_reset_takes_zeros_and_ones() -> None:
    case = Case(reset=0.4, bidirectional=True)
    arrays = make(case)
    found = results(reference, case, replace(arrays, reset=arrays.reset.astype(np.uint8)))
    np.testing.assert_array_equal(found["output"], results(reference, case, arrays)["output"])


# ---------------------------------------------------------------------------------------------------------------------
# Lengths
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_lengths_equal_separate_rows(cell: str) -> None:
    case = Case(cell=cell, T=6, B=4, lengths=(6, 0, 1, 4), bidirectional=True, num_layers=2)
    arrays = make(case)
    found = results(reference, case, arrays, backward=False)
    for b, length in enumerate(arrays.lengths):
        hx = map_arrays(itemgetter((slice(None), slice(b, b + 1))), arrays.hx)
        row = replace(arrays, x=arrays.x[:length, b : b + 1], hx=hx, lengths=None)
        alone = results(reference, replace(case, T=int(length), B=1, lengths=False), row, backward=False)
        np.testing.assert_allclose(found["output"][:length, b : b + 1], alone["output"], rtol=0, atol=1e-15)
        assert not found["output"][length:, b].any()
        for name in [name for name in alone if name.startswith("states")]:
            np.testing.assert_allclose(found[name][:length, :, b : b + 1], alone[name], rtol=0, atol=1e-15)
            assert not found[name][length:, :, b].any()
        for name in named("state", hx):
            np.testing.assert_allclose(found[name][:, b : b + 1], alone[name], rtol=0, atol=1e-15)
    for name, start in named("state", arrays.hx).items():
        np.testing.assert_array_equal(found[name][:, 1], start[:, 1])  # the row without a step


@pytest.mark.parametrize("kind", [list, tuple, np.int32, np.uint8, np.int64])
def test_lengths_of_any_integer_type(kind: Any) -> None:
    case = Case(T=5, B=3, lengths=(5, 0, 2), bidirectional=True)
    arrays = make(case)
    lengths = kind((5, 0, 2)) if kind in (list, tuple) else np.array([5, 0, 2], dtype=kind)
    found = results(reference, case, replace(arrays, lengths=lengths))
    np.testing.assert_array_equal(found["grad_x"], results(reference, case, arrays)["grad_x"])


@pytest.mark.parametrize("case", [case for case in variants() if case.values[0].lengths])
def test_nan_in_the_padding_changes_nothing(case: Case) -> None:
    arrays = make(case)
    poisoned = poison_padding(case, arrays)
    assert case.T == 1 or all(np.isnan(a).any() for a in (poisoned.x, poisoned.grad_output))
    found, clean = results(reference, case, poisoned), results(reference, case, arrays)
    for name, value in clean.items():
        assert np.isfinite(value).all()
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("cell", CELLS)
def test_nan_stays_in_its_row_and_segment(cell: str) -> None:
    case = Case(cell=cell, T=8, B=3, reset=0.0, num_layers=2)
    arrays = make(case)
    arrays.reset[5, 1] = True
    clean = results(reference, case, arrays)
    arrays.x[2, 1] = np.nan
    found = results(reference, case, arrays)
    touched = np.zeros((8, 3), dtype=bool)
    touched[2:5, 1] = True
    np.testing.assert_array_equal(np.isnan(found["output"]).all(-1), touched)
    np.testing.assert_array_equal(found["output"][~touched], clean["output"][~touched])
    touched[:5, 1] = True  # the gradient goes back to the start of the segment
    np.testing.assert_array_equal(found["grad_x"][~touched], clean["grad_x"][~touched])
    if not cell.endswith("relu"):  # at a NaN the slope of a ReLU is taken to be 1, as torch does
        assert np.isnan(found["grad_x"][2, 1]).all()


@pytest.mark.parametrize("cell", CELLS)
def test_nan_in_the_state_of_an_empty_row_goes_nowhere(cell: str) -> None:
    case = Case(cell=cell, lengths=(3, 0, 5), bidirectional=True, num_layers=2)
    arrays = make(case)
    clean = results(reference, case, arrays)
    for state in flatten((arrays.hx,)):
        state[:, 1] = np.nan
    for name, value in results(reference, case, arrays).items():
        if name in named("state", arrays.hx):
            assert np.isnan(value[:, 1]).all()
            value[:, 1] = clean[name][:, 1]
        np.testing.assert_array_equal(value, clean[name], err_msg=name)


# ---------------------------------------------------------------------------------------------------------------------
# Other options and edges
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_batch_first_is_the_transpose(cell: str) -> None:
    case = Case(cell=cell, **(EVERYTHING | {"batch_first": False}))
    arrays = make(case)
    turned: dict[str, Any] = {
        name: None if value is None else value.swapaxes(0, 1)
        for name, value in {"x": arrays.x, "reset": arrays.reset, "grad_output": arrays.grad_output}.items()
    }
    found = results(reference, replace(case, batch_first=True), replace(arrays, **turned))
    for name, value in results(reference, case, arrays).items():
        expected = value.swapaxes(0, 1) if name in ("output", "grad_x") else value
        np.testing.assert_array_equal(found[name], expected)


@pytest.mark.parametrize("cell", CELLS)
def test_no_initial_state_is_zero(cell: str) -> None:
    case = Case(cell=cell, bidirectional=True)
    arrays = make(case)
    zero = results(reference, case, replace(arrays, hx=map_arrays(np.zeros_like, arrays.hx)))
    for name, value in results(reference, case, replace(arrays, hx=None)).items():
        np.testing.assert_array_equal(value, zero[name])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("T", "B"), [(3, 0), (0, 2), (0, 0), (1, 1), (4, 3)])
def test_empty_sizes_and_dtypes(cell: str, dtype: str, T: int, B: int) -> None:
    for reset_state in ("rows", "shared"):
        changes = EVERYTHING | {"T": T, "B": B, "lengths": True, "reset_state": reset_state, "num_layers": 2}
        case = Case(cell=cell, dtype=dtype, **changes)
        arrays = make(case)
        found = results(reference, case, arrays)
        assert all(str(value.dtype) == dtype for value in found.values())
        assert found["output"].shape == arrays.grad_output.shape
        assert found["grad_x"].shape == arrays.x.shape
        if T == 0:
            for name, start in named("state", arrays.hx).items():
                np.testing.assert_array_equal(found[name], start)
        if T * B == 0:
            assert not any(found[f"grad_{name}"].any() for name in case.weight_shapes())


@pytest.mark.parametrize("cell", CELLS)
def test_float32_is_near_float64(cell: str) -> None:
    case = Case(cell=cell, dtype="float32", **EVERYTHING)
    arrays = make(case)
    assert_close(results(reference, case, arrays), results(reference, case, arrays.astype("float64")), 1e-5)


def test_evaluation_drops_nothing_and_keeps_nothing() -> None:
    case = Case(num_layers=2, dropout=0.5)
    arrays = make(case)
    output, _, _, ctx = reference.forward(
        case.cell, arrays.x, arrays.hx, arrays.weights, training=False, **options(case, arrays)
    )
    assert ctx is None
    plain = results(reference, replace(case, dropout=0.0), arrays)
    np.testing.assert_array_equal(output, plain["output"])
    assert normwise_error(results(reference, case, arrays)["output"], plain["output"]) > 0.01


def test_dropout_lies_between_the_layers() -> None:
    """Layer by layer with masks made a value at a time, as the definition says."""
    case = Case(T=4, B=3, H=7, num_layers=3, bidirectional=True, dropout=0.35, seed=2**40 + 12, return_states=False)
    arrays = make(case)
    y = arrays.x
    for layer in range(3):
        weights, hx = arrays.weights[8 * layer : 8 * layer + 8], tuple(s[2 * layer : 2 * layer + 2] for s in arrays.hx)
        output, _, _ = reference.forward("lstm", y, hx, weights, bidirectional=True)
        y = np.zeros_like(output)
        for t, b, unit in np.ndindex(*y.shape):
            counter = (t, b, layer * 2**20 + unit // 4, case.seed % 5)
            word = int(reference.philox4x32(counter, (12, 2**8))[unit % 4][0])
            if word >= np.floor(0.35 * 2**32):
                y[t, b, unit] = output[t, b, unit] / (1 - 0.35)
    np.testing.assert_allclose(results(reference, case, arrays)["output"], output, rtol=0, atol=1e-15)


def test_dropping_everything() -> None:
    case = Case(num_layers=2, dropout=1.0, bidirectional=True)
    found = results(reference, case, make(case))
    assert all(np.isfinite(value).all() for value in found.values())
    assert not found["grad_weight_ih_l1"].any()


# ---------------------------------------------------------------------------------------------------------------------
# Philox and the sigmoid
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_words(counter: str, key: str, words: str) -> None:
    """The known answers that were published with Random123."""
    found = reference.philox4x32([int(c, 16) for c in counter.split()], [int(k, 16) for k in key.split()])
    assert " ".join(f"{int(word[0]):08x}" for word in found) == words


def test_dropout_mask_is_a_function_of_the_place() -> None:
    t, b = np.arange(50)[:, None], np.arange(6)
    mask = reference.dropout_mask(7, 1, 2, t, b, 33, 0.25)
    assert mask.shape == (50, 6, 33)
    assert mask.dtype == bool
    np.testing.assert_array_equal(reference.dropout_mask(7, 1, 2, 11, 4, 10, 0.25), mask[11, 4, :10])
    np.testing.assert_array_equal(reference.dropout_mask(7, 1 + 2**32, 2, t, b, 33, 0.25), mask)  # the low 32 bits
    assert abs(mask.mean() - 0.75) < 0.02
    for other in ((8, 1, 2), (7 + 2**32, 1, 2), (7, 2, 2), (7, 1, 3)):
        assert abs((reference.dropout_mask(*other, t, b, 33, 0.25) == mask).mean() - 0.625) < 0.02
    word = int(reference.philox4x32((11, 4, 2 * 2**20, 1), (7, 0))[0][0])  # of unit 0: kept up to just this p
    assert reference.dropout_mask(7, 1, 2, 11, 4, 1, word / 2**32).all()
    assert not reference.dropout_mask(7, 1, 2, 11, 4, 1, (word + 1) / 2**32).any()
    assert reference.dropout_mask(7, 1, 2, t, b, 33, 0.0).all()
    assert not reference.dropout_mask(7, 1, 2, t, b, 33, 1.0).any()


def test_sigmoid_is_stable() -> None:
    a = np.concatenate([np.linspace(-40, 40, 321), [-1000.0, -700.0, 700.0, 1000.0, -np.inf, np.inf]])
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        found = reference.sigmoid(a)
    np.testing.assert_allclose(found[:321], 1 / (1 + np.exp(-a[:321])), rtol=5e-16)
    np.testing.assert_allclose(found[321:], [0, np.exp(-700.0), 1, 1, 0, 1], rtol=1e-15)
    assert np.isnan(reference.sigmoid(np.array([np.nan]))).all()
    assert reference.sigmoid(np.array([-80.0], dtype=np.float32))[0] == pytest.approx(np.exp(-80.0), rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Other array libraries
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", variants())
def test_autograd_through_the_forward_is_the_adjoint(case: Case) -> None:
    """On tensors, NaN in the padding: torch differentiates the forward, and the adjoint runs on them as well."""
    torch = pytest.importorskip("torch")
    arrays = make(case)
    expected = adjoint(case, arrays)
    tensors = (poison_padding(case, arrays) if case.lengths else arrays).map(torch.from_numpy)
    for tensor in inputs(tensors):
        tensor.requires_grad_()
    gradients = [torch.nan_to_num(g) for g in flatten((tensors.grad_output, tensors.grad_state, tensors.grad_states))]
    found = outputs(reference, case, tensors)
    by_autograd = torch.autograd.grad(found, inputs(tensors), gradients)
    by_hand = adjoint(case, tensors)
    assert len(by_autograd) == len(by_hand) == len(expected)
    for automatic, hand, truth in zip(by_autograd, by_hand, expected, strict=True):
        assert normwise_error(automatic.numpy(), truth) < 1e-13
        assert normwise_error(hand.detach().numpy(), truth) < 1e-13


def test_autograd_where_a_gate_is_exactly_half() -> None:
    """Zero weights put every gate at a = 0, where an absolute value inside the sigmoid would have no derivative."""
    torch = pytest.importorskip("torch")
    for cell in CELLS:
        case = Case(cell=cell, weight_scale=0.0)
        tensors = make(case).map(torch.from_numpy)
        for tensor in inputs(tensors):
            tensor.requires_grad_()
        gradients = list(flatten((tensors.grad_output, tensors.grad_state, tensors.grad_states)))
        found = torch.autograd.grad(outputs(reference, case, tensors), inputs(tensors), gradients)
        for automatic, hand in zip(found, adjoint(case, tensors), strict=True):
            np.testing.assert_allclose(automatic.numpy(), hand.detach().numpy(), rtol=0, atol=1e-13)


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "value", "error", "match"),
    [
        ("cell", "lstn", ValueError, "cell: expected one of rnn_tanh, .* got 'lstn'"),
        ("x", np.zeros((5, 4)), ValueError, r"x: expected an array of rank 3, got \(5, 4\)"),
        ("x", np.zeros((5, 3, 6)), ValueError, r"weights\[0\]: expected shape \(20, 6\), got \(20, 4\)"),
        ("x", np.zeros((5, 3, 4), dtype=np.float32), TypeError, "weights.*: expected dtype float32"),
        ("hx", np.zeros((1, 3, 5)), TypeError, "hx: expected a pair"),
        ("hx", (np.zeros((1, 3, 5)), np.zeros((1, 2, 5))), ValueError, r"hx\[1\]: expected shape \(1, 3, 5\), got"),
        ("weights", [np.zeros((20, 4))], ValueError, "weights: expected 2 or 3 or 4 or 5 of them, got 1"),
        ("weights", [np.zeros((20, 4)), np.zeros((19, 5))], ValueError, r"weights\[1\]: expected shape \(4\*H, H\)"),
        ("num_layers", 0, ValueError, "num_layers: expected at least 1, got 0"),
        ("dropout", 1.5, ValueError, "dropout: expected a probability from 0 to 1, got 1.5"),
        ("lengths", np.array([1, 2]), ValueError, r"lengths: expected shape \(3,\), got \(2,\)"),
        ("lengths", np.array([1.0, 2.0, 3.0]), TypeError, "lengths: expected integers"),
        ("lengths", [1, 6, 2], ValueError, r"lengths: expected values from 0 to 5, got \[1, 6, 2\]"),
        ("lengths", [1, -1, 2], ValueError, "lengths: expected values from 0 to 5"),
        ("reset", np.zeros((3, 5)), ValueError, r"reset: expected shape \(5, 3\), got \(3, 5\)"),
        ("reset_state", (np.zeros((1, 2, 5)),) * 2, ValueError, r"reset_state\[0\]: .* \(1, 3, 5\) or \(1, 1, 5\)"),
        ("alpha", 0.5, TypeError, "alpha: not an option, nor a parameter of the cell 'lstm'"),
    ],
)
def test_errors_name_the_argument(argument: str, value: Any, error: type[Exception], match: str) -> None:
    arrays = make(Case())
    given = {"cell": "lstm", "x": arrays.x, "hx": arrays.hx, "weights": arrays.weights, argument: value}
    with pytest.raises(error, match=match):
        reference.forward(**given)


@pytest.mark.parametrize(
    ("argument", "value", "error", "match"),
    [
        ("grad_output", np.zeros((5, 3, 4)), ValueError, r"grad_output: expected shape \(5, 3, 5\), got \(5, 3, 4\)"),
        ("grad_output", np.zeros((5, 3, 5), np.float32), TypeError, "grad_output: expected dtype float64"),
        ("grad_state", np.zeros((1, 3, 5)), TypeError, "grad_state: expected a pair"),
        ("grad_states", (None, np.zeros((1, 3, 5))), ValueError, r"grad_states\[1\]: expected shape \(5, 1, 3, 5\)"),
    ],
)
def test_errors_of_backward(argument: str, value: Any, error: type[Exception], match: str) -> None:
    arrays = make(Case())
    *_, ctx = reference.forward("lstm", arrays.x, arrays.hx, arrays.weights)
    with pytest.raises(error, match=match):
        reference.backward(ctx, **{argument: value})


def test_comparison_notices_a_wrong_result() -> None:
    """The helper that other tests rely on: a wrong value, shape, NaN or missing tensor fails."""
    truth = {"output": np.ones((2, 3)), "grad_x": np.ones(4)}
    assert_close({"output": np.ones((2, 3)) + 1e-13, "grad_x": np.ones(4) + 1e-12}, truth, 1e-12, 1e-11)
    for wrong in (
        {"output": np.ones((2, 3)) + 1e-11},
        {"output": np.ones((3, 2))},
        {"output": np.full((2, 3), np.nan)},
    ):
        with pytest.raises(AssertionError, match="output"):
            assert_close(truth | wrong, truth, 1e-12, 1e-11)
    with pytest.raises(AssertionError):
        assert_close({"output": truth["output"]}, truth, 1.0)
