"""Every module imports only lower layers: the run-time twin of the import contract in pyproject.toml."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("import_layers.py")
CONTRACT = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
# From the bottom up; names of one layer do not import each other, and one in parentheses need not be there.
LAYERS = [
    [name for name in row.strip("()").split(" | ") if row[0] != "(" or find_spec(f"dynaflow_serving.{name}")]
    for row in reversed(CONTRACT["layers"])
]
NAMES = [name for layer in LAYERS for name in layer]
PRELOADED = ["greenlet", "prometheus_client", "pydantic", "rich", "torch", "torch._dynamo", "typer", "yaml"]
Report = dict[str, Any]


def import_layers(package: str, layers: Any, preload: list[str], **environment: str) -> dict[str, Report]:
    """What `import_layers.py` finds in an interpreter of its own."""
    given = {"package": package, "layers": layers, "preload": preload, "watched": ["pydantic", "torch"]}
    command = [sys.executable, str(SCRIPT)]
    environment = {**os.environ, **environment}
    done = subprocess.run(command, input=json.dumps(given), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Report] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, Report]:
    return import_layers("dynaflow_serving", LAYERS, PRELOADED)


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_imports_only_lower_ones(name: str, found: dict[str, Report], report: Callable[[str], None]) -> None:
    assert found[name]["upward"] == {}
    for module, reason in found[name]["skipped"].items():
        assert name in ("kernels", "integrations"), f"{module} {reason}"
        report(f"not imported by the test of layers: {module} {reason}")


def test_every_module_has_a_layer() -> None:
    inside = [ROOT / "dynaflow_serving", ROOT]
    folders = {path.parent.name for folder in inside for path in folder.glob("*/__init__.py")}
    modules = {path.stem for path in inside[0].glob("*.py")}
    assert (folders | modules) - {"__init__", "dynaflow_serving", "benchmarks"} == set(NAMES)


def test_core_needs_neither_torch_nor_pydantic() -> None:
    lowest = import_layers("dynaflow_serving", LAYERS[:2], [])
    assert lowest.keys() == {"errors", "files", "core"}
    assert all(each["upward"] == {} and each["loaded"] == [] for each in lowest.values())


def test_upward_imports_are_found(tmp_path: Path) -> None:
    """Also those of a peer, those in a deeper module, and those whose error is caught."""
    modules = {
        "__init__": "raise AssertionError('it stands above all layers')",
        "low": "import json",
        "peer": "import house.low",
        "peer2": "from house import peer",
        "middle/__init__": "from house import low",
        "middle/inner/__init__": "",
        "middle/inner/deep": "from house.top import anything",
        "middle/careful": "try:\n    import house.top\nexcept ImportError:\n    pass",
        "middle/engine": "import sglang.not_there",
        "top": "import house.middle.inner, house.peer",
    }
    for name, text in modules.items():
        file = tmp_path / "house" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    layers = [["low"], ["peer", "peer2"], ["middle"], ["top"]]
    found = import_layers("house", layers, [], PYTHONPATH=str(tmp_path))
    assert {name: each["upward"] for name, each in found.items()} == {
        "low": {},
        "peer": {},
        "peer2": {"house.peer2": ["house.peer"]},
        "middle": {"house.middle.careful": ["house.top"], "house.middle.inner.deep": ["house.top"]},
        "top": {},
    }
    assert found["middle"]["skipped"] == {"house.middle.engine": "needs sglang, which is not installed"}
