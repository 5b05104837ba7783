"""Where data-parallel ranks share experts, a model is cut at the exchange of tokens between them.

Contract
- vLLM dispatches with `GroupCoordinator.all_gatherv` and combines with `reduce_scatterv` or its form with an output.
  Their `sizes`, the tokens of each rank, are arguments. So a plan may make these calls on any stream, without context.
- A combine reads what the experts have computed while other micro-batches compute. Within a frame the experts therefore
  write to memory of their own, and not to vLLM's workspace, which all micro-batches share.
- A layer keeps the output of its shared experts on itself until its exchange has ended, so each frame has its own.
  Layers that keep more of a batch are declined (`check`).
- Source: `AgRsAll2AllManager` and `FusedMoEKernelModularImpl` (vLLM 0.32).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch

from dynaflow_serving.capture.eager.frames import Frame, current_frame
from dynaflow_serving.core.program import Resource
from dynaflow_serving.errors import InactiveError
from dynaflow_serving.session.ranks import Ranks
from dynaflow_serving.session.session import Session
from dynaflow_serving.session.vote import Vote
from dynaflow_serving.strategy.rules import Rule, SplitFunc
from dynaflow_serving.strategy.tags import Tag

_GROUP = "vllm.distributed.parallel_state.GroupCoordinator"
EXCHANGES = {
    "all_gatherv": Tag.DISPATCH,
    "reduce_scatterv": Tag.COMBINE,
    "reduce_scatterv_into_output": Tag.COMBINE,
}

# The outputs of shared experts, by their module.
_outputs: WeakKeyDictionary[Frame, dict[Any, list[Any]]] = WeakKeyDictionary()


def exchanges_tokens(vllm_config: Any) -> bool:
    """Return whether data-parallel ranks share experts; the ranks of a dense model have nothing in common."""
    parallel = vllm_config.parallel_config
    return bool(parallel.data_parallel_size > 1 and parallel.is_moe_model is not False)


def rules() -> tuple[Rule, ...]:
    """Return the rules for the exchange, and for the experts between dispatch and combine."""
    return (
        *(SplitFunc(f"{_GROUP}.{n}", str(t), Resource.NETWORK, (t,), "ep") for n, t in EXCHANGES.items()),
        SplitFunc(compute, "experts", Resource.COMPUTE, (Tag.EXPERTS,), context=True),
    )


def compute(stock: Callable[..., Any], kernel: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the experts of a micro-batch; a plan calls this outside of the micro-batch's frame.

    Args:
        stock: `FusedMoEKernelModularImpl._fused_experts`.
        kernel: Its instance.
        *args: Further arguments.
        **kwargs: Further arguments. `a1q` holds the tokens of all ranks [tokens, h]. `stock` writes to `output_alias`
            instead of the workspace, if the shape fits.

    Returns:
        What `stock` returns, in memory of its own.
    """
    own = kwargs["a1q"].new_empty(kwargs["a1q"].shape, dtype=kwargs["in_dtype"])
    result = stock(kernel, *args, **{**kwargs, "output_alias": own})
    return result if result is own else result.clone()


def check(model: torch.nn.Module) -> None:
    """Check that no expert layer of `model` shares between micro-batches what an exchange still reads.

    Raises:
        InactiveError: A layer does.
    """
    from vllm.model_executor.layers.fused_moe.router.zero_expert_router import ZeroExpertRouter
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    for path, layer in model.named_modules():
        if not isinstance(layer, MoERunner):
            continue
        if isinstance(layer.router, ZeroExpertRouter) or layer.is_monolithic or layer.do_naive_dispatch_combine:
            raise InactiveError(
                f"{path} keeps state of its batch during the exchange of tokens (zero experts, or a kernel that is not "
                "modular), which micro-batches would share; remove the dynaflow option for this model"
            )


def confirm(session: Session) -> None:
    """Check that all ranks of the exchange have the same plans, and let those with a batch each vote from now on.

    Raises:
        DynaflowError: They have not, and the config does not let the engine fall back.
    """
    from vllm.distributed.parallel_state import get_dp_group, get_ep_group

    session.confirm(get_ep_group().cpu_group)
    session.vote = Vote(Ranks(get_dp_group().cpu_group), session.selector.max_micro_batches)


@functools.cache
def prepare_for_frames() -> None:
    """Replace, once per process, what must behave otherwise within a frame. Outside of frames all is as it was."""
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEKernelModularImpl
    from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExperts

    stock = FusedMoEKernelModularImpl._fused_experts

    @functools.wraps(stock)
    def fused_experts(self: Any, *args: Any, **kwargs: Any) -> Any:
        if current_frame() is None:
            return stock(self, *args, **kwargs)
        return compute(stock, self, *args, **kwargs)

    FusedMoEKernelModularImpl._fused_experts = fused_experts
    SharedExperts._output = property(_output_of_frame, _set_output)


def _output_of_frame(shared_experts: Any) -> list[Any]:
    """Return `SharedExperts._output`, vLLM's list of outputs; each frame has one of its own."""
    if (frame := current_frame()) is None:
        outside: list[Any] = shared_experts.__dict__["_output"]
        return outside
    return _outputs.setdefault(frame, {}).setdefault(shared_experts, [None, None])


def _set_output(shared_experts: Any, value: list[Any]) -> None:
    shared_experts.__dict__["_output"] = value
