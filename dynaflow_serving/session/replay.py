"""`find_operator` names the first operator whose value differs between a plan and the un-split program.

Contract
- The program runs once more, operator by operator, in its own order and on the caller's stream. Before each operator
  runs whole, the plan's calls of it run on parts of the same inputs. So an operator that differs is itself the cause.
- Replacement kernels run in place of the operators that they replace, for the micro-batches of the plan.
- A value with a token axis is compared part by part. A value that is shared is compared as it is, and a sum over
  tokens when all of its shares are there. Other values that each micro-batch has for itself are not compared, but what
  is computed from them is.
- Inside an operator that is a graph, the first call whose value differs is named (`first_node`).
- All operators run, whatever is found, so that collectives keep their order on all ranks.
- Operators that read an engine's context, or that touch its state, cannot run once more.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.core.order import external_ports
from dynaflow_serving.core.plan import Action, ActionKind, Instance, Plan, range_text
from dynaflow_serving.core.program import Operator, Scope
from dynaflow_serving.kernels import Composed, kernels_of
from dynaflow_serving.session.check import CONTEXT, Found
from dynaflow_serving.session.difference import Difference, local, relative_difference, tolerance_of
from dynaflow_serving.session.first_node import first_node

logger = logging.getLogger("dynaflow_serving")

NO_OPERATOR = (
    "none, each is right when it runs by itself: the plan's order, streams or buffers are wrong, such as a race or a "
    "write that was not declared"
)


def find_operator(
    captured: CapturedProgram,
    plan: Plan,
    kernels: Mapping[str, Callable[..., Any]],
    args: Sequence[Any],
    bounds: Sequence[int],
    tolerance: float | None,
) -> Found:
    """Return the first operator whose value differs.

    Args:
        captured: The program.
        plan: The plan that gave another result than the whole program.
        kernels: The kernels that the plan names and no registry knows.
        args: The program's inputs without constants, as they were before the step. What is written in place is lost.
        bounds: The token offsets of the micro-batches.
        tolerance: The relative difference that is allowed; None for that of the dtype.
    """
    program = captured.program
    if any(o.context or not {*o.reads, *o.writes} <= program.values.keys() for o in program.operators):
        return Found("", CONTEXT)
    replay = _Replay(captured, plan, kernels, args, bounds, tolerance)
    with torch.no_grad():
        replay.run()
    return replay.found or Found("", NO_OPERATOR)


class _Replay:
    """The values of an un-split run so far, and the first operator that differs from it."""

    def __init__(
        self,
        captured: CapturedProgram,
        plan: Plan,
        kernels: Mapping[str, Callable[..., Any]],
        args: Sequence[Any],
        bounds: Sequence[int],
        tolerance: float | None,
    ) -> None:
        self.captured, self.program, self.plan = captured, captured.program, plan
        self.kernels = kernels_of(plan, kernels)
        self.bounds, self.tolerance = bounds, tolerance
        self.found: Found | None = None
        self._whole = dict(zip(self.program.inputs, (*args, *captured.constants), strict=True))
        self._own: dict[Instance, Any] = {}  # values that are one per micro-batch
        # A group of operators is compared once its last one is there: by then, all of its inputs are.
        self._actions: dict[str, list[Action]] = defaultdict(list)
        place = {o.name: i for i, o in enumerate(self.program.operators)}
        self._last_use: dict[str, int] = {}
        for action in plan.actions:
            if action.kind in (ActionKind.RUN, ActionKind.REPLACE):
                last = max(action.operators, key=place.__getitem__)
                self._actions[last].append(action)
                self._last_use |= dict.fromkeys(external_ports(self.program, action.operators)[0], place[last])
        for i, operator in enumerate(self.program.operators):
            for value in (*operator.inputs, *operator.outputs):
                self._last_use[value] = max(i, self._last_use.get(value, i))

    def run(self) -> None:
        """Run all operators."""
        for i, operator in enumerate(self.program.operators):
            ran = [(action, *self._run_part(action)) for action in self._actions[operator.name]]
            whole = self._run_whole(operator)
            for action, inputs, outputs in ran:
                self._compare(action, inputs, outputs, whole)
            self._compare_sums(operator)
            for value in (*operator.inputs, *operator.outputs):
                if self._last_use[value] == i:
                    self._whole.pop(value, None)

    def _run_whole(self, operator: Operator) -> list[Any]:
        """Run an operator on the whole batch, and return its inputs."""
        inputs = [self._read(v, 0, self.plan.micro_batches, self._whole) for v in operator.inputs]
        result = self.captured.functions[operator.name](*inputs)
        self._whole.update(_by_name(operator.outputs, result))
        return inputs

    def _run_part(self, action: Action) -> tuple[dict[str, Any], dict[str, Any]]:
        """Run what the plan does for some micro-batches; return the inputs, as it leaves them, and the outputs."""
        names, outputs = external_ports(self.program, action.operators)
        written = {s for name in action.operators for s in self.program.by_name[name].writes}
        touched = [v for v in names if self.program.values[v].storage in written and v in self._whole]
        # The whole operator will write the same memory.
        source = self._whole | dict(zip(touched, copied([self._whole[v] for v in touched])))
        inputs = {v: self._read(v, action.start, action.stop, source) for v in names}
        if action.kind is ActionKind.RUN:
            function = self.captured.functions[action.operators[0]]
        else:
            kernel = self.kernels[action.kernel]
            function = kernel(self.captured, self.plan, action) if isinstance(kernel, Composed) else kernel
        made = _by_name(outputs, function(*inputs.values()))
        for value, content in made.items():
            if self.program.values[value].scope not in (Scope.BATCH, Scope.TOKENS, Scope.SHARED):
                self._own[Instance(value, action.start, action.stop)] = content
        return inputs, made

    def _read(self, name: str, start: int, stop: int, source: Mapping[str, Any]) -> Any:
        """Return a value of the un-split run as an operator of the micro-batches start to stop takes it."""
        value, part = self.program.values[name], Instance(name, start, stop)
        offset, tokens = self.bounds[start], self.bounds[stop] - self.bounds[start]
        if value.scope is Scope.TOKENS:
            return value.rows * tokens
        if value.scope is Scope.BATCH:
            return source[name].narrow(value.axis, value.rows * offset, value.rows * tokens)
        return self._own[part] if part in self._own and source is not self._whole else source[name]

    def _compare(
        self, action: Action, inputs: Mapping[str, Any], outputs: Mapping[str, Any], whole_inputs: Sequence[Any]
    ) -> None:
        """Compare the values of a part with those of the un-split run, and note the first difference."""
        written = {s for name in action.operators for s in self.program.by_name[name].writes}
        for name, part in (*outputs.items(), *inputs.items()):
            value = self.program.values[name]
            if self.found or value.scope not in (Scope.BATCH, Scope.SHARED) or not isinstance(part, torch.Tensor):
                continue
            if name in inputs and value.storage not in written:
                continue
            whole = self._read(name, action.start, action.stop, self._whole)
            part, whole = _finished(local(part)), _finished(local(whole))
            allowed, relative = tolerance_of(whole, self.tolerance), relative_difference(part, whole)
            if relative > allowed:
                operators = " + ".join(action.operators)
                if not written and (node := self._node(action, list(inputs.values()), whole_inputs)):
                    operators += f" ({node})"
                kernel = f" (kernel {action.kernel})" if action.kernel else ""
                rows = self._rows(part, whole, value.axis, value.rows * self.bounds[action.start], allowed)
                apart = Difference(f"value {name}", relative, allowed)
                where = range_text(action.start, action.stop).removeprefix("@")
                self.found = Found(operators, f"{operators}{kernel}, micro-batch {where}{rows}: {apart}")

    def _compare_sums(self, operator: Operator) -> None:
        """Compare the shares of sums over tokens, added up, with the sums of the un-split run.

        What is added may cancel, so a difference is relative to the greatest share.
        """
        for name in operator.outputs:
            value = self.program.values[name]
            shares = {part: _finished(local(t)) for part, t in self._own.items() if part.value == name}
            if self.found or value.scope is not Scope.PARTIAL or not shares:
                continue
            tokens = {part: self.bounds[part.stop] - self.bounds[part.start] for part in shares}
            weights = {part: n / self.bounds[-1] if value.mean else 1.0 for part, n in tokens.items()}
            total = sum(share.double() * weights[part] for part, share in shares.items())
            whole = _finished(local(self._whole[name]))
            greatest = max(float(share.double().abs().max()) for share in shares.values())
            allowed = tolerance_of(whole, self.tolerance)
            relative = float((total - whole.double()).abs().max()) / greatest if greatest else 0.0
            if relative > allowed:
                self.found = Found(operator.name, f"{operator.name}: {Difference(f'value {name}', relative, allowed)}")

    def _node(self, action: Action, part: Sequence[Any], whole: Sequence[Any]) -> str:
        """Return the first node that differs within the operator of `action`, or "" where that cannot be told."""
        name = action.operators[0]
        graph = self.captured.pieces.get(name)
        if graph is None or action.kind is ActionKind.REPLACE or self.program.by_name[name].group:
            return ""
        tokens = range(self.bounds[action.start], self.bounds[action.stop])
        try:
            return first_node(graph, part, whole, tokens, self.bounds[-1], self.tolerance)
        except Exception as error:  # the operator is named anyway
            logger.debug("DynaFlow: operator %s does not run node by node: %s", name, error)
            return ""

    @staticmethod
    def _rows(part: torch.Tensor, whole: torch.Tensor, axis: int | None, first: int, allowed: float) -> str:
        """Say which rows of the batch differ, where the value has a token axis."""
        if axis is None or part.shape != whole.shape:
            return ""
        a, b = (t.to(torch.float64).movedim(axis, 0).unsqueeze(-1).flatten(1) for t in (part, whole))
        same = (a - b).abs() <= allowed * b.abs().nan_to_num(0.0).max()
        rows = (~(same | (a.isnan() & b.isnan()))).any(1).nonzero().flatten().tolist()
        return f", rows {first + rows[0]}..{first + rows[-1]} ({len(rows)} of {len(a)})" if rows else ""


def copied(originals: Sequence[Any]) -> list[Any]:
    """Return copies of tensors. Those that share memory share it in the copies, too. Other objects stay as they are."""
    storages: dict[int, torch.UntypedStorage] = {}
    copies: list[Any] = []
    for t in originals:
        if not isinstance(t, torch.Tensor):
            copies.append(t)
            continue
        memory = t.untyped_storage()
        if memory.data_ptr() not in storages:
            storages[memory.data_ptr()] = memory.clone()  # type: ignore[no-untyped-call]
        copy = torch.empty(0, dtype=t.dtype, device=t.device)
        copies.append(copy.set_(storages[memory.data_ptr()], t.storage_offset(), t.size(), t.stride()))
    return copies


def _by_name(names: Sequence[str], result: Any) -> dict[str, Any]:
    """Return the results of an operator, one bare or several as a tuple, by the names of its outputs."""
    return dict(zip(names, (result,) if len(names) == 1 else result or (), strict=True))


def _finished(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor` when a collective that may be in flight has written it."""
    if not dist.is_available() or not dist.is_initialized():
        return tensor
    there: torch.Tensor = torch.ops._c10d_functional.wait_tensor(tensor)
    return there
