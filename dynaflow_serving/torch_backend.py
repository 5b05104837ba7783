"""`dynaflow_serving.compile` and the `torch.compile` backend "dynaflow" run any PyTorch model under a strategy.

Contract
- `compile(model, "nanoflow")` marks the batch dimension as dynamic, and raises our errors as they are. With
  `torch.compile(model, backend="dynaflow", options={"strategy": "nanoflow"})` the caller marks the dimension.
- Dynamo captures the graph. `level="aot"` lowers it to ATen, where DTensor's collectives are operators of their own.
  `level="inductor"` also compiles each compute operator.
- The token axis is dimension `batch_dim` of every tensor argument that has the same size there. It is made dynamic, so
  that one graph serves the micro-batches and the whole batch.
- Outputs equal those of the un-split model. A model that mixes the batch is refused by name, after its first, un-split
  call. If a model has several graphs, those that mix the batch run whole, which is counted.
- Training works at `level="dynamo"`, where autograd runs through the operators of the plan.
- At the other levels, both the forward and the backward graph run under plans. The backward graph sums gradients over
  the batch, so it is not split. A strategy that orders un-split steps (`comm_overlap`) still overlaps its collectives.
- The first step of each graph under a plan also runs whole, and is compared (`session.graph_check`).
- With collectives in a graph, all ranks of their groups compare plans before the first one runs.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import fx

from dynaflow_serving.capture.fx import partition
from dynaflow_serving.capture.fx.inductor import compile_pieces
from dynaflow_serving.capture.fx.input_writes import settle_input_writes
from dynaflow_serving.capture.fx.matching import apply_rules
from dynaflow_serving.capture.fx.rows import Rows
from dynaflow_serving.capture.fx.symbols import batch_symbols, expression, fake_value
from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.config import Config, load
from dynaflow_serving.core.batch import Batch, Split
from dynaflow_serving.errors import ConfigError, DynaflowError, InactiveError, PartitionError, unknown_name
from dynaflow_serving.executor import EXECUTORS
from dynaflow_serving.policy.calls import tune_calls
from dynaflow_serving.policy.selector import build_selector
from dynaflow_serving.policy.table import Table
from dynaflow_serving.session.agreement import agree, groups_of
from dynaflow_serving.session.forward import SplitForward
from dynaflow_serving.session.graph_check import run_checked
from dynaflow_serving.session.plan_cache import PlanCache
from dynaflow_serving.session.session import LiveStep, Session
from dynaflow_serving.strategy.base import OpScheduler
from dynaflow_serving.strategy.selector import FixedStrategy

Level = Literal["dynamo", "aot", "inductor"]
LEVELS = get_args(Level)


class Compiled(torch.nn.Module):
    """This module runs a model under a strategy; it is called like the model."""

    def __init__(self, model: Callable[..., Any], backend: Backend, batch_dim: int) -> None:
        super().__init__()
        self.model, self._backend, self._batch_dim = model, backend, batch_dim
        self._compiled = torch.compile(self._same_batch, backend=backend)

    @property
    def session(self) -> Session:
        """The session has counted the steps so far, and holds one plan cache per graph."""
        return self._backend.session

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        dim = self._batch_dim
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor) and a.dim() > dim]
        if tensors:
            size, _ = Counter(t.shape[dim] for t in tensors).most_common(1)[0]
            if size < 2:
                return self.model(*args, **kwargs)  # Dynamo specialises on 0 and 1; there is nothing to split
            tensors = [t for t in tensors if t.shape[dim] == size]
        result = self.run(tensors, args, kwargs)
        self._backend.check_active()
        return result

    def run(self, batched: Sequence[torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the model, without checking that anything could be split (`Backend.check_active` does).

        Args:
            batched: The tensors (arguments, caches) that share the batch size, which is above 1.
            args: The positional arguments of the model.
            kwargs: The keyword arguments of the model.
        """
        for tensor in batched:
            torch._dynamo.maybe_mark_dynamic(tensor, self._batch_dim)
        with unwrapped_errors():
            return self._compiled(list(batched), args, kwargs)

    def tune(self, *inputs: tuple[Any, ...]) -> Table:
        """Have `strategy: auto` decide, by measuring, for batches like `inputs`.

        Args:
            inputs: Each holds the positional arguments of one call.

        Returns:
            The table of the decisions.

        Raises:
            ConfigError: The strategy is another one, or no input can be split.
        """
        calls, dim = [], self._batch_dim
        for given in inputs:
            sizes = [a.shape[dim] for a in given if isinstance(a, torch.Tensor) and a.dim() > dim]
            if sizes and (size := Counter(sizes).most_common(1)[0][0]) > 1:
                calls.append((Batch((1,) * size), functools.partial(self, *given)))
        parameters = self.model.parameters() if isinstance(self.model, torch.nn.Module) else ()
        return tune_calls(self.session, calls, parameters, {"engine": "torch", "level": self._backend.level})

    def _same_batch(self, batched: list[torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the model, and tell Dynamo that the batch sizes are equal.

        Otherwise a tensor that is only indexed would keep a symbol of its own.
        """
        for tensor in batched:
            torch._check(tensor.shape[self._batch_dim] == batched[0].shape[self._batch_dim])  # type: ignore[no-untyped-call]
        return self.model(*args, **kwargs)


@contextlib.contextmanager
def unwrapped_errors() -> Iterator[None]:
    """Raise our own errors in this block as they are, not as Dynamo's `BackendCompilerFailed`."""
    try:
        yield
    except torch._dynamo.exc.BackendCompilerFailed as e:
        if isinstance(e.inner_exception, DynaflowError):
            raise e.inner_exception from None
        raise


class Backend:
    """This `torch.compile` backend captures each graph and runs it under the strategy."""

    def __init__(self, session: Session, batch_dim: int, level: Level) -> None:
        self.session, self.batch_dim, self.level = session, batch_dim, level
        self.width = 1  # the positions per row of the batch (`Batch.width`), set anew for each call

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        apply_rules(gm, self.session.selector.annotations)
        if self.level == "dynamo":
            return self._runner(gm)
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch._aot_autograd.utils import make_boxed_func

        # The rows per token of the forward's values, some of which are inputs of the backward graph.
        rows: dict[str, int] = {}
        compiler = aot_autograd(
            fw_compiler=lambda graph, _: make_boxed_func(self._forward_runner(graph, rows)),
            bw_compiler=lambda graph, _: make_boxed_func(self._backward_runner(graph, rows)),
            keep_inference_input_mutations=True,
        )
        compiled: Callable[..., Any] = compiler(gm, example_inputs)
        return compiled

    def check_active(self) -> None:
        """Check that some graph can be split. Other graphs may run whole, with the reason counted.

        Raises:
            InactiveError: No graph has a batch.
            PartitionError: No graph that has a batch can be split.
        """
        selector, plan_caches = self.session.selector, self.session.plan_caches
        if not plan_caches:
            raise InactiveError(
                f"no graph of this model has a dynamic dimension {self.batch_dim}: DynaFlow was requested but would "
                "not be active; pass batch_dim, or inputs that share a batch size at that dimension"
            )
        if all(c.captured.program.unsplittable for c in plan_caches) and selector.max_micro_batches > 1:
            raise PartitionError(f"this model cannot be split: {plan_caches[0].captured.program.unsplittable}")

    def _forward_runner(self, gm: fx.GraphModule, rows: dict[str, int]) -> Callable[..., Any]:
        gm.graph.eliminate_dead_code()
        positions = settle_input_writes(gm, Rows(batch_symbols(gm, self.batch_dim)))
        run = self._runner(gm, rows)
        if not positions:
            return run

        def run_and_write(*args: Any) -> Any:
            results = run(*args)
            for position, contents in zip(positions, results[-len(positions) :], strict=True):
                args[position].copy_(contents)
            return results[: -len(positions)]

        return run_and_write

    def _backward_runner(self, gm: fx.GraphModule, rows: Mapping[str, int]) -> Callable[..., Any]:
        tokens = batch_symbols(gm, self.batch_dim)
        if not tokens or not self.session.selector.schedules_unsplit:
            return gm
        gm.graph.eliminate_dead_code()
        return self._add(gm, partition(gm, tokens=tokens, rows=rows))

    def _runner(self, gm: fx.GraphModule, rows: dict[str, int] | None = None) -> Callable[..., Any]:
        """Capture the graph, and return what runs it; add the rows per token of the graph's values to `rows`."""
        tokens = batch_symbols(gm, self.batch_dim)
        if not tokens:
            return gm  # the set-up between graph breaks has no batch, so there is nothing to split
        capture = partition(gm, tokens=tokens)
        if rows is not None:
            rows |= {capture.nodes.get(v.name, v.name): v.rows for v in capture.program.values.values() if v.rows > 1}
        return self._add(gm, capture)

    def _add(self, gm: fx.GraphModule, captured: CapturedProgram) -> Callable[..., Any]:
        if self.level == "inductor":
            compile_pieces(captured, {})
        plan_cache = self.session.add(captured, _device(gm))
        outputs = [captured.program.values[v] for v in captured.program.outputs]
        axes = [(i, v.axis) for i, v in enumerate(outputs) if v.axis is not None]
        captured.rebuild = _marked_dynamic(captured.rebuild, axes)
        forward = CompiledGraph(self, plan_cache, groups_of(gm))
        return lambda *args: forward(*args)  # AOT autograd sets attributes on what it gets


class CompiledGraph(SplitForward):
    """This callable runs one captured graph. Each call is a step, unless a whole forward is one step."""

    def __init__(self, backend: Backend, plan_cache: PlanCache, groups: list[Any]) -> None:
        """Prepare the graph's first call.

        Args:
            backend: It has captured the graph.
            plan_cache: The plans of the graph.
            groups: The process groups whose ranks have to compare plans before the first call.
        """
        super().__init__(backend.session)
        self.backend, self.plan_cache, self._groups = backend, plan_cache, groups
        self._unagreed = list(groups)
        self._count = plan_cache.captured.token_counter()

    def __call__(self, *args: Any) -> Any:
        while self._unagreed:
            agree([self.plan_cache.texts()], self._unagreed[0])
            del self._unagreed[0]
        if self.session.in_flight is not None:  # the caller that began the step ends it, too
            return super().__call__(*args)
        batch = Batch((1,) * self._count(args), width=self.backend.width)
        with self.session.step(batch, [self.plan_cache]):
            return super().__call__(*args)

    def run_whole(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        step = self.session.in_flight
        assert step is not None
        return self._run(step, step.split, args)

    def run_split(self, step: LiveStep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._run(step, self.plan_cache.allowed_split(step.batch, step.split), args)

    def _run(self, step: LiveStep, split: Split, args: tuple[Any, ...]) -> Any:
        zero_copy = not torch.is_grad_enabled()  # autograd has no `out=`
        signature, check = split.signature, self.session.check
        planned = signature.micro_batches > 1 or self.plan_cache.orders_unsplit(signature.candidate)
        if check is not None and planned and check.wants(step, [self.plan_cache], signature):
            return run_checked(step, check, self.plan_cache, split, args, zero_copy, self._groups)
        return self.plan_cache.run(args, split, zero_copy=zero_copy, traced=step.to_trace)


def compile(
    model: Callable[..., Any],
    strategy: str | Mapping[str, Any] | Config | OpScheduler = "nanoflow",
    *,
    config: Mapping[str, Any] | None = None,
    batch_dim: int = 0,
    level: Level = "dynamo",
    executor: str = "auto",
) -> Compiled:
    """Return `model` under `strategy`.

    Args:
        model: A PyTorch module or function.
        strategy: A name, a YAML file, a mapping, a `Config` or a strategy object.
        config: The options of the strategy, where `strategy` is a name.
        batch_dim: The dimension of the tensor arguments that is the batch.
        level: "dynamo" keeps the model's own calls as operators, "aot" lowers them to ATen, and "inductor" also
            compiles them.
        executor: The name of an executor; "auto" chooses by the device.

    Raises:
        ConfigError: The strategy or one of its options is not valid.
        AnnotationError: On the first call, if an annotation matches nothing.
        PartitionError: On the first call, if the model cannot be split.
        InactiveError: On the first call, if no graph has a dynamic batch.
    """
    return Compiled(model, make_backend(strategy, config, batch_dim, level, executor), batch_dim)


def make_backend(
    strategy: str | Mapping[str, Any] | Config | OpScheduler,
    config: Mapping[str, Any] | None = None,
    batch_dim: int = 0,
    level: Level = "dynamo",
    executor: str = "auto",
) -> Backend:
    """Make the backend that `compile` uses; its arguments are explained there.

    Raises:
        ConfigError: An argument or an option is not valid.
    """
    if level not in LEVELS:
        raise ConfigError(unknown_name("level", level, LEVELS))
    if executor not in (*EXECUTORS, "auto"):
        raise ConfigError(unknown_name("executor", executor, [*EXECUTORS, "auto"]))
    if isinstance(strategy, OpScheduler):
        given = _on(Config(strategy=strategy.name or type(strategy).__name__), executor)
        return Backend(Session(FixedStrategy(strategy), given, None, mode=level.upper()), batch_dim, level)
    if config is not None:
        strategy = {"strategy": strategy, "options": dict(config)}
    loaded = load(strategy)
    if loaded.capture == "eager":
        raise ConfigError(
            "capture: eager is for engines that run models without a graph (vLLM, SGLang); here torch.compile makes "
            "one: set capture: auto"
        )
    loaded = _on(loaded, executor)
    return Backend(Session(build_selector(loaded), loaded, None, mode=level.upper()), batch_dim, level)


def _on(config: Config, executor: str) -> Config:
    """Return `config` with the `executor` that the caller asks for; "auto" leaves the config's own."""
    return config if executor == "auto" else config.model_copy(update={"executor": executor})


def dynaflow(gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None) -> Any:
    """This is the entry point of `torch.compile(model, backend="dynaflow", options=...)`.

    Args:
        gm: The graph that Dynamo has captured.
        example_inputs: Its inputs, as Dynamo gives them.
        options: The arguments of `make_backend`.

    Raises:
        ConfigError: An option is unknown or not valid.
        PartitionError: The graph has no dynamic batch dimension, or an input may or may not be batched.
    """
    options = {"strategy": "nanoflow", **(options or {})}
    valid = inspect.signature(make_backend).parameters
    if unknown := options.keys() - valid.keys():
        raise ConfigError(unknown_name("option", sorted(unknown)[0], valid))
    backend = make_backend(**options)
    if not (symbols := batch_symbols(gm, backend.batch_dim)):
        raise PartitionError(
            f"dimension {backend.batch_dim} of this graph's inputs is static, so nothing can be split: call "
            "torch._dynamo.mark_dynamic on the inputs, pass dynamic=True, or use dynaflow_serving.compile"
        )
    if unrelated := _same_size(gm, backend.batch_dim, symbols):
        raise PartitionError(
            f"inputs {', '.join(unrelated)} are as large as the batch at dimension {backend.batch_dim}, but the model "
            "never relates the sizes: say so in it with torch._check, or use dynaflow_serving.compile, which does"
        )
    compiled = backend(gm, example_inputs)
    backend.check_active()
    return compiled


def _same_size(gm: fx.GraphModule, batch_dim: int, symbols: set[Any]) -> list[str]:
    """Return the inputs that seem to be batched, but whose size at `batch_dim` is none of `symbols`.

    Their size was the same number while tracing. A split would hand them whole to every micro-batch.
    """
    sizes: dict[str, Any] = {
        n.name: fake.shape[batch_dim]
        for n in gm.graph.nodes
        if n.op == "placeholder" and isinstance(fake := fake_value(n), torch.Tensor) and fake.dim() > batch_dim
    }
    batch = {s.node.hint for s in sizes.values() if expression(s) in symbols}
    others = {name: s for name, s in sizes.items() if expression(s).is_Symbol and expression(s) not in symbols}
    return [name for name, s in others.items() if s.node.hint in batch]


def _marked_dynamic(rebuild: Callable[[list[Any]], Any], axes: list[tuple[int, int]]) -> Callable[[list[Any]], Any]:
    """Return a `rebuild` that marks the token axes of the outputs, so that the next graph can be split, too."""

    def mark_and_rebuild(values: list[Any]) -> Any:
        for i, axis in axes:
            torch._dynamo.maybe_mark_dynamic(values[i], axis)
        return rebuild(values)

    return mark_and_rebuild


def _device(gm: fx.GraphModule) -> str:
    """Return the type of the device that the graph's first tensor is on."""
    for n in gm.graph.nodes:
        if isinstance(fake := fake_value(n), torch.Tensor):
            return fake.device.type
    return "cpu"
