"""Mode 2 (Dynamo once): `backend` is the torch.compile backend that vLLM resolves by name.

Contract
- The whole Dynamo graph is cut at vLLM's operators (`operators`) and the strategy's own annotations.
- Each compute operator is compiled as vLLM would have compiled the graph: by Inductor with vLLM's own
  options, or not at all when vLLM's backend is "eager". Custom operators run as they are.
- Compiled operators that produce the graph's outputs get a second form that writes into a merge buffer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import fx

from dynaflow_serving.integrations.vllm.graph import MicroBatchedGraph, token_symbols
from dynaflow_serving.integrations.vllm.operators import effects, rules
from dynaflow_serving.integrations.vllm.session import current
from dynaflow_serving.partition import Capture, add_into_variants, partition
from dynaflow_serving.partition.effects import fake_value


def backend(gm: fx.GraphModule, example_inputs: Any, **_: Any) -> Callable[..., Any]:
    session = current()
    capture = partition(
        gm, rules=(*session.strategy.annotations, *rules()), tokens=token_symbols(gm), effects=effects()
    )
    if session.piece_compiler == "inductor":
        _compile_pieces(capture, session.vllm_config.compilation_config.inductor_compile_config)
    return MicroBatchedGraph(session, session.add(capture))


def _compile_pieces(capture: Capture, options: dict[str, Any]) -> None:
    outputs = set(capture.program.outputs)
    last = {o.name for o in capture.program.operators if outputs & set(o.outputs)}
    add_into_variants(capture, copy=True, only=last)
    marked = {o.name for o in capture.program.operators if o.tags}  # one custom operator each: nothing to compile
    for name, piece in capture.pieces.items():
        if name not in marked:
            capture.functions[name] = _compile(piece, options)
    for name, variant in list(capture.into.items()):
        capture.into[name] = _compile(variant, options)


def _compile(piece: Any, options: dict[str, Any]) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    copy = fx.GraphModule(piece, piece.graph)  # Inductor changes what it is given
    inputs = [fake_value(n) for n in copy.graph.nodes if n.op == "placeholder"]
    compiled: Any = compile_fx(copy, inputs, config_patches=dict(options))
    return cast(Callable[..., Any], compiled)
