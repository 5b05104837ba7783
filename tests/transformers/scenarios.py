"""What runs on the two ranks of the transformers tests: importable there by name."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rounding import distance, same

from dynaflow_serving.capture.eager.gradients import Crossing
from dynaflow_serving.core.plan import ActionKind
from dynaflow_serving.core.program import Resource
from dynaflow_serving.errors import InactiveError, PartitionError
from dynaflow_serving.integrations.installed import ATTRIBUTE
from dynaflow_serving.integrations.transformers import enable, report, tune
from dynaflow_serving.integrations.transformers.body import Body
from dynaflow_serving.session.session import Session


def load(path: str) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(tp_plan="auto")
    return AutoModelForCausalLM.from_pretrained(path, distributed_config=config, dtype=torch.float32).eval()


def strategy(name: str, micro_batches: int) -> dict[str, Any]:
    return {"strategy": name, "options": {"micro_batches": micro_batches, "min_tokens": 1}}


def disable(model: Any) -> None:
    for attribute in ("forward", ATTRIBUTE):
        model.base_model.__dict__.pop(attribute)
    torch._dynamo.reset()


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 2000, shape, generator=torch.Generator().manual_seed(shape[0]))


@torch.no_grad()
def forward(path: str, strategies: list[tuple[str, dict[str, int]]]) -> dict[str, Any]:
    model = load(path)
    expected = {size: model(input_ids=ids(size, 12)).logits for size in (8, 5)}
    found: dict[str, Any] = {}
    for name, options in strategies:
        enable(model, {"strategy": name, "options": options})
        equal = [same(model(input_ids=ids(size, 12)).logits, logits) for size, logits in expected.items()]
        steps = report(model).steps.model_dump()
        networks = {
            s.stream
            for plan_cache in Body.installed_in(model).session.plan_caches
            for plan in plan_cache.plans
            for s in plan.actions
            if plan.micro_batches > 1
            and any(plan_cache.captured.program.by_name[n].resource is Resource.NETWORK for n in s.operators)
        }
        found[f"{name} {options}"] = {"equal": equal, "steps": steps, "networks": sorted(networks)}
        disable(model)
    return found


@torch.no_grad()
def generate(path: str, cache: str | None) -> dict[str, Any]:
    """Left-padded prompts of several shapes, a batch as large as its prompts are long, and one request."""
    stock, model = load(path), enable(load(path), strategy("comm_overlap", 2))
    equal = []
    for shape in ((4, 16), (7, 7), (5, 9), (1, 5)):
        prompt = ids(*shape)
        mask = torch.ones_like(prompt)
        prompt[0, :3], mask[0, :3] = 0, 0
        tokens = [
            m.generate(prompt, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None,
                       cache_implementation=cache)
            for m in (stock, model)
        ]  # fmt: skip
        equal.append(torch.equal(*tokens))
    return {"equal": equal, "steps": report(model).steps.model_dump(), "graphs": len(report(model).programs)}


@torch.no_grad()
def auto(path: str, folder: str) -> dict[str, Any]:
    """Every operator sleeps in proportion to its rows, so that an overlap wins on a busy machine too; then a new body,
    which finds the decision on disk; then one with a table of this rank's own."""
    model, inputs = load(path), {"input_ids": ids(8, 12), "use_cache": False}
    expected = model(**inputs).logits

    def enabled(**options: Any) -> Any:
        """The stock forward, which un-split steps run, sleeps as long as all operators together."""
        enable(model, {"strategy": "auto", "options": {"candidates": ["comm_overlap", "nanoflow"], **options}})
        body, slept = Body.installed_in(model), [0.0]
        with body.session.trial("sequential x2"):
            for call in (model, body):  # two graphs, for the head passes more arguments
                call(**inputs)
            for plan_cache in body.session.plan_caches:
                plan_cache.captured.functions = {n: slowed(f, slept) for n, f in plan_cache.captured.functions.items()}
                plan_cache.captured.into = {n: slowed(f, slept) for n, f in plan_cache.captured.into.items()}
                plan_cache._prepared.clear()
            body(**inputs)
        stock, rows, all_slept = body.original, inputs["input_ids"].shape[0], slept[0]

        def slow_stock(*args: Any, **kwargs: Any) -> Any:
            time.sleep(all_slept * kwargs["input_ids"].shape[0] / rows)
            return stock(*args, **kwargs)

        body.original = slow_stock
        body.session.reset()
        return model

    def slowed(function: Any, slept: list[float]) -> Any:
        def call(*args: Any) -> Any:
            rows = max((a.shape[0] for a in args if isinstance(a, torch.Tensor) and a.dim() == 3), default=0)
            time.sleep(0.002 * rows)
            slept[0] += 0.002 * rows
            return function(*args)

        return call

    found: dict[str, Any] = {}
    file = f"{folder}/table.json"
    table = tune(enabled(table=file), [inputs])
    found["decided"] = [(d.candidate, d.reason) for d in table.decisions]
    found["equal"] = [same(model(**inputs).logits, expected) for _ in range(3)]
    found["steps"] = report(model).steps.model_dump()
    found["other"] = same(model(input_ids=ids(3, 5)).logits, load(path)(input_ids=ids(3, 5)).logits)
    found["reasons"] = report(model).steps.unsplit
    disable(model)
    found["again"] = tune(enabled(table=file), [inputs]) == table  # to the seconds that it took
    disable(model)
    own = f"{folder}/own{dist.get_rank()}.json"
    changed = table.model_copy(deep=True)
    changed.decisions[0].candidate = "" if dist.get_rank() else "comm_overlap x2"
    changed.save(Path(own))
    try:
        tune(enabled(table=own), [inputs])
        found["error"] = ""
    except InactiveError as error:
        found["error"] = str(error)
    return found


