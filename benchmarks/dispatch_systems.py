"""The systems that `dispatch.py` measures: `dynaflow_serving.compile`, vLLM and SGLang with Llamas of thin layers.

Each system is a context manager of a `Subject`: a session, a step of the stock system, a step with DynaFlow. Engines
are started as the project's tests start them.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

import dynaflow_serving
from dynaflow_serving.bench.tiny_models import make_tiny_model
from dynaflow_serving.capture.program import CapturedProgram, Enter
from dynaflow_serving.core.program import Resource, Scope
from dynaflow_serving.executor.base import BoundPlan
from dynaflow_serving.session.session import Session
from dynaflow_serving.strategies.nanoflow import NanoFlow, NanoFlowOptions
from dynaflow_serving.strategy.rules import Rule, SplitFunc
from dynaflow_serving.strategy.tags import Tag

REQUESTS = 16
PROMPT = (1, 2, 3, 4)
MICRO_BATCHES = 2
WARM = 3  # rounds that are not counted
OURS = ("un-split", "split", "by hand")
STEPS_PER_ROUND = 2 + len(OURS)  # of one batch, at most
STRATEGY = {"strategy": "nanoflow", "options": {"micro_batches": MICRO_BATCHES, "min_tokens": 1}}
TESTS = Path(__file__).resolve().parents[1] / "tests"


# -- the four sides --------------------------------------------------------------------------------------------
class Subject:
    """A started system, with DynaFlow and without."""

    def __init__(
        self,
        session: Session,
        stock: Callable[[], Any],
        ours: Callable[[], Any],
        use_stock: Callable[[bool], None] = lambda stock: None,
    ) -> None:
        """Wrap a system.

        Args:
            session: DynaFlow's session in it.
            stock: Runs a step of the stock system.
            ours: Runs a step of the system with DynaFlow.
            use_stock: Prepares the next step, of the stock system or not; it is not timed.
        """
        self.session, self.stock, self.ours, self.use_stock = session, stock, ours, use_stock
        self._hands = [ByHand(cache.captured) for cache in session.plan_caches]

    def use_side(self, side: str) -> Callable[[], Any]:
        """Prepare for steps of `side`, "stock" or one of `OURS`, and return what runs one."""
        self.use_stock(side == "stock")
        if side == "stock":
            return self.stock
        strategy = self.session.selector.strategy("")
        strategy.options = strategy.options.model_copy(update={"min_tokens": 1 << 30 if side == "un-split" else 1})
        eager = self.session.eager
        if eager is not None:
            vars(eager).pop("run", None)
            if side == "by hand":
                vars(eager)["run"] = lambda plan, *arguments, apart=(): eager.run_apart(*arguments)
            return self.ours
        for cache, hand in zip(self.session.plan_caches, self._hands):
            vars(cache).pop("prepare", None)
            if side == "by hand":
                vars(cache)["prepare"] = functools.partial(hand.prepare, cache.prepare)
        return self.ours


class ByHand:
    """The operators of a program, called with arguments from an earlier step."""

    def __init__(self, captured: CapturedProgram) -> None:
        self.captured = captured
        self._bounds: Sequence[int] = ()
        self._calls: list[list[tuple[Callable[..., Any], list[Any]]]] = []
        self._outputs: list[Any] = []

    def prepare(self, stock: Callable[..., BoundPlan], *args: Any, **kwargs: Any) -> BoundPlan:
        """Take the place of `PlanCache.prepare`, which is `stock`."""
        return replace(stock(*args, **kwargs), run=self.run)

    def run(self, args: Sequence[Any], bounds: Sequence[int], enter: Enter) -> list[Any]:
        """Take the place of a plan's function; the outputs are those of the first call."""
        if self._bounds != bounds:
            self._record(args, bounds, enter)
        for micro_batch, calls in enumerate(self._calls):
            enter(micro_batch)
            for function, arguments in calls:
                function(*arguments)
        return self._outputs

    def _record(self, args: Sequence[Any], bounds: Sequence[int], enter: Enter) -> None:
        program = self.captured.program
        inputs = dict(zip(program.inputs, (*args, *self.captured.constants)))
        parts = []
        self._bounds, self._calls = bounds, []
        for micro_batch, (start, stop) in enumerate(pairwise(bounds)):
            enter(micro_batch)
            values = {name: self._cut(name, value, start, stop) for name, value in inputs.items()}
            calls = []
            for op in program.operators:
                arguments = [values[name] for name in op.inputs]
                function = self.captured.functions[op.name]
                results = function(*arguments)
                values |= zip(op.outputs, (results,) if len(op.outputs) == 1 else results)
                calls.append((function, arguments))
            self._calls.append(calls)
            parts.append(values)
        self._outputs = [self._merge(name, [values[name] for values in parts]) for name in program.outputs]

    def _cut(self, name: str, whole: Any, start: int, stop: int) -> Any:
        value = self.captured.program.values[name]
        if value.scope is Scope.TOKENS:
            return (stop - start) * value.rows
        return (
            whole if value.axis is None else whole.narrow(value.axis, start * value.rows, (stop - start) * value.rows)
        )

    def _merge(self, name: str, parts: list[Any]) -> Any:
        axis = self.captured.program.values[name].axis
        merge = self.captured.mergers.get(name, lambda parts: torch.cat(parts, axis))
        return parts[0] if axis is None else merge(parts)


