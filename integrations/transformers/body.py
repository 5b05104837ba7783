"""`Body` replaces the forward of a transformers model's body (`model.base_model`).

Contract
- Dynamo captures the body, and AOT autograd lowers it. Tensor parallelism's collectives are operators of their own
  there, in the forward and in the backward graph.
- The head, the loss and sampling see the whole batch, as in an engine.
- The batch is dimension 0 of all batched arguments and of a cache's keys and values, which are cut into views per
  micro-batch. A static cache is written in place.
- A call with one request, or one that the strategy does not split, is counted with the reason. A forward with graph
  breaks has several graphs, each of which is counted.
- A batch that `strategy: auto` does not split runs the stock forward.
- A model whose graph cannot be split ends the first forward with an error. With `fallback: true` it goes on as the
  stock model, and there is a warning.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from dynaflow_serving.config import Config
from dynaflow_serving.core.batch import Batch
from dynaflow_serving.errors import ConfigError, DynaflowError
from dynaflow_serving.integrations.installed import fall_back, install, installed_in
from dynaflow_serving.integrations.limits import rank_causes, refuse
from dynaflow_serving.policy.calls import tune_calls
from dynaflow_serving.policy.selector import AutoSelector
from dynaflow_serving.policy.table import Table
from dynaflow_serving.session.forward import SplitForward
from dynaflow_serving.session.session import LiveStep
from dynaflow_serving.torch_backend import Backend, Compiled, make_backend


class Body(SplitForward):
    """This is the forward of one model's body.

    Attributes:
        original: The stock forward.
        compiled: The stock forward under `torch.compile` with our backend.
        refused: The reason why the model runs without DynaFlow (`fallback: true`), or "".
    """

    def __init__(self, module: torch.nn.Module, backend: Backend, fallback: bool = False) -> None:
        super().__init__(backend.session)
        self.module, self.original, self.backend, self.fallback = module, module.forward, backend, fallback
        self.signature = inspect.signature(self.original)
        self.compiled = Compiled(self.original, backend, batch_dim=0)
        self.refused = ""

    @classmethod
    def install(cls, model: Any, config: Config) -> None:
        """Replace the forward of the body of `model`.

        Raises:
            ConfigError: The strategy or one of its options is not valid.
            InactiveError: The model is enabled already, or the strategy needs more ranks.
        """
        module, backend = model.base_model, make_backend(config, level="aot")
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        refuse("transformers", config, rank_causes(backend.session.selector, ranks))
        install(module, lambda: cls(module, backend, config.fallback))

    @classmethod
    def installed_in(cls, model: Any) -> Body:
        """Return the body that was installed in `model`.

        Raises:
            InactiveError: The model is not enabled.
        """
        body: Body = installed_in(model.base_model, "transformers")
        return body

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        first = batched_input(arguments_by_name(self.signature, args, kwargs))
        assert first is not None
        size = first.shape[0]
        if size < 2 or self.refused:  # Dynamo specialises on 0 and 1, and there is nothing to split
            self.session.count_unsplit(Batch((1,) * size), self.refused or "one request")
            return self.original(*args, **kwargs)
        self.backend.width = first.shape[1] if first.dim() > 1 else 1
        if not isinstance(self.session.selector, AutoSelector):
            return self._run_graphs(args, kwargs)  # each graph is a step
        with self.session.step(Batch((1,) * size, width=self.backend.width)):
            return super().__call__(*args, **kwargs)

    def run_whole(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        step = self.session.in_flight
        if step is not None and step.planned and not step.micro_batches:
            return self._run_graphs(args, kwargs)  # under the un-split plan of a candidate
        return self.original(*args, **kwargs)

    def run_split(self, step: LiveStep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._run_graphs(args, kwargs)

    def _run_graphs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the captured forward."""
        given = arguments_by_name(self.signature, args, kwargs)
        first = batched_input(given)
        assert first is not None
        size, batched = first.shape[0], [first]
        for value in given.values():
            if isinstance(value, torch.Tensor) and value is not first and value.dim() > 1 and value.shape[0] == size:
                batched.append(value)
        for layer in getattr(given.get("past_key_values"), "layers", ()):
            for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
                if tensor is not None and tensor.numel():
                    # A static address would make the whole shape static; we capture no graph that needs it.
                    tensor.__dict__.pop("_dynamo_static_input_type", None)
                    batched.append(tensor)
        cache = given.get("past_key_values")
        length = cache.get_seq_length() if cache is not None else 0
        try:
            result = self.compiled.run(batched, args, kwargs)
        except DynaflowError as error:
            if cache is not None and cache.get_seq_length() != length:
                raise  # an earlier graph of this call has written the cache: stock code would write it again
            self._refuse(error)
            return self.original(*args, **kwargs)
        try:
            self.backend.check_active()
        except DynaflowError as error:
            self._refuse(error)  # the result is right, and the caches are written: stock code runs from the next call
        return result

    def _refuse(self, error: DynaflowError) -> None:
        """Run stock code from now on, or raise `error` where `fallback: true` does not allow that."""
        fall_back(self.fallback, error)
        self.refused = f"fallback: {error}"

    def tune(self, inputs: Sequence[Mapping[str, Any]], key: Mapping[str, str]) -> Table:
        """Decide by calling the body with each of `inputs`.

        Args:
            inputs: Each holds keyword arguments of the body's forward.
            key: The system and the model, for the key of the table.

        Raises:
            ConfigError: An input cannot be split, or the strategy is not `auto`.
            InactiveError: The ranks have different decisions.
        """
        calls = []
        for given in inputs:
            first = batched_input(given)
            if first is None or first.dim() < 2 or first.shape[0] < 2:
                raise ConfigError(
                    "inputs to tune with are keyword arguments of the model's body, with input_ids or inputs_embeds of "
                    "at least two sequences"
                )
            batch = Batch((1,) * first.shape[0], width=first.shape[1])
            calls.append((batch, functools.partial(self._call_without_gradients, {"use_cache": False, **given})))
        return tune_calls(self.session, calls, self.module.parameters(), key)

    @torch.no_grad()
    def _call_without_gradients(self, given: Mapping[str, Any]) -> None:
        self(**given)


def arguments_by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call of a body, by name."""
    given = signature.bind(*args, **kwargs).arguments
    extra: dict[str, Any] = given.pop("kwargs", {})
    return {**given, **extra}


def batched_input(given: Mapping[str, Any]) -> torch.Tensor | None:
    """Return the argument whose first dimension is the size of the batch, or None."""
    return next((t for name in ("input_ids", "inputs_embeds") if (t := given.get(name)) is not None), None)
