"""Guidance pairs: two calls of a denoiser as one step, and never a result for other arguments than it was made from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dynaflow_serving.config import load
from dynaflow_serving.errors import InactiveError, PartitionError
from dynaflow_serving.integrations.base import Integration
from dynaflow_serving.integrations.diffusion.denoiser import Denoiser
from dynaflow_serving.integrations.diffusion.guidance import NO_PAIR, WASTED
from dynaflow_serving.policy.selector import AutoSelector

TEST = Integration("test", "no such package", "no_such_package", ())


class Model(torch.nn.Module):
    """A denoiser on whole numbers, so that results are exact; it counts the rows that it has computed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(12.0).view(3, 4) - 5, requires_grad=False)

    def forward(
        self, hidden_states: torch.Tensor, text: Any, timestep: torch.Tensor, return_dict: bool = False
    ) -> tuple[torch.Tensor]:
        (words,) = text if isinstance(text, list) else (text,)
        return (hidden_states @ self.weight.t() @ self.weight + words.sum(1, keepdim=True) * timestep[:, None, None],)


def integers(*shape: int) -> torch.Tensor:
    return torch.randint(-4, 5, shape).float()


def make(strategy: str = "comm_overlap") -> tuple[Model, Denoiser]:
    torch._dynamo.reset()
    model = Model()
    config = load({"strategy": strategy})
    return model, Denoiser(model.forward, model, config, "aot", TEST)


def expected(model: Model, *args: Any) -> torch.Tensor:
    return Model.forward(model, *args)[0]


def check_step(denoiser: Denoiser, model: Model, latents: torch.Tensor, time: torch.Tensor, *texts: Any) -> None:
    for text in texts:
        (found,) = denoiser(hidden_states=latents, text=text, timestep=time)
        assert torch.equal(found, expected(model, latents, text, time))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("nested", [False, True])
def test_the_calls_of_a_pair_are_one_split_step(rows: int, nested: bool) -> None:
    model, denoiser = make()
    texts = [integers(rows, 3, 4) for _ in range(2)]
    given: list[Any] = [[t] for t in texts] if nested else texts
    with torch.no_grad():
        for number in range(4):
            check_step(denoiser, model, integers(rows, 5, 4), torch.full((rows,), float(number)), *given)
    steps = denoiser.session.report().steps
    assert steps.split == 3 + (2 if rows > 1 else 0)  # the first two calls, before a pair is known, have rows to split
    assert sum(steps.unsplit.values()) == (2 if rows == 1 else 0)


def test_a_pair_works_in_inference_mode_where_pytorch_counts_no_writes() -> None:
    model, denoiser = make()
    texts = [integers(1, 3, 4) for _ in range(2)]
    with torch.inference_mode():
        for number in range(3):
            check_step(denoiser, model, integers(1, 5, 4), torch.full((1,), float(number)), *texts)
        assert denoiser.session.counts.split == 2
        latents, time = integers(1, 5, 4), torch.ones(1)
        denoiser(hidden_states=latents, text=texts[0], timestep=time)
        latents += 1
        check_step(denoiser, model, latents, time, texts[1])
    assert denoiser.session.counts.unsplit[WASTED] == 1


def test_a_timestep_that_is_made_anew_for_each_call_is_the_same() -> None:
    model, denoiser = make()
    texts = [integers(1, 3, 4) for _ in range(2)]
    with torch.no_grad():
        for number in range(4):
            latents = integers(1, 5, 4)
            for text in texts:
                check_step(denoiser, model, latents, torch.full((1,), float(number)), text)
        latents, time = integers(1, 5, 4), torch.ones(1)
        check_step(denoiser, model, latents, time, texts[0])
        time += 1  # what the kept result was made with is not what it was
        check_step(denoiser, model, latents, torch.full((1,), 2.0), texts[1])
    assert denoiser.session.counts.split == 3 + 1
    assert denoiser.session.counts.unsplit == {NO_PAIR: 2, WASTED: 1}


