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
- At the other levels, both the forward and the backward graph run under plans. The gradients of weights are added up
  over the micro-batches.
- The first step of each graph under a plan also runs whole, and is compared (`session.graph_check`).
- With collectives in a graph, all ranks of their groups compare plans before the first one runs.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import fx

from dynaflow_serving.capture.fx import partition
from dynaflow_serving.capture.fx.batched import (
    BatchedArguments,
    marked_dynamic,
    result_axes,
    shared_inputs,
    unrelated_inputs,
)
from dynaflow_serving.capture.fx.buffers import own_code
from dynaflow_serving.capture.fx.copies import drop_copies_of_collectives
from dynaflow_serving.capture.fx.inductor import compile_pieces
from dynaflow_serving.capture.fx.input_writes import settle_input_writes
from dynaflow_serving.capture.fx.matching import apply_rules
from dynaflow_serving.capture.fx.rng_states import partition_joint_graph
from dynaflow_serving.capture.fx.symbols import batch_symbols, fake_value
from dynaflow_serving.capture.fx.views import view_of_a_written_input, view_results
from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.config import Config, load
from dynaflow_serving.core.batch import Batch
from dynaflow_serving.errors import ConfigError, DynaflowError, InactiveError, PartitionError, unknown_name
from dynaflow_serving.executor import EXECUTORS
from dynaflow_serving.policy.calls import tune_calls
from dynaflow_serving.policy.selector import build_selector
from dynaflow_serving.policy.table import Table
from dynaflow_serving.session.agreement import groups_of
from dynaflow_serving.session.compiled_graph import CompiledGraph
from dynaflow_serving.session.session import Session
from dynaflow_serving.strategy.base import OpScheduler
from dynaflow_serving.strategy.rules import Rule
from dynaflow_serving.strategy.selector import FixedStrategy

Level = Literal["dynamo", "aot", "inductor"]
LEVELS = get_args(Level)
# What Dynamo raises where a model is not one graph: code it cannot trace, shapes that depend on data, too many sizes.
_NO_GRAPH = (
    torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError, torch._dynamo.exc.FailOnRecompileLimitHit
)  # fmt: skip


