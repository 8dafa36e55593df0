"""The CUDA engine on a GPU, by PyTorch and CuPy: what the emulated tests ask, and what no emulator shows.

The truth is the reference in float64 on the numbers that the engine got. `bench/gpu.sh` runs this file where a GPU is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given

import rnnfast
from cuda_cases import (
    CLUSTER_SIZES,
    DTYPES,
    EMPTY,
    GRID_SIZES,
    HALF,
    HALF_PATHS,
    LEAN,
    PERSISTENT_SIZES,
    RANDOM,
    SIZES,
    Place,
    check_clamped_lengths,
    check_lean,
    check_on,
    check_random,
    check_tf32,
    check_tf32_products,
    cupy_place,
    everything_of,
    lean_results,
    odd_size,
    plan_of,
    random_cases,
    torch_place,
)
from reference_cases import Arrays, Case, flatten, map_arrays, options
from rnnfast import _device, functional
from test_kernels import CELLS, assert_same, case_of, variants

if _device.unavailable() is not None:
    pytest.skip("there is no CUDA device that rnnfast._cuda runs on", allow_module_level=True)

import torch
from torch.utils._triton import has_triton

import rnnfast.torch as rt
import torch_cases
from rnnfast import _cuda

DEVICE = "cuda"
HAS_CLUSTERS = torch.cuda.get_device_capability()[0] >= 9
PATHS = [("float64", ""), *(("float32", path) for path in ("", "grid", "generic")), *HALF_PATHS]


@pytest.fixture(autouse=True)
def best_path() -> Iterator[None]:
    yield
    _cuda.set_path("")


@pytest.fixture(params=["torch", "cupy"])
def place(request: pytest.FixtureRequest) -> Place:
    return torch_place(DEVICE) if request.param == "torch" else cupy_place()


@pytest.fixture
def tensors() -> Place:
    return torch_place(DEVICE)


# ---- every cell, dtype and option ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "path"), PATHS)
@pytest.mark.parametrize("case", variants())
def test_options(case: Case, dtype: str, path: str, tensors: Place) -> None:
    _cuda.set_path(path)
    check_on(tensors, replace(case, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("case", variants("plain", "reset_to_shared", "everything"))
def test_options_of_cupy(case: Case, dtype: str) -> None:
    check_on(cupy_place(), replace(case, dtype=dtype))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("sizes", PERSISTENT_SIZES)
def test_sizes_of_persistent_kernels(cell: str, sizes: dict[str, Any], tensors: Place) -> None:
    check_on(tensors, case_of(cell, **sizes, bidirectional=True, dtype="float32", hx=True))


@pytest.mark.first
@pytest.mark.parametrize("dtype", ["float32", *HALF])
@pytest.mark.parametrize("sizes", GRID_SIZES)
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_grids(cell: str, sizes: dict[str, Any], dtype: str, tensors: Place) -> None:
    _cuda.set_path("grid")
    check_on(tensors, case_of(cell, **sizes, bidirectional=sizes["H"] < 1024, dtype=dtype, hx=True), slack=2)


@pytest.mark.first
@pytest.mark.parametrize("dtype", ["float32", *HALF])
@pytest.mark.parametrize("sizes", CLUSTER_SIZES)
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_clusters(cell: str, sizes: dict[str, Any], dtype: str, tensors: Place) -> None:
    _cuda.set_path("cluster")
    case = case_of(cell, **sizes, bidirectional=True, dtype=dtype, hx=True)
    here = "cluster kernel" if HAS_CLUSTERS else "no cluster of blocks has room"
    assert plan_of(tensors, case).count(here) == 2
    check_on(tensors, case)


@pytest.mark.first
@pytest.mark.parametrize("dtype", ["float32", *HALF])
@pytest.mark.parametrize(
    ("path", "B", "H"),
    [("grid", 3, 64), ("grid", 64, 512), ("grid", 16, 1024)]
    + [("cluster", 3, 64), ("cluster", 64, 384)] * HAS_CLUSTERS,
)
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_grids_repeat_their_bits(cell: str, path: str, B: int, H: int, dtype: str, tensors: Place) -> None:
    """Blocks that wait for each other at every step, beside a stream that is busy: no step reads what is not there yet."""
    _cuda.set_path(path)
    case = case_of(cell, T=400, B=B, I=8, H=H, dtype=dtype, return_states=False)
    arrays = tensors.arrays(case)
    assert plan_of(tensors, case).count(f"{path} kernel") == 2
    expected = forward_and_backward(case, arrays)
    busy = torch.ones(2048, 2048, device=DEVICE)
    for repeat in range(8):
        if repeat % 2:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    busy @ busy
        found = forward_and_backward(case, arrays)
        assert all(map(torch.equal, flatten(found), flatten(expected)))


@pytest.fixture
def tf32_on() -> Iterator[None]:
    rnnfast.set_tf32(True)
    yield
    rnnfast.set_tf32(False)


@pytest.mark.parametrize("sizes", GRID_SIZES[:3])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_tf32_grids(cell: str, sizes: dict[str, Any], tensors: Place, tf32_on: None) -> None:
    check_tf32(tensors, case_of(cell, **sizes, bidirectional=True, hx=True))


@pytest.mark.parametrize("path", ["grid", "generic"])
@pytest.mark.parametrize(("B", "width", "H"), [(3, 33, 20), (19, 70, 67), (64, 256, 512)])
def test_tf32_products(path: str, B: int, width: int, H: int, tensors: Place, tf32_on: None) -> None:
    _cuda.set_path(path)
    check_tf32_products(tensors, B, width, H)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cell", CELLS)
def test_odd_sizes(cell: str, size: tuple[int, int, int, int], dtype: str, tensors: Place) -> None:
    check_on(tensors, odd_size(cell, *size, dtype=dtype), grad_floor=0.1, slack=2 if size[3] == 1 else 1)


@pytest.mark.parametrize(("T", "B"), EMPTY)
@pytest.mark.parametrize("cell", CELLS)
def test_empty(cell: str, T: int, B: int, place: Place) -> None:
    more = {"num_layers": 2, "bidirectional": True, "lengths": True, "reset": 0.3, "reset_state": "rows"}
    check_on(place, case_of(cell, T=T, B=B, **more))


@pytest.mark.parametrize(("T", "H"), [(2048, 33), (1000, 128)])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_long_sequences(cell: str, dtype: str, T: int, H: int, tensors: Place) -> None:
    more = {"lengths": True, "reset": 0.01, "return_states": False}
    check_on(tensors, case_of(cell, T=T, B=3, I=7, H=H, dtype=dtype, **more), slack=2)


@given(random_cases(max_work=300_000, max_steps=97))
@RANDOM
def test_random_configurations(case: Case) -> None:
    check_random(torch_place(DEVICE), case)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_many_steps(cell: str, tensors: Place) -> None:
    """T beyond 65,535, where a grid's other dimensions end: in two halves, which carry the state over, and at once."""
    case = case_of(cell, T=70_000, B=2, I=2, H=3, return_states=False, dtype="float32")
    arrays = tensors.arrays(case)

    def run(x: Any, hx: Any) -> Any:
        return functional.forward(cell, x, hx, arrays.weights, training=False, **parameters)[:2]

    parameters = dict(case.parameters)
    whole, last = run(arrays.x, arrays.hx)
    first, state = run(arrays.x[:40_000], arrays.hx)
    second, end = run(arrays.x[40_000:], state)
    assert torch.equal(whole, torch.cat([first, second]))
    assert all(map(torch.equal, flatten(last), flatten(end)))
    gradients = tensors.run(case, arrays)
    assert all(np.isfinite(value).all() for value in gradients.values())


