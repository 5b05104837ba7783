"""Layer stacks at the shapes of served models, with attention over ragged prompts and a KV cache.

Contract
- The tokens of a step are a flat [tokens, hidden] tensor. A context per micro-batch (`Context`) says which tokens
  belong together, and to which slots of the cache. It is made before the step and entered by `enter`, as in engines.
- Attention and the routed experts are custom operators: the same kernels in every variant, opaque to Dynamo.
- The experts of a token are an input, random and uniform. If they were computed, a rounding difference between two
  variants could flip a near-tie, and the two would neither compute nor cost the same.
- A decode request attends to all of its context in the cache, a prompt to itself. There is no rotary embedding, which
  changes no shape and takes next to no time.
- Weights and inputs are random: figures are of time, never of quality.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from benchmarks.gpu.limits import Work
from dynaflow_serving.capture.fx.effects import EffectTable
from dynaflow_serving.capture.independence import row_wise
from dynaflow_serving.capture.mark import mark
from dynaflow_serving.core.batch import Batch, Split
from dynaflow_serving.core.program import Resource
from dynaflow_serving.strategy.rules import Rule, SplitFunc, SplitModule


@dataclass(frozen=True)
class Shape:
    hidden: int
    heads: int
    kv_heads: int
    head: int
    intermediate: int
    experts: int = 0  # 0: dense
    top_k: int = 0
    shared: int = 0  # intermediate size of the shared expert

    @property
    def attention_weights(self) -> int:
        return self.hidden * self.head * (2 * self.heads + 2 * self.kv_heads)


SHAPES = {
    # Llama-3-8B
    "dense": Shape(hidden=4096, heads=32, kv_heads=8, head=128, intermediate=14336),
    # DeepSeek-V2-Lite, with plain attention
    "moe": Shape(hidden=2048, heads=16, kv_heads=16, head=128, intermediate=1408, experts=64, top_k=6, shared=2816),
    # FLUX.1's dual-stream blocks, without modulation
    "dit": Shape(hidden=3072, heads=24, kv_heads=24, head=128, intermediate=12288),
}


@dataclass(frozen=True)
class RequestRun:
    """Adjacent requests of one kind: all decode with one context length, or a single prompt (context 0)."""

    tokens: tuple[int, int]  # within the micro-batch
    slots: tuple[int, int]
    context: int


@dataclass
class Context:
    """The data that the attention operator reads beside its arguments."""

    runs: tuple[RequestRun, ...] = ()
    keys: list[torch.Tensor] = field(default_factory=list)  # per layer [slots, length, kv_heads, head]
    values: list[torch.Tensor] = field(default_factory=list)


CONTEXT = Context()


def make_cache(shape: Shape, layers: int, batch: Batch, device: str, dtype: torch.dtype) -> None:
    """Make a slot per request, long enough for this step, filled with random keys and values."""
    length = max(t + c for t, c in zip(batch.tokens, batch.context, strict=True))
    size = (len(batch.tokens), length, shape.kv_heads, shape.head)
    CONTEXT.keys, CONTEXT.values = (
        [torch.randn(size, device=device, dtype=dtype) for _ in range(layers)] for _ in range(2)
    )


def contexts(batch: Batch, split: Split) -> list[tuple[RequestRun, ...]]:
    """Return the runs of every micro-batch.

    Raises:
        ValueError: A cut is inside a request, or a prompt has context.
    """
    result = []
    for part in split.micro_batches:
        requests = range(*part.requests)
        if part.tokens[1] - part.tokens[0] != sum(batch.tokens[r] for r in requests):
            raise ValueError("these stacks cut between requests only")
        runs, at = [], 0
        for context, group in groupby(requests, key=lambda r: batch.context[r] or -r):  # each prompt is a run
            members = list(group)
            tokens = sum(batch.tokens[r] for r in members)
            if context > 0 and tokens != len(members):
                raise ValueError("a request with context decodes one token in these stacks")
            runs.append(RequestRun((at, at + tokens), (members[0], members[-1] + 1), max(0, context)))
            at += tokens
        result.append(tuple(runs))
    return result


@torch.library.custom_op("dynaflow_bench::attention", mutates_args=())
def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int) -> torch.Tensor:
    """Attend over ragged requests.

    Args:
        q: [tokens, heads * head]
        k: [tokens, kv_heads * head], which go into the cache of the layer.
        v: As `k`.
        layer: The number of the layer.
    """
    keys, values = CONTEXT.keys[layer], CONTEXT.values[layer]
    kv_heads, head = keys.shape[2:]
    group = q.shape[1] // (kv_heads * head)
    out = torch.empty_like(q)
    for run in CONTEXT.runs:
        (t0, t1), (s0, s1) = run.tokens, run.slots
        if run.context:  # the query heads of one key head are its queries: keys and values are read once
            n, at = t1 - t0, run.context
            keys[s0:s1, at] = k[t0:t1].view(n, kv_heads, head)
            values[s0:s1, at] = v[t0:t1].view(n, kv_heads, head)
            cached = (c[s0:s1, : at + 1].transpose(1, 2) for c in (keys, values))
            attended = F.scaled_dot_product_attention(q[t0:t1].view(n, kv_heads, group, head), *cached)
            out[t0:t1] = attended.reshape(n, -1)
        else:
            n = t1 - t0
            keys[s0, :n], values[s0, :n] = k[t0:t1].view(n, kv_heads, head), v[t0:t1].view(n, kv_heads, head)
            heads = (x[t0:t1].view(1, n, -1, head).transpose(1, 2) for x in (q, k, v))
            attended = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
            out[t0:t1] = attended[0].transpose(0, 1).reshape(n, -1)
    return out


@attention.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int) -> torch.Tensor:
    return torch.empty_like(q)


@torch.library.custom_op("dynaflow_bench::experts", mutates_args=())
def experts(
    x: torch.Tensor, logits: torch.Tensor, ids: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """Sort tokens by expert, two grouped products, weighted sum back; nothing synchronises with the host.

    ids: [tokens, top_k], up: [experts, 2 * intermediate, hidden], down: [experts, hidden, intermediate]."""
    weights = logits.float().gather(1, ids).softmax(-1)
    order = ids.flatten().argsort(stable=True)
    ends = (ids.flatten()[:, None] == torch.arange(len(up), device=x.device)).sum(0).cumsum(0).to(torch.int32)
    gate, value = F.grouped_mm(x[order // ids.shape[1]], up.transpose(1, 2), offs=ends).chunk(2, -1)
    rows = F.grouped_mm(F.silu(gate) * value, down.transpose(1, 2), offs=ends)
    rows = rows[order.argsort()].view(*ids.shape, -1)
    return (rows * weights[..., None].to(x.dtype)).sum(1)


@experts.register_fake
def _(x: torch.Tensor, logits: torch.Tensor, ids: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


row_wise("dynaflow_bench::experts")


def random_routing(shape: Shape, tokens: int, device: str) -> torch.Tensor:
    """[tokens, top_k]: distinct experts of each token, uniform."""
    return torch.rand(tokens, shape.experts, device=device).topk(shape.top_k).indices


RULES: dict[str, tuple[Rule, ...]] = {
    "dense": (SplitFunc("dynaflow_bench::attention", "attention", Resource.MEMORY, ("attention",), context=True),),
    "dit": (),  # marked in the model
}
RULES["moe"] = (
    *RULES["dense"],
    SplitFunc("dynaflow_bench::experts", "experts", Resource.COMPUTE, ("experts",)),
    SplitModule("SharedExpert", "shared_expert", Resource.COMPUTE, ("shared_expert",)),
)


def _cache_of(node: fx.Node) -> tuple[tuple[str, ...], tuple[str, ...]]:
    state = (f"kv_cache.{node.args[3]}",)
    return state, state


EFFECTS: EffectTable = {"dynaflow_bench::attention": _cache_of}


class MLP(nn.Module):
    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, 2 * intermediate, bias=False)
        self.down = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.up(x).chunk(2, -1)
        out: torch.Tensor = self.down(F.silu(gate) * value)
        return out


class SharedExpert(MLP):
    """A class of its own, so that a rule can name it."""


class RoutedExperts(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        n, hidden, intermediate = shape.experts, shape.hidden, shape.intermediate
        self.router = nn.Linear(hidden, n, bias=False)
        self.up = nn.Parameter(torch.randn(n, 2 * intermediate, hidden) * hidden**-0.5)
        self.down = nn.Parameter(torch.randn(n, hidden, intermediate) * intermediate**-0.5)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return experts(x, self.router(x), ids, self.up, self.down)


class DecoderLayer(nn.Module):
    def __init__(self, shape: Shape, index: int) -> None:
        super().__init__()
        self.index, self.sizes = index, [shape.head * n for n in (shape.heads, shape.kv_heads, shape.kv_heads)]
        self.norm1, self.norm2 = nn.RMSNorm(shape.hidden), nn.RMSNorm(shape.hidden)
        self.qkv = nn.Linear(shape.hidden, sum(self.sizes), bias=False)
        self.o_proj = nn.Linear(self.sizes[0], shape.hidden, bias=False)
        if shape.experts:
            self.routed, self.shared = RoutedExperts(shape), SharedExpert(shape.hidden, shape.shared)
        else:
            self.mlp = MLP(shape.hidden, shape.intermediate)

    def forward(self, x: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).split(self.sizes, -1)
        x = x + self.o_proj(attention(q, k, v, self.index))
        h = self.norm2(x)
        return x + self.mlp(h) if ids is None else x + self.routed(h, ids) + self.shared(h)


class DiTBlock(nn.Module):
    """Dual-stream block (MM-DiT): image and text have weights of their own and meet in attention."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        size = shape.heads * shape.head
        for name in ("image", "text"):
            self.add_module(f"{name}_norm1", nn.RMSNorm(shape.hidden))
            self.add_module(f"{name}_norm2", nn.RMSNorm(shape.hidden))
            self.add_module(f"{name}_qkv", nn.Linear(shape.hidden, 3 * size, bias=False))
            self.add_module(f"{name}_out", nn.Linear(size, shape.hidden, bias=False))
            self.add_module(f"{name}_mlp", MLP(shape.hidden, shape.intermediate))

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        image_qkv, text_qkv = self.image_qkv(self.image_norm1(image)), self.text_qkv(self.text_norm1(text))
        with mark("attention", Resource.COMPUTE, ["attention"]):  # with what joins the streams and parts them again
            qkv = torch.cat([image_qkv, text_qkv], 1).chunk(3, -1)
            heads = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in qkv)
            attended = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
            image_attended, text_attended = attended[:, : image.shape[1]], attended[:, image.shape[1] :]
        image = image + self.image_out(image_attended)
        text = text + self.text_out(text_attended)
        return image + self.image_mlp(self.image_norm2(image)), text + self.text_mlp(self.text_norm2(text))


