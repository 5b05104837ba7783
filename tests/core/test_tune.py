"""`dynaflow tune`: measured without serving, here and on a Ray cluster; merging needs neither."""

from __future__ import annotations

import importlib.util
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from dynaflow_serving.bench.engines import ENGINES, Engine
from dynaflow_serving.bench.process import EngineProcessError
from dynaflow_serving.cli import app
from dynaflow_serving.errors import ConfigError
from dynaflow_serving.policy.bucket import Bucket
from dynaflow_serving.policy.table import Decision, Table, Trial
from dynaflow_serving.tune.cluster import tune_on_cluster
from dynaflow_serving.tune.offline import TuningError, TuningJob, make_shares, merge_tables, tune_in_child

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray, which is not installed")
LABELS = ("nanoflow x2", "nanoflow x3", "comm_overlap x2", "comm_overlap x3", "dual_batch x2")
LARGE, SMALL = Bucket("prefill", 64, 4), Bucket("prefill", 32, 4)


def tune(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["tune", *arguments])


def job(target: str = "llama", **options: Any) -> TuningJob:
    return TuningJob(target, {"strategy": "auto", "options": options})


# -- shares and their tables --------------------------------------------------------------------------
def decided(bucket: Bucket, noise: float | None, *trials: Trial, reason: str = "") -> Decision:
    plain = None if noise is None else 10.0
    return Decision(**bucket._asdict(), plain_ms=plain, noise=noise, trials=list(trials), reason=reason)


def table(*decisions: Decision, seconds: float = 1.0, **key: str) -> Table:
    return Table(key={"device": "H100", **key}, decisions=list(decisions), seconds=seconds)


def test_every_candidate_is_in_one_share() -> None:
    parts = make_shares(job(), 2)
    assert [part.selector.measured for part in parts] == [LABELS[0::2], LABELS[1::2]]
    assert all(part.selector.candidates == LABELS for part in parts)  # the plans, annotations and key of one process
    assert [part.selector.measured for part in make_shares(job(), 9)] == [(label,) for label in LABELS]


def test_the_best_of_all_shares_is_adopted() -> None:
    first, second = make_shares(job(candidates=["nanoflow", "dual_batch"], micro_batches=[2]), 2)
    merged = merge_tables(
        [
            (first, table(decided(LARGE, 0.01, Trial(candidate="nanoflow x2", ratios=[1.1, 1.2, 1.1])), seconds=3)),
            (second, table(decided(LARGE, 0.05, Trial(candidate="dual_batch x2", ratios=[1.3, 1.4, 1.3])), seconds=2)),
        ]
    )
    (decision,) = merged.decisions
    assert decision.candidate == "dual_batch x2" and "1.30x, noise 5.0%" in decision.reason
    assert [t.candidate for t in decision.trials] == ["nanoflow x2", "dual_batch x2"]
    assert decision.trials[0].verdict == "dual_batch x2 is faster"
    assert merged.seconds == 3 and merged.adopted == {LARGE: "dual_batch x2"}


def test_a_gain_within_the_noise_of_any_share_is_none() -> None:
    first, second = make_shares(job(candidates=["nanoflow", "dual_batch"], micro_batches=[2]), 2)
    won = Trial(candidate="nanoflow x2", ratios=[1.1, 1.1, 1.1])
    lost = Trial(candidate="dual_batch x2", ratios=[0.9, 0.9, 0.9])
    parts = [(first, table(decided(LARGE, 0.01, won))), (second, table(decided(LARGE, 0.2, lost)))]
    (decision,) = merge_tables(parts).decisions
    assert not decision.candidate and decision.noise == 0.2
    assert decision.reason.startswith("nanoflow x2: gain 10.0%") and "20.0%" in decision.reason
    assert won.verdict == ""  # the share's own table is left as it was


def test_the_noise_of_a_share_that_timed_nothing_does_not_count() -> None:
    first, second = make_shares(job(candidates=["nanoflow", "dual_batch"], micro_batches=[2]), 2)
    won = Trial(candidate="nanoflow x2", ratios=[1.1, 1.1, 1.1])
    pruned = Trial(candidate="dual_batch x2", predicted=0.5, verdict="predicted to be slower (0.50x)")
    parts = [(first, table(decided(LARGE, 0.01, won))), (second, table(decided(LARGE, 0.2, pruned)))]
    (decision,) = merge_tables(parts).decisions
    assert decision.candidate == "nanoflow x2" and decision.noise == 0.01
    assert decision.trials[1].verdict == pruned.verdict


