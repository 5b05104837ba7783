"""What replaces an engine's method passes on the arguments that a later release gives it; engines are stand-ins."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

LATER = {"later": 3}  # what we do not know


class Stock:
    """A class whose every method keeps its last arguments, and returns `results[name]`."""

    def __init__(self, **results: Any) -> None:
        self.results = results
        self.got: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def called(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.got[name] = args, kwargs
        return self.results.get(name)


def stock_class(*names: str) -> Any:
    """Return a class with these methods."""

    def method(name: str) -> Callable[..., Any]:
        return lambda self, *args, **kwargs: self.called(name, args, kwargs)

    return type("Engine", (Stock,), {name: method(name) for name in names})


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`modules({"vllm.config": {...}})`: modules of an engine that need not be installed."""

    def stand_in(contents: dict[str, dict[str, Any]]) -> None:
        for path, names in contents.items():
            parts = path.split(".")
            for i in range(1, len(parts) + 1):
                name = ".".join(parts[:i])
                if not isinstance(sys.modules.get(name), StandIn):
                    monkeypatch.setitem(sys.modules, name, StandIn(name))
            vars(sys.modules[path]).update(names)

    return stand_in


class StandIn(ModuleType):
    """A module that is there for one test."""

    __path__: list[str] = []


V1 = ("initialize_metadata_builders", "execute_model", "_determine_batch_execution_and_padding")
V1 += ("_get_slot_mappings", "_build_attention_metadata", "_model_forward")
V2 = ("initialize_kv_cache", "execute_model", "gather_batch_req_state", "add_requests", "update_requests")
V2 += ("_remove_request",)


def nothing_scheduled() -> Any:
    cached = SimpleNamespace(req_ids=[], new_block_ids=[], resumed_req_ids=[])
    return SimpleNamespace(scheduled_new_reqs=[], scheduled_cached_reqs=cached, total_num_scheduled_tokens=0)


def check(engine: Any, name: str, *args: Any) -> None:
    """Call the method as a later release would, and see that its stock form got the same."""
    getattr(engine, name)(*args, **LATER)
    assert engine.got[name] == (args, LATER)


@pytest.mark.parametrize(("version", "name"), [*(("V1", n) for n in V1), *(("V2", n) for n in V2)])
def test_model_runners_of_vllm(modules: Callable[..., None], version: str, name: str) -> None:
    modules({
        "vllm.forward_context": {"get_forward_context": MagicMock()},
        "vllm.config": {"CUDAGraphMode": MagicMock()},
        "vllm.v1.worker.gpu.cudagraph_utils": {"BatchExecutionDescriptor": MagicMock()},
        "vllm.v1.worker.ubatch_utils": {"UBatchSlice": MagicMock()},
    })  # fmt: skip
    runner = importlib.import_module(f"dynaflow_serving.integrations.vllm.runner_{version.lower()}")
    mixin = getattr(runner, f"{version}RunnerMixin")
    engine = type("Runner", (mixin, stock_class(*V1, *V2)), {})(gather_batch_req_state=(None, None))
    selector = SimpleNamespace(max_micro_batches=2)
    session = SimpleNamespace(in_flight=None, micro_batches=(), selector=selector, vote=None)
    engine.dynaflow = SimpleNamespace(session=session, serving=True)
    engine.attn_groups, engine.kernel_block_sizes, engine.cudagraph_manager = (), [], MagicMock()
    engine.max_num_reqs, engine.device, engine._block_ids = 4, torch.device("cpu"), {}
    second = {"initialize_metadata_builders": [], "gather_batch_req_state": False}
    check(engine, name, nothing_scheduled(), *([second[name]] if name in second else []))


def test_dispatch_of_vllm(modules: Callable[..., None]) -> None:
    modules({
        "vllm.config": {"CUDAGraphMode": MagicMock()},
        "vllm.v1.worker.gpu.cudagraph_utils": {"BatchExecutionDescriptor": MagicMock()},
    })  # fmt: skip
    from dynaflow_serving.integrations.vllm.runner_v2 import V2RunnerMixin

    runner, stock = MagicMock(), MagicMock()
    runner.dynaflow.session.micro_batches = ()
    V2RunnerMixin._dispatch_over(runner, stock)(2, 64, 1, **LATER)
    stock.assert_called_once_with(2, 64, 1, **LATER)


