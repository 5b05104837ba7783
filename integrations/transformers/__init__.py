"""`enable` puts a model of HuggingFace Transformers under DynaFlow; the model is used as before.

Contract
- There is no plugin mechanism to hook, so models are enabled one at a time, after `from_pretrained`:
  `enable(model, "configs/transformers/comm_overlap.yaml")`.
- A model that cannot run under DynaFlow raises `InactiveError`, before the first forward. With `fallback: true` it
  stays the stock model, and there is a warning.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from dynaflow_serving.config import Config, load
from dynaflow_serving.errors import InactiveError
from dynaflow_serving.integrations import TRANSFORMERS
from dynaflow_serving.integrations.installed import fall_back
from dynaflow_serving.policy.table import Table
from dynaflow_serving.session.report import WorkerReport

Model = TypeVar("Model")


def enable(model: Model, source: str | Mapping[str, Any] | Config = "comm_overlap") -> Model:
    """Run the body of `model` (all but the head, the loss and sampling) under DynaFlow.

    Args:
        model: A `PreTrainedModel`.
        source: A YAML file, a strategy name, a mapping or a `Config`.

    Returns:
        The `model` itself.

    Raises:
        ConfigError: The config is wrong.
        InactiveError: The model or the release is not supported, and the config does not let it fall back.
    """
    from dynaflow_serving.integrations.transformers.body import Body
    from dynaflow_serving.integrations.transformers.limits import check_model, check_training
    from dynaflow_serving.integrations.transformers.training import TrainedBody

    config = load(source)
    try:
        TRANSFORMERS.check_release()
        check_model(model)
        if config.capture == "eager":
            check_training(model, config)
            TrainedBody.install(model, config)
        else:
            Body.install(model, config)
    except InactiveError as error:
        fall_back(config.fallback, error)
    return model


def tune(model: Any, inputs: Sequence[Mapping[str, Any]]) -> Table:
    """Have `strategy: auto` decide, by measuring, for batches like `inputs`.

    Decisions on disk for this model, machine and release are read instead. Every rank calls this, with inputs of the
    same shapes.

    Args:
        model: An enabled model.
        inputs: Each holds keyword arguments of the body's forward, such as `{"input_ids": ids}`.

    Returns:
        The table of the decisions.

    Raises:
        ConfigError: An input cannot be split, or the strategy is another one.
        InactiveError: The model is not enabled, or the ranks have different decisions.
    """
    from dynaflow_serving.integrations.transformers.body import Body

    architecture = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    key = {
        "engine": f"transformers {TRANSFORMERS.installed_version()}",
        "model": hashlib.sha256(architecture.encode()).hexdigest()[:16],
    }
    return Body.installed_in(model).tune(inputs, key)


def report(model: Any) -> WorkerReport:
    """Return the report of the forwards of `model` so far: strategy, split and un-split steps, programs and plans.

    Raises:
        InactiveError: The model is not enabled.
    """
    from dynaflow_serving.integrations.transformers.body import Body

    return Body.installed_in(model).session.report()
