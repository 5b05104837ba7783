"""The eager front-end: recorded programs, and plans over suspended computations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from eager_support import NORM, RULES, WIDTH, Attention, Model, Run, inputs, recorded, reduce, strategy
from rounding import assert_same, integers
from torch import nn

from dynaflow_serving.capture import examples
from dynaflow_serving.capture.eager import Diverged, recording
from dynaflow_serving.capture.mark import mark
from dynaflow_serving.core.batch import Batch, Split
from dynaflow_serving.core.order import external_ports
from dynaflow_serving.core.plan import COMPUTE_STREAM, ActionKind
from dynaflow_serving.errors import AnnotationError, ScheduleError
from dynaflow_serving.planning.lowering import lower
from dynaflow_serving.planning.verify import verify
from dynaflow_serving.session.plan_cache import no_context
from dynaflow_serving.strategies import get_strategy
from dynaflow_serving.strategy.base import OpScheduler
from dynaflow_serving.strategy.rules import Rule, SplitFunc, SplitModule
from dynaflow_serving.strategy.schedule import Schedule
from dynaflow_serving.strategy.splitting import cut_evenly

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def model() -> Iterator[Model]:
    yield Model()


# -- programs and plans --------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["sequential", "nanoflow", "dual_batch", "comm_overlap"])
@pytest.mark.parametrize("micro_batches", [2, 3])
def test_both_front_ends_give_the_same_plan_text(name: str, micro_batches: int) -> None:
    """All but the program's digest in the first line: only the graph's program names weights and sizes as inputs."""
    captured = examples.example_capture("llama").program
    made = recorded(examples.llama(), (), lambda n: (torch.randn(n, examples.HIDDEN),))
    assert made.captured is not None
    texts = []
    for program in (captured, made.captured.program):
        plan = lower(get_strategy(name)().record(program, micro_batches), name, zero_copy=False)
        verify(program, plan)
        texts.append(plan.to_text().replace(program.digest, "PROGRAM"))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("executor", ["sequential", "cpu"])
@pytest.mark.parametrize("name", ["sequential", "nanoflow", "comm_overlap"])
@pytest.mark.parametrize("rules", [RULES, (*RULES, NORM)], ids=["", "norm"])
def test_split_equals_whole(model: Model, executor: str, name: str, rules: tuple[Rule, ...]) -> None:
    made = recorded(model, rules)
    run = Run(made, strategy(name), executor)
    for tokens, micro_batches in ((2, 2), (7, 2), (11, 3), (9, 4)):
        args = inputs(tokens)
        want = model.forward(*args)
        assert torch.equal(run(micro_batches, *args), want)


def test_what_the_program_says(model: Model) -> None:
    made = recorded(model, (*RULES, NORM))
    assert made.captured is not None
    program = made.captured.program
    by_name = program.by_name
    assert not program.unsplittable
    assert [o.name for o in program.operators[:5]] == [
        "layers.0.compute.0", "layers.0.attention", "layers.0.o_proj", "layers.0.all_reduce.0", "layers.0.norm.0",
    ]  # fmt: skip
    assert by_name["layers.0.attention"].writes == ("kv:layers.0.attention",)
    assert by_name["layers.0.attention"].context and by_name["layers.0.o_proj"].context
    assert not by_name["layers.0.all_reduce.0"].context and by_name["layers.0.all_reduce.0"].group == "tp"
    assert by_name["layers.0.norm.0"].inputs[-1] == "layers.0.norm1.weight"
    assert all(program.values[v].axis == 0 for v in (*program.inputs[:2], *program.outputs))


def test_micro_batches_advance_in_the_order_of_the_plan(model: Model) -> None:
    run = Run(recorded(model, RULES), strategy("nanoflow"))
    caches = [layer.attention.cache for layer in model.layers]
    for cache in caches:
        cache.sizes.clear()
    run(2, *inputs(7))
    assert [cache.sizes for cache in caches] == [[3, 4], [3, 4]]


class Fused(OpScheduler):
    """All-reduce and the norm after it as one kernel."""

    name = "fused"

    def split(self, batch: Batch) -> Split:
        return cut_evenly(batch, 2)

    def schedule(self, s: Schedule) -> None:
        while ready := s.get_ready_ops():
            task = ready[0]
            norm = next((t for t in s.successors(task) if "norm" in t.name), None) if task.operator.group else None
            if norm is not None and len(external_ports(s.program, (task.name, norm.name))[1]) == 2:
                s.execute([task, norm], replace=all_reduce_add_norm)
            else:
                s.execute(task)


kernel_calls: list[int] = []


def all_reduce_add_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    kernel_calls.append(len(x))
    residual = residual + x * 2
    return residual * weight, residual


def test_a_kernel_replaces_two_adjacent_borders(model: Model) -> None:
    run = Run(recorded(model, (*RULES, NORM)), Fused())
    args = inputs(7)
    want = model.forward(*args)
    kernel_calls.clear()
    assert torch.equal(run(2, *args), want)
    assert sorted(kernel_calls) == [3, 3, 3, 4, 4, 4]  # of four; the last norm's residual goes nowhere


class MergedReduce(Fused):
    """The all-reduce of both micro-batches at once."""

    def schedule(self, s: Schedule) -> None:
        while ready := s.get_ready_ops():
            network = [t for t in ready if t.operator.group]
            if len(network) == 2:
                s.execute(network)
            else:
                s.execute(next(t for t in ready if not t.operator.group))


def test_a_plain_border_runs_merged(model: Model) -> None:
    run = Run(recorded(model, RULES), MergedReduce())
    args = inputs(7)
    assert torch.equal(run(2, *args), model.forward(*args))
    (plan,) = (p for p in run.plan_cache.plans if p.micro_batches == 2)
    assert sum(s.kind is ActionKind.RUN and s.stop - s.start == 2 for s in plan.actions) == 4


class TwoStreams(Fused):
    def schedule(self, s: Schedule) -> None:
        while ready := s.get_ready_ops():
            side = ready[0].name.endswith("o_proj")
            s.execute(ready[0], stream="side" if side else COMPUTE_STREAM)


def test_code_of_one_micro_batch_keeps_one_stream(model: Model) -> None:
    with pytest.raises(ScheduleError, match=r"layers.0.o_proj@0 is on stream 'side'.*annotate"):
        Run(recorded(model, RULES), TwoStreams())(2, *inputs(6))


def test_a_wait_removed_from_a_plan_is_found(model: Model) -> None:
    from dataclasses import replace

    from dynaflow_serving.errors import PlanError

    made = recorded(model, RULES)
    assert made.captured is not None
    plan = lower(get_strategy("nanoflow")().record(made.captured.program, 2), "nanoflow")
    waits = [i for i, s in enumerate(plan.actions) if s.kind is ActionKind.WAIT]
    for i in waits:
        with pytest.raises(PlanError):
            verify(made.captured.program, replace(plan, actions=plan.actions[:i] + plan.actions[i + 1 :]))


# -- another path --------------------------------------------------------------------------------------------
class Branching(nn.Module):
    def __init__(self, condition: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.attention, self.condition = Attention(), condition

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attention(x + 1)
        if self.condition(x):
            x = reduce(x)
        return x - 1


def test_another_path_than_the_recorded_one_is_detected_and_recorded_anew() -> None:
    model = Branching(lambda x: len(x) >= 6)
    made = recorded(model, RULES, lambda n: (integers(n, WIDTH),))
    x = integers(8, WIDTH)
    run = Run(made, strategy("sequential", micro_batches=2))
    with pytest.raises(Diverged, match="ended where it called all_reduce"):  # micro-batches of 4 take the other branch
        run(2, x)
    assert made.captured is None and made.wants_recording and "all_reduce" in made.waiting
    apart = made.run_apart((0, 4, 8), (x,), {}, no_context)
    assert torch.equal(apart, torch.cat([model.forward(x[:4]), model.forward(x[4:])]))
    for tokens in (4, 5):
        made.record(tokens, (integers(tokens, WIDTH),), {})
    assert torch.equal(Run(made, strategy("sequential", micro_batches=2))(2, x), apart)


def test_a_path_that_depends_on_the_number_of_tokens_waits_for_another_recording() -> None:
    model = Branching(lambda x: len(x) >= 7)
    made = recorded(model, RULES, lambda n: (integers(n, WIDTH),))
    assert made.captured is None and "number of tokens" in made.waiting
    made.record(9, (integers(9, WIDTH),), {})
    assert made.captured is not None


def test_a_branch_on_values_cannot_be_split() -> None:
    model = Branching(lambda x: x.sum() < 1e9)
    made = recorded(model, RULES, lambda n: (integers(n, WIDTH),))
    assert made.captured is not None
    assert "reads the value of a tensor" in made.captured.program.unsplittable


def test_a_branch_on_a_number_that_the_code_has_made_can_be_split() -> None:
    model = Branching(lambda x: torch.tensor([3]).add(1).item() > 2)
    made = recorded(model, RULES, lambda n: (integers(n, WIDTH),))
    assert made.captured is not None and not made.captured.program.unsplittable


def overwritten(x: torch.Tensor) -> bool:
    number = torch.tensor([0.0])
    number.copy_(x[0, :1])
    return bool(number.item() > 1e9)


def filled(x: torch.Tensor) -> bool:
    return bool(torch.sum(x, 0, out=x.new_empty(WIDTH))[0].item() > 1e9)


@pytest.mark.parametrize("branch", [overwritten, filled, lambda x: torch.zeros(1).item() > 1])
def test_a_branch_on_a_tensor_that_was_filled_cannot_be_split(branch: Callable[[torch.Tensor], bool]) -> None:
    """From the batch, or from nothing that was seen: a kernel that the recording does not see may fill zeros."""
    made = recorded(Branching(branch), RULES, lambda n: (integers(n, WIDTH),))
    assert made.captured is not None
    assert "reads the value of a tensor" in made.captured.program.unsplittable


def test_a_border_in_a_block_of_another_stream_cannot_be_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the device: what counts is the current stream at a border, against that of the caller."""
    current = ["caller's"]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[0])
    monkeypatch.setattr(recording, "on_cuda", lambda leaves: True)

    class OwnStream(nn.Module):
        def __init__(self, inside: bool) -> None:
            super().__init__()
            self.attention, self.inside = Attention(), inside

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            current[0] = "own"
            x = self.attention(x) if self.inside else x + 1
            current[0] = "caller's"
            return self.attention(x) + 1

    for inside in (True, False):
        made = recorded(OwnStream(inside), RULES, lambda n: (integers(n, WIDTH),))
        assert made.captured is not None
        assert ("attention is called inside a CUDA stream block" in made.captured.program.unsplittable) is inside


