"""The CUDA kernels on the CPU: the same sources, run by csrc/cuda/emulate.h, against the float64 reference.

Needs the package built with RNNFAST_CUDA=emulate; NumPy arrays (and PyTorch's CPU tensors, which have bfloat16) stand in for
the device's. What this cannot show is told by its nature: speed, and what only a GPU's memory and scheduler do.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rnnfast
from cuda_cases import (
    EMPTY,
    FEW_MULTIPROCESSORS,
    HALF,
    HALF_PATHS,
    LEAN,
    NUMPY,
    PATHS,
    PERSISTENT_SIZES,
    RANDOM,
    SIZES,
    SMALL_CLUSTERS,
    check_clamped_lengths,
    check_lean,
    check_on,
    check_random,
    check_tf32,
    check_tf32_products,
    everything_of,
    lean_results,
    odd_size,
    plan_of,
    random_cases,
    torch_place,
)
from reference_cases import Case, flatten, make, map_arrays, options, poison_padding, results, valid_mask
from rnnfast import _tf32, functional, reference
from rnnfast._device import extension, libraries
from rnnfast.cli import selftest, selftest_cases, selftest_worker
from test_kernels import CELLS, assert_same, case_of, check, truth_of, variants

_cuda: Any = import_module("rnnfast._cuda") if find_spec("rnnfast._cuda") else None

pytestmark = pytest.mark.skipif(
    _cuda is None or not _cuda.emulated, reason="rnnfast._cuda is not built with RNNFAST_CUDA=emulate"
)


@pytest.fixture(autouse=True)
def emulate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(extension, "emulate", True)
    functional.stack.cache_clear()
    yield
    functional.stack.cache_clear()
    if _cuda is not None:
        _cuda.run_backwards(False)
        _cuda.set_multiprocessors(132)
        _cuda.set_path("")


def run(case: Case, arrays: Any = None, **options: Any) -> dict[str, Any]:
    return results(functional, case, make(case) if arrays is None else arrays, **options)


# ---- every cell, dtype and option ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "path"), PATHS)
@pytest.mark.parametrize("case", variants())
def test_options(case: Case, dtype: str, path: str) -> None:
    _cuda.set_path(path)
    check_on(NUMPY, replace(case, dtype=dtype))


@pytest.mark.parametrize("cell", CELLS)
def test_paths(cell: str) -> None:
    def plan(**changes: Any) -> str:
        return plan_of(NUMPY, case_of(cell, **{"dtype": "float32"} | changes))

    assert plan().count("all steps in one launch (persistent kernel") == 2
    assert "with 4 sequences" in plan(T=1, B=133)
    assert plan(H=600, T=4).count("all steps in one launch (grid kernel") == 2
    assert (
        plan(H=600, T=3).count("a launch for each step (generic kernel: so few steps are sooner done one by one)") == 2
    )
    assert "both directions at once" in plan(H=330, T=4, bidirectional=True)
    assert (
        plan(dtype="float64").count("a launch for each step (generic kernel: persistent kernels are not for float64")
        == 2
    )
    if functional.CELLS[cell].has_cell_state:
        assert "persistent kernels have no projection" in plan(proj=3)
    _cuda.set_path("generic")
    assert plan().count("a launch for each step (generic kernel: set_path asks for it)") == 2
    _cuda.set_path("")
    _cuda.set_multiprocessors(1)
    too_large = "a launch for each step (generic kernel: the recurrent weights do not fit the multiprocessors)"
    assert plan(H=600, T=4).count(too_large) == 2


@pytest.mark.parametrize("dtype", ["float32", *HALF])
@pytest.mark.parametrize(("multiprocessors", "sizes"), FEW_MULTIPROCESSORS)
@pytest.mark.parametrize("cell", CELLS)
def test_grids(cell: str, multiprocessors: int, sizes: dict[str, Any], dtype: str) -> None:
    """On devices so small that blocks have several groups of sequences, and more weights than registers."""
    _cuda.set_path("grid")
    _cuda.set_multiprocessors(multiprocessors)
    place = torch_place("cpu") if dtype in HALF else NUMPY
    case = case_of(cell, **sizes, bidirectional=True, dtype=dtype, hx=True)
    assert plan_of(place, case).count("grid kernel") == 2
    check_on(place, case)


@pytest.mark.parametrize("dtype", ["float32", "tf32", *HALF])
@pytest.mark.parametrize(("multiprocessors", "cluster", "sizes"), SMALL_CLUSTERS)
@pytest.mark.parametrize("cell", CELLS)
def test_clusters(cell: str, multiprocessors: int, cluster: int, sizes: dict[str, Any], dtype: str) -> None:
    _cuda.set_path("cluster")
    _cuda.set_multiprocessors(multiprocessors, cluster)
    rnnfast.set_tf32(dtype == "tf32")
    try:
        place = torch_place("cpu") if dtype in HALF else NUMPY
        case = case_of(cell, **sizes, bidirectional=True, dtype=dtype.replace("tf32", "float32"), hx=True)
        assert plan_of(place, case).count("cluster kernel") == 2
        if dtype != "tf32":
            check_on(place, case)
        elif "relu" not in cell:
            check_tf32(place, case)
    finally:
        rnnfast.set_tf32(False)


@pytest.mark.parametrize("dtype", ["float32", *HALF])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_clusters_need_every_barrier(cell: str, dtype: str) -> None:
    """The same bits when threads and blocks run in the opposite order."""
    _cuda.set_path("cluster")
    _cuda.set_multiprocessors(8, 4)
    place = torch_place("cpu") if dtype in HALF else NUMPY
    case = case_of(cell, T=5, B=20, H=43, lengths=True, reset=0.2, bidirectional=True, dtype=dtype)
    found = place.run(case)
    _cuda.run_backwards(True)
    assert_same(place.run(case), found)


def test_which_clusters() -> None:
    """Between what one block holds and what the largest cluster does; never where the device has none."""

    def plan(**changes: Any) -> str:
        return plan_of(NUMPY, case_of("lstm", **{"T": 4, "B": 16, "dtype": "float32"} | changes))

    assert plan(H=256).count("cluster kernel: clusters of ") == 2
    assert plan(H=256, bidirectional=True).count("both directions at once") == 2
    assert plan(H=1024).count("grid kernel: ") == 2
    _cuda.set_multiprocessors(108, 0)
    assert plan(H=256).count("grid kernel: ") == 2
    _cuda.set_path("cluster")
    assert plan(H=256).count("generic kernel: no cluster of blocks has room for the recurrent weights") == 2


def test_clusters_with_weights_in_shared_memory() -> None:
    _cuda.set_path("cluster")
    _cuda.set_multiprocessors(4, 4)
    case = case_of("lstm", T=2, B=3, H=200, dtype="float32", hx=True)
    assert "clusters of 4 blocks of 256 threads with 52 units" in plan_of(NUMPY, case)
    check_on(NUMPY, case)


@pytest.mark.parametrize(
    ("dtype", "multiprocessors", "H", "blocks"),
    [("float32", 4, 170, "4 blocks of 256 threads with 44 units"), *((t, 18, 560, "18 blocks of 256") for t in HALF)],
)
def test_weights_in_shared_memory(dtype: str, multiprocessors: int, H: int, blocks: str) -> None:
    """More than the registers hold: on FMA cores beyond four tiles of a warp, on tensor cores beyond 32."""
    _cuda.set_path("grid")
    _cuda.set_multiprocessors(multiprocessors)
    place = torch_place("cpu") if dtype in HALF else NUMPY
    case = case_of("lstm", T=2, B=3, H=H, dtype=dtype, hx=True)
    assert blocks in plan_of(place, case)
    check_on(place, case)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("sizes", PERSISTENT_SIZES)
def test_sizes_of_persistent_kernels(cell: str, sizes: dict[str, Any]) -> None:
    check_on(NUMPY, case_of(cell, **sizes, bidirectional=True, dtype="float32", hx=True))


@pytest.mark.parametrize(("path", "multiprocessors", "H"), [("", 4, 5), ("grid", 2, 24)])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_ragged_batches_are_sorted(cell: str, path: str, multiprocessors: int, H: int) -> None:
    """Sequences that end together share a block or group, in whatever order they come: the short half of a batch costs what it
    has to do. Where a sequence comes changes no bit of it.
    """
    _cuda.set_path(path)
    _cuda.set_multiprocessors(multiprocessors)
    T, B = 20, 32

    def steps(lengths: Any) -> tuple[int, dict[str, Any], Any]:
        case = case_of(cell, T=T, B=B, H=H, dtype="float32", lengths=tuple(int(n) for n in lengths), bidirectional=True)
        arrays, before = make(case), _cuda.barriers()
        found = run(case, arrays)
        return _cuda.barriers() - before, found, arrays

    lengths = np.tile([T, 1, 3, T, 2, T, 2, T], B // 8)
    nothing, everything = steps([0] * B)[0], steps([T] * B)[0]
    count, found, arrays = steps(lengths)
    share = (T + 3) / 2 / T
    assert count == steps(np.sort(lengths))[0]
    assert share / 2 < (count - nothing) / (everything - nothing) < 1.1 * share

    order = np.random.default_rng(0).permutation(B)
    case = case_of(cell, T=T, B=B, H=H, dtype="float32", lengths=True, bidirectional=True)
    moved = replace(arrays.map(lambda a: a[..., order, :] if a.ndim > 2 else a), lengths=lengths[order])
    for name, value in run(case, moved).items():
        if "weight" not in name and "bias" not in name:
            np.testing.assert_array_equal(value, found[name][..., order, :], err_msg=name)


def test_more_sequences_than_are_sorted() -> None:
    check_on(NUMPY, case_of("gru", T=2, B=8193, I=1, H=1, dtype="float32", lengths=True), slack=2)


@pytest.mark.parametrize(("dtype", "path"), PATHS)
@pytest.mark.parametrize("cell", CELLS)
def test_chunks_of_steps(cell: str, dtype: str, path: str) -> None:
    """In inference the input products of some steps only are there at once: the loop goes on from the states in memory."""
    _cuda.set_path(path)
    case = case_of(cell, T=23, B=5, H=9, bidirectional=True, lengths=True, reset=0.1, dtype=dtype)
    arrays = make(case)
    found, whole = run(case, arrays, backward=False), run(case, arrays)
    for name, value in found.items():
        np.testing.assert_array_equal(value, whole[name], err_msg=name)


@pytest.mark.parametrize(("dtype", "path"), PATHS)
@pytest.mark.parametrize("case", variants("everything", "batch_first", "reset_to_rows"))
def test_no_barrier_is_missing(case: Case, dtype: str, path: str) -> None:
    """The same bits when the threads and blocks of every launch run in the opposite order."""
    _cuda.set_path(path)
    case = replace(case, dtype=dtype)
    found = run(case)
    _cuda.run_backwards(True)
    assert_same(run(case), found)


@pytest.mark.parametrize("case", [p for p in variants() if p.values[0].lengths])
def test_padding_is_not_read(case: Case) -> None:
    arrays = make(case)
    poisoned = poison_padding(case, arrays)
    if not valid_mask(case, arrays).all():
        assert np.isnan(poisoned.x).any()
    assert_same(run(case, poisoned), run(case, arrays))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cell", CELLS)
def test_odd_sizes(cell: str, size: tuple[int, int, int, int]) -> None:
    check_on(NUMPY, odd_size(cell, *size), grad_floor=0.1, slack=2 if size[3] == 1 else 1)


@pytest.mark.parametrize(("T", "B"), EMPTY)
@pytest.mark.parametrize("cell", CELLS)
def test_empty(cell: str, T: int, B: int) -> None:
    check_on(
        NUMPY,
        case_of(cell, T=T, B=B, num_layers=2, bidirectional=True, lengths=True, reset=0.3, reset_state="rows"),
    )


@given(random_cases(max_work=30_000, max_steps=17))
@RANDOM
def test_random_configurations(case: Case) -> None:
    check_random(NUMPY, case)


# ---- float32 with products in TF32 ---------------------------------------------------------------------------------


@pytest.fixture
def tf32_on() -> Iterator[None]:
    rnnfast.set_tf32(True)
    yield
    rnnfast.set_tf32(False)


@pytest.mark.parametrize("path", ["", "grid", "generic"])
@pytest.mark.parametrize("case", [p for p in variants() if "relu" not in p.values[0].cell])  # whose kink has no bound
def test_tf32(case: Case, path: str, tf32_on: None) -> None:
    _cuda.set_path(path)
    check_tf32(NUMPY, case)


@pytest.mark.parametrize("path", ["grid", "generic"])
@pytest.mark.parametrize(("B", "width", "H"), [(3, 33, 20), (19, 70, 67), (1, 5, 130)])
def test_tf32_products(path: str, B: int, width: int, H: int, tf32_on: None) -> None:
    _cuda.set_path(path)
    check_tf32_products(NUMPY, B, width, H)


@pytest.mark.parametrize(("multiprocessors", "sizes"), FEW_MULTIPROCESSORS)
def test_tf32_grids(multiprocessors: int, sizes: dict[str, Any], tf32_on: None) -> None:
    _cuda.set_path("grid")
    _cuda.set_multiprocessors(multiprocessors)
    case = case_of("gru", **sizes, bidirectional=True, dtype="float32", hx=True)
    assert plan_of(NUMPY, case).count("grid kernel in tf32") == 2
    check_tf32(NUMPY, case)


def test_tf32_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off at first; for float32 alone; a backward does as its forward did."""
    assert not rnnfast.get_tf32()
    _cuda.set_multiprocessors(132, 0)
    case = case_of("lstm", H=200, T=4, dtype="float32", hx=True)
    arrays, exact, plan = make(case), run(case), plan_of(NUMPY, case)
    assert "tf32" not in plan
    *_, before = functional.forward(case.cell, arrays.x, arrays.hx, arrays.weights, **options(case, arrays))
    rnnfast.set_tf32(True)
    try:
        words = plan_of(NUMPY, case)
        assert words.count("(grid kernel in tf32: ") == 2
        assert words.endswith("; products over all steps in tf32")
        assert "(generic kernel in tf32: so few steps" in plan_of(NUMPY, replace(case, T=3))
        for name, value in run(case).items():
            assert (value != exact[name]).any()
        assert "tf32" not in plan_of(NUMPY, replace(case, dtype="float64"))
        assert before.plan == plan
        gradients = functional.backward(before, arrays.grad_output, arrays.grad_state, grad_states=arrays.grad_states)
        np.testing.assert_array_equal(gradients[0], exact["grad_x"])
    finally:
        rnnfast.set_tf32(False)
    with pytest.raises(TypeError, match="flag: expected a bool, got int"):
        rnnfast.set_tf32(1)  # type: ignore[arg-type]
    for value, expected in {"1": True, "0": False, "": False}.items():
        monkeypatch.setenv("RNNFAST_TF32", value)
        assert _tf32._initial() is expected
    monkeypatch.setenv("RNNFAST_TF32", "yes")
    with pytest.raises(ValueError, match="RNNFAST_TF32: expected 0 or 1, got 'yes'"):
        _tf32._initial()


