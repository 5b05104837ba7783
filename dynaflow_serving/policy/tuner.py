"""The tuner decides by measurement: it times candidates against un-split steps, bucket by bucket, before serving.

Contract
- It times real steps of the engine, in the mode that will serve. An integration says how to run them (`Trials`).
- Per bucket, it first times un-split steps. One traced run on one stream, per number of micro-batches, gives the times
  of the operators. From these the simulator predicts every candidate's step, and estimates the backward pass, if any.
- Candidates that are predicted to lose are not timed. The best ones are timed in turn with un-split steps.
- The best of these is adopted if its median gain exceeds the measured noise and `min_gain`.
- A prediction knows no contention, so it errs towards timing. Plans with replacement kernels are always timed.
- A bucket is not tried if a larger one of the same kind and number of requests has lost clearly. A split costs
  relatively more in a smaller batch.
- The first step of a candidate is compared with an un-split one, and not timed. One that differs is not adopted.
- All times are those of the slowest rank, so that all ranks decide alike.
- What would take longer than the rest of the budget is not begun: a bucket, a profile, a candidate, a pair. Each kind
  of batch has an equal share of it. Long steps are repeated less often.
- A bucket that the budget does not reach is decided like its nearest smaller neighbour of the same kind, or one of
  twice its size (`inferred`).

Flow
    for bucket, batch in representatives: plain -> profile -> predict -> prune -> time in pairs -> decide
    for bucket that was not reached: infer
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

from dynaflow_serving.core.batch import Batch, Signature
from dynaflow_serving.core.measurement import in_turn, noise
from dynaflow_serving.core.plan import ActionKind
from dynaflow_serving.errors import PlanError, ScheduleError
from dynaflow_serving.policy.bucket import bucket_of
from dynaflow_serving.policy.neighbours import expected_seconds, infer, lost_before, too_long
from dynaflow_serving.policy.selector import PLAIN, AutoSelector
from dynaflow_serving.policy.side_effects import Facts, SideEffects
from dynaflow_serving.policy.table import Decision, Table, Trial
from dynaflow_serving.session.plan_cache import PlanCache
from dynaflow_serving.session.ranks import Ranks
from dynaflow_serving.session.session import Session
from dynaflow_serving.session.step import Trial as StepTrial
from dynaflow_serving.simulate.cost import MeasuredCosts, backward_seconds
from dynaflow_serving.simulate.engine import simulate
from dynaflow_serving.strategies.sequential import Sequential

HOPELESS = 0.97  # below this predicted speed-up, a candidate is not timed
PLAIN_STEPS = 3
LONG_STEP = 0.3  # seconds; such steps are repeated as seldom as can be
LEAST_STEPS = 12  # a decision about long steps takes so many: plain 2, profile 2, checked 2, pairs of 3 times 2
LEAST_PAIRS = 3
TIMED = 3  # at most so many candidates of a bucket are timed: the best predicted ones, besides those with kernels
UNTIMED = 2  # the first step of a candidate makes its plan, and the second may capture it (`graph: whole`)

Progress = Callable[[int, int, str], None]  # (buckets done, buckets in all, name of the next one)


class Trials(Protocol):
    """An engine's trials are steps that no user asked for."""

    def batches(self) -> Iterable[Batch]:
        """Return one batch per bucket that can occur, the most important first (`bucket.representatives`)."""

    def run_step(self, batch: Batch) -> None:
        """Run one real step of `batch`; the session decides it like any other."""


@dataclass(frozen=True)
class _Profile:
    """A profile holds the seconds of a step of sequential micro-batches, and those of its operators.

    Attributes:
        step: The seconds of the whole step.
        ran: For each program, the seconds of each (operator, micro-batch).
    """

    step: float
    ran: list[tuple[PlanCache, dict[tuple[str, int], float]]]

    @property
    def outside(self) -> float:
        """These seconds of the step are spent outside of its operators."""
        return max(0.0, self.step - sum(sum(seconds.values()) for _, seconds in self.ran))


