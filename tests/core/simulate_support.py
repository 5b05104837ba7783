"""What the tests of the simulator share."""

from __future__ import annotations

from dynaflow_serving.simulate import (
    Device,
    Link,
    Shape,
    Topology,
    compare,
    find,
    parse_requests,
)
from dynaflow_serving.simulate.engine import Simulation
from dynaflow_serving.strategies import get_strategy


def place(device: str = "h100", link: str = "nvlink4", **sizes: int | float) -> Topology:
    return Topology(device=find(Device, device), link=find(Link, link), network=find(Link, "eth400"), **sizes)


def timeline_of(model: str, where: Topology, strategy: str, requests: str, **options: object) -> Simulation:
    cls = get_strategy(strategy)
    return compare(find(Shape, model), where, parse_requests(requests), [cls(cls.Options(**options))])[-1].timeline
