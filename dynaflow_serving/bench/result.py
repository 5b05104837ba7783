"""The figures and the verdict of a comparison, and their JSON file: one shape for all systems.

Contract
- A row has the ratio of each round, the stock system's seconds over the side's, as a spread; the stock system's is 1.
- The limit of a part is the median of compute alone and of the network alone. No schedule is faster than the longer of
  the two; the efficiency of a row is that over its median seconds.
- `failures` says why rows show nothing: outputs differ, nothing was split, a pass failed, or ranks disagree. A policy
  that is slower than the stock system is a failure, too.
- `notes` says why rows may mislead: noise, something else that worked, or retransmissions that differ.
- The JSON file is complete or absent; its folder is made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from dynaflow_serving.bench.link import place
from dynaflow_serving.bench.measure import PartResult
from dynaflow_serving.bench.runner.base import COMPUTE, NETWORK
from dynaflow_serving.core.measurement import NOISY, Spread, noise
from dynaflow_serving.files import write_text

BUSY = 0.2  # cores that something else keeps busy: from here on a row is flagged; idle servers need up to 0.15
SENT_AGAIN = 200  # segments per pass, 0.3 MB: rows that differ by more are flagged
ENOUGH_ROUNDS = 3  # from here on a policy that loses all of them is no accident
NEVER_SLOWER = 0.98  # below this ratio the policy has chosen wrongly
SMALL_HINT = "Lower the strategy's min_tokens (-o min_tokens=1), or send more requests at a time (--requests)."


def record(parts: Sequence[PartResult], run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON object.

    Args:
        parts: What was measured.
        run: The facts of the run: system, release, model, settings, machine and command.
    """
    found = [_part(part) for part in parts]
    return {
        **run,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "parts": found,
        "failures": [problem for part in parts for problem in failures(part)],
        "notes": [note for part in parts for note in notes(part)],
    }


def _part(part: PartResult) -> dict[str, Any]:
    limit = {what: median(seconds) for what, seconds in part.alone.items()} or None
    stock = part.sides[0]
    rows = []
    for passes in part.sides:
        seconds = Spread.of_values(passes.seconds)
        row: dict[str, Any] = {
            "strategy": passes.side.strategy,
            "micro_batches": passes.side.micro_batches,
            "options": passes.side.options,
            "ratio": Spread.of_ratios(a / b for a, b in zip(stock.seconds, passes.seconds, strict=True)).as_dict(),
            "equal": not passes.differences,
            "split_steps": passes.steps.split,
            "unsplit_steps": passes.steps.unsplit,
            "seconds": seconds.as_dict(),
            "efficiency": max(limit[COMPUTE], limit[NETWORK]) / seconds.median if limit else None,
            "retransmissions": passes.retransmissions,
            "busy_cores": Spread.of_values(passes.load).as_dict(),
            "mode": passes.steps.mode,
            "plan_hash": passes.steps.plan_hash,
            "passes": passes.seconds,
        }
        rows.append(row | passes.details)
    return {"link_mbit": part.link_mbit, "limit": limit, "rows": rows}


def where(part: PartResult) -> str:
    """Return the part in words for the begin of a sentence; "" where there is no limit."""
    return "" if part.link_mbit == 0 else f"{place(part.link_mbit)}, "


def failures(part: PartResult) -> list[str]:
    """Return why rows of a part show nothing; the list is empty if the figures compare what they claim to."""
    found = []
    for passes in part.sides:
        name, steps = f"{where(part)}{passes.side.name}", passes.steps
        if passes.failed:
            found.append(f"{name}: {passes.failed[0]}")
        if passes.differences:
            found.append(
                f"{name}: the outputs differ from the stock system's: {passes.differences[0]}. If that is rounding "
                "(bfloat16 ties flip when kernels see other shapes), --dtype float32 makes them equal; otherwise it is "
                "a bug: please report it."
            )
        never_splits = passes.side.micro_batches == 1  # stock, or a strategy that orders un-split steps
        if not (never_splits or steps.split or (passes.side.decides and steps.unsplit)):
            reasons = "; ".join(f"{count} because: {why}" for why, count in steps.unsplit.items()) or "none was counted"
            hint = f" {SMALL_HINT}" if any(is_small(why) for why in steps.unsplit) else ""
            found.append(f"{name}: no step was split, so it did the stock system's work. Un-split: {reasons}.{hint}")
        ratios = [a / b for a, b in zip(part.sides[0].seconds, passes.seconds)]
        if passes.side.decides and len(ratios) >= ENOUGH_ROUNDS and max(ratios) < 1 and median(ratios) < NEVER_SLOWER:
            found.append(f"{name} is slower than the stock system in every round ({median(ratios):.2f}x).")
        if steps.problem:
            found.append(f"{name}: {steps.problem}")
    return found


def notes(part: PartResult) -> list[str]:
    """Return why rows of a part may mislead."""
    found, stock = [], part.sides[0]
    rounds = len(stock.seconds)
    for passes in part.sides:
        name = f"{where(part)}{passes.side.name}"
        if noise(passes.seconds) > NOISY:
            found.append(
                f"{name}: equal passes took {min(passes.seconds):.2f} to {max(passes.seconds):.2f} s. Something else "
                "uses this machine, or the passes are too short: do not trust this ratio (try more --requests and "
                "--pairs)."
            )
        if median(passes.load) > BUSY:
            found.append(f"{name}: something else kept {median(passes.load):.1f} cores busy while all sides rested.")
        if abs(passes.retransmissions - stock.retransmissions) > SENT_AGAIN * rounds:
            found.append(
                f"{name}: {passes.retransmissions} TCP segments were sent again, {stock.retransmissions} under the "
                "stock system: the link did not treat both alike."
            )
    return found


def is_small(reason: str) -> bool:
    """Whether a reason for not splitting is about too few tokens or requests."""
    return "under" in reason or reason in ("one request", "one token")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write the object to the file, whose folder is made."""
    write_text(path, json.dumps(content, indent=2) + "\n")
