import os
import sys
from pathlib import Path

import torch

# Before anything imports triton: without a GPU its kernels run in Python, on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)

# kernel_support.py is imported by its bare name, in the processes that tests start too.
sys.path.append(str(Path(__file__).parent))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(Path(__file__).parent))))
