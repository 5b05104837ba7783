"""One rank of `never_slower.py`: stock, every candidate as a fixed strategy, and auto take turns; rank 0 writes."""

from __future__ import annotations

import json
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from overlap_rank import VOCABULARY, Variant, build, compute_gives_way, measure
from rate_limited_link import set_rate
from rich.console import Console
from rich.progress import Progress

from dynaflow_serving.config import Config
from dynaflow_serving.core.measurement import Spread
from dynaflow_serving.integrations.transformers.body import Body
from dynaflow_serving.torch_backend import make_backend

MICRO_BATCHES = [2, 3, 4]
STRATEGIES = ["comm_overlap", "nanoflow"]
STOCK, AUTO = "stock", "auto"


def body_under(module: torch.nn.Module, strategy: str, **options: Any) -> Body:
    return Body(module, make_backend(Config(strategy=strategy, options=options), level="aot"))


def row(rate: float, times: dict[str, list[float]], body: Body, decision: Any, equal: bool) -> dict[str, Any]:
    """Return the figures of one rate.

    Every second round chooses the best fixed strategy, and all figures are of the other rounds. Otherwise the luckiest
    of several that are alike would seem better than it is.
    """
    ratios = {
        name: [a / b for a, b in zip(times[STOCK], values, strict=True)]
        for name, values in times.items()
        if name != STOCK
    }
    best = max(ratios.keys() - {AUTO}, key=lambda name: statistics.median(ratios[name][::2]))
    shown = {name: values[1::2] for name, values in ratios.items()}
    speed_up = {name: Spread.of_ratios(values).as_dict() for name, values in shown.items()}
    gain = speed_up[best]["median"] - 1
    return {
        "rate_mbit": rate,
        "ms": {name: statistics.median(values[1::2]) for name, values in times.items()},
        "speed_up": speed_up,
        "best": best,
        "kept": (speed_up[AUTO]["median"] - 1) / gain if gain > 0 else 1.0,
        "adopted": decision.candidate,
        "reason": decision.reason,
        "decision": decision.model_dump(),
        "steps": {"split": body.session.counts.split, "unsplit": dict(body.session.counts.unsplit)},
        "equal": "bit for bit" if equal else "NO",
        "samples_ms": times,
    }


@torch.no_grad()
def rows(model: Any, settings: dict[str, Any], progress: Progress) -> list[dict[str, Any]]:
    inputs = {"input_ids": torch.randint(0, VOCABULARY, (settings["batch"], settings["sequence"])), "use_cache": False}
    module = model.eval().base_model
    torch._dynamo.config.recompile_limit = 64  # one entry per strategy
    expected = module(**inputs).last_hidden_state
    variants: dict[str, Variant] = {STOCK: partial(module, **inputs)}
    for strategy in STRATEGIES:
        for n in MICRO_BATCHES:
            body = body_under(module, strategy, micro_batches=n, min_tokens=1)
            variants[f"{strategy} x{n}"] = partial(body, **inputs)
    equal = all(torch.equal(v().last_hidden_state, expected) for v in variants.values())
    compute_gives_way()
    found = []
    task = progress.add_task("", total=len(settings["rates"]) * (len(variants) + 1) * (1 + settings["rounds"]))
    for rate in settings["rates"]:
        set_rate(rate)
        options = {"candidates": STRATEGIES, "micro_batches": MICRO_BATCHES, "retune": True, "budget_seconds": 300}
        auto = body_under(module, AUTO, table=f"{settings['folder']}/table-{rate:g}.json", **options)
        progress.update(task, description="tune")
        (decision,) = auto.tune([inputs], {"engine": "never_slower", "rate": f"{rate:g}"}).decisions
        for _ in range(8):  # of which the guard has every second one run un-split
            auto(**inputs)
        progress.update(task, description=f"{rate:g} Mbit/s")
        run = variants | {AUTO: partial(auto, **inputs)}
        times = measure(run, settings["rounds"], lambda: progress.advance(task))
        same = torch.equal(run[AUTO]().last_hidden_state, expected)
        found.append(row(rate, times, auto, decision, equal and same))
    return found


def main() -> None:
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = build(settings, dist.get_rank())
    with Progress(console=Console(stderr=True), disable=dist.get_rank() > 0, transient=True) as progress:
        torch.manual_seed(1)
        figures = {"rows": rows(model, settings, progress)}
    if dist.get_rank() == 0:
        Path(settings["folder"], "figures.json").write_text(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
