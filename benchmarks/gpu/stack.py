"""(b) Layer stacks under the strategies for one GPU, each against the same kernels without overlap.

Every case is captured and run as in an engine (capture, PlanCache, executor). There are three modes: eager operators,
operators compiled by Inductor, and these in one CUDA graph per plan (`graph: whole`).

| variant | meaning |
|---|---|
| model | the module called as it is; in mode inductor, `torch.compile(model)` with static shapes |
| un-split plan | the same operators under the plan of an un-split step |
| S, one stream | the plan of strategy S with everything on the compute stream: the cost of splitting alone |
| S | the plan of strategy S |

Contract
- A variant's result is compared with the model's before it is timed and after; in mode graph the latter is a replay.
- The largest difference is in its row. More than `TOLERANCE` of the largest value is an error instead of a figure.
- In mode graph, a plan that was not captured is an error.
- The code is unmeasured on a GPU: its tests run on a CPU with tiny shapes, the sequential executor and a fake timer.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx, nn

from benchmarks.gpu import models
from benchmarks.gpu.corun import MakeExecutor
from benchmarks.gpu.limits import Limits, Work
from benchmarks.gpu.report import ResultRow, rows_of
from benchmarks.gpu.timing import Section, Timer, run_sections, time_in_turn
from dynaflow_serving.capture.examples import capture_model
from dynaflow_serving.capture.fx import add_into_variants
from dynaflow_serving.capture.fx.symbols import fake_value
from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.config import ExecutorOptions, StreamOptions
from dynaflow_serving.core.batch import Batch, Split
from dynaflow_serving.core.plan import COMPUTE_STREAM
from dynaflow_serving.core.program import Scope
from dynaflow_serving.executor import Executor
from dynaflow_serving.session.plan_cache import PlanCache
from dynaflow_serving.strategies import get_strategy
from dynaflow_serving.strategy.base import OpScheduler
from dynaflow_serving.strategy.schedule import Schedule
from dynaflow_serving.strategy.selector import FixedStrategy
from dynaflow_serving.strategy.splitting import whole

MODEL, UNSPLIT = "model", "un-split plan"
MODES = ("eager", "inductor", "graph")
INPUTS = ("x", "other")  # the arguments of `models.Stack`; their order in a graph is its own
TOLERANCE = 0.05  # bfloat16, and other kernels for other numbers of tokens
LAYERS = 4
MIXED = Batch((1,) * 64 + (1024,) * 2, (2048,) * 64 + (0,) * 2)  # decode requests, then prompts
SAMPLES, IMAGE, TEXT = 2, 4096, 512  # of "dit"


@dataclass(frozen=True)
class Contender:
    strategy: str
    options: dict[str, Any]
    title: str  # of the contender without SM shares
    streams: dict[str, StreamOptions] = dataclasses.field(default_factory=dict)

    def build(self) -> OpScheduler:
        cls = get_strategy(self.strategy)
        return cls(cls.Options(**self.options))


def _contenders(*contenders: Contender) -> dict[str, Contender]:
    return {", ".join([c.title, *(f"SM share {o.sm_share}" for o in c.streams.values())]): c for c in contenders}


_ALL = {"min_tokens": 1, "overlap": "all"}
CONTENDERS: dict[str, dict[str, Contender]] = {
    "dense": _contenders(
        Contender("prefill_decode", {"min_tokens": 1}, "prefill_decode"),
        Contender("prefill_decode", _ALL, "prefill_decode all"),
        Contender("prefill_decode", _ALL, title="prefill_decode all", streams={"decode": StreamOptions(sm_share=0.25)}),
        Contender("nanoflow", {"min_tokens": 1}, "nanoflow"),
    ),
    "moe": _contenders(
        Contender("branches", {}, "branches"), Contender("prefill_decode", {"min_tokens": 1}, "prefill_decode")
    ),
    "dit": _contenders(Contender("branches", {}, "branches")),
}


class OneStream(OpScheduler):
    """The plan of another strategy, with every launch on the compute stream."""

    name = "one_stream"
    schedules_unsplit = True

    def __init__(self, inner: OpScheduler) -> None:
        super().__init__(inner.options)
        self.inner = inner

    def split(self, batch: Batch) -> Split:
        return self.inner.split(batch)

    def schedule(self, s: Schedule) -> None:
        self.inner.schedule(s)
        s.launches[:] = [dataclasses.replace(launch, stream=COMPUTE_STREAM) for launch in s.launches]


@dataclass
class StackCase:
    """A model with one step's batch, and the least work that it is."""

    kind: str
    model: nn.Module
    inputs: tuple[torch.Tensor, ...]
    batch: Batch
    work: list[Work]


