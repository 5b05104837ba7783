"""In mode 2 (Dynamo once), vLLM resolves `backend`, a torch.compile backend, by its name.

Contract
- The whole Dynamo graph is cut at vLLM's operators (`operators`) and the strategy's own annotations.
- Each compute operator is compiled as vLLM would have compiled the graph. Inductor does so with vLLM's own options; if
  vLLM's backend is "eager", nothing is compiled. Custom operators run as they are.
- Un-split steps run Dynamo's graph as it is where nothing compiles it. Where operators are compiled, they run the
  un-split plan of these operators, so that nothing is compiled twice.
- Un-split steps always run under a plan if the strategy schedules them.
- Where the graph cannot be captured, and `fallback: true` allows it, it is compiled as vLLM would have done.
- Compiled operators that produce the graph's outputs get a second form that writes into a merge buffer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import fx

from dynaflow_serving.capture.fx import partition
from dynaflow_serving.capture.fx.buffers import own_code
from dynaflow_serving.capture.fx.inductor import compile_pieces
from dynaflow_serving.capture.fx.symbols import input_symbols
from dynaflow_serving.errors import DynaflowError
from dynaflow_serving.integrations.vllm.operators import effects, rules
from dynaflow_serving.integrations.vllm.state import WorkerState, current
from dynaflow_serving.session.forward import GraphForward


def backend(gm: fx.GraphModule, example_inputs: Any, **_: Any) -> Callable[..., Any]:
    """Capture the graph of the whole model, and return the forward that takes its place.

    Raises:
        AnnotationError: An annotation of the strategy matches nothing.
        PartitionError: The graph cannot be turned into a Program.
        InactiveError: This process has no DynaFlow worker.
    """
    worker = current()
    try:
        return _capture(worker, gm)
    except DynaflowError as error:
        worker.session.retire(error)
    if worker.piece_compiler != "inductor":
        return gm.forward
    from torch._inductor.compile_fx import compile_fx

    patches = worker.vllm_config.compilation_config.inductor_compile_config
    return cast(Callable[..., Any], compile_fx(gm, example_inputs, config_patches=patches))


def _capture(worker: WorkerState, gm: fx.GraphModule) -> GraphForward:
    selector = worker.session.selector
    capture = partition(gm, rules=(*selector.annotations, *rules()), tokens=input_symbols(gm), effects=effects())
    whole = None
    if worker.piece_compiler == "inductor":
        compile_pieces(capture, worker.vllm_config.compilation_config.inductor_compile_config)
    elif not selector.schedules_unsplit:
        whole = own_code(gm)  # vLLM's backend "eager" would run the same
    return worker.forward(worker.session.add(capture), whole)
