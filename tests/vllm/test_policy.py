"""`strategy: auto` in real vLLM: trials before serving that leave nothing behind, and decisions that are obeyed."""

import json
import random
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynaflow_serving.errors import ConfigError
from dynaflow_serving.policy.bucket import DECODE, KINDS
from dynaflow_serving.policy.selector import COMPARING
from dynaflow_serving.session.ranks import Ranks

V2 = find_spec("triton") is not None
MODE = "mode3" if V2 else "mode2-uncompiled"  # of the runs in one process


def mixed_prompts():
    """Ten lengths; every third shares a prefix of more than a block (128) of the KV cache."""
    draw = random.Random(0)
    shared = [draw.randrange(10, 2000) for _ in range(140)]
    return [
        (shared if i % 3 == 0 else []) + [draw.randrange(10, 2000) for _ in range(draw.choice([3, 9, 33]))]
        for i in range(10)
    ]


PROMPTS = mixed_prompts()
FEW = {"max_num_seqs": 4}  # few kinds of batches to tune


def auto(table, budget_seconds, **config):
    options = {"candidates": ["nanoflow"], "micro_batches": [2], "pairs": 3, "table": str(table)}
    return {"strategy": "auto", "options": {**options, "budget_seconds": budget_seconds}, **config}


class Watched:
    """What the trials of one run asked for, what began, and what they left in the runner."""

    def __init__(self, patch):
        from dynaflow_serving.integrations.vllm.trials import WorkerTrials

        self.asked, self.begun, self.left = [], [], None
        stock = WorkerTrials.run_step

        def run_step(trials, batch):
            session = trials.worker.dynaflow.session
            with pytest.MonkeyPatch.context() as spy:
                step = session.step
                spy.setattr(session, "step", lambda batch: self.begun.append(batch) or step(batch))
                stock(trials, batch)
            self.asked.append(batch)
            self.left = requests_in(trials.worker.model_runner)

        patch.setattr(WorkerTrials, "run_step", run_step)