def gradients_apart(path: str, config: dict[str, Any], checkpoints: bool = False) -> tuple[dict[str, Any], Session]:
    """Train stock, then under `config`; return how far the gradients are apart, and the session."""
    model = load(path).train()
    if checkpoints:
        model.gradient_checkpointing_enable()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(input_ids=ids(6, 12), labels=ids(6, 12), use_cache=False).loss.backward()
        found = [p.grad for p in model.parameters()]
        return [g.to_local().clone() if hasattr(g, "to_local") else g.clone() for g in found]

    expected = gradients()
    enable(model, config)
    found = [gradients() for _ in range(3)][-1]
    session = Body.installed_in(model).session
    return {
        "apart": max(distance(a, b) for a, b in zip(found, expected, strict=True)),
        "gradients": len(expected),
        "steps": [session.counts.split, sum(session.counts.unsplit.values())],
    }, session


def training_of_experts(path: str) -> dict[str, Any]:
    return gradients_apart(path, strategy("comm_overlap", 2))[0]


def training(path: str, micro_batches: int, checkpoints: bool) -> dict[str, Any]:
    found, session = gradients_apart(path, strategy("comm_overlap", micro_batches), checkpoints)
    _, backward_run = session.plan_caches
    plan = next(p for p in backward_run.plans if p.micro_batches == micro_batches)
    by_name = backward_run.captured.program.by_name
    runs = [s for s in plan.actions if s.kind is ActionKind.RUN]
    network = [i for i, s in enumerate(runs) if by_name[s.operators[0]].resource is Resource.NETWORK]

    def overlaps(i: int) -> bool:
        """Whether compute that does not need collective i is issued after it and before compute that does."""
        after = next((s for s in runs[i + 1 :] if s.stream == "compute"), None)
        if after is None:
            return False
        made, read = by_name[runs[i].operators[0]].outputs, by_name[after.operators[0]].inputs
        return (after.start, after.stop) != (runs[i].start, runs[i].stop) or not {*made} & {*read}

    return found | {
        "backward_streams": sorted({runs[i].stream for i in network}),
        "collectives": len(network),
        "overlapping": sum(map(overlaps, network)),
    }


