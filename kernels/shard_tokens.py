"""An all-reduce and the operators after it that treat tokens alone, on a shard of the tokens.

The all-reduce becomes a reduce-scatter before and an all-gather after them (TokenWeave, arXiv 2505.11329). This works
for any model: the replaced operators' own callables run, with the model's own norm, epsilon and residual.

Contract
- The first operator is a sum over a group (`_c10d_functional.all_reduce`). The others treat tokens independently and
  compute the same on all ranks from the same inputs. Results are then the same, up to the order of the sum.
- Each action checks on its first run that the other inputs are the same on all ranks: it compares the first token, and
  all of what has no token axis. A difference is a `ScheduleError` on every rank.
- A result that only actions of the same kind and the same micro-batches read stays sharded: of its tensor the rows of
  other ranks are unspecified, and it is not sent. A residual stream is sent once, at the end.
- Every rank takes ceil(tokens / ranks) tokens; the last ones are padded with zeros. With fewer than two tokens a rank,
  the operators run as they are.
- It is tested on gloo with two processes, and unmeasured on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.core.order import external_ports
from dynaflow_serving.core.plan import Action, ActionKind, Plan
from dynaflow_serving.core.program import Program, Scope, Value
from dynaflow_serving.errors import ScheduleError
from dynaflow_serving.kernels import Composed
from dynaflow_serving.kernels.collectives import all_gather, group_of_sum, own_tokens, padded, reduce_scatter


class ShardTokens(Composed):
    __name__ = "shard_tokens"

    def __call__(self, capture: CapturedProgram, plan: Plan, action: Action) -> Callable[..., Any]:
        """Raises `ScheduleError` if the first operator is no sum over a group that torch knows."""
        group = group_of_sum(capture, action.operators[0])
        return _Sharded(capture, plan, action, group)


class _Sharded:
    def __init__(self, capture: CapturedProgram, plan: Plan, action: Action, group: dist.ProcessGroup) -> None:
        program = capture.program
        self.group = group
        self.inputs, self.outputs = external_ports(program, action.operators)
        self.values = program.values
        self.operators = [program.by_name[n] for n in action.operators]
        self.functions = [capture.functions[n] for n in action.operators]
        self.partial = _batched(self.operators[0].inputs, self.values)
        self.reduced = self.operators[0].outputs[0]
        sharded = {v for s in _alike(plan, action) for n in s.operators for v in program.by_name[n].outputs}
        self.sharded_inputs = {v for v in self.inputs if v in sharded}
        self.kept = {v for v in self.outputs if _read_by_alike_only(program, plan, action, v)}
        self.checked = False

    def __call__(self, *args: Any) -> Any:
        values = dict(zip(self.inputs, args, strict=True))
        if torch.is_grad_enabled() and values[self.partial].requires_grad:
            raise ScheduleError("kernel 'shard_tokens' has no backward: run under torch.no_grad(), or use 'nanoflow'")
        ranks = self.group.size()
        tokens = self._tokens(values)
        if tokens < 2 * ranks:
            return self._as_they_are(values)
        if not self.checked:
            self._check(values)
            self.checked = True
        share = len(own_tokens(tokens, 0, ranks))
        mine = own_tokens(tokens, self.group.rank(), ranks)
        local = {v: self._own(v, x, mine, share) for v, x in values.items()}
        partial, axis = values[self.partial], self._axis(self.partial)
        whole = padded(partial, axis, share * ranks * self.values[self.partial].rows)
        local[self.reduced] = reduce_scatter(whole, self.group, axis)
        self._run(1, local)
        return self._results([self._whole(v, local[v], tokens, mine) for v in self.outputs])

    def _as_they_are(self, values: dict[str, Any]) -> Any:
        self._run(0, values)
        return self._results([values[v] for v in self.outputs])

    def _run(self, start: int, values: dict[str, Any]) -> None:
        """Run the operators from the `start`-th on; they read and fill `values`."""
        for op, function in zip(self.operators[start:], self.functions[start:], strict=True):
            result = function(*(values[v] for v in op.inputs))
            values.update(zip(op.outputs, result if len(op.outputs) > 1 else (result,), strict=True))

    @staticmethod
    def _results(results: list[Any]) -> Any:
        return results[0] if len(results) == 1 else tuple(results)

    def _axis(self, value: str) -> int:
        return self.values[value].axis or 0

    def _tokens(self, values: dict[str, Any]) -> int:
        return int(values[self.partial].shape[self._axis(self.partial)]) // self.values[self.partial].rows

    def _own(self, name: str, x: Any, mine: range, share: int) -> Any:
        """Cut the tokens `mine` out of `x`, and pad them with zeros to `share` tokens."""
        value = self.values[name]
        if value.scope is Scope.TOKENS:
            return share * value.rows
        if value.scope is not Scope.BATCH:
            return x
        own = x.narrow(self._axis(name), mine.start * value.rows, len(mine) * value.rows)
        return padded(own, self._axis(name), share * value.rows)

    def _whole(self, name: str, own: Any, tokens: int, mine: range) -> Any:
        """Gather `own` of all ranks; a value that stays sharded gets a tensor of full size with `own` in it."""
        value = self.values[name]
        if value.scope is not Scope.BATCH:
            return own
        axis, rows = self._axis(name), tokens * value.rows
        if name not in self.kept:
            return all_gather(own, self.group, axis).narrow(axis, 0, rows)
        shape = list(own.shape)
        shape[axis] = rows
        whole = own.new_empty(shape)
        count = len(mine) * value.rows
        whole.narrow(axis, mine.start * value.rows, count).copy_(own.narrow(axis, 0, count))
        return whole

    def _check(self, values: dict[str, Any]) -> None:
        """Raise `ScheduleError`, on all ranks alike, unless the ranks hold the same inputs but the partial sums."""
        for name, x in values.items():
            if not isinstance(x, torch.Tensor) or name in self.sharded_inputs or name == self.partial:
                continue
            value = self.values[name]
            mine = x.narrow(self._axis(name), 0, value.rows) if value.scope is Scope.BATCH else x
            mine = mine.detach().reshape(1, -1).float()
            theirs = all_gather(mine, self.group)
            tolerance = 1e-2 if x.dtype in (torch.float16, torch.bfloat16) else 1e-4
            if not torch.allclose(theirs, theirs[:1].expand_as(theirs), tolerance, tolerance, equal_nan=True):
                raise ScheduleError(
                    f"{' + '.join(o.name for o in self.operators)} cannot run on a shard of the tokens: {name} is not "
                    "the same on all ranks; use strategy 'nanoflow' for this model"
                )


def _alike(plan: Plan, action: Action) -> list[Action]:
    """List the actions of the same kernel for the same micro-batches."""
    return [
        s
        for s in plan.actions
        if (s.kind, s.kernel, s.start, s.stop) == (ActionKind.REPLACE, action.kernel, action.start, action.stop)
    ]


def _read_by_alike_only(program: Program, plan: Plan, action: Action, value: str) -> bool:
    """Whether `value` is read, by actions of this kind only, beside their partial sums."""
    fit = {n for s in _alike(plan, action) for n in s.operators[1:]}
    readers = {o.name for o in program.operators if value in o.inputs}
    return value not in program.outputs and bool(readers) and readers <= fit


def _batched(names: Sequence[str], values: dict[str, Value]) -> str:
    return next(v for v in names if values[v].scope is Scope.BATCH)
