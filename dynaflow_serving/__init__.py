"""dynaflow_serving: programmable operator schedules inside LLM serving engines.

Contract
- Importing this package imports nothing else: an engine's plug-in costs nothing in processes that do not ask for it.
  A public name is imported from its module when it is first used (PEP 562).
- The engines are imported inside functions only.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynaflow_serving.capture.independence import row_wise
    from dynaflow_serving.capture.mark import mark
    from dynaflow_serving.config import Config, load
    from dynaflow_serving.core.batch import Batch, MicroBatch, Split
    from dynaflow_serving.core.plan import Plan
    from dynaflow_serving.core.program import Operator, Program, Resource
    from dynaflow_serving.errors import DynaflowError, InactiveError, PlanError
    from dynaflow_serving.planning.verify import verify
    from dynaflow_serving.strategy.base import OpScheduler, Options, SplitOptions
    from dynaflow_serving.strategy.registry import register_strategy
    from dynaflow_serving.strategy.rules import SplitFunc, SplitModule
    from dynaflow_serving.strategy.schedule import Schedule, Task
    from dynaflow_serving.strategy.splitting import (
        cut_at_requests,
        cut_at_tokens,
        cut_evenly,
        cut_prefill_decode,
        whole,
    )
    from dynaflow_serving.strategy.streams import COMPUTE, NETWORK
    from dynaflow_serving.strategy.tags import Tag, TagUse
    from dynaflow_serving.torch_backend import compile

    __version__: str

# Module -> the public names that are in it.
_PUBLIC = {
    "capture.independence": ("row_wise",),
    "capture.mark": ("mark",),
    "config": ("Config", "load"),
    "core.batch": ("Batch", "MicroBatch", "Split"),
    "core.plan": ("Plan",),
    "core.program": ("Operator", "Program", "Resource"),
    "errors": ("DynaflowError", "InactiveError", "PlanError"),
    "planning.verify": ("verify",),
    "strategy.base": ("OpScheduler", "Options", "SplitOptions"),
    "strategy.registry": ("register_strategy",),
    "strategy.rules": ("SplitFunc", "SplitModule"),
    "strategy.schedule": ("Schedule", "Task"),
    "strategy.splitting": ("cut_at_requests", "cut_at_tokens", "cut_evenly", "cut_prefill_decode", "whole"),
    "strategy.streams": ("COMPUTE", "NETWORK"),
    "strategy.tags": ("Tag", "TagUse"),
    "torch_backend": ("compile",),
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = [
    "COMPUTE", "NETWORK", "Batch", "Config", "DynaflowError", "InactiveError", "MicroBatch", "OpScheduler", "Operator",
    "Options", "Plan", "PlanError", "Program", "Resource", "Schedule", "Split", "SplitFunc", "SplitModule",
    "SplitOptions", "Tag", "TagUse", "Task", "compile", "cut_at_requests", "cut_at_tokens", "cut_evenly",
    "cut_prefill_decode", "load", "mark", "register_strategy", "row_wise", "verify", "whole",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("dynaflow-serving")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF, "__version__"})
