"""The benchmark of servers: whole runs with real processes and a fake engine in them."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from dynaflow_serving.bench.engines import ENGINES, Engine
from dynaflow_serving.bench.process import EngineProcessError
from dynaflow_serving.bench.serving.record import LOSS, NOISE, WIN
from dynaflow_serving.bench.serving.server import Server, free_port
from dynaflow_serving.bench.serving.vllm_tool import VLLMTool
from dynaflow_serving.cli import app

# A server that says its requests took 2 ms, 4 ms under DynaFlow, and a load generator that believes it.
FAKE_SERVER = """
import http.server, os, sys
port, dynaflow = int(sys.argv[1]), "--dynaflow" in sys.argv
fault = os.environ.get("FAKE", "")
if fault == "dies":
    sys.exit("ValueError: no such model")
steps = 0

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global steps
        body = ""
        if self.path == "/work":
            steps += 1
            body = "4" if dynaflow else "2"
        elif self.path == "/metrics" and (dynaflow or fault == "not stock"):
            split = 0 if fault == "idle" else steps
            body = f'dynaflow_steps_total{{strategy="comm_overlap",reason=""}} {split}\\n' * bool(split)
            body += f'dynaflow_steps_total{{strategy="none",reason="one request"}} {1 + steps - split}\\n'
            body += "dynaflow_overlap_ratio 0.5\\n"
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass

