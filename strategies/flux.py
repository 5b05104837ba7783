"""Flux (arXiv 2406.06858; DynaFlow paper, section 6): products in chunks, each beside the collective of another.

The batch is not split. In tensor parallelism a product with sharded rows is summed over the ranks, and in sequence
parallelism the input of one with sharded columns is gathered before:

    compute  mm 0  mm 1  mm 2                              mm 0  mm 1  mm 2
    network        ar 0  ar 1  ar 2            ag 0  ag 1  ag 2

Flux cuts by tiles, inside one kernel; this cuts by rows, between kernels. The batch may be a single sequence, but in
sequence parallelism: there the collective cuts the sequence, so the chunks are of sequences.
"""

from __future__ import annotations

from pydantic import Field

from dynaflow_serving.core.program import Operator, Program
from dynaflow_serving.kernels.in_chunks import InChunks
from dynaflow_serving.strategy.base import Options, UnsplitScheduler
from dynaflow_serving.strategy.registry import register_strategy
from dynaflow_serving.strategy.schedule import Schedule
from dynaflow_serving.strategy.streams import COMPUTE
from dynaflow_serving.strategy.tags import Tag, TagUse

PRODUCTS = (Tag.ROW_PARALLEL, Tag.COLUMN_PARALLEL)


class FluxOptions(Options):
    chunks: int = Field(2, ge=2, description="how many chunks a matrix product with a collective is cut into")


@register_strategy("flux")
class Flux(UnsplitScheduler[FluxOptions]):
    unsplit_reason = "flux cuts matrix products, not the batch"
    looks_for = (TagUse(PRODUCTS, "nothing is cut"),)
    takes_whole = PRODUCTS

    def schedule(self, s: Schedule) -> None:
        kernels = {dim: InChunks(self.options.chunks, dim) for dim in (0, 1)}
        while ready := s.get_ready_ops():
            operator = ready[0].operator
            if set(PRODUCTS) & set(operator.tags):
                s.execute(ready[0], stream=COMPUTE, replace=kernels[_dim(s.program, operator)])
            else:
                s.execute(ready[0])


def _dim(program: Program, operator: Operator) -> int:
    """Return the dimension to cut: the batch's where the collective cuts or joins the first one."""
    axis = program.values[operator.inputs[0]].axis
    return axis or 0 if Tag.SEQUENCE_PARALLEL in operator.tags else 0
