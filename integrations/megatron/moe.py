"""What the micro-batches of a mixture-of-experts layer must not share, and what they must share.

Contract
- A token dispatcher keeps the splits and the permutation of its batch on itself, so each micro-batch has a copy.
- The auxiliary losses of a router are no sums over tokens: the load-balancing loss is a product of two statistics of
  the whole batch. Within a frame the router leaves them out, and keeps what they are made of. After the frames, each is
  made once for the whole batch, by the router's own method, and tied to the decoder's output. That is exact.
- A router computes such losses only while gradients are recorded. Where a layer is recomputed, that is in the backward
  pass, outside of frames: `limits` declines the two together.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from dynaflow_serving.capture.eager.frames import Frame, current_frame

# Methods of `TopKRouter` that attach a loss to their first argument.
LOSSES = ("_apply_aux_loss", "_apply_seq_aux_loss", "_apply_global_aux_loss")
LeftOut = tuple[Any, str, tuple[Any, ...], dict[str, Any]]  # router, method, its arguments

_left_out: dict[Frame, list[LeftOut]] = {}


@functools.cache
def prepare_for_frames() -> None:
    """Replace, once per process, what must behave otherwise within a frame. Outside of frames all is as it was."""
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.moe.router import TopKRouter

    forward = MoELayer.forward

    @functools.wraps(forward)
    def forward_with_own_dispatcher(self: Any, *args: Any, **kwargs: Any) -> Any:
        frame = current_frame()
        if frame is not None:
            self = _with_own_dispatcher(self, _ExchangesAtOnce if frame.has_border("experts") else type(self))
        return forward(self, *args, **kwargs)

    MoELayer.forward = forward_with_own_dispatcher
    for name in (*LOSSES, "apply_z_loss"):
        setattr(TopKRouter, name, _left_out_in_frames(getattr(TopKRouter, name)))


def _with_own_dispatcher(layer: Any, kind: type) -> Any:
    """Return a copy of a layer, which shares the weights and nothing that is of one batch."""
    made = copy.copy(layer)
    made.__dict__ = {**layer.__dict__, "token_dispatcher": copy.copy(layer.token_dispatcher)}
    if kind is not type(layer):
        made.__dict__["stock"] = layer
        made.__class__ = type(kind.__name__, (kind, type(layer)), {})
    return made


def exchange(layer: Any, hidden: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor) -> torch.Tensor:
    """Send tokens to their experts, let these compute, and bring the results back.

    Args:
        layer: The `MoELayer`.
        hidden: The tokens [tokens, 1, h].
        probs: The weights of the experts [tokens, experts].
        routing_map: Which experts each token goes to [tokens, experts].

    Returns:
        The results [tokens, 1, h].
    """
    layer = _with_own_dispatcher(layer, type(layer))
    result, _ = layer.routed_experts_compute(*layer.dispatch(*layer.preprocess(hidden, probs, routing_map)))
    combined: torch.Tensor = layer.token_dispatcher.combine_postprocess(layer.combine(result))
    return combined


class _ExchangesAtOnce:
    """This goes over a `MoELayer` within a frame: after routing, all is one call of `exchange`."""

    def preprocess(self, hidden_states: Any, probs: Any, routing_map: Any) -> Any:
        return hidden_states, (probs, routing_map)

    def dispatch(self, hidden_states: Any, routing: Any) -> Any:
        return hidden_states, routing

    def routed_experts_compute(self, hidden_states: Any, routing: Any) -> Any:
        tokens = hidden_states.reshape(-1, 1, hidden_states.shape[-1])
        return exchange(self.stock, tokens, *routing).view(hidden_states.shape), None  # type: ignore[attr-defined]

    def combine(self, output: Any) -> Any:
        return output

    def postprocess(self, output: Any, shared_expert_output: Any) -> Any:
        return output if shared_expert_output is None else output + shared_expert_output


def _left_out_in_frames(method: Any) -> Any:
    @functools.wraps(method)
    def apply(self: Any, activation: Any, *args: Any, **kwargs: Any) -> Any:
        frame = current_frame()
        if frame is None:
            return method(self, activation, *args, **kwargs)
        if torch.is_grad_enabled():
            _left_out.setdefault(frame, []).append((self, method.__name__, (activation, *args), kwargs))
        return activation

    return apply


def attach_losses(output: torch.Tensor) -> torch.Tensor:
    """Return the decoder's output [s, b, h] with the losses that the routers of its frames have left out.

    The frames are those that have ended since the last call.
    """
    frames = list(_left_out.values())
    _left_out.clear()
    for calls in zip(*frames, strict=True):
        router, name = calls[0][:2]
        method = getattr(router, name)
        if name in LOSSES:
            (_, *given), kwargs = _whole(calls, output)
            output = method(output, *given, **kwargs)
        else:
            (logits,), kwargs = _whole(calls, output)
            output = _Tie.apply(output, method(logits, **kwargs))  # type: ignore[no-untyped-call]
    return output


@contextmanager
def losses_kept() -> Iterator[None]:
    """Keep what Megatron has logged of the routers' losses, whatever this block adds."""
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

    kept = {name: entry["values"].clone() for name, entry in get_moe_layer_wise_logging_tracker().items()}
    try:
        yield
    finally:
        for name, entry in get_moe_layer_wise_logging_tracker().items():
            entry["values"].copy_(kept[name]) if name in kept else entry["values"].zero_()


def drop_losses() -> None:
    """Forget what the frames of a failed step have left out."""
    _left_out.clear()


def _whole(calls: Sequence[LeftOut], output: torch.Tensor) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments of a loss for the whole batch."""
    args = [_join(values, output.shape[0]) for values in zip(*(call[2] for call in calls))]
    kwargs = {key: _join([call[3][key] for call in calls], output.shape[0]) for key in calls[0][3]}
    if calls[0][1] == "_apply_seq_aux_loss":
        args[4] = output.shape[1]  # bsz
    return args, kwargs


def _join(values: Sequence[Any], length: int) -> Any:
    """Join tensors [s * b, experts] of the micro-batches along b; any other argument is the same in all of them."""
    if not isinstance(values[0], torch.Tensor):
        return values[0]
    parts = [v.reshape(length, -1, *v.shape[1:]) for v in values]
    return torch.cat(parts, 1).flatten(0, 1)


class _Tie(torch.autograd.Function):
    """Returns `output`, and takes `other` along into the backward pass."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(other)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradient, torch.zeros_like(ctx.saved_tensors[0])