def test_an_error_in_the_model_reaches_the_caller_and_closes_all_frames(model: Model) -> None:
    run = Run(recorded(model, RULES), strategy("nanoflow"))
    args = inputs(7)
    broken = model.layers[1].up.weight.data
    model.layers[1].up.weight.data = torch.zeros(WIDTH, WIDTH + 1)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(2, *args)
    model.layers[1].up.weight.data = broken
    assert torch.equal(run(2, *args), model.forward(*args))


# -- rules ---------------------------------------------------------------------------------------------------
def test_torch_functions_by_name(model: Model) -> None:
    made = recorded(model, (*RULES, SplitFunc("relu", "relu")))
    assert made.captured is not None
    assert "layers.0.relu" in made.captured.program.by_name
    args = inputs(7)
    run = Run(made, strategy("nanoflow"))
    assert torch.equal(run(2, *args), model.forward(*args))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (SplitModule("Atention"), r"unknown module class 'Atention'. Did you mean 'Attention'\? Valid: AddNorm, "),
        (SplitFunc("torch_is_not.there.f"), "No module named 'torch_is_not'.*dotted path"),
        (SplitFunc("dynaflow_serving.capture.examples.nothing"), "has no attribute 'nothing'"),
        (SplitFunc("gelu"), r"does not call it between its other borders \(all_reduce, attention\)"),
    ],
)
def test_a_rule_that_matches_nothing(model: Model, rule: Rule, message: str) -> None:
    with pytest.raises(AnnotationError, match=message):
        recorded(model, (*RULES, rule))


def test_a_mark_around_a_block_is_refused_by_name() -> None:
    class Marked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with mark("middle"):
                return x.sin()

    with pytest.raises(AnnotationError, match=r"mark\('middle'\) as a context manager needs a graph.*decorator"):
        recorded(Marked(), (), lambda n: (integers(n, WIDTH),))


def test_gradients_flow_through_a_split_forward(model: Model) -> None:
    run = Run(recorded(model, RULES), strategy("sequential", micro_batches=2))
    args = inputs(6)
    with torch.enable_grad():
        run(2, *args).sum().backward()
        got = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        model.forward(*args).sum().backward()
    want = [p.grad for p in model.parameters() if p.grad is not None]
    assert got and len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert_same(g, w, "gradients")
