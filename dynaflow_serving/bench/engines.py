"""The systems that can be benchmarked; a new one is one entry of `ENGINES` or of `WORKLOADS`.

Contract
- An entry names its driver and its serving tool as `module:class`. A driver is imported in a child process only, a tool
  when servers are benchmarked. Reading this table imports no engine.
- `environment` changes no variable that the user has set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dynaflow_serving.bench.defaults import default_compiled
from dynaflow_serving.bench.environment import no_environment, sglang_environment, vllm_environment
from dynaflow_serving.errors import ConfigError, unknown_name
from dynaflow_serving.integrations.base import MERGED_CALLS, WITHOUT_GUIDANCE


@dataclass(frozen=True)
class Engine:
    """The facts of an engine that the benchmark needs beside its API.

    Attributes:
        driver: The `module:class` of a `drivers.EngineDriver`.
        tool: The `module:class` of a `serving.tool.ServingTool`; "" if its servers cannot be benchmarked.
        environment: Returns the variables of its processes; it is called as `vllm_environment` is.
        fixed_graph: Why --compiled and --uncompiled choose nothing here; "" if they do.
        uncompiled: What runs when nothing is compiled, in words.
        spin_seconds: The rest after which idle ranks of a tensor-parallel engine on CPUs no longer spin.
    """

    driver: str
    tool: str = ""
    environment: Callable[..., dict[str, str]] = no_environment
    fixed_graph: str = ""
    uncompiled: str = "not compiled"
    spin_seconds: float = 0.0

    def compiled(self, asked: bool | None) -> bool:
        """Whether the engine compiles its graph.

        Args:
            asked: The user's choice; None for the default.

        Raises:
            ConfigError: The user chose, but this engine leaves no choice.
        """
        if not self.fixed_graph:
            return default_compiled() if asked is None else asked
        if asked is not None:
            raise ConfigError(f"{self.fixed_graph} Leave --compiled and --uncompiled out.")
        return False


ENGINES: dict[str, Engine] = {
    "vllm": Engine(
        driver="dynaflow_serving.bench.vllm_driver:VLLMDriver",
        tool="dynaflow_serving.bench.serving.vllm_tool:VLLMTool",
        environment=vllm_environment,
        uncompiled="not compiled (Dynamo's graph as it is)",
        spin_seconds=1.5,
    ),
    "sglang": Engine(
        driver="dynaflow_serving.bench.sglang_driver:SGLangDriver",
        tool="dynaflow_serving.bench.serving.sglang_tool:SGLangTool",
        environment=sglang_environment,
        fixed_graph="--compiled and --uncompiled are not for sglang: DynaFlow needs no graph of SGLang's models, and "
        "declines its --enable-torch-compile; both engines keep SGLang's own CUDA graphs.",
        uncompiled="as SGLang runs it",
    ),
}


# Systems whose ranks are processes of the bench: the `module:class` of their `integrations.base.Workload`.
WORKLOADS = {
    "torch": "dynaflow_serving.integrations.torch.workload:TorchWorkload",
    "transformers": "dynaflow_serving.integrations.transformers.workload:TransformersWorkload",
    "megatron": "dynaflow_serving.integrations.megatron.workload:MegatronWorkload",
    "xdit": "dynaflow_serving.integrations.xdit.workload:XDiTWorkload",
    "fastvideo": "dynaflow_serving.integrations.fastvideo.workload:FastVideoWorkload",
}
DIFFUSION = ("xdit", "fastvideo")
OWN_MODELS = ("torch", "megatron", *DIFFUSION)  # their --model is no model directory
ONLY_TRAINS = ("megatron",)


def has_pairs(system: str, model: str | None) -> bool:
    """Return whether a pass of a system's model is the two calls of a guidance pair."""
    return system in DIFFUSION and model not in WITHOUT_GUIDANCE


def peers_of(system: str, model: str | None) -> tuple[str, ...]:
    """Return what else the ranks of a system run beside stock and strategies, as `WorkloadWithPeers` names it."""
    return (MERGED_CALLS,) if has_pairs(system, model) else ()


def find_engine(name: str) -> Engine:
    """Return the entry of that name.

    Raises:
        ConfigError: There is none; the message lists the engines.
    """
    if name not in ENGINES:
        raise ConfigError(unknown_name("engine", name, ENGINES))
    return ENGINES[name]
