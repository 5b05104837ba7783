"""`dynaflow bench sglang --rate`: two real servers under `sglang.bench_serving`."""

import pytest


@pytest.mark.timeout(900)
def test_two_servers_and_a_report(two_servers):
    result, page = two_servers("sglang", "sharegpt", least_tokens=4)
    assert "sglang.bench_serving" in result["loads"][0]["client"] and "sglang.bench_serving" in page
    assert "json-model-override-args" in result["servers"]["dynaflow"]


@pytest.mark.long  # two nodes are tested with vLLM
@pytest.mark.alone
@pytest.mark.timeout(900)
def test_two_emulated_nodes(two_nodes):
    assert two_nodes("sglang")["config"]["ranks"] == 2
