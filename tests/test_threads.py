"""Threads, ours and Python's: the GIL, modules used at once, forked children, and PyTorch in the same process.

What could hang or kill the process runs in one of its own.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import rnnfast
from conftest import RunPython, Sharing
from reference_cases import Case, make, results
from rnnfast import _core, functional

# Work that is shared between threads in every phase, and checked: "ok" means right results.
WORK = """
import numpy as np, rnnfast
from rnnfast import _core, functional, reference
from reference_cases import Case, assert_close, make, results
case = Case(cell="lstm", T=9, B=8, I=32, H=48, bidirectional=True, lengths=True)
arrays = make(case)
truth = results(reference, case, arrays)

def work():
    for split in ("batch", "hidden"):
        _core.set_split(split)
        assert_close(results(functional, case, arrays), truth, 1e-12, 1e-11)
    return "ok"
"""
TORCH_WORK = """
import torch
def torch_work():
    a = torch.randn(300, 300)
    assert torch.isfinite(a @ a).all()
    module = torch.nn.LSTM(32, 64)
    module(torch.randn(5, 16, 32))[0].sum().backward()
"""


def long_call() -> Callable[[], Any]:
    """A call that takes a few hundred milliseconds on one core."""
    lstm = rnnfast.LSTM(64, 256, seed=0).eval()
    x = np.ones((400, 16, 64), np.float32)
    return lambda: lstm(x)


# ---- the interpreter's lock ------------------------------------------------------------------------------------------


def test_python_runs_during_a_call(restore_sharing: None) -> None:
    """Another thread counts while one is inside the kernels; were the lock held, it could count only before and after."""
    Sharing("one", 1).use()
    call = long_call()
    call()
    inside, done, counted = threading.Event(), threading.Event(), []

    def count() -> None:
        inside.wait()
        while not done.is_set():
            counted.append(time.perf_counter())
            time.sleep(0.0005)

    counter = threading.Thread(target=count)
    counter.start()
    inside.set()
    start = time.perf_counter()
    call()
    end = time.perf_counter()
    done.set()
    counter.join()
    quarter = (end - start) / 4
    assert any(start + quarter < moment < end - quarter for moment in counted)


def run_at_once(*functions: Callable[[], Any]) -> list[Any]:
    """Each in a thread of its own, started together."""
    together, found = threading.Barrier(len(functions)), [None] * len(functions)
    errors: list[BaseException] = []

    def run(k: int) -> None:
        try:
            together.wait()
            found[k] = functions[k]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found


def test_two_threads_different_modules(sharing: Sharing) -> None:
    def train(cell: str) -> Callable[[], Any]:
        case = Case(cell=cell, T=12, B=9, I=17, H=33, num_layers=2, lengths=True)
        arrays = make(case)
        return lambda: [results(functional, case, arrays) for _ in range(5)]

    work = [train(cell) for cell in ("lstm", "gru", "rnn_tanh")]
    alone = [w() for w in work]
    for repeats, expected in zip(run_at_once(*work), alone, strict=True):
        for found in repeats:
            for name, value in expected[0].items():
                np.testing.assert_array_equal(found[name], value)


def test_two_threads_one_module_in_eval(sharing: Sharing) -> None:
    """The first calls after eval() pack the weights, at the same time."""
    rng = np.random.default_rng(0)
    gru = rnnfast.GRU(17, 33, 2, bidirectional=True, seed=0)
    batches = [rng.standard_normal((12, 9, 17)).astype(np.float32) for _ in range(4)]
    expected = [gru.infer(x)[0] for x in batches]
    for _ in range(5):
        gru.train().eval()
        found = run_at_once(*(lambda x=x: [gru(x)[0] for _ in range(3)] for x in batches))
        for repeats, value in zip(found, expected, strict=True):
            for output in repeats:
                np.testing.assert_array_equal(output, value)


def test_one_context_in_two_threads() -> None:
    """Two backward passes of one context at once: one of them may be refused, none is wrong."""
    case = Case(cell="lstm", T=200, B=8, I=16, H=64, dtype="float32")
    arrays = make(case)
    *_, ctx = functional.lstm(arrays.x, arrays.hx, arrays.weights)
    truth = functional.backward(ctx, arrays.grad_output, retain=True)[0]

    def backward() -> Any:
        try:
            return functional.backward(ctx, arrays.grad_output, retain=True)[0]
        except RuntimeError as error:
            return str(error)

    for _ in range(5):
        found = run_at_once(backward, backward)
        assert any(isinstance(a, np.ndarray) for a in found)
        for a in found:
            if isinstance(a, str):
                assert "another thread" in a
            else:
                np.testing.assert_array_equal(a, truth)


# ---- how many threads ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", ["1", "2", "3", "5"])
def test_omp_num_threads(threads: str, run_python: RunPython) -> None:
    code = WORK + "print(rnnfast.get_num_threads(), work())"
    assert run_python(code, OMP_NUM_THREADS=threads) == f"{threads} ok\n"


@pytest.mark.parametrize("text", ["", "0", "-3", "many", "2,1", "100000000000000000000"])
def test_odd_omp_num_threads(text: str | None, run_python: RunPython) -> None:
    """What is no number of threads is no reason to fail."""
    code = WORK + "assert rnnfast.get_num_threads() >= 1; print(work())"
    assert run_python(code, OMP_NUM_THREADS=text) == "ok\n"


@pytest.mark.parametrize("name", ["OMP_THREAD_LIMIT", "OMP_DYNAMIC", "OMP_MAX_ACTIVE_LEVELS", "OMP_WAIT_POLICY"])
def test_fewer_threads_than_asked_for(name: str, run_python: RunPython) -> None:
    """The runtime may give fewer threads than a call wants."""
    values = {"OMP_THREAD_LIMIT": "1", "OMP_DYNAMIC": "true", "OMP_MAX_ACTIVE_LEVELS": "0", "OMP_WAIT_POLICY": "active"}
    assert run_python(WORK + "rnnfast.set_num_threads(4); print(work())", **{name: values[name]}) == "ok\n"


def test_set_num_threads(restore_sharing: None) -> None:
    for n in (1, 3, 2):
        rnnfast.set_num_threads(n)
        assert rnnfast.get_num_threads() == n
    for wrong in (0, -1, 2**40):
        with pytest.raises(ValueError, match="n: expected"):
            rnnfast.set_num_threads(wrong)
    assert rnnfast.get_num_threads() == 2


@pytest.mark.parametrize("split", ["", "batch", "hidden"])
@pytest.mark.parametrize("threads", [4 * (os.cpu_count() or 1) + 1, 70])
def test_more_threads_than_cores(threads: int, split: str, run_python: RunPython) -> None:
    """Threads that wait for one that has no core give way to it: far more threads than cores still finish."""
    code = (
        WORK
        + f"""
