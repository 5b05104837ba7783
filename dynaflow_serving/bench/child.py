"""The child process: one engine, driven by messages.

Contract
- `python -m dynaflow_serving.bench.child FD DRIVER` answers each JSON request on the socket FD with one JSON reply:
  `{"result": ...}` or `{"error": {"type", "message", "expected"}}`; `expected` is true for a `DynaflowError`.
- stdout and stderr belong to the engine and go to its log.
- The child ends, and its engine with it, when the parent says `close` or goes away.
- The seconds are those of `generate` alone: they contain neither the start nor the pipe.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

from dynaflow_serving.bench.drivers import EngineDriver, load_driver
from dynaflow_serving.bench.settings import EngineSettings, Request
from dynaflow_serving.errors import DynaflowError


def main() -> None:
    """Serve the parent on the socket and with the driver that the arguments name."""
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)  # a worker of the engine that outlives us must not hold the pipe open
    serve(Connection(descriptor), load_driver(sys.argv[2]))


def serve(pipe: Connection, driver: EngineDriver) -> None:
    """Answer requests until the parent says `close` or goes away."""
    actions: dict[str, Callable[..., Any]] = {
        "start": lambda **settings: asdict(driver.start(EngineSettings(**settings))),
        "generate": lambda requests: _timed(driver, [Request(**r) for r in requests]),
        "report": driver.report,
        "reset": driver.reset,
        "close": driver.close,
    }
    while True:
        try:
            message = json.loads(pipe.recv_bytes())
        except EOFError:  # the parent is gone
            driver.close()
            return
        try:
            reply = {"result": actions[message["action"]](**message["arguments"])}
        except Exception as e:
            traceback.print_exc()
            sys.stderr.flush()
            expected = isinstance(e, DynaflowError)
            reply = {"error": {"type": type(e).__name__, "message": str(e), "expected": expected}}
        pipe.send_bytes(json.dumps(reply).encode())
        if message["action"] == "close":
            return


def _timed(driver: EngineDriver, requests: list[Request]) -> dict[str, Any]:
    start = time.perf_counter()
    tokens = driver.generate(requests)
    return {"seconds": time.perf_counter() - start, "tokens": tokens}


if __name__ == "__main__":
    main()
