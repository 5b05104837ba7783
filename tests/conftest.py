"""What the tests of several engines share."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import settings

# Harnesses that several folders of tests share are imported by their bare names, in processes that tests start too.
sys.path.append(str(Path(__file__).with_name("shared")))

# A failure can be repeated, and a busy machine causes none.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items):
    """A test whose engine has several ranks has the machine for itself; a long one runs only if it is asked for."""
    long = pytest.mark.skip(reason="takes minutes; LONG=1 runs it, as CI does every night")
    for item in items:
        if item.get_closest_marker("long") and not os.environ.get("LONG"):
            item.add_marker(long)
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
    """`two_servers(engine, load, least_tokens, **environment) -> (result, page)` of `dynaflow bench ENGINE --rate`, as
    a user runs it; what holds for every engine is asserted. least_tokens: of one answer."""

    def run(engine, load, least_tokens, **environment):
        files = tmp_path / "report.html", tmp_path / "report.json"
        dynaflow = Path(sys.executable).with_name("dynaflow")
        command = [str(dynaflow), "bench", engine, "--model", model_path("llama"), "--load", load, "--rate", "inf"]
        command += ["--pairs", "2", "--requests", "8", "--input-len", "32", "--output-len", "16"]
        command += ["-o", "min_tokens=1", "--html", str(files[0]), "--json", str(files[1])]
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        result, page = json.loads(files[1].read_text()), files[0].read_text()
        assert result["failures"] == [] and len(result["passes"]) == 6
        assert result["steps"]["split"]["comm_overlap"] > 0
        for one in result["passes"]:
            assert (one["figures"]["completed"], one["figures"]["failed"]) == (8, 0)
            assert one["figures"]["output_tokens"] >= 8 * least_tokens
            if one["side"] == "baseline":
                assert one["metrics"] == 0  # the stock engine
            else:
                assert one["steps"]["split"]["comm_overlap"] > 0
        (measured,) = result["loads"]
        assert all(figure["gain"]["min"] > 0 for figure in measured["figures"])  # all were measured, ITL too
        assert '"dynaflow"' not in result["servers"]["baseline"]
        return result, page

    return run


@pytest.fixture
def two_nodes(model_path, tmp_path):
    """`two_nodes(engine) -> result` of `dynaflow bench ENGINE --link`, as a user runs it; what holds for every engine
    is asserted."""
    from links import why_no_link

    if reason := why_no_link():
        pytest.skip(reason)

    def run(engine):
        file = tmp_path / "result.json"
        dynaflow = Path(sys.executable).with_name("dynaflow")
        command = [str(dynaflow), "bench", engine, "--model", model_path("llama"), "--link", "50", "--pairs", "1"]
        command += [
            "-s",
            "sequential",
            "-n",
            "2",
            "--requests",
            "12",
            "--input-len",
            "64",
            "--output-len",
            "4",
            "--json",
            str(file),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        result = json.loads(file.read_text())
        (part,) = result["parts"]
        stock, sequential = part["rows"]  # a server on two nodes takes a minute; nox -s transformers has comm_overlap
        assert [row["strategy"] for row in part["rows"]] == ["stock", "sequential"]
        assert all(row["equal"] for row in part["rows"])  # the generated texts
        assert stock["split_steps"] == 0 and sequential["split_steps"] > 0
        # Prompts of 12 x 64 tokens, 256 floats each, all-reduced twice in each of two layers, at 50 Mbit/s.
        assert part["limit"]["network"] > 0.4 and stock["seconds"]["min"] > 0.4
        assert 0 < part["limit"]["compute"] < stock["seconds"]["min"]
        return result

    return run


COUNT = "count"


@pytest.fixture
def report(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Call it with lines for the end of the run: counts that a person should see."""
    return partial(record_property, COUNT)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    # Properties of a test's report, because with `-n` the test ran in another process.
    calls = [r for results in terminalreporter.stats.values() for r in results if getattr(r, "when", "") == "call"]
    if lines := [text for call in calls for name, text in call.user_properties if name == COUNT]:
        terminalreporter.section("counts")
        for line in lines:
            terminalreporter.line(line)
