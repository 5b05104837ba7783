"""A ModelRunner under DynaFlow: decides each step's split, and runs the model's body under the plan.

Contract
- Two methods of two objects are replaced, and nothing of SGLang's classes: `ModelRunner._forward_raw`, which every
  real step passes (warm-up and graph capture call the model directly and run whole), and the forward of the body,
  which is all of the model but the head and sampling.
- SGLang has no graph of its models: the body is recorded (`capture.eager`) in two of SGLang's own dummy
  runs, before the scheduler reports ready.
- A split step uses no CUDA graph: a graph replays the whole batch with its own attention metadata. Un-split steps
  replay as ever.
- Where shadow mode compares, the body runs again un-split under the step's own context, and writes the KV cache last.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from dynaflow_serving.config import Config
from dynaflow_serving.core.program import Resource
from dynaflow_serving.errors import InactiveError
from dynaflow_serving.integrations.segmented import SegmentedForward
from dynaflow_serving.integrations.session import Session
from dynaflow_serving.integrations.sglang.limits import reason_to_run_whole
from dynaflow_serving.integrations.sglang.micro_batches import MicroBatches, check_layout, describe
from dynaflow_serving.integrations.sglang.trials import RunnerTrials, facts
from dynaflow_serving.policy.table import default_path
from dynaflow_serving.session.plan_cache import no_context
from dynaflow_serving.strategy.rules import Rule, SplitFunc, SplitModule

GROUP = "sglang.srt.distributed.parallel_state.GroupCoordinator"
# All that a model may call under tensor parallelism: also one that cannot overlap must keep its place in the order.
COLLECTIVES = (
    "all_reduce",
    "quant_all_reduce",
    "fused_allreduce_rmsnorm",
    "reduce_scatter_tensor",
    "reduce_scatter_along_dim",
    "all_gather_into_tensor",
    "all_gather",
)
# The computation of the experts, without the all-reduce that some models have inside their module of experts.
EXPERTS = "sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE.run_moe_core"
DUMMY_SIZES = (2, 3)  # requests of the two recorded runs

logger = logging.getLogger("sglang.dynaflow")


def rules(tensor_parallel: int) -> tuple[Rule, ...]:
    """Where bodies are cut. With one rank, SGLang's collectives do nothing and are no operators."""
    collectives = COLLECTIVES if tensor_parallel > 1 else ()
    return (
        SplitModule("RadixAttention", "attention", Resource.MEMORY, ("attention",), context=True),
        SplitFunc(EXPERTS, "experts", Resource.COMPUTE, ("experts",), context=True, required=False),
        *(SplitFunc(f"{GROUP}.{n}", n, Resource.NETWORK, (n,), "tp", required=False) for n in collectives),
    )


