"""Model Runner V2 with Triton's kernels interpreted on the CPU."""

from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Model Runner V2 needs Triton: nox -s vllm_v2")

NANOFLOW = {"strategy": "nanoflow", "options": {"min_tokens": 1}}


@pytest.mark.parametrize("mode", ["mode2-uncompiled", "mode3"])
def test_tokens_equal_stock(generate, mode):
    stock = generate("llama", mode)
    ours = generate("llama", mode, dynaflow=NANOFLOW)
    assert ours.tokens == stock.tokens
    assert ours.split > 0
    print(ours.reports[0]["mode"], ours.reports[0]["steps"])
