"""Three tiny models with marks, for golden plans, `dynaflow explain` and benchmarks, and a loss with its gradient.

Contract
- The models are pure torch, on the CPU, without a process group.
- A marked elementwise function stands for a collective: `all_reduce` doubles its input, as if one other rank held the
  same. A plan therefore has real network operators with results that can be checked.
- `llama` has two tensor-parallel decoder layers with two all-reduces each.
- `moe` has two layers with dispatch, experts and combine, and a shared expert that depends on none of them.
- `dit` has two dual-stream blocks of a diffusion transformer (MM-DiT, arXiv 2403.03206, without modulation). Image and
  text tokens of a sample come together in attention only.
- `loss` is no model but a Program written by hand: a layer, its loss over the tokens, and its weight's gradient. Its
  sums over tokens are merged by addition.
- The batch dimension is symbolic: one capture serves every size from 2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx, nn

from dynaflow_serving.capture.fx import partition
from dynaflow_serving.capture.fx.symbols import batch_symbols
from dynaflow_serving.capture.mark import mark
from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.core.parse import parse_program
from dynaflow_serving.core.program import Resource
from dynaflow_serving.strategy.rules import Rule
from dynaflow_serving.strategy.tags import Tag

HIDDEN, HEADS, LAYERS = 16, 2, 2
IMAGE, TEXT = 4, 2  # tokens of one sample of `dit`


@mark("all_reduce", Resource.NETWORK, [Tag.ALL_REDUCE])
def all_reduce(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@mark("dispatch", Resource.NETWORK, [Tag.DISPATCH])
def dispatch(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * weight


@mark("combine", Resource.NETWORK, [Tag.COMBINE])
def combine(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * weight


@mark("attention", Resource.MEMORY, [Tag.ATTENTION])
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = torch.softmax(q @ k.transpose(1, 2), dim=-1)
    return (scores @ v).reshape(-1, HIDDEN)


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return x * scale * self.weight


class Attention(nn.Module):
    """Self-attention over the heads of one token: there is no sequence, so tokens stay independent."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.o_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(-1, 3, HEADS, HIDDEN // HEADS).unbind(1)
        out: torch.Tensor = self.o_proj(attend(q, k, v))
        return out


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, 2 * HIDDEN, bias=False)
        self.down = nn.Linear(2 * HIDDEN, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(torch.relu(self.up(x)))
        return out


class DenseLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(), Norm()
        self.attention, self.mlp = Attention(), MLP()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + all_reduce(self.attention(self.norm1(x)))
        x = x + all_reduce(self.mlp(self.norm2(x)))
        return x


class MoELayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(), Norm()
        self.attention, self.experts, self.shared_expert = Attention(), MLP(), MLP()
        self.gate = nn.Linear(HIDDEN, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        h = self.norm2(x)
        weight = torch.sigmoid(self.gate(h))
        routed = combine(self.experts(dispatch(h, weight)), weight)
        x = x + routed + self.shared_expert(h)
        return x


class Model(nn.Module):
    def __init__(self, layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class DiTStream(nn.Module):
    """One modality's own part of a dual-stream block, before and after the joint attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(), Norm()
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.o_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.mlp = MLP()

    def project(self, x: torch.Tensor) -> torch.Tensor:
        qkv: torch.Tensor = self.qkv(self.norm1(x))
        return qkv

    def finish(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        x = x + self.o_proj(attended)
        x = x + self.mlp(self.norm2(x))
        return x


class DualStreamBlock(nn.Module):
    """A block over image [samples, IMAGE, HIDDEN] and text [samples, TEXT, HIDDEN]."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = DiTStream(), DiTStream()

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        image_qkv, text_qkv = self.image.project(image), self.text.project(text)
        with mark("attention", Resource.COMPUTE, [Tag.ATTENTION]):
            q, k, v = torch.cat([image_qkv, text_qkv], 1).chunk(3, -1)
            attended = torch.softmax(q @ k.transpose(1, 2), dim=-1) @ v
            image_attended, text_attended = attended.narrow(1, 0, IMAGE), attended.narrow(1, IMAGE, TEXT)
        return self.image.finish(image, image_attended), self.text.finish(text, text_attended)


class DiT(nn.Module):
    """A model [samples, HIDDEN] -> [samples, HIDDEN]; projections stand for the patch and the text embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.image_in = nn.Linear(HIDDEN, IMAGE * HIDDEN, bias=False)
        self.text_in = nn.Linear(HIDDEN, TEXT * HIDDEN, bias=False)
        self.layers = nn.ModuleList(DualStreamBlock() for _ in range(LAYERS))
        self.out = nn.Linear((IMAGE + TEXT) * HIDDEN, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        image, text = self.image_in(x).view(-1, IMAGE, HIDDEN), self.text_in(x).view(-1, TEXT, HIDDEN)
        for layer in self.layers:
            image, text = layer(image, text)
        out: torch.Tensor = self.out(torch.cat([image, text], 1).flatten(1))
        return out


def llama() -> nn.Module:
    return Model(DenseLayer)


def moe() -> nn.Module:
    return Model(MoELayer)


LOSS = """
program
value x batch:0
value weight shared
value partial_y batch:0
value y batch:0
value loss partial:mean
value dy batch:0
value local_gradient partial
value gradient partial
value scaled partial
inputs x weight
op project compute
  inputs x weight
  outputs partial_y
op all_reduce.y network group=tp
  tags all_reduce
  inputs partial_y
  outputs y
  into y
op loss compute
  inputs y
  outputs loss dy
op weight_gradient compute
  inputs dy x
  outputs local_gradient
op all_reduce.gradient network group=tp
  tags all_reduce
  inputs local_gradient
  outputs gradient
op scale memory
  inputs gradient
  outputs scaled
outputs y loss scaled
"""


def loss_capture() -> CapturedProgram:
    """Return the Program `LOSS`: x [tokens, HIDDEN] -> y of the same shape, loss [], scaled [HIDDEN, HIDDEN]."""
    return CapturedProgram(
        parse_program(LOSS),
        {
            "project": torch.matmul,
            "all_reduce.y": lambda y: y * 2,
            "loss": lambda y: (y.square().sum(-1).mean(), y * 2),
            "weight_gradient": lambda dy, x: x.t() @ dy,
            "all_reduce.gradient": lambda gradient: gradient * 2,
            "scale": lambda gradient: gradient / 2,
        },
        into={"all_reduce.y": lambda y, out: torch.mul(y, 2, out=out)},
        buffers={"y": lambda tokens: torch.empty(tokens, HIDDEN)},
        constants=(torch.arange(HIDDEN * HIDDEN).reshape(HIDDEN, HIDDEN) % 5 - 2.0,),
    )


EXAMPLES: dict[str, Callable[[], nn.Module]] = {"llama": llama, "moe": moe, "dit": DiT}


def example_capture(name: str, rules: Iterable[Rule] = ()) -> CapturedProgram:
    """Capture the example called `name`; its weights are the same each time.

    Args:
        name: The name of the example.
        rules: The rules of a strategy. Required ones are left out: they name functions of real models.
    """
    applicable = [rule for rule in rules if not rule.required]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = EXAMPLES[name]()
        return capture_model(model, torch.randn(8, HIDDEN), rules=applicable)


def capture_model(model: nn.Module, *examples: torch.Tensor, **options: Any) -> CapturedProgram:
    """Trace `model` by Dynamo with a symbolic batch, and capture its graph with the parameters as constants.

    Args:
        model: the model.
        examples: its arguments; dimension 0 is the batch.
        options: `rules` and `effects` of `partition`.
    """
    graphs: list[tuple[fx.GraphModule, list[torch.Tensor]]] = []

    def backend(gm: fx.GraphModule, inputs: list[torch.Tensor]) -> fx.GraphModule:
        graphs.append((gm, inputs))
        return gm

    for example in examples:
        torch._dynamo.mark_dynamic(example, 0)
    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True)(*examples)
    gm, inputs = graphs[0]
    capture = partition(gm, tokens=batch_symbols(gm, 0), **options)
    values = dict(zip(capture.program.inputs, inputs, strict=True))
    weights = {name: value for name, value in values.items() if isinstance(value, nn.Parameter)}
    ordered = (*(name for name in values if name not in weights), *weights)
    capture.program = dataclasses.replace(capture.program, inputs=ordered)
    capture.constants = tuple(weights.values())
    return capture
