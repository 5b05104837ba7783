"""`TrainedBody` replaces the forward of a model's body in training without a graph (`capture: eager`).

Contract
- The body runs once per micro-batch as a suspended computation, which stops at its communication (`borders`). The
  backward pass is autograd's, so it is the forward pass backwards. Layers may be computed again there.
- The batch is dimension 0 of all batched arguments. The head and the loss see the whole batch.
- The body is recorded before its first step, in runs of two and of three sequences. Then the ranks compare their plans.
  Arguments of another form, or layers that take another path, have it recorded anew, a few times.
- A call without gradients, or of one sequence, runs as in Transformers, and is counted with the reason.
- A call with a cache, or one that asks for more than the last hidden state, is an `InactiveError`.
- The first steps under a plan also run as in Transformers, without gradients, and are compared. If they differ, the
  step runs once more as Transformers would.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.utils._pytree as pytree

from dynaflow_serving.config import Config
from dynaflow_serving.core.batch import Batch
from dynaflow_serving.errors import ConfigError, DynaflowError
from dynaflow_serving.integrations.installed import fall_back, install
from dynaflow_serving.integrations.limits import refuse
from dynaflow_serving.integrations.transformers import borders
from dynaflow_serving.integrations.transformers.body import arguments_by_name, batched_input
from dynaflow_serving.integrations.transformers.limits import call_causes
from dynaflow_serving.policy.selector import build_selector
from dynaflow_serving.policy.table import Table
from dynaflow_serving.session.forward import EagerForward
from dynaflow_serving.session.session import Session

RECORDED_SEQUENCES = (2, 3)


class TrainedBody:
    """This is the forward of one model's body in training.

    Attributes:
        original: The stock forward.
        session: It decides and counts the steps.
        refused: The reason why the model runs without DynaFlow (`fallback: true`), or "".
    """

    def __init__(self, module: torch.nn.Module, config: Config) -> None:
        self.module, self.original, self.config = module, module.forward, config
        self.signature = inspect.signature(self.original)
        rank = dist.get_rank() if dist.is_initialized() else 0
        device = next(module.parameters()).device.type
        self.session = Session(build_selector(config), config, device, mode="training", rank=rank)
        self.forward = EagerForward(self.session, self.original, module, borders.RULES, {}, training=True)
        self.refused = ""
        self._form: Any = None  # of the arguments that were recorded

    @classmethod
    def install(cls, model: Any, config: Config) -> None:
        """Replace the forward of the body of `model`.

        Raises:
            ConfigError: The strategy or one of its options is not valid.
            InactiveError: The model is enabled already.
        """
        module = model.base_model
        install(module, lambda: cls(module, config))
        borders.use_local_products(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = arguments_by_name(self.signature, args, kwargs)
        first = batched_input(given)
        assert first is not None
        given = dict(sorted(given.items(), key=lambda item: item[1] is not first))  # the first tensor has the batch
        batch = Batch((1,) * first.shape[0], width=first.shape[1])
        try:
            if reason := self.refused or self._reason_to_run_whole(batch):
                self.session.count_unsplit(batch, reason)
                return self.original(*args, **kwargs)
            refuse("transformers", self.config, call_causes(self.module, given))
            self._record(given, len(batch.tokens))
        except DynaflowError as error:
            fall_back(self.config.fallback, error)
            self.refused = f"fallback: {error}"
            return self(*args, **kwargs)
        return self._step(batch, given)

    def tune(self, inputs: Sequence[Mapping[str, Any]], key: Mapping[str, str]) -> Table:
        """Raise `ConfigError`: `auto` is declined here."""
        raise ConfigError(f"there is nothing to tune for strategy {self.config.strategy!r} without a graph")

    def _reason_to_run_whole(self, batch: Batch) -> str:
        if not torch.is_grad_enabled():
            return "a call without gradients"
        return "one request" if len(batch.tokens) < 2 else ""

    def _record(self, given: dict[str, Any], size: int) -> None:
        """Record the body with gradients, unless it was; without them, its linears would take another path.

        Raises:
            InactiveError: It cannot be split, or the ranks have different plans.
        """
        form = _form(given, size)
        if self.session.plan_caches and form != self._form:
            self.forward.forget("the model was called with arguments of another form")
        if self.session.plan_caches or not self.forward.eager.wants_recording:
            return
        self._form = form
        calls = (pytree.tree_map(functools.partial(_resized, size, count), given) for count in RECORDED_SEQUENCES)
        self.forward.record_training(calls, [borders.tensor_parallel_group(self.module)])
        self.session.logger.info("DynaFlow: the body of a model was recorded for training")

    def _step(self, batch: Batch, given: dict[str, Any]) -> Any:
        with self.session.step(batch) as step:
            output = self.forward(**given)
            if step.planned:
                plain = pytree.tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, output)
                inputs = [value for value in given.values() if isinstance(value, torch.Tensor)]
                if step.checked(plain, functools.partial(self.original, **given), inputs) is not plain:
                    output = self.original(**given)
        return output


def _form(given: dict[str, Any], size: int) -> Any:
    """Return what a plan takes for granted of arguments: their names, and which tensors have the batch."""
    leaves, spec = pytree.tree_flatten(given)
    return spec, [(leaf.dim(), _has_batch(leaf, size)) if isinstance(leaf, torch.Tensor) else None for leaf in leaves]


def _resized(size: int, count: int, leaf: Any) -> Any:
    """Return a leaf of arguments for `count` sequences of a batch of `size`, with some of them twice if need be."""
    return leaf[torch.arange(count, device=leaf.device) % size] if _has_batch(leaf, size) else leaf


def _has_batch(leaf: Any, size: int) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and len(leaf) == size
