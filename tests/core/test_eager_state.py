"""What suspended forward passes keep apart: torch's thread-local state and context variables."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import Any

import pytest
import torch
from eager_support import RULES, WIDTH, Attention, Run, recorded, reduce, strategy
from rounding import integers
from torch import nn

from dynaflow_serving.capture.eager import EagerCapture
from dynaflow_serving.capture.eager.frames import Frame

pytestmark = pytest.mark.usefixtures("no_grad")


def kept(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


STATES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "grad": (torch.enable_grad, torch.is_grad_enabled),
    "forward grad": (lambda: torch.autograd.forward_ad._set_fwd_grad_enabled(False), torch._C._is_fwd_grad_enabled),
    "saved tensors": (
        lambda: torch.autograd.graph.saved_tensors_hooks(kept, kept),
        lambda: torch._C._autograd._top_saved_tensors_default_hooks(True),
    ),
    "inference": (torch.inference_mode, torch.is_inference_mode_enabled),
    "autocast": (lambda: torch.autocast("cpu", torch.float16), lambda: torch.is_autocast_enabled("cpu")),
    "autocast dtype": (lambda: torch.autocast("cpu", torch.float16), lambda: torch.get_autocast_dtype("cpu")),
    "function mode": (lambda: torch.device("meta"), lambda: torch.empty(1).device),
    "dispatch keys": (torch._C._AutoDispatchBelowAutograd, lambda: torch._C._dispatch_tls_local_exclude_set()),
}


class InState(nn.Module):
    """Enters a state, calls a border inside it, and looks at the state before and after."""

    def __init__(self, enter: Callable[[], Any], look: Callable[[], Any]) -> None:
        super().__init__()
        self.enter, self.look, self.attention = enter, look, Attention()
        self.seen: list[Any] = []
        self.attention.register_forward_pre_hook(lambda *_: None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = self.look()
        with self.enter():
            inside = self.look()
            x = self.attention(x + 0)
            again = self.look()
        self.seen.append((before, inside, again, self.look()))
        return self.attention(x + 1)


@pytest.mark.parametrize("name", STATES)
def test_state_is_kept_apart(name: str) -> None:
    """Frames enter, suspend inside, and leave in another order than they entered; so does their caller between them."""
    enter, look = STATES[name]
    model = InState(enter, look)
    made = EagerCapture(model.forward, model, RULES[:1])
    made.attach()
    outside = look()
    frames = [Frame(model.forward, made.borders.by_target, 2) for _ in range(3)]
    calls = [f.start((torch.randn(2, WIDTH),), {}) for f in frames]
    assert look() == outside
    within = []
    for i in (1, 0, 2, 1, 2, 0):
        call = calls[i]
        assert call is not None
        within.append(frames[i].call(look))
        assert look() == outside
        calls[i] = frames[i].advance(torch.zeros(2, WIDTH, device="cpu"))
        assert look() == outside
    assert all(f.dead for f in frames) and len(model.seen) == 3
    for before, inside, again, after in model.seen:
        assert before == after == outside != inside == again
    assert within[:3] == [model.seen[0][1]] * 3 and within[3:] == [outside] * 3


def test_a_closed_frame_leaves_its_blocks() -> None:
    enter, look = STATES["inference"]
    model = InState(enter, look)
    made = EagerCapture(model.forward, model, RULES[:1])
    made.attach()
    frame = Frame(model.forward, made.borders.by_target, 2)
    frame.start((torch.randn(2, WIDTH),), {})
    frame.close()
    assert frame.dead and not torch.is_inference_mode_enabled() and not torch.is_grad_enabled()


def test_a_border_runs_in_the_state_of_its_caller() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                x = reduce(self.attention(x + 0))
            return x.float()

    model = Mixed()
    made = recorded(model, RULES, lambda n: (torch.randn(n, WIDTH),))
    x = integers(6, WIDTH)
    for executor in ("sequential", "cpu"):
        got = Run(made, strategy("sequential", micro_batches=2), executor)(2, x)
        assert torch.equal(got, torch.cat([model.forward(x[:3]), model.forward(x[3:])]))


def test_context_variables_are_each_frames_own() -> None:
    variable = contextvars.ContextVar("variable", default=0)

    def body(x: int) -> int:
        variable.set(x)
        frame.suspend(None, (), {})  # type: ignore[arg-type]
        return variable.get()

    frames = []
    for x in (1, 2):
        frame = Frame(body, {}, 1)
        frame.start((x,), {})
        frames.append(frame)
    assert variable.get() == 0
    for x, frame in enumerate(frames, 1):
        frame.advance(None)
        assert frame.result == x
