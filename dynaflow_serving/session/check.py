"""The first split step of each program and signature also runs un-split, and a split whose values differ is refused.

Contract
- The plans that a step runs, and its number, decide whether it is compared. So all ranks compare the same steps. They
  exchange what they have found, and all refuse alike.
- A difference refuses the strategy for the program. Its steps then run un-split, and are counted with the reason, which
  names the first operator whose value differs. Other programs, and other candidates of a policy, go on.
- A difference also writes a reproducer with plan, program, options, batch, inputs and both outputs. `dynaflow check
  FILE` shows its content.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dynaflow_serving.config import CheckOptions
from dynaflow_serving.core.batch import Signature, Split
from dynaflow_serving.session.clock import Clock
from dynaflow_serving.session.difference import tensors
from dynaflow_serving.session.plan_cache import PlanCache
from dynaflow_serving.session.ranks import Ranks
from dynaflow_serving.session.report import CheckReport
from dynaflow_serving.session.step import Step
from dynaflow_serving.strategy.selector import Selector

FORMAT = "dynaflow_serving reproducer 1"
CHECKING = "check: the un-split run that a split one is compared with"
CONTEXT = "unknown, because operators of this program read the engine's state of the step and cannot run once more"

logger = logging.getLogger("dynaflow_serving")


class Found(NamedTuple):
    """One rank has found this about the first operator that differs.

    Attributes:
        operator: The name of the operator; "" if it is unknown.
        text: Where its value differs and by how much, or why it is unknown.
        rounding: Whether all operators are right, and some carry rounding on (a choice between near ties).
    """

    operator: str
    text: str
    rounding: bool = False


class Comparison(NamedTuple):
    """One rank has run a step both ways.

    Attributes:
        split: The outputs of the split run, a pytree of tensors.
        whole: The outputs of the un-split run, a pytree of tensors.
        difference: The first difference in words, or "".
        facts: This returns the facts about the step that the reproducer holds.
        find_operator: This finds the first operator that differs. All ranks call it.
    """

    split: Any
    whole: Any
    difference: str
    facts: Callable[[], Mapping[str, Any]]
    find_operator: Callable[[], Found] = lambda: Found("", CONTEXT)


class Check:
    """The check of one worker decides which steps are compared, and refuses splits that differ.

    Attributes:
        ranks: The ranks that refuse alike; they are set once the ranks can talk to one another.
        steps: The number of comparisons so far.
        seconds: The un-split runs and the comparisons took so long.
        refused: What was refused, in words.
    """

    def __init__(self, options: CheckOptions, rank: int) -> None:
        """Compare by `options`; `rank` names the files of this worker."""
        self.options, self.rank = options, rank
        self.ranks = Ranks()
        self.steps = 0
        self.seconds = 0.0
        self.refused: list[str] = []

    def wants(self, step: Step, plan_caches: Sequence[PlanCache], signature: Signature) -> bool:
        """Return whether `step`, which runs the plans of `signature`, is to be compared."""
        if not all(signature in c.checked for c in plan_caches):
            return True
        every = self.options.every
        return every is not None and step.number > 0 and (step.number - 1) % every == 0

    @contextmanager
    def timed(self, clock: Clock) -> Iterator[None]:
        """Add the time of this block to `seconds`."""
        clock.synchronize()
        started = time.perf_counter()
        try:
            yield
        finally:
            clock.synchronize()
            self.seconds += time.perf_counter() - started

    def conclude(
        self, plan_caches: Sequence[PlanCache], signature: Signature, found: Comparison, groups: Sequence[Any] = ()
    ) -> bool:
        """Return whether both runs are equal on all ranks; refuse the split if they are not.

        Args:
            plan_caches: The step has run their plans of `signature`.
            signature: The cut of the batch.
            found: Both runs on this rank.
            groups: The process groups of the step's collectives; by default, `ranks` are asked.
        """
        self.steps += 1
        for plan_cache in plan_caches:
            plan_cache.checked.add(signature)
        differences = self._exchange(found.difference, groups)
        if not any(differences):
            return True
        operators: list[Found] = self._exchange(found.find_operator(), groups)
        if all(o.rounding for o in operators):
            logger.warning("DynaFlow: a split step differs: %s; %s", _on_which_rank(differences), operators[0].text)
            return True
        operator = next((o for o in operators if o.operator), operators[0])
        reason = f"check: {operator.operator or 'the output'} differs from the un-split run"
        for plan_cache in plan_caches:
            plan_cache.refuse(signature.candidate, reason)
        facts = {**found.facts(), "operator": operator.text, "difference": _on_which_rank(differences)}
        programs = " and ".join(c.captured.program.digest for c in plan_caches)
        self.refused.append(f"{facts['strategy']}, program {programs}: {reason}")
        logger.error(
            "DynaFlow: strategy %s is STOPPED for program %s: a split step differs from the un-split one: %s. First "
            "operator that differs: %s. Reproducer: %s (dynaflow check shows it)",
            facts["strategy"], programs, facts["difference"], operator.text, self._write_reproducer(found, facts),
        )  # fmt: skip
        return False

    def report(self) -> CheckReport:
        """Return the number and the cost of the comparisons so far."""
        return CheckReport(steps=self.steps, seconds=self.seconds, refused=list(self.refused))

    def _exchange(self, mine: Any, groups: Sequence[Any]) -> list[Any]:
        """Return what all ranks have to say. The groups of a mesh pass on what they have heard, one after the other."""
        everyone = [mine]
        for ranks in map(Ranks, groups) if groups else (self.ranks,):
            everyone = [what for said in ranks.gather(everyone) for what in said]
        return everyone

    def _write_reproducer(self, found: Comparison, facts: Mapping[str, Any]) -> Path:
        folder = Path(self.options.folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"mismatch-{facts['plan_hash']}-rank{self.rank}.pt"
        torch.save({"format": FORMAT, **facts, "split": _plain(found.split), "whole": _plain(found.whole)}, path)
        return path


def describe_step(
    selector: Selector, step: Step, split: Split, plan_caches: Sequence[PlanCache], inputs: Iterable[Any]
) -> dict[str, Any]:
    """Return the facts about a step for the reproducer.

    Args:
        selector: It has cut the batch.
        step: The step.
        split: The cut of the batch.
        plan_caches: The plans that the step has run.
        inputs: The inputs of the model, of which the tensors are kept.
    """
    prepared = [(c, c.prepare(split.signature)) for c in plan_caches]
    return {
        "step": step.number,
        "strategy": split.candidate or selector.name,
        "options": selector.strategy(split.candidate).options.model_dump(mode="json"),
        "torch": str(torch.__version__),  # torch.load refuses the class of the version
        "tokens": list(step.batch.tokens),
        "context": list(step.batch.context),
        "bounds": list(split.bounds),
        "plan_hash": prepared[0][1].plan.digest,
        "programs": [c.captured.program.to_text() for c, _ in prepared],
        "plans": [p.plan.to_text() for _, p in prepared],
        "inputs": [t.detach().cpu().clone() for t in inputs if isinstance(t, torch.Tensor)],
    }


def _on_which_rank(differences: Sequence[str]) -> str:
    """Return the first difference, with its rank where there are several."""
    rank, found = next((i, d) for i, d in enumerate(differences) if d)
    return f"{found}, on rank {rank}" if len(differences) > 1 else found


def _plain(outputs: Any) -> list[torch.Tensor]:
    """Return the outputs in a form that `torch.load(weights_only=True)` takes."""
    return [t.detach().cpu().clone() for t in tensors(outputs)]
