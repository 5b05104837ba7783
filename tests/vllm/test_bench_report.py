"""`dynaflow bench vllm --rate`: two real servers under `vllm bench serve`."""

import pytest


@pytest.mark.long  # two servers are tested with SGLang
@pytest.mark.timeout(900)
def test_two_servers_and_a_report(two_servers):
    result, page = two_servers("vllm", "random", least_tokens=8, TEST_MODE3="")
    assert "vllm bench serve" in result["loads"][0]["client"] and "vllm bench serve" in page
    assert "additional-config" in result["servers"]["dynaflow"]


@pytest.mark.alone
@pytest.mark.timeout(900)
def test_two_emulated_nodes(two_nodes):
    assert two_nodes("vllm")["config"]["ranks"] == 2