def test_what_one_share_has_not_tried_is_said() -> None:
    first, second = make_shares(job(candidates=["nanoflow", "dual_batch"], micro_batches=[2]), 2)
    trial = Trial(candidate="nanoflow x2", ratios=[1.1, 1.1, 1.1])
    merged = merge_tables(
        [
            (first, table(decided(LARGE, 0.01, trial), decided(SMALL, None, reason="not tuned: budget"))),
            (second, table(decided(LARGE, None, reason="not tried: slow"), decided(SMALL, None, reason="not tried"))),
        ]
    )
    large, small = merged.decisions
    assert large.candidate == "nanoflow x2" and large.trials[1].verdict == "not tried: slow"
    assert not small.trials and small.reason == "not tuned: budget; not tried"


def test_shares_of_different_machines_are_an_error() -> None:
    first, second = make_shares(job(), 2)
    with pytest.raises(TuningError, match="device: 'H100' in one share, 'H200' in another"):
        merge_tables([(first, table()), (second, table(device="H200"))])


# -- the command --------------------------------------------------------------------------------------
def test_an_example_is_tuned_in_a_process_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    result = tune("llama", "-c", "nanoflow", "-c", "comm_overlap", "-n", "2", "--budget", "20", "--out", str(path))
    assert result.exit_code == 0, result.output
    assert "candidates nanoflow x2, comm_overlap x2; at most 20 s" in result.stderr and "its log" in result.stderr
    assert "kinds of batches are split" in result.stdout and str(path) in result.stdout
    written = Table.model_validate_json(path.read_text())
    assert written.key["engine"] == "example" and written.key["model"] == "llama"
    assert {d.kind for d in written.decisions} == {"prefill", "mixed", "decode"}
    assert all(d.reason for d in written.decisions)
    assert [t.candidate for t in written.decisions[0].trials] == ["nanoflow x2", "comm_overlap x2"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["lama"], "not an embedded example (llama, moe, dit). For a model, say which engine"),
        (["llama", "-c", "nanoflw"], "Did you mean 'nanoflow'?"),
        (["llama", "-s", "nanoflow"], "strategy 'nanoflow' decides nothing"),
        (["llama", "-n", "0"], "each at least 1"),
        (["llama", "--dtype", "float16", "-tp", "2"], "--tensor-parallel, --dtype: for models"),
        (["llama", "--engine", "vlm"], "Did you mean 'vllm'?"),
        (["llama", "--engine", "sglang", "--compiled"], "Leave --compiled and --uncompiled out"),
        (["no/such/model", "--engine", "vllm"], "model 'no/such/model' does not exist"),
    ],
)
def test_a_wrong_command_starts_nothing(arguments: list[str], says: str) -> None:
    result = tune(*arguments)
    assert result.exit_code == 2 and says in result.stderr
    assert "Traceback" not in result.output and not result.stdout


def test_ray_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = tune("llama", "--ray", "local")
    assert result.exit_code == 2 and "pip install 'dynaflow-serving[ray]'" in result.stderr


FAKE = """
from dynaflow_serving.bench.drivers import EngineInfo

class Fake:
    def start(self, settings):
        self.settings = settings
        return EngineInfo("9.9", 50, "a fake device")

    def report(self):
        key = {"dtype": self.settings.dtype, "compiled": str(self.settings.compiled)}
        table = self.settings.dynaflow["options"]["table"]
        decision = {"kind": "decode", "tokens": 16, "requests": 16, "reason": table}
        policy = {"key": key, "decisions": [decision]} if self.settings.max_model_len is None else None
        return [{"strategy": "auto", "mode": "fake", "policy": policy}]

    def reset(self):
        pass

    generate = close = reset
"""


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An engine called `fake`, whose decisions show its settings, and a folder that looks like a model."""
    (tmp_path / "fake_driver.py").write_text(FAKE)
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(ENGINES, "fake", Engine("fake_driver:Fake"))
    return tmp_path


def test_an_engine_keeps_its_defaults_and_its_table_is_where_a_start_looks(engine: Path) -> None:
    mine = engine / "mine.json"
    (engine / "auto.yaml").write_text(f"strategy: auto\noptions: {{table: {mine}}}\n")
    result = tune(str(engine), "--engine", "fake", "-s", str(engine / "auto.yaml"))
    assert result.exit_code == 0, result.output
    (path,) = (engine / "cache").rglob("*.json")
    assert str(path) in result.stdout and not mine.exists()
    written = Table.model_validate_json(path.read_text())
    assert written.key == {"dtype": "auto", "compiled": "True"}
    assert written.decisions[0].reason != str(mine)  # the engine has written beside its log


def test_an_engine_that_does_not_tune_is_an_error(engine: Path) -> None:
    result = tune(str(engine), "--engine", "fake", "--max-model-len", "64")
    assert result.exit_code == 2 and "has decided nothing" in result.stderr
    assert not (engine / "cache").exists()


# -- Ray ----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Two nodes with one CPU each, of which one claims to have two GPUs."""
    from ray.cluster_utils import Cluster

    nodes = Cluster()
    nodes.add_node(num_cpus=1, include_dashboard=False)
    nodes.add_node(num_cpus=1, num_gpus=2)
    yield nodes.address
    nodes.shutdown()


