"""A contender: the program of the contender "torch" with one import changed, packed sequences and all.

rnnfast bench --suite real --mode train --against torch,bench/dropin.py
"""

from __future__ import annotations

import rnnfast.torch
from rnnfast.bench.arrays import Arrays
from rnnfast.bench.rivals import Job, Setup
from rnnfast.bench.rivals import torch as rival
from rnnfast.bench.rows import Row

available = rival.available


class Network(rival.Network):
    library = rnnfast.torch


def version() -> str:
    return rnnfast.__version__


def prepare(row: Row, arrays: Arrays, setup: Setup) -> Job:
    rival.torch.set_num_threads(setup.threads)  # rnnfast.torch follows
    return Network(row, arrays, setup).job()
