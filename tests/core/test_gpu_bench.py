"""The logic of benchmarks/gpu, without a GPU: who is timed when, statistics, the time budget, tables, and that the
layer stacks compute what they should under every plan. Times in here are a fake timer's."""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import typer
from cuda_standin import FakeCuda, FakeGraph
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks/ is not part of the package

from benchmarks.gpu import __main__ as suite
from benchmarks.gpu import corun, models, stack
from benchmarks.gpu.limits import Limits, Work, measure
from benchmarks.gpu.report import losses, rows_of, table
from benchmarks.gpu.timing import ROUNDS, WARM_UP, Measured, Outcome, Section, Spread, in_turn, run_sections
from dynaflow_serving.config import ExecutorOptions
from dynaflow_serving.core.batch import Batch, MicroBatch, Split
from dynaflow_serving.executor import CPUExecutor, CUDAExecutor, Executor, SequentialExecutor
from dynaflow_serving.executor.cuda_graph import WholePlanGraphs
from dynaflow_serving.strategies import get_strategy
from dynaflow_serving.strategy.splitting import cut_at_tokens, cut_evenly, whole

LIMITS = Limits(bytes_per_s=1e12, flops_per_s=1e14)
BATCH = Batch((1,) * 3 + (5, 4), (7,) * 3 + (0, 0))
DENSE = models.Shape(32, 4, 2, 8, 48)
MOE = models.Shape(32, 4, 4, 8, 16, experts=4, top_k=2, shared=24)


class FakeTimer:
    """Calls cost what `cost` says, on a clock of its own; every measurement is noted."""

    def __init__(self, cost: Callable[[Any], float] = lambda call: 1.0) -> None:
        self.cost, self.now, self.log = cost, 0.0, []

    def milliseconds(self, call: Callable[[], Any], calls: int) -> float:
        call()
        ms = self.cost(call)
        self.now += ms * calls / 1e3
        self.log.append((call, calls))
        return ms

    def clock(self) -> float:
        return self.now


def named(name: str) -> Callable[[], str]:
    return lambda: name


# -- timing ------------------------------------------------------------------------------------------------------------


def test_variants_are_timed_in_turn_and_warm_up_is_not_a_sample() -> None:
    timer = FakeTimer()
    variants = {n: named(n) for n in "abc"}
    measured = in_turn(variants, timer, 0, timer.clock)
    names = ["".join(n for n, c in variants.items() if c is call) for call, _ in timer.log]
    assert names[:6] == ["a", "a", "b", "b", "c", "c"]  # warm-up, then one call to size the samples
    assert names[6:12] == ["a", "b", "c", "c", "b", "a"]
    assert [calls for _, calls in timer.log[:2]] == [WARM_UP, 1]
    assert {len(s) for s in measured.samples.values()} == {ROUNDS[0]}  # at least so many, whatever the time


def test_a_sample_is_as_many_calls_as_fill_its_time() -> None:
    slow, fast, instant = named("slow"), named("fast"), named("instant")
    timer = FakeTimer(lambda call: {slow: 500.0, fast: 2.0, instant: 1e-9}[call])
    in_turn({"slow": slow, "fast": fast, "instant": instant}, timer, 0, timer.clock)
    assert {call: calls for call, calls in timer.log} == {slow: 1, fast: 10, instant: 100}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cost=st.floats(0.01, 40), seconds=st.floats(0, 30))
def test_more_time_is_more_rounds_within_limits(cost: float, seconds: float) -> None:
    timer = FakeTimer(lambda call: cost)
    measured = in_turn({"a": named("a"), "b": named("b")}, timer, seconds, timer.clock)
    rounds = len(measured.samples["a"])
    assert ROUNDS[0] <= rounds <= ROUNDS[1]
    round_s = 2 * max(cost, min(100, round(20 / cost)) * cost) / 1e3
    assert rounds == ROUNDS[0] or timer.now <= seconds + round_s + 1e-6
    assert rounds == ROUNDS[1] or timer.now >= seconds or rounds == ROUNDS[0]


def test_speedups_are_of_rounds_so_drift_cancels() -> None:
    drift = [1.0, 2.0, 4.0, 8.0, 16.0]
    measured = Measured({"base": [3 * d for d in drift], "new": [2 * d for d in drift]})
    assert measured.speedup("new", "base") == Spread(1.5, 1.5, 1.5)
    uneven = Measured({"base": [1.0, 10.0, 100.0], "new": [2.0, 5.0, 100.0]})  # the medians' ratio would be 2
    assert uneven.speedup("new", "base") == Spread(1.0, 0.5, 2.0)
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)


