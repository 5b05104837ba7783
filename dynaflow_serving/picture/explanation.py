"""The explanation of a model and a batch under a strategy: Programs, split, Plans and, where asked for, their times.

Contract
- An embedded example is planned here. A model is run by its engine for one step of exactly the given batch, and the
  explanation is then the engine's own report.
- A batch that is not split is explained too: `split.reason` says why, and there is no comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dynaflow_serving.bench.environment import device_name
from dynaflow_serving.bench.one_step import one_step
from dynaflow_serving.capture.examples import HIDDEN, example_capture
from dynaflow_serving.config import Config
from dynaflow_serving.core.batch import Batch, Split
from dynaflow_serving.core.parse import parse_plan, parse_program
from dynaflow_serving.core.plan import ActionKind, Plan
from dynaflow_serving.core.program import Program, Resource
from dynaflow_serving.executor import get_executor
from dynaflow_serving.picture import engine as in_engine
from dynaflow_serving.picture import measure
from dynaflow_serving.picture.comparison import PlanComparison
from dynaflow_serving.picture.page import Caption
from dynaflow_serving.policy.selector import build_selector
from dynaflow_serving.session.plan_cache import PlanCache
from dynaflow_serving.strategy.selector import Selector
from dynaflow_serving.strategy.splitting import whole

DEFAULT_CONFIG = Path(__file__).with_name("default.yaml")


@dataclass(frozen=True)
class Explanation:
    """Everything that there is to print and to draw.

    Attributes:
        model: The model's name in words.
        strategy: The strategy's name and options, in words.
        programs: The Programs of the model.
        tokens: The tokens of each request of the batch.
        split: How the strategy cuts the batch.
        plans: The Plans that run the batch; none where the model runs un-split its own way.
        comparisons: The measured and predicted times, one per Program; none unless they were asked for.
        where: What ran the plans, in words.
        runs: How often each plan ran.
        notes: What else to know about the times.
        missing: What the strategy looks for and the model lacks, as sentences.
    """

    model: str
    strategy: str
    programs: Sequence[Program]
    tokens: tuple[int, ...]
    split: Split
    plans: Sequence[Plan]
    comparisons: Sequence[PlanComparison] = ()
    where: str = ""
    runs: int = 0
    notes: tuple[str, ...] = field(default=())
    missing: tuple[str, ...] = ()

    @property
    def caption(self) -> Caption:
        """The title and the notes of a picture of the comparisons."""
        import torch

        first = self.comparisons[0]
        parts = f"{first.tokens[0]} tokens, not split"
        if len(first.tokens) > 1:
            parts = f"{len(first.tokens)} micro-batches of {', '.join(map(str, first.tokens))} tokens"
        version = f"torch {torch.__version__}"
        notes = [f"Measured on {device_name()}; {self.where}; {version}; the median one of {self.runs} runs"]
        if first.engine_step is not None:
            notes.append(f"The full step in the engine, not traced: {first.engine_step}")
        notes += self.notes
        if any(action.kind is ActionKind.REPLACE for action in first.measured.plan.actions):
            notes.append("A replacement kernel is predicted as the sum of the operators that it replaces")
        return Caption(f"{self.model}: {first.measured.plan.strategy}, {parts}", tuple(notes))


def explain_example(
    name: str, tokens: tuple[int, ...], config: Config, *, measured: bool, backward: bool = False
) -> Explanation:
    """Explain an embedded example.

    Args:
        name: The name of the example.
        tokens: The tokens of each request.
        config: The config of the strategy and, where times are measured, of the executor.
        measured: Whether the plan is run for its times.
        backward: Whether the plan's backward pass is explained, too.
    """
    capture = replace(example_capture(name, build_selector(config).annotations), mirrored=backward)
    executor = get_executor(config.executor, options=config) if measured else get_executor("sequential")
    plan_cache = PlanCache(capture, build_selector(config), executor)
    split = plan_cache.decide(Batch(tokens))
    planned = len(split.micro_batches) > 1 or plan_cache.selector.schedules_unsplit
    plans = [plan_cache.prepare(split.signature).plan] if planned else []
    passes = plan_cache.backward.values()
    comparisons = []
    if planned and measured:
        inputs = measure.example_inputs(capture.program, len(capture.constants), sum(tokens), HIDDEN)
        comparisons = [measure.measured_and_predicted(plan_cache, split, inputs)]
    executor.close()
    network = any(o.resource is Resource.NETWORK for o in capture.program.operators)
    return Explanation(
        model=f"example {name}",
        strategy=_in_words(plan_cache.selector),
        programs=[capture.program, *(program for program, _ in passes)],
        tokens=tokens,
        split=split,
        plans=[*plans, *(plan for _, plan in passes)],
        comparisons=comparisons,
        where=f"executor {executor.name}, one thread a stream",
        runs=measure.RUNS,
        notes=("Network operators are stand-ins on this machine: they move nothing",) if network else (),
        missing=plan_cache.selector.missing_tags([capture.program]),
    )


def explain_model(
    model: str,
    tokens: tuple[int, ...],
    config: Config,
    engine: str,
    dtype: str | None,
    tensor_parallel: int,
    *,
    measured: bool,
) -> Explanation:
    """Explain a model directory by a step of its engine.

    Args:
        model: The path of the model directory.
        tokens: The tokens of each request.
        config: The config that the engine runs under.
        engine: The engine's name.
        dtype: The dtype of the model; None: the default of this machine.
        tensor_parallel: The number of ranks.
        measured: Whether the engine runs the batch repeatedly, for times.

    Raises:
        ConfigError: Times are asked for of a strategy that chooses among others.
        EngineProcessError: The engine failed.
        DynaflowError: The engine never ran the batch as one step.
    """
    comparisons: list[PlanComparison] = []
    if measured:
        report, comparisons = in_engine.compare_in_engine(engine, model, tokens, config, dtype, tensor_parallel)
    else:
        report = one_step(engine, model, tokens, config, dtype, tensor_parallel)
    programs = [parse_program(program.program) for program in report.programs]
    plans: list[Plan] = []
    # The engine may order its requests anew, so the strategy is asked for the cut only where the engine split.
    selector = build_selector(config)
    if report.steps.split:
        split = selector.split(Batch(tokens))
        plans = [parse_plan(text) for program in report.programs for text in program.plans]
    else:
        split = whole(Batch(tokens), "; ".join(report.steps.unsplit) or "the engine counted no step")
    ranks = f", rank 0 of {tensor_parallel}" if tensor_parallel > 1 else ""
    return Explanation(
        model=Path(model).resolve().name,
        strategy=_in_words(selector),
        programs=programs,
        tokens=tokens,
        split=split,
        plans=[plan for plan in plans if plan.micro_batches > 1],
        comparisons=comparisons,
        where=f"{engine}{ranks}, mode {report.mode}",
        runs=in_engine.RUNS,
        missing=selector.missing_tags(programs),
    )


def _in_words(selector: Selector) -> str:
    options = ", ".join(f"{name}={value}" for name, value in selector.options.model_dump().items())
    return f"{selector.name} ({options or 'no options'})"
