"""One rank of `overlap_cpu.py`: it builds the model and measures the variants in turn; rank 0 writes the figures."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rate_limited_link import set_rate
from rich.console import Console
from rich.progress import Progress

from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.config import Config
from dynaflow_serving.core.batch import Batch
from dynaflow_serving.core.measurement import Spread, in_turn
from dynaflow_serving.core.program import Resource
from dynaflow_serving.executor import get_executor
from dynaflow_serving.integrations.transformers.body import Body
from dynaflow_serving.policy.selector import build_selector
from dynaflow_serving.session.plan_cache import PlanCache
from dynaflow_serving.strategy.splitting import cut_at_requests, whole
from dynaflow_serving.torch_backend import make_backend

Variant = Callable[[], Any]
VOCABULARY, HEADS = 256, 8


def build(settings: dict[str, Any], rank: int) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = Path(settings["folder"], "model")
    hidden = settings["hidden"]
    if rank == 0:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=hidden * 11 // 4, max_position_embeddings=4096,
            num_hidden_layers=settings["layers"], num_attention_heads=HEADS, num_key_value_heads=HEADS // 2,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
    dist.barrier()
    return AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")


def body_under(module: torch.nn.Module, strategy: str) -> Body:
    config = Config(strategy=strategy, options={"micro_batches": 2, "min_tokens": 1})
    return Body(module, make_backend(config, level="aot"))


def captured(body: Body, call: Variant) -> list[tuple[CapturedProgram, Any]]:
    """Return the graphs that DynaFlow captures of `body`, with the arguments that `call` gives each."""
    call()
    arguments: dict[int, Any] = {}

    def recording(i: int, run: Callable[..., Any]) -> Callable[..., Any]:
        def record(args: Any, split: Any, **options: Any) -> Any:
            arguments[i] = tuple(args)
            return run(args, split, **options)

        return record

    plan_caches = body.session.plan_caches
    for i, plan_cache in enumerate(plan_caches):
        plan_cache.run = recording(i, plan_cache.run)  # type: ignore[method-assign]
    call()
    for plan_cache in plan_caches:
        del plan_cache.run  # type: ignore[attr-defined]
    return [(r.captured, arguments[i]) for i, r in enumerate(plan_caches)]


def wrapped(capture: CapturedProgram, wrap: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> CapturedProgram:
    """Return `capture` with every callable of its operators replaced by `wrap(operator, callable)`."""
    return dataclasses.replace(
        capture,
        functions={n: wrap(n, f) for n, f in capture.functions.items()},
        into={n: wrap(n, f) for n, f in capture.into.items()},
    )


def runner(
    capture: CapturedProgram, args: Any, strategy: str, micro_batches: int, batch: int
) -> tuple[Variant, PlanCache]:
    """Return a variant that runs `capture` under `strategy`, and its plan cache."""
    options = {"micro_batches": micro_batches, "min_tokens": 1}
    plan_cache = PlanCache(capture, build_selector(Config(strategy=strategy, options=options)), get_executor("cpu"))
    rows = Batch((1,) * batch)
    split = cut_at_requests(rows, micro_batches) if micro_batches > 1 else whole(rows, "as asked")

    def run() -> Any:
        with torch.no_grad():  # a graph of AOT autograd holds its own backward
            return plan_cache.run(args, split)

    return run, plan_cache


def network_operators(capture: CapturedProgram) -> set[str]:
    return {o.name for o in capture.program.operators if o.resource is Resource.NETWORK}


def without_network(capture: CapturedProgram) -> CapturedProgram:
    network = network_operators(capture)
    return wrapped(capture, lambda name, function: (lambda x, *_: x) if name in network else function)


def collectives(capture: CapturedProgram, make: Callable[[CapturedProgram], Variant]) -> Variant:
    """Return the network operators of one call of `make(capture)`, on tensors of the same shapes, without the rest."""
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
    network = network_operators(capture)

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls.append((function, tuple(torch.zeros_like(a) if isinstance(a, torch.Tensor) else a for a in args)))
            return function(*args)

        return call if name in network else function

    make(wrapped(capture, noting))()

    def run() -> None:
        for function, args in calls:
            function(*args)

    return run


def profile(
    capture: CapturedProgram, make: Callable[[CapturedProgram], Variant], rounds: int, micro_batches: int
) -> list[Any]:
    """Return the median milliseconds of every operator of every micro-batch, run one after the other."""
    samples: dict[tuple[str, int], list[float]] = {}
    counts: Counter[str] = Counter()

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            started = time.perf_counter()
            result = function(*args)
            elapsed = (time.perf_counter() - started) * 1e3
            samples.setdefault((name, counts[name] % micro_batches), []).append(elapsed)
            counts[name] += 1
            return result

        return call

    variant = make(wrapped(capture, timed))
    for _ in range(rounds + 1):
        dist.barrier()
        variant()
    return [
        {"name": name, "micro_batch": mb, "ms": statistics.median(values[1:])} for (name, mb), values in samples.items()
    ]


def measure(variants: dict[str, Variant], rounds: int, tick: Callable[[], None]) -> dict[str, list[float]]:
    """Return the milliseconds of each variant, which take turns, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name in in_turn(list(variants), number):
            dist.barrier()
            started = time.perf_counter()
            variants[name]()
            if number:
                times[name].append((time.perf_counter() - started) * 1e3)
            tick()
    return times


