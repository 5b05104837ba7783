"""Steps that no user asked for, for the policy (`strategy: auto`): real ones, in the mode that serves.

Contract
- A trial is a `ScheduleBatch` of new requests that is forwarded and sampled as SGLang's worker does it; an un-split
  decode step replays its CUDA graph. What is timed is that: a batch is prepared once, in its first run, for SGLang
  prepares batches while the device is busy with the one before.
- Tokens that a batch has in the KV cache are slots whose contents do not matter. Token ids are drawn, so that a router
  spreads them over the experts.
- Leaving the `with` block gives back all that was allocated, and restores the runner's counters.
- The ranks of a tensor-parallel group run the same trials in lock step.
- `facts` says what the decisions hold for: what changes none (log folders, ports, budgets) is not in the key.
"""

from __future__ import annotations

import hashlib
import json
import random
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

from dynaflow_serving.core.batch import Batch
from dynaflow_serving.policy.bucket import Limits, representatives
from dynaflow_serving.policy.calls import machine_key, selector_key
from dynaflow_serving.policy.effects import Facts
from dynaflow_serving.session.session import Session

STEP_STATE = ("forward_pass_id", "shared_read_done_event")  # of a ModelRunner, that every step changes
# Resolved arguments that the time of a step depends on, besides those that `facts` names one by one.
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
    """Of one ModelRunner under DynaFlow; a context manager. `tree_cache`: of the same pools, and empty."""

    def __init__(self, runner: Any, tree_cache: Any) -> None:
        self.runner, self.tree_cache = runner, tree_cache
        self._batch = Batch(())  # the one that is prepared
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
        """Whether the scheduler puts prompts and decodes into one step."""
        from sglang.srt.runtime_context import get_schedule

        return bool(get_schedule().enable_mixed_chunk) and (get_schedule().chunked_prefill_size or 0) > 0

    def batches(self) -> Iterator[Batch]:
        """Those that the pool has room for, a request having pages of its own; prompts before decodes, as SGLang
        mixes them."""
        page = self.tree_cache.token_to_kv_pool_allocator.page_size
        limits, mixes = self.limits, self.mixes
        for batch in representatives(limits):
            requests = sorted(zip(batch.tokens, batch.context, strict=True), key=lambda request: request[1] > 0)
            requests = [(new, max(1, (c + 1) // page * page - 1) if c else 0) for new, c in requests]
            mixed = len({context > 0 for _, context in requests}) > 1
            used = sum(-(-(new + context) // page) * page for new, context in requests)
            if used <= limits.cached and (mixes or not mixed):
                yield Batch(tuple(new for new, _ in requests), tuple(context for _, context in requests))

    def run(self, batch: Batch) -> None:
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
        """Allocate for `batch`, and make it what the scheduler hands to its worker."""
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
        # Greedy: nothing is drawn from the generators that users' requests will draw from.
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
    """What the policy has to know of `runner`'s model and engine. `body`: the part that is split."""
    from sglang.srt.model_executor.runner.eager_runner import EagerRunner
    from sglang.srt.runtime_context import get_context, get_parallel
    from sglang.version import __version__

    model, ranks, arguments = runner.model_config, get_parallel().tp_size, get_context().resolved_server_args_dict()
    architecture = {k: v for k, v in model.hf_config.to_dict().items() if k != "_name_or_path"}
    graphs = {phase: [c["backend"], c["max_bs"]] for phase, c in (arguments["cuda_graph_config"] or {}).items()}
    key = {
        "engine": f"sglang {__version__}",
        "mode": f"{session.mode} " + json.dumps({name: arguments[name] for name in MODE}, default=str),
        "model": f"{type(runner.model).__name__} {_digest(json.dumps(architecture, sort_keys=True, default=str))}",
        "dtype": f"{runner.dtype}, KV cache {runner.kv_cache_dtype}",
        "ranks": str(ranks),
        "limits": f"{limits.tokens} tokens, {limits.requests} requests, {limits.length} long, pages of "
        f"{runner.token_to_kv_pool_allocator.page_size}, mixed: {arguments['enable_mixed_chunk']}",
        "graphs": "none" if arguments["disable_cuda_graph"] else json.dumps(graphs),
        "executor": session.config.model_dump_json(exclude={"strategy", "options", "trace", "shadow", "fallback"}),
        "programs": " ".join(c.captured.program.digest for c in session.plan_caches),
        "plans": _digest("\n".join(c.texts() for c in session.plan_caches)),
        **machine_key(str(runner.device).partition(":")[0]),
        **selector_key(session.selector),
    }
    replayed = (runner.decode_cuda_graph_runner, runner.prefill_cuda_graph_runner)
    return Facts(
        key,
        weight_bytes=sum(p.numel() * p.element_size() for p in body.parameters()),
        collective_bytes=model.hidden_size * runner.dtype.itemsize if ranks > 1 else 0,
        graphs=any(g is not None and not isinstance(g, EagerRunner) for g in replayed),
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
