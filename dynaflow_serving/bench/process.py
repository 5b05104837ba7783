"""The parent's side of a child process.

Contract
- A method returns the engine's answer, or raises an `EngineProcessError` that names the log file and shows its first
  errors and last lines.
- A child that dies is noticed at once, also while workers of its engine hold the pipe.
- `close` leaves no process behind: the child has a process group of its own, which is killed if it lingers.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from dynaflow_serving.bench.drivers import EngineInfo
from dynaflow_serving.bench.settings import EngineSettings, Request
from dynaflow_serving.errors import DynaflowError
from dynaflow_serving.session.report import WorkerReport

LOG_LINES, LOG_ERRORS = 15, 3
ERROR = re.compile(r"\w(Error|Exception): .")
CLOSE_SECONDS = 20.0
LOOK_SECONDS = 0.2  # so often it is looked whether a child is alive
DEATH_SECONDS = 2.0  # so long a process may take to end; those that wait for it learn of it before its parent does


class EngineProcessError(DynaflowError):
    """An engine's child process failed or died."""


def here(*words: str) -> list[str]:
    """Return the command that runs `words` on this node."""
    return list(words)


Placed = Callable[..., list[str]]


class ChildProcess:
    """A child process that answers requests (`child`)."""

    def __init__(
        self,
        name: str,
        kind: str,
        driven: str,
        environment: Mapping[str, str],
        log: Path,
        placed: Placed = here,
    ) -> None:
        """Start the process.

        Args:
            name: What messages call it.
            kind: A key of `child.KINDS`.
            driven: The `module:class` that it drives.
            environment: The variables to add to this process's.
            log: The file for its output.
            placed: Returns the command that runs a command in another place, such as a node of a link.
        """
        self.name, self.log = name, log
        self._hint = f" (engine log: {log})" if kind == "engine" else ""  # where more is to be found about an error
        log.parent.mkdir(parents=True, exist_ok=True)
        self._pipe, theirs = multiprocessing.Pipe()
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                placed(sys.executable, "-m", "dynaflow_serving.bench.child", str(theirs.fileno()), kind, driven),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # its own group: one signal reaches the engine's workers too
            )
        theirs.close()

    @property
    def pipe(self) -> Connection:
        """What the answers come from, to wait for several children at once."""
        return self._pipe

    def close(self) -> None:
        """Ask the child to end its engine and itself; end both if they linger."""
        if self._process.poll() is None:
            self.tell("close")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(CLOSE_SECONDS)
        self.kill()

    def kill(self) -> None:
        """End the child and all that it started, at once."""
        end_group(self._process)
        self._pipe.close()

    def ask(self, action: str, **arguments: Any) -> Any:
        """Send a request, and return the answer to it."""
        self.tell(action, **arguments)
        return self.answer(action)

    def tell(self, action: str, **arguments: Any) -> None:
        """Send a request. `answer` returns the answer to it, in the same order."""
        with contextlib.suppress(OSError):  # a child that is gone is found by `answer`
            self._pipe.send_bytes(json.dumps({"action": action, "arguments": arguments}).encode())

    def answered(self, seconds: float = 0.0) -> bool:
        """Wait so long at most, and return whether `answer` need not wait: it is there, or the child is gone."""
        return self._pipe.poll(seconds) or self._process.poll() is not None

    def gone(self) -> bool:
        """Wait for the child to end if it is about to, and return whether it has."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(DEATH_SECONDS)
        return self._process.poll() is not None

    def answer(self, action: str) -> Any:
        """Return the answer to a request, or raise the error that it says.

        Raises:
            EngineProcessError: The child could not do it, or is gone.
        """
        try:
            # The pipe alone would not do: it stays open while any worker of a dead child has it.
            while not self._pipe.poll(LOOK_SECONDS):
                if self._process.poll() is not None and not self._pipe.poll(0):
                    raise EOFError
            reply = json.loads(self._pipe.recv_bytes())
        except (EOFError, OSError):
            how = how_it_ended(self._process)
            raise EngineProcessError(
                f"the process of {self.name} {how} during {action!r}.\n{excerpt(self.log)}"
            ) from None
        if "error" in reply:
            error = reply["error"]
            if error["expected"]:
                raise EngineProcessError(f"{self.name}: {error['message']}{self._hint}")
            what = f"{self.name} could not {action}: {error['type']}: {error['message']}"
            raise EngineProcessError(f"{what}\n{excerpt(self.log)}")
        return reply["result"]


class EngineProcess(ChildProcess):
    """One engine in a child process."""

    def __init__(self, name: str, driver: str, environment: Mapping[str, str], log: Path) -> None:
        super().__init__(name, "engine", driver, environment, log)

    def start(self, settings: EngineSettings) -> EngineInfo:
        """Start the engine; return when it can serve."""
        return EngineInfo(**self.ask("start", **asdict(settings)))

    def generate(self, requests: list[Request]) -> tuple[float, list[list[int]]]:
        """Run the requests; return the seconds that took, and the new tokens of each request."""
        reply = self.ask("generate", requests=[asdict(r) for r in requests])
        return reply["seconds"], reply["tokens"]

    def report(self) -> list[WorkerReport]:
        """Return the report of every rank, rank 0's first."""
        return [WorkerReport.model_validate(content) for content in self.ask("report")]

    def reset(self) -> None:
        """Zero the counters of the report."""
        self.ask("reset")


def ask_all(processes: Sequence[ChildProcess], action: str, **arguments: Any) -> list[Any]:
    """Send a request to all processes, and return their answers.

    They may wait for one another: an error, or the end of one of them, is raised at once. If one has ended, that is
    what is raised: the errors of the others follow from it.
    """
    for process in processes:
        process.tell(action, **arguments)
    answers: dict[ChildProcess, Any] = {}
    while waiting := [process for process in processes if process not in answers]:
        wait([process.pipe for process in waiting], LOOK_SECONDS)
        try:
            answers |= {process: process.answer(action) for process in waiting if process.answered()}
        except EngineProcessError:
            for process in filter(ChildProcess.gone, waiting):
                process.answer(action)
            raise
    return [answers[process] for process in processes]


def how_it_ended(process: subprocess.Popen[bytes]) -> str:
    """Say in words how a process ended; wait a little for one that is about to end."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
    code = process.poll()
    return f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a group of its own, and all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def excerpt(log: Path) -> str:
    """Return where the log is, its first errors and its last lines; the root cause is often far above the end."""
    lines = [line.rstrip() for line in log.read_text(errors="replace").splitlines()] or ["(empty)"]
    errors = list(dict.fromkeys(line.strip() for line in lines[:-LOG_LINES] if ERROR.search(line)))[:LOG_ERRORS]
    parts = [f"Log: {log}"]
    if errors:
        parts += ["Its first errors:", *(f"    {line}" for line in errors)]
    parts += ["Its last lines:", *(f"    {line}" for line in lines[-LOG_LINES:])]
    return "\n".join(parts)
