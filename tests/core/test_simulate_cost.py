"""The simulator: costs of kernels and collectives, worked out by hand and bounded at random."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulate_support import place

from dynaflow_serving.core.batch import Batch
from dynaflow_serving.errors import ConfigError
from dynaflow_serving.simulate import (
    Device,
    Link,
    Topology,
    find,
)
from dynaflow_serving.simulate.collectives import KINDS, transfer
from dynaflow_serving.simulate.kernel_models import Attention, Collective, Gemm, Streaming, Workload, workloads


def test_collectives_by_hand() -> None:
    link = Link(name="l", gb_s=1, latency_us=1, efficiency=1)
    direct = link.model_copy(update={"direct": True})
    base = {"device": find(Device, "h100"), "network": link, "per_node": 8}
    ring, switched = Topology(link=link, **base), Topology(link=direct, **base)
    assert transfer("all_reduce", 1e9, 1, ring) == (0, 0)
    assert transfer("all_reduce", 1e9, 4, ring) == pytest.approx((6e-6, 1.5))  # ring
    assert transfer("all_reduce", 10, 8, ring) == pytest.approx((6e-6, 20e-9))  # tree
    assert transfer("all_reduce", 10, 4, switched) == pytest.approx((1e-6, 30e-9))  # one-shot
    assert transfer("all_reduce", 1e9, 4, switched) == pytest.approx((2e-6, 1.5))  # two-shot
    assert transfer("all_gather", 1e9, 4, ring) == pytest.approx((3e-6, 0.75))
    assert transfer("all_to_all", 1e9, 4, ring) == pytest.approx((1e-6, 0.75))
    assert transfer("all_to_all", 1e9, 16, ring) == pytest.approx((1e-6, 0.5))  # half of it leaves the node
    with pytest.raises(ConfigError, match="Did you mean 'all_reduce'"):
        transfer("allreduce", 1, 2, ring)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS), size=st.floats(1, 1e10), nodes=st.integers(1, 512), faster=st.floats(1, 100),
    which=st.sampled_from(("link", "network")),
)  # fmt: skip
def test_a_faster_link_never_slows_a_collective(kind: str, size: float, nodes: int, faster: float, which: str) -> None:
    slow = place()
    link = getattr(slow, which)
    fast = slow.model_copy(update={which: link.model_copy(update={"gb_s": link.gb_s * faster})})
    assert sum(transfer(kind, size, 8 * nodes, fast)) <= sum(transfer(kind, size, 8 * nodes, slow)) * (1 + 1e-9)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    requests=st.lists(st.tuples(st.integers(1, 4096), st.integers(0, 8192)), min_size=1, max_size=8),
    faster=st.floats(1, 10),
    field=st.sampled_from(("tflops", "memory_gb_s", "compute_efficiency", "memory_efficiency")),
)  # fmt: skip
def test_a_better_device_never_slows_a_kernel(requests: list[tuple[int, int]], faster: float, field: str) -> None:
    slow, load = place(tp=4), Workload(tuple(requests))
    better = min(1.0, getattr(slow.device, field) * faster) if "eff" in field else getattr(slow.device, field) * faster
    fast = slow.model_copy(update={"device": slow.device.model_copy(update={field: better})})
    for kernel in (
        Gemm(4096, 6144), Gemm(4096, 2816, 0.75, 64), Streaming(8192), Attention(8, 256, 256, 256),
        Collective("all_reduce", 4096, 4),
    ):  # fmt: skip
        before, after = kernel.use(load, slow), kernel.use(load, fast)
        assert after.seconds + after.latency <= (before.seconds + before.latency) * (1 + 1e-9)
        for use in (before, after):
            assert max(use.compute, use.memory, use.network) <= use.seconds * (1 + 1e-9)


def test_roofline_regimes() -> None:
    where = place()
    device = where.device
    large = Gemm(8192, 8192).use(Workload(((16384, 0),)), where)
    assert large.seconds == pytest.approx(2 * 16384 * 8192**2 / device.flops, rel=0.05)  # full waves
    small = Gemm(8192, 8192).use(Workload(((1, 0),)), where)
    assert small.seconds == pytest.approx(2 * 8192**2 / device.bandwidth, rel=0.01)  # the weight is read once
    full, spill = (Gemm(4096, 256 * 33).use(Workload(((rows, 0),)), where) for rows in (512, 513))
    assert spill.seconds > 1.2 * full.seconds  # one row more, another wave
    decode = Attention(32, 256, 256, 2048).use(Workload(((1, 8192),) * 64), where)
    assert decode.memory == decode.seconds > decode.compute
    prefill = Attention(32, 256, 256, 2048).use(Workload(((8192, 0),)), where)
    assert prefill.compute == prefill.seconds > prefill.memory
    few, many = (Gemm(2048, 1408, 0.75, 64).use(Workload(((n, 0),)), where) for n in (1, 4096))
    assert few.seconds < many.seconds / 10  # few experts are chosen, few weights read


def test_loads_of_a_request_that_straddles() -> None:
    batch = Batch((4, 1), (10, 20))
    assert workloads(batch, (0, 3, 5)) == (Workload(((3, 10),)), Workload(((1, 13), (1, 20))))
    assert workloads(Batch((2, 2)), (0, 4)) == (Workload(((2, 0), (2, 0))),)