def test_a_variant_that_fails_has_its_error_and_the_others_their_figures() -> None:
    def broken() -> None:
        raise RuntimeError("out of memory\nlong trace")

    timer = FakeTimer()
    measured = in_turn({"good": named("good"), "bad": broken}, timer, 0, timer.clock)
    assert measured.failed == {"bad": "RuntimeError: out of memory"}
    assert list(measured.samples) == ["good"]
    assert in_turn({"bad": broken}, timer, 5, timer.clock).samples == {}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    weights=st.lists(st.floats(0.1, 5), min_size=1, max_size=6),
    total=st.floats(1, 500),
    seed=st.integers(0, 2**16),
    overrun=st.floats(0.2, 3),
)
def test_sections_share_what_is_left(weights: list[float], total: float, seed: int, overrun: float) -> None:
    rng, clock, given_s = random.Random(seed), FakeTimer(), []

    def run(seconds: float) -> list[dict[str, Any]]:
        given_s.append(seconds)
        assert 0 < seconds <= total - clock.now + 1e-6
        clock.now += seconds * rng.uniform(0.2, overrun)
        return [{}]

    outcomes = list(run_sections([Section(str(w), w, run) for w in weights], total, clock.clock))
    assert len(outcomes) == len(weights)
    assert sum(bool(o.rows) for o in outcomes) == len(given_s)
    assert all(o.rows or "not run" in o.error for o in outcomes)  # nothing is skipped in silence
    if overrun <= 1:
        assert clock.now <= total * (1 + 1e-9) and all(o.rows for o in outcomes)


def test_a_section_that_fails_leaves_the_others() -> None:
    def broken(seconds: float) -> list[dict[str, Any]]:
        raise ValueError("no such kernel")

    first, second = run_sections([Section("a", 1, broken), Section("b", 1, lambda s: [{"ok": 1}])], 10)
    assert first.error == "ValueError: no such kernel" and not first.rows
    assert second.rows == [{"ok": 1}] and not second.error


# -- limits and report -------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.floats(0, 1e15), st.floats(0, 1e13)), min_size=1, max_size=5))
def test_overlap_can_only_lower_the_limit(parts: list[tuple[float, float]]) -> None:
    work = [Work(*p) for p in parts]
    overlapped, apart = (LIMITS.milliseconds(work, overlapped=o) for o in (True, False))
    assert overlapped <= apart * (1 + 1e-9)
    assert apart <= 2 * overlapped * (1 + 1e-9)  # two resources: no more than twice


def test_limits_are_in_milliseconds() -> None:
    compute, memory = Work(2e12, 0), Work(0, 1e10)  # 20 ms of arithmetic, 10 ms of memory
    assert LIMITS.milliseconds([compute, memory], overlapped=False) == pytest.approx(30)
    assert LIMITS.milliseconds([compute, memory], overlapped=True) == pytest.approx(20)
    timer = FakeTimer(lambda call: 2.0)
    limits = measure(timer, 0, "cpu", torch.float32, side=8, mib=1)
    assert limits == Limits(2 * 2**20 / 2e-3, 2 * 8**3 / 2e-3)


def test_losses_are_listed_and_rows_are_plain_data() -> None:
    measured = Measured({"base": [2.0, 2.0, 2.0], "win": [1.0, 1.0, 1.0], "loss": [4.0, 2.5, 2.4]}, {"dead": "no SMs"})
    against = dict.fromkeys(("win", "loss", "dead"), ("base", "dead"))
    rows = rows_of("case", measured, dict.fromkeys(("base", "win", "loss"), 0.5), against, {"win": {"plan": "abc"}})
    assert json.loads(json.dumps(rows)) == rows
    by_name = {r["variant"]: r for r in rows}
    assert by_name["win"]["speedup"] == {"base": {"median": 2.0, "min": 2.0, "max": 2.0}}
    assert by_name["win"]["plan"] == "abc" and by_name["win"]["of_limit"] == 0.5
    assert by_name["dead"] == {"case": "case", "variant": "dead", "error": "no SMs"}
    assert losses(rows) == ["case: loss is slower than base: 0.800x (0.500 - 0.833)"]
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table("figures", rows))
    text = console.export_text()
    assert "no SMs" in text and "0.800x (0.500 - 0.833) base" in text and "2.500 (2.400 - 4.000)" in text


# -- (a) co-running ----------------------------------------------------------------------------------------------------


