"""Inductor for the operators of a Program: each is compiled by itself, so that a schedule can still order them.

Contract
- Annotated operators that carry tags (attention, collectives: one call each) run as they are.
- Operators that make the graph's outputs get a second form that writes into a merge buffer. Inductor fuses its copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import fx

from dynaflow_serving.capture.fx.buffers import add_into_variants
from dynaflow_serving.capture.fx.symbols import fake_value
from dynaflow_serving.capture.program import CapturedProgram


def compile_pieces(capture: CapturedProgram, options: Mapping[str, Any]) -> None:
    """Replace the functions of `capture` by compiled ones. `options` are Inductor's config patches."""
    outputs = set(capture.program.outputs)
    last = {o.name for o in capture.program.operators if outputs & set(o.outputs)}
    add_into_variants(capture, copy=True, only=last, build=lambda variant: _compile(variant, options))
    marked = {o.name for o in capture.program.operators if o.tags}
    for name, piece in capture.pieces.items():
        if name not in marked:
            capture.functions[name] = _compile(piece, options)


def _compile(piece: Any, options: Mapping[str, Any]) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    copy = fx.GraphModule(piece, piece.graph)  # Inductor changes what it is given
    inputs = [fake_value(n) for n in copy.graph.nodes if n.op == "placeholder"]
    mode = torch._guards.detect_fake_mode(inputs)
    with torch._guards.tracing(torch._guards.TracingContext(mode)):  # the whole graph's is not the piece's
        compiled: Any = compile_fx(copy, inputs, config_patches=dict(options))
    return cast(Callable[..., Any], compiled)
