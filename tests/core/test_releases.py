"""`dynaflow doctor --release`: what an integration touches, in the sources of two releases."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dynaflow_serving.cli import app
from dynaflow_serving.errors import DynaflowError
from dynaflow_serving.integrations import INTEGRATIONS, VLLM
from dynaflow_serving.integrations.base import Integration
from dynaflow_serving.releases import sources
from dynaflow_serving.releases.patches import Verdict, compare, symbols
from dynaflow_serving.releases.sources import Sources

OLD = {
    "runner.py": "class Base:\n    def load(self, a): ...\n\nclass Runner(Base):\n    limit: int = 3\n"
    "    def step(self, batch):\n        self.last = batch\n    def old(self): ...\n",
    "parallel/state.py": "current = None\ndef gather(x, dim=0): ...\ndef scatter(x): ...\n",
    "other/runner.py": "class Runner:\n    def step(self): ...\n",
}
NEW = {
    "runner.py": "class Base:\n    def load(self, a): ...\n\n"
    "if True:\n    class Runner(Base):\n        limit: int = 4\n"
    "        def step(self, batch, *, dry=False):\n            self.last = batch\n",
    "parallel/state.py": "current = None\ndef gather(x, dim=0): ...\n",
    "parallel/moved.py": "def scatter(x): ...\n",
    "other/runner.py": "class Runner:\n    def step(self): ...\n",
    "broken.py": "class Runner(:\n",
}
NAMES = [
    "Runner.step",
    "Runner.old",
    "Runner.load",
    "Runner.last",
    "Runner.limit",
    "state.current",
    "gather",
    "state.scatter",
    "scatter",
    "Missing",
]


def folder(path: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = path / "engine" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return path


def wheel(path: Path, files: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in {**files, "../engine_tools/x.py": "def gone(): ..."}.items():
            archive.writestr(f"engine/{name}", text)
    return path


def test_equal_changed_moved_gone_and_unchecked(tmp_path: Path) -> None:
    tested = Sources("old", folder(tmp_path, OLD) / "engine", "engine")
    other = Sources("new", wheel(tmp_path / "new.whl", NEW), "engine")
    found = {f.symbol: f for f in compare(NAMES, tested, other)}
    assert {name: finding.verdict for name, finding in found.items()} == {
        "Runner.step": Verdict.CHANGED,
        "Runner.old": Verdict.GONE,
        "Runner.load": Verdict.EQUAL,  # inherited
        "Runner.last": Verdict.EQUAL,  # set by a method
        "Runner.limit": Verdict.EQUAL,  # values are not compared
        "state.current": Verdict.EQUAL,
        "gather": Verdict.EQUAL,
        "state.scatter": Verdict.GONE,
        "scatter": Verdict.EQUAL,  # moved
        "Missing": Verdict.UNCHECKED,
    }
    assert found["Runner.step"].differences == ("runner.py: now with *, dry=False",)  # of two classes, the one


def test_rows_name_symbols() -> None:
    names = symbols(VLLM)
    assert {"EngineArgs.from_cli_args", "KVCacheConfig.kv_cache_groups", "ModelState.prepare_attn"} <= set(names)
    for integration in INTEGRATIONS.values():
        assert symbols(integration), integration.name


def doctor(*words: str) -> tuple[int, str, str]:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["doctor", "--release", *words])
    return result.exit_code, result.stdout, result.stderr


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Integration("vllm", "engine", "engine", ("1.0",))
    monkeypatch.setitem(INTEGRATIONS, "vllm", engine)
    tested = Sources("engine 1.0", folder(tmp_path, OLD) / "engine", "engine")
    monkeypatch.setattr(sources, "installed", lambda integration: tested)
    monkeypatch.setattr("dynaflow_serving.releases.patches.symbols", lambda integration: NAMES)
    code, stdout, stderr = doctor(f"vllm={wheel(tmp_path / 'new.whl', NEW)}")
    assert code == 1 and "engine 1.0, which was tested" in stderr
    assert "6 equal, 1 changed, 2 gone, 1 not checked" in stdout and "dry=False" in stdout and "Missing" in stdout
    assert doctor(f"vllm={tmp_path}")[0] == 0  # the same release


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("vlm==1.0", "unknown system 'vlm'. Did you mean 'vllm'"),
        ("vllm=", "say vllm==VERSION, vllm=PATH, or vllm for its newest"),
        ("vllm==", "say vllm==VERSION, vllm=PATH, or vllm for its newest"),
        ("vllm=/nowhere", "/nowhere is neither a wheel nor a folder with the package vllm"),
    ],
)
def test_a_wrong_release(words: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "installed", lambda integration: Sources("it", Path(), "vllm"))
    code, _, stderr = doctor(words)
    assert code == 2 and message in stderr


def test_a_version_that_pip_does_not_find(tmp_path: Path) -> None:
    nothing = Integration("nothing", "dynaflow-no-such-package", "nothing", ("1",))
    with pytest.raises(DynaflowError, match="pip cannot fetch dynaflow-no-such-package==1"):
        sources.downloaded(nothing, "1", tmp_path)
