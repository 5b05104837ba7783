"""Trials in vLLM are real steps that no user asked for, in the mode that serves. The policy and the check run them.

Contract
- A trial is one `SchedulerOutput` of new requests, run by the worker's own `execute_model` and `sample_tokens`. vLLM's
  warm-up does the same in Model Runner V2.
- A second, empty `SchedulerOutput` finishes the requests. Nothing of them stays in the engine.
- A batch's tokens in the KV cache are blocks whose contents do not matter. Block 0 is vLLM's null block. No two
  requests share a block, or `hazards` would see prefix-cache hits.
- The ranks of a tensor-parallel group run the same trials in lock step. So do data-parallel ones that share experts.
- `facts` gives the key of the decisions. Settings that change no decision (log folders, budgets) are not in it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from dynaflow_serving.core.batch import Batch
from dynaflow_serving.policy.bucket import Limits, representatives
from dynaflow_serving.policy.key import engine_key
from dynaflow_serving.policy.side_effects import Facts
from dynaflow_serving.session.session import Session

DRAWN = 4096  # so many token ids are drawn, for all trials
NAME = "_dynaflow_trial_{}_{}_"


class WorkerTrials:
    """These are the trials of one worker (`vllm.v1.worker.gpu_worker.Worker`), whose KV cache is empty."""

    def __init__(self, worker: Any) -> None:
        from vllm import SamplingParams

        self.worker, self._run = worker, 0
        groups = worker.model_runner.kv_cache_config.kv_cache_groups
        self._block_sizes: list[int] = [group.kv_cache_spec.block_size for group in groups]
        # Data-parallel ranks may have found room for different numbers of blocks.
        (fewest,) = worker.dynaflow.session.ranks.greatest([-worker.model_runner.kv_cache_config.num_blocks])
        self._blocks = int(-fewest) - 1  # without the null block
        # Equal tokens would hide errors from the check, and send all rows to the same experts.
        self._draw = random.Random(0)
        self._ids = self._draw.choices(range(worker.vllm_config.model_config.get_vocab_size()), k=DRAWN)
        # Greedy sampling with a seed draws nothing from the generators that users' requests will draw from.
        self._sampling = SamplingParams(temperature=0.0, max_tokens=2, seed=0)

    @property
    def limits(self) -> Limits:
        """Every batch within these limits fits into the KV cache.

        A request leaves less than a block per KV-cache group unused, so one block per request and group is set aside.
        """
        scheduler, model = self.worker.vllm_config.scheduler_config, self.worker.vllm_config.model_config
        groups = len(self._block_sizes)
        requests = max(1, min(scheduler.max_num_seqs, self._blocks // (2 * groups)))
        cached = int((self._blocks - requests * groups) / sum(1 / size for size in self._block_sizes))
        return Limits(
            tokens=scheduler.max_num_batched_tokens,
            requests=requests,
            length=model.max_model_len - 1,  # the sampled token needs a place, too
            cached=cached,
        )

    def batches(self) -> Iterator[Batch]:
        """Yield one batch of each bucket that can occur."""
        return representatives(self.limits)

    def run_step(self, batch: Batch) -> None:
        """Run `batch` as one step of new requests, and finish them."""
        from vllm.v1.core.sched.output import SchedulerOutput

        self._run += 1  # asynchronous scheduling looks for the names of the step before
        names = [NAME.format(self._run, i) for i in range(len(batch.tokens))]
        step, finished = SchedulerOutput.make_empty(), SchedulerOutput.make_empty()
        step.scheduled_new_reqs = self._requests(names, batch)
        step.num_scheduled_tokens = dict(zip(names, batch.tokens, strict=True))
        step.total_num_scheduled_tokens = sum(batch.tokens)
        finished.finished_req_ids = set(names)
        self.worker.execute_model(step)
        self.worker.sample_tokens(None)
        self.worker.execute_model(finished)

    def _requests(self, names: Sequence[str], batch: Batch) -> list[Any]:
        from vllm.v1.core.sched.output import NewRequestData

        free = 1  # the first free block; block 0 is the null block
        requests = []
        for name, new, context in zip(names, batch.tokens, batch.context, strict=True):
            # Model Runner V2 tells a decode by its prompt being computed already; V1 by the number of new tokens alone.
            decodes = self.worker.use_v2_model_runner and new == 1 and context > 0
            prompt = self._prompt(context if decodes else context + new)
            blocks = []
            for size in self._block_sizes:
                stop = free + math.ceil((context + new) / size)
                blocks.append(list(range(free, stop)))
                free = stop
            requests.append(
                NewRequestData(
                    req_id=name,
                    prompt_token_ids=prompt,
                    mm_features=[],
                    sampling_params=self._sampling,
                    pooling_params=None,
                    block_ids=tuple(blocks),
                    num_computed_tokens=context,
                    lora_request=None,
                    prefill_token_ids=prompt,
                )
            )
        return requests

    def _prompt(self, tokens: int) -> list[int]:
        """Return token ids, which begin somewhere in the drawn ones."""
        start = self._draw.randrange(DRAWN)
        return (self._ids * (2 + tokens // DRAWN))[start : start + tokens]


def facts(worker: Any, session: Session) -> Facts:
    """Return the facts about `worker`'s model and engine that the policy needs."""
    from vllm import __version__
    from vllm.config import CUDAGraphMode

    config = worker.vllm_config
    model, parallel, scheduler = config.model_config, config.parallel_config, config.scheduler_config
    ranks, module = parallel.tensor_parallel_size, worker.model_runner.get_model()
    key = {
        "engine": f"vllm {__version__}",
        "mode": session.mode,
        "dtype": f"{model.dtype}, KV cache {config.cache_config.cache_dtype}, quantization {model.quantization}",
        "ranks": f"{ranks} of {parallel.world_size}",
        "limits": f"{scheduler.max_num_batched_tokens} tokens, {scheduler.max_num_seqs} requests, "
        f"{model.max_model_len} long",
        "attention": " ".join(sorted({g.backend.get_name() for gs in worker.model_runner.attn_groups for g in gs})),
        "graphs": str(config.compilation_config.cudagraph_mode),
        **engine_key(session, module, model.hf_config.to_dict(), worker.device.type),
    }
    return Facts(
        key,
        weight_bytes=weight_bytes(module),
        collective_bytes=model.get_hidden_size() * model.dtype.itemsize if ranks > 1 else 0,
        graphs=config.compilation_config.cudagraph_mode not in (None, CUDAGraphMode.NONE),
    )


def weight_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of this rank's weights without the embedding and the head, which are not split."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    tables = [m for m in model.modules() if isinstance(m, VocabParallelEmbedding)]
    outside = {id(p) for table in tables for p in table.parameters()}
    return sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in outside)
