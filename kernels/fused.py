"""A registered kernel in the place of operators that compute the same.

Contract
- When a plan is bound, the kernel's work is found in the operators' own graphs (`fusions.py`). They say where the
  arguments are, what the constants are, and which results are wanted.
- Operators that compute anything else are refused, before anything runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from dynaflow_serving.capture.fx.symbols import fake_value
from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.core.order import external_ports
from dynaflow_serving.core.plan import Action, Plan
from dynaflow_serving.errors import ScheduleError
from dynaflow_serving.kernels import Composed, get_kernel
from dynaflow_serving.kernels.fusions import find_fusions


class Fused(Composed):
    """The kernel that is registered as `kernel`, which is its name in a Plan's text, too."""

    def __init__(self, kernel: str) -> None:
        self.__name__ = kernel

    def __call__(self, capture: CapturedProgram, plan: Plan, action: Action) -> Callable[..., Any]:
        """Raises `ScheduleError` where the operators compute anything else, and without triton."""
        graph = _joined(capture, action.operators)
        holders = [n for n in graph.nodes if n.op == "placeholder"]
        results = graph.output_node().all_input_nodes
        for fusion in find_fusions(graph):
            if fusion.kernel == self.__name__ and set(results) <= set(fusion.outputs):
                kernel = get_kernel(self.__name__, **fusion.constants)
                return _called(
                    kernel, [holders.index(n) for n in fusion.inputs], [fusion.outputs.index(n) for n in results]
                )
        raise ScheduleError(
            f"kernel {self.__name__!r} cannot stand in for {' + '.join(action.operators)}: their graphs compute "
            "something else, or keep values for gradients; run under torch.no_grad(), or leave out replace="
        )


def _called(kernel: Callable[..., Any], arguments: list[int], places: list[int]) -> Callable[..., Any]:
    """`kernel`, given the inputs at `arguments`; of several results those at `places`."""

    def call(*inputs: Any) -> Any:
        results = kernel(*(inputs[i] for i in arguments))
        if not isinstance(results, tuple):
            return results
        return tuple(results[i] for i in places) if len(places) > 1 else results[places[0]]

    return call


def _joined(capture: CapturedProgram, operators: tuple[str, ...]) -> fx.Graph:
    """The graphs of `operators` as one, with the group's external ports in their order."""
    inputs, outputs = external_ports(capture.program, operators)
    graph = fx.Graph()
    nodes = {v: graph.placeholder(v) for v in inputs}
    for name in operators:
        op, piece = capture.program.by_name[name], capture.pieces[name].graph
        holders = [n for n in piece.nodes if n.op == "placeholder"]
        given = {holder: nodes[v] for holder, v in zip(holders, op.inputs, strict=True)}
        for holder, node in given.items():
            node.meta.setdefault("val", fake_value(holder))
        result = graph.graph_copy(piece, given)
        nodes.update(zip(op.outputs, result if isinstance(result, tuple | list) else (result,), strict=True))
    graph.output(tuple(nodes[v] for v in outputs))
    return graph
