"""`mark`: an annotation in the model's own code, for both front-ends.

Contract
- The code under a mark becomes an operator of its own. In a graph, `torch.fx.traceback.annotate` carries the mark on
  the nodes; without a graph, a decorated function is a border.
- A mark is transparent to Dynamo: while Dynamo traces, `mark` returns torch's own annotation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar, cast

import torch
from torch.fx.traceback import annotate

from dynaflow_serving.capture.eager.frames import current_frame
from dynaflow_serving.capture.eager.placing import marked_border
from dynaflow_serving.capture.fx.matching import KEY
from dynaflow_serving.core.program import Resource
from dynaflow_serving.errors import AnnotationError, unknown_name
from dynaflow_serving.strategy.rules import SplitFunc

_F = TypeVar("_F", bound=Callable[..., Any])


class Mark(AbstractContextManager[None]):
    """The annotation outside compiled code: torch's own for graphs, and a border for models without a graph."""

    def __init__(self, rule: SplitFunc) -> None:
        self.rule = rule
        self._annotation = _annotation(rule)

    def __call__(self, function: _F) -> _F:
        return cast(_F, marked_border(self._annotation(function), self.rule))

    def __enter__(self) -> None:
        if not torch.compiler.is_compiling() and current_frame() is not None:
            raise AnnotationError(
                f"mark({self.rule.name!r}) as a context manager needs a graph; a model that runs without one (capture: "
                "eager) stops at calls: put the code into a function and use mark as its decorator"
            )
        self._annotation.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._annotation.__exit__(*error)


def mark(name: str, resource: Resource | str = Resource.COMPUTE, tags: Sequence[str] = ()) -> Mark:
    """Decorator and context manager: the code under it becomes an operator of its own.

    Code that Dynamo traces may use both forms. A model that runs without a graph may use the decorator only.

    Args:
        name: the operator's name, one word.
        resource: what bounds the operator: compute, memory or network.
        tags: labels for strategies, such as `attention`.

    Raises:
        AnnotationError: the resource is unknown, or the name has several words, which a Program's text cannot hold.
    """
    if name.split() != [name]:
        raise AnnotationError(f"a mark's name must be one word, not {name!r}")
    rule = SplitFunc(name, name, _resource(resource), tuple(tags))
    if torch.compiler.is_compiling():
        return _annotation(rule)  # type: ignore[no-any-return]
    return Mark(rule)


def _annotation(rule: SplitFunc) -> Any:
    region = {"name": rule.name, "resource": rule.resource.value, "tags": list(rule.tags)}
    return annotate({KEY: region})


def _resource(resource: Resource | str) -> Resource:
    try:
        return Resource(resource)
    except ValueError:
        raise AnnotationError(unknown_name("resource", str(resource), [r.value for r in Resource])) from None