def products_in_chunks(path: str) -> dict[str, Any]:
    """Logits and gradients under `flux`, and how many products of each graph run in chunks."""
    flux = {"strategy": "flux", "options": {"chunks": 3}}
    model = load(path)
    with torch.no_grad():
        expected = {size: model(input_ids=ids(size, 12)).logits for size in (8, 2)}
        enable(model, flux)
        equal = [same(model(input_ids=ids(size, 12)).logits, logits) for size, logits in expected.items()]
    found, session = gradients_apart(path, flux)
    graphs = [*Body.installed_in(model).session.plan_caches, *session.plan_caches]
    replaced = [sum(a.kind is ActionKind.REPLACE for p in graph.plans for a in p.actions) for graph in graphs]
    return found | {"equal": equal, "replaced": replaced}


@torch.no_grad()
def different_plans(path: str) -> dict[str, Any]:
    """Rank 1 schedules three micro-batches; no plan may run before that is found out."""
    model = enable(load(path), strategy("comm_overlap", 2 + dist.get_rank()))
    try:
        model(input_ids=ids(6, 12))
        error = ""
    except InactiveError as e:
        error = str(e)
    session = Body.installed_in(model).session
    steps = session.counts.split + sum(session.counts.unsplit.values())
    return {"error": error, "graphs": len(session.plan_caches), "runs": steps}


@torch.no_grad()
def killed(path: str) -> dict[str, Any]:
    """Rank 1 dies inside a step, after its first all-reduce."""
    model = enable(load(path), strategy("comm_overlap", 2))
    model(input_ids=ids(6, 12), use_cache=False)
    if dist.get_rank() == 1:
        (plan_cache,) = Body.installed_in(model).session.plan_caches
        name = [o.name for o in plan_cache.captured.program.operators if o.resource is Resource.NETWORK][1]
        for functions in (plan_cache.captured.functions, plan_cache.captured.into):
            functions[name] = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
        plan_cache._prepared.clear()
    started = time.perf_counter()
    try:
        model(input_ids=ids(6, 12), use_cache=False)
    except RuntimeError as error:
        return {"error": str(error), "seconds": time.perf_counter() - started}
    return {"error": ""}


@torch.no_grad()
def refused(path: str) -> dict[str, Any]:
    """Without fallback an error; with it the stock model from the second call on, caches written once."""
    model = load(path)

    def tokens() -> torch.Tensor:
        return model.generate(ids(4, 12), max_new_tokens=5, do_sample=False, eos_token_id=None,
                              cache_implementation="static")  # fmt: skip

    expected = tokens()
    enable(model, strategy("comm_overlap", 2))
    try:
        model(input_ids=ids(4, 12))
        error = ""
    except PartitionError as e:
        error = str(e)
    disable(model)
    enable(model, strategy("comm_overlap", 2) | {"fallback": True})
    equal = [torch.equal(tokens(), expected) for _ in range(2)]
    return {"error": error, "equal": equal, "steps": report(model).steps.model_dump()}


def training_without_a_graph(path: str) -> list[dict[str, Any]]:
    """Train stock and under `capture: eager`: as it is, and with layers that are computed again, one batch padded."""
    found = []
    for micro_batches, reentrant in ((3, None), (2, False), (3, False), (2, True)):
        model, padded = load(path).train(), reentrant is False
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        expected = loss_and_gradients(model, padded)
        enable(model, strategy("round_robin", micro_batches) | {"capture": "eager"})
        runs = [loss_and_gradients(model, padded)]
        with gradients_in_flight() as overlapped:
            runs.append(loss_and_gradients(model, padded))
        split = report(model).steps.split
        with torch.no_grad():
            model(input_ids=ids(6, 12), use_cache=False)
        loss_and_gradients(model, sequences=1)
        found.append({
            "apart": max(distance(a, b) for run in runs for a, b in zip(run, expected, strict=True)),
            "split": split,
            "reduced": len(overlapped),
            "overlapped": sum(overlapped),
            "unsplit": report(model).steps.unsplit,
        })  # fmt: skip
    return found