class Tuner:
    """The tuner of one session measures the candidates of its selector."""

    def __init__(self, session: Session, selector: AutoSelector, trials: Trials, facts: Facts, ranks: Ranks) -> None:
        self.session, self.selector, self.trials, self.facts, self.ranks = session, selector, trials, facts, ranks
        self.options = selector.options
        self._started = 0.0  # when tuning began
        self._until = 0.0  # the present bucket's share of the budget ends so many seconds later
        self._used_up = f"the budget of {self.options.budget_seconds:g} s was used up"

    def tune(self, progress: Progress = lambda done, of, what: None) -> Table:
        """Decide for every bucket that the trials can produce, and return the table of the decisions."""
        refused = self._refused()
        self._started = time.perf_counter()
        work = {bucket_of(batch): batch for batch in self.trials.batches()}
        decisions: list[Decision] = []
        kinds = {bucket.kind for bucket in work}  # those of which no bucket was tried yet
        for done, (bucket, batch) in enumerate(work.items()):
            progress(done, len(work), str(bucket))
            decision = Decision(kind=bucket.kind, tokens=bucket.tokens, requests=bucket.requests)
            elapsed, budget = self._elapsed(), self.options.budget_seconds
            self._until = elapsed + (budget - elapsed) / max(1, len(kinds))
            kinds.discard(bucket.kind)
            if elapsed > budget:
                decision.decided, decision.reason = False, f"not tuned: {self._used_up}"
            elif lost := lost_before(bucket, decisions):
                decision.reason = lost
            elif not self._affords(LEAST_STEPS * (expected := expected_seconds(bucket, decisions))):
                decision.decided, decision.reason = False, too_long(expected, self._until - elapsed)
            else:
                self._decide(decision, batch, refused)
            decisions.append(decision)
        progress(len(work), len(work), "")
        for decision in decisions:
            infer(decision, work[decision.bucket], decisions, self.selector, self.facts)
        return Table(key=self.facts.key, decisions=decisions, seconds=self._elapsed())

    def _elapsed(self) -> float:
        """Return the seconds of tuning so far, on the slowest rank."""
        (seconds,) = self.ranks.greatest([time.perf_counter() - self._started])
        return seconds

    def _affords(self, seconds: float) -> bool:
        """Return whether so many seconds are left for the present bucket."""
        return self._elapsed() + seconds <= self._until

    # -- one bucket ----------------------------------------------------------------------------------
    def _decide(self, decision: Decision, batch: Batch, refused: dict[str, str]) -> None:
        """Fill in the `decision` about batches like `batch`."""
        if not (plain := self._time_plain(decision, batch)):
            return
        profiles: dict[int, _Profile] = {}
        timed: list[Trial] = []
        promising: list[Trial] = []
        for label in self.selector.measured:
            trial = Trial(candidate=label, verdict=refused.get(label, ""))
            decision.trials.append(trial)
            if trial.verdict:
                continue
            split = self.selector.cut(batch, label)
            for plan_cache in self.session.plan_caches:
                split = plan_cache.allowed_split(batch, split)
            n = len(split.micro_batches)
            if n == 1:
                if self.selector.plans_unsplit(label):
                    timed.append(trial)  # no steps in turn could predict it
                else:
                    trial.verdict = split.reason
                continue
            effects = SideEffects.of_split(batch, split, self.facts)
            trial.effects = effects.in_words()
            if veto := effects.veto(self.options.straddle, self.options.min_collective_kib):
                trial.verdict = veto
                continue
            if n not in profiles:
                if not self._affords(3 * min(plain)):
                    trial.verdict = f"not timed: {self._used_up}"
                    continue
                profiles[n] = self._profile(n, batch, min(plain) > LONG_STEP)
            if reason := self._why_refused(f"{Sequential.name} x{n}"):  # so no order of these micro-batches is right
                trial.verdict = reason
                continue
            trial.predicted = min(plain) / self._predict(profiles[n], split.signature)
            if self._replaces(split.signature):
                timed.append(trial)
            elif trial.predicted < HOPELESS:
                trial.verdict = f"predicted to be slower ({trial.predicted:.2f}x)"
            else:
                promising.append(trial)
        promising.sort(key=lambda t: t.predicted or 0.0, reverse=True)
        for trial in promising[TIMED:]:
            trial.verdict = f"predicted to be no faster than {', '.join(t.candidate for t in promising[:TIMED])}"
        for trial in (*timed, *promising[:TIMED]):
            before = self._graph_mib()
            plain += self._race(trial, batch, min(plain))
            if more := self._graph_mib() - before:
                trial.effects.append(f"{more:,.0f} MiB of CUDA graphs")
            if reason := self._why_refused(trial.candidate):
                trial.ratios.clear()  # they are of un-split steps
                trial.verdict = reason
        decision.plain_ms = median(plain) * 1e3
        decision.noise = noise(plain)
        adopt_best_trial(decision, self.options.min_gain)
        if not decision.candidate and any(self._used_up in trial.verdict for trial in decision.trials):
            decision.decided = False

    def _time_plain(self, decision: Decision, batch: Batch) -> list[float]:
        """Return the seconds of some un-split steps; none, with the reason, where a decision would take too long."""
        first = self._seconds(PLAIN, batch)
        if self._affords((LEAST_STEPS - 1) * first):
            return [self._seconds(PLAIN, batch) for _ in range(1 if first > LONG_STEP else PLAIN_STEPS)]
        decision.plain_ms = first * 1e3
        decision.decided, decision.reason = False, too_long(first, self._until - self._elapsed())
        return []

    def _race(self, trial: Trial, batch: Batch, step: float) -> list[float]:
        """Time a candidate and un-split steps in turn, and record the ratio of each pair in `trial`.

        It stops early when there is clearly nothing to win, or when long steps have clearly won. While the budget
        lasts, a candidate that seems to win is timed as often again.

        Args:
            trial: It names the candidate.
            batch: The steps are of this batch.
            step: An un-split step takes about so many seconds.

        Returns:
            The seconds of the un-split steps.
        """
        plain: list[float] = []
        long, least_gain = step > LONG_STEP, self.options.min_gain
        if not self._affords((2 + 2 * LEAST_PAIRS) * step):
            trial.verdict = f"not timed: {self._used_up}"
            return plain
        for _ in range(1 if long else UNTIMED):
            self._seconds(trial.candidate, batch)
        for number in range(2 * self.options.pairs):
            if number >= LEAST_PAIRS and not self._affords(2 * step):
                break
            if number == self.options.pairs and _lost(trial, noise(plain), least_gain):
                break
            seconds = {label: self._seconds(label, batch) for label in in_turn((PLAIN, trial.candidate), number)}
            plain.append(seconds[PLAIN])
            trial.ratios.append(seconds[PLAIN] / seconds[trial.candidate])
            if number + 1 < LEAST_PAIRS:
                continue
            won = min(trial.ratios) - 1 > max(noise(plain), least_gain)
            if max(trial.ratios) < 1 or (long and won):
                break
        return plain

    def _why_refused(self, candidate: str) -> str:
        """Return why the check has refused a candidate in one of its trials, or ""."""
        return next((c.refused[candidate] for c in self.session.plan_caches if candidate in c.refused), "")

    def _graph_mib(self) -> float:
        """Return the memory of the plans that executors have captured as CUDA graphs."""
        graphs = [e.graphs for e in {id(r.executor): r.executor for r in self.session.plan_caches}.values()]
        return sum(g.mib for g in graphs if g is not None)

    def _seconds(self, label: str, batch: Batch) -> float:
        """Run one step under `label`, and return its seconds on the slowest rank."""
        return self._timed(label, batch).seconds

    def _timed(self, label: str, batch: Batch, profiled: bool = False) -> StepTrial:
        """Run one step under `label`; the seconds of the result are the slowest rank's."""
        with self.session.trial(label, profiled) as trial:
            self.trials.run_step(batch)
            self.session.clock.synchronize()
            self.session.clock.poll()
        (trial.seconds,) = self.ranks.greatest([trial.seconds])
        return trial

    # -- prediction ----------------------------------------------------------------------------------
    def _profile(self, micro_batches: int, batch: Batch, long: bool) -> _Profile:
        """Trace three steps, and return the profile of the faster of the last two; two of them if steps are `long`."""
        label = f"{Sequential.name} x{micro_batches}"
        runs = [self._timed(label, batch, profiled=True) for _ in range(2 if long else 3)]
        fastest = min(runs[1:], key=lambda run: run.seconds)
        ran = []
        for plan_cache, timeline in fastest.timelines:
            spans = [s for s in timeline.spans if s.action.operators]
            values = self.ranks.greatest([s.end - s.start for s in spans])
            ran.append((plan_cache, {(s.action.operators[0], s.action.start): v for s, v in zip(spans, values)}))
        return _Profile(fastest.seconds, ran)

    def _predict(self, profile: _Profile, signature: Signature) -> float:
        """Return the simulated seconds of a step under the plan of `signature`.

        What a step takes outside of its operators is the backward pass, where there is one.
        """
        seconds = 0.0 if any(c.captured.mirrored for c, _ in profile.ran) else profile.outside
        for plan_cache, operators in profile.ran:
            captured, plan = plan_cache.captured, plan_cache.prepare(signature).plan
            seconds += simulate(plan, MeasuredCosts(captured.program, operators).demands(plan)).makespan
            if captured.mirrored:
                program, plan = plan_cache.backward[signature]
                costs = MeasuredCosts(program, backward_seconds(captured.program, operators, profile.outside))
                seconds += simulate(plan, costs.demands(plan)).makespan
        return seconds

    def _replaces(self, signature: Signature) -> bool:
        """Return whether a plan of `signature` has replacement kernels, whose times no profile knows."""
        plans = [c.prepare(signature).plan for c in self._running(signature)]
        return any(action.kind is ActionKind.REPLACE for plan in plans for action in plan.actions)

    def _running(self, signature: Signature) -> list[PlanCache]:
        return [c for c in self.session.plan_caches if c.runs_in(signature.micro_batches)]

    def _refused(self) -> dict[str, str]:
        """Return the reason for each candidate that cannot schedule this model, or that has an earlier one's plan."""
        found: dict[str, str] = {}
        plans: dict[Any, str] = {}
        for label in self.selector.candidates:
            signature = Signature(self.selector.strategy(label).max_micro_batches, (), label)
            try:
                plan = tuple(c.prepare(signature).plan.actions for c in self._running(signature))
            except (ScheduleError, PlanError) as error:
                found[label] = f"cannot schedule this model: {error}"
                continue
            if plan in plans:
                found[label] = f"the same plan as {plans[plan]}"
            plans.setdefault(plan, label)
        return found