class Compiled(torch.nn.Module):
    """This module runs a model under a strategy; it is called like the model."""

    def __init__(
        self,
        model: Callable[..., Any],
        backend: Backend,
        batch_dim: int,
        batched: Sequence[str] | None = None,
        one_graph: bool = False,
    ) -> None:
        """Prepare for the first call.

        Args:
            model: A PyTorch module or function.
            backend: It runs the captured graphs.
            batch_dim: The dimension of the tensor arguments that is the batch.
            batched: The names of the arguments that hold the batch, or None to guess.
            one_graph: Whether a model whose code breaks the graph is an `InactiveError`.
        """
        super().__init__()
        self.model, self._backend, self._batch_dim = model, backend, batch_dim
        self._batched = BatchedArguments(model, batch_dim, batched)
        self._compiled = torch.compile(self._same_batch, backend=backend, fullgraph=one_graph)

    @property
    def session(self) -> Session:
        """The session has counted the steps so far, and holds one plan cache per graph."""
        return self._backend.session

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        tensors = self._batched.of_call(args, kwargs)
        size = tensors[0].shape[self._batch_dim] if tensors else 2
        if size < 2 and size < self.session.selector.fewest_rows:  # which is asked only where it may matter
            return self.model(*args, **kwargs)  # there is nothing to plan
        result = self.run(tensors, args, kwargs)
        if not self._batched.share(self._backend.take_shared(), args, kwargs):
            self._backend.check_active()
        return result

    def run(self, batched: Sequence[torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the model, without checking that anything could be split (`Backend.check_active` does).

        Args:
            batched: The tensors (arguments, caches) that share the batch size.
            args: The positional arguments of the model.
            kwargs: The keyword arguments of the model.

        Raises:
            InactiveError: The model is to be one graph, and is not.
        """
        self._backend.one_row = bool(batched) and batched[0].shape[self._batch_dim] == 1
        for tensor in batched:
            torch._dynamo.maybe_mark_dynamic(tensor, self._batch_dim)
        try:
            return self._compiled(list(batched), args, kwargs)
        except torch._dynamo.exc.BackendCompilerFailed as e:
            if isinstance(e.inner_exception, DynaflowError):
                raise e.inner_exception from None  # our own errors as they are
            raise
        except _NO_GRAPH as e:
            why = " ".join(str(e).partition("\n\n")[0].split())
            raise InactiveError(f"this model is not one graph, or not for so many sizes: {why}") from e

    def tune(self, *inputs: tuple[Any, ...]) -> Table:
        """Have `strategy: auto` decide, by measuring, for batches like `inputs`.

        Args:
            inputs: Each holds the positional arguments of one call.

        Returns:
            The table of the decisions.

        Raises:
            ConfigError: The strategy is another one, or no input can be split.
        """
        calls = []
        for given in inputs:
            tensors = self._batched.of_call(given, {})
            if tensors and (size := tensors[0].shape[self._batch_dim]) >= self.session.selector.fewest_rows:
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


class Backend:
    """This `torch.compile` backend captures each graph and runs it under the strategy."""

    def __init__(self, session: Session, batch_dim: int, level: Level) -> None:
        self.session, self.batch_dim, self.level = session, batch_dim, level
        self.width = 1  # the positions per row of the batch (`Batch.width`), set anew for each call
        self.one_row = False  # whether the batch of the call has one row, on which Dynamo specialises
        self._shared: tuple[int, ...] = ()

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        apply_rules(gm, [rule for rule in self.session.selector.annotations if not rule.lowered])
        if self.level == "dynamo":
            captures: list[CapturedProgram] = []
            run = self._runner(gm, captures)
            if captures and captures[0].program.unsplittable:
                self._look_for_shared(gm)
            return run
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch._aot_autograd.utils import make_boxed_func

        forward: list[CapturedProgram] = []
        compiler = aot_autograd(
            fw_compiler=lambda graph, _: make_boxed_func(self._forward_runner(graph, forward)),
            bw_compiler=lambda graph, _: make_boxed_func(self._backward_runner(graph, forward)),
            partition_fn=partition_joint_graph,
            keep_inference_input_mutations=True,
        )
        compiled: Callable[..., Any] = compiler(gm, example_inputs)
        if forward and forward[0].program.unsplittable:
            self._look_for_shared(gm)
        return compiled

    @property
    def _lowered_rules(self) -> list[Rule]:
        return [rule for rule in self.session.selector.annotations if rule.lowered and self.level != "dynamo"]

    def _tokens(self, gm: fx.GraphModule) -> set[Any]:
        """Return the token symbols of a graph; one for a batch of one row has none."""
        return set() if self.one_row else batch_symbols(gm, self.batch_dim)

    def take_shared(self) -> tuple[int, ...]:
        """Return which of the batched tensors must be shared for the graphs captured since to be split."""
        found, self._shared = self._shared, ()
        return found

    def _look_for_shared(self, gm: fx.GraphModule) -> None:
        if self.session.selector.max_micro_batches > 1 and not self.one_row:
            self._shared = shared_inputs(gm, batch_symbols(gm, self.batch_dim))
        if self._shared:
            self.session.plan_caches.pop()  # calls that share these are captured anew

    def check_active(self, every: bool = False) -> None:
        """Check that some graph can be split. Other graphs may run whole, with the reason counted, unless `every`.

        Raises:
            InactiveError: No graph has a batch.
            PartitionError: No graph that has a batch can be split, or one cannot and `every` is to be.
        """
        selector, plan_caches = self.session.selector, self.session.plan_caches
        if not plan_caches:
            raise InactiveError(
                f"no graph of this model has a dynamic dimension {self.batch_dim}: DynaFlow was requested but would "
                "not be active; pass batch_dim, or inputs that share a batch size at that dimension"
            )
        batched = [c.captured.program.unsplittable for c in plan_caches if not c.captured.one_row]
        reasons = [reason for reason in batched if reason]
        if reasons and (every or len(reasons) == len(batched)) and selector.max_micro_batches > 1:
            raise PartitionError(f"this model cannot be split: {reasons[-1]}")

    def _forward_runner(self, gm: fx.GraphModule, forward: list[CapturedProgram]) -> Callable[..., Any]:
        gm.graph.eliminate_dead_code()
        drop_copies_of_collectives(gm)
        reason = view_of_a_written_input(gm)
        positions = settle_input_writes(gm, self._tokens(gm))
        run = self._runner(gm, forward, reason)
        if not positions:
            return run

        def run_and_write(*args: Any) -> Any:
            results = run(*args)
            for position, contents in zip(positions, results[-len(positions) :], strict=True):
                args[position].copy_(contents)
            return results[: -len(positions)]

        return run_and_write

    def _backward_runner(self, gm: fx.GraphModule, forward: list[CapturedProgram]) -> Callable[..., Any]:
        tokens = batch_symbols(gm, self.batch_dim)
        if not tokens or any(captured.one_row for captured in forward):
            return gm
        gm.graph.eliminate_dead_code()
        drop_copies_of_collectives(gm)
        # What a forward that can be split returns and saves has the rows of each token side by side.
        adjacent = any(not captured.program.unsplittable for captured in forward)
        return self._add(gm, partition(gm, rules=self._lowered_rules, tokens=tokens, adjacent=adjacent))

    def _runner(self, gm: fx.GraphModule, captures: list[CapturedProgram], reason: str = "") -> Callable[..., Any]:
        """Capture the graph, which cannot be split for `reason`, if any, and return what runs it."""
        tokens = self._tokens(gm)
        if not tokens and not self.one_row:
            return gm  # the set-up between graph breaks has no batch, so there is nothing to split
        capture = partition(gm, rules=self._lowered_rules, tokens=tokens)
        capture.one_row = self.one_row
        program = capture.program
        written = [v for v in program.inputs if program.values[v].storage in program.written_storages]
        if written and torch.is_grad_enabled() and self.level == "dynamo":
            # Views of one tensor share its version: a write to one would invalidate what others have saved.
            reason = f"input {written[0]} is written in place while autograd records: use torch.no_grad()"
        reason = "the batch has one row" if self.one_row else reason
        if reason and not program.unsplittable:
            capture.program = replace(program, unsplittable=reason)
        captures.append(capture)
        return self._add(gm, capture)

    def _add(self, gm: fx.GraphModule, captured: CapturedProgram) -> Callable[..., Any]:
        if self.level == "inductor":
            compile_pieces(captured, {})
        session = self.session
        plan_cache = session.add(captured, _device(gm))
        axes = result_axes(gm, captured)
        captured.rebuild = marked_dynamic(captured.rebuild, axes)
        # Compiled operators, the strategy's order and CUDA graphs are what un-split plans have and the graph lacks.
        plain = self.level != "inductor" and not session.selector.schedules_unsplit and session.config.graph == "off"
        whole = marked_dynamic(own_code(gm), axes) if plain else None
        views = view_results(gm, axes)
        forward = CompiledGraph(session, plan_cache, groups_of(gm), whole, views, lambda: self.width)
        return lambda *args: forward(*args)  # AOT autograd sets attributes on what it gets


def compile(
    model: Callable[..., Any],
    strategy: str | Mapping[str, Any] | Config | OpScheduler = "nanoflow",
    *,
    config: Mapping[str, Any] | None = None,
    batch_dim: int = 0,
    batched: Sequence[str] | None = None,
    level: Level = "dynamo",
    executor: str = "auto",
) -> Compiled:
    """Return `model` under `strategy`.

    Args:
        model: A PyTorch module or function.
        strategy: A name, a YAML file, a mapping, a `Config` or a strategy object.
        config: The options of the strategy, where `strategy` is a name.
        batch_dim: The dimension of the tensor arguments that is the batch.
        batched: The names of the arguments that hold the batch. By default, those whose size at `batch_dim` is the most
            frequent, without those that have to be shared for the model to be split.
        level: "dynamo" keeps the model's own calls as operators, "aot" lowers them to ATen, and "inductor" also
            compiles them.
        executor: The name of an executor; "auto" chooses by the device.

    Raises:
        ConfigError: The strategy or one of its options is not valid.
        AnnotationError: On the first call, if an annotation matches nothing.
        PartitionError: On the first call, if the model cannot be split.
        InactiveError: On the first call, if no graph has a dynamic batch.
    """
    return Compiled(model, make_backend(strategy, config, batch_dim, level, executor), batch_dim, batched)


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
    if unrelated := unrelated_inputs(gm, backend.batch_dim, symbols):
        raise PartitionError(
            f"inputs {', '.join(unrelated)} are as large as the batch at dimension {backend.batch_dim}, but the model "
            "never relates the sizes: say so in it with torch._check, or use dynaflow_serving.compile, which does"
        )
    compiled = backend(gm, example_inputs)
    backend.check_active()
    return compiled


def _device(gm: fx.GraphModule) -> str:
    """Return the type of the device that the graph's first tensor is on."""
    for n in gm.graph.nodes:
        if isinstance(fake := fake_value(n), torch.Tensor):
            return fake.device.type
    return "cpu"
