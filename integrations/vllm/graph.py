"""What vLLM calls in place of its compiled graph, in both modes.

Contract
- A split step runs its plan, each micro-batch under the forward context that the session has for it.
- Any other call goes to `whole`: vLLM's own stitching in mode 3; in mode 2 its un-compiled graph, or the un-split plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from dynaflow_serving.integrations.vllm.session import VLLMSession
from dynaflow_serving.ir import Split
from dynaflow_serving.partition.effects import fake_value
from dynaflow_serving.partition.rows import expression
from dynaflow_serving.runtime import Runtime


def token_symbols(gm: fx.GraphModule) -> set[Any]:
    """The sympy symbols of `gm`: vLLM makes only the number of tokens dynamic; several may stand for it."""
    symbols: set[Any] = set()
    for n in gm.graph.nodes:
        if n.op == "placeholder":
            fake = fake_value(n)
            sizes = fake.shape if isinstance(fake, torch.Tensor) else [fake] if isinstance(fake, torch.SymInt) else []
            symbols |= {s for size in sizes for s in expression(size).free_symbols}
    return symbols


class MicroBatchedGraph:
    def __init__(self, session: VLLMSession, runtime: Runtime, whole: Callable[..., Any] | None = None) -> None:
        self.session, self.runtime = session, runtime
        self._whole = whole or self._run_whole
        self._count = runtime.capture.token_counter()

    def __call__(self, *args: Any) -> Any:
        split = self.session.split
        return self._run_split(args, split) if split and self.session.micro_batches else self._whole(*args)

    def _run_whole(self, *args: Any) -> Any:
        return self.runtime.run_whole(args, self._count(args))

    def _run_split(self, args: Sequence[Any], split: Split) -> Any:
        plan = self.session.plan(self.runtime)
        with self.session.entering() as enter:
            return self.runtime.capture.rebuild(plan(args, split.bounds, enter))
