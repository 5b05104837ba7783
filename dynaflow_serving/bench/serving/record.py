"""The JSON object of a run of servers: figures with their spread, verdict, proof. `report` draws nothing else.

Contract
- A figure is the median over the counted pairs, with least and greatest. The gain is taken within each pair; above 1
  DynaFlow is better: DynaFlow over baseline for throughput, baseline over DynaFlow for latency.
- A figure is won or lost only if all pairs agree; else it is within the noise.
- `failures` says why the run proves nothing: no step was split, the baseline is not stock, requests failed, or the two
  passes of a pair had other numbers of tokens.
- Warm-up passes are in it, marked by pair 0.
"""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from dynaflow_serving.bench.compare import BASELINE, DYNAFLOW
from dynaflow_serving.bench.result import NOISY
from dynaflow_serving.bench.serving.proof import STEPS, add, not_engaged, not_stock
from dynaflow_serving.bench.serving.run import SIDES, Pass, ServingBenchmark, ServingPasses
from dynaflow_serving.bench.serving.tool import LATENCIES, STATISTICS, Figures

WIN, LOSS, NOISE = "win", "loss", "within noise"


@dataclass(frozen=True)
class Metric:
    """`key` is a field of `Figures`, or of its `latencies`."""

    key: str
    label: str
    unit: str
    more_is_better: bool

    def of(self, figures: Figures) -> float | None:
        value = getattr(figures, self.key) if self.more_is_better else figures.latencies[self.key]
        return value or None  # 0: nothing was measured


METRICS = [
    Metric("output_tokens_per_s", "Output throughput", "tokens/s", True),
    Metric("total_tokens_per_s", "Total throughput", "tokens/s", True),
    Metric("requests_per_s", "Request throughput", "requests/s", True),
    *(Metric(f"{name} {how}", f"{name.upper()}, {how}", "ms", False) for name in LATENCIES for how in STATISTICS),
]
HEADLINE = ("output_tokens_per_s", *(f"{latency} median" for latency in LATENCIES))


def record(benchmark: ServingBenchmark, runs: ServingPasses, run: Mapping[str, Any]) -> dict[str, Any]:
    """`run` is engine, model, strategy, config, machine, command; the rest comes from the passes."""
    counted = [p for p in runs.passes if p.pair]
    steps = add([p.steps for p in counted if p.side == DYNAFLOW])
    loads = [_load(benchmark, runs, index) for index in range(len(benchmark.loads))]
    return {
        **run,
        "engine_version": benchmark.tool.version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "pairs": benchmark.pairs,
        "servers": {side: shlex.join(command) for side, command in runs.server_commands.items()},
        "environment": {**benchmark.environment, **benchmark.tool.variables},
        "loads": loads,
        "verdicts": _verdicts(loads),
        "steps": asdict(steps),
        "policy": _policy(runs.passes),
        "failures": failures(benchmark, runs.passes),
        "notes": _notes(loads, str(run["strategy"])),
        "passes": [_pass(p) for p in runs.passes],
    }


def failures(benchmark: ServingBenchmark, passes: Sequence[Pass]) -> list[str]:
    """Empty if the figures compare what they claim to compare."""
    found = []
    for side in SIDES:
        for index, load in enumerate(benchmark.loads):
            mine = [p for p in passes if p.side == side and p.load == index]
            if failed := sum(p.figures.failed for p in mine):
                errors = [error for p in mine for error in p.figures.errors]
                why = f" The first error: {errors[0]}" if errors else ""
                total = len(mine) * load.requests
                found.append(f"{failed} of {total} requests failed against {side} ({load.name}).{why}")
    found.append(_unequal_work(benchmark, passes))
    steps = add([p.steps for p in passes if p.side == DYNAFLOW and p.pair])
    found.append(not_engaged(benchmark.dynaflow["strategy"], steps))
    found.append(not_stock([sample for p in passes if p.side == BASELINE for sample in p.metrics]))
    return [problem for problem in found if problem]


def _unequal_work(benchmark: ServingBenchmark, passes: Sequence[Pass]) -> str:
    """Whether the two passes of a pair had other numbers of tokens, though no request failed."""
    tokens: dict[tuple[int, int], set[tuple[int, int]]] = {}
    for p in passes:
        if not p.figures.failed:
            tokens.setdefault((p.load, p.pair), set()).add((p.figures.input_tokens, p.figures.output_tokens))
    for (index, pair), found in tokens.items():
        if len(found) > 1:
            counts = " and ".join(f"{prompt} in, {output} out" for prompt, output in sorted(found))
            return f"The two servers did unequal work ({benchmark.loads[index].name}, pair {pair}): {counts} tokens."
    return ""


