"""Which arguments and results of a call hold the batch.

Contract
- The user may name them. Otherwise each tensor argument is one whose size at the batch dimension is the most frequent
  above 1.
- That is a guess: a table may happen to have as many rows. Where the guess cannot be proved, `shared_inputs` looks for
  arguments without which it can, and these are shared by all micro-batches from the next call on.
- An argument that is known not to hold the batch keeps a static size, so that no graph takes it for one that does.
- Results that hold the batch are marked, so that the next graph of a model with graph breaks can be split, too.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import fx

from dynaflow_serving.capture.fx.axes import Axes
from dynaflow_serving.capture.fx.buffers import result_list, result_of
from dynaflow_serving.capture.fx.symbols import expression, fake_value, has_tokens
from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.errors import ConfigError, unknown_name

_MOST_SHARED = 2  # so many arguments at most are tried as shared at once


class BatchedArguments:
    """Chooses the tensors of a call that share the batch size."""

    def __init__(self, model: Callable[..., Any], dim: int, names: Sequence[str] | None) -> None:
        """Prepare for the calls of a model.

        Args:
            model: The model.
            dim: The dimension of the batch.
            names: The arguments that hold the batch, by the names of the model's parameters; None to guess.

        Raises:
            ConfigError: The model has no parameter of such a name.
        """
        forward = model.forward if isinstance(model, torch.nn.Module) else model
        try:
            self._signature = inspect.signature(forward)
        except ValueError:  # a built-in function does not say
            self._signature = inspect.signature(lambda *args, **kwargs: None)
        self._dim, self._names = dim, names
        self._shared: set[str] = set()
        open_ended = any(p.kind is p.VAR_KEYWORD for p in self._signature.parameters.values())
        for name in names or ():
            if name not in self._signature.parameters and not open_ended:
                raise ConfigError(unknown_name("batched argument", name, self._signature.parameters))

    def of_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """Return the tensors that hold the batch; they have the same size at its dimension."""
        if self._names is None and not self._shared:
            return self._most_frequent([*args, *kwargs.values()])
        given = self._by_name(args, kwargs)
        chosen = given.keys() - self._shared if self._names is None else set(self._names)
        found = self._most_frequent([value for name, value in given.items() if name in chosen])
        for value in given.values():
            if self._may_be_batched(value) and all(value is not tensor for tensor in found):
                torch._dynamo.mark_static(value, self._dim)
        return found

    def share(self, found: Sequence[int], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Take batched tensors of a call as shared from now on.

        Args:
            found: Their positions among the batched tensors.
            args: The positional arguments of the call.
            kwargs: The keyword arguments of the call.

        Returns:
            Whether there are any.
        """
        batched = self.of_call(args, kwargs) if found else []
        shared = [batched[i] for i in found]
        given = self._by_name(args, kwargs) if found else {}
        self._shared |= {name for name, value in given.items() if any(value is tensor for tensor in shared)}
        return bool(found)

    def _most_frequent(self, values: Sequence[Any]) -> list[torch.Tensor]:
        tensors = [value for value in values if self._may_be_batched(value)]
        sizes = [t.shape[self._dim] for t in tensors]
        size = max(sizes, key=lambda size: (size > 1, sizes.count(size)), default=0)
        return [t for t in tensors if t.shape[self._dim] == size]

    def _may_be_batched(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.dim() > self._dim

    def _by_name(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments by their parameters, those of `*args` by their position there."""
        found: dict[str, Any] = {}
        for name, value in self._signature.bind(*args, **kwargs).arguments.items():
            match self._signature.parameters[name].kind:
                case inspect.Parameter.VAR_POSITIONAL:
                    found |= {f"{name}[{i}]": item for i, item in enumerate(value)}
                case inspect.Parameter.VAR_KEYWORD:
                    found |= value
                case _:
                    found[name] = value
        return found


def shared_inputs(gm: fx.GraphModule, tokens: Set[Any]) -> tuple[int, ...]:
    """Return the batched inputs that must be shared for the graph to be split; () if no such few inputs are found.

    Args:
        gm: A graph that Dynamo has captured, of a function whose argument `batched` lists the batched tensors.
        tokens: The token symbols.
    """
    numbers = {n.name: int(m[1]) for n in gm.graph.nodes if (m := re.fullmatch(r"l_batched_(\d+)_", n.name))}
    inputs = [n.name for n in gm.graph.nodes if n.name in numbers and has_tokens(fake_value(n), tokens)]
    for count in range(1, min(_MOST_SHARED, len(inputs) - 1) + 1):
        for names in itertools.combinations(reversed(inputs), count):
            if not Axes(gm, {}, tokens, shared=frozenset(names)).reason:
                return tuple(numbers[name] for name in names)
    return ()


def unrelated_inputs(gm: fx.GraphModule, batch_dim: int, symbols: Set[Any]) -> list[str]:
    """Return the inputs that seem to be batched, but whose size at `batch_dim` is none of `symbols`.

    Their size was the same number while tracing. A split would hand them whole to every micro-batch.
    """
    sizes: dict[str, Any] = {
        n.name: fake.shape[batch_dim]
        for n in gm.graph.nodes
        if n.op == "placeholder" and isinstance(fake := fake_value(n), torch.Tensor) and fake.dim() > batch_dim
    }
    batch = {s.node.hint for s in sizes.values() if expression(s) in symbols}
    others = {name: s for name, s in sizes.items() if expression(s).is_Symbol and expression(s) not in symbols}
    return [name for name, s in others.items() if s.node.hint in batch]


def result_axes(gm: fx.GraphModule, captured: CapturedProgram) -> list[tuple[int, int]]:
    """Return the positions of the graph's results that have a token axis, with that axis."""
    if not isinstance(result_of(gm), tuple | list):
        return []
    axes = {node: captured.program.values[v].axis for v, node in captured.nodes.items() if v in captured.program.values}
    found = [(i, axes.get(result.name)) for i, result in enumerate(result_list(gm)) if isinstance(result, fx.Node)]
    return [(i, axis) for i, axis in found if axis is not None]


def marked_dynamic(function: Callable[..., Any], axes: list[tuple[int, int]]) -> Callable[..., Any]:
    """Return a `function` that marks the token axes of its results, so that the next graph can be split, too."""

    def run_and_mark(*args: Any) -> Any:
        results = function(*args)
        for i, axis in axes:
            torch._dynamo.maybe_mark_dynamic(results[i], axis)
        return results

    return run_and_mark