def test_corun_compares_plans_of_one_program() -> None:
    executors: list[Executor] = []

    def make(options: ExecutorOptions) -> Executor:
        executors.append(CPUExecutor(options))
        return executors[-1]

    with torch.no_grad():
        rows = corun.rows(FakeTimer(), 0, LIMITS, make, "cpu", torch.float32, hidden=16, tokens=8)
    for executor in executors:
        executor.close()
    assert len(rows) == len(corun.NEIGHBOURS) * (2 + len(corun.SM_SHARES))
    for row in rows:
        if "SM share" in row["variant"]:
            assert "InactiveError" in row["error"] and "sm_share" in row["error"]  # threads have no SMs
        elif row["variant"] == corun.SEQUENTIAL:
            assert row["streams"] == ["compute"] and row["speedup"] == {}
        else:
            assert row["streams"] == ["compute", "side"] and set(row["speedup"]) == {corun.SEQUENTIAL}


# -- (b) the layer stacks ----------------------------------------------------------------------------------------------


def case_of(kind: str) -> stack.Case:
    torch.manual_seed(0)
    if kind == "dit":
        return stack.dit_case("cpu", torch.float32, 2, DENSE, image=6, text=3)
    dtype = torch.bfloat16 if kind == "moe" else torch.float32  # grouped products are bfloat16
    return stack.decoder_case(kind, "cpu", dtype, 2, MOE if kind == "moe" else DENSE, BATCH)


def sequential(options: ExecutorOptions) -> Executor:
    """In issue order on one thread, whatever is asked of the streams."""
    return SequentialExecutor()


def test_attention_equals_attention_request_by_request() -> None:
    torch.manual_seed(0)
    models.make_cache(DENSE, 1, BATCH, "cpu", torch.float32)
    keys, values = models.CONTEXT.keys[0].clone(), models.CONTEXT.values[0].clone()
    (models.CONTEXT.runs,) = models.contexts(BATCH, whole(BATCH, ""))
    q, k, v = (torch.randn(12, n * 8) for n in (4, 2, 2))
    out = models.attention(q, k, v, 0)
    at = 0
    for slot, (tokens, context) in enumerate(zip(BATCH.tokens, BATCH.context, strict=True)):
        mine = slice(at, at + tokens)
        for head in range(4):
            kv = head // 2
            ks = torch.cat([keys[slot, :context, kv], k[mine].view(-1, 2, 8)[:, kv]])
            vs = torch.cat([values[slot, :context, kv], v[mine].view(-1, 2, 8)[:, kv]])
            scores = q[mine].view(-1, 4, 8)[:, head] @ ks.T * 8**-0.5
            mask = torch.ones_like(scores, dtype=torch.bool).tril(context)
            expected = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ vs
            torch.testing.assert_close(out[mine].view(-1, 4, 8)[:, head], expected)
        at += tokens


def test_routed_experts_equal_a_loop_over_tokens() -> None:
    torch.manual_seed(0)
    x, logits = torch.randn(9, 32).bfloat16(), torch.randn(9, 4).bfloat16()
    ids = models.random_routing(MOE, 9, "cpu")
    assert all(len(set(row)) == 2 for row in ids.tolist())
    up, down = (torch.randn(4, 2 * 16, 32) * 0.2).bfloat16(), (torch.randn(4, 32, 16) * 0.2).bfloat16()
    out = models.experts(x, logits, ids, up, down)
    for t in range(9):
        weights = logits[t, ids[t]].float().softmax(-1)
        expected = torch.zeros(32)
        for w, e in zip(weights, ids[t].tolist(), strict=True):
            gate, value = (up[e].float() @ x[t].float()).chunk(2)
            expected += w * (down[e].float() @ (F.silu(gate) * value))
        torch.testing.assert_close(out[t].float(), expected, atol=0.05, rtol=0.05)


def test_contexts_of_micro_batches() -> None:
    split = cut_at_tokens(BATCH, [3, 8])
    assert models.contexts(BATCH, split) == [
        (models.Run((0, 3), (0, 3), 7),),
        (models.Run((0, 5), (3, 4), 0),),
        (models.Run((0, 4), (4, 5), 0),),
    ]
    with pytest.raises(ValueError, match="between requests only"):
        models.contexts(BATCH, cut_at_tokens(BATCH, [5]))
    with pytest.raises(ValueError, match="one token"):
        models.contexts(Batch((2,), (3,)), Split((MicroBatch((0, 1), (0, 2)),)))


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_the_work_is_what_the_products_do(kind: str) -> None:
    case = case_of(kind)
    (models.CONTEXT.runs,) = models.contexts(BATCH, whole(BATCH, ""))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        case.model(*case.inputs)
    linear = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    products = sum(w.flops for w in case.work[::3])
    layers = case.model.layers
    if kind == "moe":  # the router is not counted as work; the routed experts are opaque to the counter
        routers = 2 * 12 * sum(layer.routed.router.weight.numel() for layer in layers)
        linear += 2 * 12 * MOE.top_k * 3 * MOE.hidden * MOE.intermediate * len(layers) - routers
    assert linear == products
    matrices = [p for n, p in case.model.named_parameters() if p.dim() > 1 and "router" not in n]
    assert sum(w.bytes for w in case.work[::3]) == sum(p.nbytes for p in matrices)
    cached = sum(c + 1 for c in BATCH.context if c) * len(layers)
    one_token = 2 * models.CONTEXT.keys[0][0, 0].nbytes
    assert sum(w.bytes for w in case.work[2::3]) == cached * one_token


