"""One comparison of a system with itself, as the user asked for it.

Contract
- `Comparison` has what the user left open decided: the model, the dtype, whether an engine compiles.
- What is wrong with it is an error before anything starts.
- `facts` returns what the JSON file says of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dynaflow_serving.bench.defaults import default_dtype
from dynaflow_serving.bench.engines import (
    DIFFUSION,
    ENGINES,
    ONLY_TRAINS,
    OWN_MODELS,
    WORKLOADS,
    Engine,
    find_engine,
    has_pairs,
)
from dynaflow_serving.bench.environment import allocator, has_gpu, machine, usable_cores
from dynaflow_serving.bench.link import NODES, Link, check_rates
from dynaflow_serving.bench.runner.base import Runner
from dynaflow_serving.bench.runner.engines import EngineRunner
from dynaflow_serving.bench.runner.nodes import NodeRunner
from dynaflow_serving.bench.runner.ranks import RankRunner
from dynaflow_serving.bench.serving.loads import Load
from dynaflow_serving.bench.serving.run import ServingBenchmark
from dynaflow_serving.bench.serving.tool import load_tool
from dynaflow_serving.bench.settings import EngineSettings, Traffic
from dynaflow_serving.bench.sides import AUTO, SEQUENTIAL, STOCK, Side
from dynaflow_serving.bench.tiny_models import find_model
from dynaflow_serving.errors import ConfigError, unknown_name
from dynaflow_serving.integrations.base import WorkloadSettings

GPU_SHARE = 0.9  # of a GPU's memory, for all sides together; vLLM's own default for one
LENGTH_UNIT = 64  # tokens; the engines' greatest length is a multiple of it
ENGINE_TOKENS = 64
LINK_MODEL = "llama_1024"  # over a link: compute and network of about the same length at some hundred Mbit/s


@dataclass(frozen=True)
class Asked:
    """What the user asked for; None is left open.

    Attributes:
        system: A key of `ENGINES` or `WORKLOADS`.
        model: The model's folder or name, or path.py:factory for torch.
        pairs: The number of counted rounds of each start.
        starts: How often all sides are started.
        tensor_parallel: The number of ranks.
        dtype: The model's dtype.
        compiled: Whether the engine compiles its graph.
        traffic: The requests of a pass; for torch and transformers its batch.
        max_batched_tokens: The tokens of one step at most.
        links: The rates of the emulated link in megabit per second; empty for no link.
        tcp_defaults: Whether TCP and the link's queue stay as the kernel has them.
        training: Whether a pass is forward and backward.
        command: The command that the user typed, for the record.
    """

    system: str
    model: str | None
    pairs: int
    tensor_parallel: int | None
    dtype: str | None
    compiled: bool | None
    traffic: Traffic
    max_batched_tokens: int | None
    links: tuple[float, ...] = ()
    tcp_defaults: bool = False
    training: bool = False
    starts: int = 1
    command: str = ""


class Comparison:
    """A comparison of one system's sides."""

    def __init__(self, asked: Asked, sides: Sequence[Side]) -> None:
        """Decide what is open.

        Raises:
            ConfigError: The system, the model, a rate or a combination is not valid.
        """
        self.asked, self.sides = asked, list(sides)
        check_rates(asked.links)
        self.gpu = has_gpu()
        if asked.links and self.gpu:
            raise ConfigError("--link emulates a network between ranks on a CPU; this machine has a GPU. Leave it out.")
        self.ranks = asked.tensor_parallel or (NODES if asked.links else 1)
        if asked.links and self.ranks != NODES:
            raise ConfigError(
                f"--link joins {NODES} nodes with a rank each: --tensor-parallel {NODES}, or leave it out"
            )
        if asked.system in WORKLOADS:
            self._check_workload()
        elif asked.training:
            raise ConfigError(f"--training: {asked.system} serves models; it is for {' and '.join(WORKLOADS)}")
        else:
            self.engine: Engine = find_system(asked.system)
            self.compiled = self.engine.compiled(asked.compiled)
        model = asked.model or (LINK_MODEL if asked.links else None)
        self.model, self.local = (asked.model or "", True) if asked.system in OWN_MODELS else find_model(model)
        self.training = asked.training or asked.system in ONLY_TRAINS
        if asked.links and not self.local:
            raise ConfigError(
                f"--link runs in namespaces without a way to {asked.model}: download the model, and give its folder"
            )
        self.settle_seconds = 0.0
        if asked.system in ENGINES and self.ranks > 1 and not self.gpu:
            self.settle_seconds = self.engine.spin_seconds

    def _check_workload(self) -> None:
        asked = self.asked
        if asked.compiled is not None:
            raise ConfigError(f"--compiled and --uncompiled choose nothing for {asked.system}. Leave them out.")
        if asked.max_batched_tokens is not None:
            raise ConfigError(f"--max-batched-tokens: {asked.system} has no scheduler. Give --requests.")
        if asked.traffic.requests < 2 and any(side.micro_batches > 1 for side in self.sides):
            raise ConfigError("--requests 1: a batch of one request cannot be split; give 2 or more")

    def on_one_node(self) -> Comparison:
        """Return the comparison of the stock engine and `auto` on this machine alone, with one rank.

        Raises:
            ConfigError: There is nothing to compare it with, or `auto` is not a side.
        """
        sides = [side for side in self.sides if side.strategy in (STOCK, AUTO)]
        if not self.asked.links or self.asked.system not in ENGINES:
            raise ConfigError(f"--one-node stands beside two nodes of {' or '.join(ENGINES)}: add --link MBIT")
        if len(sides) < 2:
            raise ConfigError("--one-node shows what auto decides without a network: add --strategy auto")
        return Comparison(replace(self.asked, links=(), tensor_parallel=1, model=self.model), sides)

    @property
    def dtype(self) -> str:
        """The dtype of the model."""
        return self.asked.dtype or default_dtype()

    @property
    def server_settings(self) -> EngineSettings:
        """The settings of each of two servers under load."""
        return replace(self.settings, max_model_len=None, memory_share=GPU_SHARE / 2)

    @property
    def settings(self) -> EngineSettings:
        """The settings of each engine, without DynaFlow."""
        length = math.ceil(self.asked.traffic.longest / LENGTH_UNIT) * LENGTH_UNIT
        return EngineSettings(
            model=self.model,
            dtype=self.dtype,
            tensor_parallel=self.ranks,
            compiled=self.compiled,
            max_batched_tokens=self.asked.max_batched_tokens,
            memory_share=GPU_SHARE / len(self.sides),
            max_model_len=length,
        )

    @property
    def environment(self) -> dict[str, str]:
        """The variables to add to the environment of all sides' processes."""
        if self.asked.system in WORKLOADS:
            offline = {"HF_HUB_OFFLINE": "1"} if self.local else {}
            return offline if self.gpu else offline | allocator()
        return self.engine.environment(self.ranks, gpu=self.gpu, compiled=self.compiled, local_model=self.local)

    def runner(self, logs: Path, link: Link | None) -> Runner:
        """Return what runs the sides.

        Args:
            logs: The folder for logs and results.
            link: The link, if one was asked for.
        """
        asked, sides = self.asked, self.sides
        if asked.system in WORKLOADS:
            settings = WorkloadSettings(
                model=self.model, dtype=self.dtype, requests=asked.traffic.requests, length=asked.traffic.input_len,
                training=self.training, seed=asked.traffic.seed,
            )  # fmt: skip
            return RankRunner(sides, WORKLOADS[asked.system], settings, self.ranks, self.environment, logs, link)
        if link is not None:
            tool = load_tool(self.engine.tool)
            return NodeRunner(
                sides, self.engine, tool, self.settings, self._load(), self.environment, logs, link, self.settle_seconds
            )
        return EngineRunner(
            sides, self.engine.driver, self.settings, asked.traffic, self.environment, logs, self.settle_seconds
        )

    def _load(self) -> Load:
        traffic = self.asked.traffic
        return Load("random", traffic.requests, traffic.input_len, traffic.output_len, math.inf)

    @property
    def words(self) -> str:
        """One pass, in words."""
        traffic = self.asked.traffic
        if self.asked.system in WORKLOADS:
            what = "forward and backward" if self.training else "forward"
            return f"{what} of {traffic.requests} x {traffic.input_len}"
        return f"{traffic.requests} requests at once, about {traffic.input_len} tokens in, {traffic.output_len} out"

    def facts(self, runner: Runner) -> dict[str, Any]:
        """Return what the record says of the comparison; the runner has been started."""
        facts: dict[str, Any] = {
            "system": self.asked.system,
            "release": runner.release,
            "model": self.model or "the example of this command",
            "pass": self.words,
            "machine": machine() | {"device": runner.device, "cores": len(usable_cores())},
            "command": self.asked.command,
            "config": {
                "ranks": self.ranks,
                "dtype": self.dtype,
                "pairs": self.asked.pairs * self.asked.starts,
                "starts": self.asked.starts,
                "traffic": asdict(self.asked.traffic),
                "training": self.training,
                "environment": self.environment,
            },
        }
        if self.asked.system in ENGINES:
            facts["config"] |= {"settings": asdict(self.settings), "graph": self.graph}
        if self.asked.links:
            facts["config"]["tcp"] = "the kernel's defaults" if self.asked.tcp_defaults else "no slow start after idle"
        return facts

    @property
    def chosen(self) -> str:
        """What was decided for the user, in words."""
        graph = f", all engines {self.graph}" if self.asked.system in ENGINES else ""
        return f"{self.dtype}, {self.ranks} rank{'s' if self.ranks > 1 else ''}{graph}"

    @property
    def graph(self) -> str:
        """Whether the engines compile their graphs, in words."""
        return "compiled" if self.compiled else self.engine.uncompiled

    def assert_can_serve(self) -> None:
        """Check before anything runs that servers can be put under load.

        Raises:
            ConfigError: The system has no server, or the options fit no comparison of two servers.
            DynaflowError: The engine is not installed.
        """
        name = self.asked.system
        if name in WORKLOADS or not self.engine.tool:
            raise ConfigError(f"--load and --rate: {name} has no server that can be benchmarked; leave them out")
        if self.asked.links:
            raise ConfigError("--load and --rate are not for emulated nodes; leave them or --link out")
        if len([s for s in self.sides[1:] if s.strategy != SEQUENTIAL]) > 1:
            raise ConfigError("--load and --rate compare the stock server with one strategy; give one --strategy")
        if self.asked.pairs < 2:
            raise ConfigError("--load and --rate show the spread of several pairs; --pairs must be 2 or more")
        load_tool(self.engine.tool).version()  # raises, if the engine is not here

    def serving(self, loads: Sequence[Load], seed: int, work: Path) -> ServingBenchmark:
        """Return the comparison of two servers under the same loads: the stock one, and the last side."""
        config = self.sides[-1].config
        assert config is not None
        return ServingBenchmark(
            tool=load_tool(self.engine.tool),
            settings=self.server_settings,
            dynaflow=config.model_dump(),
            loads=loads,
            pairs=self.asked.pairs,
            seed=seed,
            gpu=self.gpu,
            environment=self.environment,
            work=work,
            settle_seconds=self.settle_seconds,
        )

    def serving_facts(self, seed: int) -> dict[str, Any]:
        """Return what the record of servers under load says of the comparison."""
        side = self.sides[-1]
        return {
            "engine": self.asked.system,
            "model": self.model,
            "strategy": side.strategy,
            "command": self.asked.command,
            "config": {
                "strategy_options": side.options,
                "graph": self.graph,
                "pairs": self.asked.pairs,
                "environment": self.environment,
                **asdict(replace(self.server_settings, dynaflow=side.content)),
                "seed": seed,
            },
            "machine": machine(),
        }


