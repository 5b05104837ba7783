"""Every extra stream is a worker thread; the compute stream stays on the caller's thread.

Contract
- A stream's actions run in order; an event is a lock that RECORD opens and WAIT passes. There is one hand-off
  per stream and run, not per operator.
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
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

import torch

from dynaflow_serving.capture.eager.gradients import Submit
from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.config import ExecutorOptions
from dynaflow_serving.core.plan import COMPUTE_STREAM, Action, Plan
from dynaflow_serving.errors import ScheduleError
from dynaflow_serving.executor.base import BoundPlan, Executor
from dynaflow_serving.executor.codegen import Emitter
from dynaflow_serving.executor.tracing import Tracer


class Aborted(Exception):
    """Raised in a stream because another one failed."""


def closed_event() -> _thread.LockType:
    """An event that is not recorded yet: a lock that is taken."""
    lock = _thread.allocate_lock()
    lock.acquire()
    return lock


class PlanRun:
    """One run of a plan: its events, and the streams that are still busy."""

    __slots__ = ("busy", "error", "events")

    def __init__(self, events: Sequence[_thread.LockType]) -> None:
        self.events = events
        self.error: BaseException | None = None
        self.busy: list[_thread.LockType] = []

    def wait(self, event: _thread.LockType) -> None:
        event.acquire()
        event.release()  # others may wait for it too
        if self.error is not None:
            raise Aborted

    def fail(self, error: BaseException) -> None:
        """Keep the first error, and open all events so that every stream goes on to its end."""
        if self.error is None:
            self.error = error
        for event in self.events:
            try:
                event.release()
            except RuntimeError:  # it was open
                continue

    def finish(self) -> None:
        """Wait for all streams, and raise what one of them raised."""
        for done in self.busy:
            done.acquire()
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
        self.thread = threading.Thread(target=_run_jobs, args=(self.queue,), name=f"dynaflow-{stream}", daemon=True)
        self.thread.start()
        weakref.finalize(self, self.queue.put, None)

    def submit(self, run: PlanRun, actions: Callable[[], None]) -> None:
        """Run `actions` on this thread, in the modes of the calling one."""
        done = closed_event()
        run.busy.append(done)
        grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        autocast, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        threads = torch.get_num_threads()

        def job() -> None:
            try:
                if self.threads != threads:
                    # OpenMP keeps the size of a team per thread, so it is set here, in the worker, whatever torch
                    # reports. It is the function of torch._C because vLLM's CPU worker makes the public one a no-op.
                    torch._C.set_num_threads(threads)
                    self.threads = threads
                with torch.inference_mode(inference), torch.set_grad_enabled(grad):
                    if autocast:
                        with torch.autocast("cpu", dtype):
                            actions()
                    else:
                        actions()
            except BaseException as error:  # handed to the caller by PlanRun.finish
                run.fail(error)
            finally:
                done.release()

        self.queue.put(job)

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Run `function` on this thread, after what was submitted before; exceptions are the Future's."""
        done: Future[Any] = Future()

        def job() -> None:
            try:
                done.set_result(function())
            except BaseException as error:  # handed to whoever asks for the result
                done.set_exception(error)

        self.queue.put(job)
        return done

    def stop(self) -> None:
        self.queue.put(None)
        self.thread.join()


def _run_jobs(queue: SimpleQueue[Callable[[], None] | None]) -> None:
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
            blocks[action.stream] += self.timed_lines(i, action)
        if len(blocks) == 1:
            return blocks[COMPUTE_STREAM]
        compute = blocks.pop(COMPUTE_STREAM)
        lines = self._shared_names()
        for i, (stream, block) in enumerate(blocks.items()):
            lines.append(f"def stream{i}():")
            if assigned := _by_number(self.assigned[stream]):
                lines.append(f"    nonlocal {', '.join(assigned)}")
            lines += [f"    {line}" for line in block]
        lines.append("try:")
        lines += [f"    w{i}.submit(run, stream{i})" for i in range(len(blocks))]
        lines += [f"    {line}" for line in compute]
        return [*lines, "except BaseException as error:", "    run.fail(error)", "run.finish()"]

    def _shared_names(self) -> list[str]:
        """The events, the run, and the variables that the nested functions assign or read."""
        self.globals |= {"PlanRun": PlanRun, "closed_event": closed_event}
        events = [f"e{i}" for i in sorted({a.event for a in self.plan.actions if a.event >= 0})]
        lines = [f"{e} = closed_event()" for e in events]
        lines += [f"run = PlanRun([{', '.join(events)}])", "wait = run.wait"]
        if variables := _by_number(set(self.variables.values()) - set(self.arguments.values())):
            lines.append(f"{' = '.join(variables)} = None")
        return lines


def _by_number(variables: set[str]) -> list[str]:
    """The variables in the order of their numbers: v2 before v10."""
    return sorted(variables, key=lambda v: int(v[1:]))


class CPUExecutor(Executor):
    name = "cpu"

    def __init__(self, options: ExecutorOptions | None = None) -> None:
        super().__init__(options)
        self._workers: dict[str, Worker] = {}

    def _bind(
        self, captured: CapturedProgram, plan: Plan, kernels: Mapping[str, Callable[..., Any]], tracer: Tracer | None
    ) -> BoundPlan:
        for action in plan.actions:
            for name in action.operators:
                if action.stream != COMPUTE_STREAM and captured.program.by_name[name].context:
                    raise ScheduleError(
                        f"{name} reads the engine's per-micro-batch context, which the threads of executor 'cpu' do "
                        f"not share: schedule it on stream {COMPUTE_STREAM!r} (not {action.stream!r}), or use "
                        "executor: cuda or sequential"
                    )
        emitter = _ThreadEmitter(captured, plan, kernels)
        for i, stream in enumerate(s for s in plan.streams if s != COMPUTE_STREAM):
            emitter.globals[f"w{i}"] = self._worker(stream)
        return emitter.bind(tracer)

    def submit_to(self, stream: str) -> Submit:
        return self._worker(stream).call

    def _worker(self, stream: str) -> Worker:
        if stream not in self._workers:
            self._workers[stream] = Worker(stream)
        return self._workers[stream]

    def close(self) -> None:
        for worker in self._workers.values():
            worker.stop()
        self._workers.clear()
