"""Rows per token: which values can be cut and merged when a token has several rows."""

from __future__ import annotations

import pytest
import torch
from rounding import integers
from support import arguments, capture

from dynaflow_serving.capture.mark import mark
from dynaflow_serving.core.parse import parse_program
from dynaflow_serving.core.program import Scope
from dynaflow_serving.executor.sequential import SequentialExecutor
from dynaflow_serving.planning.lowering import lower
from dynaflow_serving.planning.verify import verify
from dynaflow_serving.session.plan_cache import no_context
from dynaflow_serving.strategy.schedule import Schedule


@mark("border", "network")
def border(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def flattened(x: torch.Tensor) -> torch.Tensor:
    rows = border(x.reshape(-1, 4).matmul(torch.ones(4, 6)))
    return rows.view(-1, 3, 6) + 1


def test_several_rows_per_token_are_cut_and_merged_between_tokens() -> None:
    """The middle operator runs merged, its neighbours per micro-batch: the flattened rows are merged and cut."""
    x = integers(5, 3, 4)
    captured = capture(flattened, x)
    program = captured.program
    assert {v.rows for v in program.values.values()} == {1, 3}
    assert parse_program(program.to_text()) == program
    schedule = Schedule(program, 2)
    while ready := schedule.get_ready_ops():
        merged = [t for t in ready if t.name == "border"]
        schedule.execute(merged if len(merged) == 2 else next(t for t in ready if t.name != "border" or merged == [t]))
    plan = lower(schedule, "merged")
    verify(program, plan)
    assert any(" merge " in line for line in plan.to_text().splitlines())
    run = SequentialExecutor().bind(captured, plan, {})
    with torch.no_grad():
        (out,) = run(arguments(program.inputs, {"x": x}, 5), [0, 2, 5], no_context)
    assert torch.equal(out, flattened(x))


def test_two_copies_of_the_batch_are_local_to_a_micro_batch() -> None:
    program = capture(lambda x: border(torch.cat((x, x))).chunk(2)[0], torch.randn(4, 3)).program
    assert not program.unsplittable
    assert program.values["compute.0"].scope is Scope.LOCAL


def test_rows_of_several_tokens_are_not_regrouped() -> None:
    program = capture(lambda x: border(torch.cat((x, x)).view(-1, 2, 3)), torch.randn(4, 3)).program
    assert "reshapes across the token axis" in program.unsplittable


def test_a_new_flat_buffer_may_be_viewed_by_token() -> None:
    program = capture(lambda x: border(torch.empty(3 * x.shape[0]).view(-1, 3).copy_(x)), torch.randn(4, 3)).program
    assert not program.unsplittable


def own_row(x: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(x.shape[0])[:, None]
    return border(x + 1) * x[rows, torch.arange(x.shape[1])[None, :]]


def test_numbers_that_pick_each_tokens_own_row_do_not_mix_tokens() -> None:
    assert not capture(own_row, torch.randn(4, 3)).program.unsplittable


@pytest.mark.parametrize(
    "mixing",
    [
        lambda x: border(x) + torch.arange(x.shape[0])[:, None],
        lambda x: border(x) * x[torch.arange(x.shape[0]).flip(0)],
        lambda x: border(x) * torch.ones(100, 3)[torch.arange(x.shape[0])],
        lambda x: border(x) * x[torch.arange(x.shape[0]) // 2],
    ],
)
def test_numbers_used_otherwise_are_refused(mixing: object) -> None:
    assert capture(mixing, torch.randn(4, 3)).program.unsplittable  # type: ignore[arg-type]
