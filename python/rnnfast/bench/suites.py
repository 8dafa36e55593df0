"""The rows of every suite, each with its source. A row is marked with the modes in which its program runs that shape:
"train", "infer" (validation, rollout, scoring) or "step" (streaming).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .rows import CELLS, Row, shape_name

SUITES = ("quick", "real", "square", "gpu")

Shape = tuple[int, int, int, int]

BOTH = ("train", "infer")


def rows_of(suite: str) -> list[Row]:
    return list(_SUITES[suite]())


def rows_of_shapes(shapes: Iterable[Shape], cells: Iterable[str], modes: Iterable[str], **options: Any) -> list[Row]:
    """The suite "custom": every cell and mode for every shape T,B,I,H; a streamed step has T = 1 whatever was given."""
    cells, modes = tuple(cells), tuple(modes)
    return [row for s in shapes for cell in cells for row in _rows("custom", cell, s, modes, **options)]


def _rows(suite: str, cell: str, shape: Shape, modes: Iterable[str], name: str = "", **options: Any) -> Iterator[Row]:
    for mode in modes:
        seq_len, batch_size, input_size, hidden_size = shape
        seq_len = 1 if mode == "step" else seq_len
        row = Row(suite, name, cell, mode, seq_len, batch_size, input_size, hidden_size, **options)
        yield row if name else row.with_(name=shape_name(row))


def _quick() -> Iterator[Row]:
    """Small and middle shapes, under a minute with NumPy alone: latency, a streamed step, odd sizes, a ragged batch."""
    for cell in CELLS:
        yield from _rows("quick", cell, (1, 1, 128, 128), ["step"])
        yield from _rows("quick", cell, (100, 1, 128, 128), ["infer"])
        yield from _rows("quick", cell, (128, 16, 64, 64), ["infer", "train"])
        yield from _rows("quick", cell, (64, 32, 256, 256), ["infer", "train"])
    yield from _rows("quick", "lstm", (77, 7, 97, 97), ["train"])
    yield from _rows("quick", "lstm", (100, 32, 128, 128), ["train"], ragged=0.5)
    yield from _rows("quick", "gru", (100, 32, 128, 128), ["train"], reset=0.03)


def _square() -> Iterator[Row]:
    """I = H from 64 to 1024, B from 1 to 256; the sequence is shorter where a row would take minutes."""
    for cell in CELLS:
        for hidden_size in (64, 128, 256, 512, 1024):
            for batch_size in (1, 8, 32, 64, 256):
                seq_len = 100 if batch_size * hidden_size**2 <= 2**23 else 32
                yield from _rows("square", cell, (seq_len, batch_size, hidden_size, hidden_size), ("infer", "train"))


# (name, cell, (T, B, I, H), modes, options)
_REAL: tuple[tuple[str, str, Shape, tuple[str, ...], dict[str, Any]], ...] = (
    # Silero VAD (github.com/snakers4/silero-vad): a decoder LSTM of 128 units, called once for each 32 ms of speech.
    ("Silero VAD step", "lstm", (1, 1, 128, 128), ("step",), {}),
    # CleanRL (github.com/vwxyzjn/cleanrl, cleanrl/ppo_atari_lstm.py): 8 environments, 128 steps, 512 features, 128
    # units; each of four minibatches replays two whole environments and masks the state where an episode ended.
    ("CleanRL rollout", "lstm", (1, 8, 512, 128), ("infer",), {}),
    ("CleanRL update", "lstm", (128, 2, 512, 128), ("train",), {"reset": 0.01}),
    # PufferLib (github.com/PufferAI/PufferLib): default LSTM policy of 128 units, backpropagated through 16 steps.
    ("PufferLib", "lstm", (16, 32, 128, 128), ("train",), {}),
    # TorchRL (github.com/pytorch/rl, torchrl/modules GRUModule with is_init marks): recurrent PPO on batches of
    # trajectories with about 3 % of the steps starting an episode.
    ("TorchRL", "gru", (128, 128, 256, 256), ("train",), {"reset": 0.03}),
    # Isaac Lab with RSL-RL (github.com/isaac-sim/IsaacLab, github.com/leggedrobotics/rsl_rl, ActorCriticRecurrent):
    # proprioceptive observations, LSTM 256, short rollouts of many environments.
    ("Isaac Lab", "lstm", (16, 256, 48, 256), ("train",), {}),
    # DeepAR as in GluonTS (github.com/awslabs/gluonts; Salinas et al. 2017): 2 layers of 40, batch 32, hourly series
    # with 48 + 24 steps; decoding draws 100 sample paths of each of the 32 series, one step at a time.
    ("DeepAR", "lstm", (72, 32, 8, 40), BOTH, {"layers": 2}),
    ("DeepAR decoding", "lstm", (1, 3200, 8, 40), ("infer",), {"layers": 2}),
    # neuralforecast (github.com/Nixtla/neuralforecast, models.LSTM): 2 encoder layers of 128.
    ("neuralforecast", "lstm", (72, 128, 4, 128), BOTH, {"layers": 2}),
    # Darts (github.com/unit8co/darts, RNNModel with its defaults): hidden_dim 25, training_length 24, batch 32.
    ("Darts RNN", "rnn", (24, 32, 1, 25), BOTH, {}),
    ("Darts LSTM", "lstm", (24, 32, 1, 25), BOTH, {}),
    ("Darts GRU", "gru", (24, 32, 1, 25), BOTH, {}),
    # RNNoise (github.com/xiph/rnnoise, torch/rnnoise): three GRUs of 384 after two convolutions, 10 ms frames.
    ("RNNoise", "gru", (200, 32, 384, 384), ("train",), {"layers": 3}),
    # Neural Amp Modeler (github.com/sdatkinson/neural-amp-modeler, models/recurrent.py): one LSTM over raw samples.
    ("NAM amplifier", "lstm", (512, 16, 1, 24), BOTH, {}),
    # GuitarLSTM (github.com/GuitarML/GuitarLSTM) and relatives: LSTM of 16 units over windows of raw samples.
    ("GuitarLSTM", "lstm", (1000, 50, 1, 16), BOTH, {}),
    # Penn Treebank language models of Zaremba et al. 2014 (arXiv:1409.2329), "small" and "medium".
    ("PTB small", "lstm", (20, 20, 200, 200), BOTH, {"layers": 2}),
    ("PTB medium", "lstm", (35, 20, 650, 650), BOTH, {"layers": 2}),
    # AWD-LSTM (Merity et al. 2017, arXiv:1708.02182; github.com/salesforce/awd-lstm-lm): 400 in, 3 layers of 1150.
    ("AWD-LSTM", "lstm", (70, 40, 400, 1150), ("train",), {"layers": 3}),
    # Character language model of 1024 units on windows of 50 characters, batch 100, as in char-rnn
    # (github.com/karpathy/char-rnn) and its successors.
    ("char LM", "lstm", (50, 100, 100, 1024), ("train",), {}),
    # PsychRNN (github.com/murraylab/PsychRNN): ReLU RNN of 50 units on perceptual decisions, 10 ms steps.
    ("PsychRNN", "rnn_relu", (200, 64, 2, 50), BOTH, {}),
    # neurogym (github.com/neurogym/neurogym, supervised examples): sequences of 100 steps, batch 16, LSTM 64.
    ("neurogym", "lstm", (100, 16, 3, 64), BOTH, {}),
    # BiLSTM tagger on word vectors of 300 (Huang et al. 2015, arXiv:1508.01991): sentences to 60 words, 22 on average.
    ("BiLSTM tagger", "lstm", (60, 32, 300, 256), BOTH, {"bidirectional": True, "ragged": 0.37}),
    # Acoustic model on 80 filterbanks, 3 BiLSTM layers of 320 as in the recipes of EESEN and ESPnet.
    ("speech BiLSTM", "lstm", (300, 16, 80, 320), BOTH, {"layers": 3, "bidirectional": True, "ragged": 0.7}),
    # JSB Chorales, 88 keys (Boulanger-Lewandowski et al. 2012), GRU of 46 units (Chung et al. 2014, arXiv:1412.3555).
    ("chorales", "gru", (61, 16, 88, 46), BOTH, {"ragged": 0.75}),
)


def _real() -> Iterator[Row]:
    for name, cell, shape, modes, options in _REAL:
        yield from _rows("real", cell, shape, modes, name, **options)


# DeepBench (github.com/baidu-research/DeepBench, code/kernels/rnn_problems.h): hidden size, batch, steps; I = H.
_DEEPBENCH: tuple[tuple[str, Shape], ...] = (
    *(("lstm", (25, batch, size, size)) for size in (512, 1024, 2048) for batch in (16, 64, 128)),
    ("lstm", (150, 64, 256, 256)),
    ("gru", (1500, 32, 1024, 1024)),
    ("rnn", (50, 32, 1760, 1760)),
)


def _gpu() -> Iterator[Row]:
    """About 150 rows: DeepBench, one row or more for each region of cuDNN's dispatch, ragged, bidirectional, B = 1."""
    for cell, shape in _DEEPBENCH:
        yield from _gpu_rows(cell, shape, ("float32", "float16"))
    for batch_size in (1, 16, 64):  # small: one block or one cluster for a slice of the batch
        for hidden_size in (128, 256, 512):
            yield from _gpu_rows("lstm", (256, batch_size, hidden_size, hidden_size), ("bfloat16",))
    for cell in ("gru", "rnn"):
        for batch_size, hidden_size in ((1, 128), (64, 128), (64, 256), (64, 512)):
            yield from _gpu_rows(cell, (256, batch_size, hidden_size, hidden_size), ("bfloat16",))
    yield from _gpu_rows("lstm", (256, 16, 768, 768), ("float16", "float32"))  # cuDNN's best box
    for batch_size in (1, 16, 64):  # grid-persistent
        for hidden_size in (1024, 2048):
            yield from _gpu_rows("lstm", (128, batch_size, hidden_size, hidden_size), ("bfloat16",))
    for cell in ("gru", "rnn"):
        yield from _gpu_rows(cell, (128, 16, 1024, 1024), ("float32", "bfloat16"))
    yield from _gpu_rows("lstm", (200, 7, 97, 97), ("float32",))
    for cell in CELLS:
        yield from _gpu_rows(cell, (256, 64, 128, 128), ("float32",))
        yield from _gpu_rows(cell, (256, 64, 256, 256), ("float32",))  # with the input product (in bfloat16 above),
        yield from _gpu_rows(cell, (256, 64, 8, 256), ("float32", "bfloat16"))  # and next to none
        # What cuDNN runs a launch a step: ragged, bidirectional (and odd sizes, above); and double precision.
        yield from _gpu_rows(cell, (200, 64, 256, 256), ("float32", "bfloat16"), ragged=0.5)
        yield from _gpu_rows(cell, (200, 32, 256, 256), ("bfloat16",), bidirectional=True)
        yield from _gpu_rows(cell, (100, 16, 128, 128), ("float64",))
        yield from _rows("gpu", cell, (1, 1, 128, 128), ["step"], device="cuda")


def gpu_grid() -> list[Row]:
    """Every cell, dtype, B and I = H of interest, both modes, for `bench/gpu.sh --full`."""
    shapes = [(128, batch, size, size) for size in (128, 256, 512, 1024, 2048) for batch in (1, 16, 64, 128, 256)]
    return [
        row for cell in CELLS for shape in shapes for row in _gpu_rows(cell, shape, ("float32", "float16", "bfloat16"))
    ]


def _gpu_rows(cell: str, shape: Shape, dtypes: Iterable[str], **options: Any) -> Iterator[Row]:
    for dtype in dtypes:
        yield from _rows("gpu", cell, shape, ("infer", "train"), dtype=dtype, device="cuda", **options)


_SUITES: dict[str, Callable[[], Iterator[Row]]] = {"quick": _quick, "real": _real, "square": _square, "gpu": _gpu}
