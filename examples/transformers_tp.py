"""Tensor-parallel inference in Transformers: torchrun --nproc-per-node 2 examples/transformers_tp.py [MODEL]

It prints: tokens equal; steps split: 8, among them the prompt's
"""

import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from dynaflow_serving.bench.tiny_models import make_tiny_model
from dynaflow_serving.integrations.transformers import enable, report

OPTIONS = {"strategy": "comm_overlap", "options": {"micro_batches": 2, "min_tokens": 1}}


@torch.no_grad()
def main() -> None:
    path = sys.argv[1] if len(sys.argv) > 1 else str(make_tiny_model("llama", layers=1))
    config = DistributedConfig(tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(path, distributed_config=config, dtype=torch.float32).eval()
    prompts = torch.randint(3, 2000, (4, 12), generator=torch.Generator().manual_seed(0))

    def generate() -> torch.Tensor:
        tokens: torch.Tensor = model.generate(prompts, max_new_tokens=8, do_sample=False, eos_token_id=None)
        return tokens

    stock = generate()
    enable(model, OPTIONS)  # the only line that a program needs
    equal = "equal" if torch.equal(generate(), stock) else "NOT equal"
    if dist.get_rank() == 0:
        print(f"tokens {equal}; steps split: {report(model).steps.split}, among them the prompt's")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
