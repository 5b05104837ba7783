"""The session of the vLLM worker in this process, and the forward contexts of its live step.

Contract
- `current()` is how vLLM's compile backends, which it calls by name, reach the worker's session; a new
  engine in the same process replaces it.
- Either model runner gives `set_contexts` the attention metadata and slot mappings of each micro-batch; what
  runs the model gets them through `entering`, whatever it is (a compiled graph or not).
- A micro-batch's context has no CUDA graph: graphs are keyed by batch and share static outputs.
- `unsplit` is the live step's context for the batch as a whole, where shadow mode compares.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dynaflow_serving.config import load
from dynaflow_serving.errors import InactiveError
from dynaflow_serving.integrations.session import Session
from dynaflow_serving.integrations.vllm import metrics
from dynaflow_serving.integrations.vllm.engine_args import KEY, PIECE_COMPILER

_current: VLLMSession | None = None


class VLLMSession(Session):
    serving = False  # set once warm-up is over and the ranks have compared their plans

    def __init__(self, vllm_config: Any, device_type: str, rank: int) -> None:
        global _current
        self.vllm_config = vllm_config
        self.piece_compiler: str = vllm_config.additional_config.get(PIECE_COMPILER, "")
        self._contexts: list[Any] = []  # vLLM's ForwardContext of each micro-batch of the live step
        mode = getattr(vllm_config.compilation_config.mode, "name", "")
        runner = "V2" if vllm_config.use_v2_model_runner else "V1"
        super().__init__(
            load(vllm_config.additional_config[KEY]),
            device_type,
            f"{mode} ({self.piece_compiler or 'vLLM pieces'}), Model Runner {runner}",
            logging.getLogger("vllm.dynaflow"),
            rank,
        )
        self._metrics_file = metrics.writer(rank)
        _current = self

    def set_contexts(self, metadata: Sequence[Any], slot_mappings: Sequence[Any], is_padding: Any) -> None:
        """Make the forward context of each micro-batch of the live step.

        metadata, slot_mappings: per micro-batch, by layer name; is_padding: bool [tokens of the step], or None.
        """
        from vllm.forward_context import BatchDescriptor, create_forward_context

        self._contexts = [
            create_forward_context(
                metadata[i],
                self.vllm_config,
                batch_descriptor=BatchDescriptor(num_tokens=part.tokens[1] - part.tokens[0]),
                slot_mapping=slot_mappings[i],
                is_padding=None if is_padding is None else is_padding[slice(*part.tokens)],
            )
            for i, part in enumerate(self.micro_batches)
        ]

    @contextmanager
    def entering(self) -> Iterator[Callable[[int], None]]:
        """A function that enters the context of the i-th micro-batch; the step's own is back afterwards."""
        from vllm import forward_context

        def enter(micro_batch: int) -> None:
            # The module global is what every vLLM operator reads; override_forward_context restores it.
            forward_context._forward_context = self._contexts[micro_batch]

        with forward_context.override_forward_context(self._contexts[0]):
            yield enter

    @contextmanager
    def unsplit(self, metadata: Any, slot_mapping: Any) -> Iterator[None]:
        """The live step's context, with the whole batch's `metadata` and `slot_mapping` (by layer name)."""
        from vllm import forward_context

        step = forward_context.get_forward_context()
        whole = dataclasses.replace(
            step, attn_metadata=metadata, slot_mapping=slot_mapping, ubatch_slices=None, moe_layer_index=0
        )
        with forward_context.override_forward_context(whole):
            yield

    def end(self) -> None:
        super().end()
        self._contexts = []
        if self._metrics_file is not None:
            self._metrics_file.later()

    def report(self) -> dict[str, Any]:
        if self._metrics_file is not None:
            self._metrics_file.write()
        return super().report()


def current() -> VLLMSession:
    if _current is None:
        raise InactiveError("no DynaFlow worker in this process: the worker class was replaced by another plugin")
    return _current
