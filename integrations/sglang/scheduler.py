"""`enter` puts scheduler processes under DynaFlow, and lets the parent check that all of them are.

Contract
- SGLang publishes its arguments early in every process, where `plugin` calls `enter`. Errors raised there end the
  process, while errors of plugins are logged and swallowed.
- Only then are SGLang's classes changed, and only in the processes that need it.
- A scheduler reports ready after the ranks have agreed on their plans, the policy has decided (`strategy: auto`), and
  splits have been compared. It then names its strategy, or "" if the config let it fall back. The parent refuses to go
  on if one says nothing.
- `dynaflow_report` and `dynaflow_reset` are for `Engine.collective_rpc`. This brings back no result, so a report goes
  to a file per rank. `/server_info` shows rank 0's counts among its internal states.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dynaflow_serving.errors import DynaflowError, InactiveError
from dynaflow_serving.integrations.base import KEY
from dynaflow_serving.integrations.sglang.server_args import active_config

logger = logging.getLogger("sglang.dynaflow")


def enter(server_args: Any, role: str) -> None:
    """Change SGLang's classes in this process, if its `role` (SGLang's name for it) needs that."""
    active = active_config(server_args) is not None
    if role == "scheduler" and active:
        _enter_scheduler()
    elif role == "tokenizer" and (active or _parent is not None):
        _enter_parent(server_args)


def _enter_scheduler() -> None:
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.model_executor.model_runner import ModelRunner

    if hasattr(Scheduler, "dynaflow_report"):
        return
    Scheduler.dynaflow_report, Scheduler.dynaflow_reset = _report, _reset
    ModelRunner.load_model = _then(ModelRunner.load_model, _loaded)
    Scheduler.get_init_info = _then(Scheduler.get_init_info, _ready)
    Scheduler.get_internal_state = _then(Scheduler.get_internal_state, _state)


def _then(method: Callable[..., Any], after: Callable[[Any, Any], None]) -> Callable[..., Any]:
    """Return a method that calls `method`, then `after(result, self)`."""

    @functools.wraps(method)
    def both(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        after(result, self)
        return result

    return both


def _loaded(_: None, runner: Any) -> None:
    from dynaflow_serving.integrations.sglang.runner import DynaflowRunner

    config = active_config(runner.server_args)
    if config is None:  # the process now runs another, stock engine
        return
    try:
        DynaflowRunner(runner, config).install()
    except DynaflowError as error:
        if not config.fallback:
            raise
        logger.warning("DynaFlow is NOT active, SGLang runs as it is (fallback: true): %s", error)


def _ready(info: dict[str, Any], scheduler: Any) -> None:
    config = active_config(scheduler.server_args)
    if config is None:
        return
    ours = _runner_of(scheduler)
    try:
        if ours is not None:
            ours.check(scheduler.tp_cpu_group)
            ours.start(scheduler.tree_cache)
    except DynaflowError as error:
        ours.session.retire(error)
    if ours is not None and ours.session.retired:
        ours.remove()
        ours = None
    info[KEY] = "" if ours is None else config.strategy


def _runner_of(scheduler: Any) -> Any:
    """Return the scheduler's DynaflowRunner, or None where it has a stock runner."""
    return getattr(scheduler.tp_worker.model_runner, "dynaflow", None)


def _state(output: Any, scheduler: Any) -> None:
    if (ours := _runner_of(scheduler)) is not None:
        state = ours.session.report().model_dump(include={"strategy", "mode", "steps", "plan_hash"})
        output.internal_state[KEY] = state | {"policy": ours.decided()}


def _report(scheduler: Any, folder: str) -> None:
    from sglang.srt.runtime_context import get_parallel

    path = Path(folder) / f"rank{get_parallel().tp_rank}.json"
    path.write_text(_runner_of(scheduler).session.report().model_dump_json())


def _reset(scheduler: Any) -> None:
    _runner_of(scheduler).session.reset()


_parent: Any = None  # the arguments of the engine that this process starts, or has started last


def _enter_parent(server_args: Any) -> None:
    """Check the answers of the schedulers when they are ready."""
    global _parent
    from sglang.srt.entrypoints import engine

    if _parent is None:
        engine._wait_for_scheduler_ready = _and_look(engine._wait_for_scheduler_ready)
    _parent = server_args


def _and_look(wait: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(wait)
    def wait_and_look(*args: Any, **kwargs: Any) -> Any:
        infos = wait(*args, **kwargs)
        missing = [rank for rank, info in enumerate(infos) if KEY not in info]
        if missing and active_config(_parent) is not None:
            cause = (
                f"DynaFlow was requested, but the scheduler processes {missing} run without it: SGLang logs errors of "
                "plugins and goes on; look for 'plugin dynaflow' in the log above"
            )
            raise SystemExit(f"dynaflow: error: {cause}") if _parent._dynaflow_cli else InactiveError(cause)
        return infos

    return wait_and_look