@needs_ray
def test_two_workers_measure_the_candidates_of_one_table(cluster: str) -> None:
    told: list[str] = []
    found = tune_on_cluster(job(budget_seconds=20), cluster, lambda share, what: told.append(f"{share}: {what}"))
    assert len({share.pid for share in found}) == len({share.node for share in found}) == 2
    merged = merge_tables([(share.job, share.table) for share in found])
    assert [t.candidate for t in merged.decisions[0].trials] == list(LABELS)
    assert all(d.reason for d in merged.decisions)
    assert merged.key == found[0].table.key
    assert sum("sent to the cluster" in line for line in told) == sum("measured on" in line for line in told) == 2


@needs_ray
@pytest.mark.long  # Ray is started for it alone
def test_a_share_that_fails_ends_the_command_without_a_table(cluster: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text(
        textwrap.dedent("""
            from dynaflow_serving import register_strategy
            from dynaflow_serving.strategies.comm_overlap import CommOverlap
            from dynaflow_serving.strategy.probes import PROBES

            @register_strategy("broken")
            class Broken(CommOverlap):
                def split(self, batch):
                    if batch not in PROBES.values():  # on which every strategy is tried when it is built
                        raise RuntimeError("out of luck")
                    return super().split(batch)
        """)
    )
    out = tmp_path / "table.json"
    result = tune("llama", "-c", "nanoflow", "-c", str(broken), "-n", "2", "--ray", cluster, "--out", str(out))
    assert result.exit_code == 2, result.output
    for text in ("share 2 of 2 (broken x2) has failed on", "RuntimeError: out of luck", "engine.log"):
        assert text in result.stderr
    assert "Traceback" not in result.stdout and not out.exists()


@needs_ray
def test_an_engine_goes_where_the_gpus_are(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynaflow_serving.tune.cluster._measure", _where)
    (share,) = tune_on_cluster(TuningJob("model", {"strategy": "auto"}, engine="vllm"), cluster)
    assert share.node in ("0", "1") and set(share.job.selector.measured) == set(LABELS)


def _where(job: TuningJob, name: str, threads: str | None) -> dict[str, Any]:
    """A task that measures nothing and answers with the GPUs that it was given."""
    import ray

    (gpu,) = ray.get_gpu_ids()
    return {"host": "", "node": str(gpu), "pid": 0, "seconds": 0.0, "table": table().model_dump()}


@needs_ray
def test_a_cluster_without_room_or_without_an_answer(cluster: str) -> None:
    model = TuningJob("model", {"strategy": "auto"}, engine="vllm", tensor_parallel=2)
    with pytest.raises(TuningError, match=r"no node of the Ray cluster has 2 CPUs and 2 GPUs, one per rank") as error:
        tune_on_cluster(model, cluster)
    assert {"{CPU: 1, GPU: 0}", "{CPU: 1, GPU: 2}"} == set(re.findall(r"{CPU[^}]*}", str(error.value)))  # in any order
    with pytest.raises(TuningError, match="no Ray cluster at 'nowhere'"):
        tune_on_cluster(job(), "nowhere")


def test_a_share_of_no_candidate_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown candidate 'nanoflow x9'"):
        job(only=["nanoflow x9"]).selector  # noqa: B018


def test_a_child_that_fails_names_its_log(tmp_path: Path) -> None:
    with pytest.raises(EngineProcessError, match=r"tune\.log"):
        tune_in_child(job("no_example"), "llama", tmp_path / "tune.log")
