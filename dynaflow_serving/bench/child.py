"""The child process: an engine, a rank or a load generator, driven by messages.

Contract
- `python -m dynaflow_serving.bench.child FD KIND CLASS` answers each JSON request on the socket FD with one JSON reply:
  `{"result": ...}` or `{"error": {"type", "message", "expected"}}`; `expected` is true for a `DynaflowError`.
- KIND is a key of `KINDS`, and CLASS the `module:class` that it drives.
- stdout and stderr belong to what is driven and go to its log.
- The child ends, and what it drives with it, when the parent says `close` or goes away.
- Seconds are those of the work alone: they contain neither the start nor the pipe.
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

from dynaflow_serving.bench.drivers import EngineDriver, load, load_driver
from dynaflow_serving.bench.settings import EngineSettings, Request
from dynaflow_serving.errors import DynaflowError

Actions = dict[str, Callable[..., Any]]


def main() -> None:
    """Serve the parent on the socket with what the arguments name."""
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)  # a worker of the engine that outlives us must not hold the pipe open
    serve(Connection(descriptor), KINDS[sys.argv[2]](sys.argv[3]))


def serve(pipe: Connection, actions: Actions) -> None:
    """Answer requests until the parent says `close` or goes away."""
    while True:
        try:
            message = json.loads(pipe.recv_bytes())
        except EOFError:  # the parent is gone
            actions["close"]()
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


def engine_actions(path: str) -> Actions:
    """Return the actions of an `EngineDriver`."""
    driver = load_driver(path)
    return {
        "start": lambda **settings: asdict(driver.start(EngineSettings(**settings))),
        "generate": lambda requests: _timed(driver, [Request(**r) for r in requests]),
        "report": driver.report,
        "reset": driver.reset,
        "close": driver.close,
    }


def rank_actions(path: str) -> Actions:
    """Return the actions of a rank of a `Workload`."""
    from dynaflow_serving.bench.rank import Rank

    rank = Rank(load(path))
    return {
        "start": rank.start, "tune": rank.tune, "run": rank.run, "alone": rank.alone, "steps": rank.steps,
        "details": rank.details, "close": rank.close,
    }  # fmt: skip


def client_actions(path: str) -> Actions:
    """Return the actions of the load generator of a `ServingTool`, which is imported once for all passes."""
    tool = load(path)()
    return {"run": tool.run_client, "close": lambda: None}


def replay_actions(path: str) -> Actions:
    """Return the actions of a rank that sends noted messages again."""
    from dynaflow_serving.bench.muted import Replay

    replay = Replay()
    return {"start": replay.start, "run": replay.run, "close": replay.close}


def _timed(driver: EngineDriver, requests: list[Request]) -> dict[str, Any]:
    start = time.perf_counter()
    tokens = driver.generate(requests)
    return {"seconds": time.perf_counter() - start, "tokens": tokens}


KINDS: dict[str, Callable[[str], Actions]] = {
    "engine": engine_actions, "rank": rank_actions, "client": client_actions,
    "replay": replay_actions,
}  # fmt: skip


if __name__ == "__main__":
    main()
