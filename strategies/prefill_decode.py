"""Prefill runs beside decode in one mixed batch, on one GPU (POD-Attention, arXiv 2410.18038; DuetServe, Bullet).

Prefill attention is bound by compute, decode attention by the KV cache's bandwidth. The step is cut at the border
between the two kinds. `overlap: attention` splits attention only, the rest runs once for both:

    compute  c0@0:2  attention@1 (prefill)  c1@0:2
    decode           attention@0 (decode)

`overlap: all` runs the decode micro-batch whole beside the prefill one; weights are read twice.

**Contract**
- A micro-batch is known by its position: `first` says which kind the engine puts first (vLLM: decode; SGLang's
  mixed chunk: prefill). A step in the other order, or in mixed order, is not split, with the reason.
- Operators that read per-micro-batch context, or have a value without a token axis, are not merged either: each runs
  on the stream of its micro-batch. So does what makes a sum over tokens for one of these: a sum cannot be cut.
- Streams other than compute run operators with context, which worker threads (executor `cpu`) cannot do.
- Unmeasured: no figure of this strategy on a GPU exists yet.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dynaflow_serving.core.batch import Batch, Split
from dynaflow_serving.core.program import Operator, Program, Scope
from dynaflow_serving.strategy.base import OpScheduler, Options
from dynaflow_serving.strategy.registry import register_strategy
from dynaflow_serving.strategy.schedule import Schedule
from dynaflow_serving.strategy.splitting import cut_prefill_decode
from dynaflow_serving.strategy.streams import COMPUTE
from dynaflow_serving.strategy.tags import Tag, TagUse


class PrefillDecodeOptions(Options):
    overlap: Literal["attention", "all"] = Field(
        "attention", description="what runs per micro-batch: attention only, the rest merged; or everything"
    )
    min_tokens: int = Field(
        16, ge=1, description="a step is not split with fewer tokens of either kind (a decode request has one)"
    )
    first: Literal["decode", "prefill"] = Field(
        "decode", description="which kind of request the engine puts first in a batch"
    )


@register_strategy("prefill_decode")
class PrefillDecode(OpScheduler[PrefillDecodeOptions]):
    context_on_streams = True
    looks_for = (TagUse((Tag.ATTENTION,), "only operators that cannot be merged run beside one another"),)

    def split(self, batch: Batch) -> Split:
        return cut_prefill_decode(batch, self.options.min_tokens, self.options.first == "decode")

    def schedule(self, s: Schedule) -> None:
        decode = 0 if self.options.first == "decode" else 1
        apart = {o.name for o in s.program.operators} if self.options.overlap == "all" else _operators_apart(s.program)
        stream_of = {decode: "decode"} if s.micro_batches > 1 else {}
        while ready := s.get_ready_ops():
            groups = [[t for t in ready if t.name == name] for name in dict.fromkeys(t.name for t in ready)]
            together = [g for g in groups if g[0].name in apart or len(g) == s.micro_batches]
            # none: one micro-batch waits for state that another writes, and has to be overtaken
            for group in together or [ready[:1]]:
                if group[0].name in apart or len(group) < s.micro_batches:
                    for task in group:
                        s.execute(task, stream=stream_of.get(task.micro_batch, COMPUTE))
                else:
                    s.execute(group, stream=COMPUTE)


def _operators_apart(program: Program) -> set[str]:
    """Return the operators that run per micro-batch."""
    made_by = {v: o.name for o in program.operators for v in o.outputs}
    apart = {o.name for o in program.operators if _apart(program, o)}
    for op in reversed(program.operators):  # readers come before what makes their sums
        if op.name in apart:
            apart |= {made_by[v] for v in op.inputs if v in made_by and program.values[v].scope is Scope.PARTIAL}
    return apart


def _apart(program: Program, op: Operator) -> bool:
    """Return whether `op` runs per micro-batch: attention, and what cannot be merged."""
    local = any(program.values[v].scope is Scope.LOCAL for v in (*op.inputs, *op.outputs))
    return Tag.ATTENTION in op.tags or op.context or local
