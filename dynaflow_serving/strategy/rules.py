"""Rules say where a captured graph is cut; marks in the model's own code say the same.

Contract
- A rule or mark names a region; the nodes it covers become operators of their own.
- One carrier: everything ends up in `node.meta["custom"]["dynaflow"]`, which `torch.fx.traceback.annotate`
  fills while tracing and which survives AOT autograd. Rules are written there before lowering.
- `SplitFunc` and `SplitModule` that match no node raise `AnnotationError` listing what could have matched.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx

from dynaflow_serving.core.program import Gradient, Resource

KEY = "dynaflow"
CALLS = ("call_function", "call_method", "call_module")


@dataclass(frozen=True)
class Rule(abc.ABC):
    """Code that matches the rule becomes operators of its own.

    Attributes:
        target: What to match; subclasses say what it may be.
        name: What the operators are called; by default the last word of the target.
        resource: What bounds the operators.
        tags: What the operators do: of `Tag`, or any other word.
        group: The process group of collectives, which keep one order on all ranks.
        context: Whether the operators read the engine's per-micro-batch context (attention metadata).
        gradient: What bounds the gradients of the operators, where that is something else.
        lowered: Whether the rule looks at the graphs that AOT autograd makes, instead of Dynamo's.
        required: Whether it is an error if nothing matches; integrations list alternatives.
    """

    target: Any
    name: str = ""
    resource: Resource = Resource.COMPUTE
    tags: tuple[str, ...] = ()
    group: str = ""
    context: bool = False
    required: bool = True
    gradient: Gradient | None = None
    lowered: bool = False

    def __post_init__(self) -> None:
        # plain words, without the class of `Tag`: they travel through the metadata of graphs
        object.__setattr__(self, "tags", tuple(map(str, self.tags)))

    @abc.abstractmethod
    def instance(self, node: fx.Node) -> str | None:
        """Return an id that the nodes of one match share; None where the rule does not match `node`."""

    @abc.abstractmethod
    def candidates(self, node: fx.Node) -> str | None:
        """Return the target with which a rule of this kind would match `node`, for error messages."""

    @property
    def label(self) -> str:
        """The name of this rule's operators."""
        return self.name or short_name(self.target)

    @property
    def target_name(self) -> str:
        """The target's name, for error messages."""
        return self.target if isinstance(self.target, str) else short_name(self.target)

    def region(self, instance: str) -> dict[str, Any]:
        """Return what a node's metadata holds about the match called `instance`."""
        return {
            "name": self.label,
            "resource": self.resource.value,
            "tags": list(self.tags),
            "group": self.group,
            "context": self.context,
            "instance": instance,
        }


class SplitFunc(Rule):
    """Calls of a function or operator: a callable, an `OpOverload`, or a name such as `aten.mm`,
    `vllm::all_reduce`, `silu`. A plain Python function is inlined by Dynamo: use `mark` for it."""

    def instance(self, node: fx.Node) -> str | None:
        if node.op == "call_module":
            return None
        return node.name if self.matches(node.target, function_names(node)) else None

    def matches(self, function: Any, names: set[str]) -> bool:
        """Return whether the rule names `function`; `names` are all that it goes by."""
        if isinstance(self.target, str):
            return self.target in names
        return function is self.target or bool(names & set(target_names(self.target)))

    def candidates(self, node: fx.Node) -> str | None:
        return max(function_names(node), key=len, default=None)


class SplitModule(Rule):
    """Everything inside instances of a module class, given as class or class name."""

    def instance(self, node: fx.Node) -> str | None:
        for path, cls in module_stack(node):
            if self.matches(cls):
                return path
        return None

    def matches(self, cls: Any) -> bool:
        """Return whether the rule names `cls`, a class or the dotted name of one."""
        return cls is self.target or getattr(cls, "__name__", str(cls)).rpartition(".")[2] == self.target

    def candidates(self, node: fx.Node) -> str | None:
        stack = module_stack(node)
        return getattr(stack[-1][1], "__name__", str(stack[-1][1])).rpartition(".")[2] if stack else None


class GraphRule(Rule):
    """A rule that looks at a whole graph, once, because what it matches depends on the nodes around."""

    @abc.abstractmethod
    def find(self, graph: fx.Graph) -> Mapping[str, str]:
        """Return the id of its match for each node that the rule covers, by the node's name."""

    def instance(self, node: fx.Node) -> str | None:
        found = _FOUND.setdefault(node.graph, {})
        if self not in found:
            found[self] = self.find(node.graph)
        return found[self].get(node.name)

    def candidates(self, node: fx.Node) -> str | None:
        return None


_FOUND: WeakKeyDictionary[fx.Graph, dict[GraphRule, Mapping[str, str]]] = WeakKeyDictionary()


def module_stack(node: fx.Node) -> list[tuple[str, Any]]:
    """Return (path, class) of the modules around `node`, outermost first; paths are as `named_modules` spells them."""
    return [(_module_path(path), cls) for path, cls in (node.meta.get("nn_module_stack") or {}).values()]


def _module_path(source: str) -> str:
    """Turn `L['self']._modules['layers']._modules['0']` or `L['self'].layers[0]` into `layers.0`."""
    path = re.sub(r"^L\['\w+'\]", "", source)
    path = re.sub(r"\._modules\['(\w+)'\]|\['?(\w+)'?\]", lambda m: f".{m[1] or m[2]}", path)
    return path.strip(".")


def function_names(node: fx.Node) -> set[str]:
    """Return all the names that a call goes by: `aten.mm.default`, `aten.mm`, `aten::mm`, `mm`."""
    names = set(target_names(node.target))
    for name, fn in node.meta.get("source_fn_stack") or ():
        names |= {str(name)} | set(target_names(fn))
    return names


def target_names(target: str | Callable[..., Any]) -> Iterable[str]:
    if isinstance(target, str):
        return (target,)
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        return (f"{namespace}.{name}.{target._overloadname}", f"{namespace}.{name}", f"{namespace}::{name}", name)
    if isinstance(target, torch._ops.OpOverloadPacket):
        namespace, _, name = target._qualified_op_name.partition("::")
        return (f"{namespace}.{name}", f"{namespace}::{name}", name)
    return (getattr(target, "__name__", type(target).__name__),)


def short_name(target: Any) -> str:
    names = [target.__name__] if isinstance(target, type) else list(target_names(target))
    return names[-1].rpartition(".")[2].rpartition("::")[2]
