"""What the two ranks of the tests do."""

from __future__ import annotations

import copy
import faulthandler
import os
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from training import Setup, Trained, begin, make_model, train

from dynaflow_serving.config import load as load_config
from dynaflow_serving.errors import InactiveError

TP = Setup(tensor=2)
SP = Setup(tensor=2, sequence_parallel=True)
EP = Setup(experts=2)
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def config(strategy: str, **more: Any) -> dict[str, Any]:
    return {"strategy": strategy, "options": {"min_tokens": 1}, **more}


@dataclass(frozen=True)
class Compared:
    """A stock training run beside one under DynaFlow.

    Attributes:
        loss: The greatest relative difference of a loss.
        auxiliary: That of what the routers' losses add up to in the log.
        gradient: The greatest difference in a gradient of the first iteration, over that gradient's greatest value.
        same_set: Whether the same parameters have gradients, and none of them is all zero on one side only.
        split: So many steps were split.
        unsplit: So many ran whole, by reason.
        programs: How many programs the report shows, those of backward passes included.
        compared: So many steps were compared with one that ran as in Megatron.
        last: The loss of the last iteration.
    """

    loss: float
    auxiliary: float
    gradient: float
    same_set: bool
    split: int
    unsplit: dict[str, int]
    programs: int
    compared: int
    last: float


def compare(
    cases: Mapping[str, tuple[Setup, dict[str, Any]]], iterations: int | Mapping[str, int]
) -> dict[str, dict[str, Any]]:
    """Train each setup stock and under its config, all or each so long; all setups have the same parallel sizes."""
    found = {}
    for name, (setup, options) in cases.items():
        begin(setup)
        count = iterations if isinstance(iterations, int) else iterations[name]
        found[name] = vars(_compare(setup, options, count))
    return found


def _compare(setup: Setup, options: dict[str, Any], iterations: int) -> Compared:
    from dynaflow_serving.integrations.megatron import enable, report

    stock = train(make_model(setup), setup, iterations)
    model = enable(make_model(setup), options)
    ours = train(model, setup, iterations)
    told = report(model)
    return Compared(
        _relative(stock.losses, ours.losses),
        _relative(stock.auxiliary, ours.auxiliary),
        max(_apart(ours.gradients[name], g) for name, g in stock.gradients.items()),
        {n for n, g in stock.gradients.items() if g.any()} == {n for n, g in ours.gradients.items() if g.any()},
        told.steps.split,
        told.steps.unsplit,
        len(told.programs),
        told.check.steps if told.check else 0,
        ours.losses[-1],
    )


def in_one_kernel(setup: Setup, options: dict[str, Any]) -> dict[str, Any]:
    """Compare, as on a machine where products and their collectives are one kernel; torch's fallbacks do their work."""
    from torch.distributed import _symmetric_memory

    from dynaflow_serving.integrations.megatron import symmetric

    called: Counter[str] = Counter()

    def counted(name: str) -> Any:
        fallback = getattr(_symmetric_memory, f"_{name}_fallback")

        def call(*args: Any) -> Any:
            called[name] += 1
            return fallback(*args)

        return call

    library = torch.library.Library("symm_mem", "IMPL")
    for name in ("fused_all_gather_matmul", "fused_matmul_reduce_scatter"):
        library.impl(name, counted(name), "CPU")
    symmetric.is_available = lambda device, group: True  # type: ignore[assignment]
    begin(setup)
    return vars(_compare(setup, options, 2)) | {"called": dict(called)}


def _relative(wanted: list[float], found: list[float]) -> float:
    return max(abs(a - b) / max(abs(a), 1e-12) if a != b else 0.0 for a, b in zip(wanted, found, strict=True))


def _apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))


def mutated(mutation: str, setup: Setup, options: dict[str, Any]) -> dict[str, Any]:
    """Compare, with one thing taken out of the integration; returns the error's name if there is one.

    Ranks that wait for each other for ever exit.
    """
    begin(setup)
    if mutation:
        faulthandler.dump_traceback_later(30, exit=True)
    from dynaflow_serving.capture.eager import frames
    from dynaflow_serving.integrations.megatron import moe

    if mutation == "the dispatcher is shared":
        moe.copy = _NoCopies  # type: ignore[attr-defined]
    elif mutation == "each micro-batch has its own load-balancing loss":
        moe._left_out_in_frames = lambda method: method  # type: ignore[attr-defined]
    elif mutation == "grad mode leaks":
        frames.Frame._save_state = lambda self: None  # type: ignore[method-assign]
    else:
        assert not mutation
    try:
        return vars(_compare(setup, options, 2))
    except Exception as error:
        return {"error": type(error).__name__}
    finally:
        faulthandler.cancel_dump_traceback_later()


