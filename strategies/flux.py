"""Flux (arXiv 2406.06858; DynaFlow paper, section 6): products in chunks, each beside the collective of another.

The batch is not split. In tensor parallelism a product with sharded rows is summed over the ranks, and in sequence
parallelism the input of one with sharded columns is gathered before:

    compute  mm 0  mm 1  mm 2                              mm 0  mm 1  mm 2
    network        ar 0  ar 1  ar 2            ag 0  ag 1  ag 2

Flux cuts by tiles, inside one kernel. So do torch's kernels over symmetric memory, which Megatron-LM's integration
takes on CUDA with sequence parallelism. Elsewhere this cuts by rows, between kernels. The batch may be a single
sequence, but in sequence parallelism: there the collective cuts the sequence, so the chunks are of sequences.

**Contract**
- In a model without a graph, the integration's products hold their collectives (`kernels/in_chunks.py`).
- In a graph at level "aot", a product is an operator, and so is the all-reduce that is its only reader
  (`kernels/reduced_product.py`). In training, that is so in the backward graph, too.
"""

from __future__ import annotations

from pydantic import Field
from torch import fx

from dynaflow_serving.core.program import Operator, Program
from dynaflow_serving.kernels.in_chunks import InChunks
from dynaflow_serving.kernels.reduced_product import ReducedProduct, reduced_products
from dynaflow_serving.strategy.base import Options, UnsplitScheduler
from dynaflow_serving.strategy.registry import register_strategy
from dynaflow_serving.strategy.rules import GraphRule
from dynaflow_serving.strategy.schedule import Schedule, Task
from dynaflow_serving.strategy.streams import COMPUTE
from dynaflow_serving.strategy.tags import Tag, TagUse

PRODUCTS = (Tag.ROW_PARALLEL, Tag.COLUMN_PARALLEL)


class ReducedProductRule(GraphRule):
    """Matches the products of a graph that the collective `target` alone reads."""

    def find(self, graph: fx.Graph) -> dict[str, str]:
        return reduced_products(graph, self.target)


class FluxOptions(Options):
    chunks: int = Field(2, ge=2, description="how many chunks a matrix product with a collective is cut into")


@register_strategy("flux")
class Flux(UnsplitScheduler[FluxOptions]):
    annotations = (
        ReducedProductRule(
            "_c10d_functional::all_reduce", "row_parallel", tags=(Tag.ROW_PARALLEL,), required=False, lowered=True
        ),
    )
    unsplit_reason = "flux cuts matrix products, not the batch"
    looks_for = (TagUse(PRODUCTS, "nothing is cut"),)
    takes_whole = PRODUCTS

    def schedule(self, s: Schedule) -> None:
        within = {dim: InChunks(self.options.chunks, dim) for dim in (0, 1)}
        reduced = ReducedProduct(self.options.chunks)
        while ready := s.get_ready_ops():
            task = ready[0]
            if not set(PRODUCTS) & set(task.tags):
                s.execute(task)
            elif Tag.ONE_KERNEL in task.tags:
                s.execute(task, stream=COMPUTE)
            elif (reduction := _reduction(s, task)) is not None:
                s.execute([task, reduction], stream=COMPUTE, replace=reduced)
            else:
                s.execute(task, stream=COMPUTE, replace=within[_dim(s.program, task.operator)])


def _reduction(s: Schedule, product: Task) -> Task | None:
    """Return the all-reduce of a product, where it is an operator of its own."""
    readers = s.successors(product)
    return readers[0] if len(readers) == 1 and Tag.ALL_REDUCE in readers[0].tags else None


def _dim(program: Program, operator: Operator) -> int:
    """Return the dimension to cut: the batch's where the collective cuts or joins the first one."""
    axis = program.values[operator.inputs[0]].axis
    return axis or 0 if Tag.SEQUENCE_PARALLEL in operator.tags else 0
