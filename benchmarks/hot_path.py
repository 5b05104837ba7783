"""The cost of parts of our dispatch alone: `python benchmarks/hot_path.py [--json FILE]`.

The operators are Python functions that do nothing, so the figures are of what we add. `benchmarks/dispatch.py`
measures what a step of real operators costs. Timed are
- one hand-off to a worker thread and back with the cpu executor,
- the lowering and the verification of a program of 1000 operators for two micro-batches,
- the cost of `strategy: auto` per step: the look-up in the table by number of requests,
- the begin and the end of an un-split step under it, with look-up, counters and clock.

Each figure is the median of `--repeat` timings, and its spread the distance between the first and the third quartile.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from dynaflow_serving.capture.examples import example_capture
from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.config import Config
from dynaflow_serving.core.batch import Batch
from dynaflow_serving.core.plan import ActionKind
from dynaflow_serving.core.program import Operator, Program, Resource, Scope, Value
from dynaflow_serving.executor.cpu import CPUExecutor
from dynaflow_serving.planning.lowering import lower
from dynaflow_serving.planning.verify import verify
from dynaflow_serving.policy.bucket import bucket_of
from dynaflow_serving.policy.selector import AutoSelector
from dynaflow_serving.policy.table import Decision, Table, Trial
from dynaflow_serving.session.plan_cache import no_context
from dynaflow_serving.session.session import Session
from dynaflow_serving.strategies import get_strategy
from dynaflow_serving.strategy.schedule import Schedule

MICRO_BATCHES = 2


def identity(x: Any) -> Any:
    return x


def chain(operators: int) -> CapturedProgram:
    """x -> v1 -> v2 ..., every operator a function that returns its argument."""
    names = ["x", *(f"v{i}" for i in range(operators))]
    values = {n: Value(n, Scope.BATCH, 0) for n in names}
    ops = tuple(Operator(f"op{i}", Resource.COMPUTE, (names[i],), (names[i + 1],)) for i in range(operators))
    program = Program(("x",), (names[-1],), values, ops)
    return CapturedProgram(program, {o.name: identity for o in ops})


def microseconds(call: Callable[[], Any], repeat: int) -> tuple[float, float]:
    """Return the median and the interquartile range of the microseconds of one call."""
    call()
    started = time.perf_counter()
    call()
    number = max(1, int(2e-3 / max(time.perf_counter() - started, 1e-7)))
    timings = []
    for _ in range(repeat):
        started = time.perf_counter()
        for _ in range(number):
            call()
        timings.append((time.perf_counter() - started) / number * 1e6)
    first, median, third = statistics.quantiles(timings, n=4)
    return median, third - first


def hand_off(repeat: int) -> dict[str, float]:
    """Time a run that alternates between the caller and one extra stream, for one alternation and for eleven."""
    results = {}
    for hops in (1, 11):
        capture = chain(2 * hops)
        schedule = Schedule(capture.program, 1)
        for i in range(2 * hops):
            (task,) = schedule.get_ready_ops()
            schedule.execute(task, ("network", "compute")[i % 2])
        plan = lower(schedule, "hops")
        verify(capture.program, plan)
        executor = CPUExecutor()
        run = executor.bind(capture, plan, {})
        x = torch.zeros(2, 1)
        results[hops] = microseconds(lambda run=run, x=x: run([x], (0, 2), no_context), repeat)[0]  # type: ignore[misc]
        executor.close()
    return {"run_with_one_hand_off_us": results[1], "event_there_and_back_us": (results[11] - results[1]) / 10}


def planning() -> dict[str, float]:
    capture = chain(1000)
    results = {}
    for strategy in ("sequential", "nanoflow"):
        started = time.perf_counter()
        recorded = get_strategy(strategy)().record(capture.program, MICRO_BATCHES)
        done = time.perf_counter()
        plan = lower(recorded, strategy)
        lowered = time.perf_counter()
        verify(capture.program, plan)
        end = time.perf_counter()
        assert sum(s.kind is ActionKind.RUN for s in plan.actions) == 2000
        results[f"{strategy}_record_s"] = done - started
        results[f"{strategy}_lower_s"] = lowered - done
        results[f"{strategy}_verify_s"] = end - lowered
    return results


def policy(repeat: int) -> list[dict[str, float]]:
    """Time the look-up of batches of 1 to 256 requests, of which the policy has decided not to split any."""
    rows = []
    for requests in (1, 16, 256):
        batch = Batch((1,) * (requests // 2) + (64,) * (requests - requests // 2), (9,) * requests)
        bucket = bucket_of(batch)
        table = Table(key={}, decisions=[Decision(**bucket._asdict(), trials=[Trial(candidate="nanoflow x2")])])
        selector = AutoSelector()
        session = Session(selector, Config(strategy="auto"))
        session.add(example_capture("llama"))
        selector.serve_by(table, session)
        split = selector.split

        def step(session: Session = session, batch: Batch = batch) -> None:
            with session.step(batch):
                pass

        looked_up, spread = microseconds(lambda split=split, batch=batch: split(batch), repeat)  # type: ignore[misc]
        begun, _ = microseconds(step, repeat)
        rows.append({"requests": requests, "look_up_us": looked_up, "spread_us": spread, "begin_and_end_us": begun})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the raw results to this file")
    parser.add_argument("--repeat", type=int, default=51)
    options = parser.parse_args()
    threads = hand_off(options.repeat)
    print(f"cpu executor: a run with one hand-off {threads['run_with_one_hand_off_us']:.1f} us, "
          f"an event there and back {threads['event_there_and_back_us']:.1f} us")  # fmt: skip
    plans = planning()
    print("1000 operators x 2: " + ", ".join(f"{k.removesuffix('_s')} {v:.2f} s" for k, v in plans.items()))
    decided = policy(options.repeat)
    for r in decided:
        print(f"auto, {r['requests']} requests: look-up {r['look_up_us']:.2f} ±{r['spread_us']:.2f} us, "
              f"begin and end of an un-split step {r['begin_and_end_us']:.2f} us")  # fmt: skip
    if options.json:
        machine = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
        with open(options.json, "w") as f:
            figures = {"threads": threads, "planning": plans, "policy": decided}
            json.dump(machine | figures, f, indent=1)
            f.write("\n")


if __name__ == "__main__":
    main()
