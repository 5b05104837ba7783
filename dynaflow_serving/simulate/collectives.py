"""The seconds of a collective: the standard latency-bandwidth formulas, with the fastest algorithm of the link.

Contract
- With n ranks, S bytes, a hop of a seconds and B bytes a second (Thakur, Rabenseifner, Gropp 2005; NCCL's trees):
    all_reduce                 ring 2(n-1) a + 2(n-1)/n S/B    tree 2 log2(n) a + 2 S/B
      on direct links too      one-shot a + (n-1) S/B          two-shot 2a + 2(n-1)/n S/B
    all_gather, reduce_scatter ring (n-1) a + (n-1)/n S/B      direct a + (n-1)/n S/B
    all_to_all                 a + (n-1)/n S/B
- A group over several nodes goes level by level: in the node, between nodes on 1/node of the bytes, in the node. An
  all_to_all uses both links at a time.
"""

from __future__ import annotations

import math

from dynaflow_serving.errors import ConfigError, unknown_name
from dynaflow_serving.simulate.device import Link, Topology

KINDS = ("all_gather", "all_reduce", "all_to_all", "reduce_scatter")
Seconds = tuple[float, float]  # (latency, transfer)


def transfer(kind: str, size: float, ranks: int, topology: Topology) -> Seconds:
    """Return the latency and the transfer of a collective over adjacent ranks.

    Args:
        kind: A name in `KINDS`.
        size: Bytes of the full tensor; for all_to_all those that a rank sends.
        ranks: The number of ranks.
        topology: Their links.

    Raises:
        ConfigError: The kind is unknown.
    """
    if kind not in KINDS:
        raise ConfigError(unknown_name("collective", kind, KINDS))
    inside = min(ranks, topology.per_node)
    nodes = ranks // inside
    if nodes == 1:
        return flat(kind, size, ranks, topology.link)
    if kind == "all_to_all":
        near = flat(kind, size / nodes, inside, topology.link)
        far = topology.network.latency_us * 1e-6, (1 - 1 / nodes) * size / topology.network.bandwidth
        return max(near[0], far[0]), max(near[1], far[1])
    between = flat(kind, size / inside, nodes, topology.network)
    within = ["reduce_scatter", "all_gather"] if kind == "all_reduce" else [kind]
    levels = [between, *(flat(k, size, inside, topology.link) for k in within)]
    return sum(latency for latency, _ in levels), sum(seconds for _, seconds in levels)


def flat(kind: str, size: float, n: int, link: Link) -> Seconds:
    """Return the latency and the transfer of a collective over `n` ranks that one kind of link joins."""
    if n == 1:
        return 0.0, 0.0
    a, full = link.latency_us * 1e-6, size / link.bandwidth
    part = (n - 1) / n * full
    if kind == "all_to_all":
        options = [(a, part)]
    elif kind == "all_reduce":
        options = [(2 * (n - 1) * a, 2 * part), (2 * math.ceil(math.log2(n)) * a, 2 * full)]
        options += [(a, (n - 1) * full), (2 * a, 2 * part)] if link.direct else []
    else:
        options = [(a if link.direct else (n - 1) * a, part)]
    return min(options, key=sum)
