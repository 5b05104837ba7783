"""`dynaflow explain`: what a strategy makes of a model and a batch.

Contract
- TARGET is an embedded example (no engine needed) or a model, which an engine runs for one step with exactly the
  given batch; what is printed is then the engine's own report.
- A batch that is not split is an answer, not an error: the reason is printed, with what to change.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dynaflow_serving.cli.options import MicroBatchesOption, OptionOption, StrategyOption
from dynaflow_serving.errors import ConfigError


def explain(
    target: Annotated[str, typer.Argument(help="Embedded example (llama, moe, dit), or model directory.")],
    batch: Annotated[
        str, typer.Option("--batch", "-b", metavar="N,N,...", help="Tokens of each request of the step.")
    ] = "64,64,8,1",
    strategy: StrategyOption = None,
    micro_batches: MicroBatchesOption = None,
    option: OptionOption = None,
    engine: Annotated[str, typer.Option(help="Engine that runs a model directory.")] = "vllm",
    dtype: Annotated[str | None, typer.Option(help="Of a model directory; float32 on CPU, auto on GPU.")] = None,
    tensor_parallel: Annotated[int, typer.Option("--tensor-parallel", "-tp", min=1, help="Ranks.")] = 1,
) -> None:
    """Print the Program, the split of a batch, and the Plan as text and as a grid of steps and streams."""
    from dynaflow_serving.bench.defaults import DEFAULT_CONFIG
    from dynaflow_serving.cli.options import configure
    from dynaflow_serving.examples import EXAMPLES

    tokens = parse_batch(batch)
    config = configure(strategy or DEFAULT_CONFIG, micro_batches, option)
    if target in EXAMPLES:
        if tensor_parallel > 1 or dtype:
            raise ConfigError("--tensor-parallel and --dtype are for model directories, not for embedded examples")
        _explain_example(target, tokens, config)
    elif Path(target).is_dir():
        _explain_model(target, tokens, config, engine, dtype, tensor_parallel)
    else:
        raise ConfigError(
            f"target {target!r} is neither an embedded example ({', '.join(EXAMPLES)}) nor a model directory"
        )


def parse_batch(text: str) -> tuple[int, ...]:
    try:
        tokens = tuple(int(part) for part in text.split(","))
    except ValueError:
        tokens = ()
    if not tokens or min(tokens) < 1:
        raise ConfigError(f"--batch {text!r} is not a list of token counts such as 64,64,8,1 (each at least 1)")
    return tokens


def _explain_example(name: str, tokens: tuple[int, ...], config: Any) -> None:
    from dynaflow_serving.examples import example_capture
    from dynaflow_serving.executor import get_executor
    from dynaflow_serving.ir import Batch
    from dynaflow_serving.runtime import Runtime

    capture = example_capture(name)
    runtime = Runtime(capture, config.build(), get_executor("sequential"))
    split = runtime.decide(Batch(tokens))
    print(capture.program.to_text())
    _print_split(tokens, split)
    if len(split.micro_batches) > 1 or runtime.strategy.schedules_unsplit:
        _print_plan(runtime.prepare(split.signature).plan)


def _explain_model(
    model: str, tokens: tuple[int, ...], config: Any, engine: str, dtype: str | None, tensor_parallel: int
) -> None:
    from dynaflow_serving.bench.one_step import one_step
    from dynaflow_serving.ir import Batch, Plan
    from dynaflow_serving.splitting import whole

    report = one_step(engine, model, tokens, config, dtype, tensor_parallel)
    for program in report["programs"]:
        print(program["program"])
    # The engine may order its requests anew, so the cut is asked of the strategy only where the engine split.
    if not report["steps"]["split"]:
        reason = "; ".join(report["steps"]["unsplit"]) or "the engine counted no step"
        _print_split(tokens, whole(Batch(tokens), reason))
        return
    _print_split(tokens, config.build().split(Batch(tokens)))
    for program in report["programs"]:
        for text in program["plans"]:
            plan = Plan.from_text(text)
            if plan.micro_batches > 1:
                _print_plan(plan)


def _print_split(tokens: tuple[int, ...], split: Any) -> None:
    from dynaflow_serving.bench.result import is_small

    print(f"split of {len(tokens)} requests, {sum(tokens)} tokens")
    if len(split.micro_batches) == 1:
        print(f"  not split: {split.reason}")
        if is_small(split.reason):
            print("  to split it: lower the strategy's threshold (-o min_tokens=1), or try a larger --batch")
        return
    for i, part in enumerate(split.micro_batches):
        (r0, r1), (t0, t1) = part.requests, part.tokens
        print(f"  micro-batch {i}: requests {r0}..{r1 - 1}, tokens {t0}..{t1 - 1} ({t1 - t0})")
    for earlier, later in split.depends:
        print(f"  micro-batch {later} reads the KV cache that {earlier} writes")
    print()


def _print_plan(plan: Any) -> None:
    from dynaflow_serving.grid import grid

    print(plan.to_text())
    print(f"plan {plan.digest}, step by stream")
    print(grid(plan))
