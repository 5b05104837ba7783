"""Verdicts of all operators, one letter a sample: counts, tables, and what an earlier run could split.

Contract
- A file has, per operator and mode, a string with one letter per sample in a fixed order, and one reason per letter.
- Two files of the same number of samples per operator can be compared sample by sample.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast, get_args

from rich.table import Table

from benchmarks.independence.judge import Outcome, Verdict

LETTERS: dict[Verdict, str] = {
    "split": "S", "refused": "r", "wrong": "W", "crash": "C", "stock fails": "-", "timeout": "T",
}  # fmt: skip
VERDICTS = {letter: verdict for verdict, letter in LETTERS.items()}
NO_GRADIENT = "."
MOST_REASON = 240

assert set(LETTERS) == set(get_args(Verdict))


@dataclass
class Results:
    """Verdicts of operators (or of other groups of cases) in several modes.

    Attributes:
        letters: name -> mode -> one letter per sample.
        reasons: name -> mode -> verdict -> the reason of the first sample with that verdict.
    """

    letters: dict[str, dict[str, str]] = field(default_factory=dict)
    reasons: dict[str, dict[str, dict[str, str]]] = field(default_factory=dict)

    def add(self, name: str, mode: str, outcome: Outcome | None) -> None:
        """Add the next sample of `name`; None where it has no gradient."""
        modes = self.letters.setdefault(name, {})
        modes[mode] = modes.get(mode, "") + (LETTERS[outcome.verdict] if outcome else NO_GRADIENT)
        if outcome and outcome.reason:
            reasons = self.reasons.setdefault(name, {}).setdefault(mode, {})
            reasons.setdefault(outcome.verdict, outcome.reason[:MOST_REASON])

    def counts(self) -> dict[str, Counter[Verdict]]:
        """Return the number of samples by verdict, per mode."""
        found: dict[str, Counter[Verdict]] = {}
        for modes in self.letters.values():
            for mode, letters in modes.items():
                found.setdefault(mode, Counter()).update(VERDICTS[x] for x in letters if x != NO_GRADIENT)
        return found

    def operators(self) -> dict[str, Counter[Verdict]]:
        """Return the number of operators that have at least one sample of a verdict, per mode."""
        found: dict[str, Counter[Verdict]] = {}
        for modes in self.letters.values():
            for mode, letters in modes.items():
                found.setdefault(mode, Counter()).update({VERDICTS[x] for x in letters if x != NO_GRADIENT})
        return found

    def faults(self) -> Iterator[tuple[str, str, Verdict, int, str]]:
        """Yield (name, mode, verdict, samples, reason) of what is wrong, crashes or takes too long."""
        for name, modes in sorted(self.letters.items()):
            for mode, letters in modes.items():
                for verdict in ("wrong", "crash", "timeout"):
                    if number := letters.count(LETTERS[cast(Verdict, verdict)]):
                        yield name, mode, cast(Verdict, verdict), number, self._reason(name, mode, verdict)

    def no_longer_split(self, before: Results) -> Iterator[tuple[str, str, int, str]]:
        """Yield (name, mode, samples, reason) of samples that `before` split with equal results, and this run not."""
        for name, modes in sorted(before.letters.items()):
            for mode, earlier in modes.items():
                later = self.letters.get(name, {}).get(mode, "")
                lost = [b for a, b in zip(earlier, later) if a == LETTERS["split"] != b]
                if lost and len(earlier) == len(later):
                    verdict = VERDICTS.get(lost[0], "refused")
                    yield name, mode, len(lost), self._reason(name, mode, verdict)

    def _reason(self, name: str, mode: str, verdict: str) -> str:
        return self.reasons.get(name, {}).get(mode, {}).get(verdict, "")

    def to_json(self) -> dict[str, Any]:
        return {
            "letters": {letter: verdict for verdict, letter in LETTERS.items()} | {NO_GRADIENT: "no gradient"},
            "samples": {mode: dict(counts) for mode, counts in self.counts().items()},
            "operators with": {mode: dict(counts) for mode, counts in self.operators().items()},
            "verdicts": dict(sorted(self.letters.items())),
            "reasons": dict(sorted(self.reasons.items())),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Results:
        return cls(dict(data["verdicts"]), dict(data["reasons"]))


def verdict_table(results: Results, title: str, groups: str = "operators") -> Table:
    """Return the table mode x verdict: samples, and in brackets the operators that have such a sample."""
    table = Table(title=f"{title}: samples (and {groups} that have one)")
    table.add_column("level, pass", no_wrap=True)
    for verdict in LETTERS:
        table.add_column("split and equal" if verdict == "split" else verdict, justify="right")
    by_operator = results.operators()
    for mode, counts in sorted(results.counts().items()):
        table.add_row(mode, *(f"{counts[v]} ({by_operator[mode][v]})" for v in LETTERS))
    return table