@pytest.mark.parametrize("kind", ["dense", "moe", "dit"])
def test_every_variant_computes_what_the_model_does(kind: str) -> None:
    case = case_of(kind)
    rows = {r["variant"]: r for r in stack.rows(FakeTimer(), 60, LIMITS, sequential, case, ["eager"])}
    assert not [r for r in rows.values() if "error" in r]
    assert set(rows) >= {stack.MODEL, stack.UNSPLIT, *stack.CONTENDERS[kind]}
    for name, row in rows.items():
        if name == stack.MODEL:
            continue
        assert row["max_difference"] <= (0.02 if kind == "moe" else 1e-5)
        overlaps = name in stack.CONTENDERS[kind] and name != "nanoflow"  # one GPU has no network to hide
        assert (len(row["streams"]) > 1) == overlaps, name
        assert row["limit_ms"] > 0 and set(row["speedup"]) <= rows.keys()
    alone = {n for n in rows if n.endswith("one stream")}
    for name, contender in stack.CONTENDERS[kind].items():
        if contender.strategy != "branches":  # which splits nothing: the un-split plan has the same kernels
            assert f"{contender.title}, one stream" in alone & rows[name]["speedup"].keys()


def test_a_wrong_result_is_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = stack._planned

    def wrong(case: stack.Case, capture: Any, strategy: Any, executor: Any) -> Any:
        call, facts = planned(case, capture, strategy, executor)
        return ((lambda: [out * 1.2 for out in call()]) if strategy.name == "nanoflow" else call), facts

    monkeypatch.setattr(stack, "_planned", wrong)
    rows = {r["variant"]: r for r in stack.rows(FakeTimer(), 60, LIMITS, sequential, case_of("dense"), ["eager"])}
    assert "differs from the model's by" in rows["nanoflow"]["error"] and "ms" not in rows["nanoflow"]
    assert "ms" in rows["nanoflow, one stream"]


class Baked:
    """The attention operator with the context of its capture: a graph has addresses, the stand-in replays Python."""

    def __init__(self, operator: Any) -> None:
        self.operator, self.runs, self._schema = operator, models.CONTEXT.runs, operator._schema

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        models.CONTEXT.runs = self.runs
        return self.operator(*args, **kwargs)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    monkeypatch.setattr(WholePlanGraphs, "device_type", "cpu")
    monkeypatch.setattr(stack, "compiled", lambda capture: capture)  # Inductor has a test of its own
    dispatch = FakeGraph.__torch_dispatch__

    def baking(graph: FakeGraph, func: Any, *rest: Any) -> Any:
        out = dispatch(graph, func, *rest)
        if func is torch.ops.dynaflow_bench.attention.default:
            graph.calls[-1] = (Baked(func), *graph.calls[-1][1:])
        return out

    monkeypatch.setattr(FakeGraph, "__torch_dispatch__", baking)
    return FakeCuda()


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("kind", ["dense", "moe", "dit"])
def test_every_variant_runs_on_the_cuda_executor(kind: str, mode: str, cuda: FakeCuda) -> None:
    rows = stack.rows(FakeTimer(), 60, LIMITS, lambda options: CUDAExecutor(options, cuda), case_of(kind), [mode])
    assert not [r for r in rows if "error" in r], rows
    planned = [r for r in rows if r["variant"] != stack.MODEL]
    assert {r["variant"] for r in planned} >= {stack.UNSPLIT, *stack.CONTENDERS[kind]}
    assert all(r["max_difference"] <= (0.02 if kind == "moe" else 1e-5) for r in planned)
    if mode == "graph":
        assert len(planned) == len(rows)  # there is no graph of the model as it is
        for row in planned:
            (graph,) = row["graphs"]["captured"]
            assert graph["replays"] >= ROUNDS[0]
    assert [c.sms for c in cuda.contexts] == ([33] if kind == "dense" else [])  # a quarter of 132
    assert json.loads(json.dumps(rows)) == rows


