"""Wrong requests end before weights load, in one paragraph that names cause and remedy."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from dynaflow_serving.errors import ConfigError, InactiveError

NANOFLOW = {"strategy": "nanoflow"}


@pytest.fixture
def start(model_path):
    """`start(dynaflow, ...)` resolves the arguments as Engine() does before it starts a process."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.server_args import ServerArgs

    def resolve(dynaflow, overrides=None, **options):
        arguments = ServerArgs(
            model_path=model_path("llama"),
            device="cpu",
            disable_cuda_graph=True,
            json_model_override_args=json.dumps({"dynaflow": dynaflow, **(overrides or {})}),
            **options,
        )
        arguments.resolve_once()
        return arguments

    return resolve


@pytest.mark.parametrize(
    ("dynaflow", "message"),
    [
        ("nanoflw", r"unknown strategy 'nanoflw'. Did you mean 'nanoflow'\? Valid: .*dual"),
        ("nowhere/nanoflow.yaml", "does not exist"),
        ({"strategy": "nanoflow", "options": {"micro_batch": 2}}, "unknown option 'micro_batch'. Did you mean"),
    ],
)
def test_wrong_config(start, dynaflow, message):
    with pytest.raises(ConfigError, match=message):
        start(dynaflow)


def test_two_configs(model_path):
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.server_args import ServerArgs

    arguments = ServerArgs(model_path=model_path("llama"), json_model_override_args='{"dynaflow": "nanoflow"}')
    arguments._dynaflow = "dual_batch"
    with pytest.raises(ConfigError, match="keep one of them"):
        arguments.resolve_once()


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"pp_size": 2}, "pipeline parallelism"),
        ({"dp_size": 2}, "data parallelism"),
        ({"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": ["all"]}, "LoRA"),
        ({"speculative_algorithm": "NGRAM"}, "speculative decoding"),
        ({"disaggregation_mode": "prefill"}, "prefill-decode disaggregation"),
        ({"enable_torch_compile": True}, "--enable-torch-compile"),
        ({"enable_two_batch_overlap": True}, "two-batch overlap"),
        ({"is_embedding": True}, "embedding models"),
        ({"cpu_offload_gb": 1}, "layer offloading"),
    ],
)
def test_declined_by_name(start, options, cause):
    with pytest.raises(InactiveError, match=rf"cannot be active: .*{cause}.*fallback: true"):
        start(NANOFLOW, **options)


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        ({"executor": "cuda"}, "executor 'cuda' does not fit device 'cpu'"),
        ({"graph": "whole"}, "graph 'whole': attention reads metadata"),
        ({"strategy": "branches"}, "strategy 'branches' never splits"),
    ],
)
def test_config_that_cannot_be_active(start, config, cause):
    with pytest.raises(InactiveError, match=cause):
        start(NANOFLOW | config)


def test_unsupported_release(start, monkeypatch):
    from dynaflow_serving.integrations.base import Integration

    monkeypatch.setattr(Integration, "installed_version", lambda self: "0.5.22")
    with pytest.raises(InactiveError, match=r"supports sglang 0\.5\.23; installed is 0\.5\.22"):
        start(NANOFLOW)


def test_fallback_runs_stock_with_a_warning(start, monkeypatch):
    from dynaflow_serving.integrations.sglang import server_args

    warnings = []
    monkeypatch.setattr(server_args.logger, "warning", lambda text, *args: warnings.append(text % args))
    arguments = start(NANOFLOW | {"fallback": True}, cpu_offload_gb=1)
    assert server_args.active_config(arguments) is None
    assert "DynaFlow is NOT active" in warnings[0] and "layer offloading" in warnings[0]


def test_path_name_and_mapping_are_the_same_in_every_process(start, tmp_path):
    import pickle

    from dynaflow_serving.integrations.sglang.server_args import active_config

    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(NANOFLOW))
    configs = []
    for source in (str(file), "nanoflow", NANOFLOW):
        arguments = start(source, {"rope_theta": 1e6})
        assert json.loads(arguments.json_model_override_args) == {"rope_theta": 1e6}  # the model's own are left
        configs.append(active_config(pickle.loads(pickle.dumps(arguments))))
    assert configs[0] == configs[1] == configs[2] and configs[0] is not None


def test_parent_refuses_schedulers_without_dynaflow(start, monkeypatch):
    from dynaflow_serving.integrations.sglang import scheduler

    wait = scheduler._and_look(lambda: [{"dynaflow": "nanoflow"}, {"status": "ready"}])
    monkeypatch.setattr(scheduler, "_parent", start(NANOFLOW))
    with pytest.raises(InactiveError, match=r"scheduler processes \[1\] run without it"):
        wait()
    monkeypatch.setattr(scheduler, "_parent", start(NANOFLOW | {"fallback": True}, cpu_offload_gb=1))
    assert len(wait()) == 2  # a stock engine started later in the same process


def test_command_line(model_path):
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", model_path("llama"), "--device", "cpu"]
    done = subprocess.run([*command, "--dynaflow", "nanoflw"], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("dynaflow: error: ") and "Did you mean 'nanoflow'" in last
    assert "Traceback" not in done.stderr
