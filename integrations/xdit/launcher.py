"""`launch` runs xDiT's own command line with the transformers of its pipeline under DynaFlow.

Contract
- xDiT's arguments are checked before weights load. The pipeline is put under DynaFlow once xDiT has built it, and has
  compiled it if that was asked for.
- xDiT's runner sees the arguments that it would have without DynaFlow. Its exceptions and its exit are its own.
- A run in which no step was split ends with `InactiveError`, unless the config lets it fall back or the policy decided
  so.
"""

from __future__ import annotations

import contextlib
import functools
import runpy
import sys
from typing import Any

from dynaflow_serving.config import Config
from dynaflow_serving.errors import InactiveError
from dynaflow_serving.integrations import XDIT
from dynaflow_serving.integrations.installed import conclude, fall_back, installed_in
from dynaflow_serving.session.session import Session

RUNNER = "xfuser.runner"
REMEDY = "Use a guidance scale above 1, or several prompts; lower min_tokens, or remove DynaFlow"


def launch(config: Config, arguments: list[str]) -> str:
    """Run xDiT's runner in this process, a rank of it; return how many steps were split, in words.

    Raises:
        InactiveError: The release, an argument or a model is not supported, or no step was split.
    """
    sessions = _hook(config)
    sys.argv = [RUNNER, *arguments]
    runpy.run_module(RUNNER, run_name="__main__", alter_sys=True)
    return conclude(config, sessions, "denoising steps", REMEDY)


def _hook(config: Config) -> list[Session]:
    """Have every model of xDiT's runner run under DynaFlow; return the list of their sessions, as they come."""
    sessions: list[Session] = []
    try:
        XDIT.check_release()
    except InactiveError as error:
        fall_back(config.fallback, error)
        return sessions
    from xfuser.model_executor.models.runner_models.base_model import xFuserModel

    from dynaflow_serving.integrations.xdit import enable, transformers_of
    from dynaflow_serving.integrations.xdit.limits import check_arguments

    stock = xFuserModel.initialize

    @functools.wraps(stock)
    def initialize(model: Any, input_args: Any) -> None:
        try:
            check_arguments(model.config, config)
        except InactiveError as error:
            fall_back(config.fallback, error)
            stock(model, input_args)
            return
        stock(model, input_args)
        enable(model.pipe, config)
        with contextlib.suppress(InactiveError):  # it fell back
            sessions.extend(installed_in(module, "xdit").session for module in transformers_of(model.pipe))

    xFuserModel.initialize = initialize
    return sessions
