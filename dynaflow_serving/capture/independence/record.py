"""A graph's ATen operators, recorded for two numbers of tokens.

Contract
- The graph runs on fake tensors: nothing is computed, and no memory is needed. Composite calls (multi-head attention,
  einsum) become the operators that they consist of.
- Each recorded call knows the node of the captured graph that made it, which errors name.
- A number that differs between the two recordings depends on the number of tokens. No other number does.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._guards import tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from dynaflow_serving.capture.independence.placement import Mixes

# Neither divides a usual size, and their quotient is no whole number. Both are even, as two devices need, and above 25,
# where torch chooses another way to compute distances.
TOKENS = (34, 46)

# Some operators behave otherwise for these: a bare `squeeze` for 1, a bare `cross` for 3.
FEW_TOKENS = (1, 3)

# Higher-order operators that only call their first argument, a graph, with the others.
_CALLS_A_GRAPH = ("tag_activation_checkpoint", "wrap")


@dataclass(frozen=True)
class Call:
    """One ATen operator, called for the first number of tokens (`args`, `out`) and for the second (`others`).

    Attributes:
        func: The operator.
        args: Its arguments by name; those that are left out have their default.
        out: Its result.
        others: `args` for the second number of tokens.
        other_out: `out` for the second number of tokens.
    """

    func: torch._ops.OpOverload
    args: dict[str, Any]
    out: Any
    others: dict[str, Any]
    other_out: Any

    @cached_property
    def name(self) -> str:
        """The operator's name with namespace and without overload, such as `aten::view`."""
        return str(self.func._schema.name)

    @cached_property
    def changed(self) -> frozenset[str]:
        """The arguments whose numbers depend on the number of tokens."""
        return frozenset(n for n, a in self.args.items() if numbers(a) != numbers(self.others[n]))

    @cached_property
    def tensors(self) -> list[torch.Tensor]:
        return [a for a in pytree.tree_leaves(self.args) if isinstance(a, torch.Tensor)]

    @cached_property
    def results(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The tensors in the result, each for both numbers of tokens."""
        first, second = pytree.tree_leaves(self.out), pytree.tree_leaves(self.other_out)
        if len(first) != len(second):
            raise Mixes("has another number of results for another number of tokens")
        return [(a, b) for a, b in zip(first, second) if isinstance(a, torch.Tensor)]


def numbers(argument: Any) -> list[Any]:
    """Return what of an argument is no tensor, in a form that is equal to itself (NaN)."""
    return [None if isinstance(a, torch.Tensor) else repr(a) for a in pytree.tree_leaves(argument)]


@dataclass
class Recording:
    """One run of a graph.

    Attributes:
        calls: (node, operator, arguments by name, result), in order.
        values: node -> its value.
        failed: The node that could not run, and why.
    """

    calls: list[tuple[fx.Node, torch._ops.OpOverload, dict[str, Any], Any]] = field(default_factory=list)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    failed: tuple[fx.Node, str] | None = None


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, recording: Recording) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording = recording
        self.node: Any = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.recording.calls.append((self.node, func, by_name(func, args, kwargs or {}), out))
        return out


def by_name(func: torch._ops.OpOverload, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by the names in the operator's schema."""
    given = {a.name: kwargs.get(a.name, a.default_value) for a in func._schema.arguments}
    return given | {a.name: value for a, value in zip(func._schema.arguments, args)}


def record(
    graph: fx.GraphModule,
    pieces: Mapping[str, fx.GraphModule],
    fake: Callable[[fx.Node, FakeTensorMode, int], Any],
    tokens: int,
) -> Recording:
    """Run `graph` for a number of tokens.

    Args:
        graph: A stitched graph.
        pieces: submodule -> its graph, whose nodes are run in its place.
        fake: Returns the fake value of an input for a number of tokens.
        tokens: The number of tokens.
    """
    recording, mode = Recording(), FakeTensorMode(allow_non_fake_inputs=True)
    inputs = [fake(n, mode, tokens) for n in graph.graph.nodes if n.op == "placeholder"]
    with mode, _Recorder(recording) as recorder:
        _Run(recording, recorder, pieces).graph(graph, inputs)
    return recording


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Run a block apart from the compilation that is under way: without its tracing, modes and grad mode.

    torch's warnings and logs are silent there: they speak of fake tensors and meshes that no user has.
    """
    grad, before = torch.is_grad_enabled(), logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), _disable_current_modes(), tracing(None), torch.inference_mode(False):
            warnings.simplefilter("ignore")
            torch.set_grad_enabled(False)
            yield
    finally:
        logging.disable(before)
        torch.set_grad_enabled(grad)  # a graph may hold nodes that set it


class _Failed(Exception):
    """A node could not run; `Recording.failed` says which."""


class _Run:
    """Runs a graph node by node."""

    def __init__(self, recording: Recording, recorder: _Recorder, pieces: Mapping[str, fx.GraphModule]) -> None:
        self._recording, self._recorder, self._pieces = recording, recorder, pieces

    def graph(self, graph: fx.GraphModule, inputs: list[Any]) -> None:
        with contextlib.suppress(_Failed):
            self._nodes(graph, inputs)

    def _nodes(self, graph: fx.GraphModule, inputs: list[Any]) -> Any:
        given, values = iter(inputs), self._recording.values
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(given)
            elif node.op == "get_attr":
                values[node] = _attribute(graph, str(node.target))
            elif node.op == "output":
                return fx.node.map_arg(node.args[0], values.__getitem__)
            else:
                args = fx.node.map_arg(node.args, values.__getitem__)
                kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
                values[node] = self._call(graph, node, args, kwargs)
        return None

    def _call(self, graph: fx.GraphModule, node: fx.Node, args: Any, kwargs: Any) -> Any:
        self._recorder.node = node
        if node.op == "call_module" and str(node.target) in self._pieces:
            return self._nodes(self._pieces[str(node.target)], list(args))
        try:
            return _called(graph, node)(*args, **kwargs)
        except _Failed:
            raise
        except Mixes as problem:
            self._recording.failed = node, str(problem)
            raise _Failed from None
        except Exception as e:
            cause = str(e).strip().splitlines()
            self._recording.failed = node, f"cannot be followed: {cause[0] if cause else type(e).__name__}"
            raise _Failed from None


def _called(graph: fx.GraphModule, node: fx.Node) -> Callable[..., Any]:
    """Return what a node calls."""
    target: Any = node.target
    if node.op == "call_method":
        return lambda self, *args, **kwargs: getattr(self, target)(*args, **kwargs)
    if node.op == "call_module":
        module: Callable[..., Any] = graph.get_submodule(target)
        return module
    if isinstance(target, torch._ops.HigherOrderOperator):
        if target.__name__ in _CALLS_A_GRAPH:
            return lambda body, *args, **_: body(*args)
        called = f" of {node.args[0]}" if node.args and isinstance(node.args[0], torch._ops.OpOverload) else ""
        raise Mixes(f"is the higher-order operator {target.__name__}{called}, for which there is no rule")
    function: Callable[..., Any] = target
    return function


def _attribute(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module
