"""`TorchWorkload` is a user's own PyTorch model in `dynaflow bench torch --model path.py:factory`.

Contract
- `factory()` returns the model, any callable, and the tuple of its positional arguments, whose dimension 0 is the
  batch. Each rank calls it, after torch.distributed is initialised where there are several.
- The outputs are the tensors that the model returns. With `training` they are the loss, the mean of the squares of
  these tensors, and the gradients.
- Without a factory, the model is a stack of MLP blocks whose second layers are all-reduced, as in tensor parallelism.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_leaves

from dynaflow_serving.config import Config
from dynaflow_serving.errors import ConfigError
from dynaflow_serving.integrations.base import Pass, WorkloadSettings, WorkloadSide
from dynaflow_serving.torch_backend import compile

HIDDEN, LAYERS = 1024, 4
FORM = "--model for torch is PATH.py:FUNCTION, where FUNCTION() returns (model, inputs)"


class TorchWorkload:
    """A user's model on one rank."""

    release = torch.__version__

    def __init__(self, settings: WorkloadSettings) -> None:
        torch.manual_seed(settings.seed)
        self.training = settings.training
        if settings.model:
            self.model, self.inputs = made_by_user(settings.model)
        else:
            self.model, self.inputs = example(settings)

    @property
    def stock(self) -> Pass:
        return self._passes(self.model)

    def under(self, config: Config) -> WorkloadSide:
        # A graph that autograd goes through, or that has collectives of functional form, is lowered to ATen.
        compiled = compile(self.model, config, level="aot")
        return WorkloadSide(
            run=self._passes(compiled), session=compiled.session, tune=partial(compiled.tune, self.inputs)
        )

    def _passes(self, model: Callable[..., Any]) -> Pass:
        if self.training:
            return partial(gradients, lambda: model(*self.inputs), self._parameters())
        return partial(outputs, lambda: model(*self.inputs))

    def _parameters(self) -> list[torch.Tensor]:
        if not isinstance(self.model, nn.Module):
            raise ConfigError("--training needs a model with parameters; this one is a function")
        return [p for p in self.model.parameters() if p.requires_grad]


def outputs(call: Callable[[], Any]) -> list[torch.Tensor]:
    """Call a model without gradients, and return the tensors of its result."""
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(call()) if isinstance(leaf, torch.Tensor)]


def gradients(call: Callable[[], Any], parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Call a model forward and backward, and return its loss and the gradients of the parameters."""
    for parameter in parameters:
        parameter.grad = None
    results = [leaf for leaf in tree_leaves(call()) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    loss = torch.stack([r.square().mean() for r in results]).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    found = [p.grad for p in parameters if p.grad is not None]
    return [loss.detach(), *(g.to_local() if hasattr(g, "to_local") else g for g in found)]


def made_by_user(name: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return what the function `PATH.py:FUNCTION` returns.

    Raises:
        ConfigError: There is no such function, or it returns something else than a model and its inputs.
    """
    path, colon, function = name.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise ConfigError(f"{FORM}; not {name!r}")
    if not Path(path).is_file():
        raise ConfigError(f"--model: the file {path} does not exist. {FORM}.")
    spec = importlib.util.spec_from_file_location(f"{__name__}.file.{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Dynamo imports the module of an inlined function, for the names in it
    spec.loader.exec_module(module)
    factory = getattr(module, function, None)
    if not callable(factory):
        there = [n for n, value in vars(module).items() if callable(value) and value.__module__ == module.__name__]
        raise ConfigError(f"--model: {path} has no function {function!r}. It has: {', '.join(there) or 'none'}.")
    made = factory()
    if not (isinstance(made, tuple) and len(made) == 2 and callable(made[0]) and isinstance(made[1], tuple | list)):
        raise ConfigError(f"--model: {function}() in {path} returned {type(made).__name__}. {FORM}, inputs a tuple.")
    return made[0], tuple(made[1])


class Block(nn.Module):
    """An MLP of a tensor-parallel model: each rank holds a share of the inner dimension."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        inner = 11 * HIDDEN // 4 // ranks
        self.norm, self.up, self.down = nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, inner), nn.Linear(inner, HIDDEN)
        self.ranks = ranks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from torch.distributed._functional_collectives import all_reduce

        y: torch.Tensor = self.down(torch.nn.functional.silu(self.up(self.norm(x))))
        if self.ranks > 1:
            y = all_reduce(y, "sum", list(range(self.ranks)))
        return x + y


def example(settings: WorkloadSettings) -> tuple[nn.Module, tuple[torch.Tensor]]:
    """Return the model of this module and a batch of [requests, length, hidden]."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    x = torch.randn(settings.requests, settings.length, HIDDEN)
    model = nn.Sequential(*(Block(ranks) for _ in range(LAYERS)))
    return (model if settings.training else model.eval()), (x,)
