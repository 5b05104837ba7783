"""The worker's counters appear on vLLM's own `/metrics`.

Contract
- The first rank's worker, of data-parallel ranks too, writes its `dynaflow_*` metrics to a file, at most once a second,
  and at once on a report.
- The process that parsed the arguments reads the file whenever vLLM's registry is asked for its metrics.
- An environment variable holds the path of the file, so vLLM's compile hash and the policy's key do not see it.
- No file is written where the counters are on the endpoint anyway. That is so with the worker in the same process, and
  with several API servers (`--api-server-count`), which use Prometheus' multiprocess mode.
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
    """This Prometheus collector yields the metrics that the worker has written last."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="dynaflow-metrics-")  # removed at exit
        self.file = Path(self._folder.name, "worker.prom")
        self.process = os.getpid()

    def describe(self) -> list[Any]:
        return []  # without this method, the registry would collect now, before there is a worker

    def collect(self) -> Iterator[Any]:
        from prometheus_client.parser import text_string_to_metric_families

        try:
            text = self.file.read_text()
        except FileNotFoundError:
            return
        yield from text_string_to_metric_families(text)


def attach() -> None:
    """Serve the metrics that a worker will write; the process that parses the arguments calls this, even repeatedly."""
    global _serving
    if MULTIPROCESS in os.environ:
        return
    if _serving is None or _serving.process != os.getpid():
        from prometheus_client import REGISTRY

        _serving = _Reader()
        REGISTRY.register(_serving)
    _serving.file.unlink(missing_ok=True)  # an earlier engine's counters; the next one starts anew
    os.environ[VARIABLE] = str(_serving.file)


class Writer(Observer):
    """This observer writes the metrics of one worker to a file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._waiting = False
        self._lock = threading.Lock()

    def left(self) -> None:
        """Write the metrics within `PERIOD`, on another thread."""
        if not self._waiting:
            self._waiting = True
            timer = threading.Timer(PERIOD, self.write)
            timer.daemon = True
            timer.start()

    def write(self) -> None:
        """Write the metrics now."""
        from prometheus_client import write_to_textfile

        from dynaflow_serving.session.metrics import registry

        self._waiting = False
        with self._lock:  # a report may come while the timer writes
            if self.file.parent.is_dir():  # the server removes the folder when it ends
                write_to_textfile(str(self.file), registry())


def writer(rank: int) -> Writer | None:
    """Return the writer for the worker of `rank`, or None where no file is needed."""
    file = os.environ.get(VARIABLE)
    same_process = _serving is not None and _serving.process == os.getpid()
    if rank != 0 or file is None or same_process or MULTIPROCESS in os.environ:
        return None
    return Writer(Path(file))
