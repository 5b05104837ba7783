"""A model's forward without a graph: recorded in two un-split runs, then run once per micro-batch under a plan.

Contract
- `attach` puts the borders in place; un-split calls then cost one look-up per border.
- `record` runs the model as it is and watches (`recording`); after two runs with different numbers of tokens, `capture`
  holds the Program and its operators. Until then `capture` is None and `waiting` says what for.
- `run` starts a suspended computation per micro-batch and lets a bound plan move them on. It raises `Diverged` when the
  model takes another path than the recorded one, and the model is recorded anew from then on. The caller runs the step
  again: un-split, or, where an engine has prepared its micro-batches already, `run_apart`. What the first try wrote to
  engine state (a KV cache) is written again with the same contents.
- A model that has been recorded `ATTEMPTS` times without a lasting result is not recorded again, and runs un-split.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.utils._pytree as pytree

from dynaflow_serving.capture.eager.borders import Borders
from dynaflow_serving.capture.eager.frames import Frame
from dynaflow_serving.capture.eager.operators import Diverged, Driver, build_capture
from dynaflow_serving.capture.eager.program import ModelProgram, pair_up
from dynaflow_serving.capture.eager.recording import Run, Seen, record
from dynaflow_serving.capture.program import BoundPlan, CapturedProgram, Enter
from dynaflow_serving.strategy.rules import Rule

ATTEMPTS = 8

# micro-batch -> (args, kwargs) of the forward; tensors with a token axis are replaced by the micro-batch's views.
Arguments = Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]


class EagerCapture:
    """One forward. `driver.frame` is the frame of the operator that runs."""

    def __init__(
        self,
        forward: Callable[..., Any],
        module: torch.nn.Module,
        rules: Iterable[Rule],
        states: Mapping[str, str] | None = None,
    ) -> None:
        """module: where `SplitModule` rules look. states: name of a rule -> the engine state (a KV cache) that what
        it matches reads and writes, one per module."""
        self.forward = forward
        self.borders = Borders(module, rules)
        self.states = dict(states or {})
        self.driver = Driver()
        self.captured: CapturedProgram | None = None
        self.waiting = "the model is being recorded"
        self._signature = inspect.signature(forward)
        self._first: Run | None = None
        self._places: dict[int, tuple[int, int]] = {}  # leaf of (args, kwargs) that a plan cuts -> (token axis, rows)
        self._output_axes: list[int] = []  # of the leaves of the result; 0 for those without
        self._attempts = 0

    def attach(self) -> None:
        """Raises `AnnotationError` for a rule that matches nothing."""
        self.borders.place()

    def detach(self) -> None:
        self.borders.remove()

    @property
    def wants_recording(self) -> bool:
        return self.captured is None and self._attempts < ATTEMPTS

    def record(self, tokens: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward's own result, un-split; recorded if that may complete `capture`.

        tokens: of the batch. Raises `AnnotationError` for a rule of a torch function that matches nothing.
        """
        if not self.wants_recording or tokens < 2 or (self._first is not None and self._first.tokens == tokens):
            return self.forward(*args, **kwargs)
        self._attempts += 1
        result, run = record(self.forward, self.borders, self._names(args, kwargs), tokens, args, kwargs)
        first, self._first = self._first, run
        if first is None:
            return result
        twins = pair_up(first, run)
        if twins is None:
            self.waiting = "the model's path depends on the number of tokens"
            return result
        model = ModelProgram(first, run, twins, self.states)
        self.borders.check_met([e.border.name for e in run.events[1::2]])  # type: ignore[union-attr]
        self._places = {leaf: place for leaf, s in model.inputs.items() if (place := model.axis(s))}
        self._output_axes = [(model.axis(s) or (0, 0))[0] if isinstance(s, Seen) else 0 for s in first.outputs]
        self.captured = build_capture(model, self.driver)
        self._first = None
        return result

    def run(
        self,
        plan: BoundPlan,
        bounds: Sequence[int],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        enter: Enter,
        arguments: Arguments | None = None,
    ) -> Any:
        """One split step: the forward's result for the whole batch. `bounds`: token offsets of the micro-batches."""
        assert self.captured is not None
        leaves, spec = pytree.tree_flatten((args, kwargs))
        entry = self.borders.entry(self.forward)
        frames = []
        for i in range(len(bounds) - 1):
            frame = Frame(entry, self.borders.by_place, bounds[i + 1] - bounds[i])
            frame.leaves, frame.spec = pytree.tree_flatten(arguments(i)) if arguments else (list(leaves), spec)
            frames.append(frame)

        def enter_frame(micro_batch: int) -> None:
            self.driver.frame = frames[micro_batch]
            enter(micro_batch)

        try:
            return self.captured.rebuild(plan([leaves[i] for i in self._places], bounds, enter_frame))
        except Diverged as error:
            self.captured, self._first, self.waiting = None, None, str(error)
            raise
        finally:
            for frame in frames:
                frame.close()

    def run_apart(
        self,
        bounds: Sequence[int],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        enter: Enter,
        arguments: Arguments | None = None,
    ) -> Any:
        """A split step without a plan: the forward of one micro-batch after the other, results put together."""
        parts = []
        for i, (start, stop) in enumerate(pairwise(bounds)):
            leaves, spec = pytree.tree_flatten(arguments(i) if arguments else (args, kwargs))
            if arguments is None:
                for leaf, (axis, rows) in self._places.items():
                    leaves[leaf] = leaves[leaf].narrow(axis, start * rows, (stop - start) * rows)
            part_args, part_kwargs = pytree.tree_unflatten(leaves, spec)
            enter(i)
            parts.append(pytree.tree_flatten(self.forward(*part_args, **part_kwargs)))
        merged = [
            torch.cat(pieces, axis) if isinstance(pieces[0], torch.Tensor) else pieces[0]
            for pieces, axis in zip(zip(*(leaves for leaves, _ in parts)), self._output_axes)
        ]
        return pytree.tree_unflatten(merged, parts[0][1])

    def _names(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
        """Of the leaves of (args, kwargs): the parameters' names, numbered where one has several."""
        bound = [*self._signature.bind(*args).arguments] if not kwargs else [*self._signature.parameters]
        names = []
        for name, value in (*zip(bound, args), *kwargs.items()):
            count = len(pytree.tree_leaves(value))
            names += [name] if count == 1 else [f"{name}.{i}" for i in range(count)]
        return names


__all__ = ["Arguments", "Diverged", "EagerCapture"]
