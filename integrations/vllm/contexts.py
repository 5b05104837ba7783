"""`ForwardContexts` holds vLLM's forward contexts of the live step's micro-batches.

Contract
- Either model runner calls `set` with the attention metadata and slot mappings of each micro-batch. The model's
  forward, compiled or not, gets them through `entering`.
- A micro-batch's context has no CUDA graph, because graphs are keyed by batch and share static outputs.
- Where data-parallel ranks share experts, it holds the tokens of that micro-batch on all of them (`DPMetadata`).
- `unsplit` enters a context for the whole batch, where a step is compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from dynaflow_serving.session.forward import Contexts
from dynaflow_serving.session.observers import Observer
from dynaflow_serving.session.session import Session


class ForwardContexts(Observer):
    """These are the contexts of one worker; the end of a step drops them."""

    def __init__(self, session: Session, vllm_config: Any) -> None:
        self.session, self.vllm_config = session, vllm_config
        self._contexts: list[Any] = []  # one ForwardContext of vLLM per micro-batch of the live step
        session.observe_with(self)

    def left(self) -> None:
        self._contexts = []

    def set(self, metadata: Sequence[Any], slot_mappings: Sequence[Any], is_padding: Any) -> None:
        """Make the forward context of each micro-batch of the live step.

        Args:
            metadata: The attention metadata of each micro-batch, by layer name.
            slot_mappings: The slot mappings of each micro-batch, by layer name.
            is_padding: A bool tensor [tokens of the step], or None.
        """
        from vllm.forward_context import BatchDescriptor, create_forward_context

        self._contexts = [
            create_forward_context(
                metadata[i],
                self.vllm_config,
                dp_metadata=self._dp_metadata(i),
                batch_descriptor=BatchDescriptor(num_tokens=part.tokens[1] - part.tokens[0]),
                slot_mapping=slot_mappings[i],
                is_padding=None if is_padding is None else is_padding[slice(*part.tokens)],
            )
            for i, part in enumerate(self.session.micro_batches)
        ]

    def _dp_metadata(self, micro_batch: int) -> Any:
        """Return vLLM's `DPMetadata` of a micro-batch, by which experts exchange tokens; None where they do not."""
        if self.session.vote is None:
            return None
        from vllm.forward_context import DPMetadata

        tokens = [sizes[micro_batch] for sizes in self.session.vote.tokens]
        config = self.vllm_config.parallel_config
        return DPMetadata.make(config, tokens[config.data_parallel_rank], torch.tensor(tokens, dtype=torch.int32))

    @contextmanager
    def entering(self, *args: Any, **kwargs: Any) -> Iterator[Contexts]:
        """Let the block enter the context of any micro-batch, and restore the step's own afterwards."""
        from vllm import forward_context

        def enter(micro_batch: int) -> None:
            # Every vLLM operator reads this module global; override_forward_context restores it.
            forward_context._forward_context = self._contexts[micro_batch]

        with forward_context.override_forward_context(self._contexts[0]):
            yield Contexts(enter)

    @contextmanager
    def unsplit(self, metadata: Any, slot_mapping: Any) -> Iterator[None]:
        """Enter the live step's context, with the whole batch's `metadata` and `slot_mapping` (by layer name)."""
        from vllm import forward_context

        step = forward_context.get_forward_context()
        whole = dataclasses.replace(
            step, attn_metadata=metadata, slot_mapping=slot_mapping, ubatch_slices=None, moe_layer_index=0
        )
        with forward_context.override_forward_context(whole):
            yield
