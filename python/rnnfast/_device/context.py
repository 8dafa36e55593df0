"""What a forward call keeps, and its backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .arguments import Arguments, Given

if TYPE_CHECKING:
    from .stack import Stack


class Context:
    """What a training-mode forward keeps for its backward, with the interface of ``_core.Context``."""

    def __init__(
        self,
        layers: Stack,
        arguments: Arguments,
        given: Given,
        calls: tuple[Callable[..., Any], Any],
        reserve: Any,
        sizes: tuple[int, int],
        batch_first: bool,
    ) -> None:
        self._layers, self._arguments, self._given, self._reserve = layers, arguments, given, reserve
        self._make_call, self._call = calls
        self._sizes, self._batch_first = sizes, batch_first
        self._stream = arguments.library.current_stream(arguments.like)
        self.consumed = False

    @property
    def nbytes(self) -> int:
        return int(self._reserve.shape[0])

    @property
    def plan(self) -> str:
        return str(self._call.plan())

    def rebind(
        self,
        layers: Stack,
        x: Any,
        h0: Any,
        c0: Any,
        weights: Sequence[Any],
        reset: Any,
        reset_h: Any,
        reset_c: Any,
        output: Any,
        lengths: Any,
    ) -> None:
        """Read the same arrays from other memory: a compiler may have used the forward's for something else."""
        given = Given(x, h0, c0, weights, lengths, reset, reset_h, reset_c)
        for name, before, now in zip(Given._fields, self._given, given, strict=True):
            if (before is None) != (now is None) or (name == "x" and before.shape != now.shape):
                raise ValueError(f"{name}: expected what the forward was given")
        arguments = Arguments(layers.dtype, weights[0])
        given, views = layers.bind(arguments, given, self._batch_first)
        output = arguments.array("output", output, (*given.x.shape[:2], layers.directions * layers.P))
        views["output"] = arguments.sequence(output, self._batch_first)
        self._call = self._make_call(views=views, weights=layers.views_of(arguments, given.weights))
        self._given, self._arguments = given, arguments

    def backward(
        self,
        grad_output: Any,
        grad_hn: Any,
        grad_cn: Any,
        grad_h_all: Any,
        grad_c_all: Any,
        need_grad_x: bool,
        need_grad_weights: bool,
        retain: bool,
        record: bool,
        grad_x: Any = None,
        need_grad_state: bool = True,
    ) -> tuple[Any, ...]:
        """(grad_x, grad_h0, grad_c0, [grad_weights], grad_reset_h, grad_reset_c, grad_h)

        The gradients of the initial states are made even where they are not needed.
        """
        if self.consumed:
            raise RuntimeError(
                "backward: this forward's reserve has been used up by an earlier backward; give that one retain=True"
            )
        layers, (steps, batch) = self._layers, self._sizes
        if not layers.has_cell_state and not (grad_cn is None and grad_c_all is None):
            raise ValueError("grad_state: this cell has no cell state, expected one array")
        arguments = Arguments(layers.dtype, self._arguments.like)
        outer = (batch, steps) if self._batch_first else (steps, batch)
        given: dict[str, Any] = {}

        def read(name: str, key: str, array: Any, shape: Sequence[int]) -> None:
            if array is not None:
                whole = len(shape) == 4  # its layout is fixed
                array = arguments.adopt(name, array)
                array = arguments.library.contiguous(array) if whole and arguments.library.owns(array) else array
                given[key] = arguments.array(name, array, shape)

        state_h, state_c = (layers.states, batch, layers.P), (layers.states, batch, layers.H)
        read("grad_output", "grad_output", grad_output, (*outer, layers.directions * layers.P))
        read("grad_state", "grad_hn", grad_hn, state_h)
        read("grad_state", "grad_cn", grad_cn, state_c)
        read("grad_states", "grad_h_all", grad_h_all, (steps, *state_h))
        read("grad_states", "grad_c_all", grad_c_all, (steps, *state_c))
        made: dict[str, Any] = {"grad_h0": arguments.empty(state_h)}
        if need_grad_x:
            made["grad_x"] = arguments.target("grad_x", grad_x, (*outer, layers.input_size))
        if layers.has_cell_state:
            made["grad_c0"] = arguments.empty(state_c)
        if self._given.reset_h is not None:
            made["grad_reset_h"] = arguments.empty(state_h)
        if self._given.reset_c is not None:
            made["grad_reset_c"] = arguments.empty(state_c)
        if record:
            made["record_h"] = arguments.empty((steps, *state_h))
        views = {key: arguments.view(array) for key, array in (given | made).items()}
        for key in ("grad_output", "grad_x"):
            views[key] = arguments.sequence((given | made).get(key), self._batch_first)
        grad_weights = [arguments.empty(tuple(w.shape)) for w in self._given.weights] if need_grad_weights else []
        targets = [arguments.view(g) for g in layers.each(grad_weights)] if need_grad_weights else []
        self._run(arguments, views, targets, retain)
        names = ("grad_x", "grad_h0", "grad_c0", None, "grad_reset_h", "grad_reset_c", "record_h")
        return tuple(grad_weights if name is None else made.get(name) for name in names)

    def _run(self, arguments: Arguments, views: dict[str, Any], targets: list[Any], retain: bool) -> None:
        library, like = arguments.library, arguments.like
        with library.current(like):
            workspace = arguments.memory(self._call.backward_bytes(views, targets, retain))
            self.consumed = not retain
            self._call.backward(
                views,
                targets,
                retain,
                arguments.aligned(self._reserve),
                arguments.aligned(workspace),
                library.stream(like),
            )
            library.lend([self._reserve, *self._arguments.kept], self._stream)