# ---- errors beside cuDNN's -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", *HALF])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_errors_beside_cudnn(kind: str, dtype: str) -> None:
    """The worst over some seeds, against float64 on the CPU: at most twice cuDNN's without TF32, or some epsilon."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    worst: dict[str, dict[str, float]] = {"theirs": {}, "ours": {}}
    for seed in range(8):
        torch.manual_seed(seed)
        theirs = getattr(torch.nn, kind)(24, 40, dtype=getattr(torch, dtype))
        x = torch.randn(50, 9, 24).to(theirs.weight_hh_l0.dtype)
        exact = truth_of(theirs, x)
        ours = rt.convert(copy.deepcopy(theirs))
        for name, module in (("theirs", theirs), ("ours", ours)):
            for key, value in results_of(module.to(DEVICE), x.to(DEVICE)).items():
                error = torch_cases.error(value.cpu(), exact[key], 0.1)
                worst[name][key] = max(worst[name].get(key, 0.0), error)
    epsilon = HALF.get(dtype, 2.0**-24)
    for key, error in worst["ours"].items():
        limit = max(2 * worst["theirs"][key], 8 * epsilon)
        assert error <= limit, f"{key}: expected an error up to {limit:.1e}, got {error:.1e}"


def results_of(module: Any, x: Any) -> dict[str, Any]:
    """Output and gradients of the sum of its squares."""
    x = x.detach().requires_grad_()
    module.zero_grad()
    output, _ = module(x)
    output.backward(output.detach())
    return {"output": output.detach(), "x": x.grad} | {n: p.grad.clone() for n, p in module.named_parameters()}


def truth_of(layer: Any, x: Any) -> dict[str, Any]:
    exact = type(layer)(layer.input_size, layer.hidden_size, dtype=torch.float64)
    exact.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    return results_of(exact, x.double())


# ---- the same bits -------------------------------------------------------------------------------------------------

LARGE = [
    {"T": 40, "B": 150, "I": 70, "H": 97, "lengths": True, "reset": 0.05, "bidirectional": True},
    {"T": 9, "B": 33, "I": 200, "H": 520, "num_layers": 2},
]


@pytest.mark.parametrize(("dtype", "path"), PATHS)
@pytest.mark.parametrize("sizes", LARGE)
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_repeatable(cell: str, sizes: dict[str, Any], dtype: str, path: str, tensors: Place) -> None:
    _cuda.set_path(path)
    case = case_of(cell, **sizes, dtype=dtype)
    arrays = tensors.arrays(case)
    first = tensors.run(case, arrays)
    for _ in range(3):
        assert_same(tensors.run(case, arrays), first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", variants("everything", "plain"))
def test_nothing_is_read_before_it_is_written(
    case: Case, dtype: str, tensors: Place, fresh_memory_is_nan: None
) -> None:
    check_on(tensors, replace(case, dtype=dtype))


@pytest.mark.parametrize("case", variants("everything", "plain"))
def test_inference_gives_the_same_bits(case: Case, tensors: Place) -> None:
    case = replace(case, dropout=0.0, dtype="float32")
    arrays = tensors.arrays(case)
    whole = tensors.run(case, arrays)
    for name, value in tensors.run(case, arrays, backward=False).items():
        np.testing.assert_array_equal(value, whole[name], err_msg=name)


# ---- lean mode -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "path"), PATHS)
@pytest.mark.parametrize("case", variants("everything", "reset_to_rows"))
def test_lean(case: Case, dtype: str, path: str, tensors: Place) -> None:
    _cuda.set_path(path)
    for memory in LEAN:
        check_lean(tensors, replace(case, dtype=dtype), memory)


@pytest.mark.parametrize("dtype", ["float32", *HALF])
@pytest.mark.parametrize("H", [100, 512])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_lean_over_many_windows(cell: str, H: int, dtype: str, tensors: Place) -> None:
    case = case_of(cell, T=400, B=9, I=8, H=H, dtype=dtype, lengths=True, reset=0.02, return_states=False)
    arrays = tensors.arrays(case)
    full = tensors.run(case, arrays)
    for every in (64, 150):
        found = lean_results(tensors, case, {"checkpoint_every": every}, arrays)
        for name, value in found.items():
            if "weight" in name or "bias" in name:
                np.testing.assert_allclose(value, full[name], 0, 1e-2 * np.abs(full[name]).max(), err_msg=name)
            else:
                np.testing.assert_array_equal(value, full[name], err_msg=name)


# ---- small shapes for compute-sanitizer ----------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "path"), [("float32", ""), ("float32", "generic"), ("bfloat16", "")])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_small(cell: str, dtype: str, path: str, tensors: Place) -> None:
    """Two layers, both directions, ragged, resets: every kernel in one call, in little time."""
    _cuda.set_path(path)
    more = {"num_layers": 2, "bidirectional": True, "dropout": 0.3, "lengths": (3, 0, 5), "reset": 0.2}
    check_on(tensors, case_of(cell, T=5, B=3, I=7, H=21, dtype=dtype, **more))


def test_small_projection(tensors: Place) -> None:
    check_on(tensors, case_of("lstm", T=4, B=3, I=7, H=21, proj=5, dtype="float32", reset=0.3, reset_state="rows"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_small_lean(dtype: str, tensors: Place) -> None:
    more = {"num_layers": 2, "bidirectional": True, "dropout": 0.3, "lengths": (3, 0, 5), "reset": 0.2}
    check_lean(tensors, case_of("lstm", T=5, B=3, I=7, H=21, dtype=dtype, **more), {"checkpoint_every": 2})


def test_small_blocks_of_four_sequences(tensors: Place) -> None:
    check_on(tensors, case_of("gru", T=3, B=150, I=3, H=17, dtype="float32", return_states=False))


# ---- streams and graphs --------------------------------------------------------------------------------------------

DELAY = 100_000_000  # clock cycles: tens of milliseconds, within which the host has long gone on


def forward_and_backward(case: Case, arrays: Arrays, **memory: Any) -> list[Any]:
    output, state, *_, context = functional.forward(
        case.cell, arrays.x, arrays.hx, arrays.weights, **options(case, arrays), **memory
    )
    return [output, state, functional.backward(context, arrays.grad_output, arrays.grad_state)]


def stream_case(dtype: str) -> Case:
    return case_of("lstm", T=20, B=5, I=16, H=32, dtype=dtype, return_states=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_stream(dtype: str, tensors: Place) -> None:
    """On a stream that is busy the call waits for what lies before it there; on another stream it would read NaN."""
    case = stream_case(dtype)
    arrays = tensors.arrays(case)
    expected = forward_and_backward(case, arrays)
    late = replace(arrays, x=torch.full_like(arrays.x, torch.nan))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        forward_and_backward(case, arrays)  # leaves memory to this stream: asking for more would wait for the device
        torch.cuda.synchronize()
        torch.cuda._sleep(DELAY)
        late.x.copy_(arrays.x)
        found = forward_and_backward(case, late)
        assert not stream.query(), "expected the call to return before the device has done it"
    stream.synchronize()
    assert all(map(torch.equal, flatten(found), flatten(expected)))


def test_backward_on_another_stream(tensors: Place) -> None:
    """What the forward has kept is not given to its own stream again while another one reads it."""
    case = stream_case("float32")
    arrays = tensors.arrays(case)
    expected = forward_and_backward(case, arrays)[2]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        *_, context = functional.forward(case.cell, arrays.x, arrays.hx, arrays.weights, **options(case, arrays))
        forward, size = torch.cuda.current_stream(), context.nbytes
        other = torch.cuda.Stream()
        other.wait_stream(forward)
        with torch.cuda.stream(other):
            torch.cuda._sleep(DELAY)
            found = functional.backward(context, arrays.grad_output, arrays.grad_state)
        del context
        torch.full((size,), 255, dtype=torch.uint8, device=DEVICE)
    torch.cuda.synchronize()
    assert all(map(torch.equal, flatten(found), flatten(expected)))


def test_cupy_stream() -> None:
    cupy, place = pytest.importorskip("cupy"), cupy_place()
    case = stream_case("float32")
    arrays = place.arrays(case)
    expected = forward_and_backward(case, arrays)
    late = replace(arrays, x=cupy.full_like(arrays.x, cupy.nan))
    with cupy.cuda.Stream(non_blocking=True) as stream:
        forward_and_backward(case, arrays)  # likewise
        cupy.cuda.Device().synchronize()
        with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
            torch.cuda._sleep(DELAY)
        late.x[...] = arrays.x
        found = forward_and_backward(case, late)
        assert not stream.done, "expected the call to return before the device has done it"
        stream.synchronize()
    for a, b in zip(flatten(found), flatten(expected), strict=True):
        cupy.testing.assert_array_equal(a, b)


@pytest.mark.first
@pytest.mark.parametrize(("dtype", "path"), PATHS)
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
@pytest.mark.parametrize("memory", [{}, {"checkpoint_every": 4}])
def test_graph(cell: str, dtype: str, path: str, memory: dict[str, Any], tensors: Place) -> None:
    """Forward and backward captured once, replayed with other numbers, lengths and resets: nothing waits for the host."""
    _cuda.set_path(path)
    sizes = {"T": 9, "B": 6, "I": 5, "H": 21, "num_layers": 2, "bidirectional": True, "dropout": 0.3, "reset": 0.2}
    case = case_of(cell, **sizes, lengths=True, return_states=False, dtype=dtype)
    given = [on_device(tensors.arrays(replace(case, seed=seed))) for seed in (0, 5)]
    expected = [forward_and_backward(case, arrays, **memory) for arrays in given]
    captured = on_device(tensors.arrays(case))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = forward_and_backward(case, captured, **memory)
    for i in (1, 0, 1):
        for target, source in zip(tensors_in(captured), tensors_in(given[i]), strict=True):
            target.copy_(source)
        graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, flatten(found), flatten(expected[i])))


def tensors_in(arrays: Arrays) -> list[Any]:
    return list(flatten(list(vars(arrays).values())))


def on_device(arrays: Arrays) -> Arrays:
    """Lengths and resets too: a copy from the host has no place in a graph."""
    moved = {n: torch.from_numpy(np.ascontiguousarray(getattr(arrays, n))).to(DEVICE) for n in ("lengths", "reset")}
    return replace(arrays, **moved)


def test_graph_of_a_module() -> None:
    """Through autograd, as torch.cuda.make_graphed_callables captures it."""
    torch.manual_seed(0)
    layer = rt.LSTM(6, 24, 2).to(DEVICE)
    sample = torch.randn(7, 4, 6, device=DEVICE, requires_grad=True)
    x = torch.randn_like(sample).requires_grad_()
    output, _ = layer(x)
    expected = [output.detach(), *torch.autograd.grad(output.sum(), [x, *layer.parameters()])]

    class Output(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Any) -> Any:
            return self.layer(x)[0]

    graphed = torch.cuda.make_graphed_callables(Output(), (sample,))
    again = graphed(x)
    found = [again.detach().clone(), *torch.autograd.grad(again.sum(), [x, *layer.parameters()])]
    assert all(map(torch.equal, found, expected))


def test_nothing_waits_for_the_device() -> None:
    """As far as PyTorch sees it: a ragged batch through autograd, with dropout, without a copy to the host."""
    layer = rt.LSTM(6, 24, 2, dropout=0.3, device=DEVICE, dtype=torch.bfloat16)
    x = torch.randn(7, 4, 6, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    lengths = torch.tensor([7, 0, 3, 5], device=DEVICE)
    layer(x, lengths=lengths)[0].sum().backward()  # memory and kernels are there
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x, lengths=lengths, reset=x[..., 0] > 1)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- torch.compile, torch.func, autocast ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "dtype"), [*(("LSTM", dtype) for dtype in ("float32", *HALF)), ("GRU", "float32"), ("RNN", "float32")]
)
def test_compiles(kind: str, dtype: str) -> None:
    """Without a graph break, and to the bits of the call that is not compiled."""
    torch._dynamo.reset()
    layer = getattr(rt, kind)(6, 24, 2, bidirectional=True, device=DEVICE, dtype=getattr(torch, dtype))
    x = torch.randn(7, 4, 6, device=DEVICE, dtype=getattr(torch, dtype), requires_grad=True)
    lengths = torch.tensor([7, 0, 3, 5], device=DEVICE)
    compiled = torch.compile(layer, fullgraph=True, backend="inductor" if has_triton() else "aot_eager")
    found, expected = (
        [*flatten(results), *torch.autograd.grad(results[0].float().square().sum(), [x, *layer.parameters()])]
        for results in (compiled(x, lengths=lengths), layer(x, lengths=lengths))
    )
    assert all(map(torch.equal, found, expected))


def test_per_sample_gradients() -> None:
    layer = rt.GRU(3, 4, 2).to(DEVICE)
    samples, weights = torch.randn(6, 5, 2, 3, device=DEVICE), dict(layer.named_parameters())

    def loss(weights: Any, x: Any) -> Any:
        return torch.func.functional_call(layer, weights, (x,))[0].square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(
        {name: p.detach() for name, p in weights.items()}, samples
    )
    for i, sample in enumerate(samples):
        expected = torch.autograd.grad(loss(weights, sample), list(weights.values()))
        assert all(torch.equal(g[i], e) for g, e in zip(found.values(), expected, strict=True))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_autocast(kind: str) -> None:
    """float16 as cuDNN's layer, which takes that whatever autocast names; bfloat16 is bfloat16 here."""
    torch.manual_seed(0)
    theirs = getattr(torch.nn, kind)(6, 24, 2).to(DEVICE)
    ours = rt.convert(copy.deepcopy(theirs))
    x = torch.randn(7, 4, 6, device=DEVICE)
    with torch.autocast("cuda", torch.float16):
        found, expected = ([*flatten(module(x))] for module in (ours, theirs))
    assert [r.dtype for r in found] == [r.dtype for r in expected] == [torch.float16] * len(found)
    torch.testing.assert_close(found, expected, rtol=5e-3, atol=5e-3)
    with torch.autocast("cuda", torch.bfloat16):
        found = [*flatten(ours(x))]
    lower = copy.deepcopy(ours).to(torch.bfloat16)
    assert all(map(torch.equal, found, flatten(lower(x.bfloat16()))))
    grads = torch.autograd.grad(found[0].float().sum(), list(ours.parameters()))
    assert {g.dtype for g in grads} == {torch.float32}