http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
FAKE_CLIENT = """
import json, os, statistics, sys, urllib.request
port, requests, result = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
fault, times = os.environ.get("FAKE", ""), []
for _ in range(requests):
    times.append(float(urllib.request.urlopen(f"http://127.0.0.1:{port}/work").read()))
failed = {"fails": 1, "all fail": requests}.get(fault, 0)
done = requests - failed
seconds = sum(times) / 1000
unequal = fault == "unequal" and times[0] == 4
figures = dict(completed=requests - failed, duration=seconds, total_input_tokens=10 * requests,
    total_output_tokens=5 * requests - unequal, request_throughput=done / seconds,
    output_throughput=5 * done / seconds, total=15 * done / seconds,
    errors=["Traceback\\nOSError: gone"] * failed + [""] * (requests - failed))
for name in ("ttft", "tpot", "itl", "e2el"):
    value = float("nan") if name == "itl" or not done else statistics.median(times)
    figures |= {f"{how}_{name}_ms": value for how in ("mean", "median", "p99")}
open(result, "w").write(json.dumps(figures))
"""
FAKE_TOOL = """
import json, sys
from pathlib import Path
from dynaflow_serving.bench.serving.tool import read_figures

HERE = Path(__file__).parent

class Tool:
    variables = {"FAKE_VARIABLE": "1"}

    def version(self):
        return "9.9"

    def server(self, settings, port, *, gpu, node=None):
        return [sys.executable, str(HERE / "server.py"), str(port), *(["--dynaflow"] if settings.dynaflow else [])]

    def client(self, job):
        return [sys.executable, str(HERE / "client.py"), str(job.port), str(job.load.requests), str(job.result)]

    def figures(self, content, load):
        return read_figures(json.loads(content), load, total="total", e2e="e2el")
"""


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An engine called `fake` with servers, and a folder that looks like a model."""
    for name, text in (("server", FAKE_SERVER), ("client", FAKE_CLIENT), ("fake_serving", FAKE_TOOL)):
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fake_serving", raising=False)
    monkeypatch.setitem(ENGINES, "fake", Engine("none:None", tool="fake_serving:Tool"))
    monkeypatch.setattr("dynaflow_serving.bench.environment.has_gpu", lambda: False)
    monkeypatch.setattr("dynaflow_serving.bench.serving.run.METRICS_SECONDS", 0.0)
    return tmp_path


def bench(folder: Path, *arguments: str) -> tuple[Result, dict[str, Any], str]:
    """Result, JSON, page."""
    files = folder / "out" / "result.json", folder / "out" / "report.html"
    command = ["bench", "fake", "--model", str(folder), "--html", str(files[1]), "--json", str(files[0]), *arguments]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, command)
    content, page = (path.read_text() if path.exists() else "" for path in files)
    return result, json.loads(content or "{}"), page


def run(folder: Path) -> tuple[Result, dict[str, Any], str]:
    return bench(folder, "--load", "random", "--rate", "4", "--rate", "inf", "--pairs", "2", "--requests", "10")


def test_a_whole_run(engine: Path) -> None:
    result, content, page = run(engine)
    assert result.exit_code == 0, result.output
    assert "random, 4/s: pair 2 of 2: baseline" in result.stderr and "expected to lose" in result.stdout
    assert content["engine_version"] == "9.9" and content["environment"] == {"FAKE_VARIABLE": "1"}
    assert content["failures"] == [] and content["notes"] == []
    assert content["steps"] == {"split": {"comm_overlap": 40}, "unsplit": {}}  # 2 loads x 2 pairs x 10, no warm-up
    assert [sample["name"] for sample in content["policy"]] == ["dynaflow_overlap_ratio"]
    assert "--dynaflow" in content["servers"]["dynaflow"] and "--dynaflow" not in content["servers"]["baseline"]
    assert [load["rate"] for load in content["loads"]] == [4, "inf"]
    order = [(p["load"], p["pair"], p["side"][0]) for p in content["passes"]]
    assert order[:6] == [(0, 0, "d"), (0, 0, "b"), (0, 1, "b"), (0, 1, "d"), (0, 2, "d"), (0, 2, "b")]
    assert len(order) == 12 and all((p["metrics"] == 0) == (p["side"] == "baseline") for p in content["passes"])
    for load in content["loads"]:
        figures = {f["key"]: f for f in load["figures"]}
        assert len(figures) == 15
        for key in ("output_tokens_per_s", "ttft median"):  # twice as slow, whichever way it is measured
            assert figures[key]["gain"] == {"median": 0.5, "min": 0.5, "max": 0.5}
            assert figures[key]["verdict"] == LOSS
        assert figures["itl median"]["gain"] is None and figures["itl median"]["verdict"] == ""
    assert content["verdicts"] == {WIN: 0, LOSS: 8, NOISE: 0}
    for text in ("9.9", "CPU run", "within noise", "not measured", "FAKE_VARIABLE=1", "warm-up, not counted"):
        assert text in page
    assert page.count('class="loss-row"') == 8 and page.count("<svg") == 2


def test_the_page_needs_nothing_but_itself(engine: Path) -> None:
    _, _, page = run(engine)
    assert len(page) < 2_000_000
    names = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # of XML, which nothing fetches
    assert set(re.findall(r"""https?://[^\s"'<)]+""", page)) <= names
    assert not re.search(r"<(script|link|img|iframe)|@import|url\((?!#)", page)


def test_what_is_written_on_the_page_is_escaped(engine: Path) -> None:
    result, content, page = bench(engine, "--load", "random", "--pairs", "2", "--requests", "2", "--dtype", "<b>x</b>")
    assert result.exit_code == 0 and content["config"]["dtype"] == "<b>x</b>"
    assert "<b>x</b>" not in page and "&lt;b&gt;x&lt;/b&gt;" in page


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            "idle",
            "DynaFlow split no step, so the two servers did the same work. Un-split steps: 40 because: one request",
        ),
        ("not stock", "The baseline has metrics of DynaFlow (dynaflow_overlap_ratio, dynaflow_steps_total)"),
        (
            "unequal",
            "The two servers did unequal work (random, 4/s, pair 0): 100 in, 49 out and 100 in, 50 out tokens.",
        ),
        ("all fail", "30 of 30 requests failed against dynaflow (random, all at once). The first error: OSError: gone"),
        ("fails", "3 of 30 requests failed against baseline (random, 4/s). The first error: OSError: gone"),
    ],
)
def test_a_run_that_proves_nothing_fails_with_its_report(
    engine: Path, monkeypatch: pytest.MonkeyPatch, fault: str, message: str
) -> None:
    monkeypatch.setenv("FAKE", fault)
    result, content, page = run(engine)
    assert result.exit_code == 1
    assert message in result.stderr and any(message in failure for failure in content["failures"])
    assert "<b>Failed:</b>" in page
    assert len(content["passes"]) == 12  # nothing is dropped


