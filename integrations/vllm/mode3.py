"""In mode 3 (VllmBackend), only the stitching of split steps is ours.

Contract
- vLLM's pieces, fusion passes, graph wrappers and compile cache stay as they are.
- `attach` wraps `CompilationConfig.init_backend`. The VllmBackend that this returns for the language model keeps
  everything it does, and is asked for its pieces afterwards.
- vLLM cuts the graph at operators (`splitting_ops`): the collectives, and the operators that the strategy's `SplitFunc`
  rules name. `limits` declines rules that it cannot cut at.
- Where the pieces give no Program, and `fallback: true` allows it, vLLM's own stitching stays.
- Un-split steps and capture runs call vLLM's own stitching, CUDA graphs included.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import fx

from dynaflow_serving.capture.fx import capture_pieces
from dynaflow_serving.capture.fx.matching import apply_rules
from dynaflow_serving.capture.fx.symbols import input_symbols
from dynaflow_serving.errors import DynaflowError
from dynaflow_serving.integrations.base import KEY
from dynaflow_serving.integrations.vllm.operators import effects, rules
from dynaflow_serving.integrations.vllm.state import current
from dynaflow_serving.session.forward import GraphForward


def attach() -> None:
    """Wrap vLLM's choice of a backend in this process. Further calls change nothing."""
    from vllm.compilation.backends import VllmBackend
    from vllm.config import CompilationConfig

    if hasattr(CompilationConfig.init_backend, "__wrapped__"):
        return
    stock = CompilationConfig.init_backend

    @functools.wraps(stock)
    def init_backend(*args: Any, **kwargs: Any) -> Any:
        backend = stock(*args, **kwargs)
        if not isinstance(backend, VllmBackend) or backend.is_encoder:
            return backend
        if KEY not in (backend.vllm_config.additional_config or {}):
            return backend
        return functools.partial(_compile, backend)

    CompilationConfig.init_backend = init_backend


def _compile(backend: Any, graph: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
    """Compile `graph` by vLLM's `backend`, and put our stitching in the place of its own."""
    session = current().session
    try:  # before the graph is cut: annotations go with the nodes into the pieces
        apply_rules(graph, (*session.selector.annotations, *rules()))
    except DynaflowError as error:
        session.retire(error)
    result = backend(graph, *args, **kwargs)
    if not session.retired:
        try:
            result.optimized_call = _stitch(backend, result.optimized_call)
        except DynaflowError as error:
            session.retire(error)
    return result


def _stitch(backend: Any, whole: Any) -> GraphForward:
    """Capture the pieces of `backend`, and return the forward over them; un-split steps call `whole`."""
    worker = current()
    graphs = {item.submod_name: item.graph for item in backend.piecewise_graphs}
    capture = capture_pieces(backend.split_gm, graphs, tokens=input_symbols(backend.split_gm), effects=effects())
    return worker.forward(worker.session.add(capture), whole)
