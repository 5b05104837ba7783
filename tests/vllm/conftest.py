"""Real vLLM on CPU: engines run in this process (TP=1) or with worker processes (TP=2).

Mode 3 is what CUDA uses by default; CPU rewrites it to mode 2. `MODE3_PLUGIN` undoes the rewrite in every
process through vLLM's own plugin mechanism, so that VllmBackend and its pieces run as on CUDA.

Model Runner V2, CUDA's default too, needs an active Triton. Where Triton is installed (`nox -s vllm_v2`) its
kernels are interpreted, and an entry point tells vLLM in every process that there is a backend for CPU.

`EXPERTS_PLUGIN` adds what vLLM's CPU build lacks for experts over data-parallel ranks, in every process too.

An engine takes ten seconds to start, so the stock one runs once per model and prompts (`stock_tokens`).
"""

import contextlib
import gc
import hashlib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from replicas import EXPERTS_PLUGIN

from dynaflow_serving.bench.serving.server import Server, free_port

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    "TRITON_INTERPRET": "1",
}

MODE3_PLUGIN = """
import os

def register():
    from vllm.config import CompilationMode, VllmConfig
    from vllm.platforms.cpu import CpuPlatform
    if getattr(CpuPlatform, "_mode3", False):
        return
    CpuPlatform._mode3 = True
    check, ranges = CpuPlatform.check_and_update_config.__func__, VllmConfig._set_compile_ranges

    def check_and_update_config(cls, vllm_config):
        check(cls, vllm_config)
        c = vllm_config.compilation_config
        if os.environ.get("TEST_MODE3") and c.mode == CompilationMode.DYNAMO_TRACE_ONCE:
            c.mode, c.backend, c.compile_sizes = CompilationMode.VLLM_COMPILE, "eager", []

    def set_compile_ranges(self):
        ranges(self)
        if os.environ.get("TEST_MODE3"):
            self.compilation_config.compile_sizes = self.compilation_config.compile_sizes or []

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
    VllmConfig._set_compile_ranges = set_compile_ranges
"""

# An interpreted Triton asks its backend for nothing but whether it is active.
TRITON_BACKEND = """
from triton.backends.{module} import {base} as Base

Interpreted = type(Base)("Interpreted", (Base,), dict.fromkeys(Base.__abstractmethods__, lambda *_: False))
"""

MODES = {
    "mode2-uncompiled": {"mode": 2, "backend": "eager"},
    "mode2-compiled": {},  # what vLLM chooses on CPU: mode 2, Inductor
    "mode3": {},
    "none": {"mode": 0},  # what --enforce-eager gives
}


@dataclass
class Outcome:
    tokens: list
    reports: list = field(default_factory=list)

    @property
    def split(self):
        return self.reports[0]["steps"]["split"]


@pytest.fixture(scope="session", autouse=True)
def plugins(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "mode3_on_cpu.py").write_text(MODE3_PLUGIN)
    (folder / "experts_on_cpu.py").write_text(EXPERTS_PLUGIN)
    info = folder / "mode3_on_cpu-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mode3-on-cpu\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nmode3_on_cpu = mode3_on_cpu:register\nexperts_on_cpu = experts_on_cpu:register\n"
        "[triton.backends]\ncpu = interpreted\n"
    )
    (folder / "interpreted").mkdir()
    for module, base in (("compiler", "BaseBackend"), ("driver", "DriverBase")):
        (folder / "interpreted" / f"{module}.py").write_text(TRITON_BACKEND.format(module=module, base=base))
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))


@pytest.fixture(scope="session")
def generate(model_path, prompts):
    """`generate(kind, mode, tp, dynaflow, ...) -> Outcome`: one engine, greedy tokens, then shut down.

    float32: in bfloat16 micro-batches of other sizes pick other CPU kernels, and near-ties flip.
    """
    mixed = prompts

    def run(kind, mode="mode2-uncompiled", tp=1, dynaflow=None, prompts=None, max_tokens=12, **options):
        return _run(model_path(kind), mode, tp, dynaflow, prompts or mixed, max_tokens, options)

    return run


@pytest.fixture(scope="session")
def stock_tokens(generate, tmp_path_factory):
    """`stock_tokens(kind, ...)`: the stock engine's, in mode 2, un-compiled, on one rank; one run for all tests."""
    from filelock import FileLock

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all workers

    def tokens(kind, **options):
        key = hashlib.sha256(json.dumps([kind, options], sort_keys=True).encode()).hexdigest()
        file = folder / f"stock-{key}.json"
        with FileLock(f"{file}.lock"):
            if not file.exists():
                file.write_text(json.dumps(generate(kind, **options).tokens))
        return json.loads(file.read_text())

    return tokens


@pytest.fixture(scope="session")
def check_tokens(generate, stock_tokens):
    """`check_tokens(outcome, kind, mode, tp, ...)`: the outcome's tokens are the stock engine's.

    In float32 they are the same in all modes and on two ranks; where rounding has made them others, the stock
    engine in that very mode decides.
    """

    def check(outcome, kind, mode="mode2-uncompiled", tp=1, **options):
        if outcome.tokens != stock_tokens(kind, **options):
            assert outcome.tokens == generate(kind, mode, tp, **options).tokens

    return check


def _run(model, mode, tp, dynaflow, prompts, max_tokens, options):
    import torch
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.distributed import cleanup_dist_env_and_memory

    torch._dynamo.reset()
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind" if tp == 1 else "0|1"
    os.environ["TEST_MODE3"] = "1" if mode == "mode3" else ""
    settings = dict(
        max_model_len=512, max_num_seqs=16, max_num_batched_tokens=96, seed=0, dtype="float32",
        tensor_parallel_size=tp, compilation_config=dict(MODES[mode]),
    )  # fmt: skip
    if dynaflow is not None:
        settings["additional_config"] = {"dynaflow": dynaflow}
    llm = None
    try:
        llm = LLM(model, **settings | options)
        expected = {"mode3": 3, "none": 0}.get(mode, 2)
        assert int(llm.llm_engine.vllm_config.compilation_config.mode) == expected
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        outputs = llm.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], sampling, use_tqdm=False)
        tokens = [list(o.outputs[0].token_ids) for o in outputs]
        reports = llm.collective_rpc("dynaflow_report") if dynaflow is not None else []
        return Outcome(tokens, reports)
    finally:
        os.environ["TEST_MODE3"] = ""
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


@pytest.fixture
def start(model_path):
    """`start(dynaflow, ...)` builds the engine's config as LLM() does, which ends before weights load."""
    from vllm import EngineArgs

    def create(dynaflow, **options):
        settings = {"model": model_path("llama"), "max_model_len": 512, **options}
        return EngineArgs(additional_config={"dynaflow": dynaflow}, **settings).create_engine_config()

    return create


@pytest.fixture
def server(model_path, tmp_path):
    """`server(*flags)` -> a `vllm serve` that is healthy; stopped afterwards."""
    with contextlib.ExitStack() as running:

        def start(*flags):
            port = free_port()
            environment = {
                "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
                "VLLM_LOGGING_LEVEL": "INFO",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "TEST_MODE3": "",
            }
            command = [
                str(Path(sys.executable).with_name("vllm")), "serve", model_path("llama"), "--served-model-name",
                "tiny", "--port", str(port), "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "16",
                "--compilation-config", '{"mode": 2, "backend": "eager"}', *flags,
            ]  # fmt: skip
            started = Server("vllm", command, port, environment, tmp_path / f"serve{port}.log")
            running.callback(started.stop)
            started.wait(240)
            return started

        yield start