# ---- float16 and bfloat16 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "path"), HALF_PATHS)
@pytest.mark.parametrize("case", variants())
def test_half_precision(case: Case, dtype: str, path: str) -> None:
    _cuda.set_path(path)
    check_on(torch_place("cpu"), replace(case, dtype=dtype, H=min(case.H, 19)))


@pytest.mark.parametrize(("dtype", "path"), [*HALF_PATHS, ("float32", ""), ("float32", "grid")])
@pytest.mark.parametrize("case", variants("everything"))
def test_nothing_is_read_before_it_is_written(case: Case, dtype: str, path: str, fresh_memory_is_nan: None) -> None:
    """Of the engine's memory and of results: PyTorch fills both with NaN here."""
    _cuda.set_path(path)
    check_on(torch_place("cpu"), replace(case, dtype=dtype, H=min(case.H, 19)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding(dtype: str) -> None:
    """A network that only copies shows the conversions: every value there is comes back as it was."""
    torch = pytest.importorskip("torch")
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(getattr(torch, dtype))
    h0 = values.reshape(1, 256, 256)
    x = torch.zeros(0, 256, 1, dtype=h0.dtype)
    weights = [torch.zeros(256, 1, dtype=h0.dtype), torch.zeros(256, 256, dtype=h0.dtype)]
    _, hn, _ = functional.rnn(x, h0, weights, training=False)
    same = hn.reshape(-1).view(torch.int16) == values.view(torch.int16)
    assert (same | values.isnan()).all()
    assert hn.reshape(-1)[values.isnan()].isnan().all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_of_products(dtype: str) -> None:
    """One step without a past is relu(x w), exact in float32: what is stored is that to the nearest, ties to even."""
    torch = pytest.importorskip("torch")
    kind, rng = getattr(torch, dtype), torch.Generator().manual_seed(0)
    few = torch.randint(0, 64, (500,), generator=rng) / 32  # short significands: many products are ties
    scale = torch.exp2(torch.randint(-13, 9, (500,), generator=rng))
    x = (few * scale).to(kind).reshape(1, 500, 1)
    w = torch.cat([few[:150] * scale[:150], torch.randn(50, generator=rng)]).to(kind).reshape(200, 1)
    output, _, _ = functional.rnn(x, None, [w, torch.zeros(200, 200, dtype=kind)], nonlinearity="relu", training=False)
    exact = x.float() * w.float().T
    expected = exact.clamp(min=0).to(kind)
    assert torch.equal(output, expected)
    assert (expected.isinf().any()) == (dtype == "float16")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("proj", [0, 3])
def test_streams_keep_c(dtype: str, proj: int) -> None:
    """Step by step the same bits as in one call, which rounds c nowhere; so do a fork and rows in another order."""
    torch = pytest.importorskip("torch")
    _cuda.set_path("generic")  # one order of sums for both
    place, case = torch_place("cpu"), case_of("lstm", T=12, B=3, H=7, proj=proj, num_layers=2, dtype=dtype, reset=0.1)
    arrays = place.arrays(case)
    whole, state, _ = functional.lstm(arrays.x, None, arrays.weights, num_layers=2, reset=arrays.reset, training=False)
    stream = functional.Stream("lstm", functional.pack("lstm", arrays.weights, num_layers=2), 3, num_layers=2)
    fork, rows = None, [0, 1, 2]
    for t in range(12):
        assert torch.equal(stream.step(arrays.x[t], arrays.reset[t]), whole[t])
        if fork is not None:
            assert torch.equal(fork.step(arrays.x[t][rows], arrays.reset[t][rows]), whole[t][rows])
        if t == 5:
            fork = stream.fork()
        if t == 8:
            rows = [2, 0, 0]
            fork.reorder(rows)
    for found, expected in zip(stream.get_state(), state, strict=True):
        assert found.dtype == expected.dtype == getattr(torch, dtype)
        assert torch.equal(found, expected)
    stream.set_state(state)
    assert all(map(torch.equal, stream.get_state(), state))


# ---- lean mode -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "path"), [("float64", ""), ("float32", "grid")])
@pytest.mark.parametrize("case", variants())
def test_lean(case: Case, dtype: str, path: str) -> None:
    _cuda.set_path(path)
    for memory in LEAN:
        check_lean(NUMPY, replace(case, dtype=dtype), memory)


@pytest.mark.parametrize(("dtype", "path"), HALF_PATHS)
@pytest.mark.parametrize("case", variants("everything", "reset_to_rows"))
def test_lean_in_half_precision(case: Case, dtype: str, path: str, fresh_memory_is_nan: None) -> None:
    """c is kept as it is computed, not as it is stored."""
    _cuda.set_path(path)
    for memory in LEAN:
        check_lean(torch_place("cpu"), replace(case, dtype=dtype), memory)


@pytest.mark.parametrize(("dtype", "path"), PATHS)
@pytest.mark.parametrize("cell", CELLS)
def test_lean_in_one_direction(cell: str, dtype: str, path: str) -> None:
    """Where all but the gradients of weights are the same bits: the reverse direction's too, seen alone."""
    _cuda.set_path(path)
    more = {"lengths": True, "reset": 0.2, "reset_state": "rows", "hx": True}
    case = case_of(cell, T=23, B=9, H=9, dtype=dtype, **more)
    for every in (1, 8, 99):
        check_lean(NUMPY, case, {"checkpoint_every": every})
    both = replace(case, bidirectional=True)
    arrays = make(both)
    found, full = lean_results(NUMPY, both, {"checkpoint_every": 5}, arrays), run(both, arrays)
    inexact = [name for name in full if name == "grad_x" or "weight" in name or "bias" in name]
    assert_same({n: v for n, v in found.items() if n not in inexact}, {n: full[n] for n in full if n not in inexact})


@pytest.mark.parametrize("case", variants("everything"))
def test_lean_retain(case: Case) -> None:
    """Any number of backward calls, the same each time: they leave the reserve as it was."""
    arrays = make(case)
    *_, ctx = functional.forward(
        case.cell, arrays.x, arrays.hx, arrays.weights, checkpoint_every=2, **options(case, arrays)
    )
    grads = (arrays.grad_output, arrays.grad_state)
    first, second = (functional.backward(ctx, *grads, retain=retain) for retain in (True, False))
    map_arrays_together(np.testing.assert_array_equal, first, second)
    with pytest.raises(RuntimeError, match="used up"):
        functional.backward(ctx, *grads)
    partial = functional.forward(
        case.cell, arrays.x, arrays.hx, arrays.weights, checkpoint_every=2, **options(case, arrays)
    )[-1]
    grad_x, grad_state, none = functional.backward(partial, *grads, need_grad_weights=False)
    map_arrays_together(np.testing.assert_array_equal, (grad_x, grad_state), first[:2])
    assert none is None


@pytest.mark.parametrize(("T", "B"), EMPTY)
@pytest.mark.parametrize("cell", CELLS)
def test_lean_empty(cell: str, T: int, B: int) -> None:
    more = {"num_layers": 2, "bidirectional": True, "lengths": True, "reset": 0.3, "reset_state": "rows"}
    check_lean(NUMPY, case_of(cell, T=T, B=B, **more), {"checkpoint_every": 2})


def test_lean_memory() -> None:
    """The context holds c before each window, and the outputs of the lower layers."""
    T, B, H = 1000, 4, 8

    def kept(cell: str, layers: int = 1, **memory: Any) -> float:
        arrays = make(case_of(cell, T=T, B=B, H=H, num_layers=layers, dtype="float32"))
        context = functional.forward(cell, arrays.x, None, arrays.weights, num_layers=layers, **memory)[-1]
        return float(context.nbytes / (T * B * H * 4))

    assert 4.9 < kept("lstm") < 5.1
    assert kept("lstm", lean=True) < 1.0
    assert kept("lstm", checkpoint_every=100) < 0.02
    assert kept("gru", lean=True) < 0.01
    assert 1.0 < kept("gru", layers=2, lean=True) < 1.01


# ---- the call ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", variants("everything", "plain", "no_bias"))
def test_evaluation_and_packed_weights(case: Case) -> None:
    """Without training, chunks of steps and states in place give the same bits; packed weights are pinned."""
    arrays = make(case)
    plain = run(replace(case, dropout=0.0), arrays)
    found = run(case, arrays, backward=False)
    for name, value in found.items():
        np.testing.assert_array_equal(value, plain[name], err_msg=name)
    layers = {"num_layers": case.num_layers, "bidirectional": case.bidirectional}
    packed = functional.pack(case.cell, arrays.weights, **layers, **dict(case.parameters))
    for weight in arrays.weights:
        weight[...] = np.nan
    assert_same(run(case, replace(arrays, weights=packed), backward=False), found)


@pytest.mark.parametrize("case", variants("everything", "plain"))
def test_retain(case: Case) -> None:
    arrays = make(case)
    *_, ctx = functional.forward(case.cell, arrays.x, arrays.hx, arrays.weights, **options(case, arrays))

    def backward(retain: bool) -> list[Any]:
        grads = {"grad_states": arrays.grad_states, "retain": retain, "record": True}
        found = functional.backward(ctx, arrays.grad_output, arrays.grad_state, **grads)
        return [found, ctx.grad_reset_state, ctx.grad_h]

    first = backward(retain=True)
    for again in (backward(retain=True), backward(retain=False)):
        map_arrays_together(np.testing.assert_array_equal, first, again)
    with pytest.raises(RuntimeError, match="used up"):
        backward(retain=False)


def map_arrays_together(check_pair: Any, a: Any, b: Any) -> None:
    if isinstance(a, (tuple, list)):
        for one, other in zip(a, b, strict=True):
            map_arrays_together(check_pair, one, other)
    elif a is not None:
        check_pair(a, b)


@pytest.mark.parametrize("case", variants("everything"))
def test_missing_gradients_are_zero(case: Case) -> None:
    arrays = make(case)
    full = [arrays.grad_output, arrays.grad_state, arrays.grad_states]

    def backward(grads: Any, **wanted: Any) -> Any:
        *_, ctx = functional.forward(case.cell, arrays.x, arrays.hx, arrays.weights, **options(case, arrays))
        return functional.backward(ctx, grads[0], grads[1], grad_states=grads[2], **wanted)

    for chosen in ((True, False, False), (False, True, False), (False, False, True), (False, False, False)):
        with_none = backward([g if c else None for g, c in zip(full, chosen, strict=True)])
        zeros = [g if c else map_arrays(np.zeros_like, g) for g, c in zip(full, chosen, strict=True)]
        map_arrays_together(np.testing.assert_array_equal, with_none, backward(zeros))
    complete = backward(full)
    assert backward(full, need_grad_x=False)[0] is None
    map_arrays_together(np.testing.assert_array_equal, complete[1:], backward(full, need_grad_x=False)[1:])
    assert backward(full, need_grad_weights=False)[2] is None
    map_arrays_together(np.testing.assert_array_equal, complete[:2], backward(full, need_grad_weights=False)[:2])


@pytest.mark.parametrize("case", variants("everything"))
def test_strides(case: Case) -> None:
    """Sequences whose steps or rows lie apart, transposed weights, states in a larger array."""
    arrays = make(case)

    def spread(a: Any) -> Any:
        large = np.full([2 * n for n in a.shape[:-1]] + [a.shape[-1] + 3], np.nan, a.dtype)
        view = large[(*(slice(0, None, 2) for _ in a.shape[:-1]), slice(1, 1 + a.shape[-1]))]
        view[...] = a
        return view

    weights = [np.asfortranarray(w) if w.ndim == 2 else spread(w[None])[0] for w in arrays.weights]
    reset = np.repeat(np.repeat(arrays.reset, 2, 0), 3, 1)[::2, ::3]
    assert_same(run(case, replace(arrays.map(spread), weights=weights, reset=reset)), run(case, arrays))


@pytest.mark.parametrize("cell", CELLS)
def test_lengths_on_the_device_are_clamped(cell: str) -> None:
    check_clamped_lengths(torch_place("cpu"), cell)


def test_many_steps() -> None:
    """T beyond 65,535, where a grid's other dimensions end; the CPU engine, itself held against the reference, is the truth.
    In float32, where the products over all steps are launches as they are in float64, but the steps are one.
    """
    cell = "lstm"
    case = case_of(cell, T=70_000, B=1, I=1, H=2, dtype="float32", hx=False, return_states=False)
    arrays = make(case)
    options = {"training": True}
    output, state, ctx = functional.forward(cell, arrays.x, None, arrays.weights, **options)
    grads = functional.backward(ctx, arrays.grad_output, arrays.grad_state)
    extension.emulate = False
    functional.stack.cache_clear()
    expected, expected_state, ctx = functional.forward(cell, arrays.x, None, arrays.weights, **options)
    expected_grads = functional.backward(ctx, arrays.grad_output, arrays.grad_state)
    for found, wanted in ((output, expected), (state, expected_state), (grads, expected_grads)):
        map_arrays_together(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), found, wanted)


# ---- errors --------------------------------------------------------------------------------------------------------


def test_errors() -> None:
    case = case_of("lstm", T=3, B=2)
    arrays = make(case)

    def forward(**changes: Any) -> Any:
        given = {"x": arrays.x, "hx": arrays.hx, "weights": arrays.weights} | changes
        return functional.forward("lstm", given.pop("x"), given.pop("hx"), given.pop("weights"), **given)

    for error, match, changes in (
        (TypeError, "x: expected dtype float64", {"x": arrays.x.astype("float32")}),
        (ValueError, "x: expected I=4", {"x": arrays.x[..., :2]}),
        (ValueError, r"hx: expected shape \[1, 2, 5\]", {"hx": (arrays.hx[0], arrays.hx[1][:, :1])}),
        (ValueError, r"lengths: expected shape \[2\]", {"lengths": [1, 2, 3]}),
        (TypeError, "lengths: expected integers", {"lengths": [1.0, 2.0]}),
        (ValueError, "dropout: expected a probability", {"dropout": 1.5}),
        (ValueError, "weight_hh_l0", {"weights": [arrays.weights[0], arrays.weights[1][:, :2], *arrays.weights[2:]]}),
    ):
        with pytest.raises(error, match=match):
            forward(**changes)


def test_other_engines_arrays_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Device weights with a host x, and the other way round."""
    torch = pytest.importorskip("torch")
    arrays = make(case_of("gru"))
    tensors = [torch.from_numpy(w) for w in arrays.weights]
    with pytest.raises(
        TypeError, match="expected a torch.Tensor on a CUDA device, as the weights are, got numpy.ndarray"
    ):
        functional.gru(arrays.x, None, tensors)
    monkeypatch.setattr(extension, "emulate", False)
    with pytest.raises(TypeError, match="weight_ih_l0: expected a numpy.ndarray or an array on a CUDA device"):
        functional.gru(arrays.x, None, tensors)


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_dropout_masks_are_the_reference(seed: int, call: int) -> None:
    case = case_of("rnn_tanh", num_layers=3, dropout=0.5, H=9)
    arrays = make(case)
    chosen = options(case, arrays) | {"seed": seed, "call": call}
    found = functional.forward(case.cell, arrays.x, arrays.hx, arrays.weights, **chosen)
    expected = reference.forward(case.cell, arrays.x, arrays.hx, arrays.weights, **chosen)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-12, atol=1e-12)


class CupyArray(np.ndarray):
    """A stand-in for cupy.ndarray in the emulator's memory."""

    __module__ = "cupy"
    device = nullcontext()
    __cuda_array_interface__ = property(lambda self: {})


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for CuPy; `taken` says by which of its functions it took arrays of others."""

    def take(way: str) -> Any:
        def function(value: Any) -> CupyArray:
            taken.append(way)
            value.__dlpack__() if way == "from_dlpack" else getattr(value, "__cuda_array_interface__", None)
            return np.asarray(getattr(value, "array", value)).view(CupyArray)

        return function

    taken: list[str] = []
    stand_in = SimpleNamespace(taken=taken, asarray=take("asarray"), from_dlpack=take("from_dlpack"))
    stand_in.ascontiguousarray = lambda a: np.ascontiguousarray(a).view(CupyArray)
    stand_in.empty = lambda shape, dtype: np.empty(shape, dtype).view(CupyArray)
    stand_in.cuda = SimpleNamespace(get_current_stream=lambda: SimpleNamespace(ptr=0))
    monkeypatch.setitem(sys.modules, "cupy", stand_in)
    monkeypatch.setattr(libraries.Cupy, "address", lambda self, array: array.ctypes.data)
    monkeypatch.setattr(libraries.Cupy, "place", lambda self, array: 0)
    return stand_in


class ByDescription:
    """A producer that has `__cuda_array_interface__` alone, as Numba's."""

    def __init__(self, array: Any) -> None:
        self.array = array

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"version": 3, "stream": 1}


