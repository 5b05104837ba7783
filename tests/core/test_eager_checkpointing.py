"""Layers that are computed again in the backward pass, in split steps of the eager front-end."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from rounding import integers
from test_eager_training import WIDTH, Model, Training, strategy
from torch.utils.checkpoint import checkpoint

from dynaflow_serving.capture.eager.gradients import Crossing
from dynaflow_serving.capture.eager.state import SuspendedState


class Checkpointed(Model):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["sequential", "comm_overlap"])
def test_gradients_equal(name: str, reentrant: bool) -> None:
    training = Training(strategy(name), model=Checkpointed(reentrant))
    for tokens, micro_batches in ((7, 2), (9, 3)):
        x = integers(tokens, WIDTH)
        wanted = training.gradients(training.model, x)
        found = training.gradients(lambda x, n=micro_batches: training.split(x, n), x)
        assert len(found) == len(wanted) == 10
        assert all(torch.equal(a, b) for a, b in zip(found, wanted))


def test_a_frame_that_saves_under_the_hooks_of_another_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation: hooks of saved tensors stay on the thread while their frame is suspended."""
    training = Training(strategy("comm_overlap"), model=Checkpointed(False))
    make = SuspendedState.__init__

    def leaving_hooks(state: SuspendedState, outside: Any, dtypes: Any, inside: Any) -> None:
        make(state, outside, dtypes, inside)
        for hooks in reversed(state._hooks):
            torch._C._autograd._push_saved_tensors_default_hooks(*hooks)
        state._hooks = []

    monkeypatch.setattr(SuspendedState, "__init__", leaving_hooks)
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        training.gradients(lambda x: training.split(x, 2), integers(7, WIDTH))


def test_what_crosses_to_another_stream_is_not_kept_until_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    crossed: list[weakref.ref[torch.Tensor]] = []
    leave, arrive = Crossing.leave, Crossing.arrive

    def noted_leave(crossing: Crossing, args: Any, kwargs: Any) -> Any:
        args, kwargs = leave(crossing, args, kwargs)
        crossed.append(weakref.ref(args[0]))
        return args, kwargs

    def noted_arrive(crossing: Crossing, result: Any) -> Any:
        result = arrive(crossing, result)
        crossed.append(weakref.ref(result))
        return result

    monkeypatch.setattr(Crossing, "leave", noted_leave)
    monkeypatch.setattr(Crossing, "arrive", noted_arrive)
    training = Training(strategy("comm_overlap"), model=Checkpointed(False))
    result = training.split(integers(7, WIDTH).requires_grad_(), 2)
    assert len(crossed) == 2 * 2 * 2 * 2  # two layers, of two calls each, of two micro-batches, in and out
    assert not any(ref() is not None for ref in crossed)
    result.sum().backward()
