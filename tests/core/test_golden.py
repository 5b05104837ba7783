"""Plans of the example models, and functions generated for one, as text that people review.

`pytest tests/core --update-golden` rewrites them.
"""

from __future__ import annotations

import textwrap

import pytest
import torch
from cuda_standin import FakeCuda
from golden_plans import CASES, FUNCTIONS, GOLDEN, golden_file, golden_function, golden_plan
from support import example, lowered, program_of

from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.core.parse import parse_plan, parse_program
from dynaflow_serving.core.plan import COMPUTE_STREAM, ActionKind, Plan
from dynaflow_serving.errors import PlanError
from dynaflow_serving.executor import codegen, get_executor
from dynaflow_serving.executor.cuda import CUDAExecutor
from dynaflow_serving.planning.happens_before import contains, happens_before
from dynaflow_serving.planning.lowering import lower
from dynaflow_serving.planning.verify import verify
from dynaflow_serving.strategies import get_strategy


@pytest.mark.parametrize(("model", "strategy", "micro_batches"), CASES)
def test_golden(model: str, strategy: str, micro_batches: int, request: pytest.FixtureRequest) -> None:
    program = example(model).program
    plan = lower(get_strategy(strategy)().record(program, micro_batches), strategy)
    verify(program, plan)
    text = program.to_text() + "\n" + plan.to_text()
    file = golden_file(model, strategy, micro_batches)
    if request.config.getoption("--update-golden", default=False):
        GOLDEN.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text(), "the plan has changed; if that is right: pytest tests/core --update-golden"
    assert parse_program(text) == program
    assert parse_plan(text) == plan


@pytest.mark.parametrize("name", FUNCTIONS)
def test_golden_function(name: str, request: pytest.FixtureRequest) -> None:
    captured, plan = example("llama"), golden_plan("llama", "nanoflow")
    executor = CUDAExecutor(cuda=FakeCuda()) if name == "cuda" else get_executor(name)
    bound = executor.bind(captured, plan, {})
    executor.close()
    text, file = bound.source + "\n", golden_function(name)
    if request.config.getoption("--update-golden", default=False):
        file.write_text(text)
    assert text == file.read_text(), "the function has changed; if that is right: pytest tests/core --update-golden"
    assert bound.run.__code__.co_varnames[:3] == ("args", "bounds", "enter")  # type: ignore[attr-defined]


EXAMPLE = """
value x batch:0
value y batch:0
value z batch:0
inputs x
op project compute
  inputs x
  outputs y
op all_reduce network
  inputs y
  outputs z
  into z
outputs z
"""


def test_the_docstring_of_codegen_shows_a_generated_function() -> None:
    functions = {"project": torch.neg, "all_reduce": torch.neg}
    into, buffers = {"all_reduce": torch.neg}, {"z": torch.empty}
    captured = CapturedProgram(program_of(EXAMPLE), functions, into=into, buffers=buffers)
    launches = [(name, mb, s) for name, s in (("project", "compute"), ("all_reduce", "network")) for mb in (0, 1)]
    executor = get_executor("cpu")
    source = executor.bind(captured, lowered(captured.program, 2, *launches), {}).source
    executor.close()
    assert textwrap.indent(source, "    ") in str(codegen.__doc__)


class Order:
    """Happens-before between the runs of a golden plan."""

    def __init__(self, plan: Plan) -> None:
        self.before = happens_before(plan)
        self.at = {(s.operators[0], s.start): i for i, s in enumerate(plan.actions) if s.kind is ActionKind.RUN}
        self.stream = {key: plan.actions[i].stream for key, i in self.at.items()}

    def ordered(self, a: tuple[str, int], b: tuple[str, int]) -> bool:
        return contains(self.before[self.at[b]], self.at[a])

    def overlap(self, a: tuple[str, int], b: tuple[str, int]) -> bool:
        """Neither waits for the other, and they are on different streams."""
        return not self.ordered(a, b) and not self.ordered(b, a) and self.stream[a] != self.stream[b]


