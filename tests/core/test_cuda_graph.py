"""Whole-plan CUDA graphs with a stand-in for torch.cuda that records calls and replays them."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch
from cuda_standin import FakeCuda
from hypothesis import given, settings
from hypothesis import strategies as st
from random_graphs import WIDTH, RandomGraph, random_schedule
from rounding import assert_same
from support import example, fixed_examples, lowered, manual, program_of

from dynaflow_serving.capture.examples import HIDDEN
from dynaflow_serving.capture.fx import partition
from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.config import ExecutorOptions
from dynaflow_serving.core.batch import Batch
from dynaflow_serving.core.plan import Plan
from dynaflow_serving.errors import ScheduleError
from dynaflow_serving.executor.cuda import CUDAExecutor
from dynaflow_serving.executor.cuda_graph import WholePlanGraphs
from dynaflow_serving.planning.lowering import lower
from dynaflow_serving.session.plan_cache import PlanCache, no_context
from dynaflow_serving.strategies import get_strategy
from dynaflow_serving.strategy.selector import FixedStrategy
from dynaflow_serving.strategy.splitting import cut_evenly, whole

CHAIN = """
value x batch:0
value y batch:0
value z batch:0
inputs x
op send network
  inputs x
  outputs y
op use compute
  inputs y
  outputs z
