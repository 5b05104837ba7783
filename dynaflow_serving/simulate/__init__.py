"""A plan's time on hardware that is not at hand: `dynaflow simulate`.

`device`, `model`, `kernel_models` and `cost` describe the hardware and the work, `engine` runs a plan on it, and
`scenario` compares schedules. Every figure is simulated.
"""

from __future__ import annotations

from dynaflow_serving.simulate.catalogue import find, names
from dynaflow_serving.simulate.cost import Demand, MeasuredCosts, RooflineCosts
from dynaflow_serving.simulate.device import Device, Link, Topology
from dynaflow_serving.simulate.engine import Simulation, simulate
from dynaflow_serving.simulate.model import Shape, decoder
from dynaflow_serving.simulate.scenario import SimulatedSchedule, compare, parse_requests

__all__ = [
    "Demand",
    "Device",
    "Link",
    "MeasuredCosts",
    "RooflineCosts",
    "Shape",
    "SimulatedSchedule",
    "Simulation",
    "Topology",
    "compare",
    "decoder",
    "find",
    "names",
    "parse_requests",
    "simulate",
]
