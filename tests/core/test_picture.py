"""Pictures of plans: what they show is what was measured and simulated, of programs here and in a (small) engine."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from policy_support import CHAIN
from support import built, manual, program_of

from dynaflow_serving.bench.engines import ENGINES, Engine
from dynaflow_serving.bench.one_step import one_step
from dynaflow_serving.config import Config, load
from dynaflow_serving.core.batch import Batch
from dynaflow_serving.core.parse import parse_plan, parse_program
from dynaflow_serving.core.plan import ActionKind
from dynaflow_serving.core.timeline import Timeline, operator_times, spans_of
from dynaflow_serving.errors import ConfigError, DynaflowError
from dynaflow_serving.executor.cpu import CPUExecutor
from dynaflow_serving.picture.comparison import PlanComparison, compare
from dynaflow_serving.picture.engine import IN_TURN, compare_in_engine
from dynaflow_serving.picture.figure import assert_can_draw, draw
from dynaflow_serving.picture.measure import measured_and_predicted
from dynaflow_serving.picture.page import Caption, render
from dynaflow_serving.session.plan_cache import PlanCache
from dynaflow_serving.strategies.branches import Branches
from dynaflow_serving.strategies.nanoflow import NanoFlow, NanoFlowOptions
from dynaflow_serving.strategy.base import OpScheduler
from dynaflow_serving.strategy.schedule import Schedule
from dynaflow_serving.strategy.selector import FixedStrategy
from dynaflow_serving.strategy.splitting import cut_evenly

SVG = "{http://www.w3.org/2000/svg}"
MS = 0.03  # seconds that an operator sleeps


def drawn(comparison: PlanComparison, title: str = "", caption: str = "") -> str:
    return draw(comparison.shown, comparison.tokens, title, caption)


def sleeps(x: torch.Tensor) -> torch.Tensor:
    time.sleep(MS * len(x) / 4)
    return x + 1


@pytest.fixture(scope="module")
def executor() -> Iterator[CPUExecutor]:
    executor = CPUExecutor()
    yield executor
    executor.close()


def chain(strategy: OpScheduler, executor: CPUExecutor) -> PlanCache:
    program = program_of(CHAIN)
    return PlanCache(manual(program, **{o.name: sleeps for o in program.operators}), FixedStrategy(strategy), executor)


@pytest.fixture(scope="module")
def comparison(executor: CPUExecutor) -> PlanComparison:
    """CHAIN in two micro-batches of 4 tokens, on real threads."""
    plan_cache = chain(NanoFlow(), executor)
    return measured_and_predicted(plan_cache, cut_evenly(Batch((8,)), 2), [torch.zeros(8, 1)], runs=3)


@pytest.mark.alone
def test_a_prediction_from_operators_in_turn_meets_what_is_measured(comparison: PlanComparison) -> None:
    """Sleeping operators know no contention, so what is left is the hand-off between threads."""
    assert set(comparison.alone) == {(o, mb) for o in ("c0", "n0", "c1", "n1") for mb in (0, 1)}
    assert all(MS <= seconds < 2 * MS for seconds in comparison.alone.values())
    predicted = comparison.predicted.timeline
    assert predicted.simulated and not comparison.measured.simulated
    assert predicted.plan == comparison.measured.plan and predicted.plan.strategy == "nanoflow"
    assert predicted.overlap == pytest.approx(3 / 5, abs=0.1)
    assert predicted.makespan == pytest.approx(5 * MS, rel=0.3)
    assert comparison.measured.makespan == pytest.approx(predicted.makespan, rel=0.4)
    assert comparison.planned.least <= comparison.measured.makespan <= comparison.planned.greatest
    assert comparison.unsplit is not None
    unsplit = comparison.unsplit.timeline
    assert unsplit.plan.micro_batches == 1 and unsplit.makespan >= 8 * MS  # twice the tokens, nothing beside


def test_a_plan_of_one_micro_batch_is_measured_too(executor: CPUExecutor) -> None:
    plan_cache = chain(Branches(), executor)
    split = plan_cache.decide(Batch((4,)))
    found = measured_and_predicted(plan_cache, split, [torch.zeros(4, 1)], runs=1)
    assert found.tokens == (4,) and found.measured.plan.strategy == "branches"


def test_times_of_single_operators_are_medians_over_the_runs() -> None:
    plan = parse_plan("plan a program=0 micro_batches=1 depends=-\ncompute | run x @0\ncompute | run y @0\n")
    runs = [Timeline(plan, spans_of(plan, [(0, 0.0, x), (1, 10.0, 10 + y)]), frozenset(), False)
            for x, y in ((1, 5), (2, 9), (9, 7))]  # fmt: skip
    assert operator_times(runs) == {("x", 0): 2, ("y", 0): 7}


def test_an_operator_that_was_not_measured_is_an_error(comparison: PlanComparison) -> None:
    with pytest.raises(ConfigError, match="no measured seconds for"):
        compare(comparison.program, (4, 4), [comparison.measured], [])


# -- the picture ---------------------------------------------------------------------------------------
def bars(svg: str) -> dict[str, str]:
    """Id of a bar -> its tooltip."""
    root = ET.fromstring(svg)
    found = {g.get("id", ""): g.findtext(f"{SVG}title") for g in root.iter(f"{SVG}g")}
    return {name: title for name, title in found.items() if title is not None}


def texts(svg: str) -> list[str]:
    return ["".join(t.itertext()) for t in ET.fromstring(svg).iter(f"{SVG}text")]


def test_every_span_is_a_bar_with_a_tooltip_and_what_was_simulated_is_called_so(comparison: PlanComparison) -> None:
    svg = drawn(comparison, "a title", "measured on <that> machine")
    shown = comparison.shown
    found = bars(svg)
    assert len(found) == sum(len(s.timeline.spans) for s in shown)
    for number, (s, kind) in enumerate(zip(shown, ("measured", "measured", "simulated"), strict=True)):
        for span in s.timeline.spans:
            title = found[f"bar{number}-{span.index}"]
            assert title.endswith(kind) and f"stream {span.action.stream}, action {span.index}" in title
            if span.action.operators:
                assert f"run {span.action.operators[0]} @{span.action.start}" in title
                assert ("network operator" in title) == span.action.operators[0].startswith("n")
    written = texts(svg)
    assert {"a title", "measured on <that> machine", "network", "micro-batch 1: 4 tokens"} <= set(written)
    headings = [t for t in written if t.startswith(("un-split, measured: ", "plan, measured: ", "plan, predicted: "))]
    assert len(headings) == 3 and all("streams overlap" in t for t in headings[1:])
    assert f"streams overlap {comparison.measured.overlap:.0%} of it" in headings[1]


def test_bars_are_where_their_spans_are(comparison: PlanComparison) -> None:
    """Widths in the SVG are proportional to seconds, on one axis for all panels."""
    root = ET.fromstring(drawn(comparison))
    widths = {}
    for g in root.iter(f"{SVG}g"):
        if g.get("id", "").startswith("bar"):
            x = [float(v) for v in re.findall(r"[ML] ([-\d.]+) ", g.find(f"{SVG}path").get("d"))]  # type: ignore
            widths[g.get("id")] = max(x) - min(x)
    seconds = {f"bar{i}-{s.index}": s.end - s.start for i, p in enumerate(comparison.shown) for s in p.timeline.spans}
    scale = sum(widths.values()) / sum(seconds.values())
    for name, width in widths.items():
        assert width == pytest.approx(seconds[name] * scale, abs=0.01)


def test_equal_comparisons_give_equal_files_and_nothing_outside_is_referred_to(comparison: PlanComparison) -> None:
    svg = drawn(comparison, "a title", "a caption")
    assert svg == drawn(comparison, "a title", "a caption")
    assert set(re.findall(r"(?:https?:)?//[^\s\"'<)]+", svg)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_many_layers_make_a_wide_picture(comparison: PlanComparison) -> None:
    """A plan of 400 steps: as wide as its bars need."""
    lines = "\n".join(f"compute | run layers.{i}.attention @{mb}" for i in range(200) for mb in (0, 1))
    plan = parse_plan(f"plan a program=0 micro_batches=2 depends=-\n{lines}\n")
    marks = [(i, float(i), i + 1.0) for i in range(400)]
    run = dataclasses.replace(comparison.planned, timeline=Timeline(plan, spans_of(plan, marks), frozenset(), False))
    svg = drawn(dataclasses.replace(comparison, unsplit=None, planned=run, predicted=run))
    width, narrow = (float(ET.fromstring(s).get("width", "").removesuffix("pt")) for s in (svg, drawn(comparison)))
    assert width > 4 * narrow
    assert sum(t == "attention" for t in texts(svg)) == 800  # so that there is room for names, across
    assert len(bars(svg)) == 800


class Fused(OpScheduler):
    """Replaces two operators by a kernel."""

    name = "fu<sed>"

    def split(self, batch: Batch) -> Any:
        return cut_evenly(batch, 2)

    def schedule(self, s: Schedule) -> None:
        for mb in (0, 1):
            s.execute(s.get_ready_ops(mb)[0])
            s.execute(s.get_ready_ops(mb)[0], stream="network")
        merged = s.get_ready_ops()
        s.execute(merged)
        s.execute(s.get_ready_ops(), replace=self.kernel)

    @staticmethod
    def kernel(x: torch.Tensor) -> torch.Tensor:
        return x + 1


def test_a_page_shows_kernels_merged_steps_and_escapes_names(executor: CPUExecutor) -> None:
    plan_cache = chain(Fused(), executor)
    found = measured_and_predicted(plan_cache, cut_evenly(Batch((8,)), 2), [torch.zeros(8, 1)], runs=1)
    assert any(s.kind is ActionKind.REPLACE for s in found.measured.plan.actions)
    page = render([found, found], Caption("<b>title</b>", ("a note", "another")), "dynaflow explain '<x>'")
    assert "<b>title" not in page and "&lt;b&gt;title&lt;/b&gt;" in page and "&lt;x&gt;" in page
    assert "fu&lt;sed&gt;" in page and "fu<sed>" not in page
    assert "Program 2 of 2" in page and "in c1 0..1" in page and "in kernel 0..1" in page
    assert page.count("<svg") == 2 and "several micro-batches" in page
    tags = Balanced()
    tags.feed(page)
    assert tags.open == []
    assert not re.search(r"(src|href)=\"(?!#)", page), "nothing outside of the page"


class Balanced(HTMLParser):
    """The elements that are still open."""

    VOID = {"meta", "br", "link", "img"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_has_every_operator_with_its_times_and_the_plan(comparison: PlanComparison) -> None:
    page = render([comparison], Caption("title", ("note",)), "command")
    for (name, mb), seconds in comparison.alone.items():
        row = page[page.index(f'<td class="text">{name}</td>') :]
        assert f"<td>{seconds * 1e6:,.0f}</td>" in row[: row.index("</tr>")], (name, mb)
    assert comparison.measured.plan.to_text().splitlines()[1].replace(">", "&gt;") in page
    assert parse_program(CHAIN_TEXT := comparison.program.to_text()) and CHAIN_TEXT.splitlines()[1] in page
    assert f"{comparison.measured.hidden_network:.0%}" in page


def test_without_the_packages_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    with pytest.raises(DynaflowError, match=r"missing here: matplotlib\. .*pip install 'dynaflow-serving\[report\]'"):
        assert_can_draw("jinja2")


# -- in an engine --------------------------------------------------------------------------------------
# A child process with a Session around CHAIN; the variable SMALL says when a batch arrives request by request.
SMALL = """
import logging, os, sys, time
sys.path.insert(0, {tests!r})
import torch
from policy_support import CHAIN
from support import built, manual, program_of
from dynaflow_serving.bench.drivers import EngineInfo
from dynaflow_serving.config import load
from dynaflow_serving.policy.selector import build_selector
from dynaflow_serving.session.forward import GraphForward
from dynaflow_serving.session.session import Session
from dynaflow_serving.core.batch import Batch

