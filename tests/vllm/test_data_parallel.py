"""Data-parallel ranks: those of a dense model split on their own, those that share experts alike or not at all."""

import contextlib
import random

import pytest
from replicas import Replicas

from dynaflow_serving.errors import InactiveError
from dynaflow_serving.session.vote import OUTVOTED

MOE = "qwen2_moe"  # a layer keeps the output of its shared expert during the exchange
EXCHANGE = ("dispatch", "experts", "combine")
DUAL_BATCH = {"strategy": "dual_batch", "options": {"min_tokens": 1}}

pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def experts(model_path):
    """An engine whose two ranks share experts; they compare the same steps with un-split ones, or wait for ever."""
    dynaflow = {**DUAL_BATCH, "check": {"every": 3}}
    with contextlib.closing(Replicas(model_path(MOE), dynaflow, enable_expert_parallel=True)) as replicas:
        yield replicas


@pytest.fixture
def steps(experts):
    """`steps()`: the steps of each rank in this test."""
    experts.call("dynaflow_reset")
    return lambda: [report["steps"] for report in experts.call("dynaflow_report")]


def test_the_exchange_of_tokens_runs_beside_compute(experts):
    reports = experts.call("dynaflow_report")
    assert len(reports) == 2 and len({r["plan_hash"] for r in reports}) == 1
    plan = reports[0]["programs"][0]["plans"][-1].splitlines()
    order = [line.split(" | run ") for line in plan if " | run layers.0." in line]
    assert [(stream, operator) for stream, operator in order if operator.split(".")[2].split()[0] in EXCHANGE] == [
        ("network", "layers.0.dispatch @0"),
        ("network", "layers.0.dispatch @1"),
        ("compute", "layers.0.experts @0"),
        ("network", "layers.0.combine @0"),
        ("compute", "layers.0.experts @1"),
        ("network", "layers.0.combine @1"),
    ]
    assert all(r["check"]["steps"] > 0 and r["check"]["refused"] == [] for r in reports)  # in trials before serving


def test_even_load(experts, steps, prompts, stock_tokens):
    assert experts.generate([(i % 2, p) for i, p in enumerate(prompts)]) == stock_tokens(MOE)
    one, other = steps()
    assert one["split"] == other["split"] > 5


@pytest.mark.parametrize("busy", [0, 1])
def test_a_rank_with_one_request_keeps_the_other_whole(experts, steps, prompts, stock_tokens, busy):
    ranks = [1 - busy, *[busy] * 8]
    assert experts.generate(list(zip(ranks, prompts))) == stock_tokens(MOE)[:9]
    counts = steps()
    assert counts[0]["split"] == counts[1]["split"]
    assert counts[busy]["unsplit"][OUTVOTED] > 5


def test_an_idle_rank_keeps_the_other_whole(experts, steps, prompts, stock_tokens):
    assert experts.generate([(1, p) for p in prompts]) == stock_tokens(MOE)
    assert steps()[0] == {"split": 0, "unsplit": {}} and steps()[1]["split"] == 0


def check_random_load(experts, prompts, stock, requests, seed):
    """Requests that end at different times, some because their client goes away."""
    draw = random.Random(seed)
    chosen = [draw.randrange(len(prompts)) for _ in range(requests)]
    limits = [draw.randint(1, 12) for _ in range(requests)]
    aborts = {i: draw.randint(1, limits[i]) for i in range(requests) if draw.random() < 0.3}
    tokens = experts.generate([(draw.randrange(2), prompts[c]) for c in chosen], limits, aborts)
    for i, got in enumerate(tokens):
        assert got == stock[chosen[i]][: len(got)]
        assert len(got) == limits[i] or i in aborts


def test_requests_that_end_at_different_times(experts, steps, prompts, stock_tokens):
    check_random_load(experts, prompts, stock_tokens(MOE), 16, seed=0)
    assert experts.generate([(0, prompts[0]), (1, prompts[1])]) == stock_tokens(MOE)[:2]  # it serves on
    assert steps()[0]["split"] == steps()[1]["split"]
    one, other = (report["check"] for report in experts.call("dynaflow_report"))
    assert one["steps"] == other["steps"] > 5 and one["refused"] == other["refused"] == []


@pytest.mark.long
def test_many_requests(experts, steps, prompts, stock_tokens):
    for seed in range(1, 6):
        check_random_load(experts, prompts, stock_tokens(MOE), 64, seed)
    assert steps()[0]["split"] == steps()[1]["split"] > 10


def check_dense(model_path, prompts, stock, **options):
    nanoflow = {"strategy": "nanoflow", "options": {"min_tokens": 1}}
    with contextlib.closing(Replicas(model_path("llama"), nanoflow, **options)) as replicas:
        ranks = [1, *[0] * 11]
        assert replicas.generate(list(zip(ranks, prompts))) == stock
        busy, other = (report["steps"] for report in replicas.call("dynaflow_report"))
    assert busy["split"] > 5
    assert other["split"] == 0 and OUTVOTED not in {**busy["unsplit"], **other["unsplit"]}


def test_ranks_of_a_dense_model_split_on_their_own(model_path, prompts, stock_tokens):
    check_dense(model_path, prompts, stock_tokens("llama"))


@pytest.mark.long
def test_ranks_of_a_dense_model_with_a_graph(model_path, prompts, stock_tokens):
    uncompiled = {"mode": 2, "backend": "eager"}
    check_dense(model_path, prompts, stock_tokens("llama"), enforce_eager=False, compilation_config=uncompiled)


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"enforce_eager": False}, "data parallelism of a mixture of experts in a mode with a graph"),
        ({"enable_expert_parallel": False}, "data parallelism of a mixture of experts without expert parallelism"),
        ({"tensor_parallel_size": 2}, "data parallelism of a mixture of experts with tensor parallelism"),
        ({"all2all_backend": "deepep_low_latency"}, "all-to-all backend deepep_low_latency keeps its exchange"),
    ],
)
def test_declined_by_name(start, model_path, options, cause):
    settings = {"model": model_path(MOE), "data_parallel_size": 2, "enable_expert_parallel": True}
    with pytest.raises(InactiveError, match=cause):
        start(DUAL_BATCH, **settings | {"enforce_eager": True} | options)


def test_auto_is_declined(start, model_path):
    settings = {"model": model_path(MOE), "data_parallel_size": 2, "enable_expert_parallel": True}
    with pytest.raises(InactiveError, match="data parallelism of a mixture of experts under strategy auto"):
        start({"strategy": "auto"}, enforce_eager=True, **settings)
