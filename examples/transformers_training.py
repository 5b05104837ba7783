"""Tensor-parallel training in Transformers: torchrun --nproc-per-node 2 examples/transformers_training.py [MODEL]

It prints: losses equal; steps split: 6, forward and backward
"""

import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from dynaflow_serving.bench.tiny_models import make_tiny_model
from dynaflow_serving.integrations.transformers import enable, report

OPTIONS = {"strategy": "comm_overlap", "options": {"micro_batches": 2, "min_tokens": 1}}


def train(path: str, dynaflow: bool) -> tuple[torch.Tensor, int]:
    """Return the losses of three steps, and how many passes were split."""
    config = DistributedConfig(tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(path, distributed_config=config, dtype=torch.float32)
    if dynaflow:
        enable(model, OPTIONS)  # the only line that a program needs
    tokens = torch.randint(3, 2000, (4, 12), generator=torch.Generator().manual_seed(0))
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=1e-3), []
    for _ in range(3):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses), report(model).steps.split if dynaflow else 0


if __name__ == "__main__":
    path = sys.argv[1] if len(sys.argv) > 1 else str(make_tiny_model("llama", layers=1))
    (stock, _), (ours, split) = train(path, dynaflow=False), train(path, dynaflow=True)
    if dist.get_rank() == 0:
        equal = "equal" if torch.allclose(stock, ours, rtol=1e-4) else "NOT equal"
        print(f"losses {equal}; steps split: {split}, forward and backward")
    dist.destroy_process_group()
