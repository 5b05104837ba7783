"""Where a Megatron decoder is cut: at its communication.

Contract
- Tensor parallelism communicates in the region functions of `tensor_parallel.mappings`. What is an identity forward
  (`copy_to`) is an all-reduce backward, and the other way round (`reduce_from`): each is on the network one way only.
- Expert parallelism communicates in the all-to-alls of the token dispatcher. One method does both of a dispatch.
- A column-parallel linear hides its all-gather and the all-reduce of its input's gradient. Within a frame these are
  calls of region functions, and the linear itself communicates nothing.
- The dispatcher exchanges the numbers of tokens on a group of its own. That happens where the frame runs, in program
  order on all ranks: nothing could run beside it, as the next sizes depend on it.
- Within a frame, nothing draws random numbers (`limits`), and no tracker of random states is forked: the forks of two
  interleaved frames would restore each other's states.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

from dynaflow_serving.capture.eager.frames import current_frame
from dynaflow_serving.capture.eager.gradients import join_gradients
from dynaflow_serving.core.program import Gradient, Resource
from dynaflow_serving.integrations.megatron import moe, symmetric
from dynaflow_serving.strategy.rules import Rule, SplitFunc, SplitModule
from dynaflow_serving.strategy.selector import Selector
from dynaflow_serving.strategy.tags import Tag

MAPPINGS = "megatron.core.tensor_parallel.mappings"
DISPATCHER = "megatron.core.transformer.moe.token_dispatcher.MoEAlltoAllTokenDispatcher"
_COMPUTE, _NETWORK = Resource.COMPUTE, Resource.NETWORK
REGIONS = (
    SplitFunc(
        f"{MAPPINGS}.reduce_from_tensor_model_parallel_region", "all_reduce", _NETWORK, (Tag.ALL_REDUCE,), "tp",
        gradient=Gradient(_COMPUTE),
    ),
    SplitFunc(f"{MAPPINGS}.copy_to_tensor_model_parallel_region", "copy", gradient=Gradient(_NETWORK, "tp")),
    SplitFunc(f"{MAPPINGS}.gather_from_sequence_parallel_region", "all_gather", _NETWORK, (Tag.ALL_GATHER,), "tp"),
    SplitFunc(
        f"{MAPPINGS}.reduce_scatter_to_sequence_parallel_region", "reduce_scatter", _NETWORK, (Tag.REDUCE_SCATTER,),
        "tp",
    ),
)  # fmt: skip
EXPERTS = SplitFunc(moe.exchange, "experts", _COMPUTE, (Tag.EXPERTS,), "ep")
EXCHANGES = tuple(
    SplitFunc(f"{DISPATCHER}.{method}", str(tag), _NETWORK, (tag,), "ep")
    for method, tag in (("token_dispatch", Tag.DISPATCH), ("token_combine", Tag.COMBINE))
)


def rules(config: Any, selector: Selector, device: str) -> tuple[Rule, ...]:
    """Return the rules for a decoder.

    Args:
        config: Its `TransformerConfig`.
        selector: Its strategies may want operators with their communication within.
        device: The type of its device.
    """
    found: list[Rule] = []
    if config.expert_model_parallel_size > 1:
        found += [EXPERTS] if Tag.EXPERTS in selector.taken_whole else []
        found += EXCHANGES
    if config.tensor_model_parallel_size > 1 or config.expert_tensor_parallel_size > 1:
        if Tag.ROW_PARALLEL in selector.taken_whole:
            found += _products(config.sequence_parallel, device)
        # Without micro-batches, Megatron's linear reduces the gradient of its input beside that of its weight.
        found += [rule for rule in REGIONS if rule.name != "copy" or selector.max_micro_batches > 1]
    return tuple(found)


def _products(sequence_parallel: bool, device: str) -> list[Rule]:
    """Return the rules for linears with their collectives within."""
    from megatron.core import parallel_state

    if not sequence_parallel:
        return [SplitModule("RowParallelLinear", "row_parallel", _COMPUTE, (Tag.ROW_PARALLEL,), "tp")]
    rows, columns = (Tag.ROW_PARALLEL, Tag.SEQUENCE_PARALLEL), (Tag.COLUMN_PARALLEL, Tag.SEQUENCE_PARALLEL)
    if symmetric.is_available(device, parallel_state.get_tensor_model_parallel_group()):
        return [
            SplitFunc(symmetric.matmul_scatter, "row_parallel", _COMPUTE, (*rows, Tag.ONE_KERNEL), "tp"),
            SplitFunc(symmetric.gather_matmul, "column_parallel", _COMPUTE, (*columns, Tag.ONE_KERNEL), "tp"),
        ]
    return [
        SplitModule("RowParallelLinear", "row_parallel", _COMPUTE, rows, "tp"),
        SplitModule("ColumnParallelLinear", "column_parallel", _COMPUTE, columns, "tp"),
    ]


@functools.cache
def prepare_for_frames() -> None:
    """Replace, once per process, what must behave otherwise within a frame. Outside of frames all is as it was."""
    from megatron.core.tensor_parallel import layers, mappings, random
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    linear = layers.linear_with_grad_accumulation_and_async_allreduce

    @functools.wraps(linear)
    def linear_without_communication(
        input: Any, weight: Any, bias: Any, gradient_accumulation_fusion: bool, allreduce_dgrad: bool,
        sequence_parallel: bool, *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        if (frame := current_frame()) is None:
            join_gradients()
        elif sequence_parallel and frame.has_border("column_parallel", Tag.ONE_KERNEL):
            product = symmetric.gather_matmul(input, weight, kwargs["tp_group"])
            return product if bias is None else product + bias
        elif sequence_parallel:
            input = mappings.gather_from_sequence_parallel_region(input, group=kwargs.get("tp_group"))
            sequence_parallel = False
        elif allreduce_dgrad and frame.has_border("copy"):
            input = mappings.copy_to_tensor_model_parallel_region(input, group=kwargs.get("tp_group"))
            allreduce_dgrad = False
        return linear(
            input, weight, bias, gradient_accumulation_fusion, allreduce_dgrad, sequence_parallel, *args, **kwargs
        )

    layers.linear_with_grad_accumulation_and_async_allreduce = linear_without_communication
    layers.RowParallelLinear.forward = _in_one_kernel(layers.RowParallelLinear.forward)
    fork = random.CudaRNGStatesTracker.fork

    @functools.wraps(fork)
    def fork_outside_of_frames(self: Any, *args: Any, **kwargs: Any) -> Any:
        return fork(self, *args, **kwargs) if current_frame() is None else contextlib.nullcontext()

    random.CudaRNGStatesTracker.fork = fork_outside_of_frames
    preprocess = MoEAlltoAllTokenDispatcher.preprocess

    @functools.wraps(preprocess)
    def preprocess_without_borders(self: Any, *args: Any, **kwargs: Any) -> Any:
        frame = current_frame()
        if frame is None:
            return preprocess(self, *args, **kwargs)
        borders, frame.borders = frame.borders, {}
        try:
            return preprocess(self, *args, **kwargs)
        finally:
            frame.borders = borders

    MoEAlltoAllTokenDispatcher.preprocess = preprocess_without_borders


def _in_one_kernel(row_parallel: Any) -> Any:
    """Return the forward of `RowParallelLinear`, whose product and reduce-scatter are one kernel where there is one."""

    @functools.wraps(row_parallel)
    def forward(self: Any, input_: Any) -> Any:
        frame, scatters = current_frame(), self.sequence_parallel and not self.explicit_expert_comm
        if frame is None or not (scatters and frame.has_border("row_parallel", Tag.ONE_KERNEL)):
            return row_parallel(self, input_)
        output = symmetric.matmul_scatter(input_, self.weight, self.tp_group)
        if self.skip_bias_add or self.bias is None:
            return output, self.bias
        return output + self.bias, None

    return forward