class ByDlpack:
    """One that has DLPack alone, on a kind of device."""

    def __init__(self, array: Any, kind: int = 2) -> None:
        self.array, self.kind = array, kind

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.kind, 0

    def __dlpack__(self, **options: Any) -> Any:
        return None


class ByBoth(ByDlpack, ByDescription):
    """One that has both, as PyTorch's, whose description names no stream."""


class ReadOnly(ByBoth):
    """One that does not give what is read-only by DLPack."""

    def __dlpack__(self, **options: Any) -> Any:
        raise BufferError("read-only")


class RequiresGrad(ReadOnly):
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        raise RuntimeError("use detach()")


WAYS = {
    "description": (ByDescription, {"asarray"}),
    "dlpack": (ByDlpack, {"from_dlpack"}),
    "managed memory": (lambda a: ByDlpack(a, 13), {"from_dlpack"}),
    "both": (ByBoth, {"from_dlpack"}),  # which alone orders the streams
    "read-only": (ReadOnly, {"from_dlpack", "asarray"}),
}


@pytest.mark.parametrize("way", WAYS)
def test_foreign_arrays_come_through_cupy(way: str, cupy: SimpleNamespace) -> None:
    """What names device memory in either way is taken without a copy."""
    case = case_of("lstm", T=3, B=2, return_states=False)
    arrays = make(case)
    expected = run(case, arrays)
    wrap, functions = WAYS[way]
    given = replace(arrays.map(wrap), weights=[w.view(CupyArray) for w in arrays.weights])
    found = run(case, given)
    assert set(cupy.taken) == functions
    assert all(type(value) is CupyArray for value in found.values())
    assert_same(found, expected)


