"""`RunnerMixin` is the common part of DynaFlow's model runners; `runner_v1` and `runner_v2` hook vLLM's two runners.

Contract
- A runner describes each live step with `begin_step`, and ends it with `end_step`. Before it runs the model, it makes
  one forward context per micro-batch (`ForwardContexts.set`), which the model's forward enters.
- A split step runs without CUDA graph and without padding. Profiling, warm-up and capture runs are untouched.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dynaflow_serving.core.batch import Batch
from dynaflow_serving.integrations.vllm.hazards import dependences
from dynaflow_serving.integrations.vllm.state import WorkerState
from dynaflow_serving.session.session import LiveStep


class RunnerMixin:
    """This goes over one of vLLM's model runners."""

    dynaflow: WorkerState
    _step: LiveStep | None = None  # the live step, once its split is decided

    def begin_step(
        self,
        tokens: np.ndarray[Any, Any],
        computed: np.ndarray[Any, Any],
        joined: Sequence[int],
        tables: Iterable[tuple[int, Sequence[Sequence[int]]]],
    ) -> None:
        """Begin the live step; the arguments are those of `hazards.dependences`."""
        depends: tuple[tuple[int, int], ...] = ()
        if joined and self.cache_config.enable_prefix_caching:  # type: ignore[attr-defined]
            depends = dependences(tokens, computed, joined, tables)
        batch = Batch(tuple(tokens.tolist()), tuple(computed.tolist()), depends)
        step = self.dynaflow.session.step(batch)
        self.dynaflow.session.begin(step)
        self._step = step

    def end_step(self) -> None:
        """End the live step, if its split was decided; the step may have failed."""
        step, self._step = self._step, None
        if step is not None:
            self.dynaflow.session.end(step)

    def ubatch_slices(self) -> list[Any]:
        """Return the live step's micro-batches as vLLM's slices; there are none if it runs whole."""
        if not (parts := self.dynaflow.session.micro_batches):
            return []
        from vllm.v1.worker.ubatch_utils import UBatchSlice

        return [UBatchSlice(slice(*p.requests), slice(*p.tokens)) for p in parts]

    def create_metadata_builders(self, kernel_block_sizes: Sequence[int]) -> None:
        """Create one builder of attention metadata per micro-batch, because some keep the metadata on themselves.

        Each has a workspace of its own, unlike those of vLLM's dual-batch overlap: the attention of two micro-batches
        may be in flight on two streams.

        Args:
            kernel_block_sizes: The block size that each KV-cache group's kernels use, in tokens.
        """
        for group_id, groups in enumerate(self.attn_groups):  # type: ignore[attr-defined]
            size = kernel_block_sizes[group_id] if group_id < len(kernel_block_sizes) else None
            for group in groups:
                group.create_metadata_builders(
                    self.vllm_config,  # type: ignore[attr-defined]
                    self.device,  # type: ignore[attr-defined]
                    size,
                    num_metadata_builders=self.dynaflow.session.selector.max_micro_batches,
                )
                for builder in group.metadata_builders:
                    # V1 reuses metadata by (spec, builder type) for any micro-batch, so the second one would get the
                    # first one's sequence lengths.
                    builder.supports_update_block_table = False
