"""The layer stacks of benchmarks/gpu compute what they should under every plan. Times in here are made up."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cuda_standin import FakeCuda, FakeGraph
from gpu_bench_support import LIMITS, FakeTimer, sequential
from rounding import assert_same
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu import models, stack
from benchmarks.gpu.timing import ROUNDS
from dynaflow_serving.core.batch import Batch, MicroBatch, Split
from dynaflow_serving.executor import CUDAExecutor
from dynaflow_serving.executor.cuda_graph import WholePlanGraphs
from dynaflow_serving.strategies import get_strategy
from dynaflow_serving.strategy.splitting import cut_at_tokens, cut_evenly, whole

BATCH = Batch((1,) * 3 + (5, 4), (7,) * 3 + (0, 0))
DENSE = models.Shape(32, 4, 2, 8, 48)
MOE = models.Shape(32, 4, 4, 8, 16, experts=4, top_k=2, shared=24)


def case_of(kind: str) -> stack.StackCase:
    torch.manual_seed(0)
    if kind == "dit":
        return stack.dit_case("cpu", torch.float32, 2, DENSE, image=6, text=3)
    dtype = torch.bfloat16 if kind == "moe" else torch.float32  # grouped products are bfloat16
    return stack.decoder_case(kind, "cpu", dtype, 2, MOE if kind == "moe" else DENSE, BATCH)


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
            assert_same(out[mine].view(-1, 4, 8)[:, head], expected)
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
        (models.RequestRun((0, 3), (0, 3), 7),),
        (models.RequestRun((0, 5), (3, 4), 0),),
        (models.RequestRun((0, 4), (4, 5), 0),),
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

    def wrong(case: stack.StackCase, capture: Any, strategy: Any, executor: Any) -> Any:
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
