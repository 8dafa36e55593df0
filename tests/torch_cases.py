"""What the tests of rnnfast.torch share: strict mode with counted kernel calls, and random configurations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import rnnfast.torch as rt  # noqa: E402
from rnnfast import functional  # noqa: E402
from rnnfast._device import extension  # noqa: E402
from rnnfast._strict import set_strict  # noqa: E402

_cuda: Any = import_module("rnnfast._cuda") if find_spec("rnnfast._cuda") else None
EMULATED = _cuda is not None and _cuda.emulated

# For `engine`: those that tests of rnnfast.torch can run on here; PyTorch's CPU tensors stand for CUDA's with the second.
ENGINES = (
    "cpu",
    pytest.param(
        "emulated",
        marks=pytest.mark.skipif(not EMULATED, reason="rnnfast._cuda is not built with RNNFAST_CUDA=emulate"),
    ),
)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The CPU's engine, then CUDA's, which must have run when the test ends."""
    emulated = request.param == "emulated"
    monkeypatch.setattr(extension, "emulate", emulated)
    functional.stack.cache_clear()
    torch._dynamo.reset()
    before = _cuda.launches() if emulated else 0
    yield request.param
    functional.stack.cache_clear()
    if emulated and "no_kernel" not in request.fixturenames:
        assert _cuda.launches() > before, "expected the CUDA engine to run"


@pytest.fixture
def no_kernel() -> None:
    """For a test that calls none."""


@pytest.fixture(autouse=True)
def strict(request: pytest.FixtureRequest) -> Iterator[None]:
    """Nothing falls back in these tests, and the engine runs in every one of them."""
    before = functional.kernel_calls()
    set_strict(True)
    torch.manual_seed(0)
    yield
    set_strict(False)
    if "no_kernel" not in request.fixturenames:
        assert functional.kernel_calls() > before, "expected the engine to run"


@dataclass(frozen=True)
class Setup:
    """A layer and the shape of its input."""

    kind: str
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    bidirectional: bool
    proj_size: int
    nonlinearity: str
    steps: int
    batch_size: int
    hx: bool
    seed: int

    def options(self) -> dict[str, Any]:
        options = {
            name: getattr(self, name)
            for name in ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "bidirectional")
        }
        if self.kind == "LSTM":
            options["proj_size"] = self.proj_size
        if self.kind == "RNN":
            options["nonlinearity"] = self.nonlinearity
        return options

    def pair(self, dtype: Any = torch.float64) -> tuple[Any, Any]:
        """torch.nn's layer and ours with the same weights."""
        torch.manual_seed(self.seed)
        theirs = getattr(torch.nn, self.kind)(**self.options()).to(dtype)
        torch.manual_seed(self.seed)
        ours = getattr(rt, self.kind)(**self.options()).to(dtype)
        return theirs, ours

    def state(self, dtype: Any = torch.float64, leading: tuple[int, ...] = (), batch_size: int | None = None) -> Any:
        runs, batch_size = self.num_layers * (2 if self.bidirectional else 1), batch_size or self.batch_size
        h = torch.randn(*leading, runs, batch_size, self.proj_size or self.hidden_size, dtype=dtype)
        if self.kind != "LSTM":
            return h
        return h, torch.randn(*leading, runs, batch_size, self.hidden_size, dtype=dtype)

    def x(self, dtype: Any = torch.float64) -> Any:
        shape = (self.batch_size, self.steps) if self.batch_first else (self.steps, self.batch_size)
        return torch.randn(*shape, self.input_size, dtype=dtype)


def draw(seed: int) -> Setup:
    """A random configuration."""
    rng = np.random.default_rng(seed)
    kind = ("LSTM", "GRU", "RNN")[seed % 3]
    hidden_size = int(rng.choice((1, 2, 3, 5, 8, 16, 17, 33)))
    proj = kind == "LSTM" and hidden_size > 1 and rng.random() < 0.4
    return Setup(
        kind=kind,
        input_size=int(rng.choice((1, 2, 3, 7, 16))),
        hidden_size=hidden_size,
        num_layers=int(rng.choice((1, 1, 2, 3))),
        bias=bool(rng.random() < 0.7),
        batch_first=bool(rng.random() < 0.5),
        bidirectional=bool(rng.random() < 0.5),
        proj_size=int(rng.integers(1, hidden_size)) if proj else 0,
        nonlinearity=str(rng.choice(("tanh", "relu"))),
        steps=int(rng.choice((1, 2, 5, 13))),
        batch_size=int(rng.choice((1, 2, 3, 9))),
        hx=bool(rng.random() < 0.7),
        seed=seed,
    )


def leaves(value: Any) -> list[Any]:
    """The tensors in a nest of tuples, lists and PackedSequences, in order, without the Nones."""
    if value is None or isinstance(value, bool):
        return []
    if isinstance(value, torch.nn.utils.rnn.PackedSequence):
        return [value.data]
    if isinstance(value, (tuple, list)):
        return [leaf for element in value for leaf in leaves(element)]
    return [value]


def requiring_grad(value: Any) -> Any:
    """A copy of a nest of tensors as leaves that require a gradient."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(requiring_grad, value))
    return None if value is None else value.detach().clone().requires_grad_()


def scalar(results: Any) -> Any:
    """A loss in which every result counts with its own random weights."""
    generator = torch.Generator().manual_seed(7)
    return sum((r * torch.randn(r.shape, dtype=r.dtype, generator=generator)).sum() for r in leaves(results))


def run(module: Any, *arguments: Any, **keywords: Any) -> dict[str, Any]:
    """Results of a call and the gradients of `scalar` of them, for the arguments that require one and all weights."""
    results = module(*arguments, **keywords)
    sources = [t for t in leaves([*arguments, *keywords.values()]) if t.requires_grad]
    weights = [p for p in module.parameters() if p.requires_grad]
    grads = torch.autograd.grad(scalar(results), [*sources, *weights])
    named = {f"result {i}": r.detach() for i, r in enumerate(leaves(results))}
    return named | {f"gradient {i}": g for i, g in enumerate(grads)}


def error(found: Any, truth: Any, floor: float = 0.1) -> float:
    """Normwise; the floor keeps a sum that cancels to almost nothing from counting as wrong."""
    assert found.shape == truth.shape
    if found.numel() == 0:
        return 0.0
    found, truth = found.double(), truth.double()
    assert torch.isfinite(found).all()
    return float((found - truth).abs().max() / max(floor, float(truth.abs().max())))


def assert_close(found: dict[str, Any], truth: dict[str, Any], results: float = 1e-12, grads: float = 1e-11) -> None:
    """As DESIGN section 6 has it for float64."""
    assert found.keys() == truth.keys()
    for name in truth:
        limit = results if name.startswith("result") else grads
        got = error(found[name], truth[name])
        assert got <= limit, f"{name}: expected an error up to {limit:.1e}, got {got:.2e}"