# ---- arrays --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_lengths_on_the_device_are_clamped(cell: str, place: Place) -> None:
    check_clamped_lengths(place, cell)


def test_arrays_of_both_libraries() -> None:
    """With CuPy's weights, PyTorch's x comes through `__cuda_array_interface__`, or DLPack, without a copy."""
    cupy, place = pytest.importorskip("cupy"), cupy_place()
    case = case_of("lstm", T=6, B=3, dtype="float32", return_states=False)
    arrays = place.arrays(case)
    expected = forward_and_backward(case, arrays)
    given = replace(arrays, x=torch.from_dlpack(arrays.x), grad_output=torch.from_dlpack(arrays.grad_output))
    found = forward_and_backward(case, given)
    for a, b in zip(flatten(found), flatten(expected), strict=True):
        assert isinstance(a, cupy.ndarray)
        cupy.testing.assert_array_equal(a, b)
    with pytest.raises(TypeError, match="expected a cupy.ndarray, as the weights are"):
        forward_and_backward(case, replace(arrays, x=cupy.asnumpy(arrays.x)))


class Described:
    """A tensor as `__cuda_array_interface__` of version 3 describes it: its producer works on `stream`, None on none."""

    def __init__(self, tensor: Any, stream: int | None) -> None:
        self.tensor, self.stream = tensor, stream

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {**self.tensor.__cuda_array_interface__, "version": 3, "stream": self.stream}


