"""What the tests of the CUDA engine share, emulated or on a device: the cases, where arrays lie, and the comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

import rnnfast
from reference_cases import Arrays, Case, cases, make, normwise_error, options, poison_padding, results
from rnnfast import functional, reference
from test_kernels import CELLS, PARAMETERS, case_of, check

HALF = {"float16": 2.0**-11, "bfloat16": 2.0**-8}  # half a unit in the last place of 1
DTYPES = ("float64", "float32", *HALF)

# (dtype, path): float32 has persistent kernels in a block, in a cluster and over a grid, float64 a launch for each step.
PATHS = [("float64", ""), *(("float32", path) for path in ("", "cluster", "grid", "generic"))]
HALF_PATHS = [(dtype, path) for dtype in HALF for path in ("cluster", "grid", "generic")]

PERSISTENT_SIZES: list[dict[str, Any]] = [
    {"T": 3, "B": 141, "H": 9, "lengths": True, "reset": 0.2, "reset_state": "rows"},  # four sequences in a block
    {"T": 3, "B": 2, "H": 140, "lengths": True},  # for the LSTM, more in registers and fewer threads
    {"T": 2, "B": 135, "H": 67},
    {"T": 7, "B": 3, "H": 97, "lengths": (0, 7, 2), "reset": 0.3},
    {"T": 2, "B": 1, "H": 311},  # for the vanilla RNN a persistent kernel still
]

# (multiprocessors, case) for the grid's kernels; an emulated device has that many. Then the sizes for a real one.
FEW_MULTIPROCESSORS: list[tuple[int, dict[str, Any]]] = [
    (3, {"T": 4, "B": 29, "H": 24, "lengths": True, "reset": 0.2, "reset_state": "rows"}),  # a block has several groups
    (
        4,
        {"T": 3, "B": 9, "H": 61, "lengths": (0, 3, 2, 1, 1, 0, 0, 0, 0), "reset": 0.3},
    ),  # one direction, then the other
    (6, {"T": 2, "B": 3, "H": 170}),  # backward, weights in shared memory too
    (132, {"T": 3, "B": 2, "H": 93}),  # many parts, of which the last is not full
]
# (multiprocessors, blocks of the largest cluster, case): many groups of one cluster, parts without units, two groups.
SMALL_CLUSTERS: list[tuple[int, int, dict[str, Any]]] = [
    (3, 2, {"T": 4, "B": 29, "H": 24, "lengths": True, "reset": 0.2, "reset_state": "rows"}),
    (16, 16, {"T": 3, "B": 9, "H": 97, "lengths": (0, 3, 2, 1, 1, 0, 0, 0, 0), "reset": 0.3}),
    (8, 8, {"T": 5, "B": 18, "H": 61, "lengths": True}),
    (4, 2, {"T": 2, "B": 3, "H": 60}),
]
CLUSTER_SIZES: list[dict[str, Any]] = [
    {"T": 40, "B": 33, "H": 256, "lengths": True, "reset": 0.05, "reset_state": "rows"},
    {"T": 9, "B": 200, "H": 189, "lengths": True},
    {"T": 6, "B": 5, "H": 384, "reset": 0.2},
]
GRID_SIZES: list[dict[str, Any]] = [
    {"T": 40, "B": 33, "H": 256, "lengths": True, "reset": 0.05, "reset_state": "rows"},
    {"T": 9, "B": 70, "H": 511, "lengths": True},
    {"T": 6, "B": 5, "H": 1024, "reset": 0.2},
    {"T": 3, "B": 2, "H": 2048},  # for the LSTM and the GRU in 16 bits only
]

# Odd sizes, and some beyond one tile of 16 (a step's) and of 64 (a large product's), each way.
SIZES = [(1, 1, 1, 1), (3, 17, 5, 33), (7, 1, 65, 16), (2, 33, 16, 15), (31, 3, 1, 17), (5, 70, 3, 2), (2, 2, 130, 48)]

EMPTY = [(3, 0), (0, 3), (0, 0)]

# For test functions with hypothesis: fixtures are set once for all examples, and that is enough.
RANDOM = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


# ---- where arrays lie ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A library and a device. `send` takes a NumPy array there, in a dtype; `fetch` brings it back, 16 bits as float64."""

    name: str
    dtypes: tuple[str, ...]
    send: Callable[[Any, str], Any]
    fetch: Callable[[Any], Any]

    def arrays(self, case: Case) -> Arrays:
        """The arrays of a case, rounded to its dtype."""
        return make(in_numpy(case)).map(lambda a: self.send(a, case.dtype))

    def fetched(self, found: dict[str, Any]) -> dict[str, Any]:
        return {name: self.fetch(value) for name, value in found.items()}

    def run(self, case: Case, arrays: Arrays | None = None, **keywords: Any) -> dict[str, Any]:
        """All results of the engine on the case, as NumPy arrays."""
        return self.fetched(results(functional, case, self.arrays(case) if arrays is None else arrays, **keywords))


