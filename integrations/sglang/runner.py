"""`DynaflowRunner` decides each step's split for a ModelRunner, and runs the model's body under the plan.

Contract
- Methods of two objects are replaced, and SGLang's classes stay as they are. Every real step passes
  `ModelRunner._forward_raw`; warm-up and graph capture call the model directly and run whole. The other method is the
  forward of the body, which is all of the model but the head and sampling.
- SGLang has no graph of its models. The body is recorded (`capture.eager`) in two of SGLang's own dummy runs, before
  the scheduler reports ready.
- A split step uses no CUDA graph, because a graph replays the whole batch with its own attention metadata. Un-split
  steps replay as ever.
- Where a step is compared, the body runs again un-split under the step's own context, and writes the KV cache last.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dynaflow_serving.config import Config
from dynaflow_serving.core.program import Resource
from dynaflow_serving.errors import InactiveError
from dynaflow_serving.integrations.sglang.limits import reason_to_run_whole
from dynaflow_serving.integrations.sglang.micro_batches import MicroBatches, check_layout, describe
from dynaflow_serving.integrations.sglang.trials import RunnerTrials, facts
from dynaflow_serving.policy.selector import AutoSelector, build_selector
from dynaflow_serving.policy.start import start_policy
from dynaflow_serving.policy.table import default_path
from dynaflow_serving.session.forward import Contexts, EagerForward
from dynaflow_serving.session.session import Session
from dynaflow_serving.strategy.rules import Rule, SplitFunc, SplitModule
from dynaflow_serving.strategy.tags import Tag

GROUP = "sglang.srt.distributed.parallel_state.GroupCoordinator"
# A model may call these under tensor parallelism. Even one that cannot overlap must keep its place in the order.
COLLECTIVES = {
    "all_reduce": Tag.ALL_REDUCE,
    "quant_all_reduce": Tag.ALL_REDUCE,
    "fused_allreduce_rmsnorm": Tag.ALL_REDUCE,
    "reduce_scatter_tensor": Tag.REDUCE_SCATTER,
    "reduce_scatter_along_dim": Tag.REDUCE_SCATTER,
    "all_gather_into_tensor": Tag.ALL_GATHER,
    "all_gather": Tag.ALL_GATHER,
}
# The computation of the experts, without the all-reduce that some models have inside their module of experts.
EXPERTS = "sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE.run_moe_core"
DUMMY_SIZES = (2, 3)  # the two recorded runs have so many requests

logger = logging.getLogger("sglang.dynaflow")


def rules(tensor_parallel: int) -> tuple[Rule, ...]:
    """Return the rules that cut a body. With one rank, SGLang's collectives do nothing and are no operators."""
    collectives = COLLECTIVES if tensor_parallel > 1 else {}
    return (
        SplitModule("RadixAttention", "attention", Resource.MEMORY, (Tag.ATTENTION,), context=True),
        SplitFunc(EXPERTS, "experts", Resource.COMPUTE, (Tag.EXPERTS,), context=True, required=False),
        *(SplitFunc(f"{GROUP}.{n}", n, Resource.NETWORK, (t,), "tp", required=False) for n, t in collectives.items()),
    )