class _NoCopies:
    copy = staticmethod(lambda value: value if type(value).__name__.endswith("Dispatcher") else copy.copy(value))


def refused(cases: Mapping[str, tuple[Setup, dict[str, Any], dict[str, Any]]]) -> dict[str, str]:
    """Enable a model per case, with settings that are changed once it is built; return what each error says."""
    from dynaflow_serving.integrations.megatron import enable

    found = {}
    for name, (setup, changes, options) in cases.items():
        begin(setup)
        model = make_model(setup)
        for key, value in changes.items():
            setattr(model.decoder.config, key, value)
        try:
            enable(model, options)
            found[name] = ""
        except InactiveError as error:
            found[name] = str(error)
    return found


def fall_back(setup: Setup) -> Any:
    """Enable a model that is declined, with `fallback: true`, and train it."""
    from dynaflow_serving.integrations.megatron import enable

    begin(setup)
    model = make_model(setup)
    model.decoder.config.hidden_dropout = 0.1
    enable(model, config("nanoflow", fallback=True))
    return train(model, replace(setup), 1).losses


def with_other_orders(setup: Setup) -> str:
    """Each rank has a strategy of its own; return what the first step raises."""
    from dynaflow_serving.integrations.megatron import enable

    begin(setup)
    model = enable(make_model(setup), config(("nanoflow", "comm_overlap")[dist.get_rank()]))
    try:
        train(model, setup, 1)
    except InactiveError as error:
        return str(error)
    return "no error"


def dies_in_the_backward_pass(setup: Setup) -> str:
    """Rank 1 ends within the second iteration's backward pass; return what rank 0 raises."""
    from dynaflow_serving.integrations.megatron import enable

    begin(setup)
    model = enable(make_model(setup), config("nanoflow"))
    steps = 0

    def hook(gradient: torch.Tensor) -> None:
        nonlocal steps
        steps += 1
        if steps == 2 and dist.get_rank() == 1:
            os._exit(7)

    model.decoder.layers[1].mlp.linear_fc1.weight.register_hook(hook)
    try:
        train(model, setup, 3)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def fails_in_the_second_micro_batch(setup: Setup) -> tuple[str, Trained]:
    """The second micro-batch runs out of memory on both ranks; then training goes on."""
    from dynaflow_serving.integrations.megatron import enable

    begin(setup)
    model = enable(make_model(setup), config("nanoflow"))
    train(model, setup, 1)
    calls = 0

    def hook(module: Any, args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:  # the layer's second call is the second micro-batch's
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = model.decoder.layers[1].register_forward_pre_hook(hook)
    try:
        train(model, setup, 1)
        said = "no error"
    except torch.OutOfMemoryError as error:
        said = str(error)
    handle.remove()
    trained = train(model, setup, 1)
    return said, trained.losses  # type: ignore[return-value]


def becomes_nan(setup: Setup) -> list[str]:
    """Train a model with one weight that is not a number, stock and split; return what each raises."""
    from dynaflow_serving.integrations.megatron import enable

    said = []
    for split in (False, True):
        begin(setup)
        model = make_model(setup)
        if split:
            enable(model, config("nanoflow"))
        with torch.no_grad():
            model.decoder.layers[1].mlp.linear_fc1.weight[0, 0] = torch.nan
        try:
            train(model, setup, 1)
            said.append("no error")
        except RuntimeError as error:
            said.append(str(error))
    return said


def launched(script: str) -> str:
    """Launch the script; return what is said at the end, or the error."""
    begin(TP)
    from dynaflow_serving.integrations.megatron.launcher import launch

    path = list(sys.path)
    try:
        return launch(load_config(config("comm_overlap")), Path(script), ["--lr", "1"])
    except InactiveError as error:
        return f"error: {error}"
    finally:
        sys.path[:] = path