# -- the systems --------------------------------------------------------------------------------------------------
class ThinLayer(nn.Module):
    """A decoder layer of hidden size 64 with two heads, in few calls: Dynamo takes milliseconds for each."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp_norm = nn.RMSNorm(64), nn.RMSNorm(64)
        self.qkv, self.out = nn.Linear(64, 192, bias=False), nn.Linear(64, 64, bias=False)
        self.up, self.down = nn.Linear(64, 128, bias=False), nn.Linear(128, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 32)).transpose(1, 3).unbind(2)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        result: torch.Tensor = x + self.down(nn.functional.silu(self.up(self.mlp_norm(x))))
        return result


class CutAtAttention(NanoFlow):
    """NanoFlow's order; attention is an operator of its own, as in the engines."""

    name = "cut_at_attention"
    annotations: tuple[Rule, ...] = (
        SplitFunc("scaled_dot_product_attention", "attention", Resource.MEMORY, (Tag.ATTENTION,)),
    )


@contextmanager
def compiled(level: Any, layers: int, rounds: int, ours_first: bool) -> Iterator[Subject]:
    """`dynaflow_serving.compile` of a plain PyTorch model, against `torch.compile` with the same level's backend."""
    torch._dynamo.reset()
    model, x = nn.Sequential(*(ThinLayer() for _ in range(layers))), torch.rand(REQUESTS, len(PROMPT), 64)
    backend = {"dynamo": "eager", "aot": "aot_eager"}[level]
    stock = torch.compile(model, backend=backend, dynamic=True)
    ours = dynaflow_serving.compile(model, CutAtAttention(NanoFlowOptions(min_tokens=1)), level=level)
    with torch.no_grad():
        stock(x), ours(x)
        yield Subject(ours.session, lambda: stock(x), lambda: ours(x))


@contextmanager
def vllm(mode: str, layers: int, rounds: int, ours_first: bool) -> Iterator[Subject]:
    """Two engines of vLLM in this process, as the tests start them; all requests decode."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    tests = _load(TESTS / "vllm" / "conftest.py")
    plugin: dict[str, Any] = {}
    exec(tests.MODE3_PLUGIN, plugin)
    plugin["register"]()
    os.environ["TEST_MODE3"] = "1" if mode == "mode3" else ""
    steps = STEPS_PER_ROUND * (WARM + rounds) + 8
    engines: dict[bool, Any] = {}  # with DynaFlow or not
    for ours in (ours_first, not ours_first):
        torch._dynamo.reset()
        llm = LLM(
            str(make_tiny_model("llama_thin", layers=layers)),
            dtype="float32",
            max_model_len=len(PROMPT) + steps,
            max_num_seqs=REQUESTS,
            max_num_batched_tokens=REQUESTS * len(PROMPT),
            async_scheduling=False,
            compilation_config=dict(tests.MODES[mode]),
            additional_config={"dynaflow": STRATEGY} if ours else {},
        )
        for number in range(REQUESTS):
            sampling = SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True)
            llm.llm_engine.add_request(str(number), {"prompt_token_ids": list(PROMPT)}, sampling)
        for _ in range(4):
            llm.llm_engine.step()
        engines[ours] = llm
    worker = engines[True].llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    yield Subject(worker.dynaflow.session, engines[False].llm_engine.step, engines[True].llm_engine.step)
    for llm in engines.values():
        llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


@contextmanager
def sglang(layers: int, rounds: int, ours_first: bool) -> Iterator[Subject]:
    """One ModelRunner of SGLang in this process, as the tests load it, with DynaFlow's methods and without."""
    tests = _load(TESTS / "sglang" / "one_process.py")
    runner = tests.load(make_tiny_model("llama_thin", layers=layers), max_total_tokens=1 << 15)
    with tests.dynaflow(runner, STRATEGY) as ours:
        modules = [module for module in runner.model.modules() if "forward" in vars(module)]
        methods = [(runner, "_forward_raw", ours.step), *((module, "forward", module.forward) for module in modules)]

        def use_stock(stock: bool) -> None:
            for thing, name, method in methods:
                if stock:
                    vars(thing).pop(name, None)
                else:
                    vars(thing)[name] = method

        ids, _, batch = tests.prefill(runner, [PROMPT] * REQUESTS, STEPS_PER_ROUND * (WARM + rounds) + 2)
        step = functools.partial(tests.decode, runner, ids, batch)
        yield Subject(ours.session, step, step, use_stock)
        use_stock(False)
    tests.unload()


# Called with the number of layers, that of rounds, and whether our side starts first, where both start something.
SYSTEMS: dict[str, Callable[[int, int, bool], AbstractContextManager[Subject]]] = {
    "compile-dynamo": functools.partial(compiled, "dynamo"),
    "compile-aot": functools.partial(compiled, "aot"),
    "vllm-mode2": functools.partial(vllm, "mode2-uncompiled"),
    "vllm-mode3": functools.partial(vllm, "mode3"),
    "vllm-eager": functools.partial(vllm, "none"),
    "sglang": sglang,
}


def _load(path: Path) -> ModuleType:
    """Return the module in a file of the tests."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