@pytest.mark.parametrize("wrap", [ByDlpack, ReadOnly, RequiresGrad, lambda a: ByDlpack(a, 1)])
def test_foreign_arrays_that_cannot_be_taken(wrap: Any, cupy: SimpleNamespace) -> None:
    """The argument is named, whatever the producer raised; a host's array is no device's."""
    case = case_of("gru", T=3, B=2)
    arrays = make(case)
    weights = [w.view(CupyArray) for w in arrays.weights]
    if wrap is ByDlpack:
        cupy.from_dlpack = lambda value: 1 / 0
    if wrap is ReadOnly:
        cupy.asarray = lambda value: 1 / 0
    with pytest.raises(TypeError, match="^hx: expected a"):
        functional.gru(arrays.x.view(CupyArray), wrap(arrays.hx), weights)


def test_what_another_stream_uses_is_not_given_away(cupy: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch is told of the stream; with CuPy the stream that gets the memory back waits, unless it is a graph's."""
    told: list[Any] = []

    def stream(ptr: int, capturing: bool = False) -> Any:
        wait, record = (lambda event: told.append((ptr, event))), (lambda: f"event of {ptr}")
        return SimpleNamespace(ptr=ptr, wait_event=wait, record=record, is_capturing=lambda: capturing)

    for here, expected in (
        (stream(1), []),
        (stream(2), [(1, "event of 2")]),
        (stream(2, True), []),
    ):
        cupy.cuda.get_current_stream = lambda here=here: here
        libraries.Cupy().lend([], stream(1))
        assert told == expected
        told.clear()
    there, here = (SimpleNamespace(device="cuda:0", ptr=ptr) for ptr in (1, 2))
    stand_in = SimpleNamespace(cuda=SimpleNamespace(current_stream=lambda device: here))
    monkeypatch.setattr(libraries.Torch, "torch", stand_in)
    memory = SimpleNamespace(record_stream=told.append)
    for origin, count in ((None, 0), (here, 0), (there, 1)):
        libraries.Torch().lend([memory], origin)
        assert len(told) == count


@pytest.mark.parametrize("place", ["numpy", "torch"])
def test_lengths_and_elements_that_lie_apart(place: str) -> None:
    """Of lengths on the device every second one; steps from the last to the first; elements at odd addresses."""
    case = case_of("lstm", T=6, B=4, lengths=(6, 0, 3, 5), reset=0.3)
    arrays = make(case)
    expected = run(case, arrays)
    if place == "torch":
        lengths = torch_place("cpu").send(np.repeat(arrays.lengths, 2), "int64")[::2]
        found = torch_place("cpu")
        assert_same(found.run(case, replace(found.arrays(case), lengths=lengths)), expected)
        return
    backwards = replace(arrays, x=np.ascontiguousarray(arrays.x[::-1])[::-1], reset=np.asfortranarray(arrays.reset))
    assert_same(run(case, backwards), expected)

    def shifted(a: Any) -> Any:
        memory = np.zeros(a.nbytes + 3, np.uint8)
        view = memory[3:].view(a.dtype) if a.nbytes == 0 else np.frombuffer(memory[3:], a.dtype).reshape(a.shape)
        view[...] = a
        return view

    odd = arrays.map(shifted)
    assert odd.x.ctypes.data % 8
    assert_same(run(case, odd), expected)
    packed = functional.pack("lstm", arrays.weights)
    with pytest.raises(ValueError, match="output: expected elements at multiples of their size"):
        packed.stack.forward(
            *(arrays.x, None, None, packed.core, False, False, None, None, None, None, False, 0.0, 0, 0),
            shifted(expected["output"]),
        )


@pytest.mark.parametrize("cell", CELLS)
def test_selftest(cell: str) -> None:
    """`rnnfast selftest` on a device: every case comes within its tolerance, and runs on this engine."""
    before = _cuda.launches()
    line = selftest_worker.check(cell, "float64", on_device=True)
    assert selftest.passes({**line, "tolerance": selftest_cases.tolerances("float64", (0.0, 0.0))})
    assert _cuda.launches() > before
    assert selftest.can_run_cuda()


def test_truth_is_independent() -> None:
    """The limits above can be missed: another cell's truth is far off."""
    case = case_of("gru")
    with pytest.raises(AssertionError):
        check(replace(case, seed=1), run(case))
    assert truth_of(case)


# ---- modules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_modules(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same layer on both devices."""

    def everything(device: str) -> list[Any]:
        monkeypatch.setattr(extension, "emulate", device == "cuda")
        return everything_of(kind, device, lambda a: a)

    before = _cuda.launches()
    found = everything("cuda")
    assert _cuda.launches() > before
    map_arrays_together(lambda a, b: np.testing.assert_allclose(a, b, 1e-12, 1e-12), found, everything("cpu"))


def test_cells() -> None:
    cell, x = rnnfast.LSTMCell(3, 4, dtype="float64", device="cuda", seed=1), np.ones((2, 3))
    (h, c), context = cell(x)
    grad_x, _ = cell.backward(context, (h, None))
    assert grad_x.shape == x.shape
    assert c.shape == h.shape == (2, 4)


# ---- rnnfast.torch -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_torch_layers(seed: int) -> None:
    """The modules beside torch.nn's, through autograd."""
    pytest.importorskip("torch")
    import torch_cases

    setup = torch_cases.draw(seed)
    theirs, ours = setup.pair()
    arguments = torch_cases.requiring_grad((setup.x(), setup.state() if setup.hx else None))
    before = _cuda.launches()
    torch_cases.assert_close(torch_cases.run(ours, *arguments), torch_cases.run(theirs, *arguments))
    assert _cuda.launches() > before


def test_torch_options_and_second_backward() -> None:
    torch = pytest.importorskip("torch")
    import rnnfast.torch as rt

    layer = rt.LSTM(3, 4, 2, dropout=0.5, dtype=torch.float64)
    x, reset = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True), torch.rand(5, 2) < 0.3
    output, _ = layer(x, lengths=torch.tensor([5, 3]), reset=reset)
    first = torch.autograd.grad(output.sum(), [x, *layer.parameters()], retain_graph=True)
    again = torch.autograd.grad(output.sum(), [x, *layer.parameters()])
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    layer.eval()
    with torch.no_grad():
        quiet, _ = layer(x)
    extension.emulate = False
    torch.testing.assert_close(quiet, layer(x)[0])


