"""`dynaflow bench sglang --html`: two real servers under `sglang.bench_serving`, as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

DYNAFLOW = Path(sys.executable).with_name("dynaflow")


@pytest.mark.timeout(900)
def test_two_servers_and_a_report(model_path, tmp_path):
    files = tmp_path / "report.html", tmp_path / "report.json"
    shape = ["--load", "sharegpt", "--rate", "inf", "--pairs", "2", "--requests", "8"]
    shape += ["--input-len", "32", "--output-len", "16"]
    command = [str(DYNAFLOW), "bench", "sglang", "--model", model_path("llama"), *shape]
    command += ["--html", str(files[0]), "--json", str(files[1])]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    result, page = json.loads(files[1].read_text()), files[0].read_text()
    assert result["failures"] == [] and len(result["passes"]) == 6
    assert result["steps"]["split"]["nanoflow"] > 0
    for one in result["passes"]:
        assert (one["figures"]["completed"], one["figures"]["failed"]) == (8, 0)
        assert one["figures"]["output_tokens"] >= 8 * 4
        if one["side"] == "baseline":
            assert one["metrics"] == 0  # the stock engine
        else:
            assert one["steps"]["split"]["nanoflow"] > 0
    (load,) = result["loads"]
    assert all(figure["gain"]["min"] > 0 for figure in load["figures"])  # all were measured, ITL too
    assert "sglang.bench_serving" in load["client"] and "sglang.bench_serving" in page
    assert (
        "json-model-override-args" in result["servers"]["dynaflow"]
        and '"dynaflow"' not in result["servers"]["baseline"]
    )
