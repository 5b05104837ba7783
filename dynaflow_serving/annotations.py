"""Where a captured graph is cut: rules of a strategy, and marks in the model's own code.

Contract
- A rule or mark names a region; the nodes it covers become operators of their own.
- One carrier: everything ends up in `node.meta["custom"]["dynaflow"]`, which `torch.fx.traceback.annotate`
  fills while tracing and which survives AOT autograd. Rules are written there before lowering.
- `SplitFunc` and `SplitModule` that match no node raise `AnnotationError` listing what could have matched.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import _GeneratorContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dynaflow_serving.errors import AnnotationError, unknown_name
from dynaflow_serving.ir import Resource

KEY = "dynaflow"
CALLS = ("call_function", "call_method", "call_module")


class _Mark(_GeneratorContextManager[None]):
    """What `mark` returns outside compiled code: the annotation, and a border for computations without a graph."""

    rule: SplitFunc

    def __enter__(self) -> None:
        from dynaflow_serving.segments.frames import current_frame

        if not torch.compiler.is_compiling() and current_frame() is not None:
            raise AnnotationError(
                f"mark({self.rule.name!r}) as a context manager needs a graph; a model that runs without one (capture: "
                "segments) stops at calls: put the code into a function and use mark as its decorator"
            )
        super().__enter__()

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:  # type: ignore[override]
        from dynaflow_serving.segments.borders import marked_border

        plain: _GeneratorContextManager[None] = torch.fx.traceback.annotate(*self.args, **self.kwds)
        return marked_border(plain(function), self.rule)


def mark(
    name: str, resource: Resource | str = Resource.COMPUTE, tags: Sequence[str] = ()
) -> _GeneratorContextManager[None]:
    """Decorator and context manager: what runs under it becomes an operator called `name`.

    Usable inside code that Dynamo traces; as a decorator also in models that run without a graph. Raises
    `AnnotationError` for an unknown resource and for a name of several words, which the text form of a Program cannot
    hold.
    """
    if name.split() != [name]:
        raise AnnotationError(f"a mark's name must be one word, not {name!r}")
    bound = _resource(resource)
    region = {"name": name, "resource": bound.value, "tags": list(tags)}
    annotation: _GeneratorContextManager[None] = torch.fx.traceback.annotate({KEY: region})
    if not torch.compiler.is_compiling():
        annotation.__class__ = _Mark
        annotation.rule = SplitFunc(name, name, bound, tuple(tags))  # type: ignore[attr-defined]
    return annotation


def _resource(resource: Resource | str) -> Resource:
    try:
        return Resource(resource)
    except ValueError:
        raise AnnotationError(unknown_name("resource", str(resource), [r.value for r in Resource])) from None


@dataclass(frozen=True)
class Rule(abc.ABC):
    """What matches becomes operators named `name`, bound by `resource`.

    group: name of the process group for collectives, which keep one order on all ranks.
    context: the operator reads the engine's per-micro-batch context (attention metadata).
    required: whether matching nothing is an error (engine integrations list alternatives).
    """

    target: Any
    name: str = ""
    resource: Resource = Resource.COMPUTE
    tags: tuple[str, ...] = ()
    group: str = ""
    context: bool = False
    required: bool = True

    @abc.abstractmethod
    def instance(self, node: fx.Node) -> str | None:
        """An id shared by the nodes of one match, None where the rule does not match `node`."""

    @abc.abstractmethod
    def candidates(self, node: fx.Node) -> str | None:
        """What a rule of this kind could have named at `node`."""

    @property
    def label(self) -> str:
        """What operators of this rule are called."""
        return self.name or short_name(self.target)

    @property
    def target_name(self) -> str:
        """The target, in errors."""
        return self.target if isinstance(self.target, str) else short_name(self.target)

    def region(self, instance: str) -> dict[str, Any]:
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
        """`names`: all that `function` goes by."""
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
        """`cls`: a class, or the dotted name of one."""
        return cls is self.target or getattr(cls, "__name__", str(cls)).rpartition(".")[2] == self.target

    def candidates(self, node: fx.Node) -> str | None:
        stack = module_stack(node)
        return getattr(stack[-1][1], "__name__", str(stack[-1][1])).rpartition(".")[2] if stack else None


def apply_rules(gm: fx.GraphModule, rules: Iterable[Rule]) -> None:
    """Write every rule's matches into the nodes' annotations; marks already there win.

    Raises `AnnotationError` for a required rule that matches nothing.
    """
    nodes = calls(gm)
    for rule in rules:
        matched = False
        for node in nodes:
            if (instance := rule.instance(node)) is None:
                continue
            matched = True
            custom = node.meta.setdefault("custom", {})
            if KEY not in custom:
                node.meta["custom"] = {**custom, KEY: rule.region(instance)}
        if not matched and rule.required:
            valid = {c for n in nodes if (c := rule.candidates(n))}
            missing = unknown_name("target", rule.target_name, valid)
            raise AnnotationError(f"{type(rule).__name__} matches nothing: {missing}")


def calls(graph: fx.GraphModule) -> list[fx.Node]:
    """The nodes that do something."""
    return [n for n in graph.graph.nodes if n.op in CALLS]


def region_of(node: fx.Node) -> dict[str, Any] | None:
    region = node.meta.get("custom", {}).get(KEY) if node.op in CALLS else None
    return dict(region) if region else None


def module_stack(node: fx.Node) -> list[tuple[str, Any]]:
    """(path, class) of the modules around `node`, outermost first; paths as `named_modules` spells them."""
    return [(_module_path(path), cls) for path, cls in (node.meta.get("nn_module_stack") or {}).values()]


def _module_path(source: str) -> str:
    """`L['self']._modules['layers']._modules['0']` or `L['self'].layers[0]` -> `layers.0`."""
    path = re.sub(r"^L\['\w+'\]", "", source)
    path = re.sub(r"\._modules\['(\w+)'\]|\['?(\w+)'?\]", lambda m: f".{m[1] or m[2]}", path)
    return path.strip(".")


def function_names(node: fx.Node) -> set[str]:
    """All the names a call goes by: `aten.mm.default`, `aten.mm`, `aten::mm`, `mm`."""
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
