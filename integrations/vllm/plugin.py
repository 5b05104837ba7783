"""`register` is vLLM's way in, the entry point of the `vllm.general_plugins` group.

Contract
- vLLM calls `register` in every process, and in some several times. Further calls change nothing.
- It imports nothing heavy. DynaFlow's other modules are imported when a config asks for them.
- vLLM swallows an import error here, but not an exception of `register` itself.
- `--dynaflow PATH|NAME`, `--additional-config '{"dynaflow": ...}'` and `LLM(additional_config={"dynaflow": ...})`
  are the same. On the command line an error is one paragraph and exit code 1.
"""

from __future__ import annotations

import functools
from typing import Any

from dynaflow_serving.errors import DynaflowError
from dynaflow_serving.integrations.base import KEY


def register() -> None:
    """Wrap the three methods of EngineArgs that every way into vLLM passes."""
    from vllm.engine.arg_utils import EngineArgs

    if getattr(EngineArgs, "_dynaflow_attached", False):
        return
    EngineArgs._dynaflow_attached = True
    add_cli_args, create = EngineArgs.add_cli_args, EngineArgs.create_engine_config
    from_cli_args = EngineArgs.from_cli_args.__func__

    @functools.wraps(add_cli_args)
    def add_with_flag(*args: Any, **kwargs: Any) -> Any:
        parser = add_cli_args(*args, **kwargs)
        group = parser.add_argument_group("DynaFlow", "Run the forward pass as scheduled micro-batches.")
        group.add_argument(
            "--dynaflow", metavar="CONFIG", default=None, help="YAML strategy config, or the name of a strategy"
        )
        return parser

    @functools.wraps(from_cli_args)
    def from_cli_with_flag(cls: type, args: Any, *others: Any, **kwargs: Any) -> Any:
        engine_args = from_cli_args(cls, args, *others, **kwargs)
        engine_args._dynaflow_cli = True
        if source := getattr(args, "dynaflow", None):
            engine_args.additional_config = {**(engine_args.additional_config or {}), KEY: source}
        return engine_args

    @functools.wraps(create)
    def create_checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        stock = functools.partial(create, self, *args, **kwargs)
        requested = self.additional_config.get(KEY) if isinstance(self.additional_config, dict) else None
        return _create_with_dynaflow(self, requested, stock) if requested else stock()

    EngineArgs.add_cli_args = staticmethod(add_with_flag)
    EngineArgs.from_cli_args = classmethod(from_cli_with_flag)
    EngineArgs.create_engine_config = create_checked


def _create_with_dynaflow(engine_args: Any, requested: Any, stock: Any) -> Any:
    from dynaflow_serving.integrations.vllm.engine_args import create_engine_config

    try:
        return create_engine_config(engine_args, requested, stock)
    except DynaflowError as error:
        if getattr(engine_args, "_dynaflow_cli", False):
            raise SystemExit(f"dynaflow: error: {error}") from None
        raise
