"""`activate` puts the transformers of FastVideo's pipelines under DynaFlow.

Contract
- FastVideo starts a process per rank, which imports the main script anew. So a script calls `activate(FILE)` at its
  top, outside of `if __name__ == "__main__":`; `dynaflow fastvideo` does so for an unchanged script.
- Options are checked before the processes start, where weights load. A pipeline that cannot run under DynaFlow raises
  `InactiveError`. With `fallback: true` it stays the stock pipeline, and there is a warning.
- After each generation, every rank logs how many denoising steps were split so far.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynaflow_serving.config import Config, load
from dynaflow_serving.errors import InactiveError
from dynaflow_serving.integrations import FASTVIDEO
from dynaflow_serving.integrations.installed import fall_back


def activate(source: str | Mapping[str, Any] | Config = "comm_overlap") -> None:
    """Have all pipelines of FastVideo that this process builds run under DynaFlow.

    Args:
        source: A YAML file, a strategy name, a mapping or a `Config`.

    Raises:
        ConfigError: The config is wrong.
        InactiveError: The release is not supported, or DynaFlow is active in this process already.
    """
    config = load(source)
    try:
        FASTVIDEO.check_release()
        from dynaflow_serving.integrations.fastvideo.pipelines import hook

        hook(config)
    except InactiveError as error:
        fall_back(config.fallback, error)
