"""A custom operator is split once it is declared to treat each row by itself: python examples/own_operator.py

It prints: not declared: refused, naming examples::rotate; declared: equal, steps split: 1
"""

import torch

import dynaflow_serving
from dynaflow_serving.errors import PartitionError


@torch.library.custom_op("examples::rotate", mutates_args=())
def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotate the values of each row."""
    return torch.roll(x, 1, dims=-1)


@rotate.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def model(x: torch.Tensor) -> torch.Tensor:
    return rotate(x).relu()


if __name__ == "__main__":
    x, options = torch.randn(8, 16), {"micro_batches": 2, "min_tokens": 1}
    try:
        dynaflow_serving.compile(model, "nanoflow", config=options)(x)
        told = "split, which must not be"
    except PartitionError as error:
        told = f"refused, naming {'examples::rotate' if 'rotate' in str(error) else error}"
    dynaflow_serving.row_wise("examples::rotate")
    torch._dynamo.reset()
    compiled = dynaflow_serving.compile(model, "nanoflow", config=options)
    equal = "equal" if torch.equal(compiled(x), model(x)) else "NOT equal"
    print(f"not declared: {told}; declared: {equal}, steps split: {compiled.session.report().steps.split}")