@pytest.mark.parametrize("dtype", [*HALF, "float64"])
def test_torch_compiles(dtype: str) -> None:
    """What only a device computes in, without a graph break: the results and gradients of the same calls."""
    torch = pytest.importorskip("torch")
    import rnnfast.torch as rt

    torch._dynamo.reset()
    layer = rt.LSTM(3, 4, 2, bidirectional=True, dtype=getattr(torch, dtype))
    x = torch.randn(5, 2, 3, dtype=layer.weight_hh_l0.dtype, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    before = _cuda.launches()
    found, expected = (
        [*results, *torch.autograd.grad(results[0].float().square().sum(), [x, *layer.parameters()])]
        for results in (list_of(compiled(x)), list_of(layer(x)))
    )
    assert _cuda.launches() > before
    assert all(map(torch.equal, found, expected))


def list_of(results: Any) -> list[Any]:
    return list(flatten(results))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
@pytest.mark.parametrize("dtype", HALF)
def test_autocast(kind: str, dtype: str) -> None:
    """A module in float32 computes in autocast's dtype, states and weights too; gradients are float32."""
    torch = pytest.importorskip("torch")
    import rnnfast.torch as rt

    kind_of = getattr(torch, dtype)
    layer = getattr(rt, kind)(3, 4)
    lower = copy.deepcopy(layer).to(kind_of)
    x = torch.randn(*([] if "Cell" in kind else [5]), 2, 3, requires_grad=True)
    h = torch.randn(*([] if "Cell" in kind else [1]), 2, 4)
    given = (h, h + 1) if "LSTM" in kind else h
    for hx in (None, given):
        with torch.autocast("cpu", kind_of):
            found = list_of(layer(x, hx))
        expected = list_of(lower(x.to(kind_of), map_arrays(lambda a: a.to(kind_of), hx)))
        assert all(map(torch.equal, found, expected))
        assert {r.dtype for r in found} == {kind_of}
        grads = torch.autograd.grad(found[0].float().sum(), [x, *layer.parameters()])
        wanted = torch.autograd.grad(expected[0].float().sum(), [x, *lower.parameters()])
        assert {g.dtype for g in grads} == {torch.float32}
        assert all(torch.equal(g, w.float()) for g, w in zip(grads, wanted, strict=True))


def test_autocast_of_sequences_and_compiled() -> None:
    torch = pytest.importorskip("torch")
    import rnnfast.torch as rt

    torch._dynamo.reset()
    layer, x, lengths = rt.GRU(3, 4), torch.randn(5, 2, 3), torch.tensor([5, 3])
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        ragged, _ = layer(x, lengths=lengths)
        assert torch.equal(layer(packed)[0].data, torch.nn.utils.rnn.pack_padded_sequence(ragged, lengths).data)
        assert ragged.dtype is torch.bfloat16
        assert torch.equal(compiled(x)[0], layer(x)[0])
        assert compiled(x)[0].dtype is torch.bfloat16
        layer.double()
        assert layer(x.double())[0].dtype is torch.float64  # which autocast leaves alone
        with pytest.raises(ValueError, match=r"input: expected dtype torch.float64 under autocast.*got torch.bfloat16"):
            layer(x)


def test_torch_half_precision() -> None:
    torch = pytest.importorskip("torch")
    import rnnfast.torch as rt

    layer = rt.GRU(3, 4, dtype=torch.bfloat16)
    x = torch.randn(5, 2, 3, dtype=torch.bfloat16, requires_grad=True)
    output, _ = layer(x)
    output.float().sum().backward()
    assert output.dtype == x.grad.dtype == layer.weight_hh_l0.grad.dtype == torch.bfloat16
    expected, _ = rt.revert(layer)(x)
    torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)
