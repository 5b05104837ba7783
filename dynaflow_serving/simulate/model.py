"""A decoder as a Program, with the kernels of its operators on one of many ranks.

Contract
- The Program is the one that capture would make: cut at attention, collectives and the MoE's parts, with the same tags.
  So strategies do the same on it as on the real model. Embedding, head and sampling are outside of it.
- Per layer, TP > 1 adds the all-reduces and EP > 1 dispatch and combine:
    dense  qkv  attention  o_proj  [all_reduce.0]  mlp  [all_reduce.1]
    MoE    qkv  attention  o_proj  [all_reduce.0]  gate  [dispatch]  experts  [combine]  [shared_expert]
           [all_gather with EP, all_reduce.1 without]
- With EP each of the `tp` ranks of a group sends its share of the tokens to the experts. A token goes once to each rank
  that has experts of it. Rows are spread evenly over experts, times `Topology.imbalance`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from pydantic import Field

from dynaflow_serving.core.program import Operator, Program, Resource, Scope, Value
from dynaflow_serving.errors import ConfigError
from dynaflow_serving.simulate.catalogue import Entry
from dynaflow_serving.simulate.device import Topology
from dynaflow_serving.simulate.kernel_models import Attention, Collective, Gemm, KernelModel, Streaming


class Shape(Entry):
    """The sizes of a model."""

    kind: ClassVar[str] = "model"
    shipped: ClassVar[str] = "models.yaml"

    hidden: int = Field(ge=1)
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1, description="of queries and keys")
    value_dim: int | None = Field(default=None, ge=1, description="of values; default: head_dim")
    latent: int = Field(default=0, ge=0, description="MLA: elements of a token in the KV cache; 0: those of kv_heads")
    query_latent: int = Field(default=0, ge=0, description="MLA: rank of the query projection; 0: full")
    intermediate: int = Field(ge=1, description="of a dense MLP, gated")
    experts: int = Field(default=0, ge=0, description="routed experts per layer; 0: a dense model")
    experts_per_token: int = Field(default=0, ge=0)
    expert_intermediate: int | None = Field(default=None, ge=1, description="default: intermediate")
    shared_experts: int = Field(default=0, ge=0, description="experts of this size that every token passes")
    dense_layers: int = Field(default=0, ge=0, description="layers before the first with experts")


@dataclass
class DecoderModel:
    """A decoder on one rank.

    Attributes:
        program: Its layers.
        work: The kernels of each operator.
        widths: The elements per token of each value.
    """

    program: Program
    work: dict[str, tuple[KernelModel, ...]]
    widths: dict[str, int]


def decoder(shape: Shape, topology: Topology) -> DecoderModel:
    """Return the layers of a model on one rank.

    Raises:
        ConfigError: Heads or experts cannot be spread evenly.
    """
    if shape.heads % topology.tp:
        raise ConfigError(
            f"{shape.name}: {shape.heads} attention heads cannot be spread evenly over {topology.tp} ranks"
        )
    if topology.ep > 1 and not shape.experts:
        raise ConfigError(f"{shape.name} has no experts: ep must be 1, not {topology.ep}")
    if shape.experts % topology.ep:
        raise ConfigError(f"{shape.name}: {shape.experts} experts cannot be spread evenly over {topology.ep} ranks")
    return _Decoder(shape, topology).build()


@dataclass
class _Decoder:
    """Builds the Program layer by layer; each method returns the names of the values that the next one reads."""

    shape: Shape
    topology: Topology
    values: dict[str, Value] = field(default_factory=dict)
    weights: list[str] = field(default_factory=list)
    operators: list[Operator] = field(default_factory=list)
    work: dict[str, tuple[KernelModel, ...]] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)
    layer: str = ""

    def build(self) -> DecoderModel:
        hidden = self.shape.hidden
        x, y = self.value("x", hidden), ""  # the residual stream, and what is still to be added to it
        for i in range(self.shape.layers):
            self.layer = f"layers.{i}."
            x, y = self._attention(x, y)
            x, y = self._experts(x, y) if self.shape.experts and i >= self.shape.dense_layers else self._mlp(x, y)
        self.layer = ""
        (out,) = self._add("norm", [x, y], {"out": hidden}, [Streaming(4 * hidden)], weight=True)
        inputs = ("x", *self.weights)
        return DecoderModel(Program(inputs, (out,), self.values, tuple(self.operators)), self.work, self.widths)

    # -- one layer -----------------------------------------------------------------------------------
    def _attention(self, x: str, y: str) -> tuple[str, str]:
        s, tp = self.shape, self.topology.tp
        heads, value_dim = s.heads // tp, s.value_dim or s.head_dim
        kv_heads = max(1, s.kv_heads // tp)
        queries, hidden = heads * s.head_dim, s.hidden
        norm = Streaming(hidden * (4 if y else 2))
        if s.latent:  # the widths of latents, for requests that decode: absorbed projections
            cache, decode = s.latent, 2 * s.latent
            up = Gemm(s.query_latent or hidden, queries), Gemm(s.latent, heads * 2 * value_dim)
            gemms: list[KernelModel] = [Gemm(hidden, s.latent + s.query_latent), *up]
        else:
            cache, decode = kv_heads * (s.head_dim + value_dim), s.head_dim + value_dim
            gemms = [Gemm(hidden, queries + cache)]
        rope = Streaming(2 * (queries + cache))
        outputs = {"q": queries + cache} | ({"x": hidden} if y else {})
        q, *rest = self._add("qkv", [x, *filter(None, [y])], outputs, [norm, *gemms, rope], weight=True)
        x = rest[0] if rest else x
        attention = Attention(heads, width=s.head_dim + value_dim, decode_width=decode, cache=cache)
        (a,) = self._add(
            "attention", [q], {"a": heads * value_dim}, [attention],
            Resource.MEMORY, "attention", state=True,
        )  # fmt: skip
        (o,) = self._add("o_proj", [a], {"o": hidden}, [Gemm(heads * value_dim, hidden)], weight=True)
        return x, self._reduce("all_reduce.0", o)

    def _mlp(self, x: str, y: str) -> tuple[str, str]:
        width = math.ceil(self.shape.intermediate / self.topology.tp)
        kernels = [Streaming(4 * self.shape.hidden), *self._gated(width)]
        m, x = self._add("mlp", [x, y], {"m": self.shape.hidden, "x": self.shape.hidden}, kernels, weight=True)
        return x, self._reduce("all_reduce.1", m)

    def _experts(self, x: str, y: str) -> tuple[str, str]:
        s, t = self.shape, self.topology
        hidden, spread = s.hidden, t.ep > 1
        share = 1 / t.tp if spread else 1.0  # of the group's tokens that this rank sends to experts
        cut = 1 if spread else t.tp
        gate: list[KernelModel] = [Streaming(4 * hidden), Gemm(hidden, s.experts), Streaming(2 * s.experts)]
        h, x = self._add("gate", [x, y], {"h": hidden, "x": hidden}, gate, weight=True)
        width = math.ceil((s.expert_intermediate or s.intermediate) / cut)
        rows = s.experts_per_token * share * (t.imbalance if spread else 1.0)
        permute = Streaming(2 * hidden * rows)
        routed = [permute, *self._gated(width, rows, s.experts // t.ep), permute]
        if not spread:
            (m,) = self._add("experts", [h], {"m": hidden}, routed, weight=True)
        else:
            reached = t.ep * (1 - (1 - 1 / t.ep) ** s.experts_per_token)  # ranks that a token is sent to
            sent = [Collective("all_to_all", hidden * reached * share, t.ep)]
            (d,) = self._add("dispatch", [h], {"d": 0}, sent, Resource.NETWORK, "dispatch", group="ep")
            (e,) = self._add("experts", [d], {"e": 0}, routed, weight=True)
            (m,) = self._add("combine", [e, h], {"m": hidden}, sent, Resource.NETWORK, "combine", group="ep")
        if s.shared_experts:
            shared = self._gated(s.shared_experts * width, share)
            (o,) = self._add("shared_expert", [h], {"s": hidden}, shared, tag="shared_expert", weight=True)
            (m,) = self._add("add", [m, o], {"sum": hidden}, [Streaming(3 * hidden * share)])
        if spread and t.tp > 1:
            gather = [Collective("all_gather", hidden, t.tp)]
            (m,) = self._add("all_gather", [m], {"g": hidden}, gather, Resource.NETWORK, "all_gather", group="tp")
            return x, m
        return x, m if spread else self._reduce("all_reduce.1", m)

    def _gated(self, width: int, rows: float = 1.0, groups: int = 1) -> list[KernelModel]:
        hidden = self.shape.hidden
        gate_up = Gemm(k=hidden, n=2 * width, rows=rows, groups=groups)
        down = Gemm(k=width, n=hidden, rows=rows, groups=groups)
        return [gate_up, Streaming(3 * width * rows), down]

    def _reduce(self, name: str, value: str) -> str:
        if self.topology.tp == 1:
            return value
        kernel = Collective("all_reduce", self.shape.hidden, self.topology.tp)
        outputs = {name.replace("all_reduce", "r"): self.shape.hidden}
        return self._add(name, [value], outputs, [kernel], Resource.NETWORK, "all_reduce", group="tp")[0]

    # -- parts of the Program ------------------------------------------------------------------------
    def value(self, name: str, width: int) -> str:
        """Add a value; with width 0 it comes from other ranks and has no token axis of this rank's batch."""
        scope = Scope.BATCH if width else Scope.LOCAL
        self.values[name] = Value(name=name, scope=scope, axis=0 if width else None)
        self.widths[name] = width
        return name

    def _add(
        self, name: str, inputs: Sequence[str], outputs: dict[str, int], kernels: Sequence[KernelModel],
        resource: Resource = Resource.COMPUTE, tag: str = "", group: str = "",
        weight: bool = False, state: bool = False,
    ) -> list[str]:  # fmt: skip
        name = self.layer + name
        made = [self.value(self.layer + v if v != "x" else name + ".x", w) for v, w in outputs.items()]
        read = tuple(inputs)
        if weight:
            self.weights.append(f"{name}.weight")
            self.values[f"{name}.weight"] = Value(name=f"{name}.weight", scope=Scope.SHARED)
            read = (*read, f"{name}.weight")
        self.operators.append(
            Operator(
                name=name, resource=resource, inputs=read, outputs=tuple(made), tags=(tag,) if tag else (),
                writes=(f"{self.layer}kv_cache",) if state else (), group=group, context=state,
                into=tuple(v for v in made if self.widths[v]),
            )
        )  # fmt: skip
        self.work[name] = tuple(kernels)
        return made
