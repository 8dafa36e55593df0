"""Memory: what a forward keeps, what a call takes for itself, and that nothing is lost."""

from __future__ import annotations

import gc
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import RunPython, Sharing
from rnnfast import _core, functional

# For each unit and step: the gates (slots) and, where there is one, the cell state.
SLOTS = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 5, "gru": 4}
LINE = 64  # bytes to which each array is padded


def weights_of(cell: str, I: int, H: int, dtype: str = "float32") -> list[np.ndarray]:  # noqa: E741
    gates = functional.CELLS[cell].gates
    return [np.zeros(shape, dtype) for shape in ((gates * H, I), (gates * H, H), (gates * H,), (gates * H,))]


def reserve(cell: str, T: int, B: int, H: int, dtype: str = "float32", **options: Any) -> int:
    x = np.zeros((T, B, 3), dtype)
    return int(functional.forward(cell, x, None, weights_of(cell, 3, H, dtype), **options)[-1].nbytes)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("cell", SLOTS)
def test_reserve(cell: str, dtype: str) -> None:
    """At most 5·T·B·H values for the LSTM: gates and c of every step, and c of before the first."""
    T, B, H = 50, 6, 48
    size = np.dtype(dtype).itemsize
    steps = T + (1 if functional.CELLS[cell].has_cell_state else 0)
    assert reserve(cell, T, B, H, dtype) <= SLOTS[cell] * steps * B * H * size + 8 * LINE
    lengths = np.arange(B)
    ragged = reserve(cell, T, B, H, dtype, lengths=lengths)
    assert ragged <= SLOTS[cell] * (lengths.sum() + B) * H * size + 8 * LINE  # no memory for padding either


def test_reserve_does_not_depend_on_the_threads(sharing: Sharing) -> None:
    assert reserve("lstm", 20, 7, 33) <= 5 * 21 * 7 * 48 * 4 + 32 * LINE


def test_evaluation_keeps_nothing() -> None:
    x = np.zeros((5, 2, 3), np.float32)
    assert functional.lstm(x, None, weights_of("lstm", 3, 16), training=False)[-1] is None


def test_a_backward_frees_what_it_used() -> None:
    """Contexts that are gone give their memory back, to the pool or the system, and the pool is bounded."""
    _core.release_pool()
    assert _core.pooled_bytes() == 0
    x = np.zeros((2000, 8, 3), np.float32)
    for _ in range(30):
        functional.lstm(x, None, weights_of("lstm", 3, 64))
    gc.collect()
    assert 0 < _core.pooled_bytes() <= 2**28
    _core.release_pool()
    assert _core.pooled_bytes() == 0


# In a process of its own, because others' garbage would be counted.
RESIDENT = """
import ctypes, gc, os
import numpy as np
import rnnfast
from rnnfast import _core, functional

def resident():
    gc.collect()
    _core.release_pool()
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # what the C library keeps of what was freed is no leak
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
"""


tells_memory = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="the system does not tell resident memory in /proc"
)


@tells_memory
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN", "LeakyRNN"])
def test_no_leak(cell: str, run_python: RunPython) -> None:
    """200 training steps, streams, packed weights and refused calls: the process does not grow."""
    code = (
        RESIDENT
        + f"""
rnnfast.set_num_threads(1)
layer = rnnfast.{cell}(16, 32, 2, bidirectional=True, seed=0)
one_way = rnnfast.{cell}(16, 32, seed=0)
optimiser = rnnfast.optim.Adam(layer.parameters())
x = np.ones((40, 8, 16), np.float32)

def step():
    layer.train()
    layer(x, lengths=[40, 3, 0, 5, 40, 40, 1, 2], reset=np.zeros((40, 8), bool), return_states=True)
    layer.backward(np.ones((40, 8, 64), np.float32))
    optimiser.step()
    layer.zero_grad()
    layer(x)  # no backward follows
    layer.eval()(x)
    stream = one_way.stream(8)
    stream.step(x[0])
    stream.fork().close()
    for wrong in (x[..., :3], x.astype("float64"), None):
        try:
            layer(wrong)
        except (ValueError, TypeError):
            pass

for _ in range(50):
    step()
before = resident()
for _ in range(200):
    step()
print(resident() - before)
"""
    )
    assert int(run_python(code, timeout=120)) < 2**20


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_scratch_is_bounded_whatever_the_length(cell: str, run_python: RunPython) -> None:
    """T = 100,000: a forward needs some 16 MB at most beside what it returns, forward and backward that and the reserve."""
    code = (
        RESIDENT
        + f"""
import resource
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
T, H, gates = 100_000, 64, functional.CELLS[{cell!r}].gates
weights = [np.zeros(s, np.float32) for s in ((gates * H, 4), (gates * H, H), (gates * H,), (gates * H,))]
x, grad = np.ones((T, 1, 4), np.float32), np.ones((T, 1, H), np.float32)
functional.backward(functional.forward({cell!r}, x[:9], None, weights)[-1])
before = max(peak(), resident())
output, *_ = functional.forward({cell!r}, x, None, weights, training=False)
print(peak() - before - output.nbytes)
del output
before = max(peak(), resident())
output, _, ctx = functional.forward({cell!r}, x, None, weights)
grad_x, *_ = functional.backward(ctx, grad)
print(peak() - before - output.nbytes - ctx.nbytes - grad_x.nbytes)
"""
    )
    inference, training = map(int, run_python(code, timeout=120).split())
    assert inference <= 16 * 2**20
    assert training <= 16 * 2**20


TOO_LARGE = """
import resource
import numpy as np, rnnfast

def limit(size):
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.getrlimit(resource.RLIMIT_AS)[1]))

def refused(call):
    try:
        call()
    except MemoryError as error:
        print(error)

lstm = rnnfast.LSTM(1, 16, seed=0)
grad = np.ones((4000, 100, 16), np.float32)
lstm(np.ones((4000, 100, 1), np.float32))
with open("/proc/self/statm") as file:
    limit(int(file.read().split()[0]) * resource.getpagesize() + (64 << 20))
refused(lambda: lstm.backward(grad, retain=True))  # to keep the gates, 128 MB, it copies them
limit(6 << 30)
lstm.backward(grad)
flat = np.broadcast_to(np.float32(0), (25, 1_000_000, 1))  # 1.6 GB of results, 8 GB of gates
long = np.broadcast_to(flat[:1], (250, 1_000_000, 1))
refused(lambda: lstm(flat))
refused(lambda: lstm(long, lean=True))
refused(lambda: lstm.infer(long))
refused(lambda: lstm.stream(2**31 - 1))
"""


@tells_memory
def test_too_little_is_said(run_python: RunPython) -> None:
    """What wants it, how many bytes, and what takes less; of a stream the states of now and of the next step together."""
    copy, gates, lean, inference, stream = run_python(TOO_LARGE, OPENBLAS_NUM_THREADS="1").splitlines()
    less = re.escape("lean=True, checkpoint_every=k (in the forward call) or shorter sequences take less")
    assert re.fullmatch(rf"backward: expected memory for \d{{9}} bytes, found less; {less}", copy)
    assert re.fullmatch(rf"x: expected memory for \d{{10}} bytes, found less; {less}", gates)
    results = f"x: expected memory for {250 * 10**6 * 16 * 4} bytes, found less; fewer or shorter sequences take less"
    assert (lean, inference) == (results, results)
    assert stream == f"batch_size: expected memory for {(2**31 - 1) * 16 * 4 * 4} bytes, found less"
