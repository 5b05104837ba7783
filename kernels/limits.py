"""What the Triton kernels take, known without triton: a graph is searched for their work where none is installed."""

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HIDDEN = 16384  # a row stays in the registers of one CTA
