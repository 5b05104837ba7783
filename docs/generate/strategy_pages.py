"""A page for each shipped strategy, with the timeline of its plan, in docs/strategies/.

Contract
- `python docs/generate/strategy_pages.py` writes the pages and pictures; `pages` has the rest of the contract.
- A page's text is the strategy's module docstring; its options are those of its class.
- A picture shows two layers of a model on H100s, simulated: un-split, in sequential micro-batches, and under the
  strategy. A strategy whose operators no simulated model has gets none, and its page says why.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass

import yaml
from configuration import options_table
from pages import ROOT, generated_by, write
from timelines import draw

from dynaflow_serving.simulate.catalogue import find
from dynaflow_serving.simulate.device import make_topology
from dynaflow_serving.simulate.model import Shape
from dynaflow_serving.simulate.scenario import Scenario, parse_requests
from dynaflow_serving.strategies import SHIPPED, build_strategy, get_strategy
from dynaflow_serving.strategy.base import OpScheduler


@dataclass(frozen=True)
class Case:
    """What a picture shows: a model, its parallelism, a batch and the strategy's options."""

    model: str
    batch: str
    options: dict[str, object]
    tp: int = 1
    ep: int = 1
    explained: str = "llama"  # the arguments of `dynaflow explain` that show the strategy on an embedded example


DENSE, EXPERTS, LARGE = "llama-3-8b", "deepseek-v2-lite", "8x1024"
CASES = {
    "sequential": Case(DENSE, LARGE, {"micro_batches": 2}, tp=4, explained="llama -n 2"),
    "nanoflow": Case(DENSE, LARGE, {"micro_batches": 2}, tp=4, explained="llama -o min_tokens=1"),
    "comm_overlap": Case(DENSE, LARGE, {"micro_batches": 2}, tp=4, explained="llama -o min_tokens=1"),
    "round_robin": Case(DENSE, "9x1024", {"micro_batches": 3}, tp=4),
    "dual_batch": Case(EXPERTS, LARGE, {}, ep=8, explained="moe -o min_tokens=1"),
    "branches": Case(EXPERTS, LARGE, {}, ep=8, explained="moe"),
    "prefill_decode": Case(DENSE, "128x1@1536,4x512", {}, explained="llama -b 1,1,64 -o min_tokens=1"),
}
WITHOUT = {
    "comet": "It needs operators that hold their communication within, which only Megatron-LM's integration makes.",
    "flux": "It needs products that hold their collectives, or a graph at level aot with an all-reduce behind them.",
    "fused_norms": "It needs a captured graph, in which it finds what a kernel computes.",
    "token_weave": "It needs a captured graph, in which it finds the residual add and norm behind an all-reduce.",
}


def pages() -> dict[str, str]:
    """Return the pages and the pictures."""
    assert {*CASES, *WITHOUT} == set(SHIPPED), "each strategy has a picture, or a reason why not"
    found = {f"strategies/{name}.svg": _picture(name, case) for name, case in CASES.items()}
    return found | {f"strategies/{name}.md": _page(name) for name in SHIPPED}


def _page(name: str) -> str:
    text = ast.get_docstring(ast.parse((ROOT / "strategies" / f"{name}.py").read_text())) or ""
    parts = [f"# {name}", text, "## Its timeline", _timeline(name), "## Options", options_table(name).strip()]
    if files := _configs(name):
        parts += ["## Ready-made configs", "\n".join(f"- `{file}`" for file in files)]
    if uses := get_strategy(name).looks_for:
        found = [f"- {' or '.join(f'`{tag}`' for tag in use.tags)}; without any, {use.otherwise}." for use in uses]
        parts += [
            "## Tags that it looks for",
            "\n".join(found),
            "[Which system gives which tags](tags-and-streams.md).",
        ]
    return "\n\n".join(parts) + "\n" + generated_by("strategy_pages.py")


def _timeline(name: str) -> str:
    if name not in CASES:
        return f"There is no picture of it: no simulated model has what it looks for.\n{WITHOUT[name]}"
    case = CASES[name]
    settings = "".join(f" -o {option}={value}" for option, value in case.options.items())
    ranks = f" --tp {case.tp}" if case.tp > 1 else f" --ep {case.ep} --dp {case.ep}" if case.ep > 1 else ""
    command = f"dynaflow simulate {case.model}{ranks} --batch {case.batch} -s {name}{settings}"
    return "\n\n".join((
        f"![Two layers of {case.model}: un-split and under {name}, simulated]({name}.svg)",
        "Two layers, **simulated**: no figure here is measured. For all layers:",
        f"```console\n$ {command}\n```",
        "The same of an embedded example, measured and predicted on your machine:",
        f"```console\n$ dynaflow explain {case.explained} -s {name} --svg {name}.svg\n```",
    ))  # fmt: skip


def _picture(name: str, case: Case) -> str:
    shape = find(Shape, case.model)
    fewer = {"layers": 2} | ({"dense_layers": 0} if case.ep > 1 else {})
    topology = make_topology("h100", "nvlink4", "eth400", per_node=8, tp=case.tp, ep=case.ep, dp=case.ep, imbalance=1.0)
    scenario = Scenario(shape.model_copy(update=fewer), topology, parse_requests(case.batch))
    strategy: OpScheduler = build_strategy(name, case.options)
    schedules = scenario.simulate([strategy])
    panels = [
        (s.schedule if len(s.tokens) == 1 else f"{s.schedule}, {len(s.tokens)} micro-batches", s) for s in schedules
    ]
    title = f"{name}: two layers of {case.model} on {topology.world} x H100"
    return draw(title, [(heading, schedule.timeline) for heading, schedule in panels])


def _configs(name: str) -> list[str]:
    """Return the shipped configs of the strategy, also those whose only candidates it is."""
    found = []
    for file in sorted((ROOT / "configs").glob("*/*.yaml")):
        config = yaml.safe_load(file.read_text())
        candidates = config.get("options", {}).get("candidates", [])
        named = {c["strategy"] if isinstance(c, dict) else c for c in candidates}
        if config["strategy"] == name or named == {name}:
            found.append(str(file.relative_to(ROOT)))
    return found


if __name__ == "__main__":
    write(pages())