def operator(x):
    time.sleep(0.0005 * len(x))
    return x + 1

class Small:
    def start(self, settings):
        config = load(settings.dynaflow)
        self.session = Session(build_selector(config), config, logger=logging.getLogger("small"))
        program = program_of(CHAIN)
        captured = manual(program, **{{o.name: operator for o in program.operators}})
        self.forward = GraphForward(self.session, self.session.add(captured))
        self.passes = 0
        return EngineInfo("1", 100, "here")

    def generate(self, requests):
        self.passes += 1
        tokens = tuple(len(r.prompt) for r in requests)
        piecemeal = os.environ.get("SMALL") == "always" or (os.environ.get("SMALL") == "at first" and self.passes < 3)
        for batch in [Batch((n,)) for n in tokens] if piecemeal else [Batch(tokens)]:
            x = torch.zeros(sum(batch.tokens), 1)
            with self.session.step(batch):
                (out,) = self.forward(x)
            assert torch.equal(out, x + 4)
        return [[0] for _ in requests]

    def report(self):
        return [self.session.report().model_dump(mode="json")]

    def reset(self):
        self.session.reset()

    def close(self):
        self.session.close()
"""
TOKENS = (8, 8)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "small_driver.py").write_text(SMALL.format(tests=str(Path(__file__).parent)))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setitem(ENGINES, "small", Engine("small_driver:Small"))
    return "small"


def in_engine(engine: str, config: Config) -> tuple[dict[str, Any], list[PlanComparison]]:
    return compare_in_engine(engine, "a-model", TOKENS, config, None, 1)


NANOFLOW = {"strategy": "nanoflow", "options": {"min_tokens": 1}}


@pytest.mark.alone
def test_an_engine_is_measured_under_the_plan_in_turn_and_un_split(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMALL", "at first")  # what was not one step of the batch does not count
    report, (found,) = in_engine(small, load(NANOFLOW))
    assert report.strategy == "nanoflow" and report.steps.split == 12
    assert found.tokens == TOKENS and found.unsplit is None
    assert 0.3 < found.measured.overlap < 0.7 and found.predicted.timeline.overlap == pytest.approx(3 / 5, abs=0.15)
    step = found.engine_step
    assert step is not None and len(step.split) == 5 and len(step.unsplit) == 5
    assert min(step.split) >= 5 * 8 * 0.0005 and min(step.unsplit) >= 8 * 8 * 0.0005
    assert "x as fast" in str(step) and step.speed_up > 1
    assert "plan, measured: " in drawn(found)


def test_an_engine_that_does_not_split_gives_nothing_to_draw(small: str) -> None:
    report, found = in_engine(small, load({"strategy": "nanoflow"}))
    assert found == [] and report.steps.unsplit == {"a micro-batch would have under 2048 tokens": 12}


def test_a_batch_that_never_is_one_step_is_an_error(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMALL", "always")
    with pytest.raises(DynaflowError, match="small never ran the batch as one step"):
        in_engine(small, load(NANOFLOW))


def test_a_policy_has_no_one_plan_to_draw() -> None:
    with pytest.raises(ConfigError, match=r"'auto' chooses among several.*nanoflow x2"):
        in_engine("small", load("auto"))


def test_one_step_is_one_step(small: str) -> None:
    report = one_step(small, "a-model", TOKENS, load(NANOFLOW), None, 1)
    assert report.steps.split == 1 and not report.steps.unsplit


def test_micro_batches_in_turn_are_cut_as_the_other_strategy_cuts_them() -> None:
    strategy = built({"strategy": str(IN_TURN), "options": {"strategy": "token_weave", "options": {"min_tokens": 64}}})
    other = built({"strategy": "token_weave", "options": {"min_tokens": 64}})
    batch = Batch((600, 100, 300))
    cut, whole, again = (strategy.split(batch) for _ in range(3))
    assert cut == again == other.split(batch) and len(cut.micro_batches) == 2
    assert whole.reason == "un-split, to compare with"
    assert strategy.annotations == other.annotations and strategy.max_micro_batches == 2
    nano = NanoFlow(NanoFlowOptions(micro_batches=3))
    three = built({"strategy": str(IN_TURN), "options": {"strategy": "nanoflow", "options": {"micro_batches": 3}}})
    assert three.max_micro_batches == nano.max_micro_batches == 3
    order = [(x.operators[0], x.start) for x in three.record(program_of(CHAIN), 3).launches]
    assert order == [(name, mb) for mb in range(3) for name in ("c0", "n0", "c1", "n1")]
