"""The registry of kernels: names, constants, and triton only where it is used."""

from __future__ import annotations

import inspect

import pytest
from kernel_support import run_python

from dynaflow_serving import kernels
from dynaflow_serving.errors import ScheduleError
from dynaflow_serving.kernels import KERNELS, SHIPPED, get_kernel, kernel_names, register_kernel


@pytest.mark.parametrize("name", SHIPPED)
def test_a_kernel_and_its_reference_are_called_alike(name: str) -> None:
    pytest.importorskip("triton", reason="needs triton, which is not installed")
    get_kernel(name)
    assert inspect.signature(KERNELS[name].function) == inspect.signature(KERNELS[name].reference)


def test_an_unknown_name_lists_what_is_valid() -> None:
    with pytest.raises(ScheduleError, match=r"'silu_mull'. Did you mean 'silu_mul'\? Valid: add_rms_norm"):
        get_kernel("silu_mull")


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> str:
    """A kernel of this test's own, called `test.scale`."""
    monkeypatch.setattr(kernels, "KERNELS", dict(KERNELS))

    def function(x: float, *, factor: float = 1.0) -> float:
        return x * factor

    register_kernel("test.scale", function)(function)
    return "test.scale"


def test_two_kernels_cannot_have_one_name(scale: str) -> None:
    with pytest.raises(ScheduleError, match=r"'test.scale' is registered already"):
        register_kernel(scale, print)(print)
    assert scale in kernel_names()


def test_constants_are_fixed_and_named(scale: str) -> None:
    double = get_kernel(scale, factor=2.0)
    assert double(21.0) == 42.0
    assert double(7, 21.0, 7) == 42.0  # sizes among the inputs are left out
    assert double.__name__ == "test.scale[factor=2.0]"
    assert get_kernel(scale, factor=2.0) is double
    assert get_kernel(scale, factor=3.0) is not double
    with pytest.raises(ScheduleError, match="must be one word"):
        get_kernel(scale, factor="two words")


def test_triton_is_imported_only_when_a_kernel_is_asked_for() -> None:
    code = "import sys; from dynaflow_serving import kernels; kernels.kernel_names(); print('triton' in sys.modules)"
    assert run_python(code).strip() == "False"


def test_a_missing_triton_is_named_with_the_remedy() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from dynaflow_serving.kernels import get_kernel\n"
        "from dynaflow_serving.errors import ScheduleError\n"
        "try: get_kernel('silu_mul')\n"
        "except ScheduleError as e: print(e)"
    )
    shown = run_python(code)
    assert "'silu_mul' needs triton, which is not installed: pip install 'dynaflow-serving[kernels]'" in shown


def test_cpu_tensors_without_the_interpreter_are_refused() -> None:
    pytest.importorskip("triton", reason="needs triton, which is not installed")
    code = (
        "import torch\n"
        "from dynaflow_serving.kernels import get_kernel\n"
        "from dynaflow_serving.errors import ScheduleError\n"
        "try: get_kernel('silu_mul')(torch.zeros(2, 8), torch.zeros(2, 8))\n"
        "except ScheduleError as e: print(e)"
    )
    assert "set TRITON_INTERPRET=1 before triton is imported" in run_python(code)