def test_nanoflow_reduces_one_micro_batch_under_the_compute_of_the_other() -> None:
    order = Order(golden_plan("llama", "nanoflow"))
    assert order.overlap(("layers.0.all_reduce.0", 0), ("layers.0.attention.1", 1))  # ar@0 under c0@1
    assert order.overlap(("layers.0.all_reduce.0", 1), ("layers.0.compute.1", 0))  # ar@1 under c1@0
    assert not order.overlap(("layers.0.all_reduce.0", 0), ("layers.0.compute.1", 0))  # its own consumer waits


def test_dual_batch_hides_dispatch_and_combine() -> None:
    order = Order(golden_plan("moe", "dual_batch"))
    attention, gate, experts = "layers.0.attention", "layers.0.compute.1", "layers.0.experts"
    for a in (attention, gate):
        assert order.overlap(("layers.0.dispatch", 0), (a, 1))  # D@0 under A@1
    assert order.overlap(("layers.0.dispatch", 1), (experts, 0))  # D@1 under E@0
    assert order.overlap(("layers.0.combine", 0), (experts, 1))  # C@0 under E@1
    assert order.overlap(("layers.0.combine", 1), ("layers.1.attention", 0))  # C@1 under the next A@0


@pytest.mark.parametrize("layer", range(2))
def test_the_shared_expert_is_an_operator_that_waits_for_no_network_of_its_layer(layer: int) -> None:
    order = Order(golden_plan("moe", "dual_batch"))
    shared = (f"layers.{layer}.shared_expert", 0)
    assert order.stream[shared] == COMPUTE_STREAM
    assert not order.ordered((f"layers.{layer}.combine", 0), shared)
    assert order.overlap((f"layers.{layer}.combine", 0), shared)


def test_prefill_decode_splits_attention_only() -> None:
    order = Order(golden_plan("llama", "prefill_decode"))
    attention = "layers.0.attention.0"
    assert order.overlap((attention, 0), (attention, 1))
    assert order.ordered((attention, 0), ("layers.0.attention.1", 0))  # the output projection of both
    assert ("layers.0.attention.1", 1) not in order.at


@pytest.mark.parametrize("layer", range(2))
def test_branches_hide_the_shared_expert_without_a_split(layer: int) -> None:
    order = Order(golden_plan("moe", "branches", 1))
    shared = (f"layers.{layer}.shared_expert", 0)
    for routed in ("dispatch", "experts", "combine"):
        assert order.overlap((f"layers.{layer}.{routed}", 0), shared)


def test_branches_run_the_two_streams_of_a_dit_block_side_by_side() -> None:
    order = Order(golden_plan("dit", "branches", 1))
    for layer in range(2):
        assert order.overlap((f"layers.{layer}.compute.0", 0), (f"layers.{layer}.compute.1", 0))
        for modality in ("compute.0", "compute.1"):
            assert order.ordered((f"layers.{layer}.{modality}", 0), (f"layers.{layer}.attention", 0))


def test_error_shows_the_grid() -> None:
    plan = golden_plan("llama", "nanoflow")
    program = parse_program(golden_file("llama", "nanoflow", 2).read_text())
    i = next(i for i, s in enumerate(plan.actions) if s.kind is ActionKind.WAIT)
    broken = Plan(plan.strategy, plan.program, 2, (), plan.actions[:i] + plan.actions[i + 1 :])
    with pytest.raises(PlanError, match=r"(?s)read without waiting.*compute.*network.*<-- ERROR HERE"):
        verify(program, broken)


def test_comm_overlap_is_lock_step_with_micro_batches_and_fills_the_wait_within_one() -> None:
    plan = golden_plan("llama", "comm_overlap")
    order = Order(plan)
    reduces = [n for n, mb in order.at if "all_reduce" in n and mb == 0]
    for name in reduces[:-1]:
        computes = [k for k in order.at if k[1] == 1 and order.stream[k] == COMPUTE_STREAM]
        assert any(order.overlap((name, 0), k) for k in computes), f"{name}@0 runs beside nothing of micro-batch 1"
    moe = Order(golden_plan("moe", "comm_overlap", 1))
    for layer in range(2):
        shared = next(k for k in moe.at if k[0] == f"layers.{layer}.shared_expert")
        assert moe.overlap((f"layers.{layer}.dispatch", 0), shared)