def test_a_server_that_dies_is_told_with_its_log(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE", "dies")
    result, content, page = run(engine)
    assert result.exit_code == 2 and not content and not page
    assert "the server baseline ended with exit code 1 before it was healthy" in result.stderr
    assert "ValueError: no such model" in result.stderr and "baseline.log" in result.stderr


def test_options_that_do_not_fit(engine: Path) -> None:
    def error(*arguments: str) -> str:
        result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["bench", "fake", "--model", str(engine), *arguments])
        assert result.exit_code == 2
        return result.stderr

    page = ("--html", str(engine / "x.html"))
    rate = ("--rate", "4")
    assert "--pairs must be 2 or more" in error(*rate, "--pairs", "1")
    assert "give one --strategy" in error(*rate, "-s", "comm_overlap", "-s", "nanoflow")
    assert "unknown load 'sharegtp'. Did you mean 'sharegpt'" in error(*page, "--load", "sharegtp")
    assert "inf sends all at once" in error(*page, "--rate", "0") and "more than 0" in error(*page, "--rate", "nan")
    assert "valid: 4 to 512" in error(*page, *rate, "--load", "sharegpt", "--input-len", "600")
    ENGINES["fake"] = Engine("none:None")
    assert "fake has no server that can be benchmarked" in error(*rate)


def test_missing_packages_are_named_before_anything_runs(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynaflow_serving.bench.serving.report.PACKAGES", ("jinja2", "no_such_package"))
    result, _, _ = run(engine)
    assert result.exit_code == 2 and "missing here: no_such_package" in result.stderr
    assert "pip install 'dynaflow-serving[report]'" in result.stderr and "start" not in result.stderr


def test_an_engine_that_is_not_installed_is_told_before_anything_runs(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynaflow_serving.bench.serving.tool.metadata.version", _not_installed)
    monkeypatch.setattr("fake_serving.Tool.version", VLLMTool.version, raising=False)
    result, _, _ = run(engine)
    assert result.exit_code == 2 and "vllm is not installed in the environment of" in result.stderr
    assert "start" not in result.stderr


def _not_installed(package: str) -> str:
    raise PackageNotFoundError(package)


def test_a_terminated_run_leaves_no_server(engine: Path) -> None:
    """SIGTERM, as `timeout` sends it, while both servers are alive."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from dynaflow_serving.bench.engines import ENGINES, Engine\n"
        "ENGINES['fake'] = Engine('none:None', tool='fake_serving:Tool')\n"
        "from dynaflow_serving.cli import app\n"
        "where = ['--model', sys.argv[1], '--html', sys.argv[1] + '/x.html']\n"
        "app(['bench', 'fake', *where, '--load', 'random', '--requests', '100000'])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(engine)],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "warm-up" in line:
            break
    assert _alive(engine) >= 2
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    process.stderr.close()
    assert _alive(engine) == 0


def _alive(folder: Path) -> int:
    """Servers and load generators of this test."""
    names = (str(folder / "server.py"), str(folder / "client.py"))
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_text())
        except OSError:  # it has ended
            continue
    return sum(any(name in line for name in names) for line in lines)


def test_a_server_that_is_not_healthy_in_time(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; print('hm', flush=True); time.sleep(60)"]
    server = Server("stock", command, free_port(), {}, tmp_path / "stock.log")
    begin = time.monotonic()
    try:
        with pytest.raises(EngineProcessError, match=r"the server stock was not healthy within 3 s(.|\n)*hm"):
            server.wait(3)
    finally:
        server.stop()
    assert time.monotonic() - begin < 30
