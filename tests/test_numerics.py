"""The numerical contract: float32 beside PyTorch, repeatable results, and denormals.

Errors are normwise, max |y - y64| / max |y64|, the truth being float64: the kernels' own, which test_kernels.py holds
against the reference to 1e-11. In float32 an error may be twice that of PyTorch on the same inputs, or 4 units in the
last place where that is more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import rnnfast
from conftest import SHARINGS, Sharing
from reference_cases import Arrays, Case, flatten, make, map_arrays, named, normwise_error, results
from rnnfast import functional

CELLS = tuple(functional.CELLS)
PARAMETERS = {name: tuple((p, 0.3) for p in info.parameters) for name, info in functional.CELLS.items()}
TORCH_CELLS = {"rnn_tanh": "RNN", "rnn_relu": "RNN", "lstm": "LSTM", "gru": "GRU"}
ULP = float(np.finfo(np.float32).eps)
SEEDS = 200
EVERYTHING: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "lengths": True, "reset": 0.1, "dropout": 0.2}


# ---- float32 beside PyTorch ------------------------------------------------------------------------------------------


@pytest.fixture
def torch(restore_sharing: None) -> Any:
    """PyTorch on one thread: small problems are faster that way."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    return torch


def torch_results(torch: Any, case: Case, arrays: Arrays) -> dict[str, Any]:
    """What torch.nn computes, under the names of `results`."""
    kind = TORCH_CELLS[case.cell]
    extra: dict[str, Any] = {"nonlinearity": case.cell[4:]} if kind == "RNN" else {}
    extra |= {"proj_size": case.proj} if case.proj else {}
    module = getattr(torch.nn, kind)(case.I, case.H, case.num_layers, bidirectional=case.bidirectional, **extra)
    tensors = arrays.map(torch.from_numpy)
    with torch.no_grad():
        for parameter, w in zip(module.parameters(), tensors.weights, strict=True):
            parameter.copy_(w)
    for a in flatten((tensors.x, tensors.hx)):
        a.requires_grad_()
    output, state = module(tensors.x, tensors.hx)
    torch.autograd.backward(list(flatten((output, state))), list(flatten((tensors.grad_output, tensors.grad_state))))
    found = {"output": output, **named("state", state), "grad_x": tensors.x.grad}
    found |= named("grad_state", map_arrays(lambda a: a.grad, tensors.hx))
    found |= {f"grad_{name}": p.grad for name, p in module.named_parameters()}
    return {name: a.detach().numpy() for name, a in found.items()}


def errors(torch: Any, case: Case) -> Iterator[tuple[str, float, float]]:
    """(name, our error, PyTorch's error) of every tensor."""
    arrays = make(case)
    truth = results(functional, replace(case, dtype="float64"), arrays.astype("float64"))
    found = results(functional, case, arrays)
    for name, theirs in torch_results(torch, case, arrays).items():
        yield name, normwise_error(found[name], truth[name]), normwise_error(theirs, truth[name])


SETTINGS: dict[str, dict[str, Any]] = {
    "small": {"T": 20, "B": 3, "I": 7, "H": 17},
    "layers": {"T": 7, "B": 4, "I": 3, "H": 31, "num_layers": 2, "bidirectional": True},
    "large": {"T": 5, "B": 33, "I": 97, "H": 128},
    "long": {"T": 1000, "B": 2, "I": 3, "H": 8},
}
SHARE = {"small": 0.7, "layers": 0.25, "large": 0.04, "long": 0.01}  # of the seeds


@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_float32_beside_torch(cell: str, torch: Any, record_property: Any) -> None:
    """Over 200 seeds, sequences of 1,000 steps among them.

    The weight gradients are sums over all T·B steps, where chance decides the last digits of both libraries: one tensor
    in a hundred may be beyond the limit, none beyond twice the limit.
    """
    ratios = []
    for setting, changes in SETTINGS.items():
        for seed in range(round(SEEDS * SHARE[setting])):
            case = Case(cell=cell, dtype="float32", seed=seed, return_states=False, **changes)
            for name, ours, theirs in errors(torch, case):
                ratios.append((ours / max(2 * theirs, 4 * ULP), f"{setting}, seed {seed}: {name}"))
    worst = max(ratios)
    record_property("worst_ratio", worst)
    beyond = sum(ratio > 1 for ratio, _ in ratios)
    print(f"{cell}: worst error {worst[0]:.2f} of the limit ({worst[1]}); {beyond} of {len(ratios)} beyond it")
    assert worst[0] <= 2, worst
    assert beyond <= 0.01 * len(ratios), sorted(ratios)[-20:]


