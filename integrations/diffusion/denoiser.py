"""`Denoiser` replaces the forward of a diffusion transformer.

Contract
- A step is a guidance pair, foreseen at its first call (`guidance`), or a single call with several videos or images.
  The batch of a step are the rows of its calls, and its width the values of one row's latents.
- A pair that is not split makes the two calls one after the other, as stock. So does a single call.
- A strategy that orders un-split steps (`comm_overlap` with one micro-batch) orders each call by itself. A call
  with one row, as guidance-distilled models make, can be run so.
- The split forward is the model's own forward, which Dynamo captures. Each micro-batch computes what a call with its
  rows alone would compute.
- A call with one row, no expected pair and no such strategy runs as stock, and is counted with that reason.
- A row is a whole video or image, so `min_tokens` is 1 unless the config says otherwise.
- `strategy: auto` decides in the first step of each kind, by repeating that step.
- A model that is not one graph, or whose graph cannot be split, ends the first step with an error. With
  `fallback: true` it goes on as the stock model, and there is a warning. The rows of two calls are never computed
  together by anything that is not proved to keep them apart.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_map

from dynaflow_serving.config import Config
from dynaflow_serving.core.batch import Batch
from dynaflow_serving.errors import DynaflowError, PartitionError
from dynaflow_serving.integrations.base import Integration
from dynaflow_serving.integrations.diffusion.calls import Call
from dynaflow_serving.integrations.diffusion.guidance import GuidancePairs, joined
from dynaflow_serving.integrations.installed import fall_back, install
from dynaflow_serving.policy.bucket import Bucket, bucket_of
from dynaflow_serving.policy.calls import tune_calls
from dynaflow_serving.policy.selector import AutoSelector, options_of
from dynaflow_serving.torch_backend import Compiled, Level, make_backend

COMPONENTS = ("transformer", "transformer_2")  # of a pipeline


class Denoiser:
    """This is the forward of one diffusion transformer.

    Attributes:
        stock: The stock forward.
        session: It has counted the steps so far.
        refused: The reason why the model runs without DynaFlow (`fallback: true`), or "".
    """

    def __init__(
        self, stock: Callable[..., Any], model: torch.nn.Module, config: Config, level: Level, integration: Integration
    ) -> None:
        """Prepare for the first call.

        Args:
            stock: What runs un-split steps.
            model: The transformer whose forward is captured.
            config: The strategy and its options.
            level: How far the captured graph is lowered.
            integration: The system, for the key of tables of decisions.

        Raises:
            ConfigError: The strategy or one of its options is not valid.
        """
        self.stock, self._model, self._fallback = stock, model, config.fallback
        self._key = {"engine": f"{integration.name} {integration.installed_version()}", "model": type(model).__name__}
        self._backend = make_backend(_of_rows(config), level=level)
        self.session = self._backend.session
        self._compiled = Compiled(model.forward, self._backend, batch_dim=0, one_graph=True)
        self._signature = inspect.signature(model.forward)
        self._pairs = GuidancePairs()
        self._decided: set[Bucket] = set()  # the kinds of steps for which `auto` has decided
        self._shared: frozenset[int] = frozenset()  # leaves of a call without which the rows can be proved independent
        self.refused = ""

    @classmethod
    def install(cls, module: Any, config: Config, integration: Integration) -> Denoiser:
        """Replace the forward of `module`, a transformer or what `torch.compile` has made of one.

        A module that is compiled has compiled operators under DynaFlow, too.

        Raises:
            ConfigError: The strategy or one of its options is not valid.
            InactiveError: The module is enabled already.
        """
        model = getattr(module, "_orig_mod", module)
        level: Level = "aot" if model is module else "inductor"
        made: Denoiser = install(module, lambda: cls(module.forward, model, config, level, integration))
        return made

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self._call(args, kwargs)
        kept, result = self._pairs.take(call)
        if kept:
            return result
        second = None if self.refused else self._pairs.foresee(call)
        if second is None:
            return self._run_alone(call, args, kwargs)
        try:
            first_result, second_result = self._run_pair(call, second)
        except BaseException:
            self._pairs.forget()
            raise
        self._pairs.keep(second, second_result)
        return first_result

    def forget_decisions(self) -> None:
        """Have `strategy: auto` decide anew."""
        self._decided.clear()

    def _call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        given = self._signature.bind(*args, **kwargs).arguments
        extra: dict[str, Any] = given.pop("kwargs", {})
        return Call.of({**given, **extra}, self._shared)

    def _run_alone(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        reason = self._pairs.saw(call)
        if call.rows < self.session.selector.fewest_rows or self.refused:
            self.session.count_unsplit(Batch((1,) * max(call.rows, 1)), self.refused or reason)
            return self.stock(*args, **kwargs)

        def planned(split: bool) -> Any:
            return self._run_graphs(partial(self._sharing, call))

        return self._run_step(call, call.rows, lambda: self.stock(*args, **kwargs), planned)

    def _run_pair(self, first: Call, second: Call) -> Any:
        """Return the results of both calls of a pair."""

        def whole() -> Any:
            return self.stock(**first.arguments), self.stock(**second.arguments)

        def planned(split: bool) -> Any:
            if not split:
                return tuple(self._run_graphs(partial(self._sharing, call)) for call in (first, second))
            both = self._run_graphs(lambda: joined(self._sharing(first), self._sharing(second)))
            return _rows(both, 0, first.rows, 2 * first.rows), _rows(both, first.rows, 2 * first.rows, 2 * first.rows)

        return self._run_step(first, 2 * first.rows, whole, planned)

    def _run_step(self, call: Call, rows: int, whole: Callable[[], Any], planned: Callable[[bool], Any]) -> Any:
        """Run one step, `whole` as stock or `planned` (split or not) as the strategy says; return its result."""
        assert call.latents is not None
        width = self._backend.width = call.leaves[call.latents][0].numel()
        batch = Batch((1,) * rows, width=width)

        def step() -> Any:
            with self.session.step(batch) as live:
                if not live.planned:
                    return whole()
                try:
                    return planned(bool(live.micro_batches))
                except DynaflowError as error:
                    fall_back(self._fallback, error)
                    self.refused = f"fallback: {error}"
                    live.withdraw(self.refused)
                return whole()

        if isinstance(self.session.selector, AutoSelector) and bucket_of(batch) not in self._decided:
            self._decided.add(bucket_of(batch))
            key = {**self._key, "batch": str(bucket_of(batch))}
            tune_calls(self.session, [(batch, step)], self._model.parameters(), key)
        return step()

    def _sharing(self, call: Call) -> Call:
        """Return `call` with what is known to be shared by now."""
        return call if call.shared == self._shared else Call(call.leaves, call.spec, self._shared)

    def _run_graphs(self, make: Callable[[], Call]) -> Any:
        """Return the result of a call that runs under a plan; it is made anew where more turns out to be shared.

        Raises:
            InactiveError: The model is not one graph.
            PartitionError: The graph cannot be split.
        """
        call = make()
        batched = call.batched
        result = self._compiled.run([call.leaves[i] for i in batched], (), call.arguments)
        if found := self._backend.take_shared():
            self._shared |= {batched[i] for i in found}
            for i in self._shared:
                torch._dynamo.mark_static(call.leaves[i], 0)
            return self._run_graphs(make)
        self._backend.check_active(every=True)
        return result


def _of_rows(config: Config) -> Config:
    """Return the config with `min_tokens` 1, where it does not say."""
    if "min_tokens" in config.options or "min_tokens" not in options_of(config.strategy).model_fields:
        return config
    return config.model_copy(update={"options": {**config.options, "min_tokens": 1}})


def _rows(result: Any, start: int, stop: int, rows: int) -> Any:
    """Return the rows from `start` to `stop` of all tensors in a `result` that has so many `rows`.

    Raises:
        PartitionError: A tensor has not.
    """

    def cut(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if not leaf.dim() or leaf.shape[0] != rows:
            raise PartitionError(
                f"the denoiser returned a tensor {list(leaf.shape)} for {rows} rows: it cannot be cut into the results "
                "of the two calls of a guidance pair"
            )
        return leaf[start:stop]

    return tree_map(cut, result)
