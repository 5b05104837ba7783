"""What is imported where DynaFlow is not asked for: nothing heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

import dynaflow_serving

HEAVY = ("torch", "pydantic", "rich", "yaml", "prometheus_client", "vllm", "sglang", "transformers", "greenlet")


def imported_by(statement: str) -> set[str]:
    """The modules of a fresh interpreter after `statement`."""
    script = f"import sys; {statement}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_the_entry_point_of_an_engine_imports_nothing_heavy(engine: str) -> None:
    found = imported_by(f"import dynaflow_serving.integrations.{engine}.plugin")
    assert not found.intersection(HEAVY)
    ours = {name for name in found if name.startswith("dynaflow_serving")}
    assert ours == {
        "dynaflow_serving",
        "dynaflow_serving.errors",
        "dynaflow_serving.integrations",
        "dynaflow_serving.integrations.base",
        f"dynaflow_serving.integrations.{engine}",
        f"dynaflow_serving.integrations.{engine}.plugin",
    }


def test_the_package_imports_nothing_until_a_name_is_used() -> None:
    assert not imported_by("import dynaflow_serving").intersection(HEAVY)
    assert "torch" in imported_by("import dynaflow_serving; dynaflow_serving.compile")
    assert "torch" not in imported_by("from dynaflow_serving import Batch, DynaflowError, Plan")


def test_every_public_name_is_there() -> None:
    for name in dynaflow_serving.__all__:
        public = getattr(dynaflow_serving, name)
        assert (
            public == name.lower() if name.isupper() else public.__name__ == name
        )  # a constant, or a class or function
    assert dynaflow_serving.__version__ and set(dynaflow_serving.__all__) < set(dir(dynaflow_serving))
    assert set(dynaflow_serving.__all__) == set(dynaflow_serving._MODULE_OF)
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        dynaflow_serving.no_such_name  # noqa: B018
