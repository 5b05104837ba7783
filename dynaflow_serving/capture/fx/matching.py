"""Annotations of an FX graph's nodes: the rules' matches are written into the graph, beside the marks.

Contract
- Every annotation is in `node.meta["custom"]["dynaflow"]`. `torch.fx.traceback.annotate` (`mark`) fills it while Dynamo
  traces, and it survives AOT autograd. `apply_rules` fills it afterwards.
- A required rule that matches no node is an `AnnotationError`, which lists what could have matched.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from dynaflow_serving.errors import AnnotationError, unknown_name
from dynaflow_serving.strategy.rules import CALLS, Rule

KEY = "dynaflow"


def apply_rules(gm: fx.GraphModule, rules: Iterable[Rule]) -> None:
    """Write every rule's matches into the nodes' annotations; annotations already there win.

    Raises:
        AnnotationError: a required rule matches nothing.
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
    """Return the nodes that call something."""
    return [n for n in graph.graph.nodes if n.op in CALLS]


def region_of(node: fx.Node) -> dict[str, Any] | None:
    """Return the annotation of a call; None without."""
    region = node.meta.get("custom", {}).get(KEY) if node.op in CALLS else None
    return dict(region) if region else None