def in_numpy(case: Case) -> Case:
    """NumPy has no bfloat16, and float16 is drawn as it is: both from the same numbers."""
    return replace(case, dtype="float64") if case.dtype in HALF else case


NUMPY = Place("numpy", ("float64", "float32"), lambda a, dtype: a.astype(dtype), lambda a: a)


def torch_place(device: str) -> Place:
    torch = pytest.importorskip("torch")

    def send(array: Any, dtype: str) -> Any:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device, getattr(torch, dtype))

    def fetch(tensor: Any) -> Any:
        tensor = tensor.detach().cpu()
        return (tensor.double() if str(tensor.dtype).removeprefix("torch.") in HALF else tensor).numpy()

    return Place("torch", DTYPES, send, fetch)


def cupy_place() -> Place:
    """Without bfloat16, which NumPy lacks."""
    cupy = pytest.importorskip("cupy")

    def fetch(array: Any) -> Any:
        found = cupy.asnumpy(array)
        return found.astype("float64") if str(found.dtype) in HALF else found

    return Place("cupy", DTYPES[:3], lambda a, dtype: cupy.asarray(a.astype(dtype)), fetch)


# ---- comparisons with the float64 truth -----------------------------------------------------------------------------


def check_on(place: Place, case: Case, grad_floor: float = 0.0, slack: float = 1.0) -> None:
    """As `test_kernels.check`; 16-bit results against the truth of the very numbers that were rounded."""
    if case.dtype in HALF:
        arrays = place.arrays(case)
        found = results(functional, case, arrays)
        assert {str(value.dtype).removeprefix("torch.") for value in found.values()} == {case.dtype}
        check_half(place, case, place.fetched(found), arrays)
    else:
        check(case, place.run(case), grad_floor, slack)


def check_half(place: Place, case: Case, found: dict[str, Any], arrays: Arrays) -> None:
    check_rounded(place, case, found, arrays, HALF[case.dtype])


def check_tf32(place: Place, case: Case) -> None:
    """With TF32 on: as if what is multiplied had come from float16, which has as many bits."""
    case = replace(case, dtype="float32")
    arrays = place.arrays(case)
    check_rounded(place, case, place.run(case, arrays), arrays, HALF["float16"])


def check_rounded(place: Place, case: Case, found: dict[str, Any], arrays: Arrays, epsilon: float) -> None:
    """What is stored, or multiplied, is rounded at every step, so that the error grows with the steps and the layers."""
    exact = arrays.map(lambda a: place.fetch(a).astype("float64"))
    truth = results(reference, replace(case, dtype="float64"), exact)
    assert found.keys() == truth.keys()
    for name, value in found.items():
        kink = "relu" in case.cell and name.startswith("grad")
        error = (mean_error if kink else normwise_error)(value, truth[name], 0.1)
        limit = 12 * epsilon + (kink_error(case, epsilon) if kink else 0.0)
        assert error <= limit, f"{name}: expected an error up to {limit:.1e}, got {error:.1e}"


