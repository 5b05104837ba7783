"""`V2RunnerMixin` decides each step's split in Model Runner V2, and takes the place of vLLM's dual-batch overlap.

Contract
- V2 asks its CUDA-graph manager how a step runs. For a split step the answer is "that many micro-batches, no graph".
  V2 then calls its `ubatch_runner`, which is `MicroBatchRunner` here.
- Where a step is compared, it also runs the whole batch, under metadata prepared as for an un-split step.
- Warm-up runs whole: vLLM sends it through `execute_model` too, and the ranks have not compared plans yet.
- V2 keeps its block tables on the device. The ids are also kept here, so that looking for prefix-cache hits within a
  step does not wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dynaflow_serving.integrations.vllm.runner import RunnerMixin


class V2RunnerMixin(RunnerMixin):
    """This goes over `vllm.v1.worker.gpu.model_runner.GPUModelRunner` and its CPU subclass."""

    _block_ids: dict[str, list[list[int]]]  # the block ids, by request, then by KV-cache group

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(*args, **kwargs)  # type: ignore[misc]
        self.create_metadata_builders(self.kernel_block_sizes)  # type: ignore[attr-defined]
        self._block_ids = {}
        self.ubatch_runner = MicroBatchRunner(self)
        manager: Any = self.cudagraph_manager  # type: ignore[attr-defined]
        manager.dispatch = self._dispatch_over(manager.dispatch)

    def _dispatch_over(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """Return a `dispatch` that answers for split steps, and leaves the others to `stock`."""
        from vllm.config import CUDAGraphMode
        from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

        def dispatch(num_reqs: int, num_tokens: int, *args: Any, **kwargs: Any) -> Any:
            if parts := self.dynaflow.session.micro_batches:
                return BatchExecutionDescriptor(CUDAGraphMode.NONE, num_tokens, num_reqs, num_ubatches=len(parts))
            return stock(num_reqs, num_tokens, *args, **kwargs)

        return dispatch

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().execute_model(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.end_step()

    def gather_batch_req_state(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        state, uniform = super().gather_batch_req_state(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        if state is not None and self.dynaflow.serving:
            computed = self.req_states.num_computed_tokens_np[state.idx_mapping_np]  # type: ignore[attr-defined]
            # Requests resumed after a preemption are among the new ones.
            new = {r.req_id for r in scheduler_output.scheduled_new_reqs}
            joined = [row for row, name in enumerate(state.req_ids) if name in new]
            tables = (
                (size, [self._block_ids[name][group] for name in state.req_ids])
                for group, size in enumerate(self.block_tables.block_sizes)  # type: ignore[attr-defined]
            )
            self.begin_step(state.num_scheduled_tokens, computed, joined, tables)
        return state, uniform

    def add_requests(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> None:
        super().add_requests(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        for request in scheduler_output.scheduled_new_reqs:
            self._block_ids[request.req_id] = [list(ids) for ids in request.block_ids]

    def update_requests(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> None:
        super().update_requests(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        cached = scheduler_output.scheduled_cached_reqs
        for name, new in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if new is not None:
                for ids, more in zip(self._block_ids[name], new, strict=True):
                    ids.extend(more)

    def _remove_request(self, req_id: str, *args: Any, **kwargs: Any) -> bool:
        self._block_ids.pop(req_id, None)
        return bool(super()._remove_request(req_id, *args, **kwargs))  # type: ignore[misc]


class MicroBatchRunner:
    """In place of vLLM's `UBatchRunner`, `execute_model` calls this for a step of several micro-batches."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        # Offsets and lengths are relative to the micro-batch, so they cannot be views of the whole batch's.
        shape = (runner.dynaflow.session.selector.max_micro_batches, runner.max_num_reqs + 1)
        self._query_start_loc = torch.zeros(shape, dtype=torch.int32, device=runner.device)
        self._seq_lens = torch.zeros(shape, dtype=torch.int32, device=runner.device)
        self._step: tuple[Any, ...] = ()  # the arguments of `_run_whole` for the live step

    def prepare(
        self, input_batch: Any, block_tables: tuple[torch.Tensor, ...], slot_mappings: torch.Tensor, **kwargs: Any
    ) -> Any:
        """Prepare the forward contexts of the live step's micro-batches.

        Args:
            input_batch: vLLM's inputs of the whole batch.
            block_tables: One tensor [requests, blocks] per KV-cache group.
            slot_mappings: A tensor [groups, tokens].
            **kwargs: `cg_mode` is how the step runs, by vLLM's CUDA-graph manager.
        """
        from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
        from vllm.v1.worker.gpu.ubatch_utils import UBatchState, _slice_input_batch

        runner = self.runner
        slices = runner.ubatch_slices()
        metadata, slots = [], []
        for i, part in enumerate(slices):
            mapping = slot_mappings[:, part.token_slice]
            metadata.append(
                runner.model_state.prepare_attn(
                    _slice_input_batch(input_batch, part, self._query_start_loc[i], self._seq_lens[i]),
                    kwargs["cg_mode"],
                    tuple(table[part.request_slice] for table in block_tables),
                    mapping,
                    runner.attn_groups,
                    runner.kv_cache_config,
                    ubatch_idx=i,
                )
            )
            slots.append(build_slot_mappings_by_layer(mapping, runner.kv_cache_config))
        runner.dynaflow.contexts.set(metadata, slots, input_batch.is_padding)
        self._step = (input_batch, kwargs["cg_mode"], block_tables, slot_mappings)
        return UBatchState(slices, forward_contexts=[])  # `ForwardContexts` has them

    def run(self, model: Callable[..., Any], model_inputs: dict[str, Any], state: Any) -> Any:
        """Run the prepared step, which may be compared with an un-split one."""
        step, self._step = self._step, ()
        live = self.runner.dynaflow.session.in_flight
        result = model(**model_inputs)
        return live.checked(result, lambda: self._run_whole(model, model_inputs, *step), model_inputs.values())

    def _run_whole(
        self, model: Callable[..., Any], model_inputs: dict[str, Any], input_batch: Any, cg_mode: Any,
        block_tables: tuple[torch.Tensor, ...], slot_mappings: torch.Tensor,
    ) -> Any:  # fmt: skip
        """Run the live split step un-split, to compare with; there are no micro-batches then."""
        from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer

        runner = self.runner
        runner.dynaflow.session.clock.synchronize()  # builders keep buffers that the split forward may still read
        metadata = runner.model_state.prepare_attn(
            input_batch, cg_mode, block_tables, slot_mappings, runner.attn_groups, runner.kv_cache_config
        )
        slots = build_slot_mappings_by_layer(slot_mappings, runner.kv_cache_config)
        with runner.dynaflow.contexts.unsplit(metadata, slots):
            return model(**model_inputs)
