"""What an engine's process that does not ask for DynaFlow imports of it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

# The start of each script.
PROLOGUE = """
import json, sys

def ours():
    return {name for name in sys.modules if name.partition(".")[0] in ("dynaflow_serving", "rich", "yaml")}

def report(attached, before):
    print(json.dumps({"attached": attached, "imported": sorted(ours() - before)}))
"""


def check_imports_the_entry_point_only(engine: str, script: str, model: str, folder: Path) -> None:
    """Run `script` in a fresh process: the flag is there, and nothing but the plugin of `engine` was imported.

    Args:
        engine: The name of the integration.
        script: It calls `ours`, loads the engine's plugins, and then calls `report`; `sys.argv[1]` is the model.
        model: The model's path.
        folder: The process runs here. In the repository's root, transformers would take the folder `kernels` for the
            package of that name.
    """
    command = [sys.executable, "-c", PROLOGUE + script, model]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["attached"]
    package = "dynaflow_serving.integrations"
    assert found["imported"] == [
        "dynaflow_serving",
        "dynaflow_serving.errors",
        package,
        f"{package}.base",
        f"{package}.{engine}",
        f"{package}.{engine}.plugin",
    ]