def kink_error(case: Case, epsilon: float) -> float:
    """What turned signs add to the gradients of a ReLU network, in the 2-norm.

    x and weights are the truth's, so a pre-activation a is off by what rounding h did: |w| is at most 1/sqrt(H), the H errors
    of up to epsilon |h| add up as random ones do, to a third of epsilon rms(h), which is about rms(a); a layer above adds its
    own. The density of a at zero is below 0.4 / rms(a), so that a sign is turned with a probability p of less than epsilon
    for each layer. Of N units and steps p N are, three standard deviations more at the most, and each takes its share of the
    squares: 1 / N.
    """
    units = max(1, case.num_layers * case.directions * case.T * case.B * case.H)
    expected = epsilon * case.num_layers * units
    return float(np.sqrt((expected + 3 * np.sqrt(expected)) / units))


def tf32(array: Any) -> Any:
    """float32 to the nearest TF32 number, ties away from zero, as float64."""
    bits = np.ascontiguousarray(array, "float32").view("uint32") + np.uint32(1 << 12)
    return (bits & np.uint32(0xFFFFE000)).view("float32").astype("float64")


def check_tf32_products(place: Place, B: int, width: int, H: int) -> None:
    """One step of a ReLU network is its products. They are those of the rounded operands, to the precision of float32 sums;
    and so within 2**-10 of the sums of sizes of what they would be without rounding.
    """
    rng = np.random.default_rng(B)
    x, h0, grad = (rng.standard_normal(s).astype("float32") for s in ((1, B, width), (1, B, H), (1, B, H)))
    w_ih, w_hh = (rng.standard_normal(s).astype("float32") for s in ((H, width), (H, H)))
    x[0, 0, 0], w_ih[:, 0] = (
        1,
        1 + 2.0**-11 * np.where(np.arange(H) % 2, 1, -1 / 2),
    )  # ties, and what truncation would lose

    sent = [place.send(a, "float32") for a in (x, h0, w_ih, w_hh, grad)]
    output, _, context = functional.rnn(sent[0], sent[1], sent[2:4], nonlinearity="relu", training=True)
    gradients = functional.backward(context, sent[4])
    found = [place.fetch(output)[0], place.fetch(gradients[0])[0], place.fetch(gradients[1])[0]]
    found += [place.fetch(g) for g in gradients[2]]
    dz = grad[0] * (found[0] > 0)
    products = [
        [(x[0], w_ih.T), (h0[0], w_hh.T)],
        [(dz, w_ih)],
        [(dz, w_hh)],
        [(dz.T, x[0])],
        [(dz.T, h0[0])],
    ]
    for value, pairs in zip(found, products, strict=True):
        rounded = sum(tf32(a) @ tf32(b) for a, b in pairs)
        exact = sum(a.astype("float64") @ b.astype("float64") for a, b in pairs)
        sizes = sum(abs(a).astype("float64") @ abs(b).astype("float64") for a, b in pairs)
        depth = sum(a.shape[1] for a, b in pairs)
        if value is found[0]:
            rounded, exact = np.maximum(rounded, 0), np.maximum(exact, 0)
        float32_sums = 2 * depth * 2.0**-24 * sizes
        assert (abs(value - rounded) <= float32_sums).all()
        assert (abs(value - exact) <= 2.0**-10 * (1 + 2.0**-12) * sizes + float32_sums).all()
        assert abs(rounded - exact).max() > float32_sums.max()  # so that the first of these could fail


def mean_error(found: Any, truth: Any, floor: float) -> float:
    """In the 2-norm: where rounding turns the sign of a pre-activation, the derivative of ReLU jumps in single places."""
    return float(np.linalg.norm(found - truth) / max(floor, np.linalg.norm(truth)))


