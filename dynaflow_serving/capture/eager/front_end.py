"""A model's forward without a graph: recorded in two un-split runs, then run once per micro-batch under a plan.

Contract
- `attach` puts the borders in place. Un-split calls then cost one look-up per border.
- `record` runs the model as it is and watches. After two runs with different numbers of tokens, `captured` holds the
  Program and its functions. Until then it is None, and `waiting` says what for.
- `run` makes a frame per micro-batch and lets a bound plan advance them.
- `run` raises `Diverged` when the model takes another path than the recorded one; from then on the model is recorded
  anew. The caller runs the step again: un-split, or, where an engine has prepared its micro-batches, by `run_apart`.
  The second run writes to engine state (a KV cache) what the first one wrote there.
- A model that has been recorded `ATTEMPTS` times without a lasting result is not recorded again, and runs un-split.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.utils._pytree as pytree

from dynaflow_serving.capture.eager.expected import Diverged
from dynaflow_serving.capture.eager.frames import Frame
from dynaflow_serving.capture.eager.functions import ActiveFrame, capture_program
from dynaflow_serving.capture.eager.gradients import Submit, at_once
from dynaflow_serving.capture.eager.pairing import RecordingPair, TokenAxis, match_recordings
from dynaflow_serving.capture.eager.placing import Borders
from dynaflow_serving.capture.eager.program import make_program
from dynaflow_serving.capture.eager.recording import RecordedTensor, Recording, record
from dynaflow_serving.capture.program import CapturedProgram, Enter, PlanFunction
from dynaflow_serving.core.plan import COMPUTE_STREAM, Plan
from dynaflow_serving.strategy.rules import Rule

ATTEMPTS = 8

# Micro-batch -> (args, kwargs) of the forward. The plan replaces tensors with a token axis by the micro-batch's views.
Arguments = Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]


class EagerCapture:
    """One model's forward: its borders, its recordings, and its Program once there is one."""

    def __init__(
        self,
        forward: Callable[..., Any],
        module: torch.nn.Module,
        rules: Iterable[Rule],
        states: Mapping[str, str] | None = None,
        training: bool = False,
    ) -> None:
        """Prepare to record `forward`.

        Args:
            forward: the model's forward.
            module: the model, where `SplitModule` rules look.
            rules: what the borders are.
            states: name of a rule -> the engine state (a KV cache) that its borders read and write, one per module.
            training: whether gradients go through the split forward.
        """
        self.forward = forward
        self.borders = Borders(module, rules)
        self.states, self.training = dict(states or {}), training
        self.captured: CapturedProgram | None = None
        self.waiting = "the model is being recorded"
        self._signature = inspect.signature(forward)
        self._active = ActiveFrame()
        self._first: Recording | None = None
        self._input_axes: dict[int, TokenAxis] = {}  # leaf of (args, kwargs) that a plan cuts -> its token axis
        self._output_dims: list[int] = []  # token axes of the leaves of the result; 0 for leaves without
        self._attempts = 0
        self._call_numbers: dict[str, int] = {}  # operator -> which call of a frame it is, where it is one

    def attach(self) -> None:
        """Put the borders in place. Raises `AnnotationError` for a rule that matches nothing."""
        self.borders.place()

    def detach(self) -> None:
        self.borders.remove()

    @property
    def wants_recording(self) -> bool:
        return self.captured is None and self._attempts < ATTEMPTS

    def record(self, tokens: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the forward's own result, un-split; record the run if that may complete `captured`.

        Args:
            tokens: of the batch.
            args: of the forward.
            kwargs: of the forward.

        Raises:
            AnnotationError: a rule of a torch function matches nothing.
        """
        same_size = self._first is not None and self._first.tokens == tokens
        if not self.wants_recording or tokens < 2 or same_size:
            return self.forward(*args, **kwargs)
        self._attempts += 1
        result, recording = record(self.forward, self.borders, self._names(args, kwargs), tokens, args, kwargs)
        first, self._first = self._first, recording
        if first is not None:
            pair = match_recordings(first, recording, self.training)
            if pair is None:
                self.waiting = "the model's path depends on the number of tokens"
            else:
                self._capture(pair)
        return result

    def forget(self, reason: str) -> None:
        """Record the model anew from now on, because of `reason`."""
        self.captured, self._first, self.waiting = None, None, reason

    def _capture(self, pair: RecordingPair) -> None:
        self.borders.check_torch_rules(call.border.name for call in pair.first.border_calls.values())
        axes = {leaf: pair.token_axis(tensor) for leaf, tensor in pair.inputs.items()}
        self._input_axes = {leaf: axis for leaf, axis in axes.items() if axis is not None}
        self._output_dims = [_token_dim(pair, leaf) for leaf in pair.first.outputs]
        model = make_program(pair, self.states)
        self.captured = capture_program(model, self._active)
        self.captured.mirrored = self.training
        events = {op.name: eager.event for op, eager in zip(model.program.operators, model.cut.operators)}
        self._call_numbers = {name: e // 2 for name, e in events.items() if e % 2}  # odd events are border calls
        self._first = None

    def run(
        self,
        plan: PlanFunction,
        bounds: Sequence[int],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        enter: Enter,
        arguments: Arguments | None = None,
        apart: Sequence[Mapping[int, Submit]] = (),
    ) -> Any:
        """Run one split step; return the forward's result for the whole batch.

        Args:
            plan: the bound plan.
            bounds: token offsets of the micro-batches, first 0, last the total.
            args: of the forward, for the whole batch.
            kwargs: of the forward.
            enter: switches the engine's context to a micro-batch.
            arguments: the micro-batches' own arguments, where they differ in more than tensors to cut.
            apart: what `calls_apart` returns, where gradients go through the step.

        Raises:
            Diverged: a micro-batch has taken another path than the recorded one.
        """
        assert self.captured is not None
        leaves, spec = pytree.tree_flatten((args, kwargs))
        function = self.borders.frame_function(self.forward)
        frames = []
        for i, (start, stop) in enumerate(pairwise(bounds)):
            frame = Frame(function, self.borders.by_target, stop - start)
            own = pytree.tree_flatten(arguments(i)) if arguments else (list(leaves), spec)
            frame.argument_leaves, frame.argument_spec = own
            frame.apart = apart[i] if apart else {}
            frames.append(frame)

        def enter_frame(micro_batch: int) -> None:
            self._active.frame = frames[micro_batch]
            enter(micro_batch)

        try:
            return self.captured.rebuild(plan([leaves[i] for i in self._input_axes], bounds, enter_frame))
        except Diverged as error:
            self.forget(str(error))
            raise
        finally:
            for frame in frames:
                frame.close()

    def calls_apart(self, plan: Plan, submit_to: Callable[[str, str], Submit | None]) -> list[dict[int, Submit]]:
        """Return the calls of each micro-batch that another stream runs, forward or backward, by number.

        Args:
            plan: of the split step.
            submit_to: (operator, its stream) -> what submits its gradient to a stream; None on the compute stream.

        Returns:
            What submits the gradient of each call. Such calls never run merged: they are carried (`operators`).
        """
        apart: list[dict[int, Submit]] = [{} for _ in range(plan.micro_batches)]
        for action in plan.actions:
            calls = [name for name in action.operators if name in self._call_numbers]
            submits = {self._call_numbers[name]: submit_to(name, action.stream) for name in calls}
            if not submits or (action.stream == COMPUTE_STREAM and not any(submits.values())):
                continue
            apart[action.start] |= {number: submit or at_once for number, submit in submits.items()}
        return apart

    def run_apart(
        self,
        bounds: Sequence[int],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        enter: Enter,
        arguments: Arguments | None = None,
    ) -> Any:
        """Run a split step without a plan: one micro-batch after the other, their results put together.

        The arguments are those of `run`.
        """
        parts = []
        for i, (start, stop) in enumerate(pairwise(bounds)):
            leaves, spec = pytree.tree_flatten(arguments(i) if arguments else (args, kwargs))
            if arguments is None:
                for leaf, axis in self._input_axes.items():
                    leaves[leaf] = leaves[leaf].narrow(axis.dim, start * axis.rows, (stop - start) * axis.rows)
            part_args, part_kwargs = pytree.tree_unflatten(leaves, spec)
            enter(i)
            parts.append(pytree.tree_flatten(self.forward(*part_args, **part_kwargs)))
        merged = [
            torch.cat(pieces, dim) if isinstance(pieces[0], torch.Tensor) else pieces[0]
            for pieces, dim in zip(zip(*(leaves for leaves, _ in parts)), self._output_dims)
        ]
        return pytree.tree_unflatten(merged, parts[0][1])

    def _names(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
        """Return the names of the leaves of (args, kwargs): their parameters', numbered where one has several."""
        bound = [*self._signature.bind(*args).arguments] if not kwargs else [*self._signature.parameters]
        names = []
        for name, value in (*zip(bound, args), *kwargs.items()):
            count = len(pytree.tree_leaves(value))
            names += [name] if count == 1 else [f"{name}.{i}" for i in range(count)]
        return names


def _token_dim(pair: RecordingPair, leaf: Any) -> int:
    axis = pair.token_axis(leaf) if isinstance(leaf, RecordedTensor) else None
    return 0 if axis is None else axis.dim