@pytest.mark.parametrize(("I", "H"), [(64, 256), (64, 512), (700, 300)])
@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_large_layers_beside_torch(cell: str, I: int, H: int, torch: Any) -> None:  # noqa: E741
    """Sums over hundreds of units and thousands of gates, from an initial state that is larger than all others: one long
    chain, or one that starts from a large value, would have several times PyTorch's error: five of these cases were
    beyond 1.5 then. Now chance puts one tensor in a hundred beyond 1, and none of those here beyond 1.1."""
    ratios = []
    for seed in range(2):
        case = Case(cell=cell, T=12, B=32, I=I, H=H, dtype="float32", return_states=False, seed=seed)
        ratios += [(ours / max(2 * theirs, 4 * ULP), name) for name, ours, theirs in errors(torch, case)]
    assert max(ratios)[0] <= 1.5, sorted(ratios)
    assert np.mean([ratio for ratio, _ in ratios]) <= 0.8, sorted(ratios)


def test_gradient_of_the_projection_beside_torch(torch: Any) -> None:
    """A sum over all rows, many of them: it is made of sums over a few."""
    for seed in range(3):
        case = Case(cell="lstm", T=100, B=32, I=16, H=64, proj=16, dtype="float32", seed=seed, return_states=False)
        found = {name: ours / max(2 * theirs, 4 * ULP) for name, ours, theirs in errors(torch, case)}
        ratios = {name: ratio for name, ratio in found.items() if "grad" in name and "weight" in name}
        assert len(ratios) == 3, found.keys()
        assert max(ratios.values()) <= 1.5, ratios


@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_large_weights_beside_torch(cell: str, torch: Any, record_property: Any) -> None:
    """Weights ten times as large make a chaotic network: it multiplies the rounding errors of the first steps, of both
    libraries, by thousands, and which of two is the luckier on one seed means nothing. So the errors of all seeds
    together are compared, at their median and at the ninth of ten.
    """
    ours, theirs = defaultdict(list), defaultdict(list)
    for seed in range(SEEDS):
        case = Case(cell=cell, T=20, B=3, I=7, H=17, dtype="float32", seed=seed, weight_scale=10.0, return_states=False)
        for name, our_error, their_error in errors(torch, case):
            ours[name].append(our_error)
            theirs[name].append(their_error)
    ratios = {
        (name, quantile): np.quantile(ours[name], quantile) / max(2 * np.quantile(theirs[name], quantile), 4 * ULP)
        for name in ours
        for quantile in (0.5, 0.9)
    }
    worst = max(ratios.items(), key=lambda item: item[1])
    record_property("worst_ratio", worst)
    print(f"{cell}: the worst error is {worst[1]:.2f} of the limit {worst[0]}")
    assert worst[1] <= 1, ratios


# ---- the same bits ---------------------------------------------------------------------------------------------------


def repeatable_case(cell: str, dtype: str = "float32") -> Case:
    """Large enough that all threads have work in every phase, and that chunks and panels have remainders."""
    return Case(cell=cell, T=23, B=9, I=33, H=101, dtype=dtype, parameters=PARAMETERS[cell], **EVERYTHING)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("cell", CELLS)
def test_repeatable(cell: str, dtype: str, sharing: Sharing) -> None:
    """Run to run on the same split and number of threads, every bit is the same."""
    case = repeatable_case(cell, dtype)
    arrays = make(case)
    first = {name: a.copy() for name, a in results(functional, case, arrays).items()}
    for _ in range(3):
        again = results(functional, case, arrays)
        for name, value in first.items():
            np.testing.assert_array_equal(again[name], value, err_msg=name)


@pytest.mark.parametrize("cell", CELLS)
def test_rows_do_not_depend_on_their_neighbours_values(cell: str, few_sharings: Sharing) -> None:
    case = repeatable_case(cell)
    arrays = make(case)
    first = results(functional, case, arrays)
    arrays.x[:, 4:] *= 3
    again = results(functional, case, arrays)
    np.testing.assert_array_equal(again["output"][:, :4], first["output"][:, :4])
    np.testing.assert_array_equal(again["grad_x"][:, :4], first["grad_x"][:, :4])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("B", "I", "H"), [(1, 3, 97), (7, 17, 40), (13, 5, 200), (20, 17, 72), (31, 3, 200)])
@pytest.mark.parametrize("cell", CELLS)
def test_sharing_the_hidden_units_changes_no_bit(
    cell: str,
    B: int,
    I: int,  # noqa: E741
    H: int,
    dtype: str,
    restore_sharing: None,
) -> None:
    """Nor does a thread that leaves the others behind, at whatever step. The larger batches also share rows of the blocks
    that the threads do not divide, where nobody asks for every state."""
    layers: dict[str, Any] = {"bidirectional": H == 40, "lengths": B == 13, "parameters": PARAMETERS[cell]}
    case = Case(cell=cell, T=9, B=B, I=I, H=H, dtype=dtype, return_states=B < 20, **layers)
    arrays = make(case)
    found = []
    for sharing in (("one", 1), ("hidden", 2), ("hidden", 3), ("hidden", 5), ("alone", 2), ("alone", 3)):
        Sharing(*sharing).use()
        found.append({name: a.copy() for name, a in results(functional, case, arrays).items()})
    for other in found[1:]:
        for name, value in found[0].items():
            np.testing.assert_array_equal(other[name], value, err_msg=name)


