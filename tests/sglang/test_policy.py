"""`strategy: auto` in SGLang: trials are the engine's own steps and leave nothing, and what they decide is served."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from dynaflow_serving.core.batch import Batch
from dynaflow_serving.errors import ConfigError
from dynaflow_serving.policy.bucket import DECODE, MIXED, PREFILL, bucket_of
from dynaflow_serving.policy.selector import COMPARING, FASTER_WHOLE, TUNING
from dynaflow_serving.policy.table import Decision, Table, Trial

AUTO = {"strategy": "auto", "options": {"candidates": ["nanoflow"], "micro_batches": [2], "pairs": 3}}


def auto(table, **options):
    return {"strategy": "auto", "options": AUTO["options"] | {"table": str(table)} | options}


@pytest.fixture
def cache_of(runner):
    """`cache_of(page)`: a scheduler's own prefix cache, on the runner's pools, which are empty then."""
    from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.unified_cache.components import ComponentType
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    def make(page=1):
        runner.req_to_token_pool.clear()
        runner.token_to_kv_pool_allocator.clear()
        allocator = runner.token_to_kv_pool_allocator
        if page > 1:
            pool = runner.token_to_kv_pool
            size = pool.size - page  # page 0 is for padding
            allocator = PagedTokenToKVPoolAllocator(size, page, pool.dtype, runner.device, pool, need_sort=False)
        pools = CacheInitParams(False, runner.req_to_token_pool, allocator, page, tree_components=(ComponentType.FULL,))
        return UnifiedRadixCache(pools)

    return make


def left(runner, cache):
    """What a step must leave as it was."""
    return {
        "slots": sorted(cache.token_to_kv_pool_allocator.free_pages.tolist()),
        "rows": sorted(cache.req_to_token_pool.free_slots),
        "cached": cache.total_size(),
        "passes": runner.forward_pass_id,
        "event": runner.shared_read_done_event,
    }


@pytest.mark.parametrize(("page", "mixed", "decode"), [(1, True, 256), (16, False, 240)])
def test_trials_are_steps_of_exactly_these_batches_and_leave_nothing(
    one_process, runner, cache_of, page, mixed, decode
):
    from sglang.srt.runtime_context import get_schedule

    from dynaflow_serving.integrations.sglang.trials import RunnerTrials

    cache, seen = cache_of(page), []
    before = left(runner, cache)
    with (
        get_schedule().override(enable_mixed_chunk=mixed, chunked_prefill_size=300),
        one_process.dynaflow(runner, AUTO) as ours,
        RunnerTrials(runner, cache) as trials,
        ours.session.trial(""),
    ):
        step = ours.session.step
        ours.session.step = lambda batch: seen.append(batch) or step(batch)
        batches = list(trials.batches())
        for batch in batches:
            trials.run_step(batch)
            trials.run_step(batch)
        assert left(runner, cache) != before  # those of the last batch are held
        assert not ours.session.counts.split and not ours.session.counts.unsplit
    assert seen == [batch for batch in batches for _ in range(2)]
    assert left(runner, cache) == before
    assert {bucket_of(b).kind for b in batches} == ({PREFILL, MIXED, DECODE} if mixed else {PREFILL, DECODE})
    assert max(sum(b.tokens) for b in batches) == 300 and max(len(b.tokens) for b in batches) == 16
    largest = next(b for b in batches if bucket_of(b).kind == DECODE)
    assert {c + 1 for c in largest.context} == {decode}  # of 16 requests: as much as the pool has full pages for


@pytest.mark.parametrize("runner", ["llama", "qwen3_moe"], indirect=True)
def test_trials_of_a_batch_repeat(one_process, runner, cache_of, monkeypatch):
    """A batch that is prepared once is the same step each time, split or not."""
    import torch

    from dynaflow_serving.integrations.sglang.trials import RunnerTrials

    logits = []
    sample = runner.sample

    def sampled(output, forward_batch):
        logits.append(output.next_token_logits.clone())
        return sample(output, forward_batch)

    monkeypatch.setattr(runner, "sample", sampled)
    with one_process.dynaflow(runner, AUTO) as ours, RunnerTrials(runner, cache_of()) as trials:
        for batch in [b for b in trials.batches() if sum(b.tokens) in (16, 64)]:
            for candidate in ("", "nanoflow x2", "sequential x2", ""):
                with ours.session.trial(candidate):
                    trials.run_step(batch)
            first, *others = logits[-4:]
            assert first.shape[0] == len(batch.tokens) and not first.isnan().any()
            for other in others:
                torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-4)


def test_unsplit_trials_replay_graphs_as_serving_does(one_process, runner, cache_of, monkeypatch):
    from dynaflow_serving.integrations.sglang.trials import RunnerTrials

    replayed, eager = [], runner.eager_runner

    def execute(forward_batch, pp_proxy_tensors=None):
        replayed.append(ours.session.in_flight.trial.candidate)
        return eager.execute(forward_batch, pp_proxy_tensors=pp_proxy_tensors)

    graphs = SimpleNamespace(can_run_graph=lambda forward_batch: True, execute=execute)
    monkeypatch.setattr(runner, "decode_cuda_graph_runner", graphs)
    with one_process.dynaflow(runner, AUTO) as ours, RunnerTrials(runner, cache_of()) as trials:
        decode = next(b for b in trials.batches() if bucket_of(b).kind == DECODE)
        for candidate in ("", "nanoflow x2", ""):
            with ours.session.trial(candidate):
                trials.run_step(decode)
    assert replayed == ["", ""]


def test_a_failing_trial_leaves_nothing(one_process, runner, cache_of, monkeypatch, tmp_path):
    cache = cache_of()
    before = left(runner, cache)
    with one_process.dynaflow(runner, auto(tmp_path / "table.json")) as ours:
        monkeypatch.setattr(ours.body, "forward", None)
        with pytest.raises(TypeError):
            ours.start(cache)
        monkeypatch.undo()
    assert left(runner, cache) == before


def test_tuning_decides_every_bucket_and_a_second_start_reads_the_table(
    one_process, runner, cache_of, prompts, stock, tmp_path, monkeypatch
):
    from sglang.srt.runtime_context import get_schedule

    from dynaflow_serving.integrations.sglang.trials import RunnerTrials

    cache, path = cache_of(), tmp_path / "table.json"
    before = left(runner, cache)
    config = auto(path, budget_seconds=4)
    with get_schedule().override(chunked_prefill_size=256), one_process.dynaflow(runner, config) as ours:
        ours.start(cache)
        assert left(runner, cache) == before
        tuned, decided = ours.session.selector.table, ours.decided()
        assert not ours.session.counts.split and not ours.session.counts.unsplit
        tokens, _ = one_process.generate(runner, prompts, 12)
        assert tokens.tolist() == stock
        counts = ours.session.counts
        assert counts.split + sum(counts.unsplit.values()) == 12 and TUNING not in counts.unsplit
    assert {d.kind for d in tuned.decisions} == {PREFILL, DECODE} and all(d.reason for d in tuned.decisions)
    assert tuned.decisions[0].plain_ms > 0 and tuned.decisions[0].trials[0].predicted > 0
    assert decided == {
        "adopted": {str(bucket): candidate for bucket, candidate in tuned.adopted.items()},
        "buckets": len(tuned.decisions),
        "switched_off": 0,
        "table": str(path),
    }
    monkeypatch.setattr(RunnerTrials, "run_step", None)
    with get_schedule().override(chunked_prefill_size=256), one_process.dynaflow(runner, config) as ours:
        ours.start(cache_of())
        assert ours.session.selector.table == tuned


@pytest.fixture
def adopted(one_process, runner, cache_of, prompts, tmp_path):
    """A config whose table splits decodes of 9 to 16 requests, and not the prefill of `prompts`."""
    config, label = auto(tmp_path / "table.json"), "nanoflow x2"
    with one_process.dynaflow(runner, config) as ours:
        key = facts_of(ours, cache_of()).key
    decode = Decision(kind=DECODE, tokens=16, requests=16, candidate=label, trials=[Trial(candidate=label, ratios=[2])])
    decode.noise = 100.0  # the guard lets it run, however slow it is
    kind, most, _ = bucket_of(Batch(tuple(map(len, prompts))))
    prefill = Decision(kind=kind, tokens=most, requests=16, trials=[Trial(candidate=label, ratios=[0.5])])
    Table(key=key, decisions=[decode, prefill]).save(tmp_path / "table.json")
    return config


def test_adopted_buckets_are_split_and_others_are_not(one_process, runner, cache_of, prompts, adopted, stock):
    with one_process.dynaflow(runner, adopted) as ours:
        ours.start(cache_of())
        assert ours.decided()["adopted"] == {"decode, up to 16 tokens of 16 requests": "nanoflow x2"}
        tokens, _ = one_process.generate(runner, prompts, 12)
        counts = ours.session.counts
        assert tokens.tolist() == stock
        assert counts.unsplit[FASTER_WHOLE] == 1  # the prefill
        assert counts.unsplit[COMPARING] == 4 and counts.split == 7


def test_the_guard_does_not_take_a_sampled_step_for_a_slow_one(
    one_process, runner, cache_of, prompts, adopted, tmp_path, monkeypatch
):
    seen = []
    with one_process.dynaflow(runner, adopted | {"check": {"every": 2}, "trace": {"folder": str(tmp_path)}}) as ours:
        ours.start(cache_of())
        guard = ours.session.selector.guard
        monkeypatch.setattr(guard, "record_step", lambda bucket, split, *_: seen.append(split) or 0.0)
        one_process.generate(runner, prompts, 12)
        assert ours.session.counts.split == 7 and ours.session.check.steps == 1 + 4  # one before serving
    assert seen.count(True) == 3 and seen.count(False) == 5


def facts_of(ours, cache):
    from dynaflow_serving.integrations.sglang.trials import RunnerTrials, facts

    return facts(ours.runner, ours.session, ours.body, RunnerTrials(ours.runner, cache).limits)


def test_what_a_decision_holds_for(one_process, runner, cache_of, tmp_path, monkeypatch):
    cache = cache_of()

    def facts_under(config):
        with one_process.dynaflow(runner, config) as ours:
            return facts_of(ours, cache)

    first = facts_under(AUTO)
    assert json.loads(json.dumps(first.key)) == first.key and all(first.key[n] for n in ("model", "mode", "programs"))
    assert first.weight_bytes > 2**20 and not first.collective_bytes and not first.graphs
    logs = AUTO | {"trace": {"folder": str(tmp_path)}, "options": AUTO["options"] | {"budget_seconds": 5.0}}
    assert facts_under(logs).key == first.key
    assert facts_under(AUTO | {"options": AUTO["options"] | {"micro_batches": [2, 3]}}).key != first.key
    monkeypatch.setattr(runner, "max_running_requests", 8)
    assert facts_under(AUTO).key["limits"] != first.key["limits"]
    monkeypatch.setattr(runner, "decode_cuda_graph_runner", object())
    assert facts_under(AUTO) == replace(facts_under(AUTO), graphs=True)


def test_wrong_candidate_ends_before_a_process_starts(model_path):
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.server_args import ServerArgs

    wrong = {"strategy": "auto", "options": {"candidates": ["nanoflw"]}}
    arguments = ServerArgs(model_path=model_path("llama"), json_model_override_args=json.dumps({"dynaflow": wrong}))
    with pytest.raises(ConfigError, match=r"unknown strategy 'nanoflw'. Did you mean 'nanoflow'\?"):
        arguments.resolve_once()