class DynaflowRunner:
    """This object puts one ModelRunner under DynaFlow.

    Attributes:
        runner: SGLang's ModelRunner.
        body: The decoder stack of its model.
        session: It decides and counts the steps.
        backends: The attention backends, one per micro-batch.
    """

    def __init__(self, runner: Any, config: Config) -> None:
        """Prepare to replace methods of `runner` and of its model's body.

        Raises:
            ConfigError: The config is wrong.
            InactiveError: The model or this build of SGLang is not supported.
            AnnotationError: An annotation of the strategy matches nothing.
        """
        from sglang.srt.runtime_context import get_parallel

        self.runner, self.body = runner, body_of(runner.model)
        check_layout(self.body)
        device = str(runner.device).partition(":")[0]
        self.session = Session(
            build_selector(config), config, device, mode="eager", logger=logger, rank=get_parallel().tp_rank
        )
        self.backends: list[Any] = []
        self._forward_raw, self._init_attention_backends = runner._forward_raw, runner.init_attention_backends
        cuts, states = rules(get_parallel().tp_size), {"attention": "kv"}
        self.eager_forward = EagerForward(self.session, self.body.forward, self.body, cuts, states, self.entering)

    def install(self) -> None:
        """Replace the methods."""
        self.runner.dynaflow = self
        self.runner._forward_raw = self.step
        self.runner.init_attention_backends = self.init_attention_backends
        self.body.forward = self.forward

    def remove(self) -> None:
        """Restore the stock methods, and close the session."""
        for thing, names in (
            (self.runner, ("dynaflow", "_forward_raw", "init_attention_backends")),
            (self.body, ("forward",)),
        ):
            for name in names:
                vars(thing).pop(name, None)
        self.eager_forward.eager.detach()
        self.session.close()

    def init_attention_backends(self, *args: Any, **kwargs: Any) -> None:
        """Initialize SGLang's backends and ours; this replaces `ModelRunner.init_attention_backends`."""
        self._init_attention_backends(*args, **kwargs)
        self.make_backends()

    def make_backends(self) -> None:
        """Make one attention backend per micro-batch."""
        self.backends = [self.runner._get_attention_backend() for _ in range(self.session.selector.max_micro_batches)]

    def check(self, group: Any) -> None:
        """Record the model, and compare the plans of all ranks.

        Args:
            group: A process group for CPU objects.

        Raises:
            InactiveError: The model cannot be split, or the ranks have different plans.
        """
        eager, backend = self.runner.eager_runner, self.runner.attn_backend
        try:
            backend.get_cuda_graph_seq_len_fill_value()
        except NotImplementedError:  # a backend without CUDA graphs; those that have them all say 1
            backend.get_cuda_graph_seq_len_fill_value = lambda: 1
        with self.eager_forward.recording(), eager.model_context():
            for size in DUMMY_SIZES:
                eager._dummy_run(size, buffers=eager._alloc_dummy_decode_buffers(size))
        self.session.confirm(group)

    def start(self, tree_cache: Any) -> None:
        """Decide by measuring, if the strategy is `auto`, and compare splits in trials; this follows `check`.

        Args:
            tree_cache: The scheduler's cache, still empty.

        Raises:
            InactiveError: The ranks have different decisions.
        """
        with RunnerTrials(self.runner, tree_cache) as trials:
            start_policy(self.session, trials, lambda: facts(self.runner, self.session, self.body, trials.limits))

    def decided(self) -> dict[str, Any] | None:
        """Return a short form of the policy's decisions, for `/server_info`, or None if the strategy is not `auto`."""
        selector = self.session.selector
        if not isinstance(selector, AutoSelector) or selector.table is None:
            return None
        table = selector.table
        return {
            "adopted": {str(bucket): candidate for bucket, candidate in table.adopted.items()},
            "buckets": len(table.decisions),
            "switched_off": selector.switched_off,
            "table": selector.options.table or str(default_path(table.key)),
        }

    def step(self, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Run one step, split or not; this replaces `ModelRunner._forward_raw`."""
        if forward_batch.batch_size == 0:  # the rank is idle
            return self._forward_raw(forward_batch, *args, **kwargs)
        batch = describe(forward_batch)
        if reason := reason_to_run_whole(forward_batch):
            self.session.count_unsplit(batch, reason)
            return self._forward_raw(forward_batch, *args, **kwargs)
        with self.session.step(batch) as step:
            run = self._without_graphs if step.micro_batches else self._forward_raw
            return run(forward_batch, *args, **kwargs)

    def _without_graphs(self, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a split step, while SGLang finds no CUDA graph to replay."""
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

    @contextmanager
    def entering(self, input_ids: Any, positions: Any, forward_batch: Any, *args: Any, **kw: Any) -> Iterator[Contexts]:
        """Enter the micro-batches of a split step; the arguments are the body's."""
        micro_batches = MicroBatches(forward_batch, self.session.micro_batches, self.backends)
        try:
            yield Contexts(micro_batches.enter, lambda i: ((*micro_batches.arguments(i), *args), kw))
        finally:
            micro_batches.leave()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the body, split or not; this replaces its forward, whose first arguments are `BODY_ARGUMENTS`."""
        result, step = self.eager_forward(*args, **kwargs), self.session.in_flight
        if step is None or not step.micro_batches:
            return result
        return step.checked(result, lambda: self.eager_forward(*args, **kwargs), args[:2])


def body_of(model: torch.nn.Module) -> torch.nn.Module:
    """Return the decoder stack of a `...ForCausalLM`, from the embedding to the final norm.

    Raises:
        InactiveError: The model has none in its attribute `model`.
    """
    body = getattr(model, "model", None)
    if not isinstance(body, torch.nn.Module):
        raise InactiveError(
            f"{type(model).__name__} keeps its decoder stack in no attribute 'model': this model is not supported yet"
        )
    return body
