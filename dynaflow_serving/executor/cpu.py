"""Every extra stream is a worker thread; the compute stream stays on the caller's thread.

Contract
- A stream's actions run in order; an event is a lock that RECORD opens and WAIT passes. One hand-off per
  stream and run, not per operator.
- A worker runs in the caller's grad, inference and autocast mode and with its number of intra-op threads.
- An exception anywhere opens all events, so that every stream ends, and reaches the caller; the
  executor is usable afterwards.
- Not re-entrant: one run of an executor's plans at a time.
- Operators with context run on the compute stream only: engines keep the context in a global or per thread, and
  `enter` runs on the caller's. Anything else is a `ScheduleError` when the plan is bound.
- A plan with the compute stream only pays nothing for all this.
"""

from __future__ import annotations

import _thread
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue
from typing import Any

import torch

from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.config import ExecutorOptions
from dynaflow_serving.core.plan import COMPUTE_STREAM, Action, Plan
from dynaflow_serving.errors import ScheduleError
from dynaflow_serving.executor.base import BoundPlan, Executor
from dynaflow_serving.executor.codegen import Emitter
from dynaflow_serving.executor.tracing import Tracer


class Aborted(Exception):
    """Raised in a stream because another one failed."""


def event() -> _thread.LockType:
    lock = _thread.allocate_lock()
    lock.acquire()
    return lock


class Run:
    """One run of a plan: its events, and the streams that are still busy."""

    __slots__ = ("busy", "error", "events")

    def __init__(self, events: Sequence[_thread.LockType]) -> None:
        self.events = events
        self.error: BaseException | None = None
        self.busy: list[_thread.LockType] = []

    def wait(self, lock: _thread.LockType) -> None:
        lock.acquire()
        lock.release()  # others may wait for the same event
        if self.error is not None:
            raise Aborted

    def fail(self, error: BaseException) -> None:
        if self.error is None:
            self.error = error
        for lock in self.events:
            try:
                lock.release()
            except RuntimeError:  # it was open
                continue

    def finish(self) -> None:
        for lock in self.busy:
            lock.acquire()
        error, self.error = self.error, None  # a traceback that leads back to its own error is garbage for the gc
        try:
            if error is not None:
                raise error
        finally:
            del error


class Worker:
    """The thread of one stream. It ends when nothing refers to the Worker any more."""

    def __init__(self, stream: str) -> None:
        self.queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.threads = 0  # intra-op threads, as set in the worker; 0: not yet
        self.thread = threading.Thread(target=_work, args=(self.queue,), name=f"dynaflow-{stream}", daemon=True)
        self.thread.start()
        weakref.finalize(self, self.queue.put, None)

    def submit(self, run: Run, actions: Callable[[], None]) -> None:
        done = event()
        run.busy.append(done)
        grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        autocast, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        threads = torch.get_num_threads()

        def job() -> None:
            try:
                if self.threads != threads:
                    # OpenMP keeps the size of a team per thread, so it is set here, in the worker, whatever
                    # torch reports; of torch._C, for vLLM's CPU worker makes the public one a no-op.
                    torch._C.set_num_threads(threads)
                    self.threads = threads
                with torch.inference_mode(inference), torch.set_grad_enabled(grad):
                    if autocast:
                        with torch.autocast("cpu", dtype):
                            actions()
                    else:
                        actions()
            except BaseException as error:  # handed to the caller by Run.finish
                run.fail(error)
            finally:
                done.release()

        self.queue.put(job)

    def stop(self) -> None:
        self.queue.put(None)
        self.thread.join()


def _work(queue: SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := queue.get()) is not None:
        job()
        del job  # its closure holds the tensors of the run


class _ThreadEmitter(Emitter):
    """A nested function per extra stream; variables that several streams use are closure cells."""

    def record(self, action: Action) -> list[str]:
        return [f"e{action.event}.release()"]

    def wait(self, action: Action) -> list[str]:
        return [f"wait(e{action.event})"]

    def body(self) -> list[str]:
        blocks: dict[str, list[str]] = {s: [] for s in self.plan.streams}
        for i, action in enumerate(self.plan.actions):
            blocks[action.stream] += self.traced(i, action)
        if len(blocks) == 1:
            return blocks[COMPUTE_STREAM]
        events = [f"e{i}" for i in sorted({s.event for s in self.plan.actions if s.event >= 0})]
        shared = sorted(v for v in self.variables.values() if v not in self.arguments.values())
        self.names |= {"Run": Run, "event": event}
        lines = [f"{e} = event()" for e in events]
        lines += [f"run = Run([{', '.join(events)}])", "wait = run.wait"]
        lines += [f"{' = '.join(shared)} = None"] if shared else []
        extra = [s for s in blocks if s != COMPUTE_STREAM]
        for i, stream in enumerate(extra):
            assigned = [v for v in shared if any(_assigns(line, v) for line in blocks[stream])]
            lines += [f"def stream{i}():", *(f"    nonlocal {v}" for v in assigned)]
            lines += [f"    {line}" for line in blocks[stream]]
        lines += ["try:"]
        lines += [f"    w{i}.submit(run, stream{i})" for i in range(len(extra))]
        lines += [f"    {line}" for line in blocks[COMPUTE_STREAM]]
        return [*lines, "except BaseException as error:", "    run.fail(error)", "run.finish()"]


def _assigns(line: str, variable: str) -> bool:
    left, is_assignment, _ = line.rpartition(" = ")
    return bool(is_assignment) and variable in left.replace(" = ", ", ").split(", ")


class CPUExecutor(Executor):
    name = "cpu"

    def __init__(self, options: ExecutorOptions | None = None) -> None:
        super().__init__(options)
        self._workers: dict[str, Worker] = {}

    def _bind(
        self, capture: CapturedProgram, plan: Plan, kernels: Mapping[str, Callable[..., Any]], tracer: Tracer | None
    ) -> BoundPlan:
        for action in plan.actions:
            for name in action.operators:
                if action.stream != COMPUTE_STREAM and capture.program.by_name[name].context:
                    raise ScheduleError(
                        f"{name} reads the engine's per-micro-batch context, which the threads of executor 'cpu' do "
                        f"not share: schedule it on stream {COMPUTE_STREAM!r} (not {action.stream!r}), or use "
                        "executor: cuda or sequential"
                    )
        emitter = _ThreadEmitter(capture, plan, kernels)
        for i, stream in enumerate(s for s in plan.streams if s != COMPUTE_STREAM):
            if stream not in self._workers:
                self._workers[stream] = Worker(stream)
            emitter.names[f"w{i}"] = self._workers[stream]
        return emitter.build(tracer)

    def close(self) -> None:
        for worker in self._workers.values():
            worker.stop()
        self._workers.clear()