@pytest.mark.parametrize("cell", CELLS)
def test_sharing_the_hidden_units_of_a_ragged_batch_changes_no_bit(cell: str, restore_sharing: None) -> None:
    """Few rows, which are summed in another order, stand alone at the end of a chunk, wherever that is."""
    for seed in range(4):
        case = Case(cell=cell, T=50, B=31, I=119, H=17, lengths=True, return_states=False, seed=seed, dtype="float32",
                    parameters=PARAMETERS[cell])  # fmt: skip
        arrays = make(case)
        found = []
        for sharing in (("one", 1), ("hidden", 2), ("hidden", 3)):
            Sharing(*sharing).use()
            found.append({name: a.copy() for name, a in results(functional, case, arrays).items()})
        for other in found[1:]:
            for name, value in found[0].items():
                np.testing.assert_array_equal(other[name], value, err_msg=name)


@pytest.mark.parametrize("cell", CELLS)
def test_thread_count_changes_the_last_digits_at_most(cell: str, restore_sharing: None) -> None:
    """Sums over the batch are taken slice by slice, so another number of threads is another order of addition."""
    case = repeatable_case(cell)
    arrays = make(case)
    found = []
    for sharing in (*SHARINGS, ("", 1), ("", 2)):
        Sharing(*sharing).use()
        found.append({name: a.copy() for name, a in results(functional, case, arrays).items()})
    for other in found[1:]:
        for name, value in found[0].items():
            assert normwise_error(other[name], value) <= 16 * ULP, name


# ---- denormals -------------------------------------------------------------------------------------------------------


def decaying(cell: str, dtype: str) -> tuple[Case, Arrays]:
    """No input, and weights that halve the state (or take a part of it) at each step, well past the normal range."""
    steps = 1150 if dtype == "float64" else 200
    case = Case(cell=cell, T=steps, B=2, I=3, H=5, dtype=dtype, return_states=True)
    case = replace(case, parameters=tuple((name, 0.6) for name, _ in PARAMETERS[cell]))
    arrays = make(case)
    for array in flatten((arrays.x, arrays.weights, arrays.grad_output, arrays.grad_states)):
        array[...] = 0
    if cell.startswith("rnn"):
        arrays.weights[1][...] = 0.5 * np.eye(5)
    for array in flatten((arrays.hx, arrays.grad_state)):
        array[...] = np.linspace(0.5, 1, array.size).reshape(array.shape)
    return case, arrays


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("cell", CELLS)
def test_decaying_states_become_zero(cell: str, dtype: str, few_sharings: Sharing) -> None:
    """No denormal, which would cost a hundred times a normal number, is ever in a state or a gradient."""
    case, arrays = decaying(cell, dtype)
    tiny = np.finfo(dtype).tiny
    found = results(functional, case, arrays)
    for name, value in found.items():
        size = np.abs(value)
        assert ((size == 0) | (size >= tiny)).all(), name
    assert not any(found[name].any() for name in found if name.startswith("state."))
    assert not found["output"][-1].any()
    assert found["output"][0].all()
    assert not any(a.any() for name, a in found.items() if name.startswith("grad_state"))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_floating_point_mode_is_put_back(dtype: str, few_sharings: Sharing) -> None:
    """Flushing is a mode of the processor's, a thread's own; the caller's arithmetic keeps its denormals."""

    def denormals_work() -> bool:
        small = np.full(1000, np.finfo(dtype).tiny, dtype)
        return bool((small / 4 > 0).all() and (small / 4 * 4 == small).all())

    assert denormals_work()
    case, arrays = decaying("lstm", dtype)
    results(functional, case, arrays)
    assert denormals_work()
    results(functional, case, arrays, backward=False)
    lstm = rnnfast.LSTM(3, 5, dtype=dtype)
    with lstm.stream(2) as stream:
        stream.step(np.zeros((2, 3), dtype))
    with pytest.raises(ValueError, match="lengths"):
        lstm(arrays.x, lengths=[1, 5000])
    assert denormals_work()


def test_denormal_inputs_count_as_zero() -> None:
    case = Case(cell="gru", dtype="float32", hx=False)
    arrays = make(case)
    zeros = results(functional, case, replace(arrays, x=np.zeros_like(arrays.x)))
    arrays.x[...] = 1e-40
    np.testing.assert_array_equal(results(functional, case, arrays)["output"], zeros["output"])
