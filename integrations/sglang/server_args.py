"""From the user's flag to checked ServerArgs, in the process that parses the arguments.

Contract
- `--dynaflow PATH|NAME`, and the key `dynaflow` of `--json-model-override-args` (the way for `sglang.Engine`), are the
  same: the checked content of the config becomes `server_args._dynaflow`, which SGLang pickles to every process.
- SGLang resolves all its arguments as it always does; only then is it checked what cannot be honoured. Whatever
  cannot be active raises `InactiveError` here, before a process is started or a weight is loaded; on the command line
  it is one paragraph and exit code 1. With `fallback: true` it is a warning and SGLang runs as it is.
- One resolved setting is changed: the kernel that fuses all-reduce, residual add and norm is off, for its all-reduce
  could neither overlap nor keep its place among the collectives of a plan.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from typing import Any

from dynaflow_serving.config import Config, load
from dynaflow_serving.errors import ConfigError, DynaflowError, InactiveError

KEY = "dynaflow"
TARGET = "sglang.srt.server_args.ServerArgs"

logger = logging.getLogger("sglang.dynaflow")


def attach() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(f"{TARGET}.add_cli_args", _add_flag, HookType.AFTER)
    HookRegistry.register(f"{TARGET}.from_cli_args", _take_flag, HookType.AFTER)
    HookRegistry.register(f"{TARGET}.resolve_once", _resolve, HookType.AROUND)


def active_config(server_args: Any) -> Config | None:
    """The checked config, or None for a stock server."""
    content = getattr(server_args, "_dynaflow", None)
    return load(content) if isinstance(content, dict) else None


def _add_flag(result: None, parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("DynaFlow", "Run the forward pass as scheduled micro-batches.")
    group.add_argument("--dynaflow", metavar="CONFIG", help="YAML strategy config, or the name of a strategy")


def _take_flag(server_args: Any, cls: type, args: argparse.Namespace) -> None:
    server_args._dynaflow_cli = True
    server_args._dynaflow = getattr(args, "dynaflow", None)


def _resolve(original: Callable[[Any], None], server_args: Any) -> None:
    if getattr(server_args, "_resolution_finished", False):  # a child's copy, or the second call
        return original(server_args)
    try:
        config = _requested(server_args)
        server_args._dynaflow, server_args._dynaflow_cli = None, getattr(server_args, "_dynaflow_cli", False)
        if config is None:
            return original(server_args)
        _activate(server_args, config, original)
    except DynaflowError as error:
        if getattr(server_args, "_dynaflow_cli", False):  # set by `_take_flag`
            raise SystemExit(f"dynaflow: error: {error}") from None
        raise


def _requested(server_args: Any) -> Config | None:
    """What the flag or the model overrides ask for; the key is taken out of the overrides, which are the model's."""
    source = getattr(server_args, "_dynaflow", None)
    try:
        overrides = json.loads(server_args.json_model_override_args or "{}")
    except ValueError:
        overrides = None  # SGLang's own error is better
    if isinstance(overrides, dict) and KEY in overrides:
        if source is not None:
            raise ConfigError(
                "both --dynaflow and the key 'dynaflow' of json_model_override_args name a config; keep one of them"
            )
        source = overrides.pop(KEY)
        server_args.json_model_override_args = json.dumps(overrides)
    return load(source) if source is not None else None


def _activate(server_args: Any, config: Config, resolve: Callable[[Any], None]) -> None:
    from dynaflow_serving.integrations.sglang import SGLangIntegration
    from dynaflow_serving.integrations.sglang.limits import check
    from dynaflow_serving.policy.selector import build_selector

    resolved = False
    selector = build_selector(config)
    try:
        SGLangIntegration().check_release()
        resolve(server_args)
        resolved = True
        check(server_args, config, selector)
    except InactiveError as error:
        if not config.fallback:
            raise
        logger.warning("DynaFlow is NOT active, SGLang runs as it is (fallback: true): %s", error)
        return None if resolved else resolve(server_args)
    from sglang.srt.arg_groups.overrides import declare_resolution

    declare_resolution(server_args, "dynaflow", flashinfer_allreduce_fusion_backend=None)
    server_args._dynaflow = config.model_dump()
    logger.info("DynaFlow is on: strategy %s, options %s", config.strategy, config.options or "default")