def decoder_case(
    kind: str, device: str, dtype: torch.dtype, layers: int, shape: models.Shape | None = None, batch: Batch = MIXED
) -> StackCase:
    shape = shape or models.SHAPES[kind]
    models.make_cache(shape, layers, batch, device, dtype)
    x = torch.randn(sum(batch.tokens), shape.hidden, device=device, dtype=dtype)
    inputs = (x, models.random_routing(shape, len(x), device)) if shape.experts else (x,)
    work = models.decoder_work(shape, layers, batch, x.element_size())
    model = _stack(kind, shape, device, dtype, layers)
    return StackCase(kind=kind, model=model, inputs=inputs, batch=batch, work=work)


def dit_case(
    device: str,
    dtype: torch.dtype,
    layers: int,
    shape: models.Shape = models.SHAPES["dit"],
    image: int = IMAGE,
    text: int = TEXT,
) -> StackCase:
    x, y = (torch.randn(SAMPLES, n, shape.hidden, device=device, dtype=dtype) for n in (image, text))
    work = models.dit_work(shape, layers, SAMPLES, image, text, x.element_size())
    model = _stack("dit", shape, device, dtype, layers)
    return StackCase(kind="dit", model=model, inputs=(x, y), batch=Batch((1,) * SAMPLES), work=work)


def _stack(kind: str, shape: models.Shape, device: str, dtype: torch.dtype, layers: int) -> nn.Module:
    with torch.device(device):
        return models.Stack(kind, shape, layers).to(dtype).requires_grad_(False).eval()


@dataclass(frozen=True)
class PlanVariant:
    """One variant of a mode: its strategy, its options, and the baselines that it is compared with."""

    strategy: OpScheduler
    options: ExecutorOptions
    against: tuple[str, ...]
    overlapped: bool


def line_up(case: StackCase, graph: Literal["off", "whole"]) -> dict[str, PlanVariant]:
    """Return the plans of a mode by name, baselines first."""
    options = ExecutorOptions(graph=graph)
    entries = {UNSPLIT: PlanVariant(get_strategy("sequential")(), options, against=(MODEL,), overlapped=False)}
    for name, contender in CONTENDERS[case.kind].items():
        strategy, alone = contender.build(), f"{contender.title}, one stream"
        if alone not in entries and len(strategy.split(case.batch).micro_batches) > 1:
            entries[alone] = PlanVariant(OneStream(strategy), options, against=(UNSPLIT,), overlapped=False)
        against = (alone, UNSPLIT) if alone in entries else (UNSPLIT,)
        streams = ExecutorOptions(graph=graph, streams=contender.streams)
        entries[name] = PlanVariant(strategy, streams, against=against, overlapped=True)
    return entries


def rows(
    timer: Timer,
    seconds: float,
    limits: Limits,
    make_executor: MakeExecutor,
    case: StackCase,
    modes: Sequence[str] = MODES,
) -> list[ResultRow]:
    """Return the rows of all modes of one case."""
    with torch.no_grad():
        models.CONTEXT.runs = _runs(case, whole(case.batch, ""))[0]
        expected = _flat(case.model(*case.inputs))
        capture = capture_model(case.model, *case.inputs, rules=models.RULES[case.kind], effects=models.EFFECTS)
        capture.static_context = True  # one step over and over: the runs and the cache stay as they are
        pieces = functools.cache(lambda: compiled(capture))
        bench = functools.partial(_mode, timer, limits, make_executor, case, expected)
        sections = [Section(m, 1.0, functools.partial(bench, m, capture if m == "eager" else pieces)) for m in modes]
        result: list[ResultRow] = []
        for outcome in run_sections(sections, seconds):
            result += outcome.rows
            if outcome.error:
                result.append({"case": f"{case.kind}, {outcome.section}", "variant": "all", "error": outcome.error})
    return result