@pytest.mark.parametrize("kind", ["none", "legacy", "per thread", "its own"])
def test_described_arrays_and_their_streams(kind: str) -> None:
    """None: there is nothing to wait for; 1, 2 and an address: a stream that may be busy still."""
    cupy, place = pytest.importorskip("cupy"), cupy_place()
    case = stream_case("float32")
    arrays = place.arrays(case)
    expected = forward_and_backward(case, arrays)
    late = torch.full(tuple(arrays.x.shape), torch.nan, device=DEVICE)
    own = torch.cuda.Stream()
    number = {"none": None, "legacy": 1, "per thread": 2, "its own": own.cuda_stream}[kind]
    stream = {"legacy": torch.cuda.default_stream(), "per thread": torch.cuda.ExternalStream(2)}.get(kind, own)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(DELAY)
        late.copy_(torch.from_dlpack(arrays.x))
    if number is None:
        torch.cuda.synchronize()
    with cupy.cuda.Stream(non_blocking=True) as consumer:
        found = forward_and_backward(case, replace(arrays, x=Described(late, number)))
        consumer.synchronize()
    for a, b in zip(flatten(found), flatten(expected), strict=True):
        cupy.testing.assert_array_equal(a, b)


def test_foreign_tensors_of_another_stream() -> None:
    """PyTorch's own description names no stream: DLPack orders the two."""
    cupy, place = pytest.importorskip("cupy"), cupy_place()
    case = stream_case("float32")
    arrays = place.arrays(case)
    expected = forward_and_backward(case, arrays)
    late = torch.full(tuple(arrays.x.shape), torch.nan, device=DEVICE)
    torch.cuda.synchronize()
    with cupy.cuda.Stream(non_blocking=True) as consumer:
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(DELAY)
            late.copy_(torch.from_dlpack(arrays.x))
            found = forward_and_backward(case, replace(arrays, x=late))
        consumer.synchronize()
    for a, b in zip(flatten(found), flatten(expected), strict=True):
        cupy.testing.assert_array_equal(a, b)


