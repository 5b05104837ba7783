"""Model Runner V1: decides each step's split and builds attention metadata per micro-batch.

Contract
- Only the methods named in `patches.md` are overridden, each calls vLLM's own; outside a live step
  nothing changes.
- A split step runs without CUDA graph and without padding (`force_eager`).
- Model Runner V2 will get a class of its own beside this one; `worker` picks.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dynaflow_serving.integrations.session import Session
from dynaflow_serving.integrations.vllm.hazards import dependences
from dynaflow_serving.ir import Batch, Split


class V1RunnerMixin:
    """Goes over `vllm.v1.worker.gpu_model_runner.GPUModelRunner` and its CPU subclass."""

    dynaflow: Session
    _split: Split | None = None  # of the live step, if it has several micro-batches
    _live: Any = None  # the live step's SchedulerOutput

    def initialize_metadata_builders(self, kv_cache_config: Any, kernel_block_sizes: list[int]) -> None:
        super().initialize_metadata_builders(kv_cache_config, kernel_block_sizes)  # type: ignore[misc]
        n = self.dynaflow.max_micro_batches
        for group_id, groups in enumerate(self.attn_groups):  # type: ignore[attr-defined]
            size = kernel_block_sizes[group_id] if group_id < len(kernel_block_sizes) else None
            for group in groups:
                group.create_metadata_builders(
                    self.vllm_config,  # type: ignore[attr-defined]
                    self.device,  # type: ignore[attr-defined]
                    size,
                    num_metadata_builders=n,
                )
                for builder in group.metadata_builders:
                    # vLLM reuses metadata by (spec, builder type), whatever the micro-batch: the second one
                    # would get the first one's sequence lengths.
                    builder.supports_update_block_table = False

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> Any:
        self._live = scheduler_output
        try:
            return super().execute_model(scheduler_output, intermediate_tensors)  # type: ignore[misc]
        finally:
            self._live = self._split = None
            self.dynaflow.end()

    def _determine_batch_execution_and_padding(self, *args: Any, **kwargs: Any) -> Any:
        if self._live is not None and self.dynaflow.split is None:
            split = self.dynaflow.begin(self._batch(kwargs["num_scheduled_tokens_np"]))
            if len(split.micro_batches) > 1:
                self._split = split
                kwargs["force_eager"] = True
        return super()._determine_batch_execution_and_padding(*args, **kwargs)  # type: ignore[misc]

    def _get_slot_mappings(self, *args: Any, **kwargs: Any) -> Any:
        if self._split is not None:
            kwargs["ubatch_slices"] = self._slices()
        return super()._get_slot_mappings(*args, **kwargs)  # type: ignore[misc]

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> Any:
        if self._split is not None:
            kwargs["ubatch_slices"] = self._slices()
        return super()._build_attention_metadata(*args, **kwargs)  # type: ignore[misc]

    def _batch(self, scheduled: np.ndarray[Any, Any]) -> Batch:
        computed = self.input_batch.num_computed_tokens_cpu[: len(scheduled)]  # type: ignore[attr-defined]
        depends: tuple[tuple[int, int], ...] = ()
        if self.cache_config.enable_prefix_caching:  # type: ignore[attr-defined]
            tables = self.input_batch.block_table.block_tables  # type: ignore[attr-defined]
            views = ((t.block_size, t.get_numpy_array()) for t in tables)
            depends = dependences(scheduled, computed, self._joined(), views)
        return Batch(tuple(scheduled.tolist()), tuple(computed.tolist()), depends)

    def _joined(self) -> list[int]:
        """Rows of the requests that are new in the live step, or resumed after a preemption."""
        names = [r.req_id for r in self._live.scheduled_new_reqs]
        names += self._live.scheduled_cached_reqs.resumed_req_ids
        return [self.input_batch.req_id_to_index[n] for n in names]  # type: ignore[attr-defined]

    def _slices(self) -> list[Any]:
        from vllm.v1.worker.ubatch_utils import UBatchSlice

        assert self._split is not None
        return [UBatchSlice(slice(*p.requests), slice(*p.tokens)) for p in self._split.micro_batches]
