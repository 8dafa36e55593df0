"""The harness for models of PyTorch: layers, one step of learning, and how their runs are written and read.

Everything else is harness.py's.
"""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from harness import Failure, Files, Run

try:
    import torch
except ImportError:
    raise SystemExit("Error: this example needs torch: pip install 'rnnfast[torch]'") from None

import rnnfast.torch

CELLS = {"lstm": rnnfast.torch.LSTM, "gru": rnnfast.torch.GRU, "rnn": rnnfast.torch.RNN}


def begin_model(seed: int, device: str) -> None:
    """Seed the weights and the dropout of the model that is built next, for a device that is there."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise Failure(f"--device {device}: not available ({str(error).splitlines()[0]})") from error
    torch.manual_seed(seed)


def descend(run: Run, loss: torch.Tensor, rate: float, clip: float) -> float:
    """Backward, clip, step; the gradient's norm before."""
    run.optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), clip)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.step()
    return float(norm)


def count_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


class TorchFiles(Files):
    """`torch.save`, atomically, with the state of torch's random numbers: dropout goes on where it was."""

    def write(self, path: Path, model: Any, optimizer: Any, user: dict[str, Any]) -> None:
        content = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "user": user,
        }
        write_whole(path, content)

    def read(self, path: Path) -> Any:
        content = load(path)
        if not isinstance(content, dict) or "user" not in content:
            raise ValueError("expected a file that this script saved, got another one")
        return content["user"]

    def restore(self, path: Path, model: Any, optimizer: Any) -> None:
        content = load(path)
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
        torch.set_rng_state(content["random"])
        if content["random_cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(content["random_cuda"])


def write_whole(path: Path, content: Any) -> None:
    """Written beside it, on the disk, and then renamed: the file of before, or all of this one."""
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(8)}.part")
    try:
        with temporary.open("xb") as file:  # with the permissions of any new file
            if path.exists():
                shutil.copymode(path, temporary)
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load(path: Path) -> Any:
    """Tensors and plain values alone: no code of a stranger's file is run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever comes of reading a stranger's bytes; the texts speak of torch.load's options
        raise ValueError("expected a file that this script saved, got a truncated or foreign one") from error
