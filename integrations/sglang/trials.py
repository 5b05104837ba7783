"""Trials in SGLang are real steps that no user asked for, in the mode that serves. The policy and the check run them.

Contract
- A trial is a `ScheduleBatch` of new requests that is forwarded and sampled as SGLang's worker does it. An un-split
  decode step replays its CUDA graph.
- Preparing a batch is not timed: it happens once, in the batch's first run. SGLang prepares a batch while the device is
  busy with the one before.
- A batch's tokens in the KV cache are slots whose contents do not matter. Token ids are drawn at random, so that a
  router spreads them over the experts.
- Leaving the `with` block gives back everything that was allocated, and restores the runner's counters.
- The ranks of a tensor-parallel group run the same trials in lock step.
- `facts` gives the key of the decisions. Settings that change no decision (log folders, ports, budgets) are not in it.
"""

from __future__ import annotations

import json
import math
import random
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

from dynaflow_serving.core.batch import Batch
from dynaflow_serving.policy.bucket import Limits, representatives
from dynaflow_serving.policy.key import engine_key
from dynaflow_serving.policy.side_effects import Facts
from dynaflow_serving.session.session import Session

STEP_STATE = ("forward_pass_id", "shared_read_done_event")  # every step changes these attributes of a ModelRunner
# The time of a step depends on these resolved arguments, besides those that `facts` names one by one.
MODE = (
    "attention_backend",
    "bf16_gemm_backend",
    "decode_attention_backend",
    "disable_custom_all_reduce",
    "disable_cuda_graph_padding",
    "disable_shared_experts_fusion",
    "enable_deterministic_inference",
    "enable_fused_moe_sum_all_reduce",
    "enable_mscclpp",
    "enable_nccl_nvls",
    "enable_quant_communications",
    "enable_tf32_matmul",
    "enable_torch_symm_mem",
    "fp4_gemm_runner_backend",
    "fp8_gemm_runner_backend",
    "model_impl",
    "moe_runner_backend",
    "prefill_attention_backend",
    "quantization",
    "sampling_backend",
    "triton_attention_num_kv_splits",
)


