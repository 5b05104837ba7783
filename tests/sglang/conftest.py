"""Real SGLang on CPU with plain PyTorch kernels (`cpu_support`).

Most tests drive a ModelRunner in this process (`one_process.py`); those that need the scheduler run an Engine or a
server in a process of its own, for an Engine takes over its process's signals.
"""

import importlib.util
import os
from functools import partial
from pathlib import Path

import pytest

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def _load(name):
    spec = importlib.util.spec_from_file_location(f"sglang_tests_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def one_process():
    return _load("one_process")


@pytest.fixture
def serve(tmp_path):
    return partial(_load("server").serve, tmp_path / "server.log")


@pytest.fixture(scope="session")
def loaded(one_process, model_path):
    """`loaded(kind)`: a stock ModelRunner. One lives at a time; another kind takes a second to load."""
    live = {}

    def load(kind):
        if kind not in live:
            if live:
                live.clear()
                one_process.unload()
            live[kind] = one_process.load(model_path(kind))
        return live[kind]

    return load


@pytest.fixture
def runner(request, loaded):
    """A stock ModelRunner; `one_process.dynaflow(runner, config)` puts it under DynaFlow for a while."""
    return loaded(getattr(request, "param", "llama"))


@pytest.fixture
def stock(one_process, runner, prompts):
    """Greedy tokens of the stock runner."""
    return one_process.generate(runner, prompts, 12)[0].tolist()