def odd_size(cell: str, T: int, B: int, I: int, H: int, dtype: str = "") -> Case:  # noqa: E741
    number = T + B + I + H
    case = case_of(cell, T=T, B=B, I=I, H=H, dtype=dtype or DTYPES[number % 2], seed=number, lengths=B > 2)
    return replace(case, bidirectional=number % 3 == 0, proj=(H + 1) // 2 if case.has_c and H > 1 else 0)


def random_cases(max_work: int, max_steps: int) -> st.SearchStrategy[Case]:
    return cases(cells=CELLS, dtypes=("float64", "float32"), max_work=max_work, max_steps=max_steps)


def check_random(place: Place, case: Case) -> None:
    if case.weight_scale > 1:  # the error of a chaotic network grows with every step
        case = replace(case, T=min(case.T, 4))
    case = replace(case, parameters=PARAMETERS[case.cell])
    arrays = make(case)
    arrays = poison_padding(case, arrays) if case.lengths else arrays
    check(case, place.run(case, arrays.map(lambda a: place.send(a, case.dtype))), grad_floor=1.0, slack=4)


def check_clamped_lengths(place: Place, cell: str) -> None:
    """On the device no value can be refused without waiting for it."""
    case = case_of(cell, T=4, B=4, lengths=(4, 0, 2, 4))
    arrays = place.arrays(case)
    expected = place.run(case, arrays)
    found = place.run(case, replace(arrays, lengths=place.send(np.array([9, -3, 2, 4]), "int32")))
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    with pytest.raises(ValueError, match="lengths: expected values within"):
        place.run(case, replace(arrays, lengths=np.array([9, 0, 2, 4])))


LEAN: list[dict[str, Any]] = [{"lean": True}, {"checkpoint_every": 2}]


def lean_results(place: Place, case: Case, memory: dict[str, Any], arrays: Arrays | None = None) -> dict[str, Any]:
    engine = SimpleNamespace(forward=partial(functional.forward, **memory), backward=functional.backward)
    return place.fetched(results(engine, case, place.arrays(case) if arrays is None else arrays))


def check_lean(place: Place, case: Case, memory: dict[str, Any], slack: float = 1.0) -> None:
    """The bits of the full mode, but where sums are cut at windows: in gradients of weights, and of the input of a
    bidirectional layer, with all that is made of it.
    """
    arrays = place.arrays(case)
    full, found = place.run(case, arrays), lean_results(place, case, memory, arrays)
    assert found.keys() == full.keys()
    alone = case.num_layers == 1 and not case.bidirectional
    for name, value in found.items():
        if (not name.startswith("grad") or alone) and "weight" not in name and "bias" not in name:
            np.testing.assert_array_equal(value, full[name], err_msg=name)
    if case.dtype in HALF:
        check_half(place, case, found, arrays)
    else:
        check(case, found, slack=slack)


def plan_of(place: Place, case: Case) -> str:
    arrays = place.arrays(case)
    *_, context = functional.forward(case.cell, arrays.x, arrays.hx, arrays.weights, **options(case, arrays))
    return str(context.plan)


# ---- modules -------------------------------------------------------------------------------------------------------


def everything_of(kind: str, device: str, send: Callable[[Any], Any]) -> list[Any]:
    """What a layer of rnnfast gives on a device: training, evaluation with packed weights, a stream, one sequence."""
    rng = np.random.default_rng(1)
    x, grad = send(rng.standard_normal((4, 2, 3))), send(rng.standard_normal((4, 2, 5)))
    layer = getattr(rnnfast, kind)(3, 5, 2, dtype="float64", device=device, seed=7)
    head = rnnfast.Linear(5, 2, dtype="float64", device=device, seed=8)
    assert layer.device == device
    output, state = layer(x, lengths=[4, 2])
    found = [output, state, head(output), layer.backward(grad)]
    found += [p.grad for p in layer.parameters()]
    assert ("GPU" in rnnfast.explain(layer, x)) == (device == "cuda")
    layer.eval()
    found += [layer(x), layer(x[:, 0], reset=[False, True, False, False])]
    with layer.stream(2) as stream:
        found += [stream.step(x[0]), stream.step(x[1], reset=[True, False]).copy()]
        stream.reorder([1, 1])
        found += [stream.fork().step(x[2]), stream.state]
    return found