class RunnerTrials:
    """These are the trials of one ModelRunner under DynaFlow. It is a context manager."""

    def __init__(self, runner: Any, tree_cache: Any) -> None:
        """Prepare no batch yet.

        Args:
            runner: The `ModelRunner` that runs the steps.
            tree_cache: The scheduler's cache over the runner's pools; it must be empty.
        """
        self.runner, self.tree_cache = runner, tree_cache
        self._batch = Batch(())  # the batch that is prepared
        self._prepared: Any = None
        self._requests: list[Any] = []
        self._kept: dict[str, Any] = {}

    def __enter__(self) -> RunnerTrials:
        self._kept = {name: getattr(self.runner, name) for name in STEP_STATE}
        return self

    def __exit__(self, *_: Any) -> None:
        self._release()
        for name, value in self._kept.items():
            setattr(self.runner, name, value)

    @property
    def limits(self) -> Limits:
        """The scheduler and the pools set these limits."""
        from sglang.srt.runtime_context import get_schedule

        chunk, most = get_schedule().chunked_prefill_size or 0, get_schedule().max_prefill_tokens
        pool = self.runner.req_to_token_pool
        return Limits(
            tokens=min(chunk, most) if chunk > 0 else most,
            requests=min(self.runner.max_running_requests, pool.size),
            length=min(self.runner.model_config.context_len, pool.max_context_len),
            cached=self.tree_cache.token_to_kv_pool_allocator.available_size(),
        )

    @property
    def mixes(self) -> bool:
        """This says whether the scheduler puts prompts and decodes into one step."""
        from sglang.srt.runtime_context import get_schedule

        return bool(get_schedule().enable_mixed_chunk) and (get_schedule().chunked_prefill_size or 0) > 0

    def batches(self) -> Iterator[Batch]:
        """Yield one batch of each bucket that the pool has room for.

        A request has pages of its own. Prompts come before decodes, because SGLang mixes them in this order.
        """
        page = self.tree_cache.token_to_kv_pool_allocator.page_size
        limits, mixes = self.limits, self.mixes
        for batch in representatives(limits):
            requests = sorted(zip(batch.tokens, batch.context, strict=True), key=lambda request: request[1] > 0)
            requests = [(new, max(1, (c + 1) // page * page - 1) if c else 0) for new, c in requests]
            mixed = len({context > 0 for _, context in requests}) > 1
            used = sum(math.ceil((new + context) / page) * page for new, context in requests)
            if used <= limits.cached and (mixes or not mixed):
                yield Batch(tuple(new for new, _ in requests), tuple(context for _, context in requests))

    def run_step(self, batch: Batch) -> None:
        """Forward and sample `batch`, which is prepared anew if it is not the batch of the call before."""
        from sglang.srt.model_executor.forward_batch_info import ForwardBatch
        from sglang.srt.utils import DynamicGradMode

        if batch is not self._batch:
            self._release()
            self._prepare(batch)
        with DynamicGradMode():
            forward_batch = ForwardBatch.init_new(self._prepared, self.runner, return_hidden_states_before_norm=False)
            output = self.runner.forward(forward_batch)
            self.runner.sample(output.logits_output, forward_batch)

    # -- the batch -----------------------------------------------------------------------------------
    def _prepare(self, batch: Batch) -> None:
        """Allocate for `batch`, and turn it into the `ScheduleBatch` that the scheduler hands to its worker."""
        import torch

        draw = random.Random(0)
        decodes = [self._request(draw, context) for context in batch.context if context]
        prompts = [self._request(draw, new) for new, context in zip(batch.tokens, batch.context) if not context]
        self._requests = prompts + decodes
        parts, ids = [], []
        for requests in filter(None, (prompts, decodes)):
            part = self._schedule_batch(requests)
            if requests is decodes:
                part.prepare_for_decode()
                ids.append(torch.tensor([r.origin_input_ids[-1] for r in requests], device=part.device))
            else:
                ids.append(part.prefill_input_ids_cpu.to(part.device))
            parts.append(part)
        if len(parts) > 1:
            parts[0].mix_with_running(parts[1])
        self._prepared = parts[0]
        self._prepared.input_ids = torch.cat(ids)
        self._prepared.prefill_input_ids_cpu = self._prepared.mix_running_indices = None
        self._batch = batch

    def _request(self, draw: random.Random, tokens: int) -> Any:
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.sampling.sampling_params import SamplingParams

        ids = array("q", draw.choices(range(self.runner.model_config.vocab_size), k=tokens))
        # Greedy sampling draws nothing from the generators that users' requests will draw from.
        sampling = SamplingParams(temperature=0, max_new_tokens=2)
        request = Req("dynaflow-trial", "", ids, sampling)
        request.full_untruncated_fill_ids = ids
        request.logprob_start_len = -1
        request.extend_end = len(ids)
        return request

    def _schedule_batch(self, requests: Sequence[Any]) -> Any:
        from sglang.srt.managers.schedule_batch import ScheduleBatch
        from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

        batch = ScheduleBatch.init_new(
            list(requests),
            self.tree_cache.req_to_token_pool,
            self.tree_cache.token_to_kv_pool_allocator,
            self.tree_cache,
            self.runner.model_config,
            enable_overlap=False,
            spec_algorithm=SpeculativeAlgorithm.NONE,
        )
        batch.prepare_for_extend()
        return batch

    def _release(self) -> None:
        from sglang.srt.mem_cache.common import release_kv_cache

        requests, self._requests = self._requests, []
        self._batch, self._prepared = Batch(()), None
        for request in requests:
            if request.kv.holds_kv:
                release_kv_cache(request, self.tree_cache, checkpoint=False)


def facts(runner: Any, session: Session, body: Any, limits: Limits) -> Facts:
    """Return the facts about `runner`'s model and engine that the policy needs; `body` is the part that is split."""
    from sglang.srt.model_executor.runner.eager_runner import EagerRunner
    from sglang.srt.runtime_context import get_context, get_parallel
    from sglang.version import __version__

    model, ranks, arguments = runner.model_config, get_parallel().tp_size, get_context().resolved_server_args_dict()
    graphs = {phase: [c["backend"], c["max_bs"]] for phase, c in (arguments["cuda_graph_config"] or {}).items()}
    key = {
        "engine": f"sglang {__version__}",
        "mode": f"{session.mode} " + json.dumps({name: arguments[name] for name in MODE}, default=str),
        "dtype": f"{runner.dtype}, KV cache {runner.kv_cache_dtype}",
        "ranks": str(ranks),
        "limits": f"{limits.tokens} tokens, {limits.requests} requests, {limits.length} long, pages of "
        f"{runner.token_to_kv_pool_allocator.page_size}, mixed: {arguments['enable_mixed_chunk']}",
        "graphs": "none" if arguments["disable_cuda_graph"] else json.dumps(graphs),
        **engine_key(session, runner.model, model.hf_config.to_dict(), str(runner.device).partition(":")[0]),
    }
    replayed = (runner.decode_cuda_graph_runner, runner.prefill_cuda_graph_runner)
    return Facts(
        key,
        weight_bytes=sum(p.numel() * p.element_size() for p in body.parameters()),
        collective_bytes=model.hidden_size * runner.dtype.itemsize if ranks > 1 else 0,
        graphs=any(g is not None and not isinstance(g, EagerRunner) for g in replayed),
    )
