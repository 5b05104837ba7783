"""`TransformersWorkload` is the body of a model of HuggingFace Transformers in `dynaflow bench transformers`.

Contract
- Several ranks run the model with `tp_plan="auto"`. A pass is one forward of the body (all but the head) over one batch
  of random tokens, without a cache; its output is the last hidden state.
- With `training` it is forward and backward; the outputs are the loss, the mean of the squares of the hidden states,
  and the gradients. Both passes run in micro-batches.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from dynaflow_serving.config import Config
from dynaflow_serving.integrations import TRANSFORMERS
from dynaflow_serving.integrations.base import Pass, WorkloadSettings, WorkloadSide
from dynaflow_serving.integrations.torch.workload import gradients, outputs
from dynaflow_serving.integrations.transformers.body import Body
from dynaflow_serving.integrations.transformers.limits import check_model
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
        self.training = settings.training
        self.body = (model.train() if settings.training else model.eval()).base_model
        torch.manual_seed(settings.seed)
        ids = torch.randint(0, model.config.vocab_size, (settings.requests, settings.length))
        self.inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}

    @property
    def stock(self) -> Pass:
        return self._passes(self.body)

    def under(self, config: Config) -> WorkloadSide:
        body = Body(self.body, make_backend(config, level="aot"), config.fallback)
        key = {"engine": f"transformers {self.release}"}
        return WorkloadSide(run=self._passes(body), session=body.session, tune=partial(body.tune, [self.inputs], key))

    def _passes(self, model: Any) -> Pass:
        def call() -> torch.Tensor:
            hidden: torch.Tensor = model(**self.inputs).last_hidden_state
            return hidden

        if self.training:
            return partial(gradients, call, [p for p in self.body.parameters() if p.requires_grad])
        return partial(outputs, call)
