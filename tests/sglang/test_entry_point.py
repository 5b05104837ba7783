"""An SGLang process that does not ask for DynaFlow imports next to nothing of it."""

import json
import subprocess
import sys

SCRIPT = """
import argparse, json, sys
import sglang.srt.runtime_context
from sglang.srt.server_args import ServerArgs
from sglang.srt.plugins import load_plugins

def ours():
    return {name for name in sys.modules if name.partition(".")[0] in ("dynaflow_serving", "rich", "yaml")}

before = ours()
load_plugins()
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
arguments = parser.parse_args(["--model-path", sys.argv[1], "--device", "cpu"])
ServerArgs.from_cli_args(arguments).resolve_once()
print(json.dumps({"attached": hasattr(arguments, "dynaflow"), "imported": sorted(ours() - before)}))
"""


def test_a_stock_process_imports_the_entry_point_only(model_path, tmp_path):
    command = [sys.executable, "-c", SCRIPT, model_path("llama")]
    # Not in the repository's root, where transformers takes the folder `kernels` for the package of that name.
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["attached"]
    package = "dynaflow_serving.integrations"
    assert found["imported"] == [
        "dynaflow_serving",
        "dynaflow_serving.errors",
        package,
        f"{package}.base",
        f"{package}.sglang",
        f"{package}.sglang.plugin",
    ]