def requests_in(runner):
    if hasattr(runner, "req_states"):  # Model Runner V2
        states = runner.req_states
        return states.num_reqs, len(runner._block_ids), states.max_num_reqs - len(states.free_indices)
    return len(runner.requests), runner.input_batch.num_reqs, len(runner.input_batch.req_id_to_index)


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(1, 9000), requests=st.integers(1, 300), length=st.integers(2, 9000), blocks=st.integers(1, 3000),
    sizes=st.lists(st.sampled_from([16, 32, 128]), min_size=1, max_size=3), v2=st.booleans(),
)  # fmt: skip
def test_trials_fit_into_the_engine(tokens, requests, length, blocks, sizes, v2):
    from dynaflow_serving.integrations.vllm.trials import WorkerTrials

    groups = [SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=size)) for size in sizes]
    scheduler = SimpleNamespace(max_num_batched_tokens=tokens, max_num_seqs=requests)
    model = SimpleNamespace(max_model_len=length, get_vocab_size=lambda: 100)
    config = SimpleNamespace(scheduler_config=scheduler, model_config=model)
    cache = SimpleNamespace(kv_cache_groups=groups, num_blocks=blocks)
    runner = SimpleNamespace(kv_cache_config=cache)
    dynaflow = SimpleNamespace(session=SimpleNamespace(ranks=Ranks()))
    worker = SimpleNamespace(vllm_config=config, model_runner=runner, use_v2_model_runner=v2, dynaflow=dynaflow)
    trials = WorkerTrials(worker)
    for batch in trials.batches():
        assert sum(batch.tokens) <= tokens and len(batch.tokens) <= requests
        made = trials._requests([str(i) for i in range(len(batch.tokens))], batch)
        ids = [block for request in made for group in request.block_ids for block in group]
        assert len(ids) == len(set(ids)) and 0 not in ids and max(ids) < blocks
        for request, new in zip(made, batch.tokens, strict=True):
            held = request.num_computed_tokens + new
            assert held < length
            assert [len(group) for group in request.block_ids] == [-(-held // size) for size in sizes]


@pytest.fixture(scope="module")
def tuned(generate, tmp_path_factory):
    """(table's file, watched trials, outcome) of a run that tunes."""
    file = tmp_path_factory.mktemp("policy") / "table.json"
    with pytest.MonkeyPatch.context() as patch:
        watched = Watched(patch)
        outcome = generate("llama", MODE, dynaflow=auto(file, 60), prompts=PROMPTS, **FEW)
    return file, watched, outcome


def test_trials_are_the_batches_that_were_asked_for_and_leave_nothing(tuned):
    _, watched, _ = tuned
    assert {bool(b.context[0]) for b in watched.asked} == {True, False}
    for asked, begun in zip(watched.asked, watched.begun, strict=True):
        # Both runners may put a step's requests into another order.
        assert sorted(zip(begun.tokens, begun.context)) == sorted(zip(asked.tokens, asked.context))
        assert begun.depends == ()
    assert watched.left == (0, 0, 0)


def test_every_kind_of_batch_has_a_decision_and_a_reason(tuned, check_tokens):
    file, _, outcome = tuned
    check_tokens(outcome, "llama", MODE, prompts=PROMPTS)
    policy = outcome.reports[0]["policy"]
    assert policy == json.loads(file.read_text())
    assert {d["kind"] for d in policy["decisions"]} == set(KINDS)
    assert max(d["requests"] for d in policy["decisions"] if d["kind"] == DECODE) == 4
    assert all(d["reason"] for d in policy["decisions"])
    assert all(t["verdict"] for d in policy["decisions"] for t in d["trials"] if t["candidate"] != d["candidate"])


def steps_of(outcome):
    steps = outcome.reports[0]["steps"]
    return steps["split"] + sum(steps["unsplit"].values())


def test_second_start_obeys_the_table_and_does_not_tune(tuned, generate, check_tokens, tmp_path, monkeypatch):
    content = json.loads(tuned[0].read_text())
    for decision in content["decisions"]:
        decision["candidate"] = "nanoflow x2"
    file, traces = tmp_path / "table.json", tmp_path / "traces"
    file.write_text(json.dumps(content))
    watched = Watched(monkeypatch)
    trace = {"folder": str(traces), "every": 2, "limit": 2}
    ours = generate("llama", MODE, dynaflow=auto(file, 60, trace=trace), prompts=PROMPTS, **FEW)
    assert len(watched.asked) == 1  # the check of the one cut that is in use, and no timing
    assert ours.reports[0]["policy"] == content and json.loads(file.read_text()) == content
    check_tokens(ours, "llama", MODE, prompts=PROMPTS)
    assert ours.split > 0 and ours.reports[0]["steps"]["unsplit"][COMPARING] > 0
    assert steps_of(ours) == steps_of(tuned[2])  # trials are not counted
    written = sorted(traces.iterdir())
    assert [p.name for p in written] == [f"step{n:06d}-rank0.json" for n in (1, 3)]
    names = [event["name"] for event in json.loads(written[0].read_text())["traceEvents"]]
    assert any("layers.0.attention" in name for name in names)


@pytest.mark.skipif(V2, reason="does not depend on the model runner")
def test_a_table_of_another_release_is_not_used(tuned, generate, tmp_path):
    content = json.loads(tuned[0].read_text())
    content["key"]["dynaflow_serving"] = "0.0.0"
    for decision in content["decisions"]:
        decision["candidate"] = "nanoflow x2"
    file = tmp_path / "table.json"
    file.write_text(json.dumps(content))
    ours = generate("llama", MODE, dynaflow=auto(file, 1e-9), prompts=PROMPTS, **FEW)
    assert ours.split == 0
    policy = ours.reports[0]["policy"]
    assert policy["key"] == json.loads(tuned[0].read_text())["key"]
    assert {d["reason"] for d in policy["decisions"]} == {"not tuned: the budget of 1e-09 s was used up"}
    assert json.loads(file.read_text()) == policy


@pytest.mark.alone
@pytest.mark.skipif(V2, reason="Model Runner V2 is tested on one rank here")
def test_ranks_decide_alike(generate, check_tokens, tmp_path):
    ours = generate("llama", tp=2, dynaflow=auto(tmp_path / "table.json", 60), **FEW)
    check_tokens(ours, "llama", tp=2)
    first, second = (report["policy"] for report in ours.reports)
    assert first == second
    assert any(d["trials"] for d in first["decisions"]) and all(d["reason"] for d in first["decisions"])
    effects = next(t["effects"] for d in first["decisions"] for t in d["trials"] if t["effects"])
    assert any("collectives of" in e for e in effects) and any("of weights again" in e for e in effects)


def test_misspelt_candidate_ends_before_weights_load(start):
    with pytest.raises(ConfigError, match=r"unknown strategy 'nanoflw'. Did you mean 'nanoflow'\? Valid: .*dual"):
        start({"strategy": "auto", "options": {"candidates": ["nanoflow", "nanoflw"]}})


def test_misspelt_option_of_a_candidate(start):
    with pytest.raises(ConfigError, match="unknown option 'cutt'"):
        start({"strategy": "auto", "options": {"candidates": [{"strategy": "nanoflow", "options": {"cutt": 1}}]}})