def training_that_changes(path: str) -> dict[str, Any]:
    """Arguments of another form, packed sequences, and layers that take another path than the recorded one."""
    stock, model = load(path).train(), load(path).train()
    enable(model, strategy("comm_overlap", 2) | {"capture": "eager"})
    positions = torch.arange(12)[None]
    packed = torch.cat([positions[:, :7], positions[:, :5]], 1).expand(6, 12)
    found: dict[str, Any] = {}

    def compare(name: str, **given: torch.Tensor) -> None:
        expected, actual = (loss_and_gradients(m, **given) for m in (stock, model))
        apart = max(distance(a, b) for a, b in zip(actual, expected, strict=True))
        found[name] = {"apart": apart, **report(model).steps.model_dump()}

    compare("first")
    compare("same positions for all", position_ids=positions)
    compare("packed", position_ids=packed)
    for m in (stock, model):
        m.gradient_checkpointing_enable({"use_reentrant": True})
    compare("another path", position_ids=packed)
    compare("recorded anew", position_ids=packed)
    return found


def loss_and_gradients(
    model: Any, padded: bool = False, sequences: int = 6, **given: torch.Tensor
) -> list[torch.Tensor]:
    model.zero_grad()
    tokens = ids(sequences, 12)
    if padded:
        given["attention_mask"] = torch.ones_like(tokens)
        given["attention_mask"][1:3, :4] = 0
    loss = model(input_ids=tokens, labels=tokens, use_cache=False, **given).loss
    loss.backward()
    found = [p.grad for p in model.parameters()]
    return [loss.detach(), *(g.to_local().clone() if hasattr(g, "to_local") else g.clone() for g in found)]


@contextlib.contextmanager
def gradients_in_flight() -> Iterator[list[bool]]:
    """Tell of each all-reduce of a gradient on another stream whether anything ran between its start and its end."""
    events: list[Crossing] = []
    found: list[bool] = []
    start, wait = Crossing.start, Crossing.wait

    def noted_start(crossing: Crossing, gradients: Any) -> None:
        events.append(crossing)
        start(crossing, gradients)

    def noted_wait(crossing: Crossing) -> Any:
        if "_AllReduceBackward" in crossing._results[0].node.name():
            found.append(events[-1] is not crossing)
        events.append(crossing)
        return wait(crossing)

    Crossing.start, Crossing.wait = noted_start, noted_wait  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Crossing.start, Crossing.wait = start, wait  # type: ignore[method-assign]


def refused_without_a_graph(path: str, other: str) -> dict[str, str]:
    """What is declined of a tensor-parallel model, by name; then the same with `fallback: true`."""
    eager, found = strategy("comm_overlap", 2) | {"capture": "eager"}, {}

    def refused(name: str, act: Any) -> None:
        try:
            act()
            found[name] = ""
        except InactiveError as error:
            found[name] = str(error)

    refused("style", lambda: enable(load(other), eager))
    model = load(path).train()
    model.config.attention_dropout = 0.1
    refused("dropout", lambda: enable(model, eager))
    model.config.attention_dropout = 0.0
    for name in ("auto", "flux"):
        refused(name, lambda name=name: enable(model, {"strategy": name, "capture": "eager"}))
    enable(model, eager)
    refused("cache", lambda: model(input_ids=ids(4, 12)))
    refused("hidden states", lambda: model(input_ids=ids(4, 12), use_cache=False, output_hidden_states=True))
    refused("causal", lambda: model(input_ids=ids(4, 12), use_cache=False, is_causal=True))
    found["steps"] = str(report(model).steps.model_dump())
    model = load(path).train()
    enable(model, eager | {"fallback": True})
    model(input_ids=ids(4, 12)).logits.sum().backward()
    found["fallback"] = str(report(model).steps.unsplit)
    return found
