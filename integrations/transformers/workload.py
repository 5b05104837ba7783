"""`TransformersWorkload` is the body of a model of HuggingFace Transformers in `dynaflow bench transformers`.

Contract
- Several ranks run the model with `tp_plan="auto"`. A pass is one forward of the body (all but the head) over one batch
  of random tokens, without a cache; its output is the last hidden state.
- With `training` it is forward and backward; the outputs are the loss, the mean of the squares of the hidden states,
  and the gradients. Both passes run in micro-batches, with a graph or without one (`capture: eager`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from dynaflow_serving.config import Config
from dynaflow_serving.errors import ConfigError
from dynaflow_serving.integrations import TRANSFORMERS
from dynaflow_serving.integrations.base import Pass, WorkloadSettings, WorkloadSide
from dynaflow_serving.integrations.torch.workload import gradients, outputs
from dynaflow_serving.integrations.transformers.body import Body
from dynaflow_serving.integrations.transformers.borders import use_local_products
from dynaflow_serving.integrations.transformers.limits import check_model, check_training
from dynaflow_serving.integrations.transformers.training import TrainedBody
from dynaflow_serving.torch_backend import make_backend


class TransformersWorkload:
    """A model's body on one rank."""

    def __init__(self, settings: WorkloadSettings) -> None:
        TRANSFORMERS.check_release()
        self.release = TRANSFORMERS.installed_version() or ""
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        plan = {"tp_plan": "auto"} if dist.is_initialized() else {}
        model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=settings.dtype, **plan)
        check_model(model)
        self.model, self.training = model, settings.training
        self.body = (model.train() if settings.training else model.eval()).base_model
        torch.manual_seed(settings.seed)
        ids = torch.randint(0, model.config.vocab_size, (settings.requests, settings.length))
        self.inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}

    @property
    def stock(self) -> Pass:
        return self._passes(self.body)

    def under(self, config: Config) -> WorkloadSide:
        if config.capture == "eager":
            return self._without_a_graph(config)
        body = Body(self.body, make_backend(config, level="aot"), config.fallback)
        key = {"engine": f"transformers {self.release}"}
        return WorkloadSide(run=self._passes(body), session=body.session, tune=partial(body.tune, [self.inputs], key))

    def _without_a_graph(self, config: Config) -> WorkloadSide:
        """Return the side that captures no graph. No graph can tell its compute or its network alone."""
        if not self.training:
            raise ConfigError("capture: eager splits training only: add --training, or set capture: graph")
        check_training(self.model, config)
        body = TrainedBody(self.body, config)
        passes = self._passes(body)

        def run() -> Any:
            use_local_products(self.body)
            try:
                return passes()
            finally:
                use_local_products(self.body, False)

        return WorkloadSide(run=run, session=body.session, tune=partial(body.tune, [self.inputs], {}), alone={})

    def _passes(self, model: Any) -> Pass:
        def call() -> torch.Tensor:
            hidden: torch.Tensor = model(**self.inputs).last_hidden_state
            return hidden

        if self.training:
            return partial(gradients, call, [p for p in self.body.parameters() if p.requires_grad])
        return partial(outputs, call)
