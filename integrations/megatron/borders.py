"""Where a Megatron decoder is cut: at its communication.

Contract
- Tensor parallelism communicates in the region functions of `tensor_parallel.mappings`. What is an identity forward
  (`copy_to`) is an all-reduce backward, so it is a border, too.
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
from dynaflow_serving.core.program import Resource
from dynaflow_serving.strategy.rules import Rule, SplitFunc
from dynaflow_serving.strategy.tags import Tag

MAPPINGS = "megatron.core.tensor_parallel.mappings"
DISPATCHER = "megatron.core.transformer.moe.token_dispatcher.MoEAlltoAllTokenDispatcher"
REGIONS = {
    "reduce_from_tensor_model_parallel_region": ("all_reduce", Tag.ALL_REDUCE),
    "copy_to_tensor_model_parallel_region": ("copy", Tag.ALL_REDUCE),
    "gather_from_sequence_parallel_region": ("all_gather", Tag.ALL_GATHER),
    "reduce_scatter_to_sequence_parallel_region": ("reduce_scatter", Tag.REDUCE_SCATTER),
}


def rules(config: Any) -> tuple[Rule, ...]:
    """Return the rules for a decoder.

    Args:
        config: Its `TransformerConfig`.
    """
    found: list[Rule] = []
    if config.tensor_model_parallel_size > 1 or config.expert_tensor_parallel_size > 1:
        for function, (name, tag) in REGIONS.items():
            found.append(SplitFunc(f"{MAPPINGS}.{function}", name, Resource.NETWORK, (tag,), "tp"))
    if config.expert_model_parallel_size > 1:
        for method, tag in (("token_dispatch", Tag.DISPATCH), ("token_combine", Tag.COMBINE)):
            found.append(SplitFunc(f"{DISPATCHER}.{method}", str(tag), Resource.NETWORK, (tag,), "ep"))
    return tuple(found)


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
        if current_frame() is None:
            join_gradients()
        elif sequence_parallel:
            input = mappings.gather_from_sequence_parallel_region(input, group=kwargs.get("tp_group"))
            sequence_parallel = False
        elif allreduce_dgrad:
            input = mappings.copy_to_tensor_model_parallel_region(input, group=kwargs.get("tp_group"))
            allreduce_dgrad = False
        return linear(
            input, weight, bias, gradient_accumulation_fusion, allreduce_dgrad, sequence_parallel, *args, **kwargs
        )

    layers.linear_with_grad_accumulation_and_async_allreduce = linear_without_communication
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
