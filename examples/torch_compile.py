"""Any PyTorch model under a strategy, by `torch.compile`: python examples/torch_compile.py

It prints: 12 of 12 rows equal; steps split: 1
"""

import torch
from torch import nn

import dynaflow_serving


class Block(nn.Module):
    """A token-wise block: each row of the batch is computed by itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


if __name__ == "__main__":
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(64), Block(64)).eval(), torch.randn(12, 64)
    compiled = dynaflow_serving.compile(model, "nanoflow", config={"micro_batches": 2, "min_tokens": 1})
    with torch.no_grad():
        equal = torch.isclose(compiled(x), model(x), atol=1e-5).all(1).sum()
    print(f"{equal} of {len(x)} rows equal; steps split: {compiled.session.report().steps.split}")
