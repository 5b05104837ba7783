"""The JSON object of a comparison of servers: figures with their spread, and the verdict. `report` draws nothing else.

Contract
- A figure is the median over the counted pairs, with the least and the greatest. The gain is taken within each pair;
  above 1 DynaFlow is better: DynaFlow over baseline for throughput, baseline over DynaFlow for latency.
- A figure is won or lost only if all pairs agree; else it is within the noise.
- `failures` says why the comparison shows nothing: no step was split, the baseline is not stock, or requests failed, or
  the two passes of a pair had other numbers of tokens.
- The object holds the warm-up passes too; their pair is 0.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from dynaflow_serving.bench.serving.run import BASELINE, DYNAFLOW, SIDES, ServedPass, ServingBenchmark, ServingPasses
from dynaflow_serving.bench.serving.server_metrics import STEPS, add_counts, reason_not_engaged, reason_not_stock
from dynaflow_serving.bench.serving.tool import LATENCIES, STATISTICS, PassFigures
from dynaflow_serving.core.measurement import NOISY, Spread, noise

WIN, LOSS, NOISE = "win", "loss", "within noise"


@dataclass(frozen=True)
class ReportedFigure:
    """A figure that is reported of every load; `key` is a field of `PassFigures`, or of its `latencies`."""

    key: str
    label: str
    unit: str
    more_is_better: bool

    def value_in(self, figures: PassFigures) -> float | None:
        """Return the figure's value in one pass; None where nothing was measured."""
        value = getattr(figures, self.key) if self.more_is_better else figures.latencies[self.key]
        return value or None  # 0: nothing was measured


METRICS = [
    ReportedFigure("output_tokens_per_s", "Output throughput", unit="tokens/s", more_is_better=True),
    ReportedFigure("total_tokens_per_s", "Total throughput", unit="tokens/s", more_is_better=True),
    ReportedFigure("requests_per_s", "Request throughput", unit="requests/s", more_is_better=True),
    *(
        ReportedFigure(f"{name} {statistic}", f"{name.upper()}, {statistic}", unit="ms", more_is_better=False)
        for name in LATENCIES
        for statistic in STATISTICS
    ),
]
HEADLINE = ("output_tokens_per_s", *(f"{latency} median" for latency in LATENCIES))


