"""A vLLM process that does not ask for DynaFlow imports next to nothing of it."""

import json
import subprocess
import sys

SCRIPT = """
import json, sys
from vllm import EngineArgs
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser

def ours():
    return {name for name in sys.modules if name.partition(".")[0] in ("dynaflow_serving", "rich", "yaml")}

before = ours()
load_general_plugins()
parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
arguments = parser.parse_args(["--model", sys.argv[1], "--max-model-len", "512"])
attached = hasattr(arguments, "dynaflow")
EngineArgs.from_cli_args(arguments).create_engine_config()
print(json.dumps({"attached": attached, "imported": sorted(ours() - before)}))
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
        f"{package}.vllm",
        f"{package}.vllm.plugin",
    ]
