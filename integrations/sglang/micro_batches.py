"""`MicroBatches` cuts one step's ForwardBatch; only this file knows how SGLang lays out a step.

Contract
- A micro-batch is a ForwardBatch of its own, with views into the step's tensors. SGLang's two-batch overlap code makes
  it, and raises on a field that it does not know.
- A cut inside a request works like SGLang's chunked prefill: the later part sees the earlier one as its prefix.
- Each micro-batch has an attention backend of its own, which plans for it before the first micro-batch runs.
- Models reach backend and caches by a module global (`forward_context`). `enter` points it to a micro-batch, and
  `leave` to the step.
- Nothing here is made for a step that is not split.
- `check_layout` compares the signatures that this file relies on, and raises `InactiveError` if one has changed.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import accumulate
from typing import Any

from dynaflow_serving.core.batch import Batch, MicroBatch
from dynaflow_serving.errors import InactiveError

BODY_ARGUMENTS = ("input_ids", "positions", "forward_batch")
_FILTER_ARGUMENTS = (
    "batch",
    "start_token_index",
    "end_token_index",
    "start_seq_index",
    "end_seq_index",
    "out_num_token_non_padded",
    "out_num_token_non_padded_cpu",
)
_CONTEXT_FIELDS = ("attn_backend", "moe_num_token_non_padded")


def describe(forward_batch: Any) -> Batch:
    """Describe the step as strategies see it.

    There are no dependences: SGLang's radix tree holds finished forwards only, so no request reads KV slots that
    another one writes in the same step.
    """
    if forward_batch.forward_mode.is_decode():
        lengths = forward_batch.seq_lens_cpu
        context = tuple(n - 1 for n in lengths.tolist()) if lengths is not None else ()
        return Batch((1,) * forward_batch.batch_size, context)
    return Batch(tuple(forward_batch.extend_seq_lens_cpu), tuple(forward_batch.extend_prefix_lens_cpu))


class MicroBatches:
    """These are the micro-batches of one split step."""

    def __init__(self, forward_batch: Any, parts: Sequence[MicroBatch], backends: list[Any]) -> None:
        """Cut the step, and plan the attention of each micro-batch.

        Args:
            forward_batch: The whole step.
            parts: The micro-batches.
            backends: The attention backends, at least one per micro-batch.
        """
        from sglang.srt.model_executor.forward_context import get_forward_context, set_forward_context

        self._set_context = set_forward_context
        self._outer = get_forward_context()
        self.batches = [_cut(forward_batch, part) for part in parts]
        self._contexts = [
            replace(self._outer, attn_backend=backend, moe_num_token_non_padded=batch.moe_num_token_non_padded)
            for batch, backend in zip(self.batches, backends)
        ]
        try:
            for index, batch in enumerate(self.batches):
                self.enter(index)
                backends[index].init_forward_metadata(batch)
        finally:
            self.leave()

    def enter(self, micro_batch: int) -> None:
        """Point SGLang's forward context to a micro-batch."""
        self._set_context(self._contexts[micro_batch])

    def leave(self) -> None:
        """Point SGLang's forward context to the whole step again."""
        self._set_context(self._outer)

    def arguments(self, micro_batch: int) -> tuple[Any, Any, Any]:
        """Return the arguments of the model's body, as `BODY_ARGUMENTS` names them."""
        batch = self.batches[micro_batch]
        return batch.input_ids, batch.positions, batch


def check_layout(body: Any) -> None:
    """Check that SGLang and `body` have the signatures that this file was written for.

    Raises:
        InactiveError: One of them has changed.
    """
    from sglang.srt.batch_overlap.two_batch_overlap import TboForwardBatchPreparer
    from sglang.srt.model_executor.forward_context import ForwardContext

    found = {
        "TboForwardBatchPreparer.filter_batch": (
            tuple(inspect.signature(TboForwardBatchPreparer.filter_batch).parameters),
            _FILTER_ARGUMENTS,
        ),
        "ForwardContext": (tuple(f.name for f in fields(ForwardContext)), _CONTEXT_FIELDS),
        f"{type(body).__name__}.forward": (
            tuple(inspect.signature(body.forward).parameters)[: len(BODY_ARGUMENTS)],
            BODY_ARGUMENTS,
        ),
    }
    for name, (actual, expected) in found.items():
        if actual != expected:
            raise InactiveError(
                f"{name} takes ({', '.join(actual)}), and DynaFlow needs ({', '.join(expected)}): this model or this "
                "build of SGLang is not supported yet; remove the dynaflow option for it"
            )


def _cut(batch: Any, part: MicroBatch) -> Any:
    """Return the ForwardBatch of the micro-batch `part`."""
    import torch
    from sglang.srt.batch_overlap.two_batch_overlap import TboForwardBatchPreparer

    (first, last), (start, stop) = part.requests, part.tokens
    tokens = stop - start
    real = batch.num_token_non_padded  # a tensor where the model masks padding; an eager step has none
    cut = TboForwardBatchPreparer.filter_batch(
        batch,
        start_token_index=start,
        end_token_index=stop,
        start_seq_index=first,
        end_seq_index=last,
        out_num_token_non_padded=None if real is None else torch.full_like(real, tokens),
        out_num_token_non_padded_cpu=tokens,
    )
    if cut.extend_seq_lens_cpu is None:
        return cut
    offsets = [0, *accumulate(batch.extend_seq_lens_cpu)]
    head, tail = start - offsets[first], offsets[last] - stop  # tokens that the neighbours have
    if head or tail:
        _shorten(cut, head, tail)
    # filter_batch leaves the offsets as they are in the whole step.
    cut.extend_start_loc = (cut.extend_start_loc - start).clamp_(min=0)
    return cut


def _shorten(cut: Any, head: int, tail: int) -> None:
    """Leave `head` tokens of the first request and `tail` of the last one to the neighbours."""
    for suffix in ("", "_cpu"):
        lengths, prefixes, ends = (
            _copy(getattr(cut, field + suffix)) for field in ("extend_seq_lens", "extend_prefix_lens", "seq_lens")
        )
        lengths[0] -= head
        lengths[-1] -= tail
        prefixes[0] += head
        ends[-1] -= tail
        setattr(cut, "extend_seq_lens" + suffix, lengths)
        setattr(cut, "extend_prefix_lens" + suffix, prefixes)
        setattr(cut, "seq_lens" + suffix, ends)
    cut.seq_lens_sum -= tail


def _copy(values: Any) -> Any:
    return values[:] if isinstance(values, list) else values.clone()