class DynaflowRunner:
    """`session` decides and counts; `backends` are the attention backends, one per micro-batch."""

    def __init__(self, runner: Any, config: Config) -> None:
        from sglang.srt.runtime_context import get_parallel

        self.runner, self.body = runner, body_of(runner.model)
        check_layout(self.body)
        device = str(runner.device).partition(":")[0]
        self.session = Session(config, device, "eager", logger, get_parallel().tp_rank)
        self.backends: list[Any] = []
        self._forward_raw, self._init_attention_backends = runner._forward_raw, runner.init_attention_backends
        self.segmented = SegmentedForward(
            self.session, self.body.forward, self.body, rules(get_parallel().tp_size), {"attention": "kv"}
        )

    def install(self) -> None:
        self.runner.dynaflow = self
        self.runner._forward_raw = self.step
        self.runner.init_attention_backends = self.init_attention_backends
        self.body.forward = self.forward

    def remove(self) -> None:
        """The runner is a stock one again."""
        for thing, names in (
            (self.runner, ("dynaflow", "_forward_raw", "init_attention_backends")),
            (self.body, ("forward",)),
        ):
            for name in names:
                vars(thing).pop(name, None)
        self.segmented.segments.detach()
        self.session.close()

    def init_attention_backends(self) -> None:
        """In place of `ModelRunner.init_attention_backends`."""
        self._init_attention_backends()
        self.make_backends()

    def make_backends(self) -> None:
        self.backends = [self.runner._get_attention_backend() for _ in range(self.session.max_micro_batches)]

    def check(self, group: Any) -> None:
        """Record the model. Raise `InactiveError` unless it can be split and all ranks of `group` (a process group for
        CPU objects) have the same plans."""
        eager, backend = self.runner.eager_runner, self.runner.attn_backend
        try:
            backend.get_cuda_graph_seq_len_fill_value()
        except NotImplementedError:  # a backend without CUDA graphs; those that have them all say 1
            backend.get_cuda_graph_seq_len_fill_value = lambda: 1
        with self.segmented.recording(), eager.model_context():
            for size in DUMMY_SIZES:
                eager._dummy_run(size, buffers=eager._alloc_dummy_decode_buffers(size))
        self.session.check(group)

    def start(self, tree_cache: Any) -> None:
        """After `check`, with an empty `tree_cache`: decide by measuring, where the strategy is one that decides.
        Raises `InactiveError` for ranks that have different decisions."""
        with RunnerTrials(self.runner, tree_cache) as trials:
            self.session.start(trials, lambda: facts(self.runner, self.session, self.body, trials.limits))

    def decided(self) -> dict[str, Any] | None:
        """The policy in short, for `/server_info`; None where the strategy decides nothing."""
        auto, table = self.session.auto, self.session.policy
        if auto is None or table is None:
            return None
        return {
            "adopted": {str(bucket): candidate for bucket, candidate in table.adopted.items()},
            "buckets": len(table.decisions),
            "switched_off": auto.switched_off,
            "table": auto.options.table or str(default_path(table.key)),
        }

    def step(self, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        """In place of `ModelRunner._forward_raw`."""
        if forward_batch.batch_size == 0:  # an idle rank
            return self._forward_raw(forward_batch, *args, **kwargs)
        batch = describe(forward_batch)
        if reason := reason_to_run_whole(forward_batch):
            self.session.whole(batch, reason)
            return self._forward_raw(forward_batch, *args, **kwargs)
        self.session.begin(batch)
        try:
            run = self._without_graphs if self.session.micro_batches else self._forward_raw
            return run(forward_batch, *args, **kwargs)
        finally:
            self.session.end()

    def _without_graphs(self, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        runner = self.runner
        graphs = runner.decode_cuda_graph_runner, runner.prefill_cuda_graph_runner
        runner.decode_cuda_graph_runner = runner.prefill_cuda_graph_runner = None
        try:
            return self._forward_raw(forward_batch, *args, **kwargs)
        finally:
            runner.decode_cuda_graph_runner, runner.prefill_cuda_graph_runner = graphs
            # SGLang may have told its scheduler that this step has read the request table once the whole batch was
            # planned; our backends plan after that. Without the event it waits for the whole step.
            runner.shared_read_done_event = None

    def forward(self, input_ids: Any, positions: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        """In place of the body's forward."""
        own = (input_ids, positions, forward_batch)
        if not self.session.micro_batches:
            return self.segmented(len(positions), (*own, *args), kwargs, no_context)
        micro_batches = MicroBatches(forward_batch, self.session.micro_batches, self.backends)
        try:
            result = self.segmented(
                len(positions),
                (*own, *args),
                kwargs,
                micro_batches.enter,
                lambda index: ((*micro_batches.arguments(index), *args), kwargs),
            )
        finally:
            micro_batches.leave()
        return self.session.checked(
            result, lambda: self.segmented(len(positions), (*own, *args), kwargs, no_context), (input_ids, positions)
        )


def body_of(model: torch.nn.Module) -> torch.nn.Module:
    """The decoder stack of a `...ForCausalLM`: embedding to final norm."""
    body = getattr(model, "model", None)
    if not isinstance(body, torch.nn.Module):
        raise InactiveError(
            f"{type(model).__name__} keeps its decoder stack in no attribute 'model': this model is not supported yet"
        )
    return body