@pytest.fixture
def worker(modules: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A worker of vLLM with DynaFlow, after its device is there."""
    names = ("init_device", "load_model", "compile_or_warm_up_model", "shutdown")
    base = stock_class(*names)
    modules({
        "vllm.platforms": {"current_platform": SimpleNamespace(device_type="cpu", is_cpu=lambda: False)},
        "vllm.v1.worker.gpu_worker": {"Worker": base},
        "vllm.distributed.parallel_state": {"get_tp_group": MagicMock()},
    })  # fmt: skip
    path = "dynaflow_serving.integrations.vllm.worker"
    monkeypatch.delitem(sys.modules, path, raising=False)
    module = importlib.import_module(path)
    for name in ("WorkerState", "WorkerTrials", "eager", "mode3", "start_policy"):
        monkeypatch.setattr(module, name, MagicMock())
    made = module.GPUDynaflowWorker()
    parallel = SimpleNamespace(data_parallel_index=0, data_parallel_size=1, world_size=1)
    made.vllm_config, made.rank, made.use_v2_model_runner = SimpleNamespace(parallel_config=parallel), 0, True
    made.model_runner = type("Runner", (), {})()
    yield made
    sys.modules.pop(path, None)


def test_worker_of_vllm(worker: Any) -> None:
    for name in ("init_device", "load_model", "compile_or_warm_up_model", "shutdown"):
        check(worker, name)


def test_experts_of_vllm(modules: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, layers = stock_class("_fused_experts"), "vllm.model_executor.layers.fused_moe"
    modules({
        f"{layers}.modular_kernel": {"FusedMoEKernelModularImpl": kernel},
        f"{layers}.runner.shared_experts": {"SharedExperts": type("SharedExperts", (), {})},
    })  # fmt: skip
    from dynaflow_serving.integrations.vllm import experts

    experts.prepare_for_frames.__wrapped__()
    check(kernel(), "_fused_experts", 1)  # in an un-split step
    monkeypatch.setattr(experts, "current_frame", MagicMock())
    engine, tokens = kernel(_fused_experts=torch.zeros(3)), torch.zeros(2, 4)
    result = engine._fused_experts(1, a1q=tokens, in_dtype=torch.float32, **LATER)
    args, kwargs = engine.got["_fused_experts"]
    assert args == (1,) and kwargs.items() >= LATER.items() and kwargs["output_alias"].shape == tokens.shape
    assert result is not engine.results["_fused_experts"]  # vLLM's workspace


def test_engine_args_of_vllm(modules: Callable[..., None]) -> None:
    got: dict[str, Any] = {}

    class EngineArgs:
        additional_config = None

        @staticmethod
        def add_cli_args(parser: Any, **kwargs: Any) -> Any:
            got["add_cli_args"] = kwargs
            return parser

        @classmethod
        def from_cli_args(cls, args: Any, **kwargs: Any) -> Any:
            got["from_cli_args"] = kwargs
            return cls()

        def create_engine_config(self, *args: Any, **kwargs: Any) -> Any:
            got["create_engine_config"] = kwargs

    modules({"vllm.engine.arg_utils": {"EngineArgs": EngineArgs}})
    from dynaflow_serving.integrations.vllm.plugin import register

    register()
    EngineArgs.add_cli_args(MagicMock(), **LATER)
    EngineArgs.from_cli_args(SimpleNamespace(), **LATER).create_engine_config(**LATER)
    assert got == dict.fromkeys(("add_cli_args", "from_cli_args", "create_engine_config"), LATER)


class VllmBackend:
    """As much of vLLM's backend as `mode3` reads."""

    def __init__(self, vllm_config: Any, is_encoder: bool, **kwargs: Any) -> None:
        self.vllm_config, self.is_encoder, self.got = vllm_config, is_encoder, kwargs

    def __call__(self, graph: Any, inputs: Any, **kwargs: Any) -> Any:
        self.got = kwargs
        return SimpleNamespace(optimized_call=None)


@pytest.mark.parametrize("is_encoder", [False, True])
@pytest.mark.parametrize("config", [None, {}, {"dynaflow": "nanoflow"}])
def test_backend_of_vllm(
    modules: Callable[..., None], monkeypatch: pytest.MonkeyPatch, config: Any, is_encoder: bool
) -> None:
    from dynaflow_serving.integrations.vllm import mode3

    class CompilationConfig:
        def init_backend(self, vllm_config: Any, prefix: str = "", is_encoder: bool = False, **kwargs: Any) -> Any:
            return VllmBackend(vllm_config, is_encoder, **kwargs)

    modules({
        "vllm.compilation.backends": {"VllmBackend": VllmBackend},
        "vllm.config": {"CompilationConfig": CompilationConfig},
    })  # fmt: skip
    for name in ("apply_rules", "current", "rules", "_stitch"):
        monkeypatch.setattr(mode3, name, MagicMock())
    mode3.attach()
    mode3.attach()
    made = CompilationConfig().init_backend(SimpleNamespace(additional_config=config), "", is_encoder, **LATER)
    ours = bool(config) and not is_encoder
    assert isinstance(made, VllmBackend) is not ours
    backend = made.args[0] if ours else made
    assert backend.got == LATER
    if ours:
        made("graph", "inputs", other=1)
        assert backend.got == {"other": 1}


def test_hooks_of_sglang() -> None:
    """SGLang gives a hook the arguments of the method."""
    from dynaflow_serving.integrations.sglang import plugin

    plugin._add_flag(None, MagicMock(), **LATER)
    arguments = SimpleNamespace(json_model_override_args="{}")
    plugin._take_flag(arguments, type(arguments), SimpleNamespace(dynaflow=None), **LATER)
    plugin._published(None, arguments, role="scheduler", **LATER)
    for finished in (False, True):
        arguments._resolution_finished = finished
        stock = MagicMock()
        plugin._resolve(stock, arguments, 1, **LATER)
        stock.assert_called_once_with(arguments, 1, **LATER)


def test_arguments_of_sglang_under_dynaflow(monkeypatch: pytest.MonkeyPatch) -> None:
    from dynaflow_serving.integrations.sglang import plugin, server_args

    monkeypatch.setattr(server_args, "activate", lambda arguments, requested, resolve: resolve())
    arguments, stock = SimpleNamespace(json_model_override_args='{"dynaflow": "nanoflow"}'), MagicMock()
    plugin._resolve(stock, arguments, **LATER)
    stock.assert_called_once_with(arguments, **LATER)


def test_methods_of_sglang() -> None:
    from dynaflow_serving.integrations.sglang import scheduler
    from dynaflow_serving.integrations.sglang.runner import DynaflowRunner

    engine = stock_class("load_model")()
    scheduler._then(type(engine).load_model, lambda result, runner: None)(engine, 1, **LATER)
    assert engine.got["load_model"] == ((1,), LATER)
    wait = MagicMock(return_value=[])
    scheduler._and_look(wait)(1, **LATER)
    wait.assert_called_once_with(1, **LATER)

    ours = DynaflowRunner.__new__(DynaflowRunner)
    ours._init_attention_backends, ours._forward_raw, ours.session = MagicMock(), MagicMock(), MagicMock(in_flight=None)
    ours.runner, ours.eager_forward = MagicMock(), MagicMock()
    ours.session.selector.max_micro_batches = 2
    ours.init_attention_backends(**LATER)
    ours._init_attention_backends.assert_called_once_with(**LATER)
    idle = SimpleNamespace(batch_size=0)
    ours.step(idle, 1, **LATER)
    ours._without_graphs(idle, 1, **LATER)
    assert [tuple(call) for call in ours._forward_raw.call_args_list] == [((idle, 1), LATER)] * 2
    ours.forward(1, **LATER)
    ours.eager_forward.assert_called_once_with(1, **LATER)


def test_body_of_transformers() -> None:
    from dynaflow_serving.config import load
    from dynaflow_serving.integrations.transformers.body import Body

    class Model(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            return kwargs

    module = Model()
    Body.install(SimpleNamespace(base_model=module), load("comm_overlap"))
    assert module(torch.zeros(1, 4, dtype=torch.long), **LATER) == LATER
