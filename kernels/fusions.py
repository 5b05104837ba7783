"""Where a graph computes what a kernel computes: residual add + RMSNorm, SiLU-mul.

Contract
- `find_fusions` reads graphs of Dynamo and of ATen. A pattern matches as a whole, with its dtypes, shapes and layout,
  or not at all; no node is in two matches.
- RMSNorm is the chain that Transformers writes (square, mean, add epsilon, rsqrt, product, in float32), or a call of
  `rms_norm`. The two round at different places in half precision, which the kernel is told (`round_first`).
- Only the sum and the last node of a match are read by other nodes: the kernel computes nothing else.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dynaflow_serving.capture.fx.symbols import expression, fake_value
from dynaflow_serving.kernels.limits import DTYPES, MAX_HIDDEN

_FUNCTIONS: dict[Any, str] = {
    operator.add: "add", torch.add: "add", operator.mul: "mul", torch.mul: "mul", operator.pow: "pow",
    torch.pow: "pow", torch.square: "square", torch.mean: "mean", torch.rsqrt: "rsqrt",
    torch.nn.functional.silu: "silu", torch.rms_norm: "rms_norm", torch.nn.functional.rms_norm: "rms_norm",
    operator.getitem: "getitem",
}  # fmt: skip
_CAST_KEYWORDS = ("dtype", "device", "layout", "pin_memory", "non_blocking", "copy", "memory_format")
_CASTS = ("to", "float", "half", "bfloat16", "type", "type_as", "_to_copy")


@dataclass(frozen=True)
class Fusion:
    """One match: the kernel `kernel`, called with `inputs` and `constants`, returns the values of `outputs`."""

    kernel: str
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    constants: dict[str, Any] = field(default_factory=dict)


class _Different(Exception):
    """The graph computes something else here."""


def find_fusions(graph: fx.Graph) -> list[Fusion]:
    """All matches in `graph`, in its order; of two that share a node, the first."""
    found: list[Fusion] = []
    taken: set[fx.Node] = set()
    for node in graph.nodes:
        for match in (_add_rms_norm, _silu_mul):
            try:
                fusion = match(node)
            except _Different:
                continue
            if taken.isdisjoint(fusion.nodes):
                found.append(fusion)
                taken.update(fusion.nodes)
    return found


def _add_rms_norm(last: fx.Node) -> Fusion:
    walk = _Walk()
    total, weight, eps, round_first = _rms_norm(walk, last)
    x, residual = walk.tensors(total, "add")
    _require(_alike(x, residual, total, last) and _fake(weight).dtype is _fake(x).dtype)
    _require(_fake(x).dim() > 1 and _sizes(weight) == _sizes(x)[-1:])
    _require(isinstance(hidden := _fake(x).shape[-1], int) and 0 < hidden <= MAX_HIDDEN)
    _require(_is_contiguous(total) and _is_contiguous(last))
    walk.require_private({total, last})
    constants: dict[str, Any] = {"eps": eps}
    if not round_first and _fake(x).dtype is not torch.float32:
        constants["round_first"] = False
    return Fusion("add_rms_norm", tuple(walk.nodes), (x, residual, weight), (total, last), constants)


def _rms_norm(walk: _Walk, last: fx.Node) -> tuple[fx.Node, fx.Node, float, bool]:
    """(what is normed, weight, epsilon, whether the normed value is rounded before the weight is applied)."""
    if _function(last) in ("rms_norm", "getitem"):
        return _rms_norm_call(walk, last)
    product = walk.cast(last)
    left, right = walk.tensors(product, "mul")
    normed, weight = (right, left) if _fake(left).dim() == 1 else (left, right)
    round_first = product is last
    _require(not round_first or _fake(normed).dtype is _fake(last).dtype)
    scaled = walk.cast(normed) if round_first else normed
    wide, scale = walk.tensors(scaled, "mul")
    if _function(wide) == "rsqrt":
        wide, scale = scale, wide
    (shifted,) = walk.call(scale, "rsqrt")
    mean, eps = walk.two(shifted, "add")
    _require(isinstance(eps, float))
    _require(walk.square(walk.mean_of_last(mean)) is wide)
    _require(_fake(mean).dtype is _fake(wide).dtype is _fake(scaled).dtype is torch.float32)
    return walk.cast(wide), weight, eps, round_first


def _rms_norm_call(walk: _Walk, last: fx.Node) -> tuple[fx.Node, fx.Node, float, bool]:
    call: Any = last
    if _function(last) == "getitem":
        call, position = walk.two(last, "getitem")
        _require(position == 0 and _function(call) == "_fused_rms_norm")
    arguments = walk.call(call, "rms_norm", "_fused_rms_norm")
    _require(len(arguments) == 4)
    total, shape, weight, eps = arguments
    _require(_is_tensor(total) and _is_tensor(weight) and isinstance(eps, float) and len(shape) == 1)
    return total, weight, eps, False


def _silu_mul(last: fx.Node) -> Fusion:
    walk = _Walk()
    active, up = walk.tensors(last, "mul")
    if _function(active) != "silu":
        active, up = up, active
    gate, *others = walk.call(active, "silu", keywords=("inplace",))
    _require(not others and not active.kwargs.get("inplace"))
    _require(_alike(gate, up, last) and _is_contiguous(last))
    walk.require_private({last})
    return Fusion("silu_mul", tuple(walk.nodes), (gate, up), (last,))


class _Walk:
    """Reads a computation from its last node backwards; `nodes` are those it came by. All raise `_Different`."""

    def __init__(self) -> None:
        self.nodes: dict[fx.Node, None] = {}

    def call(self, node: Any, *functions: str, keywords: tuple[str, ...] = ()) -> tuple[Any, ...]:
        """The arguments of `node`, a call of one of `functions` with no other keywords than these."""
        _require(_function(node) in functions and node.kwargs.keys() <= set(keywords))
        self.nodes[node] = None
        return tuple(node.args)

    def two(self, node: Any, function: str) -> tuple[Any, Any]:
        """The two arguments of `node`."""
        arguments = self.call(node, function)
        _require(len(arguments) == 2)
        return arguments[0], arguments[1]

    def tensors(self, node: Any, function: str) -> tuple[fx.Node, fx.Node]:
        """The two tensors that `node` adds or multiplies."""
        left, right = self.two(node, function)
        _require(_is_tensor(left) and _is_tensor(right))
        return left, right

    def cast(self, node: fx.Node) -> fx.Node:
        """The node of which `node` differs in nothing but the dtype; `node` itself, if it is no cast."""
        if _function(node) not in _CASTS:
            return node
        source: fx.Node = self.call(node, *_CASTS, keywords=_CAST_KEYWORDS)[0]
        _require(_fake(source).device == _fake(node).device)
        return source

    def square(self, node: Any) -> Any:
        """The node that `node` is the square of."""
        base, *others = self.call(node, "pow", "square", "mul")
        _require(others == {"pow": [2], "mul": [base], "square": []}[_function(node)])
        return base

    def mean_of_last(self, node: Any) -> Any:
        """The node that `node` is the mean of, over the last dimension, which is kept with size 1."""
        arguments = self.call(node, "mean", keywords=("dim", "keepdim"))
        given = dict(zip(("input", "dim", "keepdim"), arguments)) | node.kwargs
        _require(given.keys() == {"input", "dim", "keepdim"} and given["keepdim"] is True)
        dims = given["dim"] if isinstance(given["dim"], list | tuple) else [given["dim"]]
        _require(list(dims) in ([-1], [_fake(node).dim() - 1]))
        return given["input"]

    def require_private(self, public: set[fx.Node]) -> None:
        """Only nodes of this computation read its nodes, `public` ones aside."""
        _require(all(user in self.nodes for n in self.nodes if n not in public for user in n.users))


def _function(node: Any) -> str:
    """The function of torch that `node` calls, by one name for all its spellings; "" for any other node."""
    if not isinstance(node, fx.Node):
        return ""
    if node.op == "call_method":
        return str(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        namespace, _, name = node.target._schema.name.partition("::")
        return name if namespace == "aten" else ""
    return _FUNCTIONS.get(node.target, "") if node.op == "call_function" else ""


def _is_tensor(node: Any) -> bool:
    """Whether `node` is a tensor that a kernel can take: no wrapper of several, as DTensor is."""
    fake = fake_value(node) if isinstance(node, fx.Node) else None
    return isinstance(fake, torch.Tensor) and not is_traceable_wrapper_subclass(fake)


def _fake(node: Any) -> torch.Tensor:
    _require(_is_tensor(node))
    fake: torch.Tensor = fake_value(node)
    return fake


def _sizes(node: fx.Node) -> list[Any]:
    return [expression(size) for size in _fake(node).shape]


def _alike(*nodes: fx.Node) -> bool:
    """Whether all have one shape and one dtype, which kernels take."""
    dtype, sizes = _fake(nodes[0]).dtype, _sizes(nodes[0])
    return dtype in DTYPES and all(_fake(n).dtype is dtype and _sizes(n) == sizes for n in nodes)


def _is_contiguous(node: fx.Node) -> bool:
    """Whether `node` is laid out as kernels leave their results; asked without a guard on its sizes."""
    fake = _fake(node)
    expected: Any = 1
    for size, stride in zip(reversed(fake.shape), reversed(fake.stride()), strict=True):
        if expression(stride) != expected:
            return False
        expected *= expression(size)
    return True


def _require(condition: bool) -> None:
    if not condition:
        raise _Different
