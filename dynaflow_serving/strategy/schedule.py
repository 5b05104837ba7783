"""`Schedule` records what a strategy executes, in which order and on which streams.

Contract
- `execute` accepts ready operators only, so a recorded order cannot contradict the dataflow.
- A sum over tokens (PARTIAL) that ran merged is read for the same micro-batches or more, never apart.
- What is not possible is a `ScheduleError` that names the operators. So is a loop that asks for ready operators without
  end and executes none.
- A kernel given by name stays a name: it is looked up when the plan is prepared. A callable is kept in `kernels`.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dynaflow_serving.core.order import external_ports, order_edges, state_edges
from dynaflow_serving.core.plan import Instance, range_text
from dynaflow_serving.core.program import Operator, Program, Resource, Scope
from dynaflow_serving.errors import ScheduleError
from dynaflow_serving.strategy.streams import default_stream

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

    def __str__(self) -> str:
        return f"{self.name}@{self.micro_batch}"


@dataclass(frozen=True, slots=True)
class Launch:
    """One recorded execution: operators (one, or several replaced by a kernel) for start <= mb < stop."""

    stream: str
    operators: tuple[str, ...]
    start: int
    stop: int
    kernel: str = ""


class Schedule:
    """Records `execute` calls for `micro_batches` micro-batches of `program`.

    Inside, tasks are numbered in program order and then by micro-batch, so numbers sort as `get_ready_ops` lists.
    """

    def __init__(self, program: Program, micro_batches: int, depends: Iterable[tuple[int, int]] = ()) -> None:
        """Start a recording.

        Args:
            program: what is scheduled.
            micro_batches: how many micro-batches there are.
            depends: pairs (earlier, later) of micro-batches: the later one reads state that the earlier one writes.

        Raises:
            ScheduleError: the program cannot be split.
        """
        if micro_batches > 1 and program.unsplittable:
            raise ScheduleError(f"this program cannot be split: {program.unsplittable}")
        if micro_batches > 1 and program.unmergeable:
            raise ScheduleError(f"this program cannot be split: {program.unmergeable}")
        self.program = program
        self.micro_batches = micro_batches
        self.depends = tuple(depends)
        self.launches: list[Launch] = []
        self.kernels: dict[str, Kernel] = {}
        """The callables that stand in for operators, by their names in the plan."""
        self._named: set[str] = set()  # kernels given by name
        self._summed: dict[tuple[str, int], Launch] = {}  # PARTIAL value @ micro-batch -> what made it
        self._index = {o.name: i for i, o in enumerate(program.operators)}
        self._tasks = [Task(o, mb) for o in program.operators for mb in range(micro_batches)]
        self._before: list[set[int]] = [set() for _ in self._tasks]
        self._add_edges()
        self._after: list[list[int]] = [[] for _ in self._tasks]
        for number, before in enumerate(self._before):
            for earlier in before:
                self._after[earlier].append(number)
        self._waits_for = [len(before) for before in self._before]  # how many tasks are still to come before
        self._done = [False] * len(self._tasks)
        self.unfinished = len(self._tasks)
        """How many tasks have not been executed."""
        self._ready: list[int] = []
        self._ready_of: dict[int, list[int]] = {mb: [] for mb in range(micro_batches)}
        for number, count in enumerate(self._waits_for):
            if not count:
                self._set_ready(number)
        self._idle_calls = 0  # of get_ready_ops since the last execute

    def _add_edges(self) -> None:
        n = self.micro_batches
        for name, edges in order_edges(self.program).items():
            for mb in range(n):
                self._before[self._index[name] * n + mb] = {self._index[e] * n + mb for e in edges}
        states = state_edges(self.program)
        for earlier, later in self.depends:
            for writer, toucher in states:
                self._before[self._index[toucher] * n + later].add(self._index[writer] * n + earlier)

    def get_ready_ops(self, micro_batch: int | None = None) -> list[Task]:
        """List the tasks whose predecessors have all been executed, in program order, then by micro-batch.

        Args:
            micro_batch: list tasks of this micro-batch only.

        Raises:
            ScheduleError: this was called very often without an `execute` in between, as in a loop without end.
        """
        self._idle_calls += 1
        if self._idle_calls > 1000 + 10 * len(self._tasks):  # far more than to look at each task in turn
            self._raise_idle()
        numbers = self._ready if micro_batch is None else self._ready_of.get(micro_batch, ())
        return [self._tasks[number] for number in numbers]

    def _raise_idle(self) -> None:
        ready = [str(self._tasks[number]) for number in self._ready]
        state = f"ready: {', '.join(ready[:5])}{' ...' if len(ready) > 5 else ''}" if ready else "no operator is ready"
        if not self.unfinished:
            state = "all operators have been executed: end the loop when get_ready_ops() is empty"
        raise ScheduleError(f"the strategy asked for ready operators {self._idle_calls} times and ran none; {state}")

    def successors(self, task: Task) -> list[Task]:
        """List the operators of the same micro-batch that directly wait for `task`, in program order."""
        numbers = sorted(n for n in self._after[self._number(task)] if n % self.micro_batches == task.micro_batch)
        return [self._tasks[number] for number in numbers]

    def predecessors(self, task: Task) -> list[Task]:
        """List the operators that `task` directly waits for, in program order; some may be of other micro-batches."""
        return [self._tasks[number] for number in sorted(self._before[self._number(task)])]

    def execute(
        self,
        tasks: Task | Sequence[Task],
        stream: str | None = None,
        replace: str | Kernel | None = None,
    ) -> None:
        """Record `tasks`.

        - One task: it runs.
        - One operator of several adjacent micro-batches: it runs once, merged.
        - Several operators with `replace`: the kernel stands in for all of them. It gets the group's external inputs in
          order of first use. It returns the external outputs in order of production (`core.order.external_ports`), one
          bare or several as a tuple.
        - Several operators of one micro-batch without `replace`: one after the other.

        Args:
            tasks: one task or several, all of them ready, or ready once the others in `tasks` have run.
            stream: where to run them. The default is `NETWORK` for operators bound by the network, else `COMPUTE`.
            replace: a registered kernel's name, or a callable.

        Raises:
            ScheduleError: a task is not ready, or the group is none of the above.
        """
        tasks = [tasks] if isinstance(tasks, Task) else list(tasks)
        if not tasks:
            raise ScheduleError("execute() got no operators")
        numbers = {self._number(t) for t in tasks}
        names = sorted({t.name for t in tasks}, key=self._index.__getitem__)
        mbs = sorted({t.micro_batch for t in tasks})
        if not len(tasks) == len(numbers) == len(names) * len(mbs) or mbs != list(range(mbs[0], mbs[-1] + 1)):
            raise ScheduleError(
                f"cannot execute {[str(t) for t in tasks]} together: a group is every one of its operators for the "
                "same, adjacent micro-batches, each once"
            )
        if replace is None and len(names) > 1:
            if len(mbs) > 1:
                raise ScheduleError(f"merging several operators {names} needs replace=")
            for name in names:
                self._launch([name], mbs, stream, "")
            return
        self._launch(names, mbs, stream, self._kernel_name(replace))

    def _number(self, task: Task) -> int:
        if task.name not in self._index or not 0 <= task.micro_batch < self.micro_batches:
            raise ScheduleError(f"{task} is no task of this schedule")
        return self._index[task.name] * self.micro_batches + task.micro_batch

    def _kernel_name(self, replace: str | Kernel | None) -> str:
        if replace is None:
            return ""
        if isinstance(replace, str):
            name = replace
            self._named.add(name)
        else:
            name = getattr(replace, "__name__", type(replace).__name__)
            if self.kernels.setdefault(name, replace) is not replace:
                raise ScheduleError(f"two different kernels are called {name!r}: give each a __name__ of its own")
        if name in self._named and name in self.kernels:
            raise ScheduleError(f"kernel {name!r} is given as a name and as a callable: use one of the two")
        return name

    def _launch(self, names: list[str], mbs: list[int], stream: str | None, kernel: str) -> None:
        group = [self._index[name] * self.micro_batches + mb for name in names for mb in mbs]
        for number in group:
            self._check_ready(number, group)
        if len(mbs) > 1:
            self._check_mergeable(names)
        stream = stream or default_stream(self.program.by_name[name] for name in names)
        launch = Launch(stream, tuple(names), mbs[0], mbs[-1] + 1, kernel)
        self._follow_sums(launch)
        self.launches.append(launch)
        self._idle_calls = 0
        for number in group:
            self._finish(number)

    def _finish(self, number: int) -> None:
        if not self._waits_for[number]:
            for ready in (self._ready, self._ready_of[number % self.micro_batches]):
                del ready[bisect_left(ready, number)]
        self._done[number] = True
        self.unfinished -= 1
        for later in self._after[number]:
            self._waits_for[later] -= 1
            if not self._waits_for[later] and not self._done[later]:
                self._set_ready(later)

    def _set_ready(self, number: int) -> None:
        insort(self._ready, number)
        insort(self._ready_of[number % self.micro_batches], number)

    def _check_ready(self, number: int, group: Sequence[int]) -> None:
        if self._done[number]:
            raise ScheduleError(f"{self._tasks[number]} has been executed already")
        if not self._waits_for[number]:
            return
        if missing := sorted(n for n in self._before[number] if not self._done[n] and n not in group):
            waiting = ", ".join(str(self._tasks[n]) for n in missing)
            raise ScheduleError(f"{self._tasks[number]} is not ready: it needs {waiting} first")

    def _check_mergeable(self, names: list[str]) -> None:
        for name in names:
            op = self.program.by_name[name]
            if op.context:
                raise ScheduleError(f"{name} reads per-micro-batch context and cannot run merged")
            local = [v for v in (*op.inputs, *op.outputs) if self.program.values[v].scope is Scope.LOCAL]
            if local:
                raise ScheduleError(f"{name} cannot run merged: {local[0]} has no token axis")

    def _follow_sums(self, launch: Launch) -> None:
        """Note which PARTIAL values `launch` makes. Raises `ScheduleError` if it needs a part of a sum."""
        values, mbs = self.program.values, range(launch.start, launch.stop)
        inputs, outputs = external_ports(self.program, launch.operators)
        for key in ((v, mb) for v in inputs if values[v].scope is Scope.PARTIAL for mb in mbs):
            made = self._summed.get(key)
            if made and (made.start < launch.start or made.stop > launch.stop):
                whole, reader = Instance(key[0], made.start, made.stop), " + ".join(launch.operators)
                raise ScheduleError(
                    f"{reader} cannot run for {range_text(launch.start, launch.stop)}: {whole} is one sum over these "
                    f"micro-batches and cannot be cut. Execute {reader} for all of them together, or "
                    f"{made.operators[-1]} for one micro-batch at a time"
                )
        self._summed |= {(v, mb): launch for v in outputs if values[v].scope is Scope.PARTIAL for mb in mbs}
