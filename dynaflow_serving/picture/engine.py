"""A plan in its engine: measured in real steps, and predicted from steps of the same micro-batches in turn.

Contract
- The engine is started twice and runs steps of exactly the given batch. At first it runs them under the plan, with
  every second one traced. Then every second one is un-split, and the others run the micro-batches in turn, traced.
- The first step of each kind is not counted. All figures are rank 0's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from dynaflow_serving.bench.one_step import MeasuredStep, run_steps
from dynaflow_serving.config import Config, TraceOptions
from dynaflow_serving.core.batch import Batch
from dynaflow_serving.core.parse import parse_program
from dynaflow_serving.errors import ConfigError, DynaflowError
from dynaflow_serving.picture.comparison import EngineStep, PlanComparison, compare
from dynaflow_serving.policy.selector import AutoSelector, build_selector
from dynaflow_serving.session.report import WorkerReport

RUNS = 5
IN_TURN = Path(__file__).with_name("in_turn.py")


def compare_in_engine(
    engine: str, model: str, tokens: tuple[int, ...], config: Config, dtype: str | None, tensor_parallel: int
) -> tuple[WorkerReport, list[PlanComparison]]:
    """Measure a plan in its engine.

    Returns:
        The report of the run under the plan, and a comparison per Program; none if the engine did not split the batch.

    Raises:
        ConfigError: The strategy chooses among others.
        EngineProcessError: The engine failed.
        DynaflowError: The engine never ran the batch as one step.
    """
    selector = build_selector(config)
    if isinstance(selector, AutoSelector):
        raise ConfigError(
            "a picture is of one strategy's plan, and 'auto' chooses among several: name one with --strategy "
            f"(candidates: {', '.join(selector.candidates)})"
        )
    measuring = config.model_copy(update={"check": None})
    in_turn = measuring.model_copy(
        update={"strategy": str(IN_TURN), "options": {"strategy": config.strategy, "options": config.options}}
    )
    run = (engine, model, tokens)
    where = (dtype, tensor_parallel, 2 * (1 + RUNS))
    with tempfile.TemporaryDirectory(prefix="dynaflow-explain-") as folder:
        planned, report = run_steps(*run, _traced(measuring, folder, every=2), *where)
        if not any(step.split for step in planned):
            if not planned:
                raise DynaflowError(f"{engine} never ran the batch as one step: give it fewer or larger requests")
            return report, []
        turns, _ = run_steps(*run, _traced(in_turn, folder, every=1), *where)
    step = EngineStep(_seconds(planned, split=True, engine=engine), _seconds(turns, split=False, engine=engine))
    programs = [parse_program(p.program) for p in report.programs]
    sizes = tuple(m.tokens[1] - m.tokens[0] for m in selector.split(Batch(tokens)).micro_batches)
    traced = [[s.timelines for s in steps if s.timelines][1:] for steps in (planned, turns)]
    if not all(traced):
        raise DynaflowError(f"{engine} traced no split step after the first: give it fewer or larger requests")
    found = []
    for i, program in enumerate(programs):
        plan_runs, turn_runs = ([timelines[i] for timelines in runs] for runs in traced)
        found.append(compare(program, sizes, plan_runs, turn_runs, engine_step=step))
    return report, found


def _traced(config: Config, folder: str, every: int) -> Config:
    return config.model_copy(update={"trace": TraceOptions(folder=folder, every=every, limit=1000)})


def _seconds(steps: Sequence[MeasuredStep], split: bool, engine: str) -> list[float]:
    """Return the seconds of the steps of that kind that were not traced.

    Raises:
        DynaflowError: There are none after the first.
    """
    found = [s.seconds for s in steps if s.split is split and not s.timelines][1:]
    if not found:
        raise DynaflowError(f"{engine} ran the batch {'split' if split else 'un-split'} as one step once or never")
    return found
