"""torch.nn's recurrent layers on rnnfast's kernels: `RNN`, `LSTM`, `GRU`.

Parameters, initialisation, `repr`, pickling and `state_dict` are torch.nn.RNNBase's own. Here is the call: its
arguments, their shapes, and the errors in torch's words.

Sizes: T time, B batch, I input_size, H hidden_size, P proj_size or H, L num_layers, D directions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..functional import memory_mode
from . import fallback, kernels, route
from .kernels import NO_EXTRAS, Extras, Inputs, Options, WeightCache
from .packed import pack, permute, unpack

__all__ = ["GRU", "LSTM", "RNN"]

CELLS = {"LSTM": "lstm", "GRU": "gru", "RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu"}

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Layer(torch.nn.RNNBase):
    """What `RNN`, `LSTM` and `GRU` share: the call.

    ``layer(input, hx)`` is torch.nn's. Beyond it, as in `rnnfast.LSTM`:

    lengths : integer Tensor [B], optional
        The valid steps of each row, any order, zero allowed: `output` is zero past them, the state is that after the
        last one, the reverse direction starts there. Takes the place of packing.
    reset : bool or 0/1 Tensor [T, B] ([B, T] with ``batch_first``), optional
        True starts a new segment: the state before step t is replaced by zero or by `reset_state`.
    reset_state : Tensor [L*D, B or 1, P], for an LSTM a pair, optional
        Gets its gradient.
    return_states : bool
        Also return the states of every layer and step, [T, L*D, B, P], for an LSTM a pair.
    lean : bool
        Keep no gates for the backward pass, which makes them again, to the same bits.
    checkpoint_every : int, optional
        For very long sequences: lean, and the cell state is kept before every so many steps only.

    With a PackedSequence, `reset` is [T, B], and its rows, like those of all states, are in the order of the batch
    before packing.
    """

    _weight_cache: WeightCache | None = None

    def flatten_parameters(self) -> None:
        """Nothing: the kernels take the parameters as they are."""

    def forward(
        self,
        input: Any,
        hx: Any = None,
        *,
        lengths: Any = None,
        reset: Any = None,
        reset_state: Any = None,
        return_states: bool = False,
        lean: bool = False,
        checkpoint_every: int | None = None,
    ) -> tuple[Any, ...]:
        plain = lengths is None and reset is None and reset_state is None and checkpoint_every is None
        if plain and not (return_states or lean):
            result = self._infer(input, hx)
            if result is not None:
                return result
        packed = isinstance(input, PackedSequence)
        if not packed and input.dim() not in (2, 3):
            raise ValueError(f"{self._name()}: Expected input to be 2D or 3D, got {input.dim()}D instead")
        unbatched = not packed and input.dim() == 2
        h0, c0 = self._states("hx", hx, 2 if unbatched else 3)
        reset_h, reset_c = self._states("reset_state", reset_state, 2 if unbatched else 3)
        batch_first = self.batch_first and not packed and not unbatched
        options = self._options(batch_first, return_states, *memory_mode(lean, checkpoint_every))
        if packed:
            outputs = self._run_packed(options, input, (h0, c0, reset_h, reset_c), lengths, reset)
        elif unbatched:
            sources = (input, h0, c0, reset_h, reset_c)
            inputs = Inputs.from_flat([*(None if s is None else s.unsqueeze(1) for s in sources), *self._weights()])
            lengths = None if lengths is None else torch.as_tensor(lengths).reshape(1)
            reset = None if reset is None else torch.as_tensor(reset).unsqueeze(1)
            outputs = self._run(options, inputs, lengths, reset)
            outputs = tuple(None if o is None else o.squeeze(-2) for o in outputs)
        else:
            inputs = Inputs(input, h0, c0, reset_h, reset_c, self._weights())
            outputs = self._run(options, inputs, lengths, reset)
        return self._results(outputs, return_states)

    def _infer(self, x: Any, hx: Any) -> tuple[Any, ...] | None:
        """The results of a plain call without a graph; None where it is another one, or the first."""
        state = states_of(hx, self.mode == "LSTM")
        if state is None or (self.training and self.dropout and self.num_layers > 1):
            return None
        kind = CELLS[self.mode], self.num_layers, self.bidirectional
        packed = route.packed_for(kind, self._weights(), self._weight_cache, x, *state)
        outputs = None if packed is None else kernels.infer(packed, x, *state, self.batch_first)
        if outputs is None:
            return None
        output, hn, cn = outputs
        return (output, hn) if cn is None else (output, (hn, cn))

    def _results(self, outputs: tuple[Any, ...], return_states: bool) -> tuple[Any, ...]:
        output, hn, cn, h_all, c_all = outputs
        if self.mode == "LSTM":
            return (output, (hn, cn), (h_all, c_all)) if return_states else (output, (hn, cn))
        return (output, hn, h_all) if return_states else (output, hn)

    # ---- ways to run ----

    def _run(self, options: Options, inputs: Inputs, lengths: Any, reset: Any, packing: str = "") -> tuple[Any, ...]:
        """The five outputs of a batch, each None where it does not exist."""
        x, weight = inputs.x, inputs.weights[0]
        autocast = fallback.autocasts(x)
        self._check(inputs, options.batch_first, autocast)
        extras = make_extras(x, options.batch_first, lengths, reset)
        if extras.reset is None and inputs.reset_h is not None:
            raise ValueError("reset_state: expected None without reset")
        why = fallback.reason(x, weight)
        if why is not None and fallback.announce(why):
            return fallback.run(options, inputs, extras, self.training, None)
        extras = fallback.draw_seed(options, extras)
        if not autocast:
            return route.run(options, inputs, extras, self._cache)
        layer = (self.num_layers, self.bias, self.batch_first, self.dropout, self.bidirectional, self.proj_size)
        return fallback.run_in_autocast(
            self._name(),
            layer,
            lambda converted: route.run(options, converted, extras, self._cache),
            inputs,
            self.training,
            packing,
        )

    def _run_packed(
        self, options: Options, sequence: PackedSequence, states: tuple[Any, ...], lengths: Any, reset: Any
    ) -> tuple[Any, ...]:
        """As `_run`; output is a PackedSequence."""
        if lengths is not None:
            raise ValueError("lengths: expected None with a PackedSequence, which has its own")
        data, weights = sequence.data, self._weights()
        if data.dim() != 2:
            raise RuntimeError(f"input must have 2 dimensions, got {data.dim()}")
        why = fallback.reason(data, weights[0])
        if why is not None and reset is None and not options.return_states and fallback.announce(why):
            return self._fall_back_packed(options, sequence, states, weights)
        padded = unpack(sequence)
        inputs = Inputs.from_flat([padded.x, *states, *weights])
        sizes, packing = sequence.batch_sizes, "even"
        if fallback.autocasts(data) and bool((sizes != sizes[0]).any()):
            packing = "ragged"
        output, *rest = self._run(options, inputs, padded.lengths, reset, packing)
        return pack(output, padded, sequence), *rest

    def _fall_back_packed(
        self, options: Options, sequence: PackedSequence, states: tuple[Any, ...], weights: list[Any]
    ) -> tuple[Any, ...]:
        sort, unsort = sequence.sorted_indices, sequence.unsorted_indices
        inputs = Inputs.from_flat([sequence.data, *(permute(s, sort) for s in states), *weights])
        output, *rest = fallback.run(options, inputs, NO_EXTRAS, self.training, sequence.batch_sizes)
        like = PackedSequence(output, sequence.batch_sizes, sort, unsort)
        return like, *(permute(s, unsort) for s in rest)

    # ---- arguments ----

    def _name(self) -> str:
        return self.mode.partition("_")[0]  # also of a subclass, or a parametrised module

    def _options(
        self, batch_first: bool, return_states: bool, lean: bool = False, checkpoint_every: int = 0
    ) -> Options:
        dropout = self.dropout if self.training and self.num_layers > 1 else 0.0
        settings = CELLS[self.mode], self.num_layers, self.bidirectional, batch_first, dropout
        return Options(*settings, return_states, lean, checkpoint_every)

    def _weights(self) -> list[Any]:
        """In torch's flat order; through the attributes where a parametrisation or a hook computes them."""
        parameters, names = self._parameters, self._flat_weights_names
        try:
            return [parameters[name] for name in names]
        except KeyError:
            return [getattr(self, name) for name in names]

    def _cache(self) -> WeightCache:
        if self._weight_cache is None:
            self.__dict__["_weight_cache"] = WeightCache()
        return self._weight_cache  # type: ignore[return-value]

    def _states(self, name: str, state: Any, rank: int) -> tuple[Any, Any]:
        """(h, c) of the right rank; c is None but for an LSTM."""
        if state is None:
            return None, None
        if self.mode != "LSTM":
            state = (state,)
        elif not isinstance(state, (tuple, list)) or len(state) != 2:
            got = f"{len(state)} elements" if isinstance(state, (tuple, list)) else type(state).__name__
            raise TypeError(f"{name}: expected a pair (h, c), got {got}")
        for element in state:
            if not isinstance(element, Tensor):
                raise TypeError(f"{name}: expected a Tensor, got {type(element).__name__}")
        if any(element.dim() != rank for element in state):
            got = ", ".join(f"{element.dim()}-D" for element in state)
            names, got = (name, f"{got} tensor") if len(state) == 1 else (f"{name} and cx", f"({got}) tensors")
            batch = "unbatched 2-D" if rank == 2 else "batched 3-D"
            raise RuntimeError(f"For {batch} input, {names} should also be {rank}-D but got {got}")
        return (state[0], None) if len(state) == 1 else (state[0], state[1])

    def _check(self, inputs: Inputs, batch_first: bool, autocast: bool) -> None:
        """Shapes, dtypes and devices, in torch's words where torch checks them, too."""
        x, weight = inputs.x, inputs.weights[0]
        if x.dtype != weight.dtype and not autocast:
            raise ValueError(
                f"RNN input dtype ({x.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}), or convert model: model.to({x.dtype})"
            )
        steps, batch_size, input_size = x.shape
        if batch_first:
            steps, batch_size = batch_size, steps
        if input_size != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input_size}"
            )
        if steps == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        if weight.device != x.device:
            raise RuntimeError(
                f"Input and parameter tensors are not at the same device, found input tensor at {x.device} and "
                f"parameter tensor at {weight.device}"
            )
        if inputs.h0 is not None or inputs.reset_h is not None:
            self._check_states(inputs, batch_size, autocast)

    def _check_states(self, inputs: Inputs, batch_size: int, autocast: bool) -> None:
        runs = self.num_layers * (2 if self.bidirectional else 1)
        shapes = [(runs, batch_size, size) for size in (self.proj_size or self.hidden_size, self.hidden_size)]
        indices = ("[0]", "[1]") if self.mode == "LSTM" else ("", "")
        for name, states in (("hidden", inputs[1:3]), ("reset_state", inputs[3:5])):
            for index, state, shape in zip(indices, states, shapes, strict=True):
                check_state(f"{name}{index}", state, shape, inputs.x, autocast, shared=name == "reset_state")


