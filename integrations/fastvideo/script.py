"""This module is the main script of `dynaflow fastvideo`: it activates DynaFlow, and runs the user's script.

Contract
- FastVideo's ranks are spawned: each imports the main module anew, which is this one, so each activates DynaFlow, too.
- The user's script runs in this module's namespace. Its `__name__` is "__main__" here, and "__mp_main__" in the ranks,
  as without DynaFlow. It sees its own arguments and its own path.
- On a machine without a device, `cuda_stand_in` lets FastVideo run on the CPU.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from dynaflow_serving.config import Config
from dynaflow_serving.errors import DynaflowError
from dynaflow_serving.integrations.fastvideo import activate

SCRIPT, CONFIG = "DYNAFLOW_FASTVIDEO_SCRIPT", "DYNAFLOW_FASTVIDEO_CONFIG"

if __name__ in ("__main__", "__mp_main__"):
    if not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        from dynaflow_serving.integrations.fastvideo import cuda_stand_in

        cuda_stand_in.install()
    try:
        activate(Config(**json.loads(os.environ[CONFIG])))
    except DynaflowError as error:
        sys.exit(f"dynaflow: error: {error}")
    path = Path(os.environ[SCRIPT])
    sys.path.insert(0, str(path.resolve().parent))
    __file__ = str(path)
    exec(compile(path.read_text(), str(path), "exec"), globals())
