"""Accuracy of the examples that use rnnfast.torch: what others published, what ours reach, and in what time.

`TASKS` maps a name to a function of a seed and of who computes the recurrent layers: "rnnfast", or "torch", that is
torch.nn's layer, called with packed sequences where rnnfast's is called with lengths. Everything else is the same: the
example's own data, model, loop and early stopping on validation data. The test part is looked at once, at the end.
`run.py` calls them.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import harness
import harness_torch
from clock import Clock, Stopped
from harness_torch import torch

DATA = Path(os.environ.get("RNNFAST_DATA", "data"))


# torch.nn's layers with rnnfast's lengths ----------------------------------------------------------------------------


def packed(layer: Any) -> Any:
    """A subclass of torch.nn's `layer` that takes `lengths=`, as those of rnnfast.torch do."""

    class Packed(layer):
        def forward(self, x: Any, state: Any = None, lengths: Any = None) -> Any:
            if lengths is None:
                return super().forward(x, state)
            pack = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
            output, state = super().forward(pack, state)
            return torch.nn.utils.rnn.pad_packed_sequence(output, total_length=len(x))[0], state

    return Packed


LAYERS = {"lstm": packed(torch.nn.LSTM), "gru": packed(torch.nn.GRU), "rnn": packed(torch.nn.RNN)}


@contextmanager
def layers_of(layer: str) -> Iterator[None]:
    """Let the examples build their models from rnnfast's layers or from torch's."""
    before = dict(harness_torch.CELLS)
    if layer == "torch":
        harness_torch.CELLS.update(LAYERS)
    try:
        yield
    finally:
        harness_torch.CELLS.update(before)


# The tasks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One figure of one example."""

    script: str
    task: str  # the script's subclass of harness.Task
    metric: str  # the key of its result
    unit: str
    published: float | None
    source: str  # who published it, or why nobody did
    settings: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, seed: int = 0, layer: str = "rnnfast", limit: float | None = None) -> dict[str, Any]:
        module = importlib.import_module(self.script)
        with layers_of(layer):
            settings = module.Settings(**self.settings, seed=seed)
            data = module.load(settings, {"data": None, **self.options})
            run, clock = harness.new_run(module.SCRIPT, settings, data), Clock(limit)
            try:
                task = clock.watch(getattr(module, self.task)(data))
                harness.train(module.SCRIPT, run, task, None, None, None)
                figures = {"ours": run.test[self.metric], "validation": run.best, "test": run.test}
                result = figures | {"steps": run.step, "seconds": run.seconds}
            except Stopped:
                result = clock.figures()
        return {"unit": self.unit, "published": self.published, "source": self.source, "seed": seed, **result}


SPEAKERS = ("george", "jackson", "lucas", "nicolas")
FSDD = {"data": [DATA / f"speech/fsdd_{speaker}.tar.gz" for speaker in SPEAKERS]}
PUBLISHED_DIGITS = {  # BiLSTM 50, 39 MFCCs, Adam 2e-3, batches of 64, 15 epochs
    "unit": "recordings",
    "features": "mfcc",
    "stack": 1,
    "hidden": 50,
    "layers": 1,
    "dropout": 0.0,
    "speeds": 1,
    "mask": 0.0,
    "lr": 0.002,
    "batch": 64,
    "steps": 375,
    "evaluate": 25,
    "patience": 50,
}
OUR_DIGITS = PUBLISHED_DIGITS | {"dropout": 0.3, "speeds": 3, "mask": 0.15, "steps": 1125, "evaluate": 75}
PROMPTS = {"data": [DATA / "speech/asterisk_en_le2s.tar.gz"], "transcripts": DATA / "speech/core-sounds-en.txt"}


def digits(source: str, settings: dict[str, Any], published: float | None = None) -> Task:
    return Task("speech", "Recognising", "exact", "share of recordings", published, source, settings, FSDD)


VERSES = DATA / "translation/kjv_rv1909_en_es.tsv.gz"

TASKS = {
    "digits, random split, published settings": digits("BiLSTM 50, six speakers", PUBLISHED_DIGITS, 0.973),
    "digits, random split": digits("BiLSTM 50, six speakers", OUR_DIGITS, 0.973),
    "digits, official split": digits("no figure for these four speakers", OUR_DIGITS | {"split": "official"}),
    **{
        f"digits, without {speaker}": digits("no figure for these four speakers", OUR_DIGITS | {"split": speaker})
        for speaker in SPEAKERS
    },
    "prompts": Task(
        "speech", "Recognising", "cer", "share of characters wrong", None, "our own split, one voice", {}, PROMPTS
    ),
    "addition": Task(
        "addition", "Answering", "characters", "share of characters", 0.99, "Keras's addition_rnn, 55 epochs", {}
    ),
    "translation of dates": Task(
        "translation", "Translating", "exact", "share", None, "our own task: nobody's figure", {}
    ),
    "translation of verses": Task(
        script="translation",
        task="Translating",
        metric="bleu",
        unit="BLEU",
        published=None,
        source="our own split: nobody's figure",
        settings={
            "columns": "5,4",
            "unit": "subwords",
            "vocabulary": 2000,
            "longest": 24,
            "hidden": 256,
            "dropout": 0.2,
            "smoothing": 0.1,
            "lr": 0.003,
            "steps": 1500,  # ten times the pairs: ten minutes; it learns on
            "evaluate": 250,
        },
        options={"data": VERSES},
    ),
}
