"""The files of golden plans and of generated functions, and the cases that have one."""

from __future__ import annotations

from pathlib import Path

from dynaflow_serving.core.parse import parse_plan
from dynaflow_serving.core.plan import Plan

GOLDEN = Path(__file__).parent / "golden"
CASES = [(m, s, 2) for m in ("llama", "moe") for s in ("sequential", "nanoflow", "dual_batch")]
CASES += [(m, "nanoflow", 3) for m in ("llama", "moe")]
CASES += [("llama", "comm_overlap", 2), ("moe", "comm_overlap", 1)]
CASES += [("llama", "round_robin", 3)]
CASES += [("loss", "nanoflow", 2), ("loss", "nanoflow", 3)]
CASES += [("llama", "prefill_decode", 2), ("moe", "branches", 1), ("dit", "branches", 1)]


def golden_file(model: str, strategy: str, micro_batches: int) -> Path:
    many = "" if micro_batches == 2 else str(micro_batches)
    return GOLDEN / f"{model}.{strategy}{many}.plan"


def golden_plan(model: str, strategy: str, micro_batches: int = 2) -> Plan:
    return parse_plan(golden_file(model, strategy, micro_batches).read_text())


FUNCTIONS = ("sequential", "cpu", "cuda")  # executors: of each the function for llama under nanoflow


def golden_function(executor: str) -> Path:
    return GOLDEN / f"llama.nanoflow.{executor}.py.txt"
