"""The worker's counters on vLLM's own `/metrics`.

Contract
- The first rank's worker writes its `dynaflow_*` metrics to a file, at most once a second, and at once on a report;
  the process that parsed the arguments serves them from the registry that vLLM serves, while it is asked for them.
- Where the file is travels in an environment variable: vLLM's compile hash and the policy's key do not see it.
- With the worker in the same process, and with several API servers (`--api-server-count`: vLLM's are then in
  Prometheus' multiprocess mode), the counters are on the endpoint as they are, and no file is written.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dynaflow_serving.session.observers import Observer

VARIABLE = "DYNAFLOW_METRICS_FILE"
MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"
PERIOD = 1.0  # seconds between two writes

_serving: _Reader | None = None


class _Reader:
    """A Prometheus collector: what the worker has written last."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="dynaflow-metrics-")  # removed at exit
        self.file = Path(self._folder.name, "worker.prom")
        self.process = os.getpid()

    def describe(self) -> list[Any]:
        return []  # or the registry would ask now, before there is a worker

    def collect(self) -> Iterator[Any]:
        from prometheus_client.parser import text_string_to_metric_families

        try:
            text = self.file.read_text()
        except FileNotFoundError:
            return
        yield from text_string_to_metric_families(text)


def attach() -> None:
    """In the process that parses the arguments: serve what a worker will write. Idempotent."""
    global _serving
    if MULTIPROCESS in os.environ:
        return
    if _serving is None or _serving.process != os.getpid():
        from prometheus_client import REGISTRY

        _serving = _Reader()
        REGISTRY.register(_serving)
    _serving.file.unlink(missing_ok=True)  # of an engine that was here before: counters of the next one start anew
    os.environ[VARIABLE] = str(_serving.file)


class Writer(Observer):
    """Writes the metrics of one worker."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._waiting = False
        self._lock = threading.Lock()

    def left(self) -> None:
        """What the step has counted is in the file within `PERIOD`."""
        if not self._waiting:
            self._waiting = True
            timer = threading.Timer(PERIOD, self.write)
            timer.daemon = True
            timer.start()

    def write(self) -> None:
        from prometheus_client import write_to_textfile

        from dynaflow_serving.session.metrics import registry

        self._waiting = False
        with self._lock:  # a report may come while the timer writes
            if self.file.parent.is_dir():  # not if the server is gone already
                write_to_textfile(str(self.file), registry())


def writer(rank: int) -> Writer | None:
    """For the worker of `rank`; None where it has nothing to write."""
    file = os.environ.get(VARIABLE)
    same_process = _serving is not None and _serving.process == os.getpid()
    if rank != 0 or file is None or same_process or MULTIPROCESS in os.environ:
        return None
    return Writer(Path(file))
