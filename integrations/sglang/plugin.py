"""`register` is SGLang's way in, the entry point of the `sglang.srt.plugins` group.

Contract
- SGLang calls `register` once in every process, and logs and swallows all errors in it, so nothing is refused here. A
  config is refused where SGLang reads its arguments, and a worker without DynaFlow where it reports ready.
- It imports nothing heavy. DynaFlow's other modules are imported when a config asks for them.
- `--dynaflow PATH|NAME`, and the key `dynaflow` of `--json-model-override-args` (the way for `sglang.Engine`), are the
  same. On the command line an error is one paragraph and exit code 1.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from typing import Any

from dynaflow_serving.errors import ConfigError, DynaflowError
from dynaflow_serving.integrations import SGLANG
from dynaflow_serving.integrations.base import KEY

TARGET = "sglang.srt.server_args.ServerArgs"
SCHEDULER = "dynaflow_serving.integrations.sglang.scheduler"


def register() -> None:
    """Hook the flag, the resolution of arguments, and their publication in every process."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(f"{TARGET}.add_cli_args", _add_flag, HookType.AFTER)
    HookRegistry.register(f"{TARGET}.from_cli_args", _take_flag, HookType.AFTER)
    HookRegistry.register(f"{TARGET}.resolve_once", _resolve, HookType.AROUND)
    if SGLANG.is_supported():  # elsewhere the names that are hooked may not exist
        HookRegistry.register("sglang.srt.runtime_context.publish", _published, HookType.AFTER)


def _add_flag(result: None, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
    group = parser.add_argument_group("DynaFlow", "Run the forward pass as scheduled micro-batches.")
    group.add_argument("--dynaflow", metavar="CONFIG", help="YAML strategy config, or the name of a strategy")


def _take_flag(server_args: Any, cls: type, args: argparse.Namespace, *others: Any, **kwargs: Any) -> None:
    server_args._dynaflow_cli = True
    server_args._dynaflow = getattr(args, "dynaflow", None)


def _resolve(original: Callable[..., None], server_args: Any, *args: Any, **kwargs: Any) -> None:
    resolve = functools.partial(original, server_args, *args, **kwargs)
    if getattr(server_args, "_resolution_finished", False):  # a child's copy, or the second call
        return resolve()
    try:
        requested = _requested(server_args)
        server_args._dynaflow, server_args._dynaflow_cli = None, getattr(server_args, "_dynaflow_cli", False)
        if requested is None:
            return resolve()
        from dynaflow_serving.integrations.sglang.server_args import activate

        activate(server_args, requested, resolve)
    except DynaflowError as error:
        if getattr(server_args, "_dynaflow_cli", False):  # set by `_take_flag`
            raise SystemExit(f"dynaflow: error: {error}") from None
        raise


def _requested(server_args: Any) -> Any:
    """Return the config that the flag or the model overrides name, or None.

    The key is taken out of the overrides, because SGLang applies these to the model's own config.

    Raises:
        ConfigError: Both name a config.
    """
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
    return source


def _published(context: Any, server_args: Any, *args: Any, role: str, **kwargs: Any) -> None:
    """Enter SGLang when it publishes its arguments, early in every process; errors raised here end the process."""
    # A process that has started an engine with DynaFlow also looks at those that it starts without.
    if getattr(server_args, "_dynaflow", None) is None and SCHEDULER not in sys.modules:
        return
    from dynaflow_serving.integrations.sglang.scheduler import enter

    enter(server_args, role)