def test_a_wrong_replay_is_no_figure(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    replay = FakeGraph.replay

    def spoilt(graph: FakeGraph) -> None:
        replay(graph)
        for *_, out, _stream in graph.calls[-8:]:
            if isinstance(out, torch.Tensor) and out.is_floating_point():
                out.add_(5)

    monkeypatch.setattr(FakeGraph, "replay", spoilt)
    rows = stack.rows(FakeTimer(), 60, LIMITS, lambda options: CUDAExecutor(options, cuda), case_of("dit"), ["graph"])
    assert rows and all("differs from the model's by" in r["error"] and "ms" not in r for r in rows)


def test_a_plan_that_was_not_captured_is_no_graph_figure(cuda: FakeCuda) -> None:
    rows = stack.rows(FakeTimer(), 60, LIMITS, sequential, case_of("dit"), ["graph"])
    assert [r["variant"] for r in rows] == [stack.UNSPLIT, "branches"]
    assert all("not captured: this executor has no graphs" in r["error"] for r in rows)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_no_result(bad: float) -> None:
    with pytest.raises(ValueError, match="differs from the model's by"):
        stack._check(lambda: torch.tensor([1.0, bad]), [torch.ones(2)], {})


def test_compiled_pieces_compute_the_same() -> None:
    case = case_of("dense")
    rows = stack.rows(FakeTimer(), 200, LIMITS, sequential, case, ["inductor"])
    found = {r["variant"]: r for r in rows}
    for name in (stack.UNSPLIT, "prefill_decode", "prefill_decode all", "nanoflow"):
        assert found[name]["max_difference"] < 1e-4


def test_one_stream_has_the_same_launches_in_the_same_order() -> None:
    case = case_of("dit")
    with torch.no_grad():
        program = stack.capture_model(case.model, *case.inputs).program
    inner = get_strategy("branches")()
    there, here = inner.record(program, 1).launches, stack.OneStream(inner).record(program, 1).launches
    assert {launch.stream for launch in here} == {"compute"} != {launch.stream for launch in there}
    assert [dataclasses.replace(launch, stream="compute") for launch in there] == here


# -- the command -------------------------------------------------------------------------------------------------------


def command(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(suite.main)
    return CliRunner().invoke(app, list(arguments))


def test_without_cuda_the_command_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = command("--json", str(tmp_path / "results"), "--quick")
    assert result.exit_code == 2
    assert "need a CUDA device, and none is visible" in result.stderr
    assert not (tmp_path / "results").exists()


def test_results_are_written_section_by_section(tmp_path: Path) -> None:
    measured = Measured({"base": [1.0], "slow": [2.0]})
    rows = rows_of("case", measured, {"base": 0.1, "slow": 0.1}, {"slow": ("base",)})

    def outcomes() -> Any:
        yield Outcome("first", 1.5, rows)
        assert json.loads((tmp_path / "first.json").read_text())["rows"] == rows  # before the second has begun
        yield Outcome("second", 0.1, error="not run: no time")

    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    assert suite.publish(outcomes(), LIMITS, tmp_path, console) == 1
    text = console.export_text()
    assert "losses: 1" in text and "slow is slower than base: 0.500x" in text
    assert "without results: 1" in text and "second: not run: no time" in text
    second = json.loads((tmp_path / "second.json").read_text())
    assert second["error"] == "not run: no time" and "rows" not in second
    assert second["limits"] == {"bytes_per_s": 1e12, "flops_per_s": 1e14}
    assert suite.publish(iter([Outcome("first", 1.5, rows)]), LIMITS, tmp_path, console) == 0


def test_the_suite_fits_its_time_and_names_the_engine_benchmark() -> None:
    names = [s.name for s in suite.sections(FakeTimer(), LIMITS, sequential, "cpu", quick=True)]
    assert names == ["corun", "stack_dense", "stack_moe", "stack_dit", "kernels"]
    assert suite.QUICK_SECONDS < suite.SECONDS <= 8 * 60 * 0.85
    config = Path(__file__).parents[2] / suite.VLLM.split("--strategy ")[1].split()[0]
    assert config.is_file()


def test_the_mixed_batch_is_split_as_the_strategies_want_it() -> None:
    for contenders in stack.CONTENDERS.values():
        for contender in contenders.values():
            strategy = contender.build()
            split = strategy.split(stack.MIXED)
            assert (len(split.micro_batches) == 2) == (contender.strategy != "branches")
            assert all(a < b for a, b in pairwise(split.bounds))
            models.contexts(stack.MIXED, split)
    with pytest.raises(ValueError, match="between requests only"):
        models.contexts(stack.MIXED, cut_evenly(stack.MIXED, 3))
