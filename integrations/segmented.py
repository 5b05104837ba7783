"""The forward of a model's body under a session, where the engine has no graph of it: `capture: eager`.

Contract
- Un-split calls run the model's own forward. They are recorded, until there is a Program, inside `recording` and in
  steps that the session counts; other dummy runs (memory profiling, warm-up, graph capture) are left alone.
- A split step runs under the session's plan. If a micro-batch takes another path than the recorded one, the step runs
  again without a plan, micro-batch after micro-batch (each is a batch that the engine could have made), is counted as
  un-split, and the model is recorded anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from dynaflow_serving.capture.eager import Arguments, Diverged, EagerCapture
from dynaflow_serving.capture.program import Enter
from dynaflow_serving.errors import InactiveError
from dynaflow_serving.integrations.session import Session
from dynaflow_serving.strategy.rules import Rule


class SegmentedForward:
    def __init__(
        self,
        session: Session,
        forward: Callable[..., Any],
        module: torch.nn.Module,
        rules: Iterable[Rule],
        states: Mapping[str, str],
    ) -> None:
        """rules: the integration's, for its engine's attention and collectives; the strategy's own come first.
        states: name of a rule -> engine state that it reads and writes. Raises `AnnotationError`."""
        self.session = session
        all_rules = (*session.strategy.annotations, *rules)
        self.segments = session.segments = EagerCapture(forward, module, all_rules, states)
        self.segments.attach()
        self._recording = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """The integration's dummy runs in this block are recorded: two, with different numbers of tokens. Raises
        `InactiveError` if they do not give a Program."""
        self._recording = True
        try:
            yield
        finally:
            self._recording = False
        if not self.session.plan_caches:
            raise InactiveError(f"DynaFlow cannot schedule this model: {self.segments.waiting}")

    def __call__(
        self,
        tokens: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        enter: Enter,
        arguments: Arguments | None = None,
    ) -> Any:
        """tokens: of the batch. enter: switches the engine's context to a micro-batch; the caller restores it.
        arguments: micro-batch -> its (args, kwargs), where they hold more than tensors to cut."""
        split = self.session.split
        if split is None or not self.session.micro_batches:
            return self._whole(tokens, args, kwargs)
        plan = self.session.plan(self.session.plan_caches[0])
        try:
            return self.segments.run(plan, split.bounds, args, kwargs, enter, arguments)
        except Diverged as error:
            self.session.withdraw(str(error))
            return self.segments.run_apart(split.bounds, args, kwargs, enter, arguments)

    def _whole(self, tokens: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.session.split is None and not self._recording:
            return self.segments.forward(*args, **kwargs)
        result = self.segments.record(tokens, args, kwargs)
        if self.segments.captured is not None and not self.session.plan_caches:
            self.session.add(self.segments.captured)
        return result