def states_of(hx: Any, pair: bool) -> tuple[Any, Any] | None:
    """(h, c) of what a module was given, absent ones None; None where a pair was expected and is not there."""
    if hx is None or not pair:
        return hx, None
    if type(hx) is not tuple or len(hx) != 2 or hx[0] is None or hx[1] is None:
        return None
    return hx


def check_state(
    name: str, state: Tensor | None, shape: tuple[int, int, int], x: Tensor, autocast: bool, shared: bool
) -> None:
    """One element of a state; `shared` allows a batch of 1 for all rows."""
    if state is None:
        return
    if tuple(state.shape) != shape and not (shared and tuple(state.shape) == (shape[0], 1, shape[2])):
        raise RuntimeError(f"Expected {name} size {shape}, got {list(state.shape)}")
    if state.dtype != x.dtype and not autocast:
        raise RuntimeError(f"Input and {name} tensors are not the same dtype: {x.dtype} and {state.dtype}")
    if state.device != x.device:
        raise RuntimeError(f"Input and {name} tensors are not at the same device: {x.device} and {state.device}")


def make_extras(x: Tensor, batch_first: bool, lengths: Any, reset: Any) -> Extras:
    """`lengths` as int64 [B] and `reset` as bool, shaped as x without its last axis."""
    if lengths is None and reset is None:
        return NO_EXTRAS
    if lengths is not None:
        lengths = as_tensor("lengths", lengths, x)
        if lengths.dtype not in _INTEGERS:
            raise TypeError(f"lengths: expected integers, got {lengths.dtype}")
        batch_size = x.shape[0 if batch_first else 1]
        if lengths.dim() != 1 or lengths.shape[0] != batch_size:
            raise ValueError(f"lengths: expected shape [{batch_size}], got {list(lengths.shape)}")
        lengths = lengths.to(torch.int64)
    if reset is not None:
        reset = as_tensor("reset", reset, x)
        if tuple(reset.shape) != tuple(x.shape[:2]):
            raise ValueError(f"reset: expected shape {list(x.shape[:2])}, got {list(reset.shape)}")
        if reset.dtype is not torch.bool:
            reset = flags(reset)
    return Extras(lengths, reset, None)