def _mode(
    timer: Timer,
    limits: Limits,
    make_executor: MakeExecutor,
    case: StackCase,
    expected: list[torch.Tensor],
    mode: str,
    capture: CapturedProgram | Callable[[], CapturedProgram],
    seconds: float,
) -> list[ResultRow]:
    began = time.perf_counter()
    capture = capture if isinstance(capture, CapturedProgram) else capture()
    entries = line_up(case, "whole" if mode == "graph" else "off")
    calls: dict[str, Callable[[], Any]] = {} if mode == "graph" else {MODEL: _plain(case, mode)}
    facts: dict[str, ResultRow] = {}
    executors: dict[str, Executor] = {}
    failed: dict[str, str] = {}
    for name, entry in entries.items():
        try:
            executors[name] = make_executor(entry.options)
            call, facts[name] = _planned(case, capture, entry.strategy, executors[name])
            _check(call, expected, facts[name])
            calls[name] = call
        except Exception as e:  # no green contexts, out of memory, a wrong result: this variant has no figure
            failed[name] = f"{type(e).__name__}: {e}"
    measured = time_in_turn(calls, timer, seconds - (time.perf_counter() - began))
    for name in [n for n in entries if n in measured.samples]:
        try:
            if mode == "graph":
                facts[name]["graphs"] = graphs = executors[name].report().get("graphs", {})
                if not graphs.get("captured"):
                    raise RuntimeError(f"not captured: {graphs.get('eager', 'this executor has no graphs')}")
            _check(calls[name], expected, facts[name])
        except Exception as e:
            failed[name] = f"{type(e).__name__}: {e}"
            del measured.samples[name]
    for executor in executors.values():
        executor.close()
    measured.failed |= failed
    bound = {n: limits.milliseconds(case.work, overlapped=e.overlapped) for n, e in entries.items()}
    bound[MODEL] = bound[UNSPLIT]
    return rows_of(f"{case.kind}, {mode}", measured, bound, {n: e.against for n, e in entries.items()}, facts)


def _check(call: Callable[[], Any], expected: list[torch.Tensor], facts: ResultRow) -> None:
    """Compare a result with the model's.

    Raises:
        ValueError: They differ by more than `TOLERANCE`.
    """
    differences = [(f - e).abs().max() / e.abs().max() for f, e in zip(_flat(call()), expected, strict=True)]
    difference = float(torch.stack(differences).max())  # NaN if one is, and NaN is no result
    facts["max_difference"] = max(difference, facts.get("max_difference", 0.0))
    if not difference <= TOLERANCE:
        raise ValueError(f"its result differs from the model's by {difference:.3f} of the largest value")


def _plain(case: StackCase, mode: str) -> Callable[[], Any]:
    """The model itself, on inputs that `capture_model` has not marked as dynamic."""
    runs, inputs = models.CONTEXT.runs, [x.clone() for x in case.inputs]
    model: Callable[..., Any] = case.model if mode == "eager" else torch.compile(case.model, dynamic=False)

    def call() -> Any:
        models.CONTEXT.runs = runs
        return model(*inputs)

    return call


def _runs(case: StackCase, split: Split) -> list[tuple[models.RequestRun, ...]]:
    return models.contexts(case.batch, split) if case.batch.context else [()] * len(split.micro_batches)


def _planned(
    case: StackCase, capture: CapturedProgram, strategy: OpScheduler, executor: Executor
) -> tuple[Callable[[], Any], ResultRow]:
    """Return a call that runs one step of the case under the strategy, and the facts of its plan."""
    plan_cache = PlanCache(capture, FixedStrategy(strategy), executor)
    split = plan_cache.decide(case.batch)
    runs, values = _runs(case, split), capture.program.values
    taken = capture.program.inputs[: len(capture.program.inputs) - len(capture.constants)]
    tensors, tokens = dict(zip(INPUTS, case.inputs)), len(case.inputs[0])
    args = [tokens if values[v].scope is Scope.TOKENS else tensors[v] for v in taken]

    def enter(micro_batch: int) -> None:
        models.CONTEXT.runs = runs[micro_batch]

    plan = plan_cache.prepare(split.signature).plan
    facts = {"plan": plan.digest, "streams": list(plan.streams), "micro_batches": len(split.micro_batches)}
    return lambda: plan_cache.run(args, split, enter), facts


def compiled(capture: CapturedProgram) -> CapturedProgram:
    """Return `capture` with every operator without tags compiled by Inductor; merged values are copied."""
    from torch._inductor.compile_fx import compile_fx

    result = dataclasses.replace(capture, functions=dict(capture.functions), into={}, buffers={})
    add_into_variants(result, only=frozenset())
    for op in (o for o in result.program.operators if not o.tags):
        piece = fx.GraphModule(capture.pieces[op.name], capture.pieces[op.name].graph)  # Inductor changes what it gets
        call = compile_fx(piece, [fake_value(n) for n in piece.graph.nodes if n.op == "placeholder"])
        result.functions[op.name] = functools.partial(_ported, call, len(op.outputs))
    return result


def _ported(call: Callable[..., Any], outputs: int, *args: Any) -> Any:
    """Return one output bare and several as a tuple, whatever the piece returned."""
    out = call(*args)
    return out[0] if outputs == 1 and isinstance(out, tuple | list) else out


def _flat(out: Any) -> list[torch.Tensor]:
    return [t.clone() for t in (out if isinstance(out, tuple | list) else (out,))]
