"""One worker's DynaFlow state: the strategy, its runtimes, and the step in flight.

Contract
- `current()` is the session of the worker in this process (vLLM's Dynamo backends have no other way to
  reach it); a new engine in the same process replaces it.
- A step is *live* between `begin` and `end`, that is inside `execute_model`; dummy, profiling and capture
  runs are not live, run un-split and are not counted.
- Ranks agree: `agree` compares the plan digests of all tensor-parallel ranks and raises on a difference.
"""

from __future__ import annotations

import difflib
import logging
from collections import Counter
from typing import Any

from dynaflow_serving.config import load
from dynaflow_serving.errors import InactiveError, ScheduleError
from dynaflow_serving.executor import get_executor
from dynaflow_serving.integrations.vllm.engine_args import KEY, PIECE_COMPILER
from dynaflow_serving.ir import Batch, Split
from dynaflow_serving.partition import Capture
from dynaflow_serving.runtime import Runtime
from dynaflow_serving.splitting import whole

logger = logging.getLogger("vllm.dynaflow")
_current: Session | None = None


def current() -> Session:
    if _current is None:
        raise InactiveError("no DynaFlow worker in this process: the worker class was replaced by another plugin")
    return _current


class Session:
    def __init__(self, vllm_config: Any, device_type: str) -> None:
        global _current
        self.vllm_config = vllm_config
        self.config = load(vllm_config.additional_config[KEY])
        self.strategy = self.config.build()
        self.executor = get_executor(self.config.executor, device_type)
        self.piece_compiler: str = vllm_config.additional_config.get(PIECE_COMPILER, "")
        self.runtimes: list[Runtime] = []
        self.split: Split | None = None  # of the live step
        self.split_steps = 0
        self.unsplit_steps: Counter[str] = Counter()
        _current = self

    @property
    def max_micro_batches(self) -> int:
        return self.strategy.max_micro_batches

    def add(self, capture: Capture) -> Runtime:
        runtime = Runtime(capture, self.strategy, self.executor)
        self.runtimes.append(runtime)
        return runtime

    def begin(self, batch: Batch) -> Split:
        """Decide the live step's split, the same on all ranks: it depends on the batch and the program only."""
        if not self.runtimes:
            raise InactiveError("vLLM has served a step without compiling a graph through DynaFlow")
        split = self.strategy.split(batch)
        if len(split.micro_batches) > self.max_micro_batches:
            raise ScheduleError(
                f"strategy {self.strategy.name!r} made {len(split.micro_batches)} micro-batches, more than its "
                f"max_micro_batches ({self.max_micro_batches})"
            )
        for runtime in self.runtimes:
            if len(split.micro_batches) > 1:
                split = runtime.admit(batch, split)
        self.split = split
        if len(split.micro_batches) > 1:
            if not self.split_steps:
                sizes = [p.tokens[1] - p.tokens[0] for p in split.micro_batches]
                logger.info("DynaFlow: first split step, %d micro-batches of %s tokens", len(sizes), sizes)
            self.split_steps += 1
        else:
            self.unsplit_steps[split.reason] += 1
        return split

    def refuse(self, batch: Batch, reason: str) -> None:
        """Run the live step un-split for a reason of the engine's."""
        self.split = whole(batch, reason)
        self.unsplit_steps[reason] += 1

    def end(self) -> None:
        self.split = None

    def agree(self, group: Any) -> None:
        """Compare what this rank will run with every other rank of `group` (a CPU process group)."""
        import torch.distributed as dist

        texts = [self._prepare(runtime) for runtime in self.runtimes]
        everyone: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, texts, group=group)
        for rank, other in enumerate(everyone):
            if other != texts:
                mine, theirs = "\n".join(texts).splitlines(), "\n".join(other).splitlines()
                shown = "\n".join(list(difflib.unified_diff(mine, theirs, "this rank", f"rank {rank}", n=2))[:40])
                raise InactiveError(f"tensor-parallel ranks would run different plans:\n{shown}")

    def _prepare(self, runtime: Runtime) -> str:
        program = runtime.capture.program
        if program.unsplittable or self.max_micro_batches < 2:
            return program.to_text()
        return "\n".join(runtime.prepare((n, ())).plan.to_text() for n in range(2, self.max_micro_batches + 1))

    def report(self) -> dict[str, Any]:
        """What `dynaflow bench` and `dynaflow explain` show."""
        mode = getattr(self.vllm_config.compilation_config.mode, "name", "")
        plans = [p for r in self.runtimes for p in r.plans if p.micro_batches > 1]
        return {
            "strategy": self.strategy.name,
            "mode": f"{mode} ({self.piece_compiler or 'vLLM pieces'})",
            "steps": {"split": self.split_steps, "unsplit": dict(self.unsplit_steps)},
            "plan_hash": plans[-1].digest if plans else "",
            "programs": [
                {"program": r.capture.program.to_text(), "plans": [p.to_text() for p in r.plans]} for r in self.runtimes
            ],
        }

    def reset(self) -> None:
        self.split_steps = 0
        self.unsplit_steps.clear()

    def close(self) -> None:
        logger.info("DynaFlow: %d steps split, un-split: %s", self.split_steps, dict(self.unsplit_steps) or "none")
        self.executor.close()