@pytest.mark.parametrize("texts", [1, 2])
def test_a_strategy_that_orders_unsplit_steps_orders_each_call(texts: int) -> None:
    torch._dynamo.reset()
    model = Model()
    config = load({"strategy": "comm_overlap", "options": {"micro_batches": 1}})
    denoiser = Denoiser(model.forward, model, config, "aot", TEST)
    given = [integers(1, 3, 4) for _ in range(texts)]
    with torch.no_grad():
        for number in range(4):
            check_step(denoiser, model, integers(1, 5, 4), torch.full((1,), float(number)), *given)
    steps, check = denoiser.session.report().steps, denoiser.session.report().check
    assert steps.split == 0 and check is not None and check.steps == 1
    assert steps.unsplit == {"comm_overlap with one micro-batch": 4 if texts == 1 else 2 + 3}  # a pair is one step
    assert [plan.strategy for cache in denoiser.session.plan_caches for plan in cache.plans] == ["comm_overlap"]


def test_auto_orders_single_calls_and_splits_pairs_of_one_model() -> None:
    torch._dynamo.reset()
    model = Model()
    options = {"candidates": ["comm_overlap"], "micro_batches": [1, 2], "retune": True, "pairs": 3}
    denoiser = Denoiser(model.forward, model, load({"strategy": "auto", "options": options}), "aot", TEST)
    texts = [integers(1, 3, 4) for _ in range(2)]
    with torch.no_grad():
        for number in range(3):
            check_step(denoiser, model, integers(1, 5, 4), torch.full((1,), float(number)), texts[0])
        for number in range(3):
            check_step(denoiser, model, integers(1, 5, 4), torch.full((1,), float(number)), *texts)
    selector = denoiser.session.selector
    assert isinstance(selector, AutoSelector) and selector.table is not None
    single, pair = sorted(selector.table.decisions, key=lambda decision: decision.requests)
    timed = {trial.candidate: bool(trial.ratios) for trial in single.trials}
    assert timed == {"comm_overlap": True, "comm_overlap x2": False}
    assert all(t.ratios or t.predicted for t in pair.trials), pair


def changed_latents(latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, ...]:
    latents.add_(1)
    return latents, text, time


