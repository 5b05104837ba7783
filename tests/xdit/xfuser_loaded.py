"""Importing this imports xfuser and diffusers as far as the tests need them, with the stand-in for CUDA."""

from __future__ import annotations

from dynaflow_serving.integrations.xdit import cuda_stand_in

cuda_stand_in.install()

import diffusers.pipelines.wan.pipeline_wan  # noqa: E402,F401
import xfuser.core.distributed.runtime_state  # noqa: E402
import xfuser.model_executor.models.transformers.transformer_wan  # noqa: E402,F401
