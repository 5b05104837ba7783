"""`create_engine_config` turns the user's flag into a checked VllmConfig, in the process that parses the arguments.

Contract
- `--dynaflow PATH|NAME`, `--additional-config '{"dynaflow": ...}'` and `LLM(additional_config={"dynaflow": ...})`
  are the same. `additional_config["dynaflow"]` becomes the checked content of the config, so that every worker process
  and vLLM's compile hash see the same.
- vLLM decides mode, backend and custom ops as it always does. Only then are worker class, Dynamo backend (mode 2) and
  split points (mode 3) changed, so that baseline and DynaFlow compile alike.
- If DynaFlow cannot be active, `InactiveError` is raised here, before any weight is loaded. On the command line it is
  one paragraph and exit code 1. With `fallback: true` it is a warning, and vLLM runs as it is.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from typing import Any

from dynaflow_serving.config import Config, load
from dynaflow_serving.errors import InactiveError
from dynaflow_serving.integrations import VLLM
from dynaflow_serving.integrations.base import KEY
from dynaflow_serving.integrations.vllm import metrics
from dynaflow_serving.policy.selector import build_selector
from dynaflow_serving.strategy.rules import Rule
from dynaflow_serving.strategy.selector import Selector

PIECE_COMPILER = "dynaflow_piece_compiler"  # in mode 2, vLLM would have compiled the graph with it
# vLLM reads it while it builds the config and again in every child process. Its ahead-of-time compile would
# bring stock stitching back on the second start.
ENVIRONMENT = {"VLLM_USE_AOT_COMPILE": "0"}

logger = logging.getLogger("vllm.dynaflow")


def create_engine_config(args: Any, requested: Any, create: Callable[[], Any]) -> Any:
    """Create vLLM's config, with DynaFlow as requested.

    Args:
        args: vLLM's EngineArgs.
        requested: A source that `config.load` takes.
        create: This creates vLLM's own config of `args`.

    Raises:
        ConfigError: The config is wrong.
        InactiveError: DynaFlow cannot be active, and the config does not let it fall back.
    """
    config = load(requested)
    selector = build_selector(config)
    original = dict(args.additional_config)
    try:
        return _activate(args, config, selector, create)
    except InactiveError as error:
        if not config.fallback:
            raise
        logger.warning("DynaFlow is NOT active, vLLM runs as it is (fallback: true): %s", error)
        args.additional_config = {k: v for k, v in original.items() if k != KEY}
        return create()


def _activate(args: Any, config: Config, selector: Selector, create: Callable[[], Any]) -> Any:
    from dynaflow_serving.integrations.vllm.limits import check, check_annotations

    VLLM.check_release()
    args.additional_config = {**args.additional_config, KEY: config.model_dump()}
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ |= ENVIRONMENT
    try:
        vllm_config = create()
        check(vllm_config, config, selector)
        check_annotations(vllm_config, selector.annotations)
    except BaseException:
        for name, value in before.items():  # the next engine in this process may be a stock one
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        raise
    _redirect(vllm_config, selector.annotations)
    metrics.attach()
    logger.info("DynaFlow is on: strategy %s, options %s", config.strategy, config.options or "default")
    return vllm_config


def _redirect(vllm_config: Any, rules: Iterable[Rule]) -> None:
    """Point vLLM at our worker, and at our backend (mode 2) or split points (mode 3)."""
    from vllm.config import CompilationMode
    from vllm.platforms import current_platform

    from dynaflow_serving.integrations.vllm.operators import collective_names

    kind = "CPUDynaflowWorker" if current_platform.is_cpu() else "GPUDynaflowWorker"
    vllm_config.parallel_config.worker_cls = f"dynaflow_serving.integrations.vllm.worker.{kind}"
    compilation = vllm_config.compilation_config
    if compilation.mode == CompilationMode.DYNAMO_TRACE_ONCE:
        vllm_config.additional_config[PIECE_COMPILER] = compilation.backend
        compilation.backend = "dynaflow_serving.integrations.vllm.mode2.backend"
        return
    if compilation.mode != CompilationMode.VLLM_COMPILE:
        return
    cuts = [str(rule.target) for rule in rules]
    if vllm_config.parallel_config.tensor_parallel_size > 1:
        cuts += collective_names()
        # The fused kernel needs all-reduce and norm in one piece; here they are operators of their own.
        compilation.pass_config.fuse_allreduce_rms = False
    compilation.splitting_ops = list(dict.fromkeys((*(compilation.splitting_ops or ()), *cuts)))
