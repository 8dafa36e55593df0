"""A stack of layers and its forward call."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from .. import reference
from .._tf32 import get_tf32
from . import extension
from .arguments import Arguments, Given
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
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout: expected a probability from 0 to 1, got {dropout}")
        if not self.has_cell_state and not (c0 is None and reset_c is None):
            raise ValueError("hx, reset_state: this cell has no cell state, expected one array")
        matrices = packed.weights if packed is not None else weights
        if isinstance(matrices, Packed):
            if training:
                raise ValueError("weights: expected arrays in training, got packed weights")
            matrices = matrices.weights
        arguments = Arguments(self.dtype, matrices[0] if len(matrices) else None)
        given = Given(x, h0, c0, matrices, lengths, reset, reset_h, reset_c)
        given, views = self.bind(arguments, given, batch_first)
        outer = tuple(given.x.shape[:2])
        steps, batch = outer[::-1] if batch_first else outer
        results = {
            "output": arguments.target("output", output, (*outer, self.directions * self.P)),
            **self._states(arguments, batch, (hn, cn), running_c),
        }
        if return_states:
            results |= self._all_states(arguments, steps, batch)
        views |= {name: arguments.view(array) for name, array in results.items()}
        views["output"] = arguments.sequence(results["output"], batch_first)
        make_call = partial(
            extension.load().Call,
            cell=self.cell,
            dtype=self.dtype,
            sizes=self.sizes,
            bias=self.bias,
            parameters=self.parameters,
            steps=steps,
            batch=batch,
            training=training,
            dropout=dropout if self.dropping else 0.0,
            seed=seed,
            call=call,
            checkpoint_every=checkpoint_every if lean or checkpoint_every else None,
            tf32=get_tf32(),
        )
        engine_call = make_call(views=views, weights=self.views_of(arguments, given.weights))
        reserve = self._run(arguments, engine_call)
        context = None
        if training:
            context = Context(self, arguments, given, (make_call, engine_call), reserve, (steps, batch), batch_first)
        return *(results.get(name) for name in ("output", "hn", "cn", "h_all", "c_all")), context

    def bind(self, arguments: Arguments, given: Given, batch_first: bool) -> tuple[Given, dict[str, Any]]:
        """What a call is given, checked, and where the extension finds it, by name; weights apart."""
        x = arguments.array("x", given.x, (None, None, self.input_size))
        outer = tuple(x.shape[:2])
        steps, batch = outer[::-1] if batch_first else outer
        weights = self._weights(arguments, given.weights)
        reset_h = self._state(arguments, "reset_state", given.reset_h, batch, self.P, True)
        reset_c = self._state(arguments, "reset_state", given.reset_c, batch, self.H, True)
        views = {
            "x": arguments.sequence(x, batch_first),
            "h0": arguments.state(self._state(arguments, "hx", given.h0, batch, self.P)),
            "c0": arguments.state(self._state(arguments, "hx", given.c0, batch, self.H)),
            "reset_h": arguments.state(reset_h),
            "reset_c": arguments.state(reset_c),
        }
        if given.lengths is not None:
            views["lengths"] = arguments.view(arguments.integers("lengths", given.lengths, (batch,), "int64", steps))
        if given.reset is not None:
            flags = arguments.integers("reset", given.reset, outer, "bool", 1)
            views["reset"] = arguments.sequence(flags, batch_first)
        return given._replace(x=x, weights=weights), views

    def _states(self, arguments: Arguments, batch: int, given: Sequence[Any], running_c: Any) -> dict[str, Any]:
        """hn and cn, to be written: the caller's where they are `given`."""
        hn, cn = given
        states = {"hn": arguments.target("hn", hn, (self.states, batch, self.P))}
        if running_c is not None:
            states["running_c"] = arguments.keep(running_c)
        elif self.has_cell_state:
            states["cn"] = arguments.target("cn", cn, (self.states, batch, self.H))
        return states

    def _all_states(self, arguments: Arguments, steps: int, batch: int) -> dict[str, Any]:
        states = {"h_all": arguments.empty((steps, self.states, batch, self.P))}
        if self.has_cell_state:
            states["c_all"] = arguments.empty((steps, self.states, batch, self.H))
        return states

    def views_of(self, arguments: Arguments, weights: Sequence[Any]) -> list[Any]:
        return [arguments.view(matrix) for matrix in self.each(weights)]

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