def other_latents(latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return latents.clone(), text, time


def changed_text(latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, ...]:
    text.mul_(2)
    return latents, text, time


def other_time(latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return latents, text, time + 1


def same_call_again(latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return latents, integers(1, 3, 4), time


@pytest.mark.parametrize("change", [changed_latents, other_latents, changed_text, other_time, same_call_again])
def test_a_call_with_other_arguments_than_foreseen_is_computed_anew(change: Callable[..., Any]) -> None:
    model, denoiser = make()
    texts = [integers(1, 3, 4) for _ in range(2)]
    with torch.no_grad():
        for number in range(2):
            check_step(denoiser, model, integers(1, 20, 4), torch.full((1,), float(number)), *texts)
        latents, time = integers(1, 20, 4), torch.ones(1)
        (first,) = denoiser(hidden_states=latents, text=texts[0], timestep=time)
        assert torch.equal(first, expected(model, latents, texts[0], time))
        given = change(latents, time, texts[1])
        (second,) = denoiser(*given)
        assert torch.equal(second, expected(model, *given))
        assert denoiser.session.counts.unsplit[WASTED] == 1
        for number in range(3):  # a pair is learned anew
            check_step(denoiser, model, integers(1, 20, 4), torch.full((1,), float(number)), *texts)
    assert denoiser.session.counts.split == 4


def test_a_pipeline_that_stops_making_the_second_call_wastes_one() -> None:
    model, denoiser = make()
    texts = [integers(1, 3, 4) for _ in range(2)]
    with torch.no_grad():
        for number in range(6):
            check_step(
                denoiser, model, integers(1, 5, 4), torch.full((1,), float(number)), *texts[: 2 if number < 3 else 1]
            )
    steps = denoiser.session.counts
    assert steps.split == 3 and steps.unsplit == {NO_PAIR: 2 + 1, WASTED: 1}


def test_calls_that_cannot_be_joined_say_so() -> None:
    model, denoiser = make()
    texts = [integers(1, 3, 4), integers(1, 2, 4)]
    with torch.no_grad():
        for number in range(3):
            check_step(denoiser, model, integers(1, 5, 4), torch.full((1,), float(number)), *texts)
    reason = "argument 1 is a tensor [1, 3, 4] in one and a tensor [1, 2, 4] in the other"
    assert denoiser.session.counts.split == 0
    assert any(reason in why for why in denoiser.session.counts.unsplit)


class FirstRow(Model):
    """It reads the positions of all rows from the first one."""

    def forward(
        self, hidden_states: Any, text: Any, timestep: Any, positions: Any = None, return_dict: bool = False
    ) -> Any:
        (result,) = super().forward(hidden_states, text, timestep)
        return (result + positions[0],)


@pytest.mark.parametrize("differ", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
def test_what_a_model_reads_once_for_all_rows_is_shared(rows: int, differ: bool) -> None:
    torch._dynamo.reset()
    model = FirstRow()
    denoiser = Denoiser(model.forward, model, load({"strategy": "comm_overlap"}), "aot", TEST)
    texts = [integers(rows, 3, 4) for _ in range(2)]
    places = [integers(rows, 5, 4)] * 2
    if differ:
        places[1] = places[0] + 1

    def run() -> None:
        for number in range(3):
            latents, time = integers(rows, 5, 4), torch.full((rows,), float(number))
            for text, place in zip(texts, places):
                (found,) = denoiser(hidden_states=latents, text=text, timestep=time, positions=place)
                assert torch.equal(found, model(latents, text, time, place)[0])

    with torch.no_grad():
        if differ:
            with pytest.raises(PartitionError, match=r"differ in argument 3|cannot be split"):
                run()
            return
        run()
    assert denoiser.session.counts.split == (2 if rows == 1 else 4)
    assert not any(c.captured.program.unsplittable for c in denoiser.session.plan_caches)


class Mixing(Model):
    """It takes the mean of the batch away."""

    def forward(self, hidden_states: Any, text: Any, timestep: Any, return_dict: bool = False) -> Any:
        return (hidden_states - hidden_states.sum(0, keepdim=True) + text.sum(1, keepdim=True),)


class Broken(Model):
    """Its code breaks the graph, and mixes the batch where no graph is."""

    def forward(self, hidden_states: Any, text: Any, timestep: Any, return_dict: bool = False) -> Any:
        torch._dynamo.graph_break()
        return (hidden_states - sum_of_rows(hidden_states) + text.sum(1, keepdim=True),)


@torch.compiler.disable
def sum_of_rows(x: torch.Tensor) -> torch.Tensor:
    return x.sum(0, keepdim=True)


@pytest.mark.parametrize(
    ("kind", "error", "words"), [(Mixing, PartitionError, "sum"), (Broken, InactiveError, "not one graph")]
)
@pytest.mark.parametrize("fallback", [False, True])
def test_what_is_not_proved_to_keep_calls_apart_is_an_error_and_with_fallback_the_stock_model(
    kind: type[Model], error: type[Exception], words: str, fallback: bool
) -> None:
    torch._dynamo.reset()
    model = kind()
    config = load({"strategy": "comm_overlap", "fallback": fallback})
    denoiser = Denoiser(model.forward, model, config, "aot", TEST)
    texts = [integers(1, 3, 4) for _ in range(2)]

    def run() -> None:
        with torch.no_grad():
            for number in range(3):
                latents, time = integers(1, 5, 4), torch.full((1,), float(number))
                for text in texts:
                    (found,) = denoiser(hidden_states=latents, text=text, timestep=time)
                    assert torch.equal(found, model(latents, text, time)[0])

    if not fallback:
        with pytest.raises(error, match=words):
            run()
        return
    run()
    assert words in denoiser.refused and denoiser.session.counts.split == 0


def test_auto_decides_in_the_first_pair_and_keeps_decisions_of_other_sizes() -> None:
    torch._dynamo.reset()
    model = Model()
    options = {"candidates": ["comm_overlap"], "micro_batches": [2], "retune": True, "pairs": 3}
    denoiser = Denoiser(model.forward, model, load({"strategy": "auto", "options": options}), "aot", TEST)
    texts = [integers(1, 3, 4) for _ in range(2)]
    with torch.no_grad():
        for size in (5, 9, 50, 5):
            for number in range(3):
                check_step(denoiser, model, integers(1, size, 4), torch.full((1,), float(number)), *texts)
    table = denoiser.session.report().policy
    assert table is not None
    assert sorted(d["tokens"] for d in table["decisions"]) == [64, 128, 512]
