"""A matrix product and the sum of its result over the ranks, in chunks: one is sent while the next is computed.

This is Flux (arXiv 2406.06858) on the level of operators instead of tiles, for graphs in which the product and the
collective are operators of their own. `in_chunks` does it for models without a graph.

Contract
- The first operator is one `aten.mm` and views of its result (`reduced_products` finds them), the second one
  all-reduce of a sum. Nothing else reads the product.
- Rows of the product are independent, so the batch may be anything. With fewer rows than chunks, some are empty, and
  left out.
- It runs on the calling stream; the collectives run beside it as the group's backend does it, one after the other. All
  have ended, or are waited for by the stream, when it returns.
- It is equal to the operators as they are, up to the matmul kernel that fewer rows take. Unmeasured on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import fx

from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.core.plan import Action, Plan
from dynaflow_serving.errors import ScheduleError
from dynaflow_serving.kernels import Composed
from dynaflow_serving.kernels.collectives import group_of_sum
from dynaflow_serving.kernels.in_chunks import chunks_of
from dynaflow_serving.strategy.rules import function_names

_VIEWS = {"view", "_unsafe_view", "reshape"}


class ReducedProduct(Composed):
    """The kernel that runs a product and its all-reduce in so many chunks."""

    def __init__(self, chunks: int) -> None:
        self.__name__ = f"reduced_product[{chunks}]"
        self.chunks = chunks

    def __call__(self, capture: CapturedProgram, plan: Plan, action: Action) -> Callable[..., Any]:
        """Raises `ScheduleError` where the operators are anything else."""
        graph = capture.pieces[action.operators[0]].graph
        found = [node for node in graph.nodes if "aten::mm" in function_names(node)]
        if len(action.operators) != 2 or len(found) != 1:
            raise ScheduleError(
                f"{self.__name__} runs a product and its all-reduce, not {' + '.join(action.operators)}"
            )
        group = group_of_sum(capture, action.operators[1])
        (mm,) = found
        holders = graph.find_nodes(op="placeholder")
        x, weight = (holders.index(argument) for argument in mm.args)
        chunks, views = self.chunks, _views(graph, mm)

        def call(*inputs: Any) -> torch.Tensor:
            rows = inputs[x]
            result = rows.new_empty(rows.shape[0], inputs[weight].shape[1])
            sent = []
            for start, stop in chunks_of(rows.shape[0], chunks):
                if start < stop:
                    part = torch.mm(rows[start:stop], inputs[weight], out=result[start:stop])
                    sent.append(dist.all_reduce(part, group=group, async_op=True))
            for work in sent:
                work.wait()
            viewed: torch.Tensor = views(result, *inputs)
            return viewed

        return call


def reduced_products(graph: fx.Graph, collective: str) -> dict[str, str]:
    """Find the products whose only reader is `collective`: node -> the product that it is or views."""
    found: dict[str, str] = {}
    for node in graph.nodes:
        if "aten::mm" not in function_names(node):
            continue
        chain = [node]
        while len(chain[-1].users) == 1:
            (reader,) = chain[-1].users
            names = function_names(reader)
            if collective in names:
                found |= {member.name: node.name for member in chain}
            if not names & _VIEWS:
                break
            chain.append(reader)
    return found


def _views(graph: fx.Graph, mm: fx.Node) -> Callable[..., Any]:
    """Return the views of the product as a function of it and of the operator's inputs."""
    views = fx.Graph()
    product = views.placeholder("product")
    copied: dict[fx.Node, fx.Node] = {mm: product}
    for node in graph.nodes:
        if node.op == "placeholder":
            copied[node] = views.placeholder(node.name)
        elif node is not mm:
            copied[node] = views.node_copy(node, copied.__getitem__)
    forward: Callable[..., Any] = fx.GraphModule({}, views).forward
    return forward
