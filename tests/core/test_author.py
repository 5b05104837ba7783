"""What a strategy's author can rely on: typed options, checked splits, default streams, tags that are missing."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import Field
from support import TWO_NETWORK, example, program_of

from dynaflow_serving.core.batch import Batch, MicroBatch, Split
from dynaflow_serving.errors import ConfigError, ScheduleError
from dynaflow_serving.strategies import SHIPPED, build_strategy
from dynaflow_serving.strategies.dual_batch import DualBatch
from dynaflow_serving.strategies.nanoflow import NanoFlow
from dynaflow_serving.strategies.token_weave import TokenWeave
from dynaflow_serving.strategy.base import OpScheduler, Options, SplitOptions
from dynaflow_serving.strategy.registry import STRATEGIES
from dynaflow_serving.strategy.schedule import Schedule
from dynaflow_serving.strategy.splitting import cut_evenly
from dynaflow_serving.strategy.streams import COMPUTE, NETWORK
from dynaflow_serving.strategy.tags import Tag


class InOrder(OpScheduler):
    """A strategy without options."""

    name = "in_order"

    def split(self, batch: Batch) -> Split:
        return cut_evenly(batch, 2)

    def schedule(self, s: Schedule) -> None:
        while ready := s.get_ready_ops():
            s.execute(ready[0])


class ThreeOptions(SplitOptions):
    micro_batches: int = Field(3, ge=2, description="three by default")


class Three(OpScheduler[ThreeOptions]):
    name = "three"

    def split(self, batch: Batch) -> Split:
        return cut_evenly(batch, self.options.micro_batches)

    def schedule(self, s: Schedule) -> None:
        InOrder().schedule(s)


# -- options -----------------------------------------------------------------------------------------------------------


def test_the_type_argument_is_the_class_of_the_options() -> None:
    assert InOrder.Options is Options and type(InOrder().options) is Options
    assert Three.Options is ThreeOptions and Three().options.micro_batches == 3

    class Derived(Three):
        pass

    assert Derived.Options is ThreeOptions


def test_the_maximum_comes_from_split_options_and_is_two_without() -> None:
    assert (InOrder().max_micro_batches, Three().max_micro_batches) == (2, 3)
    assert Three(ThreeOptions(micro_batches=5)).max_micro_batches == 5
    assert list(ThreeOptions.model_fields) == ["micro_batches", "min_tokens"]


def test_options_must_be_defined_above_the_strategy() -> None:
    with pytest.raises(TypeError, match=r"Early: .*'Later'.* is no class: define the options above the strategy"):

        class Early(OpScheduler["Later"]):  # type: ignore[name-defined]
            pass


# -- splits ------------------------------------------------------------------------------------------------------------


def whole_with(**changes: Any) -> Any:
    """A `split` that gives one micro-batch, apart from `changes`."""

    def split(self: OpScheduler, batch: Batch) -> Split:
        parts: dict[str, Any] = {"requests": (0, len(batch.tokens)), "tokens": (0, sum(batch.tokens))}
        return Split((MicroBatch(**(parts | changes)),))

    return split


def gap(self: OpScheduler, batch: Batch) -> Split:
    n = sum(batch.tokens)
    return Split((MicroBatch((0, 1), (0, 1)), MicroBatch((0, len(batch.tokens)), (min(2, n - 1), n))))


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (lambda self, batch: cut_evenly(batch, 3), r"split\(\) made 3 micro-batches, more than max_micro_batches=2"),
        (lambda self, batch: cut_evenly(batch, 1 // len(batch.context)), r"\(huge\): ZeroDivisionError"),
        (lambda self, batch: None, r"split\(\) returned NoneType, not a Split"),
        (lambda self, batch: Split(()), r"made no micro-batch"),
        (whole_with(tokens=(0, 1)), r"\(one request\) .*hold tokens \[\(0, 1\)\], which do not tile 0 to 8192"),
        (gap, r"which are not adjacent"),
        (whole_with(requests=(0, 1)), r"\(decode\) .*micro-batch 0 names requests \(0, 1\), .* of \(0, 256\)"),
        (
            lambda self, batch: Split(cut_evenly(batch, 2).micro_batches),
            r"\(one request\) .*depends lacks \[\(0, 1\)\]",
        ),
    ],
)
def test_a_wrong_split_is_found_before_an_engine_serves(
    split: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InOrder, "split", split)
    monkeypatch.setitem(STRATEGIES, "in_order", InOrder)
    with pytest.raises(ConfigError, match=f"strategy 'in_order' .*{message}"):
        build_strategy("in_order", {})


def test_every_shipped_strategy_passes() -> None:
    for name in SHIPPED:
        build_strategy(name, {})
    for options in ({"micro_batches": 4}, {"micro_batches": 3, "cut": "token", "min_tokens": 1}):
        build_strategy("nanoflow", options)


# -- streams and tags --------------------------------------------------------------------------------------------------


def test_network_operators_go_to_the_network_stream_by_default() -> None:
    recorded = InOrder().record(program_of(TWO_NETWORK), 1)
    assert {launch.operators[0]: launch.stream for launch in recorded.launches} == {
        "make": NETWORK,
        "read": COMPUTE,
        "other": NETWORK,
    }
    s = Schedule(program_of(TWO_NETWORK), 2)
    s.execute([t for t in s.get_ready_ops() if t.name == "make"], stream=COMPUTE)
    s.execute([t for t in s.get_ready_ops() if t.name == "read"], stream="side")
    s.execute(s.get_ready_ops())
    assert [launch.stream for launch in s.launches] == [COMPUTE, "side", NETWORK]


def test_a_strategy_says_which_tags_a_program_lacks() -> None:
    llama, moe = example("llama").program, example("moe").program
    lacks = DualBatch().missing_tags([llama])
    assert lacks.startswith("strategy 'dual_batch' finds no operator tagged dispatch or combine: its turns")
    assert DualBatch().missing_tags([moe]) == DualBatch().missing_tags([llama, moe]) == ""
    assert "tagged replicated: no all-reduce is woven" in TokenWeave().missing_tags([moe])
    assert NanoFlow().missing_tags([llama]) == ""


def test_tags_of_a_program_are_plain_words() -> None:
    tags = {tag for operator in example("moe").program.operators for tag in operator.tags}
    assert tags == {Tag.ATTENTION, Tag.DISPATCH, Tag.COMBINE}
    assert {type(tag) for tag in tags} == {str}


# -- loops that do not end ---------------------------------------------------------------------------------------------


def test_a_loop_that_executes_nothing_ends_with_an_error() -> None:
    class Idle(InOrder):
        name = "idle"

        def schedule(self, s: Schedule) -> None:
            while s.get_ready_ops():
                pass

    class Endless(InOrder):
        name = "endless"

        def schedule(self, s: Schedule) -> None:
            while True:
                for task in s.get_ready_ops():
                    s.execute(task)

    program = program_of(TWO_NETWORK)
    with pytest.raises(ScheduleError, match=r"asked for ready operators \d+ times and ran none; ready: make@0, make@1"):
        Idle().record(program, 2)
    with pytest.raises(ScheduleError, match=r"all operators have been executed: end the loop"):
        Endless().record(program, 2)


def test_ready_operators_are_in_program_order_then_by_micro_batch() -> None:
    s = Schedule(program_of(TWO_NETWORK), 2)
    assert [str(t) for t in s.get_ready_ops()] == ["make@0", "make@1", "other@0", "other@1"]
    s.execute(s.get_ready_ops(1)[0])
    assert [str(t) for t in s.get_ready_ops()] == ["make@0", "read@1", "other@0", "other@1"]
    assert [str(t) for t in s.get_ready_ops(1)] == ["read@1", "other@1"]
    assert s.get_ready_ops(2) == []
