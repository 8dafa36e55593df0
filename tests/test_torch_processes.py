"""Several processes: DistributedDataParallel, DataLoader workers, and the torchrun example."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
dist = pytest.importorskip("torch.distributed")

import rnnfast  # noqa: E402
import rnnfast.torch as rt  # noqa: E402
from rnnfast import functional  # noqa: E402
from rnnfast._strict import set_strict  # noqa: E402

EXAMPLE = Path(__file__).parent.parent / "examples" / "distributed_language_model.py"


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = rt.LSTM(3, 5, 2, bidirectional=True)
        self.cell = rt.GRUCell(10, 4)
        self.double()

    def forward(self, x: Any, lengths: Any) -> Any:
        output, _ = self.lstm(x, lengths=lengths)
        return self.cell(output[-1], None)


def batch() -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 8, 3, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 7, (8,), generator=generator)


def gradients(model: Any, x: Any, lengths: Any) -> dict[str, Any]:
    for _ in range(2):  # the second pass in buckets that the first one arranged
        model.zero_grad()
        model(x, lengths).square().mean().backward()
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


def train_shard(rank: int, world: int, folder: str) -> None:
    """One process of `world`: its rows of the batch; the averaged gradients go to a file."""
    torch.set_num_threads(1)
    set_strict(True)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(Model())
    x, lengths = batch()
    found = gradients(model, x[:, rank::world], lengths[rank::world])
    torch.save((found, functional.kernel_calls()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def run_world(world: int, folder: str) -> None:
    """`world` processes, forked from one that has only imported things: an import takes longer than the test."""
    torch.multiprocessing.start_processes(train_shard, (world, folder), nprocs=world, start_method="fork")


@pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")
@pytest.mark.parametrize("world", [2, 4])
def test_data_parallel_gradients_equal_those_of_one_process(world, tmp_path, run_python):
    torch.manual_seed(0)
    expected = gradients(Model(), *batch())
    run_python(f"import test_torch_processes as t; t.run_world({world}, {str(tmp_path)!r})", timeout=100)
    for rank in range(world):
        found, calls = torch.load(tmp_path / f"{rank}.pt")
        assert calls == 8  # two passes of two modules, forward and backward
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-15)


class Encoded(torch.utils.data.Dataset):
    """Items that a recurrent model has made, in whichever process asks for them."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.lstm = rt.LSTM(3, 32)
        self.x = torch.randn(6, 50, 16, 3)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> Any:
        before = functional.kernel_calls()
        output = self.lstm(self.x[i])[0]
        (gradient,) = torch.autograd.grad(output.square().sum(), self.lstm.weight_hh_l0)
        return output.detach(), gradient, functional.kernel_calls() - before, os.getpid()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_workers(method):
    data = Encoded()
    threads = rnnfast.get_num_threads()
    rnnfast.set_num_threads(2)
    try:
        expected = [data[i] for i in range(len(data))]  # also starts this process's threads before the fork
    finally:
        rnnfast.set_num_threads(threads)
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, num_workers=2, multiprocessing_context=method, timeout=50
    )
    for found, item in zip(loader, expected, strict=True):
        torch.testing.assert_close(found[0], item[0])
        torch.testing.assert_close(found[1], item[1], rtol=1e-4, atol=1e-4)
        assert found[2] == 2
        assert found[3] != os.getpid()


@pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")
def test_torchrun_example(tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 200)
    options = [str(EXAMPLE), str(text), "--steps=12", "--hidden=16", "--batch=8", "--window=16"]
    paths = [str(Path(rnnfast.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(sys, "argv", [*options, f"--save={tmp_path / 'weights.pt'}"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    alone = capsys.readouterr().out
    assert bits(done.stdout) == pytest.approx(bits(alone), abs=0.002)
    assert "lstm.weight_hh_l0" in torch.load(tmp_path / "weights.pt")


def bits(printed: str) -> float:
    """Of the last line: "2 processes: 3.900 bits a character over the last steps"."""
    return float(printed.strip().splitlines()[-1].split(": ")[1].split()[0])
