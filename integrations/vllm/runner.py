"""What DynaFlow's model runners have in common; `runner_v1` and `runner_v2` hook vLLM's two runners.

Contract
- A runner describes each live step with `begin`, and gives the session one forward context per micro-batch
  (`ForwardContexts.set`) before it runs the model; whoever runs the model enters them.
- A split step runs without CUDA graph and without padding. Profiling, warm-up and capture runs are untouched.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from dynaflow_serving.core.batch import Batch
from dynaflow_serving.integrations.vllm.hazards import dependences
from dynaflow_serving.integrations.vllm.state import WorkerState


class RunnerMixin:
    dynaflow: WorkerState
    _live_step = ExitStack()  # holds the live step, once its split is decided

    def begin(
        self,
        tokens: np.ndarray[Any, Any],
        computed: np.ndarray[Any, Any],
        joined: Sequence[int],
        tables: Iterable[tuple[int, Sequence[Sequence[int]]]],
    ) -> None:
        """Begin the live step, which ends with `_live_step`; arguments as in `hazards.dependences`."""
        depends: tuple[tuple[int, int], ...] = ()
        if self.cache_config.enable_prefix_caching:  # type: ignore[attr-defined]
            depends = dependences(tokens, computed, joined, tables)
        batch = Batch(tuple(tokens.tolist()), tuple(computed.tolist()), depends)
        self._live_step.enter_context(self.dynaflow.session.step(batch))

    def ubatch_slices(self) -> list[Any]:
        """The live step's micro-batches as vLLM's slices; [] if it runs whole."""
        from vllm.v1.worker.ubatch_utils import UBatchSlice

        return [UBatchSlice(slice(*p.requests), slice(*p.tokens)) for p in self.dynaflow.session.micro_batches]

    def create_metadata_builders(self, kernel_block_sizes: Sequence[int]) -> None:
        """One builder of attention metadata per micro-batch: some keep what they prepared on themselves.

        Each has its own workspace, other than those of vLLM's dual-batch overlap: the attention of two
        micro-batches may be in flight on two streams.
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
                    # V1 reuses metadata by (spec, builder type), whatever the micro-batch: the second one
                    # would get the first one's sequence lengths.
                    builder.supports_update_block_table = False
