"""`Decoder` replaces the forward of one `TransformerBlock`: its layers run in micro-batches, forward and backward.

Contract
- The batch is dimension 1 of the hidden states [s, b, h], and dimension 0 of masks. Embedding, output layer and loss
  see the whole batch.
- The decoder is recorded before its first step, in two runs without gradients: of the batch, and of twice the batch.
  Then the ranks that communicate in it compare their plans.
- The backward pass is autograd's. Its plan is the mirror image of the forward's (`planning.mirror`).
- Inference, packed sequences and a batch of one sequence run as in Megatron, and are counted with the reason. A
  strategy that never splits (`comet`, `flux`) orders the un-split step, also of one sequence.
- `strategy: auto` decides in the first step of training, by forward and backward passes of its batch. While training,
  its guard times both, too.
- The first steps under a plan also run as in Megatron, without gradients, and are compared. If they differ, the step
  runs once more as Megatron would.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from dynaflow_serving.config import Config
from dynaflow_serving.core.batch import Batch
from dynaflow_serving.integrations import MEGATRON
from dynaflow_serving.integrations.installed import install, installed_in
from dynaflow_serving.integrations.megatron import borders, moe
from dynaflow_serving.policy.calls import tune_calls
from dynaflow_serving.policy.key import digest
from dynaflow_serving.policy.selector import AutoSelector, build_selector
from dynaflow_serving.policy.table import Table
from dynaflow_serving.session.forward import EagerForward
from dynaflow_serving.session.session import LiveStep, Session

BATCH_FIRST = ("attention_mask", "padding_mask")  # arguments [b, ...], where they are not None or shared


class Decoder:
    """This is the forward of one decoder.

    Attributes:
        block: The `TransformerBlock`.
        stock: Its own forward.
        session: It decides and counts the steps.
        tuned: Whether `strategy: auto` has decided for the batch of training; True for any other strategy.
    """

    def __init__(self, block: Any, config: Config) -> None:
        borders.prepare_for_frames()
        moe.prepare_for_frames()
        self.block, self.stock = block, block.forward
        self.signature = inspect.signature(self.stock)
        device = next(block.parameters()).device.type
        rank = dist.get_rank() if dist.is_initialized() else 0
        self.session = Session(build_selector(config), config, device, mode="training", rank=rank)
        self.tuned = not isinstance(self.session.selector, AutoSelector)
        self.forward = EagerForward(
            self.session,
            self.stock,
            block,
            borders.rules(block.config, self.session.selector, device),
            {},
            training=True,
            token_dim=1,
        )

    @classmethod
    def install(cls, block: Any, config: Config) -> Decoder:
        """Replace the forward of `block`, and return what replaces it.

        Raises:
            InactiveError: The block is enabled already.
        """
        decoder: Decoder = install(block, lambda: cls(block, config))
        return decoder

    @classmethod
    def installed_in(cls, block: Any) -> Decoder:
        """Return the decoder that was installed in `block`.

        Raises:
            InactiveError: The block is not enabled.
        """
        decoder: Decoder = installed_in(block, "megatron")
        return decoder

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(self.signature.bind(*args, **kwargs).arguments)
        hidden = given.get("hidden_states") if self.block.pre_process else self.block.input_tensor
        if not isinstance(hidden, torch.Tensor):  # Megatron wraps it for inference
            return self.stock(*args, **kwargs)
        batch = Batch((1,) * hidden.shape[1], width=hidden.shape[0])
        if reason := self._reason_to_run_whole(given, batch):
            self.session.count_unsplit(batch, reason)
            return self.stock(*args, **kwargs)
        given["hidden_states"] = hidden
        with self._with_input_as_argument():
            if not self.session.plan_caches and self.forward.eager.wants_recording:
                self._record(given)
            if not self.tuned and torch.is_grad_enabled():
                self.tune(batch, given)
            return self._step(batch, given)

    def tune(self, batch: Batch, given: dict[str, Any]) -> Table:
        """Have `strategy: auto` decide by measuring forward and backward passes of `batch`, on all ranks alike.

        Args:
            batch: The batch of training.
            given: The arguments of the block for it.
        """
        self.tuned = True
        key = {
            "engine": f"megatron-core {MEGATRON.installed_version()}",
            "model": digest(json.dumps(_plain(vars(self.block.config)), sort_keys=True)),
        }
        with moe.losses_kept():
            trial = functools.partial(self._trial, batch, given)
            return tune_calls(self.session, [(batch, trial)], self.block.parameters(), key)

    def _trial(self, batch: Batch, given: dict[str, Any]) -> None:
        """Run forward and backward as a trial's candidate does; no gradient of a parameter changes."""
        hidden = given["hidden_states"].detach().requires_grad_()
        with self.session.step(batch) as step, torch.enable_grad():
            try:
                output = self.forward(**{**given, "hidden_states": hidden})
                step.checked(output.detach(), functools.partial(self.stock, **given))
                torch.autograd.grad(output, hidden, torch.ones_like(output))
            finally:
                moe.drop_losses()

    @contextmanager
    def _with_input_as_argument(self) -> Iterator[None]:
        """Let the block take the `hidden_states` that it is given; a later pipeline stage has them elsewhere."""
        pre_process, self.block.pre_process = self.block.pre_process, True
        try:
            yield
        finally:
            self.block.pre_process = pre_process

    def _reason_to_run_whole(self, given: dict[str, Any], batch: Batch) -> str:
        if len(batch.tokens) < 2 and self.session.selector.max_micro_batches > 1:
            return "one sequence"
        if given.get("packed_seq_params") is not None:
            return "packed sequences"
        if given.get("inference_context") is not None or given.get("inference_params") is not None:
            return "inference"
        if given.get("context") is not None or given.get("attention_bias") is not None:
            return "cross attention, or an attention bias"
        return ""

    def _step(self, batch: Batch, given: dict[str, Any]) -> torch.Tensor:
        with self.session.step(batch) as step:
            output = self._planned(step, given) if step.planned else None
            if output is None:
                output = self.stock(**given)
            step.time_backward(given["hidden_states"], output)
        return output

    def _planned(self, step: LiveStep, given: dict[str, Any]) -> torch.Tensor | None:
        """Run a step under its plan; return None where the stock forward must run instead."""
        try:
            output: torch.Tensor = self.forward(**given)
            if not step.planned:  # a micro-batch took another path, and losses of routers are of parts of the batch
                return None
            plain = output.detach()
            inputs = [t for t in given.values() if isinstance(t, torch.Tensor)]
            if step.checked(plain, functools.partial(self.stock, **given), inputs) is plain:
                return self._viewless(moe.attach_losses(output))
            return None
        finally:
            moe.drop_losses()

    def _viewless(self, output: torch.Tensor) -> torch.Tensor:
        """Return `output` as a tensor that is no view, because pipeline stages free what is none."""
        from megatron.core.utils import make_viewless_tensor

        result: torch.Tensor = make_viewless_tensor(output, requires_grad=output.requires_grad, keep_graph=True)
        return result

    def _record(self, given: dict[str, Any]) -> None:
        """Record the decoder, and compare the plans of the ranks that communicate in it.

        Raises:
            InactiveError: It cannot be split, or the ranks have different plans.
        """
        size = given["hidden_states"].shape[1]
        calls = (
            {n: _repeated(n, v, size, times) for n, v in given.items()} for times in ((1, 2) if size > 1 else (2, 3))
        )
        with torch.no_grad():
            self.forward.record_training(calls, _groups(self.block.config))
        logging.getLogger("dynaflow_serving").info("DynaFlow: a Megatron decoder was recorded")


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that are numbers or words; the others are functions, which have no name that lasts."""
    return {name: value for name, value in settings.items() if isinstance(value, int | float | str | None)}


def _repeated(name: str, value: Any, size: int, times: int) -> Any:
    """Return an argument for `times` times the batch."""
    if not isinstance(value, torch.Tensor) or times == 1:
        return value
    if name == "hidden_states":
        return torch.cat([value] * times, 1)
    return torch.cat([value] * times, 0) if name in BATCH_FIRST and value.shape[0] == size else value


def _groups(config: Any) -> list[Any]:
    """Return the process groups whose ranks run the same plan; [None] for one rank."""
    from megatron.core import parallel_state

    groups = []
    if config.tensor_model_parallel_size > 1:
        groups.append(parallel_state.get_tensor_model_parallel_group())
    if config.expert_model_parallel_size > 1:
        groups.append(parallel_state.get_expert_tensor_and_model_parallel_group())
    return groups or [None]