def record(benchmark: ServingBenchmark, served: ServingPasses, run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON object.

    Args:
        benchmark: What was run.
        served: The passes and the commands.
        run: The facts of the run: engine, model, strategy, config, machine and command.
    """
    counted = [p for p in served.passes if p.pair]
    steps = add_counts([p.steps for p in counted if p.side == DYNAFLOW])
    loads = [_load(benchmark, served, index) for index in range(len(benchmark.loads))]
    return {
        **run,
        "engine_version": benchmark.tool.version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "pairs": benchmark.pairs,
        "servers": {side: shlex.join(command) for side, command in served.server_commands.items()},
        "environment": {**benchmark.environment, **benchmark.tool.variables},
        "loads": loads,
        "verdicts": _verdicts(loads),
        "steps": asdict(steps),
        "policy": _policy(served.passes),
        "failures": failures(benchmark, served.passes),
        "notes": _notes(loads, str(run["strategy"])),
        "passes": [_pass(p) for p in served.passes],
    }


def failures(benchmark: ServingBenchmark, passes: Sequence[ServedPass]) -> list[str]:
    """Return why the comparison shows nothing; the list is empty if the figures compare what they claim to."""
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
    steps = add_counts([p.steps for p in passes if p.side == DYNAFLOW and p.pair])
    found.append(reason_not_engaged(benchmark.dynaflow["strategy"], steps))
    found.append(reason_not_stock([sample for p in passes if p.side == BASELINE for sample in p.metrics]))
    return [problem for problem in found if problem]


def _unequal_work(benchmark: ServingBenchmark, passes: Sequence[ServedPass]) -> str:
    """Say which pair's two passes had other numbers of tokens, though no request failed; "" if none had."""
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
    """Return one row per load and figure of `HEADLINE`, the greatest gain first, figures without a gain last."""
    rows = [
        {"load": load["name"], **figure}
        for load in result["loads"]
        for figure in load["figures"]
        if figure["key"] in HEADLINE
    ]
    return sorted(rows, key=lambda row: -row["gain"]["median"] if row["gain"] else float("inf"))


def _load(benchmark: ServingBenchmark, served: ServingPasses, index: int) -> dict[str, Any]:
    counted = [p for p in served.passes if p.load == index and p.pair]
    return {
        **benchmark.loads[index].facts(),
        "client": shlex.join(served.client_commands[index]),
        "figures": [figure_of(metric, counted) for metric in METRICS],
        "tokens": {
            side: {
                "input": [p.figures.input_tokens for p in counted if p.side == side],
                "output": [p.figures.output_tokens for p in counted if p.side == side],
            }
            for side in SIDES
        },
        "steps": asdict(add_counts([p.steps for p in counted if p.side == DYNAFLOW])),
    }


def figure_of(metric: ReportedFigure, counted: Sequence[ServedPass]) -> dict[str, Any]:
    """Return both sides' spreads over the counted passes of a load, and the gain's."""
    values = {side: {p.pair: metric.value_in(p.figures) for p in counted if p.side == side} for side in SIDES}
    gains = list(_gains(metric, values[BASELINE], values[DYNAFLOW]))
    gain = Spread.of_ratios(gains).as_dict() if len(gains) == len(values[BASELINE]) else None
    return {
        "key": metric.key,
        "label": metric.label,
        "unit": metric.unit,
        "more_is_better": metric.more_is_better,
        BASELINE: _spread(values[BASELINE].values()),
        DYNAFLOW: _spread(values[DYNAFLOW].values()),
        "noisy": any(noise(found) > NOISY for side in SIDES if (found := _measured(values[side].values()))),
        "gain": gain,
        "verdict": verdict(gain),
    }


def _gains(
    metric: ReportedFigure, baseline: Mapping[int, float | None], dynaflow: Mapping[int, float | None]
) -> Iterator[float]:
    for pair, stock in baseline.items():
        ours = dynaflow[pair]
        if stock is not None and ours is not None:
            yield ours / stock if metric.more_is_better else stock / ours


def _spread(values: Iterable[float | None]) -> dict[str, float] | None:
    measured = _measured(values)
    return Spread.of_values(measured).as_dict() if measured else None


def _measured(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def verdict(gain: Mapping[str, float] | None) -> str:
    """Return whether a gain with its spread is won, lost or within the noise; "" where nothing was measured."""
    if gain is None:
        return ""
    if gain["min"] > 1:
        return WIN
    return LOSS if gain["max"] < 1 else NOISE


def _verdicts(loads: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return how many of the headline's figures have each verdict."""
    found = [f["verdict"] for load in loads for f in load["figures"] if f["key"] in HEADLINE]
    return {name: found.count(name) for name in (WIN, LOSS, NOISE)}


def noise_note(load: Mapping[str, Any]) -> str:
    """Return a warning that names the figures of `HEADLINE` that differ much between passes of one side; else ""."""
    noisy = [figure["label"] for figure in load["figures"] if figure["key"] in HEADLINE and figure["noisy"]]
    if not noisy:
        return ""
    return (
        f"Noise, {load['name']}: passes of one side differ much in: {'; '.join(noisy)}. Something else uses this "
        "machine, or the passes are too short: do not trust these gains (try more --requests and --pairs)."
    )


def _notes(loads: Sequence[Mapping[str, Any]], strategy: str) -> list[str]:
    """Return remarks on single loads, which make no run fail."""
    notes = []
    for load in loads:
        split, unsplit = load["steps"]["split"], load["steps"]["unsplit"]
        if unsplit and not split:
            count = sum(unsplit.values())
            notes.append(
                f"{load['name']}: {strategy} split none of {count} steps, so this load compares un-split steps under "
                "DynaFlow with the stock engine: it shows what DynaFlow costs where it declines."
            )
        notes.append(noise_note(load))
    return [note for note in notes if note]


def _policy(passes: Sequence[ServedPass]) -> list[dict[str, Any]]:
    """Return all that DynaFlow's side measures of itself beside its steps, at the end."""
    last = [p for p in passes if p.side == DYNAFLOW][-1]
    return [asdict(sample) for sample in last.metrics if sample.name != STEPS]


def _pass(p: ServedPass) -> dict[str, Any]:
    """Return a pass as plain data, with only the number of its metrics, which must be 0 on the baseline."""
    return {**asdict(p), "metrics": len(p.metrics)}
