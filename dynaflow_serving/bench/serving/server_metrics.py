"""The two servers' own metrics at /metrics, and whether the comparison shows anything.

Contract
- DynaFlow's side counts its steps in `dynaflow_steps_total{strategy, reason}`. The strategy "none" is an un-split step,
  and `reason` says why. A pass did the difference between before and after.
- The baseline has no metric of DynaFlow, before and after each pass: so it is the stock engine.
- A fixed strategy that split no step in any counted pass compared nothing. The strategy "auto" may decline every
  step, which its counted steps then show.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PREFIX = "dynaflow_"
STEPS = "dynaflow_steps_total"
UNSPLIT = "none"
AUTO = "auto"


@dataclass(frozen=True)
class MetricSample:
    """One line of Prometheus text."""

    name: str
    labels: Mapping[str, str]
    value: float


def read_metrics(text: str) -> list[MetricSample]:
    """Return DynaFlow's samples of a Prometheus text, but for `_created` times and the buckets of histograms."""
    from prometheus_client.parser import text_string_to_metric_families

    return [
        MetricSample(sample.name, dict(sample.labels), sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith(PREFIX) and not sample.name.endswith(("_created", "_bucket"))
    ]


@dataclass(frozen=True)
class ServedSteps:
    """The steps of a span of time: the split ones by strategy, the un-split ones by reason."""

    split: dict[str, int]
    unsplit: dict[str, int]

    @property
    def total_split(self) -> int:
        return sum(self.split.values())

    @property
    def total(self) -> int:
        return self.total_split + sum(self.unsplit.values())


def steps_between(before: Sequence[MetricSample], after: Sequence[MetricSample]) -> ServedSteps:
    """Return the steps that were counted between two readings."""
    counts = _counts(after)
    counts.subtract(_counts(before))
    split: Counter[str] = Counter()
    unsplit: Counter[str] = Counter()
    for (strategy, reason), count in counts.most_common():
        if count:
            if strategy == UNSPLIT:
                unsplit[reason] += count
            else:
                split[strategy] += count
    return ServedSteps(dict(split), dict(unsplit))


def add_counts(parts: Sequence[ServedSteps]) -> ServedSteps:
    """Return the sum of several spans' steps."""
    split: Counter[str] = Counter()
    unsplit: Counter[str] = Counter()
    for part in parts:
        split.update(part.split)
        unsplit.update(part.unsplit)
    return ServedSteps(dict(split.most_common()), dict(unsplit.most_common()))


def reason_not_engaged(strategy: str, steps: ServedSteps) -> str:
    """Return why DynaFlow's figures show nothing, from the steps of all counted passes; "" if they do."""
    if not steps.total:
        return (
            f"DynaFlow's server counted no step: it has no {STEPS} at /metrics that grew. Either DynaFlow is not "
            "active there (look for 'DynaFlow' in its log), or its metrics are off."
        )
    if steps.total_split or strategy == AUTO:
        return ""
    reasons = "; ".join(f"{count} because: {reason}" for reason, count in steps.unsplit.items())
    return f"DynaFlow split no step, so the two servers did the same work. Un-split steps: {reasons}."


def reason_not_stock(found: Sequence[MetricSample]) -> str:
    """Return why the baseline is not the stock engine, from its metrics; "" if it is."""
    if not found:
        return ""
    names = ", ".join(sorted({sample.name for sample in found}))
    return (
        f"The baseline has metrics of DynaFlow ({names}), so it is not the stock engine: is DynaFlow asked for in the "
        "model's config or in the environment?"
    )


def _counts(found: Sequence[MetricSample]) -> Counter[tuple[str, str]]:
    counts: Counter[tuple[str, str]] = Counter()
    for sample in found:
        if sample.name == STEPS:
            counts[sample.labels.get("strategy", ""), sample.labels.get("reason", "")] += round(sample.value)
    return counts