case = Case(cell="gru", T=8, B=5, I=9, H=40)
arrays = make(case)
rnnfast.set_num_threads({threads})
_core.set_split({split!r})
assert_close(results(functional, case, arrays), results(reference, case, arrays), 1e-12, 1e-11)
print("ok")
"""
    )
    assert run_python(code, timeout=120) == "ok\n"


IDLE = """
import os, sys, time
before = dict(os.environ)
import numpy as np, rnnfast
assert dict(os.environ) == before
rnnfast.set_num_threads(2)
lstm, x = rnnfast.LSTM(64, 128, seed=0).eval(), np.zeros((50, 32, 64), np.float32)
def spun():  # seconds of processor time that another thread takes once a call has ended
    lstm(x)
    begin = time.process_time()
    time.sleep(0.05)
    return time.process_time() - begin
print(min(spun() for _ in range(9)) < 0.002)  # the least: a busy machine may add to any of them
"""


def test_idle_threads_sleep_soon(run_python: RunPython) -> None:
    """Within about half a millisecond, unless the user wants otherwise; the runtime's own default is some 8 ms."""
    unsaid = {"GOMP_SPINCOUNT": None, "OMP_WAIT_POLICY": None}
    assert run_python(IDLE, **unsaid) == "True\n"
    assert run_python(IDLE, **{**unsaid, "GOMP_SPINCOUNT": "100000000"}) == "False\n"
    assert run_python(IDLE, **{**unsaid, "OMP_WAIT_POLICY": "active"}) == "False\n"


# ---- layers at once --------------------------------------------------------------------------------------------------

STACKS: dict[str, dict[str, Any]] = {
    "two": {"num_layers": 2, "T": 40, "B": 1, "H": 20},
    "three_of_one_unit": {"num_layers": 3, "T": 9, "B": 2, "H": 1},
    "five": {"num_layers": 5, "T": 33, "B": 3, "H": 33},
    "one_step": {"num_layers": 4, "T": 1, "B": 1, "H": 17},
    "ragged": {"num_layers": 3, "T": 50, "B": 8, "H": 18, "lengths": True},
    "reset": {"num_layers": 2, "T": 64, "B": 2, "H": 16, "reset": 0.2},
    "projection": {"num_layers": 3, "T": 20, "B": 2, "H": 9, "proj": 4},
    "float32": {"num_layers": 3, "T": 20, "B": 2, "H": 40, "dtype": "float32"},
}


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("cell", list(functional.CELLS))
def test_layers_at_once_change_no_bit(cell: str, stack: str, threads: int, restore_sharing: None) -> None:
    if "proj" in STACKS[stack] and cell != "lstm":
        return
    case = Case(cell=cell, I=7, **STACKS[stack])
    arrays = make(case)
    Sharing("one", 1).use()
    alone = results(functional, case, arrays)
    Sharing("layers", threads).use()
    for name, value in results(functional, case, arrays).items():
        np.testing.assert_array_equal(value, alone[name], err_msg=name)


