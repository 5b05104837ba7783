"""`Replicas` is an engine with two data-parallel ranks, for tests.

vLLM's CPU build lacks the exchange of tokens between data-parallel ranks, and its experts take no map of experts.
`EXPERTS_PLUGIN` adds both in every process, over gloo. All experts of such ranks write to one workspace, as on CUDA. A
combine is slow, so that it would show if it read what another micro-batch has overwritten.
"""

import asyncio
import os

EXPERTS_PLUGIN = """
def register():
    import time

    import torch
    import torch.distributed as dist
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEKernelModularImpl

    if hasattr(CpuCommunicator, "_gathers"):
        return
    CpuCommunicator._gathers = True

    def all_gatherv(self, input_, dim=0, sizes=None):
        if isinstance(input_, list):
            return [all_gatherv(self, x, dim, sizes) for x in input_]
        most = max(sizes)  # gloo gathers equal shapes only
        mine = input_.new_zeros(most, *input_.shape[1:])
        mine[: len(input_)] = input_
        everyone = [torch.empty_like(mine) for _ in sizes]
        dist.all_gather(everyone, mine, group=self.device_group)
        return torch.cat([x[:n] for x, n in zip(everyone, sizes)])

    def reduce_scatterv(self, input_, dim=-1, sizes=None):
        time.sleep(0.002)
        total = input_.clone()
        dist.all_reduce(total, group=self.device_group)
        return total.split(sizes)[self.rank_in_group].clone()

    def combine_into_output(self, *args):  # as CUDA's communicator does
        return self.all2all_manager.combine_into_output(*args)

    CpuCommunicator.all_gatherv, CpuCommunicator.reduce_scatterv = all_gatherv, reduce_scatterv
    CpuCommunicator.combine_into_output = combine_into_output
    stock = CPUUnquantizedExperts.apply

    def apply(self, *, topk_weights, topk_ids, expert_map, **kwargs):
        if expert_map is not None:
            local = expert_map[topk_ids.long()]  # -1 for the experts of other ranks
            topk_weights = topk_weights.masked_fill(local < 0, 0)
            topk_ids = local.clamp(min=0).to(topk_ids.dtype)
        return stock(self, topk_weights=topk_weights, topk_ids=topk_ids, expert_map=expert_map, **kwargs)

    CPUUnquantizedExperts.apply = apply
    allocate, workspace = FusedMoEKernelModularImpl._allocate_buffers, torch.empty(1 << 20)

    def allocate_in_workspace(self, *args, **kwargs):
        *others, output, specialized = allocate(self, *args, **kwargs)
        if self.is_dp_ep:
            output = workspace[: output.numel()].view_as(output)
        return *others, output, specialized

    FusedMoEKernelModularImpl._allocate_buffers = allocate_in_workspace
"""


class Replicas:
    """An engine with two data-parallel ranks, a process each; a request goes to the rank that a test names."""

    def __init__(self, model, dynaflow=None, **options):
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
        os.environ["TEST_MODE3"] = ""
        settings = dict(
            max_model_len=512, max_num_seqs=16, max_num_batched_tokens=96, seed=0, dtype="float32",
            data_parallel_size=2, enforce_eager=True,
            distributed_executor_backend="uni",  # the worker is in the process of its engine
        )  # fmt: skip
        if dynaflow is not None:
            settings["additional_config"] = {"dynaflow": dynaflow}
        self._names = 0
        self._runner = asyncio.Runner()

        async def start():
            return AsyncLLM.from_engine_args(AsyncEngineArgs(model, **settings | options))

        self.engine = self._runner.run(start())

    def generate(self, requests, max_tokens=12, abort_after=()):
        """Run (rank, prompt) `requests` at once, and return the tokens of each.

        max_tokens: a number, or one per request. abort_after: by request, the tokens after which it is aborted.
        """
        limits = [max_tokens] * len(requests) if isinstance(max_tokens, int) else max_tokens
        aborts = dict(abort_after)
        return self._runner.run(self._gather(requests, limits, aborts))

    async def _gather(self, requests, limits, aborts):
        runs = [self._one(r, p, n, aborts.get(i)) for i, ((r, p), n) in enumerate(zip(requests, limits, strict=True))]
        return await asyncio.wait_for(asyncio.gather(*runs), 240)

    async def _one(self, rank, prompt, max_tokens, abort):
        from vllm import SamplingParams, TokensPrompt

        self._names += 1
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        stream = self.engine.generate(
            TokensPrompt(prompt_token_ids=prompt), sampling, f"r{self._names}", data_parallel_rank=rank
        )
        tokens = []
        async for output in stream:
            tokens = list(output.outputs[0].token_ids)
            if abort is not None and len(tokens) >= abort:
                await stream.aclose()  # as when a client goes away
                break
        return tokens

    def call(self, method):
        """Return what `method` of each rank's worker returns."""

        async def call():
            return await self.engine.engine_core.call_utility_all_async("collective_rpc", method, None, (), None)

        return [of_rank[0] for of_rank in self._runner.run(call())]

    def close(self):
        async def stop():
            self.engine.shutdown(timeout=0)  # within the loop, which its sockets belong to

        self._runner.run(stop())
        self._runner.close()
        del self.engine
