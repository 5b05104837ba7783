"""One HTTP server in a process group of its own, and commands that run beside it.

Contract
- A `Server` is healthy once `wait` returns. If it ends or is not healthy in time, `wait` raises an
  `EngineProcessError` that shows its log.
- `stop` leaves no process behind, whatever state the server is in; `terminated_as_exit` brings a SIGTERM to it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from dynaflow_serving.bench.process import EngineProcessError, end_group, excerpt, how_it_ended
from dynaflow_serving.bench.serving.tool import HOST

START_SECONDS = 1800.0  # a large model loads and compiles for many minutes
STOP_SECONDS = 20.0
ANSWER_SECONDS = 30.0


@contextlib.contextmanager
def terminated_as_exit() -> Iterator[None]:
    """Let SIGTERM unwind as an exception does; servers have process groups of their own and would live on."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def free_port(address: str = HOST) -> int:
    """Return a port of an address of this machine on which nothing listens."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """An HTTP server, started at once.

    Args:
        name: The server's name in messages.
        command: Its command line.
        port: The port that the command makes it listen on.
        environment: The variables to add to this process's environment.
        log: The file for its output.
    """

    def __init__(self, name: str, command: Sequence[str], port: int, environment: Mapping[str, str], log: Path) -> None:
        self.name, self.command, self.port, self.log = name, list(command), port, log
        self.url = f"http://{HOST}:{port}"
        self._process = _start(command, environment, log)

    def wait(self, seconds: float = START_SECONDS, path: str = "/health", besides: Sequence[Server] = ()) -> None:
        """Wait until the server answers at `path`, by default that it is healthy.

        Args:
            seconds: So long at most.
            path: Where it has to answer.
            besides: Servers on other nodes without which it never answers.

        Raises:
            EngineProcessError: One of the servers ended, or this one did not answer within `seconds`.
        """
        end = time.monotonic() + seconds
        while True:
            for server in (self, *besides):
                server.assert_alive(" before it was healthy")
            with contextlib.suppress(OSError):  # not listening yet, or not healthy yet
                self.get(path)
                return
            if time.monotonic() > end:
                raise EngineProcessError(
                    f"the server {self.name} was not healthy within {seconds:.0f} s.\n{excerpt(self.log)}"
                )
            time.sleep(0.5)

    def assert_alive(self, when: str = "") -> None:
        """Check that the server runs.

        Raises:
            EngineProcessError: It has ended; the message says so, with `when`, and shows its log.
        """
        if self._process.poll() is not None:
            how = how_it_ended(self._process)
            raise EngineProcessError(f"the server {self.name} {how}{when}.\n{excerpt(self.log)}")

    def metrics(self) -> str:
        """Return the Prometheus text of /metrics.

        Raises:
            EngineProcessError: The server does not answer.
        """
        try:
            return self.get("/metrics")
        except OSError as e:
            raise EngineProcessError(
                f"the server {self.name} does not answer at /metrics ({e}), from which it is known what DynaFlow did.\n"
                f"{excerpt(self.log)}"
            ) from None

    def terminate(self) -> None:
        """Ask the server to end, without waiting for it."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def stop(self) -> None:
        """Ask the server to end, then end it by force."""
        if self._process.poll() is None:
            self.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
        end_group(self._process)

    def get(self, path: str) -> str:
        """Return the text at `path`.

        Raises:
            OSError: There is no answer.
        """
        with urllib.request.urlopen(self.url + path, timeout=ANSWER_SECONDS) as reply:
            return str(reply.read().decode())


def run_beside(name: str, command: Sequence[str], environment: Mapping[str, str], log: Path, seconds: float) -> None:
    """Run a command to its end.

    Raises:
        EngineProcessError: The command failed or took longer than `seconds`.
    """
    process = _start(command, environment, log)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        raise EngineProcessError(f"{name} did not end within {seconds:.0f} s.\n{excerpt(log)}") from None
    finally:
        end_group(process)
    if process.returncode:
        raise EngineProcessError(f"{name} {how_it_ended(process)}.\n{excerpt(log)}")


def _start(command: Sequence[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        return subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
