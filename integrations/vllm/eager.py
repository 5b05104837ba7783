"""DynaFlow schedules models without a graph: `--enforce-eager`, compilation mode 0, and models vLLM cannot compile.

Contract
- The model's own forward runs once per micro-batch as a suspended computation (`capture.eager`). It stops at attention,
  expert layers and collectives, and where the strategy's own annotations say.
- It is recorded in two of vLLM's dummy runs, after the model is loaded and before the ranks compare their plans.
- A collective that no rule names would run out of the common order of the ranks. Therefore the computation stops at
  every method of vLLM's `GroupCoordinator` that the model's code calls.
- Where data-parallel ranks share experts, the computation stops at their exchange and not at expert layers (`experts`).
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from dynaflow_serving.core.program import Resource
from dynaflow_serving.errors import DynaflowError, InactiveError
from dynaflow_serving.integrations.vllm import experts
from dynaflow_serving.integrations.vllm.state import WorkerState
from dynaflow_serving.session.forward import EagerForward
from dynaflow_serving.strategy.rules import Rule, SplitFunc, SplitModule
from dynaflow_serving.strategy.tags import Tag

ATTENTION = ("Attention", "MLAAttention", "ChunkedLocalAttention")
EXPERTS = ("MoERunner",)  # its forward ends with an all-reduce, which keeps its place among the others
COLLECTIVES = (Tag.ALL_REDUCE, Tag.ALL_GATHER, Tag.REDUCE_SCATTER)  # its methods have the same names
_GROUP = "vllm.distributed.parallel_state.GroupCoordinator"
RECORDED_TOKENS = 16


def rules(vllm_config: Any) -> tuple[Rule, ...]:
    """Return the rules for vLLM's attention, experts and collectives."""
    compute, memory, network = Resource.COMPUTE, Resource.MEMORY, Resource.NETWORK
    attention = (SplitModule(n, "attention", memory, (Tag.ATTENTION,), context=True, required=False) for n in ATTENTION)
    if experts.exchanges_tokens(vllm_config):  # with one tensor-parallel rank, so there are no other collectives
        return (*attention, *experts.rules())
    return (
        *attention,
        *(SplitModule(n, "experts", compute, (Tag.EXPERTS,), "tp", context=True, required=False) for n in EXPERTS),
        *(SplitFunc(f"{_GROUP}.{tag}", str(tag), network, (tag,), "tp", required=False) for tag in COLLECTIVES),
    )


def has_graph(vllm_config: Any, model: torch.nn.Module) -> bool:
    """Return whether vLLM compiles `model`, or a part of it."""
    from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
    from vllm.config import CompilationMode

    if vllm_config.compilation_config.mode == CompilationMode.NONE:
        return False
    compiled = [m for m in model.modules() if isinstance(m, TorchCompileWithNoGuardsWrapper)]
    return any(not getattr(m, "do_not_compile", False) for m in compiled)


def attach(worker: WorkerState, runner: Any) -> EagerForward | None:
    """Put the model's forward under DynaFlow, if vLLM compiles no graph of it.

    Returns:
        The forward; None if there is a graph, or if it cannot be done and `fallback: true` allows that.

    Raises:
        AnnotationError: An annotation of the strategy matches nothing.
        InactiveError: The config asks for a graph.
    """
    model, session = runner.get_model(), worker.session
    if has_graph(worker.vllm_config, model):
        return None
    session.mode = "eager (no graph)," + session.mode.partition(",")[2]
    stock = model.forward
    try:
        if session.config.capture == "graph":
            raise InactiveError(
                f"capture: graph was requested, but vLLM compiles no graph of {type(model).__name__}; use capture: auto"
            )
        if experts.exchanges_tokens(worker.vllm_config):
            experts.check(model)
            experts.prepare_for_frames()
        cuts = rules(worker.vllm_config)
        forward = EagerForward(session, stock, model, cuts, {"attention": "kv"}, worker.contexts.entering)
    except DynaflowError as error:
        session.retire(error)
        return None
    model.forward = functools.wraps(stock)(lambda *args, **kwargs: forward(*args, **kwargs))
    return forward


def record(forward: EagerForward, runner: Any) -> None:
    """Record the model in two dummy runs.

    Data-parallel ranks that share experts have different numbers of tokens. So what holds the tokens of all ranks is in
    no proportion to those of one.

    Raises:
        InactiveError: The runs give no Program.
    """
    config = runner.vllm_config
    most, first = config.scheduler_config.max_num_batched_tokens, config.parallel_config.data_parallel_rank == 0
    fewer = 1 if first and experts.exchanges_tokens(config) else 0
    try:
        with forward.recording():
            for tokens in (min(RECORDED_TOKENS, most - 1), min(2 * RECORDED_TOKENS, most)):
                runner._dummy_run(tokens - fewer)
    except DynaflowError as error:
        forward.session.retire(error)
        forward.eager.detach()
        runner.get_model().forward = forward.eager.forward
