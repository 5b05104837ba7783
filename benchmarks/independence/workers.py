"""Cases run in worker processes, which may die or hang without ending the run.

Contract
- Workers are forked after PyTorch and its samples are imported, so starting one is cheap. Each takes a chunk of tasks
  and ends, so that what Dynamo keeps in memory goes with it.
- A worker reports each part of a task as it begins and as it ends. One that is silent for `limit` seconds is killed.
- A worker ends by itself when the process that started it is gone.
- The part that was under way in a worker that died or was killed is reported as such; the task goes on after it.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

FORK = multiprocessing.get_context("fork")

# `work(task, skip)` yields (key, None) as a part begins and (key, result) as it ends; the first `skip` parts are left
# out, and numbered all the same.
Work = Callable[[Any, int], Iterator[tuple[Any, Any]]]


@dataclass
class _Worker:
    process: Any
    reports: Connection
    tasks: deque[tuple[Any, int]]
    begun: Any = None
    heard: float = field(default_factory=time.monotonic)
    ended_parts: int = 0


def run_tasks(
    tasks: Sequence[Any], work: Work, *, processes: int, chunk: int, limit: float
) -> Iterator[tuple[Any, Any, Any]]:
    """Run `work` on all tasks.

    Args:
        tasks: Each is handed to `work`, with the number of parts to leave out.
        work: What runs in a worker.
        processes: How many workers run at a time.
        chunk: How many tasks a worker takes.
        limit: The most seconds of one part.

    Yields:
        (task, key, result) for each part, where `result` is text if the worker died or was killed; and
        (task, None, None) at the end of each task.
    """
    waiting = deque((task, 0) for task in tasks)
    workers: list[_Worker] = []
    try:
        while waiting or workers:
            while waiting and len(workers) < processes:
                workers.append(_start([waiting.popleft() for _ in range(min(chunk, len(waiting)))], work))
            wait([w.reports for w in workers], timeout=1.0)
            for worker in list(workers):
                yield from _read(worker)
                text = _fate(worker, limit)
                if text is None:
                    continue
                workers.remove(worker)
                if worker.tasks:
                    task, skipped = worker.tasks.popleft()
                    if worker.begun is not None:
                        yield task, worker.begun, text
                    ended = skipped + worker.ended_parts + (worker.begun is not None)
                    waiting.extendleft(reversed([(task, ended), *worker.tasks]))
    finally:
        for worker in workers:
            worker.process.kill()


def _start(tasks: list[tuple[Any, int]], work: Work) -> _Worker:
    ours, theirs = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_serve, args=(tasks, work, theirs, os.getpid()), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours, deque(tasks))


def _serve(tasks: list[tuple[Any, int]], work: Work, reports: Connection, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        os.dup2(nowhere.fileno(), 2)  # warnings of C++ code
        for task, skip in tasks:
            for key, result in work(task, skip):
                if os.getppid() != parent:
                    return
                reports.send((key, result))
            reports.send(None)


def _read(worker: _Worker) -> Iterator[tuple[Any, Any, Any]]:
    try:
        while worker.reports.poll():
            report = worker.reports.recv()
            worker.heard = time.monotonic()
            if report is None:
                task, _ = worker.tasks.popleft()
                worker.ended_parts, worker.begun = 0, None
                yield task, None, None
                continue
            key, result = report
            if result is None:
                worker.begun = key
            else:
                worker.ended_parts, worker.begun = worker.ended_parts + 1, None
                yield worker.tasks[0][0], key, result
    except EOFError:
        worker.process.join()


def _fate(worker: _Worker, limit: float) -> str | None:
    """Return why a worker has ended, "" if it is done, or None if it works on."""
    if worker.process.exitcode is not None and not worker.reports.closed:
        if not worker.tasks:
            return ""
        return f"the process died: exit code {worker.process.exitcode}"
    if time.monotonic() - worker.heard > limit:
        worker.process.kill()
        worker.process.join()
        return f"timeout: silent for {limit:.0f} s"
    return None
