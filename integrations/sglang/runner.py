"""A ModelRunner under DynaFlow: decides each step's split, and runs the model's body in micro-batches.

Contract
- Two methods of two objects are replaced, and nothing of SGLang's classes: `ModelRunner._forward_raw`, which every
  real step passes (warm-up and graph capture call the model directly and run whole), and the forward of the body,
  which is all of the model but the head and sampling.
- A split step uses no CUDA graph: a graph replays the whole batch with its own attention metadata. Un-split steps
  replay as ever.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from dynaflow_serving.config import Config
from dynaflow_serving.errors import InactiveError
from dynaflow_serving.integrations.session import Session
from dynaflow_serving.integrations.sglang.limits import reason_to_run_whole
from dynaflow_serving.integrations.sglang.micro_batches import MicroBatches, check_layout, describe
from dynaflow_serving.ir import Batch, Split
from dynaflow_serving.splitting import whole

logger = logging.getLogger("sglang.dynaflow")


class LoopSession(Session):
    """Until bodies are cut into segments: whole micro-batches one after the other, whatever the strategy schedules."""

    def begin(self, batch: Batch) -> Split:
        self.split = split = self.strategy.split(batch)
        self.counts.add(split)
        return split


class DynaflowRunner:
    """`session` decides and counts; `backends` are the attention backends, one per micro-batch."""

    def __init__(self, runner: Any, config: Config) -> None:
        self.runner, self.body = runner, body_of(runner.model)
        check_layout(self.body)
        self.session = LoopSession(config, str(runner.device).partition(":")[0], "eager", logger)
        self.backends: list[Any] = []
        self._forward_raw, self._forward = runner._forward_raw, self.body.forward
        self._init_attention_backends = runner.init_attention_backends

    def install(self) -> None:
        self.runner.dynaflow = self
        self.runner._forward_raw = self.step
        self.runner.init_attention_backends = self.init_attention_backends
        self.body.forward = self.forward

    def init_attention_backends(self) -> None:
        self._init_attention_backends()
        self.make_backends()

    def make_backends(self) -> None:
        self.backends = [self.runner._get_attention_backend() for _ in range(self.session.max_micro_batches)]

    def check(self, group: Any) -> None:
        """Raise `InactiveError` unless this rank can serve; `group`: of all ranks, for CPU objects."""

    def step(self, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        """In place of `ModelRunner._forward_raw`."""
        if forward_batch.batch_size == 0:  # an idle rank
            return self._forward_raw(forward_batch, *args, **kwargs)
        runner, batch = self.runner, describe(forward_batch)
        if reason := reason_to_run_whole(forward_batch):
            self.session.counts.add(whole(batch, reason))
            return self._forward_raw(forward_batch, *args, **kwargs)
        split = self.session.begin(batch)
        try:
            if len(split.micro_batches) == 1:
                return self._forward_raw(forward_batch, *args, **kwargs)
            graphs = runner.decode_cuda_graph_runner, runner.prefill_cuda_graph_runner
            runner.decode_cuda_graph_runner = runner.prefill_cuda_graph_runner = None
            try:
                return self._forward_raw(forward_batch, *args, **kwargs)
            finally:
                runner.decode_cuda_graph_runner, runner.prefill_cuda_graph_runner = graphs
                # SGLang may have told its scheduler that this step has read the request table once the whole batch
                # was planned; our backends plan after that. Without the event it waits for the whole step.
                runner.shared_read_done_event = None
        finally:
            self.session.end()

    def forward(self, input_ids: Any, positions: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        """In place of the body's forward."""
        split = self.session.split
        if split is None or len(split.micro_batches) == 1:
            return self._forward(input_ids, positions, forward_batch, *args, **kwargs)
        micro_batches = MicroBatches(forward_batch, split, self.backends)
        try:
            outputs = []
            for index in range(len(split.micro_batches)):
                micro_batches.enter(index)
                outputs.append(self._forward(*micro_batches.arguments(index), *args, **kwargs))
        finally:
            micro_batches.leave()
        return torch.cat(outputs)


def body_of(model: torch.nn.Module) -> torch.nn.Module:
    """The decoder stack of a `...ForCausalLM`: embedding to final norm."""
    body = getattr(model, "model", None)
    if not isinstance(body, torch.nn.Module):
        raise InactiveError(
            f"{type(model).__name__} keeps its decoder stack in no attribute 'model': this model is not supported yet"
        )
    return body