def test_layers_at_once_are_chosen_for_small_stacks(restore_sharing: None) -> None:
    """And not where they cannot be: both directions, a large batch, dropout in training, lean mode."""
    Sharing("", 2).use()
    words = "a thread for each layer"
    x = np.zeros((200, 1, 32), np.float32)
    stack = rnnfast.LSTM(32, 32, num_layers=2, seed=0)
    assert f"; {words}" in rnnfast.explain(stack, x)
    for options in ({"bidirectional": True}, {"dropout": 0.5}, {"num_layers": 1}):
        assert words not in rnnfast.explain(rnnfast.LSTM(32, 32, **{"num_layers": 2, "seed": 0, **options}), x)
    assert words not in rnnfast.explain(stack, np.zeros((200, 9, 32), np.float32))


# ---- processes -------------------------------------------------------------------------------------------------------

FORK = """
import os, sys, time
def in_child(work, seconds=30):
    pid = os.fork()
    if pid == 0:
        try:
            status = 0 if work() == "ok" else 1
        except BaseException as error:
            print(error, file=sys.stderr)
            status = 2
        os._exit(status)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return "hangs"
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forked_child_after_a_parallel_region(run_python: RunPython) -> None:
    """libgomp's threads are not there in the child, and waiting for them would never end."""
    code = WORK + FORK + "rnnfast.set_num_threads(3); work(); print(in_child(work), in_child(work), work())"
    assert run_python(code) == "0 0 ok\n"


def test_forked_child_of_a_process_that_ran_nothing(run_python: RunPython) -> None:
    code = WORK + FORK + "rnnfast.set_num_threads(3); print(in_child(work), work(), in_child(work))"
    assert run_python(code) == "0 ok 0\n"


def test_grandchild(run_python: RunPython) -> None:
    code = (
        WORK
        + FORK
        + """
def child():
    work()
    assert in_child(work) == 0
    return "ok"
rnnfast.set_num_threads(2); work(); print(in_child(child), work())
"""
    )
    assert run_python(code) == "0 ok\n"


def test_multiprocessing_fork(run_python: RunPython) -> None:
    code = (
        WORK
        + """
import multiprocessing
def task(k):
    return work()
rnnfast.set_num_threads(2)
work()
with multiprocessing.get_context("fork").Pool(2) as pool:
    print(pool.map_async(task, range(4)).get(timeout=30), work())
"""
    )
    assert run_python(code) == "['ok', 'ok', 'ok', 'ok'] ok\n"


def test_child_uses_one_thread_and_says_so(run_python: RunPython) -> None:
    code = (
        WORK
        + FORK
        + """
rnnfast.set_num_threads(2); work()
def child():
    assert rnnfast.get_num_threads() == 1
    rnnfast.set_num_threads(4)
    return work()
print(in_child(child), rnnfast.get_num_threads())
"""
    )
    assert run_python(code) == "0 2\n"


# ---- with PyTorch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["torch_first", "rnnfast_first"])
def test_with_torch(order: str, run_python: RunPython) -> None:
    """Either import order, both in parallel regions in turn and at once."""
    pytest.importorskip("torch")
    imports = [TORCH_WORK, WORK] if order == "torch_first" else [WORK, TORCH_WORK]
    code = (
        "".join(imports)
        + """
import threading
rnnfast.set_num_threads(2)
torch.set_num_threads(2)
for _ in range(3):
    torch_work()
    work()
other = threading.Thread(target=torch_work)
other.start()
print(work())
other.join()
"""
    )
    assert run_python(code, timeout=120) == "ok\n"


def test_forked_child_where_only_torch_ran_before(run_python: RunPython) -> None:
    """As in a data loader: the parent imported rnnfast, but it was PyTorch that woke the threads."""
    pytest.importorskip("torch")
    code = TORCH_WORK + WORK + FORK + "torch.set_num_threads(2); torch_work(); print(in_child(work))"
    assert run_python(code, timeout=120, OMP_NUM_THREADS="2") == "0\n"


def test_cost_model_with_any_threads(restore_sharing: None) -> None:
    """The model's own choice, whatever it is, for shapes on both sides of its borders."""
    _core.set_split("")
    case = Case(cell="lstm", dtype="float64", return_states=False)
    for sizes in ((1, 1, 8, 8), (40, 1, 64, 300), (20, 24, 16, 64), (3, 2, 300, 40)):
        T, B, I, H = sizes  # noqa: E741
        shaped = replace(case, T=T, B=B, I=I, H=H, bidirectional=H < 100)
        arrays = make(shaped)
        rnnfast.set_num_threads(1)
        truth = results(functional, shaped, arrays)
        for threads in (2, 3, 4, 8):
            rnnfast.set_num_threads(threads)
            for name, value in results(functional, shaped, arrays).items():
                np.testing.assert_allclose(value, truth[name], rtol=0, atol=1e-12 * max(1, np.abs(truth[name]).max()))


def test_more_threads_than_any_machine_has() -> None:
    with pytest.raises(ValueError, match="n: expected an integer from 1 to 4096, got 4097"):
        rnnfast.set_num_threads(4097)