def test_plans(tensors: Place) -> None:
    """All steps run in one launch where the weights fit, on this device too: one multiprocessor, or all of them."""
    assert plan_of(tensors, case_of("lstm", dtype="float32")).count("all steps in one launch (persistent kernel") == 2
    assert plan_of(tensors, case_of("lstm", H=700, T=4, dtype="float32")).count("grid kernel") == 2
    middle = plan_of(tensors, case_of("lstm", H=256, T=4, B=16, dtype="float32"))
    assert middle.count("cluster kernel" if HAS_CLUSTERS else "grid kernel") == 2
    assert plan_of(tensors, case_of("lstm", H=1024, T=4, dtype="bfloat16")).count("grid kernel") == 2
    assert plan_of(tensors, case_of("lstm", dtype="float64")).count("a launch for each step") == 2


# ---- modules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_modules(kind: str) -> None:
    """The same layer on both devices."""
    cupy = pytest.importorskip("cupy")
    found = list(flatten(everything_of(kind, "cuda", cupy.asarray)))
    assert all(isinstance(a, cupy.ndarray) for a in found)
    expected = flatten(everything_of(kind, "cpu", lambda a: a))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(cupy.asnumpy(a), b, 1e-12, 1e-12)


@pytest.mark.parametrize("seed", range(24))
def test_torch_layers(seed: int) -> None:
    """The modules beside torch.nn's on the CPU, through autograd; in float64."""
    setup = torch_cases.draw(seed)
    theirs, ours = setup.pair()
    given = (setup.x(), setup.state() if setup.hx else None)
    expected = torch_cases.run(theirs, *torch_cases.requiring_grad(given))
    moved = torch_cases.requiring_grad(map_arrays(lambda a: a.to(DEVICE), given))
    found = torch_cases.run(ours.to(DEVICE), *moved)
    torch_cases.assert_close({name: value.cpu() for name, value in found.items()}, expected)


