"""What the tests of several engines share."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# Harnesses that several folders of tests share are imported by their bare names, in processes that tests start too.
sys.path.append(str(Path(__file__).with_name("shared")))

# A failure can be repeated, and a busy machine causes none.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items):
    """A test whose engine has several ranks has the machine for itself."""
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if max(parameters.get("tp", 1), parameters.get("ranks", 1)) > 1:
            item.add_marker("alone")


@pytest.fixture(scope="session")
def model_path():
    """`model_path(kind)`: a tiny model made locally."""
    from dynaflow_serving.bench.tiny_models import make_tiny_model

    return lambda kind: str(make_tiny_model(kind))


@pytest.fixture(scope="session")
def prompts():
    """Token ids of 12 mixed lengths; every third request shares a long prefix with the first."""
    draw = random.Random(0)
    shared = [draw.randrange(10, 2000) for _ in range(48)]
    return [
        (shared if i % 3 == 0 else []) + [draw.randrange(10, 2000) for _ in range(draw.choice([3, 9, 17, 33, 70]))]
        for i in range(12)
    ]


@pytest.fixture
def two_servers(model_path, tmp_path):
    """`two_servers(engine, load, least_tokens, **environment) -> (result, page)` of `dynaflow bench ENGINE --html`, as
    a user runs it; what holds for every engine is asserted. least_tokens: of one answer."""

    def run(engine, load, least_tokens, **environment):
        files = tmp_path / "report.html", tmp_path / "report.json"
        dynaflow = Path(sys.executable).with_name("dynaflow")
        command = [str(dynaflow), "bench", engine, "--model", model_path("llama"), "--load", load, "--rate", "inf"]
        command += ["--pairs", "2", "--requests", "8", "--input-len", "32", "--output-len", "16"]
        command += ["--html", str(files[0]), "--json", str(files[1])]
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        result, page = json.loads(files[1].read_text()), files[0].read_text()
        assert result["failures"] == [] and len(result["passes"]) == 6
        assert result["steps"]["split"]["nanoflow"] > 0
        for one in result["passes"]:
            assert (one["figures"]["completed"], one["figures"]["failed"]) == (8, 0)
            assert one["figures"]["output_tokens"] >= 8 * least_tokens
            if one["side"] == "baseline":
                assert one["metrics"] == 0  # the stock engine
            else:
                assert one["steps"]["split"]["nanoflow"] > 0
        (measured,) = result["loads"]
        assert all(figure["gain"]["min"] > 0 for figure in measured["figures"])  # all were measured, ITL too
        assert '"dynaflow"' not in result["servers"]["baseline"]
        return result, page

    return run
