"""Every shipped strategy: plans verify, results equal the un-split model, nothing is left unexecuted; and what each
of the single-GPU strategies promises in particular."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import assert_same
from support import built, example, program_of
from typer.testing import CliRunner

from dynaflow_serving.capture.examples import EXAMPLES, HIDDEN
from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.cli import app
from dynaflow_serving.config import load
from dynaflow_serving.core.batch import Batch, MicroBatch, Split
from dynaflow_serving.core.order import order_edges
from dynaflow_serving.core.plan import COMPUTE_STREAM, ActionKind, Plan
from dynaflow_serving.core.program import Operator, Program, Resource, Scope, Value
from dynaflow_serving.executor.cpu import CPUExecutor
from dynaflow_serving.executor.sequential import SequentialExecutor
from dynaflow_serving.planning.happens_before import contains, happens_before
from dynaflow_serving.planning.lowering import lower
from dynaflow_serving.planning.verify import verify
from dynaflow_serving.session.plan_cache import PlanCache
from dynaflow_serving.strategies import get_strategy
from dynaflow_serving.strategies.branches import side_streams
from dynaflow_serving.strategy.base import OpScheduler
from dynaflow_serving.strategy.selector import FixedStrategy
from dynaflow_serving.strategy.splitting import cut_prefill_decode

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("sequential", {}),
    ("nanoflow", {}),
    ("dual_batch", {}),
    ("comm_overlap", {}),
    ("round_robin", {}),
    ("prefill_decode", {}),
    ("prefill_decode", {"first": "prefill"}),
    ("prefill_decode", {"overlap": "all"}),
    ("branches", {}),
    ("branches", {"side_streams": 2}),
]


def strategy(name: str, options: dict[str, Any]) -> OpScheduler:
    cls = get_strategy(name)
    return cls(cls.Options(**options))


@pytest.fixture(scope="module")
def cpu() -> Iterator[CPUExecutor]:
    executor = CPUExecutor()
    yield executor
    executor.close()


def plain(capture: CapturedProgram, x: torch.Tensor) -> torch.Tensor:
    """The operators one after the other on the whole batch, by hand: no plan, no executor."""
    program = capture.program
    taken = len(program.inputs) - len(capture.constants)
    values: dict[str, Any] = dict(zip(program.inputs[taken:], capture.constants, strict=True))
    values.update({v: x if v == "x" else len(x) for v in program.inputs[:taken]})
    for op in program.operators:
        out = capture.functions[op.name](*(values[v] for v in op.inputs))
        values.update(zip(op.outputs, out if len(op.outputs) > 1 else [out], strict=True))
    (result,) = program.outputs
    return values[result]


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    model=st.sampled_from(sorted(EXAMPLES)),
    variant=st.sampled_from(VARIANTS),
    tokens=st.lists(st.integers(1, 5), min_size=1, max_size=3).filter(lambda t: sum(t) > 1),
    seed=st.integers(0, 2**16),
)
def test_any_split_gives_the_results_of_the_unsplit_model(
    cpu: CPUExecutor, model: str, variant: tuple[str, dict[str, Any]], tokens: list[int], seed: int
) -> None:
    capture = example(model)
    ends = [sum(tokens[: i + 1]) for i in range(len(tokens))]
    parts = tuple(MicroBatch((i, i + 1), (end - n, end)) for i, (n, end) in enumerate(zip(tokens, ends)))
    x = torch.randn(sum(tokens), HIDDEN, generator=torch.Generator().manual_seed(seed))
    taken = capture.program.inputs[: len(capture.program.inputs) - len(capture.constants)]
    args = [x if v == "x" else len(x) for v in taken]
    with torch.no_grad():
        expected = plain(capture, x)
        for executor in (SequentialExecutor(), cpu):
            (out,) = PlanCache(capture, FixedStrategy(strategy(*variant)), executor).run(args, Split(parts))
            assert_same(out, expected, f"results on {executor.name}")


def runs(plan: Plan) -> list[tuple[str, int]]:
    return sorted(
        (s.operators[0], mb) for s in plan.actions if s.kind is ActionKind.RUN for mb in range(s.start, s.stop)
    )


@pytest.mark.parametrize("micro_batches", [1, 2, 3])
@pytest.mark.parametrize("model", sorted(EXAMPLES))
@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_nothing_is_left_unexecuted(name: str, options: dict[str, Any], model: str, micro_batches: int) -> None:
    program = example(model).program
    plan = lower(strategy(name, options).record(program, micro_batches), name)
    verify(program, plan)
    assert runs(plan) == sorted((o.name, mb) for o in program.operators for mb in range(micro_batches))


def random_program(rng: random.Random, operators: int, states: bool) -> Program:
    """A DAG of operators with and without weights, tags and one engine state; what nobody reads is an output."""
    values = {"x": Value("x", Scope.BATCH, 0), "w": Value("w", Scope.SHARED)}
    ops, known = [], ["x"]
    for i in range(operators):
        inputs = rng.sample(known[-4:], rng.randint(1, min(2, len(known[-4:])))) + ["w"] * (rng.random() < 0.5)
        tags = ("attention",) if rng.random() < 0.3 else ()
        touches = states and rng.random() < 0.3
        ops.append(
            Operator(
                f"op{i}",
                rng.choice(list(Resource)),
                tuple(inputs),
                (f"v{i}",),
                tags,
                writes=("kv",) if touches and rng.random() < 0.7 else (),
                reads=("kv",) if touches else (),
            )
        )
        values[f"v{i}"] = Value(f"v{i}", Scope.BATCH, 0)
        known.append(f"v{i}")
    used = {v for o in ops for v in o.inputs}
    return Program(("x", "w"), tuple(v for v in known if v not in used), values, tuple(ops))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    size=st.integers(1, 16),
    micro_batches=st.integers(1, 3),
    variant=st.sampled_from(VARIANTS),
    ordered=st.booleans(),
)
def test_plans_of_random_programs_verify(
    seed: int, size: int, micro_batches: int, variant: tuple[str, dict[str, Any]], ordered: bool
) -> None:
    program = random_program(random.Random(seed), size, states=True)
    depends = [(i, i + 1) for i in range(micro_batches - 1)] if ordered else []
    plan = lower(strategy(*variant).record(program, micro_batches, depends), variant[0])
    verify(program, plan)
    assert runs(plan) == sorted((o.name, mb) for o in program.operators for mb in range(micro_batches))


# -- prefill_decode ----------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    requests=st.lists(st.tuples(st.sampled_from((1, 1, 3, 7)), st.sampled_from((0, 0, 5, 90))), min_size=1, max_size=9),
    known=st.booleans(),
    first=st.booleans(),
    minimum=st.integers(1, 3),
)
def test_the_cut_separates_decode_from_prefill(
    requests: list[tuple[int, int]], known: bool, first: bool, minimum: int
) -> None:
    batch = Batch(tuple(n for n, _ in requests), tuple(c for _, c in requests) if known else ())
    decodes = [n == 1 and (c > 0 or not known) for n, c in requests]
    split = cut_prefill_decode(batch, minimum, decode_first=first)
    if len(split.micro_batches) == 1:
        assert split.reason and split.bounds == (0, sum(batch.tokens))
        ordered = decodes == sorted(decodes, reverse=first)
        groups = [sum(n for (n, _), d in zip(requests, decodes) if d is kind) for kind in (True, False)]
        assert not ordered or min(groups) < minimum  # it was not split for a reason
    else:
        kinds = [{decodes[r] for r in range(*m.requests)} for m in split.micro_batches]
        assert kinds == [{first}, {not first}]
        assert min(b - a for a, b in zip(split.bounds, split.bounds[1:])) >= minimum


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        (Batch((1, 1), (4, 4)), "decode requests only"),
        (Batch((1, 8), (0, 4)), "prefill requests only"),  # one new token without context is a prompt
        (Batch((1, 8, 1), (4, 0, 4)), "not all decode requests come before the prefill requests"),
        (Batch((8, 1)), "not all decode requests come before the prefill requests"),
        (Batch((1, 8)), "a micro-batch would have under 2 tokens"),
    ],
)
def test_reasons_not_to_split(batch: Batch, reason: str) -> None:
    assert cut_prefill_decode(batch, 2).reason == reason


def test_shared_blocks_between_the_kinds_are_dependences() -> None:
    batch = Batch((1, 1, 8), (4, 4, 0), depends=((2, 0),))  # a decode request reads what the prompt writes
    assert cut_prefill_decode(batch).depends == ((1, 0),)


def test_a_batch_in_the_other_order_needs_the_option() -> None:
    batch = Batch((9, 1, 1), (0, 7, 7))
    assert len(strategy("prefill_decode", {"min_tokens": 1}).split(batch).micro_batches) == 1
    assert strategy("prefill_decode", {"min_tokens": 1, "first": "prefill"}).split(batch).bounds == (0, 9, 11)


def places(plan: Plan) -> dict[str, set[tuple[str, int, int]]]:
    found: dict[str, set[tuple[str, int, int]]] = {}
    for s in plan.actions:
        if s.kind is ActionKind.RUN:
            found.setdefault(s.operators[0], set()).add((s.stream, s.start, s.stop))
    return found


@pytest.mark.parametrize(("first", "decode"), [("decode", 0), ("prefill", 1)])
@pytest.mark.parametrize("model", sorted(EXAMPLES))
def test_only_attention_is_split_and_runs_beside_itself(model: str, first: str, decode: int) -> None:
    program = example(model).program
    plan = lower(strategy("prefill_decode", {"first": first}).record(program, 2), "prefill_decode")
    found, before = places(plan), happens_before(plan)
    for op in program.operators:
        if "attention" not in op.tags:
            assert found[op.name] == {(COMPUTE_STREAM, 0, 2)}
            continue
        prefill = 1 - decode
        assert found[op.name] == {("decode", decode, decode + 1), (COMPUTE_STREAM, prefill, prefill + 1)}
        a, b = (i for i, s in enumerate(plan.actions) if s.operators == (op.name,))
        assert not contains(before[b], a) and not contains(before[a], b)


def test_what_cannot_be_merged_runs_with_its_micro_batch() -> None:
    program = program_of("""
        value x batch:0
        value n local
        value y batch:0
        value z batch:0
        inputs x
        op count compute
          inputs x
          outputs n
        op use compute
          inputs x n
          outputs y
        op after compute
          inputs y
          outputs z
        outputs z
    """)
    plan = lower(strategy("prefill_decode", {}).record(program, 2), "prefill_decode")
    verify(program, plan)
    apart = {("decode", 0, 1), (COMPUTE_STREAM, 1, 2)}
    assert places(plan) == {"count": apart, "use": apart, "after": {(COMPUTE_STREAM, 0, 2)}}


def test_all_runs_each_micro_batch_on_a_stream_of_its_own() -> None:
    program = example("moe").program
    plan = lower(strategy("prefill_decode", {"overlap": "all"}).record(program, 2), "prefill_decode")
    assert {(s.stream, s.start, s.stop) for s in plan.actions if s.kind is ActionKind.RUN} == {
        ("decode", 0, 1),
        (COMPUTE_STREAM, 1, 2),
    }


# -- branches ----------------------------------------------------------------------------------------------------------


def test_branches_of_the_examples() -> None:
    assert side_streams(example("llama").program, 1) == {}
    assert side_streams(example("moe").program, 1) == {f"layers.{i}.shared_expert": "side0" for i in range(2)}
    dit = example("dit").program
    texts = {o.name for o in dit.operators if any("text" in v for v in o.inputs)}
    assert side_streams(dit, 1) == dict.fromkeys(texts - {"out.compute"}, "side0")
    assert len(side_streams(dit, 1)) == 2  # the text stream of both blocks, up to the join


@settings(max_examples=200, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), size=st.integers(1, 16), streams=st.integers(1, 3))
def test_whatever_moves_aside_has_heavy_work_to_run_beside(seed: int, size: int, streams: int) -> None:
    program = random_program(random.Random(seed), size, states=False)
    aside = side_streams(program, streams)
    assert set(aside.values()) <= {f"side{i}" for i in range(streams)}
    above: dict[str, set[str]] = {}
    for name, edges in order_edges(program).items():
        above[name] = edges.union(*(above[e] for e in edges))
    heavy = {o.name for o in program.operators if "w" in o.inputs or o.tags or o.resource is Resource.NETWORK}
    for name in aside.keys() & heavy:
        assert any(o not in above[name] and name not in above[o] for o in heavy - aside.keys() - {name})
    chain = max((above[n] | {n} for n in above), key=lambda c: len(c & heavy - aside.keys()))
    stays = heavy - aside.keys()
    assert stays <= chain, "heavy operators that stay are one chain"


def test_a_light_branch_stays() -> None:
    program = program_of("""
        value x batch:0
        value w shared
        value a batch:0
        value b batch:0
        value c batch:0
        inputs x w
        op matmul compute
          inputs x w
          outputs a
        op light compute
          inputs x
          outputs b
        op join compute
          inputs a b
          outputs c
        outputs c
    """)
    assert side_streams(program, 1) == {}


def test_parallel_branches_take_a_side_stream_each_while_there_are_some() -> None:
    names = ("p", "q", "r")
    operators = tuple(Operator(n, Resource.COMPUTE, ("x", "w"), (f"v{n}",)) for n in names)
    join = Operator("join", Resource.COMPUTE, tuple(f"v{n}" for n in names), ("y",))
    values = {v: Value(v, Scope.BATCH, 0) for v in ("x", "y", "vp", "vq", "vr")} | {"w": Value("w", Scope.SHARED)}
    program = Program(("x", "w"), ("y",), values, (*operators, join))
    assert side_streams(program, 2) == {"q": "side0", "r": "side1"}
    assert side_streams(program, 1) == {"q": "side0", "r": "side0"}


def test_a_runtime_schedules_unsplit_steps_with_branches() -> None:
    capture = example("moe")
    plan_cache = PlanCache(capture, FixedStrategy(strategy("branches", {})), SequentialExecutor())
    split = plan_cache.decide(Batch((5, 5)))
    plan = plan_cache.prepare(split.signature).plan
    assert plan.strategy == "branches" and plan.streams == (COMPUTE_STREAM, "side0")
    assert split.reason == "branches overlap without a split"
    unsplittable = dataclasses.replace(capture.program, unsplittable="it mixes the batch")
    captured = dataclasses.replace(capture, program=unsplittable)
    mixed = PlanCache(captured, FixedStrategy(strategy("branches", {})), SequentialExecutor())
    assert mixed.prepare(mixed.decide(Batch((5, 5))).signature).plan.streams == (COMPUTE_STREAM, "side0")


# -- the shipped configs -----------------------------------------------------------------------------------------------

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("name", ["prefill_decode", "prefill_decode_sm_share"])
def test_configs_split_a_mixed_step_and_name_streams_that_exist(name: str) -> None:
    config = load(CONFIGS / "vllm" / f"{name}.yaml")
    split = built(config).split(Batch((1,) * 16 + (512,), (64,) * 16 + (0,)))
    assert split.bounds == (0, 16, 528)
    plan = lower(built(config).record(example("llama").program, 2), config.strategy)
    assert plan.streams == (COMPUTE_STREAM, "decode")
    assert {s: o.sm_share for s, o in config.streams.items()} == ({"decode": 0.25} if "sm_share" in name else {})


def test_check_verifies_the_split_plan_of_prefill_decode() -> None:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["check", str(CONFIGS / "vllm" / "prefill_decode.yaml")])
    assert result.exit_code == 0 and result.stdout.count("compute, decode") == len(EXAMPLES)
