"""HuggingFace Transformers: `enable(model, "configs/transformers/comm_overlap.yaml")`, then use the model as before.

Contract
- There is no plugin mechanism to hook, so models are enabled one at a time, after `from_pretrained`.
- What cannot run under DynaFlow is an `InactiveError` here, before the first forward, or the stock model with a
  warning where the config says `fallback: true`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from dynaflow_serving.config import Config, load
from dynaflow_serving.errors import InactiveError
from dynaflow_serving.integrations import TRANSFORMERS
from dynaflow_serving.policy.table import Table
from dynaflow_serving.session.report import WorkerReport

Model = TypeVar("Model")


def enable(model: Model, source: str | Mapping[str, Any] | Config = "comm_overlap") -> Model:
    """Run the body of `model` (all but the head, the loss and sampling) under DynaFlow; returns `model` itself.

    source: a YAML file, a strategy name, a mapping or a Config.
    Raises `ConfigError` for a wrong config, `InactiveError` for a model or release that is not supported.
    """
    from dynaflow_serving.integrations.transformers.body import Body
    from dynaflow_serving.integrations.transformers.limits import check_model

    config = load(source)
    try:
        TRANSFORMERS.check_release()
        check_model(model)
        Body.install(model, config)
    except InactiveError as error:
        if not config.fallback:
            raise
        logging.getLogger("dynaflow_serving").warning("DynaFlow is not active (fallback: true): %s", error)
    return model


def tune(model: Any, inputs: Sequence[Mapping[str, Any]]) -> Table:
    """Have `strategy: auto` decide, by measuring, for batches like `inputs`: keyword arguments of the body's forward,
    such as `{"input_ids": ids}`. Decisions for this model, machine and release that are on disk are read instead.

    Every rank calls it, with inputs of the same shapes. Raises `ConfigError` for inputs that cannot be split and for
    another strategy, `InactiveError` for a model that is not enabled and for ranks that differ.
    """
    from dynaflow_serving.integrations.transformers.body import Body

    architecture = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    key = {
        "engine": f"transformers {TRANSFORMERS.installed_version()}",
        "model": hashlib.sha256(architecture.encode()).hexdigest()[:16],
    }
    return Body.of(model).tune(inputs, key)


def report(model: Any) -> WorkerReport:
    """What DynaFlow did in the forwards of `model` so far: strategy, steps split and not, programs and plans.

    Raises `InactiveError` for a model that is not enabled.
    """
    from dynaflow_serving.integrations.transformers.body import Body

    return Body.of(model).session.report()
