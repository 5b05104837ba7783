"""A strategy that runs a kernel of its own in the place of two operators: python examples/own_kernel.py

It prints: equal; 2 kernels in the plan: gelu_add
"""

import torch

import dynaflow_serving
from dynaflow_serving import Batch, OpScheduler, Schedule, Split, SplitFunc, SplitOptions, cut_at_requests
from dynaflow_serving.kernels import get_kernel, register_kernel


def reference(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x) + y


@register_kernel("gelu_add", reference)
def gelu_add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """It takes what the operators take from outside, in order of first use. A real one would be a Triton kernel."""
    return torch.nn.functional.gelu(x).add_(y)


class Fused(OpScheduler[SplitOptions]):
    annotations = (SplitFunc("gelu"), SplitFunc("add"))

    def split(self, batch: Batch) -> Split:
        return cut_at_requests(batch, self.options.micro_batches, self.options.min_tokens)

    def schedule(self, s: Schedule) -> None:
        while ready := s.get_ready_ops():
            task, *_ = [t for t in ready if "gelu" not in t.name] or ready
            added = [t for t in s.successors(task) if "add" in t.name] if "gelu" in task.name else []
            s.execute([task, *added], replace=get_kernel("gelu_add") if added else None)


def model(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.add(torch.nn.functional.gelu(x * 2), y)


if __name__ == "__main__":
    x, y = torch.randn(2, 8, 16)
    compiled = dynaflow_serving.compile(model, Fused(SplitOptions(micro_batches=2, min_tokens=1)))
    equal = "equal" if torch.allclose(compiled(x, y), model(x, y)) else "NOT equal"
    plan = compiled.session.plan_caches[0].plans[-1].to_text()
    print(f"{equal}; {plan.count('gelu_add')} kernels in the plan: gelu_add")
