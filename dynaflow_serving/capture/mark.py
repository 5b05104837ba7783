"""`mark`: an annotation in the model's own code, for both front-ends.

Contract
- What runs under a mark becomes an operator of its own, in a graph by `torch.fx.traceback.annotate`, without a graph
  (as a decorator) as a border.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import _GeneratorContextManager
from typing import Any

import torch

from dynaflow_serving.capture.eager.borders import marked_border
from dynaflow_serving.capture.eager.frames import current_frame
from dynaflow_serving.capture.fx.matching import KEY
from dynaflow_serving.core.program import Resource
from dynaflow_serving.errors import AnnotationError, unknown_name
from dynaflow_serving.strategy.rules import SplitFunc


class _Mark(_GeneratorContextManager[None]):
    """What `mark` returns outside compiled code: the annotation, and a border for computations without a graph."""

    rule: SplitFunc

    def __enter__(self) -> None:

        if not torch.compiler.is_compiling() and current_frame() is not None:
            raise AnnotationError(
                f"mark({self.rule.name!r}) as a context manager needs a graph; a model that runs without one (capture: "
                "segments) stops at calls: put the code into a function and use mark as its decorator"
            )
        super().__enter__()

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:  # type: ignore[override]

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