class Stack(nn.Module):
    """Layers one after the other. "dense": [tokens, hidden]; "moe": also the routing; "dit": image and text, both
    [samples, tokens, hidden]."""

    def __init__(self, kind: str, shape: Shape, layers: int) -> None:
        super().__init__()
        self.pair = kind == "dit"
        self.layers = nn.ModuleList(DiTBlock(shape) if self.pair else DecoderLayer(shape, i) for i in range(layers))

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor | tuple[Any, Any]:
        if other is not None:  # else Dynamo has a size of its own for it, and it would count as shared by micro-batches
            torch._check(other.shape[0] == x.shape[0])
        for layer in self.layers:
            if self.pair:
                x, other = layer(x, other)
            else:
                x = layer(x, other)
        return (x, other) if self.pair else x


def decoder_work(shape: Shape, layers: int, batch: Batch, element: int) -> list[Work]:
    """The unavoidable work of a "dense" or "moe" stack: products, prompts' attention, decode attention."""
    tokens = sum(batch.tokens)
    mlp = 3 * shape.hidden * shape.intermediate
    touched = min(shape.experts, tokens * shape.top_k) if shape.experts else 1
    always = shape.attention_weights + 3 * shape.hidden * shape.shared
    products = Work(2 * tokens * (always + mlp * (shape.top_k or 1)), element * (always + mlp * touched))
    width = shape.heads * shape.head
    prompts = sum(4 * width * n * n / 2 for n, c in zip(batch.tokens, batch.context, strict=True) if not c)
    cached = sum(c + 1 for c in batch.context if c)
    decode = Work(4 * width * cached, 2 * element * cached * shape.kv_heads * shape.head)
    return [products, Work(prompts, 0), decode] * layers


def dit_work(shape: Shape, layers: int, samples: int, image: int, text: int, element: int) -> list[Work]:
    weights = shape.attention_weights + 3 * shape.hidden * shape.intermediate
    streams = [Work(2 * samples * n * weights, element * weights) for n in (image, text)]
    return [*streams, Work(4 * shape.heads * shape.head * samples * (image + text) ** 2, 0)] * layers