def headline(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per load and figure of `HEADLINE`, the greatest gain first; figures without a gain last."""
    rows = [
        {"load": load["name"], **figure}
        for load in result["loads"]
        for figure in load["figures"]
        if figure["key"] in HEADLINE
    ]
    return sorted(rows, key=lambda row: -row["gain"]["median"] if row["gain"] else float("inf"))


def _load(benchmark: ServingBenchmark, runs: ServingPasses, index: int) -> dict[str, Any]:
    counted = [p for p in runs.passes if p.load == index and p.pair]
    return {
        **benchmark.loads[index].facts(),
        "client": shlex.join(runs.client_commands[index]),
        "figures": [figure_of(metric, counted) for metric in METRICS],
        "tokens": {
            side: {
                "input": [p.figures.input_tokens for p in counted if p.side == side],
                "output": [p.figures.output_tokens for p in counted if p.side == side],
            }
            for side in SIDES
        },
        "steps": asdict(add([p.steps for p in counted if p.side == DYNAFLOW])),
    }


def figure_of(metric: Metric, counted: Sequence[Pass]) -> dict[str, Any]:
    """Both sides' spreads over the counted passes of a load, and the gain's."""
    values = {side: {p.pair: metric.of(p.figures) for p in counted if p.side == side} for side in SIDES}
    gains = list(_gains(metric, values[BASELINE], values[DYNAFLOW]))
    gain = _ratio_spread(gains) if len(gains) == len(values[BASELINE]) else None
    return {
        "key": metric.key,
        "label": metric.label,
        "unit": metric.unit,
        "more_is_better": metric.more_is_better,
        BASELINE: _spread([v for v in values[BASELINE].values() if v is not None]),
        DYNAFLOW: _spread([v for v in values[DYNAFLOW].values() if v is not None]),
        "gain": gain,
        "verdict": verdict(gain),
    }


def _gains(
    metric: Metric, baseline: Mapping[int, float | None], dynaflow: Mapping[int, float | None]
) -> Iterator[float]:
    for pair, stock in baseline.items():
        ours = dynaflow[pair]
        if stock is not None and ours is not None:
            yield ours / stock if metric.more_is_better else stock / ours


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _ratio_spread(gains: Sequence[float]) -> dict[str, float]:
    """The median of logarithms: between two gains it lies where neither side is favoured (of 0.5 and 2 at 1)."""
    return {"median": math.exp(statistics.median(map(math.log, gains))), "min": min(gains), "max": max(gains)}


def verdict(gain: Mapping[str, float] | None) -> str:
    """Of a gain with its spread; "" where nothing was measured."""
    if gain is None:
        return ""
    if gain["min"] > 1:
        return WIN
    return LOSS if gain["max"] < 1 else NOISE


def _verdicts(loads: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Of the headline's figures."""
    found = [f["verdict"] for load in loads for f in load["figures"] if f["key"] in HEADLINE]
    return {name: found.count(name) for name in (WIN, LOSS, NOISE)}


def noise(load: Mapping[str, Any]) -> str:
    """A warning that names the figures of `HEADLINE` that differ much between passes of one side; else ""."""
    noisy = [
        figure["label"]
        for figure in load["figures"]
        if figure["key"] in HEADLINE
        and any(found["max"] > NOISY * found["min"] for found in (figure[side] for side in SIDES) if found)
    ]
    if not noisy:
        return ""
    return (
        f"Noise, {load['name']}: passes of one side differ by more than {NOISY} times in: {'; '.join(noisy)}. "
        "Something else uses this machine, or the passes are too short: do not trust these gains (try more --requests "
        "and --pairs)."
    )


def _notes(loads: Sequence[Mapping[str, Any]], strategy: str) -> list[str]:
    """What a reader must know of single loads; it makes no run fail."""
    notes = []
    for load in loads:
        split, unsplit = load["steps"]["split"], load["steps"]["unsplit"]
        if unsplit and not split:
            count = sum(unsplit.values())
            notes.append(
                f"{load['name']}: {strategy} split none of {count} steps, so this load compares un-split steps under "
                "DynaFlow with the stock engine: it shows what DynaFlow costs where it declines."
            )
        notes.append(noise(load))
    return [note for note in notes if note]


def _policy(passes: Sequence[Pass]) -> list[dict[str, Any]]:
    """All that DynaFlow's side measures of itself beside its steps, at the end."""
    last = [p for p in passes if p.side == DYNAFLOW][-1]
    return [asdict(sample) for sample in last.metrics if sample.name != STEPS]


def _pass(p: Pass) -> dict[str, Any]:
    """Of the metrics, their number: on the baseline it must be 0."""
    return {**asdict(p), "metrics": len(p.metrics)}
