"""The figures and the verdict of a comparison, and their JSON file.

Contract
- The throughput is the median over the pairs. The ratio is taken within each pair; its spread is over the pairs.
- `failures` says why a comparison shows nothing: no step was split, tokens differ, or ranks disagree.
- The JSON file is complete or absent; its folder is made.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dynaflow_serving.bench.compare import BASELINE, DYNAFLOW, OfflineResult
from dynaflow_serving.core.measurement import Spread
from dynaflow_serving.files import write_text

NOISY = 1.3  # greatest over least seconds of passes that do equal work
SMALL_HINT = "Lower the strategy's min_tokens (-o min_tokens=1), or send more requests at a time (--requests)."


def throughput(comparison: OfflineResult, name: str) -> dict[str, float]:
    """Return the requests and tokens per second of the engine of that name."""
    lengths = comparison.traffic.lengths()
    prompt, output = (sum(column) for column in zip(*lengths))
    seconds = statistics.median(p.seconds[name] for p in comparison.pairs)
    return {
        "requests_per_s": len(lengths) / seconds,
        "output_tokens_per_s": output / seconds,
        "total_tokens_per_s": (prompt + output) / seconds,
    }


def ratios(comparison: OfflineResult) -> dict[str, float]:
    """Return the spread of DynaFlow's throughput over the baseline's."""
    return Spread.of_ratios(p.ratio for p in comparison.pairs).as_dict()


def failures(comparison: OfflineResult) -> list[str]:
    """Return why the comparison shows nothing; the list is empty if the figures compare what they claim to."""
    engagement, found = comparison.engagement, []
    declined = engagement.strategy == "auto" and sum(engagement.unsplit.values()) > 0  # a decision, which was counted
    if not engagement.split and not declined:
        counts = [f"{count} because: {why}" for why, count in engagement.unsplit.items()]
        reasons = "; ".join(counts) or "none was counted"
        hint = f" {SMALL_HINT}" if any(is_small(why) for why in engagement.unsplit) else ""
        found.append(f"DynaFlow split no step, so the two engines did the same work. Un-split steps: {reasons}.{hint}")
    if comparison.mismatches:
        first = comparison.mismatches[0]
        where = f"pair {first.pass_number}" if first.pass_number else "the warm-up"
        found.append(
            f"The tokens differ: {first.requests} of {comparison.traffic.requests} requests in {where}, the first at "
            f"token {first.position} of request {first.request}. If that is rounding (bfloat16 ties flip when kernels "
            "see other shapes), --dtype float32 makes the tokens equal; otherwise it is a bug: please report it."
        )
    if not engagement.ranks_agree:
        found.append("The ranks report different steps or plans: they must all run one plan. Please report it.")
    return found


def noise(comparison: OfflineResult) -> str:
    """Return a warning if one engine's passes, which do equal work, differ much; else ""."""
    for name in (BASELINE, DYNAFLOW):
        seconds = Spread.of_values(p.seconds[name] for p in comparison.pairs)
        if seconds.exceeds(NOISY):
            return (
                f"Noise: equal passes of {name} took {seconds.min:.2f} to {seconds.max:.2f} s. Something else uses "
                "this machine, or the passes are too short: do not trust this ratio (try more --requests and --pairs)."
            )
    return ""


def is_small(reason: str) -> bool:
    """Whether a reason for not splitting is about too few tokens or requests."""
    return "under" in reason or reason in ("one request", "one token")


def record(comparison: OfflineResult, run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON object.

    Args:
        comparison: What was found.
        run: The facts of the run: engine, model, strategy, config and command.
    """
    import torch

    engagement = comparison.engagement
    return {
        **run,
        "engine_version": comparison.engine_version,
        "device": comparison.device,
        "torch_version": torch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "mode": engagement.mode,
        "baseline": throughput(comparison, BASELINE),
        "dynaflow": throughput(comparison, DYNAFLOW),
        "ratio": ratios(comparison),
        "tokens_equal": not comparison.mismatches,
        "mismatches": [asdict(m) for m in comparison.mismatches],
        "steps": {"split": engagement.split, "unsplit": engagement.unsplit},
        "plan_hash": engagement.plan_hash,
        "ranks_agree": engagement.ranks_agree,
        "failures": failures(comparison),
        "noise": noise(comparison),
        "pairs": [{"order": list(p.order), "seconds": p.seconds, "ratio": p.ratio} for p in comparison.pairs],
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write the object to the file, whose folder is made."""
    write_text(path, json.dumps(content, indent=2) + "\n")