def least_tokens(system: str) -> int:
    """Return the tokens of the smallest micro-batch of a system, where the user says nothing.

    The rows of a batch are the tokens of torch and transformers. Engines decode steps of few tokens un-split.
    """
    return 1 if system in WORKLOADS else ENGINE_TOKENS


def usual_micro_batches(system: str, model: str | None) -> int | None:
    """Return the micro-batches of strategies that are given by their name: a guidance pair has two calls."""
    return _usual_rows(system, model) if system in DIFFUSION else None


def make_traffic(
    system: str, model: str | None, requests: int | None, input_len: int | None, output_len: int, seed: int
) -> Traffic:
    """Return the requests of a pass, with what the user left open decided."""
    usual = (_usual_rows(system, model), 1280) if system in DIFFUSION else (30, 96)
    return Traffic(requests=requests or usual[0], input_len=input_len or usual[1], output_len=output_len, seed=seed)


def _usual_rows(system: str, model: str | None) -> int:
    """Return the rows of one video or image in a pass of a diffusion model."""
    return 2 if has_pairs(system, model) else 1


def find_system(name: str) -> Engine:
    """Return the engine of that name.

    Raises:
        ConfigError: There is no such system; the message lists them.
    """
    if name not in ENGINES:
        raise ConfigError(unknown_name("system", name, [*ENGINES, *WORKLOADS]))
    return find_engine(name)
