import os
import sys
from pathlib import Path

import torch

# Before anything imports triton: without a GPU its kernels run in Python, on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)

# kernel_support.py is imported by its bare name, and benchmarks from the root of the checkout.
sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[2])]
