"""`dynaflow xdit` on a tiny Wan, on CPUs, as torchrun starts it: `FOLDER OUT xdit -c CONFIG -- ARGS`.

The model runs twice: with its stock forward, and then under DynaFlow. The last rank saves both videos to the file OUT.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy
import torch
import xfuser_loaded
from xfuser.core.utils.runner_utils import is_last_process
from xfuser.model_executor.models.runner_models.base_model import register_model, xFuserModel
from xfuser.model_executor.models.runner_models.wan import _build_attention_kwargs, xFuserWan21T2VModel

from dynaflow_serving.cli import app

assert xfuser_loaded
torch.set_num_threads(1)
FOLDER, OUT, *ARGUMENTS = sys.argv[1:]


@register_model("tiny-wan")
class TinyWan(xFuserWan21T2VModel):
    """Wan from a folder, on CPUs."""

    def _customize_settings(self, config: Any) -> None:
        super()._customize_settings(config)
        self.settings.model_name = FOLDER

    def _load_model(self) -> Any:
        from diffusers import WanPipeline
        from xfuser.model_executor.models.transformers.transformer_wan import xFuserWanTransformer3DWrapper

        transformer = xFuserWanTransformer3DWrapper.from_pretrained(
            FOLDER, subfolder="transformer", attention_kwargs=_build_attention_kwargs(self.config)
        )
        return WanPipeline.from_pretrained(FOLDER, transformer=transformer)


def run_twice(model: Any, input_args: Any) -> Any:
    module = model.pipe.transformer
    ours = module.__dict__.pop("forward")
    stock, _ = run(model, input_args)
    module.__dict__["forward"] = ours
    output, timings = run(model, input_args)
    if is_last_process():
        numpy.save(OUT, numpy.stack([numpy.asarray(o.videos) for o in (stock, output)]))
    return output, timings


run = xFuserModel.run
xFuserModel.run = run_twice
xFuserModel.save_output = lambda model, output: None
xFuserModel.save_timings = lambda model, timings: None
sys.argv = ["dynaflow", *ARGUMENTS]
app()
