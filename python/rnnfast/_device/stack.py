"""A stack of layers and its forward call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import reference
from . import extension
from .arguments import Arguments
from .context import Context
from .libraries import library_of

DTYPES = ("float32", "float64", "float16", "bfloat16")


class Packed:
    """Weights pinned when made, for `Stack.forward` when not training."""

    def __init__(self, layers: Stack, weights: Sequence[Any]) -> None:
        library = library_of(weights[0])
        if library is None:
            raise TypeError("weights: expected arrays on a CUDA device")
        self.layers = layers
        self.weights = [library.copy(weight) for weight in weights]


class Stack:
    """The configuration of a stack of recurrent layers, with the interface of ``_core.Stack``."""

    def __init__(
        self,
        cell: str,
        dtype: str,
        input_size: int,
        hidden_size: int,
        proj_size: int,
        num_layers: int,
        num_directions: int,
        bias: bool,
        parameters: Sequence[float],
    ) -> None:
        missing = extension.unavailable()
        if missing:
            raise RuntimeError(f"device: {missing}")
        if dtype not in DTYPES:
            raise TypeError(f"dtype: expected {', '.join(DTYPES)}, got {dtype}")
        self.cell, self.dtype, self.parameters = cell, dtype, list(parameters)
        self.sizes = [input_size, hidden_size, proj_size, num_layers, num_directions]
        self.input_size, self.H, self.P = input_size, hidden_size, proj_size or hidden_size
        self.states, self.directions, self.bias = num_layers * num_directions, num_directions, bias
        self.dropping = num_layers > 1
        self.has_cell_state = reference.CELLS[cell].has_c
        self.weight_shapes = reference.weight_shapes(
            cell,
            input_size,
            hidden_size,
            proj_size=proj_size,
            num_layers=num_layers,
            bidirectional=num_directions == 2,
            bias=bias,
        )

    def each(self, weights: Sequence[Any]) -> list[Any]:
        """Five for each layer and direction, as the extension takes them: None for what there is not."""
        flat, result = iter(weights), []
        for _ in range(self.states):
            result += [next(flat), next(flat)]
            result += [next(flat), next(flat)] if self.bias else [None, None]
            result += [next(flat)] if self.sizes[2] else [None]
        return result

    def forward(
        self,
        x: Any,
        h0: Any,
        c0: Any,
        weights: Any,
        batch_first: bool,
        training: bool,
        lengths: Any,
        reset: Any,
        reset_h: Any,
        reset_c: Any,
        return_states: bool,
        dropout: float,
        seed: int,
        call: int,
        output: Any = None,
        hn: Any = None,
        cn: Any = None,
        packed: Packed | None = None,
        lean: bool = False,
        checkpoint_every: int = 0,
        running_c: Any = None,
    ) -> tuple[Any, ...]:
        """(output, hn, cn, h_all, c_all, context); what was not asked for, or does not exist, is None.

        `running_c` [L, B, H], in at least float32, is read in the place of c0 and takes the place of cn.
        """
        if lean or checkpoint_every:
            raise ValueError("lean, checkpoint_every: expected neither on a CUDA device, which has no lean mode yet")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout: expected a probability from 0 to 1, got {dropout}")
        if not self.has_cell_state and not (c0 is None and reset_c is None):
            raise ValueError("hx, reset_state: this cell has no cell state, expected one array")
        given = packed.weights if packed is not None else weights
        if isinstance(given, Packed):
            if training:
                raise ValueError("weights: expected arrays in training, got packed weights")
            given = given.weights
        arguments = Arguments(self.dtype, given[0] if len(given) else None)
        x = arguments.array("x", x, (None, None, self.input_size))
        outer = tuple(x.shape[:2])
        steps, batch = outer[::-1] if batch_first else outer
        matrices = self._weights(arguments, given)
        results = self._results(arguments, outer, batch_first, return_states, (output, hn, cn))
        if running_c is not None:
            results.pop("cn")
        views = {
            "x": arguments.sequence(x, batch_first),
            "h0": arguments.state(self._state(arguments, "hx", h0, batch, self.P)),
            "c0": arguments.state(self._state(arguments, "hx", c0, batch, self.H)),
            "reset_h": arguments.state(self._state(arguments, "reset_state", reset_h, batch, self.P, True)),
            "reset_c": arguments.state(self._state(arguments, "reset_state", reset_c, batch, self.H, True)),
            "running_c": arguments.view(arguments.keep(running_c)),
            "output": arguments.sequence(results["output"], batch_first),
        }
        views |= {name: arguments.view(array) for name, array in results.items() if name != "output"}
        if lengths is not None:
            views["lengths"] = arguments.view(arguments.integers("lengths", lengths, (batch,), "int64", steps))
        if reset is not None:
            flags = arguments.integers("reset", reset, outer, "bool", 1)
            views["reset"] = arguments.sequence(flags, batch_first)
        engine_call = extension.load().Call(
            cell=self.cell,
            dtype=self.dtype,
            sizes=self.sizes,
            bias=self.bias,
            parameters=self.parameters,
            steps=steps,
            batch=batch,
            training=training,
            views=views,
            weights=[arguments.view(matrix) for matrix in self.each(matrices)],
            dropout=dropout if self.dropping else 0.0,
            seed=seed,
            call=call,
        )
        reserve = self._run(arguments, engine_call)
        context = None
        if training:
            resets = (reset_h is not None, reset_c is not None)
            context = Context(self, arguments, engine_call, reserve, matrices, (steps, batch), batch_first, resets)
        return *(results.get(name) for name in ("output", "hn", "cn", "h_all", "c_all")), context

    def _results(
        self, arguments: Arguments, outer: tuple[int, ...], batch_first: bool, return_states: bool, given: Sequence[Any]
    ) -> dict[str, Any]:
        """The arrays to be written, the caller's where they are `given` (output, hn, cn)."""
        steps, batch = outer[::-1] if batch_first else outer
        state_h, state_c = (self.states, batch, self.P), (self.states, batch, self.H)
        output, hn, cn = given
        results = {
            "output": arguments.target("output", output, (*outer, self.directions * self.P)),
            "hn": arguments.target("hn", hn, state_h),
        }
        if self.has_cell_state:
            results["cn"] = arguments.target("cn", cn, state_c)
        if return_states:
            results["h_all"] = arguments.empty((steps, *state_h))
        if return_states and self.has_cell_state:
            results["c_all"] = arguments.empty((steps, *state_c))
        return results

    def _run(self, arguments: Arguments, engine_call: Any) -> Any:
        """The call, on the current stream of the arrays' library; its reserve."""
        library, like = arguments.library, arguments.like
        with library.current(like):  # whose device the engine plans for
            reserve_bytes, workspace_bytes = engine_call.forward_bytes()
            reserve, workspace = arguments.memory(reserve_bytes), arguments.memory(workspace_bytes)
            stream = library.stream(like)
            engine_call.forward(arguments.aligned(reserve), arguments.aligned(workspace), stream)
        arguments.kept = [array for array in arguments.kept if array is not workspace]
        return reserve

    def _weights(self, arguments: Arguments, weights: Sequence[Any]) -> list[Any]:
        if len(weights) != len(self.weight_shapes):
            raise ValueError(f"weights: expected {len(self.weight_shapes)} arrays, got {len(weights)}")
        named = zip(self.weight_shapes.items(), weights, strict=True)
        return [arguments.weight(name, weight, shape) for (name, shape), weight in named]

    def _state(
        self, arguments: Arguments, name: str, array: Any, batch: int, width: int, broadcast: bool = False
    ) -> Any:
        if array is None:
            return None
        one = broadcast and len(array.shape) == 3 and array.shape[1] == 1
        return arguments.array(name, array, (self.states, 1 if one else batch, width))
