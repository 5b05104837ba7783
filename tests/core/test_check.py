"""The first split step of each kind is compared with an un-split one, and a split that differs is refused by name."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from check_support import WIDTH, Model, WithKernel, compiled_with, kernel_of, model_under
from hypothesis import given
from hypothesis import strategies as st
from rounding import integers, with_integer_weights
from torch import nn

import dynaflow_serving as dynaflow
from dynaflow_serving.config import load
from dynaflow_serving.core.parse import parse_plan, parse_program
from dynaflow_serving.planning.verify import verify
from dynaflow_serving.policy.selector import json_schema
from dynaflow_serving.session.difference import TOLERANCES, difference
from dynaflow_serving.session.replay import NO_OPERATOR, find_operator
from dynaflow_serving.session.report import WorkerReport
from dynaflow_serving.torch_backend import Compiled

LEVELS = ["dynamo", "aot"]
WRONG = 1.001


def checked(compiled: Compiled) -> int:
    check = compiled.session.check
    assert check is not None and not check.refused
    return check.steps


@torch.no_grad()
@pytest.mark.parametrize("level", LEVELS)
def test_a_wrong_kernel_is_caught_in_the_first_step_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, level: Any
) -> None:
    model, compiled = model_under(WRONG, tmp_path, level)
    x = integers(8, WIDTH)
    with caplog.at_level(logging.ERROR):
        first = compiled(x)
    assert torch.equal(first, model(x)), "the caller has the un-split result"
    assert "with_kernel is STOPPED" in caplog.text and "layers.1.Block (kernel a_kernel), micro-batch 0" in caplog.text
    assert torch.equal(compiled(x), model(x))  # nothing is split any more
    counts = compiled.session.counts
    assert counts.split == 1 and counts.unsplit == {"check: layers.1.Block differs from the un-split run": 1}
    (file,) = tmp_path.iterdir()
    content = torch.load(file, weights_only=True)
    assert content["bounds"] == [0, 4, 8] and content["strategy"] == "with_kernel"
    assert "rows 0..3 (4 of 4): value layers.1.Block differs by 0.001" in content["operator"]
    (program,), (plan,) = map(parse_program, content["programs"]), map(parse_plan, content["plans"])
    verify(program, plan)
    assert [s.kernel for s in plan.actions if s.kernel] == ["a_kernel"] * 2
    assert torch.equal(content["whole"][0], model(x)) and not torch.allclose(content["split"][0], model(x), rtol=1e-5)
    assert any(torch.equal(t, x) for t in content["inputs"])


@torch.no_grad()
@pytest.mark.parametrize("level", LEVELS)
def test_a_right_kernel_is_compared_once_per_number_of_micro_batches(tmp_path: Path, level: Any) -> None:
    model, compiled = model_under(1.0, tmp_path, level)
    for size, comparisons in ((8, 1), (8, 1), (9, 1), (12, 2), (15, 2), (4, 2)):
        x = integers(size, WIDTH)
        assert torch.equal(compiled(x), model(x))
        assert checked(compiled) == comparisons
    assert compiled.session.counts.split == 6 and not list(tmp_path.iterdir())


@torch.no_grad()
def test_every_second_step_is_compared_besides_the_first_of_each_kind(tmp_path: Path) -> None:
    _, compiled = model_under(1.0, tmp_path, check={"every": 2})
    found = []
    for size in (8, 8, 8, 12, 12, 8):
        compiled(integers(size, WIDTH))
        found.append(checked(compiled))
    assert found == [1, 1, 2, 3, 4, 4]


@torch.no_grad()
def test_never_compares_nothing(tmp_path: Path) -> None:
    model, compiled = model_under(WRONG, tmp_path, check="never")
    x = integers(8, WIDTH)
    assert not torch.equal(compiled(x), model(x)) and not torch.equal(compiled(x), model(x))
    assert compiled.session.check is None and compiled.session.counts.split == 2
    assert compiled.session.report().check is None


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_each_graph_is_compared_and_refused_on_its_own(tmp_path: Path) -> None:
    good, bad = with_integer_weights(Model()), with_integer_weights(Model())

    def both(x: torch.Tensor) -> torch.Tensor:
        y = good(x).sign()
        torch._dynamo.graph_break()
        return bad(y)

    def kernel(*inputs: Any) -> torch.Tensor:
        block = good.layers[1] if any(t is good.layers[1].up.weight for t in inputs) else bad.layers[1]
        return kernel_of(block, 1.0 if block is good.layers[1] else WRONG)(*inputs)

    compiled = compiled_with(WithKernel(kernel), both, check={"folder": str(tmp_path)})
    x = integers(8, WIDTH)
    for _ in range(2):
        assert torch.equal(compiled(x), both(x))
    session = compiled.session
    assert [len(c.refused) for c in session.plan_caches] == [0, 1]
    assert session.counts.split == 3 and sum(session.counts.unsplit.values()) == 1
    report = session.report()
    assert report.check is not None and report.check.steps == 2 and report.check.seconds > 0
    assert "split steps compared with un-split ones: 2, " in str(report.check) and "REFUSED" in str(report.check)
    assert WorkerReport.model_validate(report.model_dump(mode="json")) == report


@torch.library.custom_op("check_test::centred", mutates_args=())
def centred(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean(0)


@centred.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@torch.no_grad()
@pytest.mark.parametrize("level", LEVELS)
def test_a_trusted_operator_that_mixes_rows_is_caught(tmp_path: Path, level: Any) -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return centred(x.sin()).cos()

    compiled = compiled_with(WithKernel(), model, level, {"folder": str(tmp_path)})
    x = torch.randn(8, WIDTH)
    assert torch.equal(compiled(x), model(x)) and torch.equal(compiled(x), model(x))
    (reason,) = compiled.session.counts.unsplit
    assert reason.startswith("check: centred (centred") and reason.endswith("differs from the un-split run")


class Choosing(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return torch.where(y == y.round(), 1.0, 2.0)


@torch.no_grad()
@pytest.mark.parametrize("level", LEVELS)
def test_rounding_that_an_operator_carries_on_is_no_difference(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, level: Any
) -> None:
    """The kernel is off by less than the tolerance, which is enough for another choice afterwards."""
    model, x = with_integer_weights(Choosing()), integers(8, WIDTH)
    strategy = WithKernel(kernel_of(model.layers[1], 1 + 1e-6))
    compiled = compiled_with(strategy, model, level, {"folder": str(tmp_path)})
    assert not torch.equal(compiled(x), model(x)) and not torch.equal(compiled(x), model(x))
    assert checked(compiled) == 1 and not list(tmp_path.iterdir())
    assert "rounding is carried on" in caplog.text and compiled.session.counts.split == 2


# -- nothing is left behind -----------------------------------------------------------------------------
@pytest.mark.parametrize(("level", "factor"), [("dynamo", 1.0), ("dynamo", WRONG), ("aot", 1.0)])
def test_the_first_training_step_has_the_gradients_of_the_model(tmp_path: Path, level: Any, factor: float) -> None:
    model, compiled = model_under(factor, tmp_path)
    if level == "aot":  # a lowered block returns what its backward needs, too, which the kernel does not
        compiled = compiled_with(WithKernel(), model, level, {"folder": str(tmp_path)})
    x = integers(8, WIDTH)
    for _ in range(2):
        model.zero_grad()
        compiled(x).sum().backward()
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        model(x).sum().backward()
        for gradient, parameter in zip(found, model.parameters(), strict=True):
            assert parameter.grad is not None and torch.equal(gradient, parameter.grad)
    graphs = 1 if level == "dynamo" else 2  # at "aot" the backward graph is one of its own
    assert compiled.session.counts.split == (2 * graphs if factor == 1.0 else 1)


class Writing(nn.Module):
    """Writes a cache and a counter in place, and reads both."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Model().layers)

    def forward(self, x: torch.Tensor, cache: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
        cache.index_copy_(1, past.view(1), x[:, None])
        past.add_(1)
        for layer in self.layers:
            x = layer(x)
        cache.mul_(2)
        return x + cache.sum(1)


@torch.no_grad()
@pytest.mark.parametrize("kernel_error", [1.0, WRONG])
def test_what_a_graph_writes_in_place_is_written_once(tmp_path: Path, kernel_error: float) -> None:
    model = with_integer_weights(Writing())
    strategy = WithKernel(kernel_of(model.layers[1], kernel_error))
    compiled = compiled_with(strategy, model, "aot", {"folder": str(tmp_path)})
    caches = [torch.ones(8, 5, WIDTH) for _ in range(2)]
    pasts = [torch.zeros((), dtype=torch.int64) for _ in range(2)]
    for _ in range(3):
        x = integers(8, WIDTH)
        assert torch.equal(compiled(x, caches[0], pasts[0]), model(x, caches[1], pasts[1]))
        assert torch.equal(*caches) and torch.equal(*pasts)
    (plan_cache,) = compiled.session.plan_caches
    assert plan_cache.captured.program.written_storages
    assert compiled.session.counts.split == (3 if kernel_error == 1.0 else 1)


@torch.library.custom_op("check_test::noted", mutates_args=("cache",))
def noted(x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    cache += x - x.mean(0)
    return x.clone()


@noted.register_fake
def _(x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@torch.no_grad()
def test_a_wrong_write_in_place_is_found_though_the_outputs_are_equal(tmp_path: Path) -> None:
    def model(x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        return noted(x, cache)

    compiled = compiled_with(WithKernel(), model, "dynamo", {"folder": str(tmp_path)})
    x, caches = torch.randn(8, WIDTH), [torch.ones(8, WIDTH) for _ in range(2)]
    for _ in range(2):
        assert torch.equal(compiled(x, caches[0]), model(x, caches[1]))
        assert torch.equal(*caches)
    (file,) = tmp_path.iterdir()
    content = torch.load(file, weights_only=True)
    assert content["difference"].startswith("input batched_1, which is written in place, differs")
    assert any(torch.equal(t, torch.ones(8, WIDTH)) for t in content["inputs"]), "as it was before the step"


# -- what is a difference -------------------------------------------------------------------------------
@given(st.sampled_from(list(TOLERANCES)), st.floats(-6, 0), st.integers(0, 9))
def test_the_tolerance_is_relative_to_the_greatest_value(dtype: torch.dtype, exponent: float, place: int) -> None:
    whole = torch.linspace(-3, 2, 10).to(dtype)
    split = whole.clone()
    split[place] += 3 * 10**exponent
    apart = float((split.double() - whole.double()).abs().max() / 3)
    found = difference([split], [whole], None)
    if not math.isclose(apart, TOLERANCES[dtype], rel_tol=1e-3):
        assert (found is not None) == (apart > TOLERANCES[dtype])
    assert (difference([split], [whole], 0.0) is None) == torch.equal(split, whole)


def test_nan_and_shapes_differ_and_equal_nan_does_not() -> None:
    nan = torch.tensor([1.0, torch.nan])
    assert difference([nan.clone()], [nan], None) is None
    assert difference([torch.tensor([1.0, 2.0])], [nan], None) is not None
    assert difference([torch.ones(3)], [torch.ones(4)], None) is not None
    assert difference([torch.ones(3, dtype=torch.int64)], [torch.full((3,), 2)], None) is not None


# -- the config -----------------------------------------------------------------------------------------
def test_the_ways_to_say_it() -> None:
    assert load("nanoflow").check == load({"strategy": "nanoflow", "check": "first"}).check == load("auto").check
    assert load({"strategy": "nanoflow", "check": "never"}).check is None
    config = load({"strategy": "nanoflow", "check": {"every": 7}})
    assert config.check is not None and config.check.every == 7
    for each in (config, load({"strategy": "nanoflow", "check": "never"})):
        assert load(each.model_dump()) == each
    schema = str(json_schema()["properties"]["check"])
    assert all(word in schema for word in ("first", "never", "CheckOptions"))
    assert dynaflow.compile(nn.ReLU(), WithKernel()).session.check is not None  # type: ignore[attr-defined]


@torch.no_grad()
def test_a_wrong_share_of_a_sum_is_named() -> None:
    config = {"strategy": "nanoflow", "options": {"min_tokens": 1}, "check": "never"}
    compiled = dynaflow.compile(lambda x: (x * 2).sum(0), config)
    x = integers(8, WIDTH)
    assert torch.equal(compiled(x), (x * 2).sum(0))
    (plan_cache,) = compiled.session.plan_caches
    captured, plan = plan_cache.captured, plan_cache.plans[-1]
    (name,) = captured.functions
    right = captured.functions[name]
    args = [x if captured.program.values[v].axis == 0 else 8 for v in captured.program.inputs]

    def found() -> str:
        return find_operator(captured, plan, {}, args, [0, 4, 8], None).text

    assert found() == NO_OPERATOR
    captured.functions[name] = lambda *inputs: right(*inputs) * (1.01 if inputs[-1].shape[0] < 8 else 1)
    assert f"{name}: value {name} differs by" in found()
