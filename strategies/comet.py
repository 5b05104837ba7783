"""Comet (arXiv 2502.19811; DynaFlow paper, section 6): the experts of one chunk under the exchange of another.

The batch is not split. Within each layer of experts, the tokens are cut into chunks after routing:

    compute                 E 0         E 1         E 2
    network  D 0  D 1  D 2         C 0         C 1         C 2

D is the dispatch of a chunk, E its experts, C its combine. Comet cuts by tiles, inside one kernel; this cuts by tokens,
between kernels. The batch may be a single sequence.
"""

from __future__ import annotations

from pydantic import Field

from dynaflow_serving.kernels.in_chunks import InChunks
from dynaflow_serving.strategy.base import Options, UnsplitScheduler
from dynaflow_serving.strategy.registry import register_strategy
from dynaflow_serving.strategy.schedule import Schedule
from dynaflow_serving.strategy.streams import COMPUTE
from dynaflow_serving.strategy.tags import Tag, TagUse


class CometOptions(Options):
    chunks: int = Field(2, ge=2, description="how many chunks the tokens of a layer of experts are cut into")


@register_strategy("comet")
class Comet(UnsplitScheduler[CometOptions]):
    unsplit_reason = "comet cuts layers of experts, not the batch"
    looks_for = (TagUse((Tag.EXPERTS,), "nothing is cut"),)
    takes_whole = (Tag.EXPERTS,)

    def schedule(self, s: Schedule) -> None:
        kernel = InChunks(self.options.chunks)
        while ready := s.get_ready_ops():
            cut = Tag.EXPERTS in ready[0].tags
            s.execute(ready[0], stream=COMPUTE if cut else None, replace=kernel if cut else None)
