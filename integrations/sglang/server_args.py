"""`activate` turns the user's flag into checked ServerArgs, in the process that parses the arguments.

Contract
- `--dynaflow PATH|NAME`, and the key `dynaflow` of `--json-model-override-args` (the way for `sglang.Engine`), are the
  same. The checked content of the config becomes `server_args._dynaflow`, which SGLang pickles to every process.
- SGLang resolves all its arguments as it always does, and then `limits` checks them. If DynaFlow cannot be active,
  `InactiveError` is raised here, before a process is started or a weight is loaded.
- On the command line an error is one paragraph and exit code 1. With `fallback: true` it is a warning, and SGLang runs
  as it is.
- One resolved setting is changed: the kernel that fuses all-reduce, residual add and norm is off. Its all-reduce could
  neither overlap nor keep its place among the collectives of a plan.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from dynaflow_serving.config import Config, load
from dynaflow_serving.errors import InactiveError
from dynaflow_serving.integrations import SGLANG
from dynaflow_serving.integrations.sglang.limits import check
from dynaflow_serving.policy.selector import build_selector

logger = logging.getLogger("sglang.dynaflow")


def active_config(server_args: Any) -> Config | None:
    """Return the checked config, or None for a stock server."""
    content = getattr(server_args, "_dynaflow", None)
    return load(content) if isinstance(content, dict) else None


def activate(server_args: Any, requested: Any, resolve: Callable[[], None]) -> None:
    """Resolve the arguments of a server, and put it under DynaFlow as requested.

    Args:
        server_args: SGLang's ServerArgs, not resolved yet.
        requested: A source that `config.load` takes.
        resolve: This resolves `server_args` in SGLang's own way.

    Raises:
        ConfigError: The config is wrong.
        InactiveError: DynaFlow cannot be active, and the config does not let it fall back.
    """
    config = load(requested)
    selector = build_selector(config)
    resolved = False
    try:
        SGLANG.check_release()
        resolve()
        resolved = True
        check(server_args, config, selector)
    except InactiveError as error:
        if not config.fallback:
            raise
        logger.warning("DynaFlow is NOT active, SGLang runs as it is (fallback: true): %s", error)
        return None if resolved else resolve()
    from sglang.srt.arg_groups.overrides import declare_resolution

    declare_resolution(server_args, "dynaflow", flashinfer_allreduce_fusion_backend=None)
    server_args._dynaflow = config.model_dump()
    logger.info("DynaFlow is on: strategy %s, options %s", config.strategy, config.options or "default")
