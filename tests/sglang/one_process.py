"""Real ModelRunners in this process, driven the way `sglang.benchmark.one_batch` does: no scheduler, one rank."""

import contextlib
import os
from array import array

import torch

COMMON = dict(  # to engines too (`engine_run.py`)
    device="cpu",
    dtype="float32",  # in bfloat16 a micro-batch may take another CPU kernel than the whole batch, and near-ties flip
    attention_backend="strict",
    max_total_tokens=4096,
    max_running_requests=16,
    mem_fraction_static=0.3,
    disable_cuda_graph=True,
    random_seed=0,
)
SETTINGS = COMMON | dict(sampling_backend="pytorch", disable_overlap_schedule=True, disable_radix_cache=True)


def load(model, **options):
    """A ModelRunner of the model at this path, with weights and pools."""
    os.environ["SGLANG_CPU_OMP_THREADS_BIND"] = "0"
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.benchmark import one_batch
    from sglang.srt.entrypoints.engine import _set_envs_and_config
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import PortArgs, ServerArgs

    arguments = ServerArgs(model_path=str(model), **SETTINGS | options)
    arguments.resolve_once()
    _set_envs_and_config(arguments)
    arguments.check_server_args()
    publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0))
    one_batch._init_process_global_configs()
    return one_batch.load_model(arguments, PortArgs.init_new(arguments), 0, 0)[0].torch_runner


def unload():
    from sglang.srt.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel
    from sglang.srt.eplb.expert_location import set_global_expert_location_metadata

    set_global_expert_location_metadata(None, allow_overwrite=True)
    destroy_model_parallel()
    destroy_distributed_environment()


def prefill(runner, prompts, new_tokens):
    """The first new token of each request, the logits, and the batch that `decode` goes on with."""
    from sglang.benchmark import one_batch
    from sglang.srt.sampling.sampling_params import SamplingParams

    runner.req_to_token_pool.clear()
    runner.token_to_kv_pool_allocator.clear()
    requests = []
    for number, prompt in enumerate(prompts):
        sampling = SamplingParams(temperature=0, max_new_tokens=new_tokens)
        ids = array("q", prompt)
        request = one_batch.Req(rid=str(number), origin_input_text="", origin_input_ids=ids, sampling_params=sampling)
        request.full_untruncated_fill_ids = ids
        request.logprob_start_len = -1
        request.extend_end = len(ids)
        requests.append(request)
    return one_batch.extend(requests, runner)


def decode(runner, ids, batch):
    """The next token of each request after `ids`, and the logits."""
    from sglang.benchmark import one_batch

    return one_batch.decode(ids, batch, runner)


def generate(runner, prompts, new_tokens):
    """Greedy tokens [requests, new_tokens] and the last logits."""
    ids, logits, batch = prefill(runner, prompts, new_tokens)
    tokens = [ids.clone()]
    for _ in range(new_tokens - 1):
        ids, logits = decode(runner, ids, batch)
        tokens.append(ids.clone())
    return torch.stack(tokens, 1), logits


@contextlib.contextmanager
def dynaflow(runner, config):
    """`runner`, loaded as a stock one, under DynaFlow; stock again after it."""
    from sglang.srt.runtime_context import get_parallel

    from dynaflow_serving.config import load as load_config
    from dynaflow_serving.integrations.sglang.runner import DynaflowRunner

    ours = DynaflowRunner(runner, load_config(config))
    ours.make_backends()
    ours.install()
    try:
        ours.check(get_parallel().tp_group.cpu_group)
        yield ours
    finally:
        ours.remove()