def row(rate: float, n: int, times: dict[str, list[float]], equal: str, **extra: Any) -> dict[str, Any]:
    """Return the figures of one rate and number of micro-batches.

    Args:
        rate: The limit of the link, megabit per second.
        n: The number of micro-batches.
        times: Milliseconds per round of eager, sequential, overlapped, communication and compute.
        equal: Whether the results are equal, in words.
        extra: More entries.
    """
    middle = {name: statistics.median(values) for name, values in times.items()}
    hidden = middle["sequential"] - middle["overlapped"]

    def speedup(name: str) -> dict[str, float]:
        return Spread.of_ratios(a / b for a, b in zip(times[name], times["overlapped"], strict=True)).as_dict()

    return {
        "rate_mbit": rate,
        "micro_batches": n,
        **{f"{name}_ms": value for name, value in middle.items()},
        "overlap_efficiency": hidden / min(middle["compute"], middle["communication"]),
        "speedup_over_sequential": speedup("sequential"),
        "speedup_over_eager": speedup("eager"),
        "equal": equal,
        "spread_ms": {name: [min(values), max(values)] for name, values in times.items()},
        "samples_ms": times,
        **extra,
    }


def compute_gives_way() -> None:
    """Let gloo's and the executor's threads have the core when they wake.

    A network card needs no core, but the emulated network shares two cores with the compute of both ranks. All variants
    run under this rule.
    """
    for thread in map(int, os.listdir("/proc/self/task")):
        policy = os.SCHED_IDLE if thread == threading.get_native_id() else os.SCHED_OTHER
        os.sched_setscheduler(thread, policy, os.sched_param(0))


def equality(found: list[torch.Tensor], expected: list[torch.Tensor]) -> str:
    """`bit for bit`, or how far apart: on some processors a micro-batch takes another matmul kernel than its batch."""
    apart = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
    return "bit for bit" if apart == 0 else f"to {apart:.1e}"


def forward_rows(model: Any, settings: dict[str, Any], progress: Progress) -> list[dict[str, Any]]:
    ids = torch.randint(0, VOCABULARY, (settings["batch"], settings["sequence"]))
    module, batch = model.eval().base_model, settings["batch"]
    body = body_under(module, settings["strategy"])
    with torch.no_grad():
        ((capture, args),) = captured(body, lambda: body(input_ids=ids, use_cache=False))

        def sequentially(n: int) -> Callable[[CapturedProgram], Variant]:
            return lambda c: runner(c, args, "sequential", n, batch)[0]

        expected = module(input_ids=ids, use_cache=False).last_hidden_state
        eager: Variant = lambda: module(input_ids=ids, use_cache=False)  # noqa: E731
        prepared = {}
        for n in settings["micro_batches"]:
            sequential = sequentially(n)(capture)
            overlapped, planned = runner(capture, args, settings["strategy"], n, batch)
            equal = equality([overlapped()[0], sequential()[0]], [expected, expected])
            variants = {
                "eager": eager, "sequential": sequential, "overlapped": overlapped,
                "compute": sequentially(n)(without_network(capture)),
                "communication": collectives(capture, sequentially(n)),
            }  # fmt: skip
            prepared[n] = variants, equal, planned.plans[-1].to_text()
        task = progress.add_task("forward", total=len(settings["rates"]) * len(prepared) * 5 * (1 + settings["rounds"]))
        compute_gives_way()
        rows = []
        for rate in settings["rates"]:
            set_rate(rate)
            for n, (variants, equal, plan) in prepared.items():
                times = measure(variants, settings["rounds"], lambda: progress.advance(task))
                operators = profile(capture, sequentially(n), settings["rounds"], n)
                text = capture.program.to_text()
                rows.append(row(rate, n, times, equal, program=text, plan=plan, operators=operators))
    return rows


def training_rows(model: Any, settings: dict[str, Any], progress: Progress) -> list[dict[str, Any]]:
    """Measure the forward pass in two micro-batches with the backward pass, which is not split."""
    ids = torch.randint(0, VOCABULARY, (settings["batch"], settings["sequence"]))
    module = model.train().base_model

    def gradients(call: Variant) -> list[torch.Tensor]:
        model.zero_grad()
        call(input_ids=ids, use_cache=False).last_hidden_state.square().mean().backward()
        found = [p.grad for p in module.parameters() if p.grad is not None]
        return [g.to_local() if hasattr(g, "to_local") else g for g in found]

    bodies = {"sequential": body_under(module, "sequential"), "overlapped": body_under(module, settings["strategy"])}
    expected = [g.clone() for g in gradients(module)]
    equal = equality(gradients(bodies["overlapped"]), expected)
    networks, computes = [], []
    for capture, args in captured(bodies["overlapped"], lambda: gradients(bodies["overlapped"])):
        n = 1 if capture.program.unsplittable else 2

        def sequentially(c: CapturedProgram, args: Any = args, n: int = n) -> Variant:
            return runner(c, args, "sequential", n, settings["batch"])[0]

        networks.append(collectives(capture, sequentially))
        computes.append(sequentially(without_network(capture)))
    variants: dict[str, Variant] = {
        "eager": lambda: gradients(module),
        "sequential": lambda: gradients(bodies["sequential"]),
        "overlapped": lambda: gradients(bodies["overlapped"]),
        "compute": lambda: [c() for c in computes],
        "communication": lambda: [n() for n in networks],
    }
    task = progress.add_task("training", total=len(settings["rates"]) * 5 * (1 + settings["rounds"]))
    for variant in variants.values():
        variant()
    compute_gives_way()
    rows = []
    for rate in settings["rates"]:
        set_rate(rate)
        times = measure(variants, settings["rounds"], lambda: progress.advance(task))
        rows.append(row(rate, 2, times, equal))
    return rows


def main() -> None:
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = build(settings, rank)
    with Progress(console=Console(stderr=True), disable=rank > 0, transient=True) as progress:
        torch.manual_seed(1)
        figures = {"rows": forward_rows(model, settings, progress), "training": []}
        if settings["training"]:
            figures["training"] = training_rows(model, settings, progress)
    if rank == 0:
        Path(settings["folder"], "figures.json").write_text(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
