"""`V1RunnerMixin` decides each step's split in Model Runner V1, and has attention metadata built per micro-batch.

Contract
- Only the methods named in `patches.md` are overridden, and each calls vLLM's own. Outside a live step nothing changes.
- vLLM builds the metadata itself, given the micro-batches as `ubatch_slices`. It builds them once more, without
  micro-batches, where a step is compared with an un-split one.
- Where data-parallel ranks vote, each also votes in its dummy steps, which vLLM runs on ranks without requests.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from dynaflow_serving.integrations.vllm.runner import RunnerMixin


class V1RunnerMixin(RunnerMixin):
    """This goes over `vllm.v1.worker.gpu_model_runner.GPUModelRunner` and its CPU subclass."""

    _live: Any = None  # the live step's SchedulerOutput
    _slices: Sequence[Any] = ()  # the live step's micro-batches
    # The live step's arguments of the two methods that describe the batch, without micro-batches.
    _slots: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
    _attention: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def initialize_metadata_builders(
        self, kv_cache_config: Any, kernel_block_sizes: list[int], *args: Any, **kwargs: Any
    ) -> None:
        super().initialize_metadata_builders(kv_cache_config, kernel_block_sizes, *args, **kwargs)  # type: ignore[misc]
        self.create_metadata_builders(kernel_block_sizes)

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        self._live = scheduler_output if scheduler_output.total_num_scheduled_tokens else None
        try:
            return super().execute_model(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        finally:
            self.end_step()
            self._live, self._slices = None, ()
            self._slots = self._attention = ((), {})

    def _determine_batch_execution_and_padding(self, *args: Any, **kwargs: Any) -> Any:
        if self._live is not None and self._step is None:
            tokens = kwargs["num_scheduled_tokens_np"]
            batch = self.input_batch  # type: ignore[attr-defined]
            tables = ((t.block_size, t.get_numpy_array()) for t in batch.block_table.block_tables)
            self.begin_step(tokens, batch.num_computed_tokens_cpu[: len(tokens)], self._joined(), tables)
            self._slices = self.ubatch_slices()
        elif self._live is None and self.dynaflow.session.vote is not None:
            self.dynaflow.session.vote.abstain()
        if self._slices:
            kwargs["force_eager"] = True
        return super()._determine_batch_execution_and_padding(*args, **kwargs)  # type: ignore[misc]

    def _get_slot_mappings(self, *args: Any, **kwargs: Any) -> Any:
        if self._slices:
            self._slots = args, dict(kwargs)
            kwargs["ubatch_slices"] = self._slices
        return super()._get_slot_mappings(*args, **kwargs)  # type: ignore[misc]

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> Any:
        if self._slices:
            self._attention = args, dict(kwargs)
            kwargs["ubatch_slices"] = self._slices
        return super()._build_attention_metadata(*args, **kwargs)  # type: ignore[misc]

    def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
        step = self._step
        if step is None or not self._slices:
            return super()._model_forward(*args, **kwargs)  # type: ignore[misc]
        from vllm.forward_context import get_forward_context

        forward = functools.partial(super()._model_forward, *args, **kwargs)  # type: ignore[misc]
        context = get_forward_context()
        self.dynaflow.contexts.set(context.attn_metadata, context.slot_mapping, context.is_padding)
        result = forward()
        return step.checked(result, lambda: self._run_whole(forward), (*args, *kwargs.values()))

    def _run_whole(self, forward: Callable[[], Any]) -> Any:
        """Run the live split step's forward un-split, to compare with; there are no micro-batches then."""
        # Builders of metadata keep buffers that the split forward may still read.
        self.dynaflow.session.clock.synchronize()
        args, kwargs = self._slots
        _, slots = super()._get_slot_mappings(*args, **{**kwargs, "ubatch_slices": None})  # type: ignore[misc]
        args, kwargs = self._attention
        metadata, _ = super()._build_attention_metadata(*args, **{**kwargs, "ubatch_slices": None})  # type: ignore[misc]
        with self.dynaflow.contexts.unsplit(metadata, slots):
            return forward()

    def _joined(self) -> list[int]:
        """Return the rows of the requests that are new in the live step, or resumed after a preemption."""
        names = [r.req_id for r in self._live.scheduled_new_reqs]
        names += self._live.scheduled_cached_reqs.resumed_req_ids
        return [self.input_batch.req_id_to_index[n] for n in names]  # type: ignore[attr-defined]
