"""A character model trained by several processes at once: PyTorch's DistributedDataParallel around rnnfast's LSTM.

    torchrun --standalone --nproc-per-node=2 distributed_language_model.py           # the standard library's source
    torchrun --standalone --nproc-per-node=4 distributed_language_model.py FILE --steps 500
    python distributed_language_model.py --steps 100                                 # one process, the same gradients

Every process reads its own share of the streams of text, runs forward and backward by itself, and averages gradients
with the others while the backward pass still runs. Nothing in here knows that the LSTM is rnnfast's: with
``torch.nn.LSTM`` in its place the program stays the same.

On a CPU the processes share the cores: each gets its part of them (torchrun itself would give each a single one).
"""

from __future__ import annotations

import argparse
import math
import os
import sysconfig
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import rnnfast.torch


class CharacterModel(nn.Module):
    """Symbols [T, B] and a state -> logits [T, B, V] and the next state."""

    def __init__(self, symbols: int, hidden_size: int, num_layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, 64)
        self.lstm = rnnfast.torch.LSTM(64, hidden_size, num_layers)
        self.out = nn.Linear(hidden_size, symbols)

    def forward(self, text: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        output, state = self.lstm(self.embedding(text), state)
        return self.out(output), state


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", nargs="?", type=Path, help="a text in UTF-8; without it, Python's own library")
    parser.add_argument("--steps", type=int, default=300, help="updates of the weights")
    parser.add_argument("--batch", type=int, default=32, help="streams of text, of all processes together")
    parser.add_argument("--window", type=int, default=64, help="steps of truncated backpropagation")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--lr", type=float, default=0.003)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="where to keep the weights (rank 0 writes them)")
    return parser.parse_args()


def read_streams(path: Path | None, batch: int) -> tuple[Tensor, int]:
    """The text as `batch` long streams side by side, [T, B] of bytes, and the number of symbols."""
    if path is not None:
        data = path.read_bytes()
    else:
        modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        data = b"".join(module.read_bytes() for module in modules)[:1_000_000]
    steps = len(data) // batch
    return torch.frombuffer(bytearray(data[: steps * batch]), dtype=torch.uint8).view(batch, steps).T.long(), 256


def start() -> tuple[int, int]:
    """Join the other processes, if torchrun started some: rank and number of processes."""
    if "RANK" not in os.environ:
        return 0, 1
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))  # rnnfast.torch follows
    return rank, world


def train(options: argparse.Namespace, rank: int, world: int) -> float:
    """The mean loss of the last ten steps, in bits a character, over all processes."""
    streams, symbols = read_streams(options.file, options.batch)
    if options.batch % world:
        raise SystemExit(f"--batch: expected a multiple of the {world} processes, got {options.batch}")
    if len(streams) <= options.window:
        raise SystemExit(f"expected more than {options.window * options.batch} bytes of text, got {streams.numel()}")
    streams = streams[:, rank::world]
    torch.manual_seed(options.seed)  # the same weights everywhere
    model: nn.Module = CharacterModel(symbols, options.hidden, options.layers)
    if world > 1:
        model = DistributedDataParallel(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=options.lr)
    state, losses, place, began = None, [], 0, time.perf_counter()
    for step in range(1, options.steps + 1):
        if place + options.window >= len(streams):
            state, place = None, 0
        text, target = streams[place : place + options.window], streams[place + 1 : place + options.window + 1]
        place += options.window
        logits, state = model(text, state)
        state = (state[0].detach(), state[1].detach())
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(mean_over_processes(loss.detach(), world))
        if rank == 0 and (step % 50 == 0 or step == options.steps):
            speed = step * options.window * options.batch / (time.perf_counter() - began)
            bits = losses[-1] / math.log(2)
            print(f"step {step:5d}  {bits:.3f} bits/character  {speed:,.0f} characters/s", flush=True)
    if rank == 0 and options.save is not None:
        torch.save((model.module if world > 1 else model).state_dict(), options.save)
    return sum(losses[-10:]) / len(losses[-10:]) / math.log(2)


def mean_over_processes(value: Tensor, world: int) -> float:
    if world > 1:
        dist.all_reduce(value)
    return float(value) / world


def main() -> None:
    options = parse_arguments()
    rank, world = start()
    try:
        bits = train(options, rank, world)
        if rank == 0:
            print(f"{world} process{'es' if world > 1 else ''}: {bits:.3f} bits a character over the last steps")
    finally:
        if world > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