@pytest.mark.parametrize(("cell", "dtype"), product(["lstm", "gru", "rnn_tanh"], ["float32", *HALF]))
def test_streamed_steps(cell: str, dtype: str, tensors: Place) -> None:
    """Step after step, the bits of the sequence; but c is rounded to 16 bits between steps, as `cn` is."""
    case = case_of(cell, T=6, B=2, I=9, H=20, num_layers=2, dtype=dtype, hx=False)
    arrays, parameters = tensors.arrays(case), dict(case.parameters)
    output, _, _ = functional.forward(cell, arrays.x, None, arrays.weights, num_layers=2, training=False, **parameters)
    packed = functional.pack(cell, arrays.weights, num_layers=2, **parameters)
    stream = functional.Stream(cell, packed, case.B, num_layers=2)
    found = torch.stack([stream.step(x) for x in arrays.x])
    rounded = 4 * HALF[dtype] if dtype in HALF and case.has_c else 0.0
    torch.testing.assert_close(found, output, rtol=0, atol=rounded)


def test_explain_and_info() -> None:
    layer = rnnfast.LSTM(4, 8, device="cuda", seed=0)
    cupy = pytest.importorskip("cupy")
    assert "on the GPU; forward all steps in one launch" in rnnfast.explain(layer, cupy.ones((3, 2, 4), "float32"))
    assert "multiprocessors" in _cuda.device_description()
