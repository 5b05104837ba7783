"""The strategy's side: `OpScheduler` decides the split and the order, `Schedule` records it.

Contract
- A strategy's Python runs while recording, once per Program x Split signature, never in the hot path.
- `execute` accepts ready operators only, so a recorded order cannot contradict the dataflow.
- What a strategy leaves undone, or cannot do, is a `ScheduleError` that names the operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dynaflow_serving.core.order import order_edges, state_edges
from dynaflow_serving.core.plan import COMPUTE_STREAM
from dynaflow_serving.core.program import Operator, Program, Resource, Scope
from dynaflow_serving.errors import ScheduleError

Kernel = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Task:
    """One operator of one micro-batch: what `get_ready_ops` lists and `execute` takes."""

    operator: Operator
    micro_batch: int

    @property
    def name(self) -> str:
        return self.operator.name

    @property
    def resource(self) -> Resource:
        return self.operator.resource

    @property
    def tags(self) -> tuple[str, ...]:
        return self.operator.tags


@dataclass(frozen=True, slots=True)
class Launch:
    """One recorded execution: operators (one, or several replaced by a kernel) for start <= mb < stop."""

    stream: str
    operators: tuple[str, ...]
    start: int
    stop: int
    kernel: str = ""


class Schedule:
    """Records `execute` calls for `micro_batches` micro-batches of `program`."""

    def __init__(self, program: Program, micro_batches: int, depends: Iterable[tuple[int, int]] = ()) -> None:
        if micro_batches > 1 and program.unsplittable:
            raise ScheduleError(f"this program cannot be split: {program.unsplittable}")
        self.program = program
        self.micro_batches = micro_batches
        self.depends = tuple(depends)
        self.launches: list[Launch] = []
        self.kernels: dict[str, Kernel] = {}
        self._index = {o.name: i for i, o in enumerate(program.operators)}
        self._before: dict[tuple[str, int], set[tuple[str, int]]] = {
            (name, mb): {(e, mb) for e in edges}
            for name, edges in order_edges(program).items()
            for mb in range(micro_batches)
        }
        states = state_edges(program)
        for earlier, later in self.depends:
            for writer, toucher in states:
                self._before[toucher, later].add((writer, earlier))
        self._after: dict[tuple[str, int], list[tuple[str, int]]] = {key: [] for key in self._before}
        for key, edges in self._before.items():
            for e in edges:
                self._after[e].append(key)
        self._ready = {key for key, edges in self._before.items() if not edges}
        self._done: set[tuple[str, int]] = set()

    @property
    def unfinished(self) -> bool:
        return len(self._done) < len(self._before)

    def get_ready_ops(self, micro_batch: int | None = None) -> list[Task]:
        """Tasks whose predecessors have all been executed, in program order, then by micro-batch."""
        keys = [k for k in self._ready if micro_batch is None or k[1] == micro_batch]
        keys.sort(key=lambda k: (self._index[k[0]], k[1]))
        return [Task(self.program.by_name[name], mb) for name, mb in keys]

    def successors(self, task: Task) -> list[Task]:
        """The operators of the same micro-batch that directly wait for `task`, in program order."""
        keys = [k for k in self._after[task.name, task.micro_batch] if k[1] == task.micro_batch]
        return [Task(self.program.by_name[n], mb) for n, mb in sorted(keys, key=lambda k: self._index[k[0]])]

    def predecessors(self, task: Task) -> list[Task]:
        """The operators that `task` directly waits for, in program order; some may be of other micro-batches."""
        keys = sorted(self._before[task.name, task.micro_batch], key=lambda k: (self._index[k[0]], k[1]))
        return [Task(self.program.by_name[n], mb) for n, mb in keys]

    def execute(
        self,
        tasks: Task | Sequence[Task],
        stream: str = COMPUTE_STREAM,
        replace: str | Kernel | None = None,
    ) -> None:
        """Record `tasks` on `stream`.

        - One task: it runs.
        - One operator of several adjacent micro-batches: it runs once, merged.
        - `replace` (a registered kernel's name or a callable) stands in for all `tasks`. It gets the
          group's external inputs in order of first use and returns its external outputs in order of
          production (`dependencies.external_ports`), one bare or several as a tuple.
        - Several operators of one micro-batch without `replace`: one after the other.

        Raises `ScheduleError` for tasks that are not ready and for groups that are none of the above.
        """
        tasks = [tasks] if isinstance(tasks, Task) else list(tasks)
        if not tasks:
            raise ScheduleError("execute() got no operators")
        names = sorted({t.name for t in tasks}, key=self._index.__getitem__)
        mbs = sorted({t.micro_batch for t in tasks})
        if len(tasks) != len(names) * len(mbs) or mbs != list(range(mbs[0], mbs[-1] + 1)):
            raise ScheduleError(
                f"cannot execute {[f'{t.name}@{t.micro_batch}' for t in tasks]} together: a group is every "
                "one of its operators for the same, adjacent micro-batches, each once"
            )
        if replace is None and len(names) > 1:
            if len(mbs) > 1:
                raise ScheduleError(f"merging several operators {names} needs replace=")
            for t in sorted(tasks, key=lambda t: self._index[t.name]):
                self._launch([t.name], mbs, stream, "")
            return
        self._launch(names, mbs, stream, self._kernel_name(replace))

    def _kernel_name(self, replace: str | Kernel | None) -> str:
        if replace is None:
            return ""
        if isinstance(replace, str):
            return replace  # looked up when the plan is bound
        name, kernel = getattr(replace, "__name__", type(replace).__name__), replace
        if self.kernels.setdefault(name, kernel) is not kernel:
            raise ScheduleError(f"two different kernels are called {name!r}: give each a __name__ of its own")
        return name

    def _launch(self, names: list[str], mbs: list[int], stream: str, kernel: str) -> None:
        group = {(n, mb) for n in names for mb in mbs}
        for key in sorted(group, key=lambda k: self._index[k[0]]):
            self._check_ready(key, group)
        if len(mbs) > 1:
            self._check_mergeable(names)
        self.launches.append(Launch(stream, tuple(names), mbs[0], mbs[-1] + 1, kernel))
        self._done |= group
        self._ready -= group
        for key in group:
            self._ready.update(k for k in self._after[key] if k not in self._done and self._before[k] <= self._done)

    def _check_ready(self, key: tuple[str, int], group: set[tuple[str, int]]) -> None:
        if key in self._done:
            raise ScheduleError(f"{key[0]}@{key[1]} has been executed already")
        if missing := sorted(self._before[key] - self._done - group):
            waiting = ", ".join(f"{n}@{mb}" for n, mb in missing)
            raise ScheduleError(f"{key[0]}@{key[1]} is not ready: it needs {waiting} first")

    def _check_mergeable(self, names: list[str]) -> None:
        for name in names:
            op = self.program.by_name[name]
            if op.context:
                raise ScheduleError(f"{name} reads per-micro-batch context and cannot run merged")
            local = [v for v in (*op.inputs, *op.outputs) if self.program.values[v].scope is Scope.LOCAL]
            if local:
                raise ScheduleError(f"{name} cannot run merged: {local[0]} has no token axis")