def as_tensor(name: str, values: Any, x: Tensor) -> Tensor:
    """On the device of x."""
    try:
        return torch.as_tensor(values, device=x.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected a Tensor or numbers, got {type(values).__name__} ({error})") from error


def flags(reset: Tensor) -> Tensor:
    """Integers 0 and 1 as bool; the values are looked at where that needs no copy to the host."""
    if reset.dtype not in _INTEGERS:
        raise TypeError(f"reset: expected bool or integers 0 and 1, got {reset.dtype}")
    if not torch.compiler.is_compiling() and type(reset) is Tensor and reset.device.type == "cpu":
        least, most = torch.aminmax(reset) if reset.numel() else (reset.new_zeros(()),) * 2
        if int(least) < 0 or int(most) > 1:
            raise ValueError("reset: expected 0 and 1, got other integers")
    return reset.bool()


class RNN(Layer):
    """torch.nn.RNN: h_t = f(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh) with f = tanh or ReLU.

    The arguments are torch.nn's; see `Layer` for those of the call.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if len(args) > 3:
            self.nonlinearity = args[3]
            args = args[:3] + args[4:]
        else:
            self.nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if self.nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{self.nonlinearity}'. Select from 'tanh' or 'relu'.")
        super().__init__(f"RNN_{self.nonlinearity.upper()}", *args, **kwargs)


class LSTM(Layer):
    """torch.nn.LSTM: i, f, o = σ(…), g = tanh(…), c_t = f∘c_{t-1} + i∘g, h_t = o∘tanh(c_t).

    The arguments are torch.nn's, ``proj_size`` among them; see `Layer` for those of the call.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)


class GRU(Layer):
    """torch.nn.GRU: r, z = σ(…), n = tanh(W_in x + b_in + r∘(W_hn h + b_hn)), h_t = (1-z)∘n + z∘h_{t-1}.

    The arguments are torch.nn's; see `Layer` for those of the call.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__("GRU", *args, **kwargs)