def adopt_best_trial(decision: Decision, min_gain: float) -> None:
    """Adopt the best timed trial of `decision`, or none, and give the reason. The noise has been measured before."""
    assert decision.noise is not None
    winners: list[Trial] = []
    for trial in decision.trials:
        if trial.measured is not None:
            trial.verdict = _lost(trial, decision.noise, min_gain)
            winners += [] if trial.verdict else [trial]
    if winners:
        best = max(winners, key=lambda t: t.measured or 0.0)
        decision.candidate = best.candidate
        decision.reason = f"{best.measured:.2f}x, noise {decision.noise:.1%}"
        for trial in winners:
            if trial is not best:
                trial.verdict = f"{best.candidate} is faster"
    elif closest := decision.best:
        decision.reason = f"{closest.candidate}: {closest.verdict}"
    else:
        decision.reason = "; ".join(dict.fromkeys(t.verdict for t in decision.trials))
    if decision.best is not None and decision.best.effects:
        decision.reason += f" ({', '.join(decision.best.effects)})"


def _lost(trial: Trial, noise: float, min_gain: float) -> str:
    """Return why a measured trial is not adopted, or "" if it may be."""
    assert trial.measured is not None
    wins, pairs = sum(r > 1 for r in trial.ratios), len(trial.ratios)
    if trial.measured <= 1:
        return f"slower ({trial.measured:.2f}x)"
    if trial.measured - 1 <= max(noise, min_gain):
        return f"gain {trial.measured - 1:.1%}, but noise is {noise:.1%} and min_gain {min_gain:.1%}"
    if wins <= 0.75 * pairs:
        return f"won {wins} of {pairs} pairs only"
    return ""