outputs z
"""
LAUNCHES = tuple((op, mb, "network" if op == "send" else "compute") for op in ("send", "use") for mb in range(2))


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(WholePlanGraphs, "device_type", "cpu")
    with torch.no_grad():
        yield


def executor(cuda: FakeCuda, max_graphs: int = 32) -> CUDAExecutor:
    return CUDAExecutor(ExecutorOptions(graph="whole", max_graphs=max_graphs), cuda)


def chain(text: str = CHAIN, **functions: Any) -> tuple[CapturedProgram, Plan]:
    program = program_of(text)
    functions = {"send": lambda x: x * 3, "use": lambda y: y + 1} | functions
    return manual(program, **functions), lowered(program, 2, *LAUNCHES)


def replays(cuda: FakeCuda) -> int:
    return sum(entry[0] == "replay" for entry in cuda.log)


def eager(e: CUDAExecutor) -> dict[str, int]:
    reasons: dict[str, int] = e.report()["graphs"]["eager"]
    return reasons


@pytest.mark.parametrize("model", ["llama", "moe"])
@pytest.mark.parametrize("strategy", ["sequential", "nanoflow", "dual_batch"])
def test_a_replay_equals_the_model(model: str, strategy: str) -> None:
    """Through the PlanCache: per bucket one eager run, one capture, then replays that launch nothing else."""
    cuda = FakeCuda()
    e = executor(cuda)
    capture = example(model)
    plain = PlanCache(capture, FixedStrategy(get_strategy("sequential")()), CUDAExecutor(cuda=FakeCuda()))
    plan_cache = PlanCache(capture, FixedStrategy(get_strategy(strategy)()), e)
    names = capture.program.inputs[: len(capture.program.inputs) - len(capture.constants)]
    for step in range(4):
        cuda.log.clear()
        for tokens in (8, 12):
            batch = Batch((1,) * tokens)
            x = torch.randn(tokens, HIDDEN)
            args = [x if n == "x" else tokens for n in names]
            (expected,) = plain.run(args, whole(batch, "the reference"))
            (out,) = plan_cache.run(args, cut_evenly(batch, 2))
            assert_same(out, expected)
        if step > 1:
            assert cuda.log == [("replay", "default")] * 2
    report = json.loads(json.dumps(plan_cache.executor.report()))["graphs"]  # plain data
    assert report["eager"] == {"warm-up: the first run of a bucket": 2}
    assert [(g["bounds"], g["replays"]) for g in report["captured"]] == [([0, 4, 8], 3), ([0, 6, 12], 3)]
    for g in report["captured"]:
        assert g["mib"] > 0 and g["capture_seconds"] > 0 and g["lanes (model)"] <= 2
    streams = {name for graph in e._graphs.graphs.values() for *_, name in graph.graph.calls}
    assert len(streams) == (1 if strategy == "sequential" else 2)
    assert len({graph.graph.pool for graph in e._graphs.graphs.values()}) == 1


SEEN = {"replayed": 0, "declined": 0}


@fixed_examples(100, size=(1, 12), micro_batches=(1, 3))
@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), size=st.integers(1, 12), micro_batches=st.integers(1, 3))
def test_random_graphs_replayed_on_random_batches_equal_plain_execution(
    seed: int, size: int, micro_batches: int
) -> None:
    """Replacement kernels, merges and in-place writes included; arguments hold what is written to them."""
    rng = random.Random(seed)
    gm, tokens = RandomGraph(rng).build(size)
    capture = partition(gm, tokens=tokens)
    torch.manual_seed(seed)
    schedule = random_schedule(rng, capture, micro_batches, wild=True)
    try:
        plan = lower(schedule, "random")
    except ScheduleError:
        return
    cuda = FakeCuda()
    e = executor(cuda)
    run = e.bind(capture, plan, schedule.kernels)
    names = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    taken = capture.program.inputs[: len(capture.program.inputs) - len(capture.constants)]
    bounds = [0, *sorted(rng.sample(range(1, 7), micro_batches - 1)), 7]
    with torch.no_grad():
        for _ in range(4):
            inputs = {n: torch.randint(-3, 4, (7, WIDTH)).double() for n in names}
            expected_inputs = {k: v.clone() for k, v in inputs.items()}
            expected = gm(*(expected_inputs[n] for n in names))
            out = capture.rebuild(run([inputs[n] for n in taken], bounds, no_context))
            for got, want in zip(out, expected, strict=True):
                assert torch.equal(got, want)
            for n in names:
                assert torch.equal(inputs[n], expected_inputs[n]), f"argument {n}"
    assert replays(cuda) == (3 if e.report()["graphs"]["captured"] else 0)
    reasons = eager(e).keys() - {"warm-up: the first run of a bucket"}
    assert all("share memory" in r for r in reasons), reasons
    SEEN["declined" if reasons else "replayed"] += 1


def test_the_random_graphs_are_replayed_and_declined(report: Any) -> None:
    report("random graphs as whole-plan CUDA graphs (stand-in): " + ", ".join(f"{k} {v}" for k, v in SEEN.items()))
    if sum(SEEN.values()) > 20:  # most random graphs return a view of an input, or two views of one tensor
        assert SEEN["replayed"] > 20 and SEEN["declined"] > 20


def test_buckets_share_no_static_buffer_and_micro_batches_are_views_of_one() -> None:
    cuda = FakeCuda()
    e = executor(cuda)
    seen: list[torch.Tensor] = []
    capture, plan = chain(send=lambda x: (seen.append(x), x * 3)[1])
    run = e.bind(capture, plan, {})
    buffers: list[set[int]] = []
    for bounds in ([0, 2, 5], [0, 3, 5], [0, 2, 6]):
        for _ in range(2):
            seen.clear()
            run([torch.ones(bounds[-1])], bounds, no_context)
        buffers.append({x.untyped_storage().data_ptr() for x in seen})
    assert all(len(b) == 1 for b in buffers)
    assert len(set.union(*buffers)) == 3


def test_an_output_outlives_the_next_replay() -> None:
    capture, plan = chain()
    run = executor(FakeCuda()).bind(capture, plan, {})
    outs = [run([torch.full((4,), float(i))], [0, 2, 4], no_context)[0] for i in range(5)]
    assert [o[0].item() for o in outs] == [3.0 * i + 1 for i in range(5)]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_static_buffers_are_plain_tensors_in_any_mode(mode: Any) -> None:
    e = executor(FakeCuda())
    capture, plan = chain()
    run = e.bind(capture, plan, {})
    with mode():
        for _ in range(3):
            (z,) = run([torch.ones(4, requires_grad=True)], [0, 2, 4], no_context)
            assert z.tolist() == [4.0] * 4 and not z.requires_grad
    (graph,) = e._graphs.graphs.values()
    assert not any(b.requires_grad or b.is_inference() for b in graph.static_inputs.values())


def test_what_a_graph_is_fixed_to_makes_a_bucket_of_its_own() -> None:
    e = executor(FakeCuda())
    text = CHAIN.replace("inputs x\nop", "value w shared\ninputs x w\nop").replace("  inputs x\n", "  inputs x w\n")
    capture, plan = chain(text, send=lambda x, w: x * w)
    run = e.bind(capture, plan, {})
    weights = [torch.tensor(2.0), torch.tensor(5.0)]
    x = torch.arange(4.0)
    other_strides = torch.arange(8.0)[::2]
    for _ in range(3):
        for w in weights:
            for given_x in (x, other_strides):
                assert torch.equal(run([given_x, w], [0, 2, 4], no_context)[0], given_x * w + 1)
    assert len(e.report()["graphs"]["captured"]) == 4
    weights[0].fill_(7)  # a weight is read where it is
    assert torch.equal(run([x, weights[0]], [0, 2, 4], no_context)[0], x * 7 + 1)


def test_no_more_graphs_than_allowed() -> None:
    cuda = FakeCuda()
    e = executor(cuda, max_graphs=1)
    capture, plan = chain()
    runs = [e.bind(capture, plan, {}) for _ in range(2)]  # of two programs: the limit is the executor's
    for _ in range(3):
        for run in runs:
            assert run([torch.ones(4)], [0, 2, 4], no_context)[0][0] == 4
    assert len(e.report()["graphs"]["captured"]) == 1
    assert eager(e) == {
        "warm-up: the first run of a bucket": 2,
        "max_graphs: 1 graphs are captured already": 2,
    }


LOCAL = CHAIN.replace("inputs x\nop", "value n local\ninputs x n\nop").replace("  inputs x\n", "  inputs x n\n")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (CHAIN.replace("op use compute", "op use compute context"), "operator use reads the engine's context"),
        (CHAIN.replace("value z batch:0", "value z batch:0 storage=x"), "x and z share memory"),
        (LOCAL, "input n has no token axis and may differ in every step"),
    ],
)
def test_what_cannot_be_captured_runs_eagerly_and_is_counted_by_name(text: str, reason: str) -> None:
    cuda = FakeCuda()
    e = executor(cuda)
    program = program_of(text)
    capture = manual(program, send=lambda x, n=3: x * n, use=lambda y: y + 1)
    plan = lowered(program, 1, ("send", 0, "network"), ("use", 0, "compute"))
    run = e.bind(capture, plan, {})
    for _ in range(3):
        assert run([torch.ones(4), 3][: len(program.inputs)], [0, 4], no_context)[0][0] == 4
    assert len(cuda.streams) == 1 and replays(cuda) == 0
    ((why, count),) = eager(e).items()
    assert reason in why and count == 3


def test_a_context_that_the_integration_declares_static_is_captured() -> None:
    cuda = FakeCuda()
    offsets = torch.tensor([10.0, 20.0])  # static addresses, new contents in every step
    entered: list[int] = []
    capture, plan = chain(
        CHAIN.replace("op use compute", "op use compute context"), use=lambda y: y + offsets[entered[-1]]
    )
    capture.static_context = True
    run = executor(cuda).bind(capture, plan, {})
    for step in range(4):
        offsets.add_(1)
        (z,) = run([torch.ones(4)], [0, 2, 4], entered.append)
        assert z.tolist() == [14.0 + step] * 2 + [24.0 + step] * 2
    assert replays(cuda) == 3
    assert entered == [0, 1] * 2  # a replay enters no context


def test_not_under_autograd_nor_inside_another_capture_nor_from_another_device() -> None:
    cuda = FakeCuda()
    e = executor(cuda)
    capture, plan = chain()
    run = e.bind(capture, plan, {})
    x = torch.ones(4, requires_grad=True)
    with torch.enable_grad():
        for _ in range(3):
            run([x], [0, 2, 4], no_context)[0].sum().backward()
    assert x.grad is not None and x.grad.tolist() == [9.0] * 4
    theirs, stream = cuda.CUDAGraph(), cuda.Stream()
    with cuda.graph(theirs, pool=None, stream=stream, capture_error_mode="thread_local"):
        run([torch.ones(4)], [0, 2, 4], no_context)
    assert theirs.calls
    run([torch.ones(4, device="meta")], [0, 2, 4], no_context)
    assert replays(cuda) == 0
    assert [(r.split(":")[0], n) for r, n in eager(e).items()] == [
        ("autograd is on", 3),
        ("the caller is capturing a graph of its own", 1),
        ("input x is on device meta", 1),
    ]


def test_a_capture_that_fails_is_given_up_and_the_step_is_served() -> None:
    cuda = FakeCuda()
    e = executor(cuda)

    def use(y: torch.Tensor) -> torch.Tensor:
        if cuda.is_current_stream_capturing():
            raise RuntimeError("operation not permitted when stream is capturing")
        return y + 1

    capture, plan = chain(use=use)
    run = e.bind(capture, plan, {})
    for _ in range(3):
        assert run([torch.ones(4)], [0, 2, 4], no_context)[0][0] == 4
        assert cuda.active is cuda.default
    assert eager(e) == {
        "warm-up: the first run of a bucket": 1,
        "capture failed: RuntimeError: operation not permitted when stream is capturing": 2,
    }


def test_a_plan_with_a_missing_wait_cannot_be_captured_by_the_stand_in() -> None:
    """The stand-in checks forks and joins as the driver does: what passes above is joined."""
    cuda = FakeCuda()
    stream, side = cuda.Stream(), cuda.Stream()
    with (
        pytest.raises(RuntimeError, match="not part of the capture"),
        cuda.graph(cuda.CUDAGraph(), pool=None, stream=stream, capture_error_mode="thread_local"),
    ):
        cuda.set_stream(side)
        torch.ones(2) + 1
    event = cuda.Event()
    with (
        pytest.raises(RuntimeError, match="unjoined work on stream stream1"),
        cuda.graph(cuda.CUDAGraph(), pool=None, stream=stream, capture_error_mode="thread_local"),
    ):
        event.record(stream)
        side.wait_event(event)
        cuda.set_stream(side)
        torch.ones(2) + 1


def test_a_replay_on_another_stream_waits_for_the_last_one() -> None:
    cuda = FakeCuda()
    capture, plan = chain()
    run = executor(cuda).bind(capture, plan, {})
    for _ in range(3):
        run([torch.ones(4)], [0, 2, 4], no_context)
    cuda.log.clear()
    other = cuda.Stream()
    cuda.set_stream(other)
    run([torch.ones(4)], [0, 2, 4], no_context)
    assert cuda.log == [("join", other.name, "default"), ("replay", other.name)]


def test_close_drops_all_graphs_and_no_sooner() -> None:
    cuda = FakeCuda()
    e = executor(cuda)
    capture, plan = chain()
    for _ in range(3):
        run = e.bind(capture, plan, {})
        run([torch.ones(4)], [0, 2, 4], no_context)
        run([torch.ones(4)], [0, 2, 4], no_context)
        del run
    assert len(e.report()["graphs"]["captured"]) == 3
    e.close()
    assert e.report()["graphs"]["captured"] == []
